package envd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A file is written whatever is in its place, and a link there is replaced and
// not followed: an image may have one that leads to a file of a daemon.
func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	elsewhere := filepath.Join(dir, "elsewhere")
	for name, make := range map[string]func(path string) error{
		"nothing":         func(string) error { return nil },
		"a longer file":   func(path string) error { return os.WriteFile(path, []byte("a longer text"), 0o600) },
		"one as long":     func(path string) error { return os.WriteFile(path, []byte("old"), 0o600) },
		"a link":          func(path string) error { return os.Symlink(elsewhere, path) },
		"a dangling link": func(path string) error { return os.Symlink(filepath.Join(dir, "none"), path) },
		"a directory":     func(path string) error { return os.Mkdir(path, 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(elsewhere, []byte("far"), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "etc", t.Name(), "file")
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), make(path), replaceFile(path, "new")); err != nil {
				t.Fatal(err)
			}
			info, err := os.Lstat(path)
			if text, _ := os.ReadFile(path); err != nil || !info.Mode().IsRegular() || string(text) != "new" {
				t.Errorf("got %q, %v, %v", text, info.Mode(), err)
			}
			if text, err := os.ReadFile(elsewhere); err != nil || string(text) != "far" {
				t.Errorf("the link was followed: %q, %v", text, err)
			}
		})
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 { // etc, elsewhere
		t.Errorf("left %v", left)
	}
}

func TestLowerDirs(t *testing.T) {
	for n, want := range map[int]string{1: "/base", 2: "/layer1/upper:/base", 3: "/layer2/upper:/layer1/upper:/base"} {
		if got := lowerDirs(n); got != want {
			t.Errorf("%d layers: %s, want %s", n, got, want)
		}
	}
}

func TestLoadModules(t *testing.T) {
	dir := t.TempDir()
	if err := loadModules(dir); err != nil {
		t.Errorf("a kernel that has everything built in: %v", err)
	}
	list := filepath.Join(dir, "list")
	if err := os.WriteFile(list, []byte("# order\n\n  \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := loadModules(dir); err != nil {
		t.Errorf("an empty list: %v", err)
	}
	if err := os.WriteFile(list, []byte("# order\nvirtio.ko\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := loadModules(dir); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "load module virtio.ko") {
		t.Errorf("a module that is missing: %v", err)
	}
}

func TestWaitFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda")
	if err := waitFile(path, 5*time.Millisecond); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a disk that does not come: %v", err)
	}
	go func() {
		time.Sleep(10 * time.Millisecond)
		_ = os.WriteFile(path, nil, 0o600)
	}()
	if err := waitFile(path, 10*time.Second); err != nil {
		t.Errorf("one that comes late: %v", err)
	}
}
