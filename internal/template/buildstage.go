package template

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// BuildStage is a build in the making. Its methods are for one goroutine.
type BuildStage struct {
	store     *Store
	id, build string
	made      string // the directory of this making
	layers    []Layer
	erofs     Layer // all layers as one; zero for none
	inherited Template
	published bool
	lock      *lock // of all templates, shared
	discard   sync.Once
}

// StageBuild begins to make the files of a build that is waiting or building. Any number
// may be made at a time. Discard must be called, after Publish too.
func (s *Store) StageBuild(ctx context.Context, id, build string) (*BuildStage, error) {
	if _, err := s.buildDir(id, build); err != nil {
		return nil, err
	}
	t, err := s.readInfo(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(id)
	}
	if err != nil {
		return nil, fmt.Errorf("begin build: %w", err)
	}
	if b, ok := t.BuildOf(build); !ok || b.Status != StatusWaiting && b.Status != StatusBuilding {
		return nil, errdefs.WrongState.Errorf("build %s of template %s is not to be made", build, id)
	}
	// As long as this lock is shared, Open removes no garbage from there.
	l, err := shareLock(ctx, s.templates())
	if err != nil {
		return nil, fmt.Errorf("begin build: %w", err)
	}
	b := &BuildStage{store: s, id: id, build: build, lock: l}
	if b.made, err = tempDir(s.templates(), "build"); err == nil {
		err = errors.Join(os.Mkdir(b.Dir(), 0o700), os.Mkdir(b.root(), 0o700))
	}
	if err != nil {
		b.Discard()
		return nil, noSpace("begin build", err)
	}
	return b, nil
}

// MakeBuild makes a build from its beginning to the moment when its tags lead to it, for a
// caller who has all that goes into it. fill adds the layers. Sizes that n does not name are
// those of about. On error the build has ended with one, and has no files.
func (s *Store) MakeBuild(ctx context.Context, n NewBuild, about Making, fill func(*BuildStage) error) (t Info, b Build, err error) {
	n.VCPUs, n.MemMiB = cmp.Or(n.VCPUs, about.Defaults.VCPUs), cmp.Or(n.MemMiB, about.Defaults.MemMiB)
	n.DiskMiB = cmp.Or(n.DiskMiB, about.Defaults.OverlayMiB)
	if t, b, err = s.NewBuild(ctx, n); err != nil {
		return t, b, err
	}
	if err = s.makeBuild(ctx, t.ID, b.ID, about, fill); err != nil {
		err = errors.Join(err, s.SetBuild(context.WithoutCancel(ctx), t.ID, b.ID, StatusError, nil))
	}
	return t, b, err
}

func (s *Store) makeBuild(ctx context.Context, id, build string, about Making, fill func(*BuildStage) error) error {
	if err := s.SetBuild(ctx, id, build, StatusBuilding, nil); err != nil {
		return err
	}
	stage, err := s.StageBuild(ctx, id, build)
	if err != nil {
		return err
	}
	defer stage.Discard()
	if err := fill(stage); err != nil {
		return err
	}
	if _, _, err := stage.Publish(ctx, about); err != nil {
		return err
	}
	return s.Finish(ctx, id, build, nil)
}

// Dir is a directory for the making's own files, of which AddLayer takes some and Discard
// removes the others.
func (b *BuildStage) Dir() string { return filepath.Join(b.made, "work") }

// root is where the layers are, until they are published.
func (b *BuildStage) root() string { return filepath.Join(b.made, "build") }

// check says whether layers can be added.
func (b *BuildStage) check(more int) error {
	switch {
	case b.published:
		return errdefs.WrongState.Errorf("the build is published")
	case len(b.layers)+more > MaxLayers:
		return errdefs.Exhausted.Errorf("a template has at most %d layers, and this one would have %d: build it from one with fewer",
			MaxLayers, len(b.layers)+more)
	}
	return nil
}

