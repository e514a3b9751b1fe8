package firecracker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

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
	for _, name := range []string{snapfile.MemoryName, snapfile.StateName} {
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
