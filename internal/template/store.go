// Package template keeps the immutable things that microVMs start from:
// kernel, initrd and base images, how they are made, and the overlay disks
// laid over them.
package template

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

const (
	// kernelName is the one guest kernel that templates boot with.
	kernelName = "default"
	// initrdFile and initFile are the files of a kernel that carry envd.
	initrdFile = "initrd.img"
	initFile   = "init.erofs"
	// baseImage is the root file system of a build.
	baseImage = "base.ext4"
	// manifestFile names the other files of a build, or of a boot snapshot.
	manifestFile = "manifest.json"
)

// Store is the directory of kernels, templates and overlay seeds. What is in
// it is complete: everything is made under a name with a leading dot and
// published by a rename. Safe for concurrent use, by several processes too.
type Store struct {
	dir string
	log *slog.Logger

	index index
	// changeMu is held within change.
	changeMu sync.Mutex

	ownerMu sync.Mutex
	// owner is what claim returned, and ownerFile has the lock.
	owner     int64
	ownerFile *os.File

	checksMu sync.Mutex
	// checks are the directories of snapshots whose files were read.
	checks map[string]*check
}

// Open makes the store's directories if they are missing and removes what
// interrupted setups, builds and snapshots left, unless one is under way at this moment.
// Builds whose process is gone become an error.
func Open(dir string, log *slog.Logger) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	s := &Store{dir: dir, log: log}
	for _, d := range []string{dir, s.kernels(), s.templates(), s.seeds()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open template store: %w", err)
		}
	}
	// A directory that was there may have wider permissions.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	for _, d := range []string{s.kernels(), s.templates(), s.seeds()} {
		l, err := tryLock(d)
		if errors.Is(err, errLocked) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open template store: %w", err)
		}
		err = removeGarbage(d)
		l.unlock()
		if err != nil {
			return nil, fmt.Errorf("open template store: %w", err)
		}
	}
	err = s.change(context.Background(), func() error {
		s.migrate()
		return errors.Join(s.failInterrupted(), s.removeUnlisted())
	})
	if err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	return s, nil
}

// View returns the store in dir for reading only: it makes, removes and checks
// nothing.
func View(dir string, log *slog.Logger) *Store { return &Store{dir: dir, log: log} }

// Dir is the store's directory, absolute.
func (s *Store) Dir() string { return s.dir }

func (s *Store) kernels() string   { return filepath.Join(s.dir, "kernels") }
func (s *Store) templates() string { return filepath.Join(s.dir, "templates") }
func (s *Store) seeds() string     { return filepath.Join(s.dir, "seeds") }

// Boot is what a guest boots: a kernel with the initrd that carries envd.
// Paths are absolute; the files never change, a newer kernel or initrd is a
// new file under the same name.
type Boot struct {
	Kernel string // uncompressed vmlinux
	Initrd string
	// InitImage is an EROFS with envd as /init, for drivers without kernel and initrd. It is
	// empty where an earlier setup made the kernel.
	InitImage string

	// Release is the kernel's version, as uname -r in the guest prints it;
	// empty for a kernel brought without modules.
	Release string
	// Source says where the kernel came from: a package and its version, or
	// the digest of the file that the user brought.
	Source string

	KernelSHA256 string
	InitrdSHA256 string
	InitSHA256   string // of InitImage
	// EnvdSHA256 is the digest of the envd inside the initrd.
	EnvdSHA256 string
}

// Template is what a sandbox starts from. Paths are absolute.
type Template struct {
	// ID and Build say which it is, Name is its first name, or the id if it has none.
	ID, Build, Name string
	Boot
	// Layers are the root file system, lowest first.
	Layers []Layer
	// RootSHA256 is the digest of all of them.
	RootSHA256 string
	// EROFS is the same root file system as one read-only EROFS, for drivers without block
	// devices. It is zero where there is none: such drivers do not run the template.
	EROFS    Layer
	Defaults Defaults
	// Start is what runs in a guest before it is ready.
	Start Program
}