// Inherit makes the layers of another template the lowest ones, without copying them. Its
// EROFS becomes the build's, too, unless a layer is added.
// errdefs.NotFound says that it has been removed.
func (b *BuildStage) Inherit(from Template) error {
	if err := b.check(len(from.Layers)); err != nil {
		return err
	}
	if len(b.layers) > 0 || len(from.Layers) == 0 {
		return errors.New("inherit layers: they can be the lowest ones only")
	}
	var links []Layer
	link := func(l Layer, name string) (Layer, error) {
		path := filepath.Join(b.root(), name)
		if err := os.Link(l.Path, path); err != nil {
			return Layer{}, err
		}
		l.Path = path
		links = append(links, l)
		return l, nil
	}
	var layers []Layer
	var erofs Layer
	var err error
	for i := 0; i < len(from.Layers) && err == nil; i++ {
		var l Layer
		l, err = link(from.Layers[i], layerName(i))
		layers = append(layers, l)
	}
	if err == nil && from.EROFS.Path != "" {
		erofs, err = link(from.EROFS, rootEROFS)
	}
	if err != nil {
		removed := errors.Is(err, fs.ErrNotExist)
		for _, l := range links {
			err = errors.Join(err, os.Remove(l.Path))
		}
		if removed {
			return errdefs.NotFound.Errorf("template '%s' was removed", from.Name)
		}
		return noSpace("inherit layers", err)
	}
	b.layers, b.erofs, b.inherited = layers, erofs, from
	return nil
}

// AddLayer puts a file on top of the layers. One in Dir is taken away from there; any
// other one, which must be on the same file system, keeps its name too, and must not
// change any more.
func (b *BuildStage) AddLayer(ctx context.Context, path string) error {
	if err := b.check(1); err != nil {
		return err
	}
	l, err := b.take(ctx, path, filepath.Join(b.root(), layerName(len(b.layers))))
	if err == nil {
		if err = b.dropEROFS(); err != nil {
			err = errors.Join(err, os.Remove(l.Path))
		}
	}
	if err != nil {
		return noSpace("add layer", err)
	}
	b.layers = append(b.layers, l)
	return nil
}

// take makes a file one of the build's, under the name to: one in Dir is moved, any other
// one linked. On error there is no file of that name.
func (b *BuildStage) take(ctx context.Context, path, to string) (Layer, error) {
	ours := strings.HasPrefix(filepath.Clean(path), b.Dir()+"/")
	var err error
	if ours {
		err = os.Rename(path, to)
	} else {
		err = os.Link(path, to)
	}
	if err != nil {
		return Layer{}, err
	}
	file, err := b.store.digestLayer(ctx, to, ours)
	if err == nil && file.Size == 0 {
		err = errors.New("the file is empty")
	}
	if err == nil {
		err = os.Chmod(to, 0o444)
	}
	if err != nil {
		return Layer{}, errors.Join(err, os.Remove(to))
	}
	return layerOf(to, file), nil
}

// digestLayer returns the digest of a layer. That of one which published builds have too
// is known. A file of the caller's own becomes as small as it can.
func (s *Store) digestLayer(ctx context.Context, path string, own bool) (File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return File{}, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return File{}, errors.New("it is not a file")
	case st.Nlink > 1:
		if f, ok := s.sameLayer(st); ok {
			return f, nil
		}
	case own:
		return snapfile.Dig(ctx, path)
	}
	return snapfile.Digest(ctx, path)
}

// sameLayer returns what a manifest says of a file that is a layer of a published build.
func (s *Store) sameLayer(want unix.Stat_t) (File, bool) {
	all, _, err := s.load()
	if err != nil {
		return File{}, false
	}
	for _, t := range all {
		for _, b := range t.Builds {
			dir := filepath.Join(s.templateDir(t.ID), b.ID)
			names := []string{rootEROFS}
			for i := range MaxLayers {
				names = append(names, layerName(i))
			}
			for _, name := range names {
				var st unix.Stat_t
				if unix.Lstat(filepath.Join(dir, name), &st) != nil || st.Ino != want.Ino || st.Dev != want.Dev {
					continue
				}
				var m buildManifest
				if readManifest(dir, manifestFile, &m, &m.manifest) == nil {
					f, ok := m.Files[name]
					return f, ok && f.Size == want.Size
				}
			}
		}
	}
	return File{}, false
}

// Root is the stack so far, for sandboxes that build on it. Its files are there until
// Discard.
func (b *BuildStage) Root(context.Context) (Template, error) {
	if len(b.layers) == 0 {
		return Template{}, errors.New("the build has no layers yet")
	}
	boot, err := b.store.Boot()
	if err != nil {
		return Template{}, err
	}
	return Template{
		ID: b.id, Build: b.build, Name: b.id, Boot: boot, Layers: slices.Clone(b.layers), RootSHA256: rootDigest(b.layers),
		EROFS: b.erofs,
	}, nil
}

