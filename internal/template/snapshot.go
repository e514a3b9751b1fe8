package template

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	// TemplateID and Build are the template's ids; empty in snapshots of earlier versions.
	TemplateID string `json:"template_id,omitempty"`
	Build      string `json:"build,omitempty"`
	// RootImage is the digest of the template's EROFS image if the sandbox stood over that:
	// its disk is in its memory, and the snapshot has no other.
	RootImage string `json:"root_image,omitempty"`
	// FilesOnly says that there is a disk and no memory.
	FilesOnly bool `json:"files_only,omitempty"`
	// CloneKey opens a restored guest once. It is secret.
	CloneKey string `json:"clone_key"`
	// Synced says that the guest had written all its data to the disk before the
	// memory was copied: the disk can be booted without the memory.
	Synced bool `json:"synced"`
	// Login is the sandbox's.
	Login     Login     `json:"login,omitzero"`
	CreatedAt time.Time `json:"created_at"`
}

// Snapshot is a build of a template that is the state of a sandbox at one moment:
// memory and disk, from which others start. Paths are absolute. The files never change;
// they may be removed, and open ones stay readable.
type Snapshot struct {
	Ready
	Meta
}

// ParseSnapshotName checks a snapshot's name, for which ParseName's rule holds.
func ParseSnapshotName(name string) (string, error) { return parseName("snapshot", name) }

// Snapshot returns a build that is a snapshot: errdefs.NotFound if there is none,
// errdefs.Corrupt if it is not what was published. As with Ready, its contents
// are read and checked once.
func (s *Store) Snapshot(ctx context.Context, id, build string) (Snapshot, error) {
	dir, err := s.buildDir(id, build)
	if err != nil {
		return Snapshot{}, err
	}
	m, err := readSnapshot(dir)
	if err == nil && m.Source == nil {
		err = errors.New("its manifest names no source")
	}
	if err == nil {
		err = s.verify(ctx, dir, m)
	}
	switch {
	case ctx.Err() != nil:
		return Snapshot{}, context.Cause(ctx)
	case err == nil:
		return Snapshot{Meta: m.Meta, Ready: Ready{Dir: dir, Overlay: filepath.Join(dir, readyOverlay)}}, nil
	case errdefs.CannotRead(err):
		return Snapshot{}, unreadable("the snapshot", err)
	case missing(dir):
		return Snapshot{}, errdefs.NotFound.Errorf("the snapshot was deleted")
	}
	return Snapshot{}, errdefs.Corrupt.Errorf("the snapshot is damaged: %w", err)
}

// Bytes is what a build takes on the disk, without its boot snapshots.
func (s *Store) Bytes(id, build string) (bytes int64) {
	dir, err := s.buildDir(id, build)
	if err != nil {
		return 0
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		var st unix.Stat_t
		if e.Type().IsRegular() && unix.Lstat(filepath.Join(dir, e.Name()), &st) == nil {
			bytes += st.Blocks * 512
		}
	}
	return bytes
}

// Naming is what a snapshot is to be called: a name of its project's, or none, and a tag.
type Naming struct {
	Project, Name, Tag string
	// New refuses a name and tag that a snapshot has. Otherwise the tag moves.
	New bool
}

// SnapshotStage is a snapshot in the making.
type SnapshotStage struct {
	Parts
	// Publish makes the snapshot a build of the template that has the name, or of a new
	// one, and makes the tag lead to it. b says what is not in the manifest.
	Publish func(ctx context.Context, m Meta, b Build) (Info, Build, error)
}

// StageSnapshot begins a snapshot: errdefs.AlreadyExists if the name is that of a
// template, or an id. Any number may be made at a time.
func (s *Store) StageSnapshot(ctx context.Context, n Naming) (SnapshotStage, error) {
	if n.Name != "" {
		if _, err := ParseSnapshotName(n.Name); err != nil {
			return SnapshotStage{}, err
		}
	}
	if n.Tag = cmp.Or(n.Tag, DefaultTag); n.Tag != DefaultTag {
		if _, err := ParseTag(n.Tag); err != nil {
			return SnapshotStage{}, err
		}
	}
	if _, err := s.place(n); err != nil {
		return SnapshotStage{}, err
	}
	// As long as this lock is shared, Open removes no garbage from there.
	l, err := shareLock(ctx, s.templates())
	if err != nil {
		return SnapshotStage{}, fmt.Errorf("begin snapshot: %w", err)
	}
	tmp, err := tempDir(s.templates(), "snapshot")
	if err != nil {
		l.unlock()
		return SnapshotStage{}, noSpace("begin snapshot", err)
	}
	parts := newParts(tmp, l)
	return SnapshotStage{parts, func(ctx context.Context, m Meta, b Build) (t Info, _ Build, err error) {
		if m.Source == nil {
			return t, b, errors.New("the snapshot has no source")
		}
		if err := parts.seal(ctx, m); err != nil {
			return t, b, noSpace("publish snapshot", err)
		}
		err = s.change(ctx, func() error {
			if err := context.Cause(ctx); err != nil { // nothing is to be seen of it
				return err
			}
			if t, err = s.place(n); err != nil {
				return err
			}
			t.Source, b.ID, b.CreatedAt = m.Source.Sandbox, newUUID(), m.Source.CreatedAt
			t, err = s.publishBuild(tmp, t, b, n.Tag)
			return err
		})
		if err != nil {
			return t, b, noSpace("publish snapshot", err)
		}
		s.hasRead(filepath.Join(s.templateDir(t.ID), b.ID))
		return t, t.Builds[0], nil
	}}, nil
}

// place returns the template that a snapshot with that name becomes a build of, which
// may not be there yet.
func (s *Store) place(n Naming) (Info, error) {
	all, _, err := s.load()
	if err != nil {
		return Info{}, err
	}
	fresh := Info{ID: newTemplateID(), Project: n.Project}
	if n.Name == "" {
		return fresh, nil
	}
	fresh.Names = []string{n.Name}
	for _, t := range all {
		mine := t.Project == n.Project
		switch named := slices.Contains(t.Names, n.Name); {
		case t.ID == n.Name:
			return t, errdefs.AlreadyExists.Errorf("%q is the id of a template", n.Name)
		case named && t.Source == "" && (mine || t.Project == ""):
			return t, errdefs.AlreadyExists.Errorf("%q is the name of a template", n.Name)
		case named && mine:
			if _, taken := t.BuildOf(n.Tag); taken && n.New {
				return t, errdefs.AlreadyExists.Errorf("snapshot %q exists already", n.Name)
			}
			return t, nil
		}
	}
	return fresh, nil
}
