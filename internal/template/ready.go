package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// readyOverlay is the disk in a boot snapshot.
const readyOverlay = "overlay.ext4"

// maxReady is how many boot snapshots a template keeps: those used last. Without it
// creates of many sizes fill the disk with them.
const maxReady = 8

var readyKey = regexp.MustCompile(`^[0-9a-f]{16,64}$`)

// Ready is a boot snapshot: the state of a freshly booted, healthy and quiet guest
// of a template that has no identity. Paths are absolute. The files never change.
// They may be removed; a VM that has them open keeps them.
type Ready struct {
	// Dir holds what the VMM's driver wrote.
	Dir string
	// Overlay is the guest's disk at that moment, to be cloned.
	Overlay string
	// BootToken is Meta's.
	BootToken string
}

// Shape is what the snapshots of one kind have in common. Of each there is one
// that fits the present kernel, envd, base image and VMM; the others are old.
type Shape struct {
	Driver  string `json:"driver"`
	VCPUs   int    `json:"vcpus"`
	MemMiB  int    `json:"mem_mib"`
	DiskMiB int    `json:"disk_mib"`
}

// Meta is what a snapshot's manifest says besides its files.
type Meta struct {
	// Key is of what the memory depends on.
	Key   string `json:"key"`
	Shape Shape  `json:"shape"`
	// Source is set for a named snapshot.
	Source *Source `json:"source,omitempty"`
	// BootToken opens the guest of a boot snapshot that was made with a program running.
	// It is secret.
	BootToken string `json:"boot_token,omitempty"`
}

// snapshotManifest's digests are of what is in the files and not of their holes:
// see snapfile.Digest.
type snapshotManifest struct {
	manifest
	Meta
}

// check says of which directory all files were read and had their digests.
type check struct {
	mu sync.Mutex
	// manifest is that of the files that were read.
	manifest os.FileInfo
}

// readyDir is where the boot snapshots of a build are.
func (s *Store) readyDir(id, build string) (string, error) {
	dir, err := s.buildDir(id, build)
	return filepath.Join(dir, "ready"), err
}

// Ready returns the boot snapshot of a template's build with that key:
// errdefs.NotFound if there is none, errdefs.Corrupt if it is not what was
// published. Its contents are read and checked the first time that this Store
// is asked, later its sizes alone.
func (s *Store) Ready(ctx context.Context, id, build, key string) (Ready, error) {
	parent, err := s.readyDir(id, build)
	if err != nil {
		return Ready{}, err
	}
	if !readyKey.MatchString(key) {
		return Ready{}, errdefs.InvalidArgument.Errorf("boot snapshot key %.80q is malformed", key)
	}
	dir := filepath.Join(parent, key)
	m, err := readSnapshot(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Ready{}, errdefs.NotFound.Errorf("template %s has no boot snapshot of this kind", id)
	case err == nil && m.Key != key:
		err = errors.New("it was made for another key")
	}
	if err == nil {
		err = s.verify(ctx, dir, m)
	}
	if ctx.Err() != nil {
		return Ready{}, context.Cause(ctx)
	}
	if errdefs.CannotRead(err) {
		return Ready{}, unreadable("a boot snapshot", err)
	}
	if err != nil {
		return Ready{}, errdefs.Corrupt.Errorf("a boot snapshot of template %s is damaged: %w", id, err)
	}
	now := time.Now()
	_ = os.Chtimes(dir, now, now) // for removeOldReady; a guess is as good
	return Ready{Dir: dir, Overlay: filepath.Join(dir, readyOverlay), BootToken: m.BootToken}, nil
}

// readSnapshot reads a snapshot's manifest and checks that its files are there.
func readSnapshot(dir string) (snapshotManifest, error) {
	var m snapshotManifest
	err := readManifest(dir, manifestFile, &m, &m.manifest)
	return m, err
}

// checkOf returns the check of a directory, which outlives what is in it.
func (s *Store) checkOf(dir string) *check {
	s.checksMu.Lock()
	defer s.checksMu.Unlock()
	c := s.checks[dir]
	if c == nil {
		c = &check{}
		if s.checks == nil {
			s.checks = map[string]*check{}
		}
		s.checks[dir] = c
	}
	return c
}

// verify compares the files with their digests, once per Store and directory.
func (s *Store) verify(ctx context.Context, dir string, m snapshotManifest) error {
	c := s.checkOf(dir)
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(filepath.Join(dir, manifestFile))
	if err != nil {
		return err
	}
	if c.manifest != nil && os.SameFile(c.manifest, info) {
		return nil
	}
	if err := m.verify(ctx, dir, snapfile.OldDigest); err != nil {
		return err
	}
	c.manifest = info
	return nil
}

// DropReady removes a boot snapshot that cannot be used. VMs that
// run from it go on.
func (s *Store) DropReady(id, build, key string) error {
	parent, err := s.readyDir(id, build)
	if err != nil || !readyKey.MatchString(key) {
		return errors.Join(err, errors.New("drop boot snapshot: malformed key"))
	}
	return s.dropSnapshot(filepath.Join(parent, key))
}

