package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, quiet(), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOpenRemovesWhatIsHalfMade(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	half := filepath.Join(dir, ".work-1")
	if err := os.MkdirAll(filepath.Join(half, "a/b"), 0o700); err != nil {
		t.Fatal(err)
	}
	release, err := s.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if _, err := os.Stat(half); err != nil {
		t.Errorf("what another one works on: %v", err)
	}
	release()
	release() // a second time it does nothing
	open(t, dir)
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is half-made is there: %v", err)
	}
}

func TestHoldWaits(t *testing.T) {
	dir := t.TempDir()
	one, two := open(t, dir), open(t, dir)
	release, err := one.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := two.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second process: %v", err)
	}
	go release()
	if release, err = two.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	release()
}

// put makes a file of one block, or a root layer of one, that was last used age ago.
func put(t *testing.T, dir, name string, age time.Duration) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if filepath.Base(path) == rootFile {
		path = filepath.Dir(path)
	}
	used := time.Now().Add(-age)
	if err := os.Chtimes(path, used, used); err != nil {
		t.Fatal(err)
	}
}

// left is what a store has.
func left(t *testing.T, dir string) (names []string) {
	t.Helper()
	for _, d := range []string{".", blobsDir, diffsDir, rootsDir} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if d != "." || e.Name()[0] == '.' {
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// What is used least recently goes first; what is held and what templates share stays.
func TestPrune(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, dir, "blobs/b1", 5*time.Hour)
	put(t, dir, "blobs/b2", time.Hour)
	put(t, dir, "roots/r1/root.ext4", 4*time.Hour)
	put(t, dir, "roots/r2/root.ext4", 6*time.Hour)
	if err := os.Link(filepath.Join(dir, "roots/r2/root.ext4"), filepath.Join(t.TempDir(), "template")); err != nil {
		t.Fatal(err)
	}
	if u, err := s.Usage(); err != nil || u != (Usage{Blobs: 8192, Roots: 4096, Shared: 4096}) {
		t.Errorf("usage %+v, %v", u, err)
	}
	release, err := s.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, "blobs/b3", -time.Second) // used within the hold
	for _, c := range []struct {
		keep  Keep
		freed int64
		left  string
	}{
		{Keep{Bytes: 1 << 20}, 0, "[b1 b2 b3 r1 r2]"},
		{Keep{Bytes: 12 << 10, DryRun: true}, 4096, "[b1 b2 b3 r1 r2]"},
		{Keep{Bytes: 12 << 10}, 4096, "[b2 b3 r1 r2]"},
		{Keep{Bytes: 1 << 20, Age: 2 * time.Hour}, 4096, "[b2 b3]"},
		{Keep{}, 4096, "[b3]"},
	} {
		freed, err := s.Prune(t.Context(), c.keep)
		if got := fmt.Sprint(left(t, dir)); err != nil || freed != c.freed || got != c.left {
			t.Errorf("%+v: freed %d, %v, left %s; want %d, %s", c.keep, freed, err, got, c.freed, c.left)
		}
	}
	release()
	put(t, dir, "blobs/b3", time.Minute)
	if freed, err := s.Prune(t.Context(), Keep{}); err != nil || freed != 4096 || len(left(t, dir)) != 0 {
		t.Errorf("freed %d, %v, left %v", freed, err, left(t, dir))
	}
}
