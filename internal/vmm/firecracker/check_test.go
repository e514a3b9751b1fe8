package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
)

func TestCheck(t *testing.T) {
	another := install(t, fakeSettings{Version: "1.9.0"}, true)
	for name, c := range map[string]struct {
		cfg   Config
		class *errdefs.Class
		text  string
	}{
		"jailed":         {install(t, fakeSettings{}, true), nil, "a test says so, confined by its jailer"},
		"plain":          {install(t, fakeSettings{}, false), nil, "there is no jailer beside it"},
		"oldest":         {install(t, fakeSettings{Version: "1.8.0"}, true), nil, "a test says so"},
		"a later one":    {install(t, fakeSettings{Version: "1.17.0-dev"}, true), nil, "a test says so"},
		"too old":        {install(t, fakeSettings{Version: "1.7.0"}, true), errdefs.Unsupported, "firecracker is 1.7.0, and 1.8 or later is needed"},
		"none":           {Config{Binary: "/nonexistent/firecracker"}, errdefs.Unavailable, "firecracker is not installed"},
		"no such jailer": {Config{Binary: another.Binary, Jailer: "/nonexistent/jailer"}, errdefs.Unavailable, "the jailer is not where the settings say"},
		"another jailer": {Config{Binary: install(t, fakeSettings{}, false).Binary, Jailer: another.Jailer}, errdefs.Unsupported, "firecracker is 1.12.1, its jailer 1.9.0"},
		"something else": {Config{Binary: another.Jailer, Jailer: "none"}, nil, "no version of Firecracker"},
	} {
		report, err := driver(c.cfg).Check(t.Context())
		text := report.Why + "; " + report.Warning
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, c.text) || errdefs.ClassOf(err) != c.class {
			t.Errorf("%s: %+v, %v, want %v: %s", name, report, err, c.class, c.text)
		}
		if err == nil && report.Accel != "kvm" {
			t.Errorf("%s: %+v", name, report)
		}
	}
}

// Without KVM nothing is started, and the reason is exact.
func TestCheckWithoutKVM(t *testing.T) {
	d := New(install(t, fakeSettings{}, true))
	report, err := d.Check(t.Context())
	if err == nil || errdefs.ClassOf(err) != errdefs.Unsupported || !strings.Contains(err.Error(), "firecracker 1.12.1 needs KVM: ") || !strings.Contains(err.Error(), "/dev/kvm") {
		t.Errorf("check: %+v, %v", report, err) // a probe guest is not there, so not even a good KVM is believed
	}
	if _, err := d.Start(t.Context(), vmm.Spec{}); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("start: %v", err)
	}
	if _, err := d.Restore(t.Context(), vmm.Spec{}, "/"); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("restore: %v", err)
	}
}

// The probe boots like a sandbox: as the same kind of user, with the jailer.
func TestProbe(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-probe-")
	dir := t.TempDir()
	p := kvm.Probe{Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), UID: uid, GID: gid}
	for _, path := range []string{p.Kernel, p.Initrd} {
		if err := os.WriteFile(path, []byte("\x7fELF"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bothWays(t, func(t *testing.T, jailed bool) {
		d := driver(install(t, fakeSettings{}, jailed))
		bin, err := d.programs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Boot(t.Context(), d.starter(bin)); err != nil {
			t.Error(err)
		}
	})
}
