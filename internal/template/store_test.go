package template

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put publishes a template with the given image, and a kernel if there is
// none.
func put(t *testing.T, s *Store, name, image string) {
	t.Helper()
	stage, err := s.StageTemplate(t.Context(), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	write(t, filepath.Join(stage.Dir, "base.ext4"), image)
	about := Making{Recipe: image, Defaults: Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096}}
	if err := stage.publish(t.Context(), about); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Boot(); err == nil {
		return
	}
	tmp, err := tempDir(s.kernels(), kernelName)
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	write(t, filepath.Join(tmp, "vmlinux"), "kernel")
	write(t, filepath.Join(tmp, "initrd.img"), "initrd")
	k := kernelManifest{Kernel: Kernel{Release: "6.1", Source: "test", EnvdSHA256: "abc"}}
	if err := publish(tmp, filepath.Join(s.kernels(), kernelName), "kernel.json", &k, &k.manifest); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestParseName(t *testing.T) {
	for _, name := range []string{"minimal", "a", "0", "python-3.11_x", "-x", "_x", strings.Repeat("a", 128)} {
		if got, err := ParseName(name); err != nil || got != name {
			t.Errorf("ParseName(%q) = %q, %v", name, got, err)
		}
	}
	for _, name := range []string{
		"", ".", "..", "a..b", ".hidden", "a/b", "../a", "/etc", "a\x00", "a\n", "A", "é",
		"a b", "a;b", "$(x)", strings.Repeat("a", 129), strings.Repeat("a", 300), strings.Repeat("é", 300),
	} {
		if got, err := ParseName(name); !errors.Is(err, errdefs.InvalidArgument) || got != "" {
			t.Errorf("ParseName(%q) = %q, %v, want invalid argument", name, got, err)
		} else if len(err.Error()) > 500 {
			t.Errorf("ParseName(%.20q…): error of %d bytes", name, len(err.Error()))
		}
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"minimal", "..", "a/../b", "a\x00b", "a."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := ParseName(s)
		if err != nil {
			if !errors.Is(err, errdefs.InvalidArgument) {
				t.Fatalf("%v has no class", err)
			}
			return
		}
		if name != s || !filepath.IsLocal(name) || filepath.Base(name) != name || strings.HasPrefix(name, ".") {
			t.Fatalf("ParseName accepts %q", s)
		}
	})
}

func TestGet(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v, %v, want 0700", fi.Mode(), err)
	}
	if _, err := s.Get("minimal"); !errors.Is(err, errdefs.NotFound) || !strings.Contains(err.Error(), "template 'minimal' not found") {
		t.Errorf("Get on an empty store = %v, want not found", err)
	}
	if _, err := s.Boot(); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("Boot on an empty store = %v, want unavailable", err)
	}
	put(t, s, "minimal", "image")
	put(t, s, "another", "other image")
	got, err := s.Get("minimal")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{got.Layers[0].Path: "image", got.Kernel: "kernel", got.Initrd: "initrd"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want || !filepath.IsAbs(path) {
			t.Errorf("%s holds %q, %v, want %q", path, b, err, want)
		}
	}
	if got.RootSHA256 == "" || got.RootSHA256 != got.Layers[0].SHA256 {
		t.Errorf("digest = %q, want that of the one layer, %q", got.RootSHA256, got.Layers[0].SHA256)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 {
		t.Errorf("List = %v, %v", list, err)
	}
}

// buildOf is the directory of the build that a name leads to.
func buildOf(t *testing.T, s *Store, text string) string {
	t.Helper()
	info, b, err := s.Resolve("", text)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(s.templateDir(info.ID), b.ID)
}