// Publish makes the layers the files of the build, which is building and stays so: no tag
// leads to it before Finish. errdefs.WrongState says that the build has been ended,
// errdefs.NotFound that the template was removed.
func (b *BuildStage) Publish(ctx context.Context, about Making) (t Info, made Build, err error) {
	if err := b.check(0); err != nil {
		return t, made, err
	}
	if len(b.layers) == 0 {
		return t, made, errors.New("publish build: it has no layers")
	}
	if err := about.Defaults.check("publish build"); err != nil {
		return t, made, err
	}
	for _, name := range []string{"ready", manifestFile} { // of a Publish that failed
		if err := os.RemoveAll(filepath.Join(b.root(), name)); err != nil {
			return t, made, err
		}
	}
	m := buildManifest{Making: about}
	err = seal(b.root(), manifestFile, &m, &m.manifest, func(path string) (File, error) { return b.fileOf(ctx, path) })
	if err != nil {
		return t, made, noSpace("publish build", err)
	}
	ready := b.inheritedReady(about.Start)
	if err := b.inheritReady(ready); err != nil {
		return t, made, noSpace("publish build", err)
	}
	dir := filepath.Join(b.store.templateDir(b.id), b.build)
	added := false
	err = b.store.editBuild(ctx, b.id, b.build, func(info *Info, build *Build) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if build.Status != StatusBuilding {
			return errdefs.WrongState.Errorf("build %s is %s, not building", b.build, build.Status)
		}
		if err := add(b.root(), dir); err != nil {
			return err
		}
		added = true
		made = m.build(b.build, build.CreatedAt)
		made.Status, made.UpdatedAt, made.FinishedAt = build.Status, build.UpdatedAt, time.Time{}
		made.Wants, made.Owner = build.Wants, build.Owner
		*build = made
		t = *info
		return nil
	})
	if err != nil && added && !errors.Is(err, atomicfile.ErrReplaced) {
		err = errors.Join(err, dropDir(dir))
	}
	if err != nil {
		return t, made, noSpace("publish build", err)
	}
	b.published = true
	b.store.readAs(filepath.Join(dir, "ready"), ready)
	for i := range b.layers {
		b.layers[i].Path = filepath.Join(dir, layerName(i))
	}
	if b.EROFS() {
		b.erofs.Path = filepath.Join(dir, rootEROFS)
	}
	return t, made, nil
}

// inheritedReady is where the boot snapshots of the inherited build are, if this one has
// its stack and its program, and nothing otherwise.
func (b *BuildStage) inheritedReady(start Program) string {
	dir, err := b.store.readyDir(b.inherited.ID, b.inherited.Build)
	if err != nil || len(b.layers) != len(b.inherited.Layers) {
		return ""
	}
	is, err1 := json.Marshal(start) // in which no map and an empty one are the same
	was, err2 := json.Marshal(b.inherited.Start)
	if errors.Join(err1, err2) != nil || string(is) != string(was) {
		return ""
	}
	return dir
}

// inheritReady hands the boot snapshots in a directory on, without copying them. Their
// keys say whether they fit.
func (b *BuildStage) inheritReady(from string) error {
	if from == "" {
		return nil
	}
	to := filepath.Join(b.root(), "ready")
	keys, err := directories(from)
	if err != nil || len(keys) == 0 {
		return err
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	for _, key := range keys {
		if !readyKey.MatchString(key) {
			continue
		}
		err := linkAll(filepath.Join(to, key), filepath.Join(from, key))
		if errors.Is(err, fs.ErrNotExist) { // it has just been removed
			err = os.RemoveAll(filepath.Join(to, key))
		}
		if err != nil {
			return err
		}
	}
	return flush(to)
}

// linkAll makes the new directory to hold the files of another one.
func linkAll(to, from string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Link(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return flush(to)
}

// readAs notes that what was read of the snapshots in one directory was read of those in
// another, which are the same files.
func (s *Store) readAs(to, from string) {
	if from == "" {
		return
	}
	keys, _ := directories(to)
	for _, key := range keys {
		was := s.checkOf(filepath.Join(from, key))
		was.mu.Lock()
		manifest := was.manifest
		was.mu.Unlock()
		is := s.checkOf(filepath.Join(to, key))
		is.mu.Lock()
		is.manifest = manifest
		is.mu.Unlock()
	}
}

// fileOf is what the manifest is to say of a layer.
func (b *BuildStage) fileOf(ctx context.Context, path string) (File, error) {
	all := append(slices.Clone(b.layers), b.erofs)
	i := slices.IndexFunc(all, func(l Layer) bool { return l.Path == path })
	if i >= 0 && all[i].file.Size > 0 {
		return all[i].file, nil
	}
	return snapfile.Digest(ctx, path)
}

// Discard removes what was not published.
func (b *BuildStage) Discard() {
	b.discard.Do(func() {
		if b.made != "" {
			_ = removeTree(b.made) // what stays is garbage for Open
		}
		b.lock.unlock()
	})
}
