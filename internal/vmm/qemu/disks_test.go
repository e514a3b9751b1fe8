package qemu

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A snapshot takes no disk away, neither from its source nor from a clone.
func TestDisksAfterSnapshot(t *testing.T) {
	s := subject(t)
	disk := func() string {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s.Spec.Root.Overlay = disk()
	s.Spec.UID, s.Spec.GID = 871234, 871234
	v := start(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	clone := s.Clone()
	clone.Root.Overlay = disk()
	clone.UID, clone.GID = s.Spec.UID, s.Spec.GID
	restored, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { restored.Kill(t.Context()) })
	for name, c := range map[string]struct {
		vm   *vm
		path string
	}{"source": {v, s.Spec.Root.Overlay}, "clone": {restored.(*vm), clone.Root.Overlay}} {
		if err := c.vm.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		var said string
		if err := c.vm.with(t.Context(), callTimeout, func(m *monitor) error {
			return m.call("human-monitor-command", map[string]any{"command-line": `qemu-io -d /machine/peripheral-anon/device[1]/virtio-backend "write -P 0x5a 4096 512"`}, &said)
		}); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(c.path)
		if err != nil || !bytes.Equal(data[4096:4608], bytes.Repeat([]byte{0x5a}, 512)) {
			t.Errorf("%s: the disk does not take a write: %q, %v", name, said, err)
		}
	}
}

// A snapshot that finds no room, for the devices' state or for the memory, says so.
func TestSnapshotWithoutRoom(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, size := range []string{"8k", "1m"} {
		dir := t.TempDir()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		err := v.Snapshot(t.Context(), dir)
		if errdefs.ClassOf(errdefs.DiskFull(err)) != errdefs.Exhausted || strings.Contains(errdefs.DiskFull(err).Error(), dir) {
			t.Errorf("%s: %v", size, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", size, left, err)
		}
		// A stopped QEMU keeps the descriptor that it was passed.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	if err := v.Snapshot(t.Context(), t.TempDir()); err != nil {
		t.Error(err)
	}
}
