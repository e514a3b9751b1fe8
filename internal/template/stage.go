package template

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Kernel is what a guest kernel's manifest says besides its files.
type Kernel struct {
	// Release is the kernel's version; empty for one brought without modules.
	Release string `json:"release,omitempty"`
	// Source says where the kernel came from.
	Source     string `json:"source"`
	EnvdSHA256 string `json:"envd_sha256"`
	// Modules are files in modules/, in load order.
	Modules []string `json:"modules"`
	// InitrdFormat tells initrds apart that different code made of the same parts.
	InitrdFormat int `json:"initrd_format"`
	// LoadableFormat does so for the archive of modules that the guest loads on demand; 0
	// if the kernel has none.
	LoadableFormat int `json:"loadable_format,omitempty"`
}

// Making is what a template's manifest says besides its files.
type Making struct {
	// Recipe is the digest of what the image was made by.
	Recipe   string   `json:"recipe"`
	Defaults Defaults `json:"defaults"`
	// Start is what runs in a guest before it is ready.
	Start Program `json:"start,omitzero"`
	// Image is the reference and digest of the image that the lowest layer came from;
	// empty for none.
	Image string `json:"image,omitempty"`
	// From is the template that it was built on, as id:build; empty for none.
	From string `json:"from,omitempty"`
	// History is oldest first.
	History []HistoryEntry `json:"history,omitempty"`
}

// HistoryEntry is one step by which a template was made.
type HistoryEntry struct {
	// CreatedBy is the step as it was written.
	CreatedBy string    `json:"created_by"`
	CreatedAt time.Time `json:"created_at,omitzero"`
	// Bytes is how much it added.
	Bytes int64 `json:"bytes,omitempty"`
	// Empty says that it changed no files.
	Empty bool `json:"empty,omitempty"`
}

// check says whether sandboxes can be made so.
func (d Defaults) check(what string) error {
	if d.VCPUs < 1 || d.MemMiB < 1 || d.OverlayMiB < MinOverlayMiB || d.OverlayMiB > MaxOverlayMiB {
		return errdefs.InvalidArgument.Errorf("%s: defaults of %d vCPUs, %d MiB of memory and %d MiB of disk",
			what, d.VCPUs, d.MemMiB, d.OverlayMiB)
	}
	return nil
}

// KernelStage is a guest kernel in the making. One is made at a time.
type KernelStage struct {
	// Dir is for vmlinux, initrd.img, init.erofs, modules/, loadable.cpio and config, and
	// for nothing else at the time of Publish.
	Dir string
	// Have is the published kernel, nil if there is none that can be used.
	Have *Kernel

	dst   string
	files map[string]File // of Have
	lock  *lock
}

// StageKernel begins a guest kernel. It waits, within ctx, until no other
// process makes one; onWait, if not nil, is called once before it waits.
// Discard must be called, after Publish too.
func (s *Store) StageKernel(ctx context.Context, onWait func()) (*KernelStage, error) {
	l, err := waitLock(ctx, s.kernels(), onWait)
	if err != nil {
		return nil, err
	}
	k := &KernelStage{lock: l, dst: filepath.Join(s.kernels(), kernelName)}
	if err := s.beginKernel(k); err != nil {
		l.unlock()
		return nil, err
	}
	return k, nil
}

func (s *Store) beginKernel(k *KernelStage) error {
	if err := removeGarbage(s.kernels()); err != nil {
		return err
	}
	switch m, err := s.kernelManifest(); {
	case err == nil:
		k.Have, k.files = &m.Kernel, m.Files
	case errdefs.CannotRead(err):
		return unreadable("the guest kernel", err)
	case !errors.Is(err, fs.ErrNotExist):
		s.log.Warn("guest kernel is made again", "error", err)
	}
	var err error
	k.Dir, err = tempDir(s.kernels(), kernelName)
	return err
}

// HasInit says whether the published kernel has an image with envd for drivers without
// initrd.
func (k *KernelStage) HasInit() bool {
	_, ok := k.files[initFile]
	return ok
}

// Keep puts all files of the published kernel except those with envd into Dir,
// without copying them.
func (k *KernelStage) Keep() error {
	for name := range k.files {
		if name == initrdFile || name == initFile {
			continue
		}
		to := filepath.Join(k.Dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return fmt.Errorf("keep kernel: %w", err)
		}
		if err := os.Link(filepath.Join(k.dst, name), to); err != nil {
			return fmt.Errorf("keep kernel: %w", err)
		}
	}
	return nil
}

// Publish makes Dir the guest kernel, in the place of the present one.
func (k *KernelStage) Publish(about Kernel) error {
	m := kernelManifest{Kernel: about}
	return noSpace("publish kernel", publish(k.Dir, k.dst, "kernel.json", &m, &m.manifest))
}

