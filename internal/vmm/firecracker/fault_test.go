package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// The calls of a boot of subject's VM, counted as the fake does.
const (
	bootCalls = 6 // machine, boot source, two drives, entropy, start
	loadCall  = 1
)

// Whatever goes wrong at whatever call, a start either returns a running VM or
// an error, and then nothing is left.
func TestFaultsOfStart(t *testing.T) {
	for call := 1; call <= bootCalls; call++ {
		for _, fault := range []string{"die", "400", "500", "close", "lost", "hang"} {
			t.Run(fmt.Sprintf("%s_at_%d", fault, call), func(t *testing.T) {
				s := subject(t, install(t, fakeSettings{Fault: fault, Call: call}, call%2 == 0))
				startAndLook(t, s.Spec, s.Live, fault, fault == "lost" && call == bootCalls, s.Driver.Start)
			})
		}
	}
}

func TestFaultsOfRestore(t *testing.T) {
	for _, fault := range []string{"die", "400", "500", "close", "lost", "hang"} {
		t.Run(fault, func(t *testing.T) {
			s := subject(t, install(t, fakeSettings{}, true))
			v := boot(t, s)
			if err := v.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if err := v.Snapshot(t.Context(), dir); err != nil {
				t.Fatal(err)
			}
			if err := v.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			faulty := driver(install(t, fakeSettings{Fault: fault, Call: loadCall}, true))
			startAndLook(t, s.Clone(), s.Live, fault, fault == "lost", func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
				return faulty.Restore(ctx, spec, dir)
			})
			// A failed restore spoils nothing.
			again, err := s.Driver.(*Driver).Restore(t.Context(), s.Clone(), dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := again.Kill(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// startAndLook makes a VM in spite of a fault. comes tells whether there is one
// in the end: the answer was lost, the deed was done.
func startAndLook(t *testing.T, spec vmm.Spec, live func() int, fault string, comes bool, make func(context.Context, vmm.Spec) (vmm.VM, error)) {
	t.Helper()
	ctx := t.Context()
	if fault == "hang" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
	}
	v, err := make(ctx, spec)
	if comes {
		if err != nil {
			t.Fatalf("%v, though it took effect", err)
		}
		if err := v.Kill(t.Context()); err != nil {
			t.Error(err)
		}
		return
	}
	if err == nil {
		v.Kill(t.Context())
	}
	wants := map[string]string{
		"die":   "firecracker exited with status 1: Firecracker panicked",
		"400":   "the fault that was asked for",
		"500":   "the VMM answers with status 500",
		"close": "the VMM does not answer", "lost": "the VMM does not answer",
		"hang": context.DeadlineExceeded.Error(),
	}
	if err == nil || !strings.Contains(err.Error(), wants[fault]) {
		t.Errorf("%v, want %q", err, wants[fault])
	}
	if fault == "hang" && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want the context's", err)
	}
	if fault == "400" && errdefs.ClassOf(err) != nil {
		t.Errorf("Firecracker's own words are in a classed error: %v", err)
	}
	if n := live(); n != 0 {
		t.Errorf("%d VMM processes are left", n)
	}
	left, err := os.ReadDir(spec.RunDir)
	if err != nil || len(left) > 1 || len(left) == 1 && left[0].Name() != launch.LogName {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}
}

// After an answer that went missing, the VM's own state is what counts.
func TestFaultsOfPauseAndResume(t *testing.T) {
	for _, c := range []struct {
		fault string
		fails string
		class *errdefs.Class
	}{
		{"lost", "", nil},
		{"close", "does not answer", errdefs.Unavailable},
		{"400", "the fault that was asked for", nil},
		{"500", "status 500", nil},
		{"die", "its VMM exited with status 1", errdefs.Unavailable},
	} {
		for extra, call := range map[int]string{1: "pause", 2: "resume"} {
			t.Run(c.fault+"_"+call, func(t *testing.T) {
				s := subject(t, install(t, fakeSettings{Fault: c.fault, Call: bootCalls + extra}, true))
				v := boot(t, s)
				err := v.Pause(t.Context())
				if call == "resume" {
					if err != nil {
						t.Fatal(err)
					}
					err = v.Resume(t.Context())
				}
				if c.fails == "" {
					if err != nil {
						t.Fatalf("%v, though it took effect", err)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), c.fails) || errdefs.ClassOf(err) != c.class {
					t.Errorf("%v (%v), want %q (%v)", err, errdefs.ClassOf(err), c.fails, c.class)
				}
				if c.fault == "die" {
					return
				}
				// It is as it was, and works.
				if err := v.Pause(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestFaultsOfSnapshot(t *testing.T) {
	for _, fault := range []string{"lost", "close", "400", "500", "die", "hang"} {
		t.Run(fault, func(t *testing.T) {
			s := subject(t, install(t, fakeSettings{Fault: fault, Call: bootCalls + 2}, true))
			v := boot(t, s)
			if err := v.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
			ctx := t.Context()
			if fault == "hang" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
				defer cancel()
			}
			dir := t.TempDir()
			err := v.Snapshot(ctx, dir)
			if err == nil || fault == "die" && !errors.Is(err, errdefs.Unavailable) || fault == "hang" && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("snapshot: %v", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			if fault == "die" || fault == "hang" {
				return
			}
			if err := v.Snapshot(t.Context(), dir); err != nil {
				t.Errorf("snapshot after a failed one: %v", err)
			}
			if err := v.Resume(t.Context()); err != nil {
				t.Errorf("resume after a failed snapshot: %v", err)
			}
		})
	}
}

// A Firecracker that exits at once is explained by its own last words.
func TestStartExplainsTheExit(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{Fault: "die at once"}, jailed))
		began := time.Now()
		_, err := s.Driver.Start(t.Context(), s.Spec)
		if err == nil || !strings.Contains(err.Error(), "firecracker exited with status 1: Firecracker exits at once") || errdefs.ClassOf(err) != nil {
			t.Errorf("start: %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %s to see", took)
		}
	})
}

// A call that waits for a VMM ends when that does, and with its context.
func TestStuckVMM(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	v := boot(t, s)
	// Our own child, not reaped before the test's end.
	if err := unix.Kill(v.state.Process.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Again().Attach(ctx, v.Handle()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("attach: %v, want the deadline", err)
	}
	result := make(chan error, 1)
	go func() { result <- v.Pause(t.Context()) }()
	select {
	case err := <-result:
		t.Fatalf("pause of a stopped VMM: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "killed by signal 9") {
		t.Errorf("pause: %v", err)
	}
}

// The socket's path now leads to another VM: it is not taken for the first.
func TestAttachToAnother(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	v := boot(t, s)
	other := s
	other.Spec = s.Clone()
	o := boot(t, other)
	h := v.Handle()
	h.State = []byte(strings.Replace(string(h.State), v.state.Socket, o.state.Socket, 1))
	if _, err := s.Again().Attach(t.Context(), h); !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "another vm answers") {
		t.Errorf("attach: %v", err)
	}
}
