package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The store's directories. A name with a leading dot is half-made.
const (
	blobsDir = "blobs" // verified blobs, named by their digests
	diffsDir = "diffs" // the verified DiffIDs of blobs, named by the blobs' digests
	rootsDir = "roots" // directories named by the key of what they hold
	rootFile = "root.ext4"
	flatFile = "root.erofs" // the same tree, once it was asked for
	lockName = "lock"
)

// Store is the directory of downloaded blobs and of the root layers made of them. All of
// it is a cache. Safe for concurrent use; of several processes one works at a time, and
// the others wait.
type Store struct {
	dir    string
	log    *slog.Logger
	limits Limits

	flights flights

	mu sync.Mutex
	// lock is the lock of the directory while there are holds.
	lock *os.File
	// holds are the times at which they began.
	holds map[int]time.Time
	next  int
}

// Open makes the store's directories in dir if they are missing, and removes what was
// half-made unless another process works with it.
func Open(dir string, log *slog.Logger, limits Limits) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	s := &Store{dir: dir, log: log, limits: limits.orDefault(), holds: map[int]time.Time{}}
	for _, d := range []string{"", blobsDir, diffsDir, rootsDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("open images: %w", errdefs.DiskFull(err))
		}
	}
	lock, err := s.tryLock()
	if lock != nil {
		err = s.removeHalfMade()
		lock.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	return s, nil
}

// removeHalfMade removes what interrupted operations left.
func (s *Store) removeHalfMade() error {
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
	}
	return err
}

// tryLock returns nil if another process has the lock.
func (s *Store) tryLock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK || err == unix.EINTR {
			return nil, nil
		}
		return nil, fmt.Errorf("lock images: %w", err)
	}
	return f, nil
}

// Hold keeps what is pulled, imported and made from now on in the store until release is
// called. It waits, within ctx, for another process that works with the store.
func (s *Store) Hold(ctx context.Context) (release func(), err error) {
	for {
		release, err := s.hold()
		if release != nil || err != nil {
			return release, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for images: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *Store) hold() (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.holds) == 0 {
		if s.lock, err = s.tryLock(); s.lock == nil {
			return nil, err
		}
	}
	id := s.next
	s.next++
	s.holds[id] = time.Now()
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if delete(s.holds, id); len(s.holds) == 0 {
			s.lock.Close()
			s.lock = nil
		}
	}), nil
}

// heldSince is when the oldest hold began, besides the one of the caller.
func (s *Store) heldSince() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if len(s.holds) < 2 {
		return now
	}
	oldest := now
	for _, t := range s.holds {
		if t.Before(oldest) {
			oldest = t
		}
	}
	// File systems have a clock that is some milliseconds late.
	return oldest.Add(-50 * time.Millisecond)
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// touch marks what is at path as used now, and reports whether it is there.
func touch(path string) bool {
	now := time.Now()
	return os.Chtimes(path, now, now) == nil
}

// Usage is what the store takes of the disk, in bytes.
type Usage struct {
	// Blobs is the size of the downloaded blobs, Roots that of the root layers which
	// no template shares: these Prune frees.
	Blobs, Roots int64
	// Shared is the size of the root layers that templates have, too.
	Shared int64
	// Working is what operations under way have written.
	Working int64
}

// Usage adds up what the store takes of the disk.
func (s *Store) Usage() (Usage, error) {
	var u Usage
	items, err := s.items()
	if err != nil {
		return u, fmt.Errorf("measure images: %w", err)
	}
	for _, it := range items {
		switch {
		case it.shared:
			u.Shared += it.bytes
		case it.root:
			u.Roots += it.bytes
		default:
			u.Blobs += it.bytes
		}
	}
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			u.Working += diskBytes(s.path(e.Name()))
		}
	}
	return u, err
}

// diskBytes is what path and everything below takes of the disk, as far as it can be
// seen: names come and go while it looks.
func diskBytes(path string) (sum int64) {
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			if fi, err := d.Info(); err == nil {
				sum += fi.Sys().(*syscall.Stat_t).Blocks * 512
			}
		}
		return nil
	})
	return sum
}

// item is something that can be pruned by itself.
type item struct {
	path         string
	used         time.Time
	bytes        int64
	root, shared bool
}

func (s *Store) items() ([]item, error) {
	var out []item
	for _, dir := range []string{blobsDir, diffsDir, rootsDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			fi, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			it := item{path: s.path(dir, e.Name()), used: fi.ModTime(), root: dir == rootsDir}
			if !it.root {
				it.bytes = fi.Sys().(*syscall.Stat_t).Blocks * 512
				out = append(out, it)
				continue
			}
			for _, name := range []string{rootFile, flatFile} {
				// One without files is of no use to Root either.
				if fi, err := os.Lstat(filepath.Join(it.path, name)); err == nil {
					st := fi.Sys().(*syscall.Stat_t)
					it.bytes, it.shared = it.bytes+st.Blocks*512, it.shared || st.Nlink > 1
				}
			}
			out = append(out, it)
		}
	}
	return out, nil
}

// Keep says what Prune leaves: of all that no template shares the most recently used
// Bytes, and nothing that was unused for Age, unless Age is 0.
type Keep struct {
	Bytes int64
	Age   time.Duration
	// DryRun has Prune remove nothing and say what it would free.
	DryRun bool
}

// Prune removes what keep does not keep, the least recently used first, and returns how
// many bytes that freed. What a Hold keeps stays. A root layer that templates share goes
// by its age only, since that frees nothing.
func (s *Store) Prune(ctx context.Context, keep Keep) (freed int64, err error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	items, err := s.items()
	if err != nil {
		return 0, fmt.Errorf("prune images: %w", err)
	}
	slices.SortFunc(items, func(a, b item) int { return a.used.Compare(b.used) })
	var left int64
	for _, it := range items {
		if !it.shared {
			left += it.bytes
		}
	}
	held, now := s.heldSince(), time.Now()
	for _, it := range items {
		old := keep.Age > 0 && now.Sub(it.used) > keep.Age
		if !it.used.Before(held) || !old && (it.shared || left <= keep.Bytes) {
			continue
		}
		if !keep.DryRun {
			if err := s.remove(it); err != nil {
				return freed, fmt.Errorf("prune images: %w", err)
			}
		}
		if !it.shared {
			left -= it.bytes
			freed += it.bytes
		}
	}
	return freed, nil
}

// remove takes the item's name away at once and then frees it.
func (s *Store) remove(it item) error {
	gone := s.path(".gone-" + filepath.Base(it.path))
	if err := os.Rename(it.path, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(gone)
}
