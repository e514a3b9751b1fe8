package template

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The files of a ready snapshot beside those that the VMM's driver wrote.
const (
	readyOverlay  = "overlay.ext4"
	readyManifest = "manifest.json"
)

// maxReady is how many ready snapshots a template keeps: those used last.
// Whoever may choose a sandbox's size could fill the disk with them otherwise.
const maxReady = 8

var readyKey = regexp.MustCompile(`^[0-9a-f]{16,64}$`)

// Ready is a ready snapshot: a freshly booted, healthy and quiet guest of a
// template, before anybody told it who it is. Paths are absolute; the files
// never change, though they may be removed: whoever has one open keeps it.
type Ready struct {
	// Dir holds what the VMM's driver wrote.
	Dir string
	// Overlay is the guest's disk at that moment, to be cloned.
	Overlay string
}

// Shape is what the snapshots of one kind have in common. Of each there is one
// that fits the present kernel, envd, base image and VMM; the others are old.
type Shape struct {
	Driver  string `json:"driver"`
	VCPUs   int    `json:"vcpus"`
	MemMiB  int    `json:"mem_mib"`
	DiskMiB int    `json:"disk_mib"`
}

type readyMeta struct {
	Format int    `json:"format"`
	Key    string `json:"key"`
	Shape  Shape  `json:"shape"`
	// Files' digests are of what is in the files and not of their holes: see
	// hashSparse.
	Files map[string]File `json:"files"`
}

func (s *Store) readyDir(name string) string { return filepath.Join(s.templates(), name, "ready") }

// Ready returns the ready snapshot of a template with that key:
// errdefs.NotFound if there is none, errdefs.Corrupt if it is not what was
// published. Its contents are read and checked the first time that this Store
// is asked, later its sizes alone.
func (s *Store) Ready(ctx context.Context, name, key string) (Ready, error) {
	name, err := ParseName(name)
	if err != nil {
		return Ready{}, err
	}
	if !readyKey.MatchString(key) {
		return Ready{}, errdefs.InvalidArgument.Errorf("ready snapshot key %.80q is malformed", key)
	}
	dir := filepath.Join(s.readyDir(name), key)
	m, err := readReady(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Ready{}, errdefs.NotFound.Errorf("template %q has no ready snapshot of this kind", name)
	case err == nil && m.Key != key:
		err = errors.New("it was made for another key")
	}
	if err == nil {
		err = s.verify(ctx, dir, m)
	}
	if ctx.Err() != nil {
		return Ready{}, context.Cause(ctx)
	}
	if err != nil {
		return Ready{}, errdefs.Corrupt.Errorf("a ready snapshot of template %q is damaged: %w", name, err)
	}
	now := time.Now()
	_ = os.Chtimes(dir, now, now) // for removeOldReady; a guess is as good
	return Ready{Dir: dir, Overlay: filepath.Join(dir, readyOverlay)}, nil
}

// readReady reads a snapshot's manifest and checks that its files are there.
func readReady(dir string) (readyMeta, error) {
	var m readyMeta
	if _, err := os.Stat(dir); err != nil {
		return m, err
	}
	data, err := os.ReadFile(filepath.Join(dir, readyManifest))
	if errors.Is(err, fs.ErrNotExist) {
		return m, errors.New("it has no manifest")
	}
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	if m.Format != formatVersion || len(m.Files) == 0 {
		return m, fmt.Errorf("manifest has format %d and %d files", m.Format, len(m.Files))
	}
	for name, want := range m.Files {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil || !info.Mode().IsRegular() || info.Size() != want.Size {
			return m, fmt.Errorf("%s is not %d bytes long", name, want.Size)
		}
	}
	return m, nil
}

// verify compares the files with their digests, once per Store and directory.
func (s *Store) verify(ctx context.Context, dir string, m readyMeta) error {
	s.verifyMu.Lock()
	defer s.verifyMu.Unlock()
	info, err := os.Stat(filepath.Join(dir, readyManifest))
	if err != nil {
		return err
	}
	if was := s.verified[dir]; was != nil && os.SameFile(was, info) {
		return nil
	}
	for name, want := range m.Files {
		got, err := hashSparse(ctx, filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%s is not what was written", name)
		}
	}
	if s.verified == nil {
		s.verified = map[string]os.FileInfo{}
	}
	s.verified[dir] = info
	return nil
}

// DropReady removes a ready snapshot that turned out to be of no use. VMs that
// run from it go on.
func (s *Store) DropReady(name, key string) error {
	name, err := ParseName(name)
	if err != nil || !readyKey.MatchString(key) {
		return errors.Join(err, errors.New("drop ready snapshot: malformed name"))
	}
	return dropDir(filepath.Join(s.readyDir(name), key))
}

