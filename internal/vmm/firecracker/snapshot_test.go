package firecracker

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A snapshot's memory keeps its bytes, and takes disk only for those that are
// not zero.
func TestDig(t *testing.T) {
	// Data, zeros beyond the borders of pages and chunks, data, zeros at the end.
	data := make([]byte, 5*digChunk+pageSize)
	for _, at := range []int{0, pageSize - 1, 3 * pageSize, digChunk - 1, 3*digChunk + 100} {
		data[at] = 0xaa
	}
	path := filepath.Join(t.TempDir(), "mem")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := dig(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the content has changed, %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if kept := st.Blocks * 512; kept > 16*pageSize {
		t.Errorf("%d bytes are kept for 4 pages", kept)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := dig(cancelled, path); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A snapshot with a link in the place of its memory, as a VMM that was taken
// over might make one, shows nothing of the host to a clone.
func TestSnapshotWithALink(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	v := boot(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{memoryName, stateName} {
		path := filepath.Join(dir, name)
		if err := os.Rename(path, path+".real"); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path+".real", path); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Driver.(*Driver).Restore(t.Context(), s.Clone(), dir); err == nil {
			t.Errorf("restored through a link to the %s", name)
		}
		if err := os.Rename(path+".real", path); err != nil {
			t.Fatal(err)
		}
	}
}

// A snapshot that finds no room says so, and the VM goes on.
func TestSnapshotWithoutRoom(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	v := boot(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_blocks=1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	err := v.Snapshot(t.Context(), dir)
	if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(err.Error(), "the host's disk is full") {
		t.Errorf("snapshot: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Error(err)
	}
}