// forgetChecks forgets what is known of the files below a directory that is gone.
func (s *Store) forgetChecks(below string) {
	s.checksMu.Lock()
	defer s.checksMu.Unlock()
	maps.DeleteFunc(s.checks, func(dir string, _ *check) bool { return strings.HasPrefix(dir, below+"/") })
}

// dropSnapshot removes a snapshot's directory, and what is known of it.
func (s *Store) dropSnapshot(dir string) error {
	s.checksMu.Lock()
	delete(s.checks, dir)
	s.checksMu.Unlock()
	return dropDir(dir)
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

// Parts are what the makings of all snapshots have in common.
type Parts struct {
	// Dir is for what the VMM's driver writes.
	Dir string
	// AddOverlay adds a copy of the disk, a file that must not change until
	// AddOverlay returns.
	AddOverlay func(ctx context.Context, disk string) error
	// Discard removes what was not published and lets the next one begin. It
	// must be called, after Publish too.
	Discard func()

	// disk has the digest of the overlay that was added, if the copy of it computed one.
	disk *File
}

// Stage is a boot snapshot in the making.
type Stage struct {
	Parts
	// Publish shows the boot snapshot under its key, and removes those of the same shape
	// with other keys.
	Publish func(ctx context.Context, m Meta) error
}

// StageReady begins a boot snapshot of a template's build. One caller of one process makes
// one of a template at a time; StageReady waits for its turn within ctx. The caller
// must then look for the snapshot again, for another may have made it.
func (s *Store) StageReady(ctx context.Context, id, build string) (Stage, error) {
	parent, err := s.readyDir(id, build)
	if err != nil {
		return Stage{}, err
	}
	if err := os.Mkdir(parent, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return Stage{}, fmt.Errorf("begin boot snapshot: %w", err)
	}
	l, err := waitLock(ctx, parent, nil)
	if err != nil {
		return Stage{}, fmt.Errorf("begin boot snapshot: %w", err)
	}
	err = removeGarbage(parent)
	var tmp string
	if err == nil {
		tmp, err = tempDir(parent, "ready")
	}
	if err != nil {
		l.unlock()
		return Stage{}, fmt.Errorf("begin boot snapshot: %w", err)
	}
	parts := newParts(tmp, l)
	return Stage{parts, func(ctx context.Context, m Meta) error {
		if !readyKey.MatchString(m.Key) {
			return fmt.Errorf("key %.80q is malformed", m.Key)
		}
		dst := filepath.Join(parent, m.Key)
		err := parts.seal(ctx, m)
		if err == nil {
			// A snapshot with this key is damaged, otherwise none would be made.
			err = replace(tmp, dst)
		}
		if err == nil {
			s.hasRead(dst)
			err = s.removeOldReady(parent, m.Key, m.Shape)
		}
		return noSpace("publish snapshot", err)
	}}, nil
}

// newParts is of a snapshot that is made in tmp, as long as l is held.
func newParts(tmp string, l *lock) Parts {
	disk := new(File)
	return Parts{
		Dir: tmp, disk: disk,
		AddOverlay: func(ctx context.Context, from string) (err error) {
			*disk, err = snapfile.CopyToKeep(ctx, filepath.Join(tmp, readyOverlay), from)
			return noSpace("clone overlay", err)
		},
		Discard: func() {
			os.RemoveAll(tmp) // or it is garbage for the next one
			l.unlock()
		},
	}
}

// seal brings a snapshot to the disk as it is to be published.
func (p Parts) seal(ctx context.Context, meta Meta) error {
	m := snapshotManifest{Meta: meta}
	return seal(p.Dir, manifestFile, &m, &m.manifest, func(path string) (File, error) {
		if p.disk.Pieces != "" && filepath.Base(path) == readyOverlay {
			return *p.disk, nil
		}
		return digestState(ctx, path)
	})
}

// hasRead notes that all of a published snapshot has just been read.
func (s *Store) hasRead(dir string) {
	c := s.checkOf(dir)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.manifest, _ = os.Stat(filepath.Join(dir, manifestFile)) // or it is read again
}

// removeOldReady removes the snapshots of a shape that the one with key
// supersedes, those that cannot be read, and those that are too many.
func (s *Store) removeOldReady(parent, key string, shape Shape) error {
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
		m, err := readSnapshot(dir)
		if errdefs.CannotRead(err) {
			continue // it may be all right
		}
		if err != nil || m.Shape == shape {
			errs = append(errs, s.dropSnapshot(dir))
		} else if info, err := os.Stat(dir); err == nil {
			others = append(others, used{dir, info.ModTime()})
		}
	}
	slices.SortFunc(others, func(a, b used) int { return b.at.Compare(a.at) })
	for _, o := range others[min(len(others), maxReady-1):] {
		errs = append(errs, s.dropSnapshot(o.dir))
	}
	return errors.Join(errs...)
}

// CloneOverlay makes the new file path a copy of the overlay from, for the
// caller to own; see NewOverlay.
func (s *Store) CloneOverlay(ctx context.Context, path, from string) error {
	return noSpace("clone overlay", snapfile.Copy(ctx, path, from))
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