// dropDir removes a published directory; the rename comes first, so that no
// half of it is ever seen.
func dropDir(dir string) error {
	garbage, err := tempDir(filepath.Dir(dir), "old")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = os.Rename(dir, filepath.Join(garbage, "dir"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(garbage))
}

// Stage is a ready snapshot in the making, by one process and caller at a
// time.
type Stage struct {
	// Dir is for what the VMM's driver writes.
	Dir string
	// AddOverlay adds the disk, cloned from a file that does not change
	// meanwhile.
	AddOverlay func(ctx context.Context, disk string) error
	// Publish makes the snapshot visible under its key, and removes those of
	// the same shape with other keys.
	Publish func(ctx context.Context, key string, shape Shape) error
	// Discard removes what was not published and lets the next one begin. It
	// must be called, after Publish too.
	Discard func()
}

// StageReady begins a ready snapshot of a template. It waits, within ctx, until
// nobody else makes one of it: look for yours again then.
func (s *Store) StageReady(ctx context.Context, name string) (Stage, error) {
	name, err := ParseName(name)
	if err != nil {
		return Stage{}, err
	}
	parent := s.readyDir(name)
	if err := os.Mkdir(parent, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return Stage{}, fmt.Errorf("begin ready snapshot: %w", err)
	}
	l, err := waitLock(ctx, parent, nil)
	if err != nil {
		return Stage{}, fmt.Errorf("begin ready snapshot: %w", err)
	}
	err = removeGarbage(parent)
	var tmp string
	if err == nil {
		tmp, err = tempDir(parent, "ready")
	}
	if err != nil {
		l.unlock()
		return Stage{}, fmt.Errorf("begin ready snapshot: %w", err)
	}
	return Stage{
		Dir: tmp,
		AddOverlay: func(ctx context.Context, disk string) error {
			return cloneSparse(ctx, filepath.Join(tmp, readyOverlay), disk)
		},
		Publish: func(ctx context.Context, key string, shape Shape) error {
			if !readyKey.MatchString(key) {
				return fmt.Errorf("publish ready snapshot: key %.80q is malformed", key)
			}
			if err := publishReady(ctx, tmp, filepath.Join(parent, key), readyMeta{Format: formatVersion, Key: key, Shape: shape}); err != nil {
				return fmt.Errorf("publish ready snapshot: %w", err)
			}
			return removeOldReady(parent, key, shape)
		},
		Discard: func() {
			os.RemoveAll(tmp) // or it is garbage for the next one
			l.unlock()
		},
	}, nil
}

func publishReady(ctx context.Context, tmp, dst string, m readyMeta) error {
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	m.Files = map[string]File{}
	for _, e := range entries {
		path := filepath.Join(tmp, e.Name())
		if err := os.Chmod(path, 0o444); err != nil {
			return err
		}
		if m.Files[e.Name()], err = hashSparse(ctx, path); err != nil {
			return err
		}
		if err := flush(path); err != nil {
			return err
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(tmp, readyManifest), append(data, '\n')); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(tmp, 0o755), flush(tmp)); err != nil {
		return err
	}
	// What is there is damaged, or nobody would make another.
	if err := dropDir(dst); err != nil {
		return err
	}
	if err := os.Rename(tmp, dst); err != nil {
		return err
	}
	return flush(filepath.Dir(dst))
}

// removeOldReady removes the snapshots of a shape that the one with key
// supersedes, those that cannot be read, and those that are too many.
func removeOldReady(parent, key string, shape Shape) error {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	var errs []error
	type used struct {
		dir string
		at  time.Time
	}
	var others []used
	for _, e := range entries {
		if !e.IsDir() || e.Name() == key || !readyKey.MatchString(e.Name()) {
			continue
		}
		dir := filepath.Join(parent, e.Name())
		if m, err := readReady(dir); err != nil || m.Shape == shape {
			errs = append(errs, dropDir(dir))
		} else if info, err := os.Stat(dir); err == nil {
			others = append(others, used{dir, info.ModTime()})
		}
	}
	slices.SortFunc(others, func(a, b used) int { return b.at.Compare(a.at) })
	for _, o := range others[min(len(others), maxReady-1):] {
		errs = append(errs, dropDir(o.dir))
	}
	return errors.Join(errs...)
}

// CloneOverlay makes the new file path a copy of the overlay from, for the
// caller to own; see NewOverlay.
func (s *Store) CloneOverlay(ctx context.Context, path, from string) error {
	return noSpace("clone overlay", cloneSparse(ctx, path, from))
}

func noSpace(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return errdefs.Exhausted.Errorf("%s: the host's disk is full", what)
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
}

// hashSparse digests a file that is mostly holes: its size, and the number and
// content of each 4 KiB page that is not all zero. A hole and zeros that are
// written are the same to it, as they are to who reads the file.
func hashSparse(ctx context.Context, path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	const page = 4096
	var zero [page]byte
	var number [8]byte
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for at := int64(0); at < info.Size(); {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break // only a hole is left
		}
		if err != nil {
			return File{}, fmt.Errorf("hash %s: %w", filepath.Base(path), err)
		}
		if ctx.Err() != nil {
			return File{}, context.Cause(ctx)
		}
		begin -= begin % page
		n, err := io.ReadFull(io.NewSectionReader(f, begin, int64(len(buf))), buf)
		if err != nil && err != io.ErrUnexpectedEOF {
			return File{}, fmt.Errorf("hash %s: %w", filepath.Base(path), err)
		}
		for i := 0; i < n; i += page {
			part := buf[i:min(i+page, n)]
			if string(part) == string(zero[:len(part)]) {
				continue
			}
			binary.BigEndian.PutUint64(number[:], uint64(begin+int64(i))/page)
			h.Write(number[:])
			h.Write(part)
		}
		at = begin + int64(n)
	}
	return File{Size: info.Size(), SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}