func TestDamageIsNeverUsed(t *testing.T) {
	cases := map[string]func(dir string) error{
		"short image":   func(dir string) error { return os.Truncate(filepath.Join(dir, "base.ext4"), 2) },
		"no image":      func(dir string) error { return os.Remove(filepath.Join(dir, "base.ext4")) },
		"no manifest":   func(dir string) error { return os.Remove(filepath.Join(dir, manifestFile)) },
		"torn manifest": func(dir string) error { return rewrite(filepath.Join(dir, manifestFile), `{"format": 1, "fi`) },
		"other format":  func(dir string) error { return rewrite(filepath.Join(dir, manifestFile), `{"format": 99}`) },
		"no files":      func(dir string) error { return rewrite(filepath.Join(dir, manifestFile), `{"format": 1}`) },
		"escaping name": func(dir string) error {
			return rewrite(filepath.Join(dir, manifestFile), `{"format":1,"files":{"../../x":{"size":1}}}`)
		},
		"image is a link": func(dir string) error {
			if err := os.Remove(filepath.Join(dir, "base.ext4")); err != nil {
				return err
			}
			return os.Symlink("/etc/passwd", filepath.Join(dir, "base.ext4"))
		},
	}
	for name, damage := range cases {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			put(t, s, "minimal", "image")
			if err := damage(buildOf(t, s, "minimal")); err != nil {
				t.Fatal(err)
			}
			_, err := s.Get("minimal")
			if !errors.Is(err, errdefs.Corrupt) {
				t.Fatalf("Get = %v, want corrupt", err)
			}
			if strings.Contains(err.Error(), s.Dir()) {
				t.Errorf("a client would read a path of the host: %v", err)
			}
			put(t, s, "minimal", "image")
			if _, err := s.Get("minimal"); err != nil {
				t.Errorf("made again: %v", err)
			}
		})
	}
}

func rewrite(path, content string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o600)
}

// A reader that reads while a template is published again sees the old or the new
// one, whole.
func TestPublishIsAtomic(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "first")
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := s.Get("minimal"); err != nil {
					t.Errorf("Get while publishing: %v", err)
				}
			}
		})
	}
	for i := range 30 {
		put(t, s, "minimal", strings.Repeat("x", i+1))
	}
	close(stop)
	readers.Wait()
	if _, err := s.Get("minimal"); err != nil {
		t.Error(err)
	}
}

func TestOpenRemovesWhatWasInterrupted(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "minimal", "image")
	left := []string{
		filepath.Join(s.templates(), ".minimal-1", "root", "etc", "passwd"),
		filepath.Join(s.kernels(), ".default-1", "work", "x.deb"),
		filepath.Join(s.seeds(), ".overlay-1"),
	}
	for _, f := range left {
		write(t, f, "half")
	}

	// While a setup holds the lock, what it makes is not garbage.
	l, err := tryLock(s.templates())
	if err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if _, err := os.Stat(left[0]); err != nil {
		t.Errorf("a running setup's work is gone: %v", err)
	}
	l.unlock()

	s = open(t, dir)
	for _, f := range left {
		if _, err := os.Stat(f); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", f, err)
		}
	}
	if _, err := s.Get("minimal"); err != nil {
		t.Error(err)
	}
}

// A bind mount left in an interrupted root file system leads into the host.
func TestGarbageIsUnmountedFirst(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	s := open(t, filepath.Join(dir, "a state")) // the space is escaped in mountinfo
	host := filepath.Join(dir, "host")
	write(t, filepath.Join(host, "precious"), "data")
	point := filepath.Join(s.templates(), ".minimal-1", "root", "dev")
	if err := os.MkdirAll(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(host, point, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) })
	open(t, s.Dir())
	if _, err := os.Stat(filepath.Join(host, "precious")); err != nil {
		t.Errorf("the host's file is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.templates(), ".minimal-1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("garbage is left: %v", err)
	}
}

func TestWaitLockObeysContext(t *testing.T) {
	dir := t.TempDir()
	l, err := tryLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	waited := false
	_, err = waitLock(ctx, dir, func() { waited = true; cancel() })
	if !errors.Is(err, context.Canceled) || !waited {
		t.Errorf("waitLock = %v, waited %v", err, waited)
	}
	l.unlock()
	l, err = waitLock(context.Background(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.unlock()
}