// Discard removes what was not published and lets the next one begin.
func (k *KernelStage) Discard() {
	_ = removeTree(k.Dir) // after Publish it holds the previous kernel; what stays is garbage for the next one
	k.lock.unlock()
}

// TemplateStage is the making of a template's image, by one process at a time.
type TemplateStage struct {
	// Dir is for the files of the making. A build of the template gets the image from there.
	Dir string
	// Have is the published template of that name and HaveBytes the size of its
	// image; nil if there is none that can be used. HaveEROFS says that it has an EROFS too.
	Have      *Making
	HaveBytes int64
	HaveEROFS bool

	store  *Store
	name   string
	making string // the directory that Dir is in
	shared *lock  // of all templates
	own    *lock  // of this name
}

// StageTemplate begins a template. Templates of different names can be made at
// the same time; for another one of this name it waits, within ctx, and onWait,
// if not nil, is called once before. It is one of the host's own. A name that a
// snapshot has is errdefs.AlreadyExists. Discard must be called when all is done.
func (s *Store) StageTemplate(ctx context.Context, name string, onWait func()) (*TemplateStage, error) {
	name, err := ParseName(name)
	if err != nil {
		return nil, err
	}
	t := &TemplateStage{store: s, name: name, making: filepath.Join(s.templates(), ".making-"+name)}
	// As long as this lock is shared, Open removes no garbage from there.
	if t.shared, err = shareLock(ctx, s.templates()); err != nil {
		return nil, fmt.Errorf("begin template: %w", err)
	}
	if t.own, err = lockNew(ctx, t.making, onWait); err == nil {
		err = s.beginTemplate(t)
	}
	if err != nil {
		t.unlock()
		return nil, err
	}
	return t, nil
}

func (s *Store) beginTemplate(t *TemplateStage) error {
	all, _, err := s.load()
	if err != nil {
		return fmt.Errorf("begin template: %w", err)
	}
	switch have, b, err := Resolve(all, "", t.name); {
	case err == nil && have.Source != "":
		return errdefs.AlreadyExists.Errorf("%q is the name of a snapshot", t.name)
	case err == nil:
		if err := t.look(have, b); err != nil {
			return err
		}
	}
	t.Dir = filepath.Join(t.making, "new")
	err = removeTree(t.Dir) // an interrupted making left it
	if err == nil {
		err = os.Mkdir(t.Dir, 0o700)
	}
	return noSpace("begin template", err)
}

// look finds out whether the present build can be used.
func (t *TemplateStage) look(have Info, b Build) error {
	dir, err := t.store.buildDir(have.ID, b.ID)
	if err != nil {
		return err
	}
	var m buildManifest
	switch err := readManifest(dir, manifestFile, &m, &m.manifest); {
	case err == nil:
		t.Have, t.HaveBytes = &m.Making, m.Files[baseImage].Size
		t.HaveEROFS = erofsOf(dir, m.manifest) != Layer{}
	case errdefs.CannotRead(err):
		// Sandboxes may have been made from it.
		return unreadable(fmt.Sprintf("template %q", t.name), err)
	default:
		t.store.log.Warn("template is made again", "template", t.name, "error", err)
	}
	return nil
}

// Remove removes a directory in Dir with everything below it. What is mounted
// there is unmounted first.
func (t *TemplateStage) Remove(name string) error { return removeTree(filepath.Join(t.Dir, name)) }

// Discard removes Dir and lets the next one of that name begin.
func (t *TemplateStage) Discard() {
	// The rename comes first: one that waits for the lock makes a new directory,
	// and finds nothing of it removed.
	old := t.making + "-" + rand.Text()
	if err := os.Rename(t.making, old); err == nil {
		_ = removeTree(old) // what stays is garbage for Open
	}
	t.unlock()
}

func (t *TemplateStage) unlock() {
	if t.own != nil {
		t.own.unlock()
	}
	t.shared.unlock()
}

// lockNew makes dir if it is missing and takes its lock. The previous owner of
// the lock may have removed dir with it: the lock counts only if it is still
// dir's.
func lockNew(ctx context.Context, dir string, onWait func()) (*lock, error) {
	for {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, noSpace("begin template", err)
		}
		l, err := waitLock(ctx, dir, onWait)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		held, err := l.f.Stat()
		if err == nil {
			var now fs.FileInfo
			if now, err = os.Lstat(l.f.Name()); err == nil && os.SameFile(held, now) {
				return l, nil
			}
		}
		l.unlock()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

func tempDir(parent, name string) (string, error) {
	return os.MkdirTemp(parent, "."+name+"-")
}
