package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// The files of a boot snapshot beside those that the VMM's driver wrote.
const (
	readyOverlay  = "overlay.ext4"
	readyManifest = "manifest.json"
)

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

func (s *Store) readyDir(name string) string { return filepath.Join(s.templates(), name, "ready") }

// Ready returns the boot snapshot of a template with that key:
// errdefs.NotFound if there is none, errdefs.Corrupt if it is not what was
// published. Its contents are read and checked the first time that this Store
// is asked, later its sizes alone.
func (s *Store) Ready(ctx context.Context, name, key string) (Ready, error) {
	name, err := ParseName(name)
	if err != nil {
		return Ready{}, err
	}
	if !readyKey.MatchString(key) {
		return Ready{}, errdefs.InvalidArgument.Errorf("boot snapshot key %.80q is malformed", key)
	}
	dir := filepath.Join(s.readyDir(name), key)
	m, err := readSnapshot(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Ready{}, errdefs.NotFound.Errorf("template %q has no boot snapshot of this kind", name)
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
		return Ready{}, errdefs.Corrupt.Errorf("a boot snapshot of template %q is damaged: %w", name, err)
	}
	now := time.Now()
	_ = os.Chtimes(dir, now, now) // for removeOldReady; a guess is as good
	return Ready{Dir: dir, Overlay: filepath.Join(dir, readyOverlay)}, nil
}

// readSnapshot reads a snapshot's manifest and checks that its files are there.
func readSnapshot(dir string) (snapshotManifest, error) {
	var m snapshotManifest
	err := readManifest(dir, readyManifest, &m, &m.manifest)
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
	info, err := os.Stat(filepath.Join(dir, readyManifest))
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
func (s *Store) DropReady(name, key string) error {
	name, err := ParseName(name)
	if err != nil || !readyKey.MatchString(key) {
		return errors.Join(err, errors.New("drop boot snapshot: malformed name"))
	}
	return s.dropSnapshot(filepath.Join(s.readyDir(name), key))
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

// Stage is a snapshot in the making.
type Stage struct {
	// Dir is for what the VMM's driver writes.
	Dir string
	// AddOverlay adds a copy of the disk, a file that must not change until
	// AddOverlay returns.
	AddOverlay func(ctx context.Context, disk string) error
	// Publish makes the snapshot visible. A boot snapshot gets the name of its
	// key, and those of the same shape with other keys are removed. A named
	// snapshot gets its name, unless that is taken (errdefs.AlreadyExists).
	Publish func(ctx context.Context, m Meta) error
	// Discard removes what was not published and lets the next one begin. It
	// must be called, after Publish too.
	Discard func()
}

// StageReady begins a boot snapshot of a template. One caller of one process makes
// one of a template at a time; StageReady waits for its turn within ctx. The caller
// must then look for the snapshot again, for another may have made it.
func (s *Store) StageReady(ctx context.Context, name string) (Stage, error) {
	name, err := ParseName(name)
	if err != nil {
		return Stage{}, err
	}
	parent := s.readyDir(name)
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
	return s.stage(tmp, l, func(ctx context.Context, m Meta, disk File) error {
		if !readyKey.MatchString(m.Key) {
			return fmt.Errorf("key %.80q is malformed", m.Key)
		}
		// A snapshot with this key is damaged, otherwise none would be made.
		if err := s.publishSnapshot(ctx, tmp, filepath.Join(parent, m.Key), m, disk, replace); err != nil {
			return err
		}
		return s.removeOldReady(parent, m.Key, m.Shape)
	}), nil
}

// stage is the part that all stages have in common: they are made in tmp, as
// long as l is held. disk has the digest of the overlay that was added, if the
// copy of it computed one.
func (s *Store) stage(tmp string, l *lock, publish func(ctx context.Context, m Meta, disk File) error) Stage {
	var disk File
	return Stage{
		Dir: tmp,
		AddOverlay: func(ctx context.Context, from string) (err error) {
			disk, err = snapfile.CopyToKeep(ctx, filepath.Join(tmp, readyOverlay), from)
			return noSpace("clone overlay", err)
		},
		Publish: func(ctx context.Context, m Meta) error { return noSpace("publish snapshot", publish(ctx, m, disk)) },
		Discard: func() {
			os.RemoveAll(tmp) // or it is garbage for the next one
			l.unlock()
		},
	}
}

// publishSnapshot seals a snapshot and shows it as dst.
func (s *Store) publishSnapshot(ctx context.Context, tmp, dst string, meta Meta, disk File, show func(tmp, dst string) error) error {
	m := snapshotManifest{Meta: meta}
	err := seal(tmp, readyManifest, &m, &m.manifest, func(path string) (File, error) {
		if disk.Pieces != "" && filepath.Base(path) == readyOverlay {
			return disk, nil
		}
		return digestState(ctx, path)
	})
	if err != nil {
		return err
	}
	if err := show(tmp, dst); err != nil {
		return err
	}
	// All of it has just been read.
	c := s.checkOf(dst)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.manifest, _ = os.Stat(filepath.Join(dst, readyManifest)) // or it is read again
	return nil
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
