package vmmtest_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

func TestFakeMeetsTheContract(t *testing.T) {
	t.Run("kernel", func(t *testing.T) { contract(t, false) })
	t.Run("own kernel", func(t *testing.T) { contract(t, true) })
}

func contract(t *testing.T, ownKernel bool) {
	driver := func(h *vmmtest.Host) *vmmtest.Fake {
		f := vmmtest.NewFake(h)
		f.OwnKernel = ownKernel
		return f
	}
	vmmtest.Run(t, func(t *testing.T) vmmtest.Subject {
		host := vmmtest.NewHost()
		dir := t.TempDir()
		runDir, err := os.MkdirTemp("", "vmmtest-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(runDir) })
		spec := vmm.Spec{ID: "sb1", RunDir: runDir, VCPUs: 1, MemMiB: 128, Console: filepath.Join(dir, "console.log")}
		if !ownKernel {
			spec.Kernel.Image = filepath.Join(dir, "vmlinux")
			if err := os.WriteFile(spec.Kernel.Image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return vmmtest.Subject{
			Driver: driver(host),
			Again:  func() vmm.Driver { return driver(host) },
			Spec:   spec,
			Clone: func() vmm.Spec {
				clone := spec
				clone.ID += "-clone"
				return clone
			},
			Exiting: func(s *vmm.Spec) { s.Boot.Probe = true },
			Live:    func() int { return len(host.Live()) },
		}
	})
}

func fake() (*vmmtest.Host, *vmmtest.Fake) {
	host := vmmtest.NewHost()
	f := vmmtest.NewFake(host)
	f.Lenient = true
	return host, f
}

func spec(id string) vmm.Spec { return vmm.Spec{ID: id, Kernel: vmm.Kernel{Image: "vmlinux"}} }

func TestInjectedErrors(t *testing.T) {
	broken := errors.New("broken")
	for _, after := range []bool{false, true} {
		host, f := fake()
		f.Inject(vmmtest.OpStart, 2, vmmtest.Fault{Err: broken, After: after})
		v, err := f.Start(t.Context(), spec("a"))
		if err != nil {
			t.Fatalf("first start: %v", err)
		}
		if _, err := f.Start(t.Context(), spec("b")); !errors.Is(err, broken) {
			t.Errorf("second start: %v", err)
		}
		if live := host.Live(); !slices.Equal(live, []string{"a"}) {
			t.Errorf("live: %v, want a alone", live)
		}
		f.Inject(vmmtest.OpPause, 1, vmmtest.Fault{Err: broken, After: after})
		if err := v.Pause(t.Context()); !errors.Is(err, broken) {
			t.Errorf("pause: %v", err)
		}
		if host.Paused("a") != after {
			t.Errorf("after = %v: paused = %v", after, host.Paused("a"))
		}
		if err := v.Pause(t.Context()); err != nil {
			t.Errorf("pause again: %v", err)
		}
	}
}

func TestInjectedDeath(t *testing.T) {
	host, f := fake()
	v, err := f.Start(t.Context(), spec("a"))
	if err != nil {
		t.Fatal(err)
	}
	f.Inject(vmmtest.OpPause, 1, vmmtest.Fault{Die: true, Err: errdefs.Unavailable.Errorf("gone")})
	if err := v.Pause(t.Context()); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("pause: %v", err)
	}
	<-v.Done()
	if live := host.Live(); len(live) != 0 {
		t.Errorf("live: %v", live)
	}
}

func TestInjectedHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, f := fake()
		f.Inject(vmmtest.OpStart, 1, vmmtest.Fault{Hang: true})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.Start(ctx, spec("a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("start: %v", err)
		}
		f.Inject(vmmtest.OpStart, 1, vmmtest.Fault{Hang: true})
		go func() {
			synctest.Wait()
			if n := f.Hanging(); n != 1 {
				t.Errorf("%d calls hang, want 1", n)
			}
			f.Release()
		}()
		if _, err := f.Start(t.Context(), spec("b")); err != nil {
			t.Errorf("released start: %v", err)
		}
	})
}
