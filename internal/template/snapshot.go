package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Source is what a named snapshot was made of.
type Source struct {
	// Sandbox is the id of the sandbox, which may be gone.
	Sandbox string `json:"sandbox"`
	// Template is the template of the sandbox, Base the digest of its base image,
	// over which the disk is mounted.
	Template string `json:"template"`
	Base     string `json:"base"`
	// CloneKey opens a restored guest once. It is secret.
	CloneKey string `json:"clone_key"`
	// Synced says that the guest had written all its data to the disk before the
	// memory was copied: the disk can be booted without the memory.
	Synced bool `json:"synced"`
	// Login is the sandbox's.
	Login     Login     `json:"login,omitzero"`
	CreatedAt time.Time `json:"created_at"`
}

// Snapshot is a named snapshot: memory and disk of a sandbox at one moment, from
// which others start. Paths are absolute. The files never change; they may be
// removed, and open ones stay readable.
type Snapshot struct {
	Name string
	Ready
	Meta
	// Bytes is what it takes on the disk.
	Bytes int64
}

func (s *Store) snapshotDir(name string) string { return filepath.Join(s.snapshots(), name) }

// ParseSnapshotName checks a snapshot's name, for which ParseName's rule holds.
func ParseSnapshotName(name string) (string, error) { return parseName("snapshot", name) }

// Snapshot returns the snapshot of that name: errdefs.NotFound if there is none,
// errdefs.Corrupt if it is not what was published. As with Ready, its contents
// are read and checked once.
func (s *Store) Snapshot(ctx context.Context, name string) (Snapshot, error) {
	name, err := ParseSnapshotName(name)
	if err != nil {
		return Snapshot{}, err
	}
	for {
		was, err := os.Lstat(s.snapshotDir(name))
		if errors.Is(err, fs.ErrNotExist) {
			return Snapshot{}, errdefs.NotFound.Errorf("snapshot %q does not exist", name)
		}
		if err != nil {
			return Snapshot{}, fmt.Errorf("look at snapshot %q: %w", name, err)
		}
		snap, m, err := s.readNamed(name)
		if err == nil {
			err = s.verify(ctx, snap.Dir, m)
		}
		if ctx.Err() != nil {
			return Snapshot{}, context.Cause(ctx)
		}
		if err == nil {
			return snap, nil
		}
		if errdefs.CannotRead(err) {
			return Snapshot{}, unreadable(fmt.Sprintf("snapshot %q", name), err)
		}
		if now, _ := os.Lstat(s.snapshotDir(name)); now != nil && os.SameFile(was, now) {
			return Snapshot{}, errdefs.Corrupt.Errorf("snapshot %q is damaged: %w", name, err)
		}
		// It was deleted while it was read; another may have its name now.
	}
}

// readNamed reads what is known of a named snapshot without its contents.
func (s *Store) readNamed(name string) (Snapshot, snapshotManifest, error) {
	dir := s.snapshotDir(name)
	m, err := readSnapshot(dir)
	if err == nil && m.Source == nil {
		err = errors.New("its manifest names no source")
	}
	if err != nil {
		return Snapshot{}, m, err
	}
	snap := Snapshot{Name: name, Meta: m.Meta, Ready: Ready{Dir: dir, Overlay: filepath.Join(dir, readyOverlay)}}
	for file := range m.Files {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, file), &st); err == nil {
			snap.Bytes += st.Blocks * 512
		}
	}
	return snap, m, nil
}

// Snapshots returns the named snapshots, newest first. A damaged one is left out
// and logged.
func (s *Store) Snapshots() ([]Snapshot, error) {
	entries, err := os.ReadDir(s.snapshots())
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var list []Snapshot
	for _, e := range entries {
		if _, err := ParseSnapshotName(e.Name()); err != nil || !e.IsDir() {
			continue
		}
		snap, _, err := s.readNamed(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed
		}
		if err != nil {
			s.log.Warn("snapshot is not usable", "snapshot", e.Name(), "error", err)
			continue
		}
		list = append(list, snap)
	}
	slices.SortFunc(list, func(a, b Snapshot) int {
		if c := b.Source.CreatedAt.Compare(a.Source.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list, nil
}

// DropSnapshot removes a named snapshot, also a damaged one: errdefs.NotFound if
// there is none. VMs that run from it go on.
func (s *Store) DropSnapshot(name string) error {
	name, err := ParseSnapshotName(name)
	if err != nil {
		return err
	}
	dir := s.snapshotDir(name)
	if info, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return errdefs.NotFound.Errorf("snapshot %q does not exist", name)
	}
	if err := s.dropSnapshot(dir); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return flush(s.snapshots())
}

// StageSnapshot begins a named snapshot: errdefs.AlreadyExists if the name is
// that of a template or another snapshot. Any number may be made at a time.
func (s *Store) StageSnapshot(ctx context.Context, name string) (Stage, error) {
	name, err := ParseSnapshotName(name)
	if err != nil {
		return Stage{}, err
	}
	taken := errdefs.AlreadyExists.Errorf("snapshot %q exists already", name)
	dir := s.snapshotDir(name)
	if info, err := os.Lstat(dir); err == nil && info.IsDir() {
		return Stage{}, taken
	} else if err == nil {
		return Stage{}, errdefs.InvalidArgument.Errorf("snapshot name %q is reserved", name)
	}
	if _, err := os.Lstat(filepath.Join(s.templates(), name)); err == nil {
		return Stage{}, errdefs.AlreadyExists.Errorf("%q is the name of a template", name)
	}
	// As long as this lock is shared, Open removes no garbage from there.
	l, err := shareLock(ctx, s.snapshots())
	if err != nil {
		return Stage{}, fmt.Errorf("begin snapshot: %w", err)
	}
	tmp, err := tempDir(s.snapshots(), "snapshot")
	if err != nil {
		l.unlock()
		return Stage{}, noSpace("begin snapshot", err)
	}
	return s.stage(tmp, l, func(ctx context.Context, m Meta, disk File) error {
		if m.Source == nil {
			return errors.New("the snapshot has no source")
		}
		err := s.publishSnapshot(ctx, tmp, dir, m, disk, add)
		if errors.Is(err, fs.ErrExist) {
			return taken
		}
		return err
	}), nil
}
