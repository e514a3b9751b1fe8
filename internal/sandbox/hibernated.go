package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// The files of a hibernated sandbox's snapshot, beside the driver's.
const (
	snapshotOverlay  = "overlay.ext4"
	snapshotManifest = "manifest.json"
)

func (s store) snapshot(id ID) string { return s.path(id, "snapshot") }

// stageSnapshot makes a directory for a new snapshot of a sandbox. That of before the
// last resume goes.
func (s store) stageSnapshot(id ID) (dir string, err error) {
	if err := s.dropSnapshots(id); err != nil {
		return "", err
	}
	dir, err = os.MkdirTemp(s.path(id), ".snapshot-")
	if err != nil {
		return "", fmt.Errorf("write snapshot: %w", err)
	}
	return dir, nil
}

// publishSnapshot makes what is in dir, together with the disk, the sandbox's
// snapshot. The disk is the same file under a second name, unless it is in the memory. The
// VM stands still.
func (s store) publishSnapshot(ctx context.Context, of Record, dir string) error {
	if err := s.at("snapshot"); err != nil {
		return err
	}
	id := of.ID
	var err error
	if !of.flat() {
		err = os.Link(s.overlay(id), filepath.Join(dir, snapshotOverlay))
	}
	if err == nil {
		err = template.SealState(ctx, dir)
	}
	if err == nil {
		err = os.Rename(dir, s.snapshot(id))
	}
	if err == nil {
		err = atomicfile.SyncDir(s.path(id))
	}
	if err == nil {
		err = s.at("snapshot published")
	}
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}

// sizesManifest is the manifest of a snapshot that an earlier version wrote: it
// has sizes and no digests.
type sizesManifest struct {
	Version int              `json:"version"`
	Sizes   map[string]int64 `json:"sizes"`
}

// saved is a sandbox's snapshot, as its manifest describes it.
type saved struct {
	// state is zero for a snapshot that has no digests.
	state     template.State
	sizesOnly bool
}

// openSnapshot reads what a sandbox's snapshot consists of: errdefs.Corrupt if it is not
// there or not complete.
func (s store) openSnapshot(id ID) (saved, error) {
	state, err := template.OpenState(s.snapshot(id))
	if err == nil {
		return saved{state: state}, nil
	}
	if errdefs.ClassOf(err) == errdefs.Unavailable {
		return saved{}, fmt.Errorf("the snapshot: %w", err)
	}
	if sizes, ok := s.oldManifest(id); ok {
		return saved{sizesOnly: true}, s.checkSizes(id, sizes)
	}
	return saved{}, fmt.Errorf("the snapshot is damaged: %w", err)
}

// checkSizes is openSnapshot of a snapshot that has no digests.
func (s store) checkSizes(id ID, sizes map[string]int64) error {
	for name, size := range sizes {
		info, err := os.Lstat(filepath.Join(s.snapshot(id), name))
		if errdefs.CannotRead(err) {
			return errdefs.Unavailable.Errorf("the snapshot cannot be read at this moment: %s", pathless(err))
		}
		if err != nil || info.Size() != size {
			return errdefs.Corrupt.Errorf("the snapshot is damaged: its %s is not %d bytes long", name, size)
		}
	}
	return nil
}

// checkSnapshot is openSnapshot for its error alone.
func (s store) checkSnapshot(id ID) error {
	_, err := s.openSnapshot(id)
	return err
}

// verify reads the files with these names, or all: errdefs.Corrupt if one is not what was
// written.
func (s saved) verify(ctx context.Context, names ...string) error {
	if s.sizesOnly {
		return nil // openSnapshot has seen them
	}
	if err := s.state.Verify(ctx, names...); err != nil {
		return fmt.Errorf("the snapshot is damaged: %w", err)
	}
	return nil
}

// snapshotBytes is the size of the snapshot's files; what cannot be seen counts
// as nothing.
func (s store) snapshotBytes(id ID) (n int64) {
	entries, _ := os.ReadDir(s.snapshot(id))
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			n += info.Size()
		}
	}
	return n
}

func (s store) oldManifest(id ID) (sizes map[string]int64, ok bool) {
	data, err := os.ReadFile(filepath.Join(s.snapshot(id), snapshotManifest))
	if err != nil {
		return nil, false
	}
	var meta sizesManifest
	if json.Unmarshal(data, &meta) != nil || meta.Version != 1 || meta.Sizes[snapshotOverlay] == 0 {
		return nil, false
	}
	return meta.Sizes, true
}

// dropSnapshots removes a sandbox's snapshot, and what is left of unfinished
// ones.
func (s store) dropSnapshots(id ID) error {
	if err := s.at("snapshot drop"); err != nil {
		return err
	}
	// The manifest goes first: what is left is not a snapshot.
	if err := remove(filepath.Join(s.snapshot(id), snapshotManifest)); err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	if err := os.RemoveAll(s.snapshot(id)); err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	return s.dropTemporary(id)
}

func (s store) dropTemporary(id ID) error {
	entries, err := os.ReadDir(s.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".snapshot-") {
			if err := os.RemoveAll(s.path(id, e.Name())); err != nil {
				return fmt.Errorf("remove snapshot: %w", err)
			}
		}
	}
	return nil
}
