// Package template keeps the immutable things that microVMs start from:
// kernel, initrd and base images, how they are made, and the overlay disks
// laid over them.
package template

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// DefaultName is the template that a sandbox gets when none is named.
const DefaultName = "minimal"

const (
	// kernelName is the one guest kernel that templates boot with.
	kernelName = "default"
	// baseImage and templateManifestFile are the files of a template.
	baseImage            = "base.ext4"
	templateManifestFile = "template.json"
)

// Store is the directory of kernels, templates and overlay seeds. What is in
// it is complete: everything is made under a name with a leading dot and
// published by a rename. Safe for concurrent use, by several processes too.
type Store struct {
	dir string
	log *slog.Logger

	checksMu sync.Mutex
	// checks are the directories of snapshots whose files were read.
	checks map[string]*check
}

// Open makes the store's directories if they are missing and removes what
// interrupted setups and snapshots left, unless one is under way at this moment.
func Open(dir string, log *slog.Logger) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	s := &Store{dir: dir, log: log}
	for _, d := range []string{dir, s.kernels(), s.templates(), s.seeds(), s.snapshots()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open template store: %w", err)
		}
	}
	// A directory that was there may have wider permissions.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open template store: %w", err)
	}
	for _, d := range []string{s.kernels(), s.templates(), s.seeds(), s.snapshots()} {
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
func (s *Store) snapshots() string { return filepath.Join(s.dir, "snapshots") }

// Boot is what a guest boots: a kernel with the initrd that carries envd.
// Paths are absolute; the files never change, a newer kernel or initrd is a
// new file under the same name.
type Boot struct {
	Kernel string // uncompressed vmlinux
	Initrd string

	// Release is the kernel's version, as uname -r in the guest prints it;
	// empty for a kernel brought without modules.
	Release string
	// Source says where the kernel came from: a package and its version, or
	// the digest of the file that the user brought.
	Source string

	KernelSHA256 string
	InitrdSHA256 string
	// EnvdSHA256 is the digest of the envd inside the initrd.
	EnvdSHA256 string
}

// Template is what a sandbox starts from. Paths are absolute.
type Template struct {
	Name string
	Boot
	// Base is the read-only ext4 image.
	Base       string
	BaseSHA256 string
	Defaults   Defaults
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

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
var twoDots = regexp.MustCompile(`\.\.`)

// ParseName checks a template's name: 1 to 63 of a-z, 0-9, dot, underscore
// and dash, the first a letter or digit, no two dots in a row. Any other name
// is errdefs.InvalidArgument.
func ParseName(name string) (string, error) { return parseName("template", name) }

func parseName(what, name string) (string, error) {
	if !namePattern.MatchString(name) || twoDots.MatchString(name) {
		shown := name
		if len(shown) > 80 {
			shown = shown[:80] + "…"
		}
		return "", errdefs.InvalidArgument.Errorf(
			"%s name %q: want 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit, without '..'", what, shown)
	}
	return name, nil
}

// Get returns the template of that name: errdefs.NotFound if there is none,
// errdefs.Corrupt if its files are not what was published, and
// errdefs.Unavailable if there is no guest kernel to boot it with.
func (s *Store) Get(name string) (Template, error) {
	name, err := ParseName(name)
	if err != nil {
		return Template{}, err
	}
	dir := filepath.Join(s.templates(), name)
	var m templateManifest
	switch err := readManifest(dir, templateManifestFile, &m, &m.manifest); {
	case errors.Is(err, fs.ErrNotExist):
		return Template{}, errdefs.NotFound.Errorf("template %q does not exist", name)
	case errdefs.CannotRead(err):
		return Template{}, unreadable(fmt.Sprintf("template %q", name), err)
	case err != nil:
		return Template{}, errdefs.Corrupt.Errorf("template %q is damaged, run wrenn setup: %w", name, err)
	}
	boot, err := s.Boot()
	if err != nil {
		return Template{}, err
	}
	return Template{
		Name:       name,
		Boot:       boot,
		Base:       filepath.Join(dir, baseImage),
		BaseSHA256: m.Files[baseImage].SHA256,
		Defaults:   m.Defaults,
	}, nil
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
	return Boot{
		Kernel:       filepath.Join(dir, "vmlinux"),
		Initrd:       filepath.Join(dir, "initrd.img"),
		Release:      m.Release,
		Source:       m.Source,
		KernelSHA256: m.Files["vmlinux"].SHA256,
		InitrdSHA256: m.Files["initrd.img"].SHA256,
		EnvdSHA256:   m.EnvdSHA256,
	}, nil
}

// List returns the usable templates, ordered by name. A damaged one is left
// out and logged.
func (s *Store) List() ([]Template, error) {
	entries, err := os.ReadDir(s.templates())
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []Template
	for _, e := range entries {
		if _, err := ParseName(e.Name()); err != nil || !e.IsDir() {
			continue
		}
		t, err := s.Get(e.Name())
		if err != nil {
			s.log.Warn("template is not usable", "template", e.Name(), "error", err)
			continue
		}
		list = append(list, t)
	}
	return list, nil
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

type templateManifest struct {
	manifest
	Making
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
