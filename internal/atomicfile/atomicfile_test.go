package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// check says what path holds and that nothing else is in its directory.
func check(t *testing.T, path, want string, perm fs.FileMode) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != perm {
		t.Errorf("mode %v, %v; want %v", info.Mode(), err, perm)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	defer unix.Umask(unix.Umask(0o077))
	for _, c := range []struct {
		text string
		perm fs.FileMode
	}{{"first", 0o600}, {"", 0o644}, {strings.Repeat("x", 1<<20), 0o600}} {
		if err := Write(path, []byte(c.text), c.perm); err != nil {
			t.Fatal(err)
		}
		check(t, path, c.text, c.perm)
	}
	if err := WriteJSON(path, map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	check(t, path, "{\n  \"a\": 1\n}\n", 0o600)
}

func TestWriteFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	err := WriteWith(path, []byte("new"), 0o600, func(tmp string) error {
		if text, err := os.ReadFile(tmp); err != nil || string(text) != "new" {
			t.Errorf("before sees %q, %v", text, err)
		}
		return stop
	})
	if !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
	check(t, path, "old", 0o600)
	if err := WriteJSON(path, func() {}); err == nil {
		t.Error("a function became JSON")
	}
	if err := Write(filepath.Join(path, "below"), nil, 0o600); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
	check(t, path, "old", 0o600)
}

// A link is replaced and not followed: where it leads is not ours to write.
func TestWriteReplacesALink(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(elsewhere, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(t, path, "new", 0o600)
	check(t, elsewhere, "kept", 0o600)
}

// TestReadersSeeWhole: of several writers each leaves a whole file.
func TestReadersSeeWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	texts := []string{strings.Repeat("a", 100_000), strings.Repeat("b", 70_000)}
	if err := Write(path, []byte(texts[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for _, text := range texts {
		writers.Go(func() {
			for range 20 {
				if err := Write(path, []byte(text), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for {
		if got, err := os.ReadFile(path); err != nil || string(got) != texts[0] && string(got) != texts[1] {
			t.Fatalf("read %d bytes, %v", len(got), err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}
