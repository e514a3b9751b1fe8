package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// Kind names what Verify reads.
type Kind string

const (
	KindKernel       Kind = "kernel"
	KindTemplate     Kind = "template"
	KindBootSnapshot Kind = "boot snapshot"
	KindSnapshot     Kind = "snapshot"
)

// Verified is what Verify found of one directory.
type Verified struct {
	Kind Kind
	// Name is that of a template or snapshot; a boot snapshot's is its
	// template's, a slash and its key.
	Name string
	// Bytes is the size of its files.
	Bytes int64
	// Err is nil if all files are what was written, errdefs.Corrupt if not.
	Err error
}

// Verify reads every file that has a digest in the directories that want names,
// and calls fn with the result of each directory. It leaves damaged ones in place;
// a snapshot is checked again at its next use. An error is fn's, or one of listing
// the store.
func (s *Store) Verify(ctx context.Context, want func(Kind, string) bool, fn func(Verified) error) error {
	look := func(kind Kind, name, dir string, check func() (manifest, error)) error {
		if !want(kind, name) {
			return nil
		}
		m, err := check()
		if errors.Is(err, fs.ErrNotExist) && missing(dir) {
			return nil // removed since it was listed
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		v := Verified{Kind: kind, Name: name, Err: err}
		for _, f := range m.Files {
			v.Bytes += f.Size
		}
		return fn(v)
	}
	plain := readOnce()
	kernel := filepath.Join(s.kernels(), kernelName)
	err := look(KindKernel, kernelName, kernel, func() (manifest, error) {
		m, err := s.kernelManifest()
		return m.manifest, firstOf(damage(err), func() error { return m.verifyBy(ctx, kernel, plain) })
	})
	if err != nil {
		return err
	}
	all, bad, err := s.load()
	if err != nil {
		return err
	}
	for _, id := range bad {
		err := look(KindTemplate, id, s.templateDir(id), func() (manifest, error) {
			_, err := s.readInfo(id)
			return manifest{}, damage(err)
		})
		if err != nil {
			return err
		}
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if err := s.verifyBuild(ctx, t, b, look, plain); err != nil {
				return err
			}
		}
	}
	return nil
}

// reader computes the digest of a file, of the kind that want has.
type reader func(ctx context.Context, path string, want File) (File, error)

// readOnce is a reader that reads a layer once, however many builds share it.
func readOnce() reader {
	type file struct {
		dev, ino uint64
		pieces   bool
	}
	known := map[file]File{}
	return func(ctx context.Context, path string, want File) (File, error) {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return File{}, err
		}
		key := file{st.Dev, st.Ino, want.Pieces != ""}
		if f, ok := known[key]; ok {
			return f, nil
		}
		f, err := digestAs(ctx, path, want)
		if err == nil && st.Nlink > 1 {
			known[key] = f
		}
		return f, err
	}
}

// digestAs computes the digest of the kind that want has.
func digestAs(ctx context.Context, path string, want File) (File, error) {
	if want.Pieces != "" {
		return snapfile.Digest(ctx, path)
	}
	return hashFile(path)
}

// verifyBuild is Verify of one build and its boot snapshots.
func (s *Store) verifyBuild(
	ctx context.Context, t Info, b Build, look func(Kind, string, string, func() (manifest, error)) error,
	plain reader,
) error {
	dir := filepath.Join(s.templateDir(t.ID), b.ID)
	name := t.Reference(b)
	if t.Source != "" {
		return look(KindSnapshot, name, dir, func() (manifest, error) { return s.verifyAgain(ctx, dir) })
	}
	if b.Status != StatusReady && missing(dir) {
		return nil // it has no files
	}
	err := look(KindTemplate, name, dir, func() (manifest, error) {
		var m buildManifest
		err := readManifest(dir, manifestFile, &m, &m.manifest)
		if err == nil {
			_, err = layersOf(dir, m.manifest)
		}
		return m.manifest, firstOf(damage(err), func() error { return m.verifyBy(ctx, dir, plain) })
	})
	if err != nil {
		return err
	}
	keys, err := directories(filepath.Join(dir, "ready"))
	if err != nil {
		return err
	}
	for _, key := range keys {
		dir := filepath.Join(dir, "ready", key)
		if err := look(KindBootSnapshot, name+"/"+key, dir, func() (manifest, error) { return s.verifyAgain(ctx, dir) }); err != nil {
			return err
		}
	}
	return nil
}

// Reference is how users name a build.
func (t Info) Reference(b Build) string {
	name := t.Name()
	if t.Project != "" {
		name = t.Project + "/" + name
	}
	for _, tag := range t.Tags {
		if tag.Build == b.ID && tag.Name == DefaultTag {
			return name
		}
	}
	for _, tag := range t.Tags {
		if tag.Build == b.ID {
			return name + ":" + tag.Name
		}
	}
	return name + ":" + b.ID
}

// verifyAgain reads a snapshot whether or not it was read before.
func (s *Store) verifyAgain(ctx context.Context, dir string) (manifest, error) {
	m, err := readSnapshot(dir)
	if err != nil {
		return m.manifest, damage(err)
	}
	c := s.checkOf(dir)
	c.mu.Lock()
	c.manifest = nil
	c.mu.Unlock()
	return m.manifest, s.verify(ctx, dir, m)
}

// directories lists the published directories in dir, in order of their names.
func directories(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", filepath.Base(dir), err)
	}
	for _, e := range entries {
		if _, err := ParseName(e.Name()); err == nil && e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func missing(dir string) bool {
	_, err := os.Lstat(dir)
	return errors.Is(err, fs.ErrNotExist)
}

// firstOf returns err or, if that is nil, what then returns.
func firstOf(err error, then func() error) error {
	if err != nil {
		return err
	}
	return then()
}
