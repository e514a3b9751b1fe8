package template

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// unknownSource is the source of a snapshot whose manifest does not say it. It has the
// form of a sandbox's id and is that of none.
const unknownSource = "sb-0000000000000000"

// migrate takes over what versions without ids made: templates/<name> with its files,
// and snapshots/<name>. They become the host's own, under their names. All of it can be
// done again from any point on: ids are digests of what is there, a directory is listed
// before it gets its new name, and it keeps the old one until then. Called within change.
func (s *Store) migrate() {
	for _, parent := range []string{s.templates(), s.oldSnapshots()} {
		entries, err := os.ReadDir(parent)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Error("earlier version's templates not looked at", "error", err)
		}
		for _, e := range entries {
			if _, err := ParseName(e.Name()); err != nil || !e.IsDir() || s.isTemplate(parent, e.Name()) {
				continue
			}
			if err := s.adopt(parent, e.Name()); err != nil {
				s.log.Error("not taken over from an earlier version", "name", e.Name(), "error", err)
			}
		}
	}
	// The lock of an earlier version, and the directory unless something is in it.
	_ = os.Remove(lockOf(s.oldSnapshots()))
	_ = os.Remove(s.oldSnapshots())
}

// oldSnapshots is where versions without ids kept named snapshots.
func (s *Store) oldSnapshots() string { return filepath.Join(s.dir, "snapshots") }

// isTemplate says whether a directory is a template of this version.
func (s *Store) isTemplate(parent, name string) bool {
	return parent == s.templates() && idPattern.MatchString(name) && missing(filepath.Join(parent, name, baseImage))
}

// adopt makes a directory of an earlier version a build of a template.
func (s *Store) adopt(parent, name string) error {
	dir := filepath.Join(parent, name)
	t, b, err := s.identify(parent, dir)
	if err != nil {
		return err
	}
	t.Names = []string{name}
	all, _, err := s.load()
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.ID != t.ID && other.Project == "" && slices.Contains(other.Names, name) {
			s.log.Warn("not taken over: the name is taken", "directory", dir, "template", other.ID)
			return nil
		}
	}
	have, err := s.readInfo(t.ID)
	switch {
	case err == nil:
		have.Source = t.Source
		t = have
	case !errors.Is(err, fs.ErrNotExist): // what is listed in it would be lost
		return err
	}
	if _, listed := t.BuildOf(b.ID); !listed {
		t.Builds = append([]Build{b}, t.Builds...)
		t.lead(DefaultTag, b.ID, b.CreatedAt)
	}
	if err := os.MkdirAll(s.templateDir(t.ID), 0o755); err != nil {
		return err
	}
	if err := sealed.Write(filepath.Join(s.templateDir(t.ID), infoFile), t); err != nil {
		return err
	}
	to := filepath.Join(s.templateDir(t.ID), b.ID)
	if err := add(dir, to); err != nil {
		return err
	}
	s.index.mu.Lock()
	s.index.read = false
	s.index.mu.Unlock()
	s.log.Info("taken over from an earlier version", "name", name, "template", t.ID, "build", b.ID)
	return errors.Join(flush(parent), flush(s.templates()))
}

// identify says what a directory of an earlier version is, also a damaged one.
func (s *Store) identify(parent, dir string) (Info, Build, error) {
	at := modified(dir)
	name := filepath.Base(dir)
	t := Info{CreatedAt: at, UpdatedAt: at}
	b := Build{Status: StatusReady, CreatedAt: at, UpdatedAt: at, FinishedAt: at}
	if parent == s.templates() { // the manifest had the name of what is known of templates now
		err := os.Rename(filepath.Join(dir, infoFile), filepath.Join(dir, manifestFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return t, b, err
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return t, b, err
	}
	var m struct {
		buildManifest
		Meta
	}
	_ = json.Unmarshal(data, &m) // a damaged one says nothing
	if parent == s.templates() {
		t.ID, b = HostID(name), m.build(digestUUID("template", name, string(data)), at)
		return t, b, nil
	}
	t.ID, t.Source, b.ID = digestID("snapshot", name, string(data)), unknownSource, digestUUID("snapshot", name, string(data))
	b.VCPUs, b.MemMiB, b.DiskMiB = m.Shape.VCPUs, m.Shape.MemMiB, m.Shape.DiskMiB
	if src := m.Source; src != nil {
		if src.Sandbox != "" {
			t.Source = src.Sandbox
		}
		made := src.CreatedAt
		t.CreatedAt, t.UpdatedAt, b.CreatedAt, b.UpdatedAt, b.FinishedAt = made, made, made, made, made
		b.Base, b.Over = src.Base, HostID(src.Template)
	}
	return t, b, nil
}
