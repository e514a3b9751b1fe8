package qemu

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestKVMObstacle(t *testing.T) {
	const with, without = "processor: 0\nflags\t\t: fpu svm lm\n", "flags\t\t: fpu lm svm_lock\n"
	for _, c := range []struct {
		open    error
		cpuinfo string
		want    string
	}{
		{nil, with, ""},
		{nil, "flags : fpu vmx\n", ""},
		{nil, without, "neither vmx nor svm"},
		{nil, "vmx flags\t: virtual vmx flags of another line\n", "neither vmx nor svm"},
		{&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.ENOENT}, with, "there is no /dev/kvm"},
		{&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.EACCES}, with, "does not open: permission denied"},
	} {
		got := kvmObstacle(c.open, c.cpuinfo)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("kvmObstacle(%v, %q) = %q, want %q", c.open, c.cpuinfo, got, c.want)
		}
	}
}

func TestVerdictIsRemembered(t *testing.T) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(t.TempDir(), "kvm.json")
	want := verdict{HostKernel: unix.ByteSliceToString(uts.Release[:]), Version: "9.9.9", Accel: "kvm", Why: "seen"}
	if err := save(cache, want); err != nil {
		t.Fatal(err)
	}
	d := New(Config{Binary: "/nonexistent", CacheFile: cache})
	accel, why, err := d.probed(t.Context(), "9.9.9")
	if err != nil || accel != "kvm" || why != "seen" {
		t.Errorf("probed = %q, %q, %v", accel, why, err)
	}
	// Another QEMU asks again, and here finds that nothing boots.
	accel, why, err = d.probed(t.Context(), "9.9.10")
	if err != nil || accel != "tcg" || !strings.Contains(why, "does not come up") {
		t.Errorf("probed = %q, %q, %v", accel, why, err)
	}
	if data, err := os.ReadFile(cache); err != nil || !strings.Contains(string(data), "9.9.10") {
		t.Errorf("cache: %s, %v", data, err)
	}
}

func TestCheckWithoutQEMU(t *testing.T) {
	d := New(Config{Binary: "/nonexistent/qemu"})
	if _, err := d.Check(t.Context()); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("check: %v, want unavailable", err)
	}
	if _, err := d.Start(t.Context(), vmm.Spec{}); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("start: %v, want unavailable", err)
	}
}