// Program is what a guest runs from its boot on.
type Program struct {
	// Start is run in the background, and Ready again and again until it succeeds: shell
	// commands. Without Start there is no program.
	Start string `json:"start,omitempty"`
	Ready string `json:"ready,omitempty"`
	// Shell are the arguments before the text of a command; /bin/sh -c if there are none.
	Shell []string `json:"shell,omitempty"`
	// Login is the user, directory and variables of both.
	Login
}

// Defaults are what a sandbox has if its creator names nothing else.
type Defaults struct {
	VCPUs      int `json:"vcpus"`
	MemMiB     int `json:"mem_mib"`
	OverlayMiB int `json:"overlay_mib"`
	Login
}

// Login is the user, directory and variables of programs in a sandbox, unless
// their call names others.
type Login struct {
	// User is the account that they run as.
	User string `json:"user,omitempty"`
	// Workdir is their directory; the user's home if empty.
	Workdir string `json:"workdir,omitempty"`
	// Env holds their variables, which may be secret.
	Env map[string]string `json:"env,omitempty"`
}

// Over returns l with its empty fields taken from below.
func (l Login) Over(below Login) Login {
	env := maps.Clone(below.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, l.Env)
	return Login{User: cmp.Or(l.User, below.User), Workdir: cmp.Or(l.Workdir, below.Workdir), Env: env}
}

// Get returns the template that a text names to the host: errdefs.NotFound if there is
// none, errdefs.Corrupt if its files are not what was published, and
// errdefs.Unavailable if there is no guest kernel to boot it with.
func (s *Store) Get(text string) (Template, error) {
	t, b, err := s.Resolve("", text)
	if err != nil {
		return Template{}, err
	}
	return s.Root(t, b)
}

// Root returns a build to start sandboxes from; the errors are those of Get.
func (s *Store) Root(t Info, b Build) (Template, error) {
	dir, err := s.buildDir(t.ID, b.ID)
	if err != nil {
		return Template{}, err
	}
	var m buildManifest
	err = readManifest(dir, manifestFile, &m, &m.manifest)
	switch {
	case errors.Is(err, fs.ErrNotExist) && missing(s.templateDir(t.ID)):
		return Template{}, notFound(t.Name())
	case errdefs.CannotRead(err):
		return Template{}, unreadable(fmt.Sprintf("template %q", t.Name()), err)
	case errors.Is(err, fs.ErrNotExist) && b.Status != StatusReady:
		return Template{}, errdefs.WrongState.Errorf("build %s of template %q is %s, not ready", b.ID, t.Name(), b.Status)
	}
	layers, e := layersOf(dir, m.manifest)
	if err = cmp.Or(err, e); err != nil {
		return Template{}, errdefs.Corrupt.Errorf("template %q is damaged, %s: %w", t.Name(), t.remake(), err)
	}
	boot, err := s.Boot()
	if err != nil {
		return Template{}, err
	}
	return Template{
		ID: t.ID, Build: b.ID, Name: t.Name(),
		Boot:       boot,
		Layers:     layers,
		RootSHA256: rootDigest(layers),
		EROFS:      erofsOf(dir, m.manifest),
		Defaults:   m.Defaults,
		Start:      m.Start,
	}, nil
}

// remake says how a damaged template is mended.
func (t Info) remake() string {
	if t.ID == HostID(DefaultName) {
		return "run wrenn setup"
	}
	return "build it again"
}

// RootOf returns what an existing disk is mounted over: the build of a template, by its
// id or one of the host's names, whose layers have this digest, or the one of DefaultTag
// if none has. The errors are those of Get.
func (s *Store) RootOf(template, root string) (Template, error) {
	all, _, err := s.load()
	if err != nil {
		return Template{}, err
	}
	for _, t := range all {
		if t.ID != template && (t.Project != "" || !slices.Contains(t.Names, template)) {
			continue
		}
		if i := slices.IndexFunc(t.Builds, func(b Build) bool { return b.Base == root && root != "" && t.Source == "" }); i >= 0 {
			return s.Root(t, t.Builds[i])
		}
	}
	return s.Get(template)
}

// Has says whether a build is still there.
func (s *Store) Has(id, build string) bool {
	dir, err := s.buildDir(id, build)
	return err == nil && !missing(dir)
}

