package kvm

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

func TestKVMObstacle(t *testing.T) {
	for _, c := range []struct {
		open error
		want string
	}{
		{nil, ""}, // whatever the CPU's flags are
		{&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.ENOENT}, "there is no /dev/kvm"},
		{&fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.EACCES}, "does not open: permission denied"},
	} {
		got := kvmObstacle(c.open)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("kvmObstacle(%v) = %q, want %q", c.open, got, c.want)
		}
	}
}

// probeVM is a VM that consists of its process.
type probeVM struct{ *launch.Process }

func (probeVM) Handle() vmm.Handle           { return vmm.Handle{} }
func (probeVM) Pause(context.Context) error  { return nil }
func (probeVM) Resume(context.Context) error { return nil }

// guest is a VMM whose guest does what a script says; it counts the starts.
func guest(t *testing.T, script string, starts *int) func(context.Context, vmm.Spec) (vmm.VM, error) {
	return func(_ context.Context, spec vmm.Spec) (vmm.VM, error) {
		*starts++
		if !spec.Boot.Probe {
			t.Errorf("boot facts %+v", spec.Boot)
		}
		p := launch.Program{Args: []string{"/bin/sh", "-c", script}}
		p.Console = spec.Console
		process, err := launch.Start(p)
		return probeVM{process}, err
	}
}

func TestProbe(t *testing.T) {
	for _, c := range []struct {
		script string
		works  bool
		why    string
	}{
		{"echo booting; echo wrenn-probe-ok; exec sleep 60", true, "a probe guest came up under KVM in "},
		{"echo wrenn-probe-ok", true, "a probe guest came up"}, // and has ended since
		{"echo panic", false, "does not come up with it: it exited with status 0"},
	} {
		p, starts := Probe{CacheFile: filepath.Join(t.TempDir(), "kvm.json")}, 0
		first, err := p.probed(t.Context(), "qemu", "1.2.3", guest(t, c.script, &starts))
		if err != nil || first.Works != c.works || !first.Final || !strings.Contains(first.Why, c.why) {
			t.Errorf("%s: %+v, %v, want %v: %s", c.script, first, err, c.works, c.why)
		}
		again, err := p.probed(t.Context(), "qemu", "1.2.3", guest(t, c.script, &starts))
		if err != nil || again != first || starts != 1 {
			t.Errorf("%s: again %+v, %v, after %d starts", c.script, again, err, starts)
		}
		// Another version, or another VMM, has shown nothing yet.
		for _, other := range [][2]string{{"qemu", "1.2.4"}, {"firecracker", "1.2.4"}} {
			before := starts
			if _, err := p.probed(t.Context(), other[0], other[1], guest(t, c.script, &starts)); err != nil || starts != before+1 {
				t.Errorf("%s: %v: %v, after %d starts", c.script, other, err, starts-before)
			}
		}
	}
}

func TestProbeThatCannotStart(t *testing.T) {
	p := Probe{CacheFile: filepath.Join(t.TempDir(), "kvm.json")}
	v, err := p.probed(t.Context(), "qemu", "1.2.3", func(context.Context, vmm.Spec) (vmm.VM, error) { return nil, errors.New("no such luck") })
	if err != nil || v.Works || !strings.Contains(v.Why, "no such luck") {
		t.Errorf("%+v, %v", v, err)
	}
	if data, err := os.ReadFile(p.CacheFile); err != nil || !strings.Contains(string(data), "no such luck") {
		t.Errorf("cache: %s, %v", data, err)
	}
	// Who asked gave up: that says nothing about KVM.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.probed(ctx, "qemu", "1.2.4", func(ctx context.Context, _ vmm.Spec) (vmm.VM, error) { return nil, ctx.Err() }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if data, _ := os.ReadFile(p.CacheFile); strings.Contains(string(data), "1.2.4") {
		t.Errorf("cache: %s", data)
	}
}

// TestSlowProbe: a guest that comes up too late is a no for this time only, also where an
// earlier agent has kept it.
func TestSlowProbe(t *testing.T) {
	p := Probe{CacheFile: filepath.Join(t.TempDir(), "kvm.json")}
	slow := func(context.Context, vmm.Spec) (vmm.VM, error) { return nil, errSlow }
	for range 2 {
		v, err := p.probed(t.Context(), "qemu", "1.2.3", slow)
		if err != nil || v.Works || !v.Final || !strings.Contains(v.Why, "nothing after 3s; each start of the agent tries again") {
			t.Fatalf("%+v, %v", v, err)
		}
		if _, err := os.Stat(p.CacheFile); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("it is kept: %v", err)
		}
	}
	starts := 0
	fast := guest(t, "echo wrenn-probe-ok", &starts)
	for range 2 {
		if v, err := p.probed(t.Context(), "qemu", "1.2.3", fast); err != nil || !v.Works || starts != 1 {
			t.Errorf("asked again: %+v, %v after %d starts", v, err, starts)
		}
	}
	var known probeRecord
	data, err := os.ReadFile(p.CacheFile)
	if err == nil {
		err = json.Unmarshal(data, &known)
	}
	known.Works, known.SlowAt = false, time.Now()
	if err == nil {
		err = atomicfile.WriteJSON(p.CacheFile, known)
	}
	if err != nil {
		t.Fatal(err)
	}
	if v, err := p.probed(t.Context(), "qemu", "1.2.3", fast); err != nil || !v.Works || starts != 2 {
		t.Errorf("with what an earlier agent kept: %+v, %v after %d starts", v, err, starts)
	}
}

// TestProbeOfAnotherGuest: another kernel or initrd has shown nothing yet.
func TestProbeOfAnotherGuest(t *testing.T) {
	dir := t.TempDir()
	p := Probe{CacheFile: filepath.Join(dir, "kvm.json"), Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd")}
	starts := 0
	for i, c := range []struct {
		path, content string
		want          int
	}{
		{p.Kernel, "a", 1}, {p.Kernel, "a", 1}, {p.Kernel, "b", 2}, {p.Initrd, "c", 3}, {p.Initrd, "", 2 + 2},
	} {
		for _, path := range []string{p.Kernel, p.Initrd} {
			f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		if err := os.WriteFile(c.path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := p.probed(t.Context(), "qemu", "1", guest(t, "echo wrenn-probe-ok", &starts)); err != nil || starts != c.want {
			t.Errorf("step %d: %v after %d starts, want %d", i, err, starts, c.want)
		}
	}
}
