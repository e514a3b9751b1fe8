package template

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func readyStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	build(t, s, "minimal", "image")
	return s
}

// minimalOf returns the ids of the template "minimal" and of its build.
func minimalOf(t *testing.T, s *Store) (id, build string) {
	t.Helper()
	info, b, err := s.Resolve("", "minimal")
	if err != nil {
		t.Fatal(err)
	}
	return info.ID, b.ID
}

// readyDirOf is where the boot snapshots of "minimal" are.
func readyDirOf(t *testing.T, s *Store) string {
	t.Helper()
	id, build := minimalOf(t, s)
	dir, err := s.readyDir(id, build)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// bootSnapshot is Ready of "minimal".
func bootSnapshot(t *testing.T, s *Store, key string) (Ready, error) {
	t.Helper()
	id, build := minimalOf(t, s)
	return s.Ready(t.Context(), id, build, key)
}

func makeReady(t *testing.T, s *Store, key string, shape Shape) {
	t.Helper()
	ctx := t.Context()
	id, build := minimalOf(t, s)
	stage, err := s.StageReady(ctx, id, build)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, []byte("disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	mem, err := os.Create(filepath.Join(stage.Dir, "mem"))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := mem.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.WriteAt([]byte("memory of "+key), 32<<20); err != nil {
		t.Fatal(err)
	}
	if err := stage.AddOverlay(ctx, disk); err != nil {
		t.Fatal(err)
	}
	if err := stage.Publish(ctx, Meta{Key: key, Shape: shape}); err != nil {
		t.Fatal(err)
	}
}

const keyA, keyB = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"

func TestReadySnapshots(t *testing.T) {
	s := readyStore(t)
	small, large := Shape{"qemu", 1, 512, 4096}, Shape{"qemu", 2, 1024, 4096}
	if _, err := bootSnapshot(t, s, keyA); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("none is there: %v", err)
	}
	makeReady(t, s, keyA, small)
	r, err := bootSnapshot(t, s, keyA)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(r.Overlay); err != nil || string(data) != "disk" {
		t.Errorf("overlay is %q, %v", data, err)
	}
	// Another of the same shape supersedes it, one of another shape does not.
	makeReady(t, s, keyB, large)
	if _, err := bootSnapshot(t, s, keyA); err != nil {
		t.Errorf("one of another shape came: %v", err)
	}
	makeReady(t, s, "0123456789abcdef", small)
	if _, err := bootSnapshot(t, s, keyA); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("superseded: %v", err)
	}
	id, build := minimalOf(t, s)
	if err := s.DropReady(id, build, keyB); err != nil {
		t.Error(err)
	}
	if _, err := bootSnapshot(t, s, keyB); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("dropped: %v", err)
	}
	for _, key := range []string{"", "..", "../x", "ABCDEF0123456789", "0123456789abcdef/.."} {
		if _, err := bootSnapshot(t, s, key); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("key %q: %v", key, err)
		}
	}
}

func TestDamagedReadySnapshot(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"a bit of the memory": func(dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, "mem"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{1}, 12345)
			return err
		},
		"a shorter disk": func(dir string) error { return os.Truncate(filepath.Join(dir, readyOverlay), 1) },
		"no memory":      func(dir string) error { return os.Remove(filepath.Join(dir, "mem")) },
		"no manifest":    func(dir string) error { return os.Remove(filepath.Join(dir, manifestFile)) },
		"half a manifest": func(dir string) error {
			return os.Truncate(filepath.Join(dir, manifestFile), 100)
		},
	} {
		s := readyStore(t)
		makeReady(t, s, keyA, Shape{})
		if err := damage(filepath.Join(readyDirOf(t, s), keyA)); err != nil {
			t.Fatal(err)
		}
		// Who made it has just read it; the next agent has not.
		if _, err := bootSnapshot(t, View(s.Dir(), s.log), keyA); errdefs.ClassOf(err) != errdefs.Corrupt {
			t.Errorf("%s: %v", name, err)
		}
		makeReady(t, s, keyA, Shape{})
		if _, err := bootSnapshot(t, s, keyA); err != nil {
			t.Errorf("%s, made again: %v", name, err)
		}
	}
}

func TestFewReadySnapshots(t *testing.T) {
	s := readyStore(t)
	key := func(i int) string { return fmt.Sprintf("%016x", i) }
	for i := range maxReady + 3 {
		makeReady(t, s, key(i), Shape{MemMiB: i})
		old := time.Now().Add(time.Duration(i-100) * time.Second)
		if err := os.Chtimes(filepath.Join(readyDirOf(t, s), key(i)), old, old); err != nil {
			t.Fatal(err)
		}
		if _, err := bootSnapshot(t, s, key(0)); err != nil {
			t.Fatalf("the one in use went: %v", err)
		}
	}
	found, err := filepath.Glob(filepath.Join(readyDirOf(t, s), "*", manifestFile))
	if err != nil || len(found) != maxReady {
		t.Errorf("%d are kept, want %d (%v)", len(found), maxReady, err)
	}
}

func TestOneMakesTheReadySnapshot(t *testing.T) {
	s := readyStore(t)
	id, build := minimalOf(t, s)
	stage, err := s.StageReady(t.Context(), id, build)
	if err != nil {
		t.Fatal(err)
	}
	other := View(s.Dir(), s.log) // another process
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := other.StageReady(ctx, id, build); err == nil {
		t.Error("two make it at once")
	}
	stage.Discard()
	next, err := other.StageReady(t.Context(), id, build)
	if err != nil {
		t.Fatal(err)
	}
	next.Discard()
	if left, err := filepath.Glob(filepath.Join(readyDirOf(t, s), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// What cannot be looked at, for want of descriptors, is not damaged: nobody makes
// it again, and so takes away what others were made from.
func TestWithoutDescriptorsNothingIsDamaged(t *testing.T) {
	s := readyStore(t)
	put(t, s, "box", "image")
	makeReady(t, s, keyA, Shape{VCPUs: 1})
	stage := stageNamed(t, s, "snap")
	made, b, err := stage.Publish(t.Context(), namedMeta(time.Now()), Build{})
	if err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	id, minimal := minimalOf(t, s)
	looks := map[string]func() error{
		"template":       func() error { _, err := s.Get("box"); return err },
		"ready snapshot": func() error { _, err := s.Ready(t.Context(), id, minimal, keyA); return err },
		"snapshot":       func() error { _, err := s.Snapshot(t.Context(), made.ID, b.ID); return err },
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	var held []int
	for fd, err := unix.Dup(0); err == nil; fd, err = unix.Dup(0) {
		held = append(held, fd)
	}
	errs := map[string]error{}
	for what, look := range looks {
		errs[what] = look()
	}
	for _, fd := range held {
		unix.Close(fd)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	for what, err := range errs {
		if got := errdefs.ClassOf(err); got != errdefs.Unavailable || !errors.Is(err, unix.EMFILE) {
			t.Errorf("%s without descriptors: %v (%v)", what, err, got)
		}
		if err := looks[what](); err != nil && what != "template" { // which has no kernel here
			t.Errorf("%s afterwards: %v", what, err)
		}
	}
}
