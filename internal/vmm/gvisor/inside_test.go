package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// TestInside: root in a guest finds nothing of the host, wherever it looks and whatever it
// mounts, makes or enters.
func TestInside(t *testing.T) {
	s := subject(t)
	withEnvd(t, &s)
	start(t, s)
	c := ready(t, s.Spec, guest.Init{})
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, c2 := range []struct{ name, script, want string }{
		{"processes", "ls /proc | grep -c '^[0-9]' | awk '{print ($1 < 8)}'", "1"},
		{"processes of a new mount", "mount -t proc none /mnt && ls /mnt | grep -c '^[0-9]' | awk '{print ($1 < 8)}'; umount /mnt", "1"},
		{"the sentry", "grep -ls sentry /proc/[0-9]*/comm; true", ""},
		{"the host's name", "grep -rsw '" + host + "' /proc/sys/kernel /etc/hostname; true", ""},
		{"mounts", "cut -d' ' -f3 /proc/mounts | sort -u | tr '\\n' ' '", "cgroup2 dev devpts erofs overlay proc sysfs tmpfs"},
		{"files of the host", "cat " + s.Spec.Console + " " + s.Spec.Root.Overlay + " " + s.Spec.RunDir + "/* 2>/dev/null; true", ""},
		{"block devices", "ls /sys/block 2>/dev/null; mknod /d b 8 0 2>/dev/null && cat /d 2>/dev/null | head -c 9; true", ""},
		{"memory", "for n in 1 2 11; do mknod /tmp/m$n c 1 $n 2>/dev/null; head -c 1 /tmp/m$n 2>/dev/null; done; true", ""},
		{"modules and the kernel's log", "cat /proc/kcore /proc/kmsg /proc/kallsyms /sys/kernel/debug/* 2>/dev/null | head -c 9; true", ""},
		{"a namespace of the host", "ls -A /proc/1/root | grep -c work; true", "0"},
		{"init's files", "ls -l /proc/1/fd 2>/dev/null | grep -E '/(work|run/vmmtest|root/|home)' ; true", ""},
		{"control sockets", "cut -d' ' -f8 /proc/net/unix 2>/dev/null | grep -i gvisor; true", ""},
		{"the network", "cat /proc/net/dev | cut -d: -f1 | tail -n +3 | tr -d ' ' | sort | tr '\\n' ' '", "eth0 lo"},
	} {
		if got := run(t, c, c2.script); got != c2.want {
			t.Errorf("%s: %q, want %q", c2.name, got, c2.want)
		}
	}
}

// TestHostDiskFull: a guest for whose disk the host has no room is told so, and goes on
// when it has deleted something.
func TestHostDiskFull(t *testing.T) {
	s := subject(t)
	withEnvd(t, &s)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	s.Spec.Root.Overlay = filepath.Join(small, "disk")
	if err := os.WriteFile(s.Spec.Root.Overlay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.Spec.Root.Overlay, diskMiB<<20); err != nil {
		t.Fatal(err)
	}
	start(t, s)
	c := ready(t, s.Spec, guest.Init{})
	got := run(t, c, "dd if=/dev/zero of=/big bs=1M count=40 2>&1 | grep -o 'No space left.*'; rm /big; echo small >/small; cat /small")
	if want := "No space left on device\nsmall"; strings.TrimSpace(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
}