// Boot returns the guest kernel and its initrd: errdefs.Unavailable if setup has not made
// it yet, errdefs.Corrupt if its files are not what was published.
func (s *Store) Boot() (Boot, error) {
	dir := filepath.Join(s.kernels(), kernelName)
	m, err := s.kernelManifest()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Boot{}, errdefs.Unavailable.Errorf("there is no guest kernel yet, run wrenn setup")
	case errdefs.CannotRead(err):
		return Boot{}, unreadable("the guest kernel", err)
	case err != nil:
		return Boot{}, errdefs.Corrupt.Errorf("the guest kernel is damaged, run wrenn setup: %w", err)
	}
	boot := Boot{
		Kernel:       filepath.Join(dir, "vmlinux"),
		Initrd:       filepath.Join(dir, initrdFile),
		Release:      m.Release,
		Source:       m.Source,
		KernelSHA256: m.Files["vmlinux"].SHA256,
		InitrdSHA256: m.Files[initrdFile].SHA256,
		EnvdSHA256:   m.EnvdSHA256,
	}
	if f, ok := m.Files[initFile]; ok {
		boot.InitImage, boot.InitSHA256 = filepath.Join(dir, initFile), f.SHA256
	}
	return boot, nil
}

// File is what a manifest says about one published file. That of a snapshot has
// the digest of the file's pieces, every other one that of the whole contents.
type File = snapfile.File

const formatVersion = 1

// manifest is the part that every published directory's manifest has.
type manifest struct {
	Format int             `json:"format"`
	Files  map[string]File `json:"files"`
}

type kernelManifest struct {
	manifest
	Kernel
}

// buildManifest is that of a build with layers.
type buildManifest struct {
	manifest
	Making
}

// build is what a template lists of the build.
func (m buildManifest) build(id string, at time.Time) Build {
	base := "" // of a damaged one
	if layers, err := layersOf("", m.manifest); err == nil {
		base = rootDigest(layers)
	}
	return Build{
		ID: id, Status: StatusReady, CreatedAt: at, UpdatedAt: at, FinishedAt: at,
		VCPUs: m.Defaults.VCPUs, MemMiB: m.Defaults.MemMiB, DiskMiB: m.Defaults.OverlayMiB, Base: base,
	}
}

func (s *Store) kernelManifest() (kernelManifest, error) {
	var m kernelManifest
	err := readManifest(filepath.Join(s.kernels(), kernelName), "kernel.json", &m, &m.manifest)
	return m, err
}

// unreadable is the error of a thing that cannot be read now and may be undamaged.
func unreadable(what string, err error) error {
	var errno syscall.Errno
	errors.As(err, &errno)
	return errdefs.Unavailable.Errorf("%s cannot be read at this moment: %w", what, errno)
}

// readManifest reads dir's manifest into v, of which m is a part, and checks
// that each file that it names is there with its size. Contents are not
// hashed: that would make every create read the image. A dir that does not
// exist is fs.ErrNotExist; every other error is damage, except those of
// errdefs.CannotRead.
func readManifest(dir, name string, v any, m *manifest) error {
	for {
		// One descriptor, so that manifest and files are of one generation.
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		err = readManifestIn(root, name, v, m)
		replaced := err != nil && !isStill(root, dir)
		root.Close()
		if !replaced {
			return err
		}
		// The directory was replaced while it was read.
	}
}

// isStill says whether dir is the directory that root was opened as.
func isStill(root *os.Root, dir string) bool {
	was, err := root.Stat(".")
	if err != nil {
		return true // not known, so it is not read again
	}
	now, err := os.Stat(dir)
	return err == nil && os.SameFile(was, now)
}

func readManifestIn(root *os.Root, name string, v any, m *manifest) error {
	b, err := root.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing", name)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if m.Format != formatVersion {
		return fmt.Errorf("%s: format %d, want %d", name, m.Format, formatVersion)
	}
	if len(m.Files) == 0 {
		return fmt.Errorf("%s names no files", name)
	}
	for f, want := range m.Files {
		fi, err := root.Lstat(f)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s is missing", f)
		case err != nil:
			return err
		case !fi.Mode().IsRegular() || fi.Size() != want.Size:
			return fmt.Errorf("%s has %d bytes, want %d", f, fi.Size(), want.Size)
		}
	}
	return nil
}
