package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Subject is a driver under test.
type Subject struct {
	Driver vmm.Driver
	// Again returns another instance of the driver on the same machine, as the
	// next agent has it.
	Again func() vmm.Driver
	// Spec is of a guest that runs until it is ended. Its run directory and
	// its console's directory belong to the test.
	Spec vmm.Spec
	// Clone returns a spec for a VM restored from one of Spec's: the same
	// shape, with an ID that begins with Spec.ID and a run directory and
	// console of its own.
	Clone func() vmm.Spec
	// Exiting changes a spec into one whose guest ends by itself.
	Exiting func(*vmm.Spec)
	// Live returns how many VMM processes of Spec.ID and its clones there are.
	Live func() int
}

// soon bounds what a driver does at once, on a machine that is busy.
const soon = 20 * time.Second

// Run checks that a driver meets the contract. It calls subject for each test.
func Run(t *testing.T, subject func(*testing.T) Subject) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Subject)
	}{
		{"check", testCheck},
		{"runs until killed", testKill},
		{"kill by many", testKillByMany},
		{"exits by itself", testExit},
		{"pause and resume", testPauseResume},
		{"used by many", testUsedByMany},
		{"calls on a dead vm", testDead},
		{"outlives its context", testOutlivesContext},
		{"cancelled start", testCancelledStart},
		{"cancelled calls", testCancelledCalls},
		{"cancelled snapshot", testCancelledSnapshot},
		{"attach", testAttach},
		{"attach to a dead vm", testAttachDead},
		{"attach to nonsense", testAttachNonsense},
		{"bad specs", testBadSpecs},
		{"snapshot and restore", testSnapshot},
		{"snapshot of a restored vm", testSnapshotOfRestored},
		{"failed snapshot", testFailedSnapshot},
		{"bad snapshots", testBadSnapshots},
		{"snapshot keys", testSnapshotKeys},
		{"a stack of layers", testStack},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			s := subject(t)
			c.test(t, s)
			if n := s.Live(); n != 0 {
				t.Errorf("%d VMM processes are left", n)
			}
		})
	}
}

// start starts the subject's VM, and ends it with the test.
func start(t *testing.T, s Subject) vmm.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	v, err := s.Driver.Start(ctx, s.Spec)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	t.Cleanup(func() { kill(t, v) })
	return v
}

func kill(t *testing.T, v vmm.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	if err := v.Kill(ctx); err != nil {
		t.Errorf("kill: %v", err)
	}
}

func gone(t *testing.T, v vmm.VM) {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(soon):
		t.Fatal("the vm is still there")
	}
}

func running(t *testing.T, v vmm.VM) {
	t.Helper()
	select {
	case <-v.Done():
		t.Fatalf("the vm has ended: %v %s", v.Exit(), v.Exit().Detail)
	default:
	}
}

func testCheck(t *testing.T, s Subject) {
	first, err := s.Driver.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains([]string{first.Version, first.Why, first.Accel, first.CPU, string(first.Isolation)}, "") ||
		first.Speed < vmm.Emulated || first.Speed > vmm.Native {
		t.Errorf("incomplete report %+v", first)
	}
	if again, err := s.Driver.Check(t.Context()); err != nil || again != first {
		t.Errorf("second report %+v, %v; want %+v", again, err, first)
	}
	needs := s.Driver.Needs()
	if needs != s.Again().Needs() || needs.Link != vmm.Tap && needs.Link != vmm.Packet {
		t.Errorf("needs %+v", needs)
	}
	if needs.KVM && first.Speed < vmm.Native {
		t.Errorf("with KVM guests are %s", first.Speed)
	}
}

func testKill(t *testing.T, s Subject) {
	v := start(t, s)
	running(t, v)
	if n := s.Live(); n != 1 {
		t.Errorf("%d VMM processes, want 1", n)
	}
	if _, err := os.Stat(s.Spec.Console); err != nil && s.Driver.Name() != "fake" {
		t.Errorf("console: %v", err)
	}
	kill(t, v)
	gone(t, v)
	if n := s.Live(); n != 0 {
		t.Errorf("%d VMM processes after kill", n)
	}
	if e := v.Exit(); e.Signal != 9 || e.Code != -1 {
		t.Errorf("exit = %+v, want signal 9", e)
	}
	kill(t, v)
}

func testKillByMany(t *testing.T, s Subject) {
	v := start(t, s)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			kill(t, v)
			select {
			case <-v.Done():
			default:
				t.Error("kill returned before the vm was gone")
			}
		})
	}
	wg.Wait()
}

func testExit(t *testing.T, s Subject) {
	s.Exiting(&s.Spec)
	v := start(t, s)
	gone(t, v)
	if e := v.Exit(); e.Signal != 0 || e.Code != 0 {
		t.Errorf("exit = %+v, want status 0", e)
	}
	kill(t, v)
}

func testPauseResume(t *testing.T, s Subject) {
	v := start(t, s)
	for _, step := range []struct {
		name string
		call func(context.Context) error
	}{
		{"resume of a running vm", v.Resume},
		{"pause", v.Pause}, {"second pause", v.Pause},
		{"resume", v.Resume}, {"second resume", v.Resume},
		{"pause again", v.Pause},
	} {
		if err := step.call(t.Context()); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		running(t, v)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.Pause(ended); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("pause with a cancelled context: %v", err)
	}
	kill(t, v) // a paused one dies too
	gone(t, v)
}

func testUsedByMany(t *testing.T, s Subject) {
	v := start(t, s)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 5 {
				for name, call := range map[string]func(context.Context) error{"pause": v.Pause, "resume": v.Resume} {
					// The calls come in any order. The only error that may follow
					// from that is the wrong state.
					if err := call(t.Context()); err != nil && !errors.Is(err, errdefs.WrongState) {
						t.Errorf("%s by the %d.: %v", name, i, err)
					}
				}
				if h := v.Handle(); h.Driver != s.Driver.Name() || h.CPU == "" {
					t.Errorf("handle of driver %q", h.Driver)
				}
			}
		})
	}
	wg.Wait()
	running(t, v)
	if err := v.Resume(t.Context()); err != nil {
		t.Errorf("resume after all: %v", err)
	}
	kill(t, v)
}

func testDead(t *testing.T, s Subject) {
	v := start(t, s)
	kill(t, v)
	for name, call := range map[string]func(context.Context) error{"pause": v.Pause, "resume": v.Resume} {
		began := time.Now()
		err := call(t.Context())
		if !errors.Is(err, errdefs.Unavailable) {
			t.Errorf("%s: %v, want unavailable", name, err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("%s took %s to see that the vm is gone", name, took)
		}
	}
}

func testOutlivesContext(t *testing.T, s Subject) {
	ctx, cancel := context.WithCancel(t.Context())
	v, err := s.Driver.Start(ctx, s.Spec)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	defer kill(t, v)
	cancel()
	if err := v.Pause(t.Context()); err != nil {
		t.Errorf("pause after the start's context has ended: %v", err)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Errorf("resume after the start's context has ended: %v", err)
	}
	running(t, v)
}

// moments are the times after which a call is cancelled: before it, and in its
// steps.
var moments = []time.Duration{0, 100 * time.Microsecond, 300 * time.Microsecond, time.Millisecond, 3 * time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond}

// cancelled makes a call under a context that is cancelled, and one under a context
// with a deadline, and checks that a call that fails returns the context's cause.
func cancelled(t *testing.T, what string, after time.Duration, call func(context.Context) error) {
	t.Helper()
	gone := errors.New("the caller is gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	if after == 0 {
		cancel(gone)
	}
	timer := time.AfterFunc(after, func() { cancel(gone) })
	if err := call(ctx); err != nil && !errors.Is(err, gone) {
		t.Errorf("%s, cancelled after %s: %v, want the context's cause", what, after, err)
	}
	timer.Stop()
	cancel(nil)

	late, stop := context.WithTimeout(t.Context(), after)
	defer stop()
	if err := call(late); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%s, with %s of time: %v, want the context's error", what, after, err)
	}
}

func testCancelledStart(t *testing.T, s Subject) {
	for _, after := range moments {
		cancelled(t, "start", after, func(ctx context.Context) error {
			v, err := s.Driver.Start(ctx, s.Spec)
			if err == nil {
				kill(t, v)
			}
			if n := s.Live(); n != 0 {
				t.Fatalf("cancelled after %s: %d VMM processes are left", after, n)
			}
			return err
		})
	}
}

func testCancelledCalls(t *testing.T, s Subject) {
	v := start(t, s)
	again := s.Again()
	for _, after := range moments {
		cancelled(t, "pause", after, v.Pause)
		cancelled(t, "resume", after, v.Resume)
		cancelled(t, "attach", after, func(ctx context.Context) error {
			_, err := again.Attach(ctx, v.Handle())
			return err
		})
	}
	running(t, v)
	for _, after := range moments {
		v := v
		if after > 0 {
			v = start(t, Subject{Driver: s.Driver, Spec: s.Clone()})
		}
		cancelled(t, "kill", after, v.Kill)
		gone(t, v) // although the call was cancelled
	}
}

func testCancelledSnapshot(t *testing.T, s Subject) {
	v := start(t, s)
	snap, restorer := snapshotter(t, s, v)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	whole := t.TempDir()
	if err := snap.Snapshot(t.Context(), whole); err != nil {
		t.Fatal(err)
	}
	for _, after := range moments {
		cancelled(t, "snapshot", after, func(ctx context.Context) error {
			dir := t.TempDir()
			err := snap.Snapshot(ctx, dir)
			if left, e := os.ReadDir(dir); e != nil || err != nil && len(left) != 0 {
				t.Errorf("a snapshot that was cancelled after %s left %v, %v", after, left, e)
			}
			return err
		})
		cancelled(t, "restore", after, func(ctx context.Context) error {
			clone, err := restorer.Restore(ctx, s.Clone(), whole)
			if err == nil {
				kill(t, clone)
			}
			if n := s.Live(); n != 1 {
				t.Errorf("a restore that was cancelled after %s: %d VMM processes, want the source's", after, n)
			}
			return err
		})
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Errorf("resume after all: %v", err)
	}
	kill(t, v)
}

func testAttach(t *testing.T, s Subject) {
	first := start(t, s)
	if err := first.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	stored, err := json.Marshal(first.Handle())
	if err != nil {
		t.Fatal(err)
	}
	var h vmm.Handle
	if err := json.Unmarshal(stored, &h); err != nil {
		t.Fatal(err)
	}
	second, err := s.Again().Attach(t.Context(), h)
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	if got := second.Handle(); string(got.State) != string(h.State) || got.Version != h.Version || got.Driver != h.Driver || got.CPU != h.CPU {
		t.Errorf("handle changed from %s to %s", h.State, got.State)
	}
	if err := second.Resume(t.Context()); err != nil {
		t.Errorf("resume: %v", err)
	}
	if err := first.Pause(t.Context()); err != nil {
		t.Errorf("pause by the first: %v", err)
	}
	running(t, second)
	kill(t, second)
	gone(t, second)
	gone(t, first)
}

func testAttachDead(t *testing.T, s Subject) {
	v := start(t, s)
	kill(t, v)
	if _, err := s.Again().Attach(t.Context(), v.Handle()); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("attach: %v, want not found", err)
	}
}

func testAttachNonsense(t *testing.T, s Subject) {
	for name, h := range map[string]vmm.Handle{
		"empty":        {},
		"other driver": {Driver: "other", State: json.RawMessage(`{}`)},
		"no state":     {Driver: s.Driver.Name()},
		"not json":     {Driver: s.Driver.Name(), State: json.RawMessage(`{"pid":`)},
	} {
		if _, err := s.Driver.Attach(t.Context(), h); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
	h := vmm.Handle{Driver: s.Driver.Name(), State: json.RawMessage(`{}`)}
	if _, err := s.Driver.Attach(t.Context(), h); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("empty state: %v, want not found", err)
	}
}

// badSpecs are changes to a spec that a driver with these needs refuses.
func badSpecs(needs vmm.Needs) map[string]func(*vmm.Spec) {
	bad := map[string]func(*vmm.Spec){
		"no id":            func(s *vmm.Spec) { s.ID = "" },
		"id with a comma":  func(s *vmm.Spec) { s.ID = "a,b" },
		"id with a slash":  func(s *vmm.Spec) { s.ID = "a/b" },
		"long id":          func(s *vmm.Spec) { s.ID = strings.Repeat("a", 64) },
		"leading dash":     func(s *vmm.Spec) { s.ID = "-a" },
		"no vcpu":          func(s *vmm.Spec) { s.VCPUs = 0 },
		"many vcpus":       func(s *vmm.Spec) { s.VCPUs = 1 << 30 },
		"negative memory":  func(s *vmm.Spec) { s.MemMiB = -1 },
		"huge memory":      func(s *vmm.Spec) { s.MemMiB = 1 << 31 },
		"absent base":      func(s *vmm.Spec) { s.Root.Layers = []string{"/nonexistent/disk"} },
		"many layers":      func(s *vmm.Spec) { s.Root.Layers = slices.Repeat([]string{"/proc/version"}, vmm.MaxLayers+1) },
		"absent layer":     func(s *vmm.Spec) { s.Root.Layers = []string{"/proc/version", "/nonexistent/disk"} },
		"absent overlay":   func(s *vmm.Spec) { s.Root.Overlay = "/nonexistent/disk" },
		"base a directory": func(s *vmm.Spec) { s.Root.Layers = []string{s.RunDir} },
		"absent namespace": func(s *vmm.Spec) { s.NetNS = "/nonexistent/ns" },
		"absent run dir":   func(s *vmm.Spec) { s.RunDir = "/nonexistent" },
		"long run dir":     func(s *vmm.Spec) { s.RunDir = "/" + strings.Repeat("a", 100) },
		"absent console":   func(s *vmm.Spec) { s.Console = "/nonexistent/console.log" },
		"no console":       func(s *vmm.Spec) { s.Console = "" },
		"bad link":         func(s *vmm.Spec) { s.Link = &vmm.Link{Kind: needs.Link, Name: "a,b=c", MAC: "02:fc:00:00:00:05"} },
		"bad mac":          func(s *vmm.Spec) { s.Link = &vmm.Link{Kind: needs.Link, Name: "tap0", MAC: "nonsense"} },
		"unknown link":     func(s *vmm.Spec) { s.Link = &vmm.Link{Kind: "cable", Name: "tap0", MAC: "02:fc:00:00:00:05"} },
		"facts with NUL":   func(s *vmm.Spec) { s.Boot.Hostname = "a\x00b" },
		"long facts":       func(s *vmm.Spec) { s.Boot.Hostname = strings.Repeat("a", 1<<16) },
		"negative uid":     func(s *vmm.Spec) { s.UID = -1 },
	}
	if needs.Init {
		bad["no init"] = func(s *vmm.Spec) { s.Init = "" }
		bad["absent init"] = func(s *vmm.Spec) { s.Init = "/nonexistent/init" }
	} else {
		bad["an init"] = func(s *vmm.Spec) { s.Init = "/proc/version" }
	}
	if !needs.Kernel {
		bad["a kernel"] = func(s *vmm.Spec) { s.Kernel.Image = "/proc/version" }
		return bad
	}
	bad["no kernel"] = func(s *vmm.Spec) { s.Kernel.Image = "" }
	bad["absent kernel"] = func(s *vmm.Spec) { s.Kernel.Image = "/nonexistent/vmlinux" }
	bad["relative kernel"] = func(s *vmm.Spec) { s.Kernel.Image = "vmlinux" }
	bad["absent initrd"] = func(s *vmm.Spec) { s.Kernel.Initrd = "/nonexistent/initrd" }
	bad["arguments with NUL"] = func(s *vmm.Spec) { s.Kernel.Args = "a\x00b" }
	bad["long arguments"] = func(s *vmm.Spec) { s.Kernel.Args = strings.Repeat("a", 1<<16) }
	return bad
}

func testBadSpecs(t *testing.T, s Subject) {
	for name, spoil := range badSpecs(s.Driver.Needs()) {
		spec := s.Spec
		spoil(&spec)
		v, err := s.Driver.Start(t.Context(), spec)
		if err == nil {
			kill(t, v)
		}
		if !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		} else if strings.Contains(err.Error(), "/nonexistent") {
			t.Errorf("%s: the text names a host path: %v", name, err)
		}
	}
	if n := s.Live(); n != 0 {
		t.Errorf("%d VMM processes are left", n)
	}
	if left, err := os.ReadDir(s.Spec.RunDir); err != nil || len(left) != 0 {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}
}

// snapshotter returns the VM's ability to be written, or skips the test.
func snapshotter(t *testing.T, s Subject, v vmm.VM) (vmm.Snapshotter, vmm.Restorer) {
	t.Helper()
	snap, ok := v.(vmm.Snapshotter)
	restore, ok2 := s.Driver.(vmm.Restorer)
	if ok != ok2 {
		t.Fatalf("vm can be snapshotted: %v; driver can restore: %v", ok, ok2)
	}
	if !ok {
		t.Skip("this driver has no snapshots")
	}
	return snap, restore
}

func restored(t *testing.T, s Subject, dir string) vmm.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	v, err := s.Driver.(vmm.Restorer).Restore(ctx, s.Clone(), dir)
	if err != nil {
		t.Fatalf("restore: %v", err)
	}
	t.Cleanup(func() { kill(t, v) })
	return v
}

func testSnapshot(t *testing.T, s Subject) {
	v := start(t, s)
	snap, _ := snapshotter(t, s, v)
	dir := t.TempDir()
	if err := snap.Snapshot(t.Context(), dir); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("snapshot of a running vm: %v, want wrong state", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := snap.Snapshot(t.Context(), dir); err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	if err := snap.Snapshot(t.Context(), dir); !errors.Is(err, errdefs.AlreadyExists) {
		t.Errorf("second snapshot into the same directory: %v, want already exists", err)
	}
	clones := []vmm.VM{restored(t, s, dir), restored(t, s, dir)}
	if err := v.Resume(t.Context()); err != nil {
		t.Errorf("the source does not go on: %v", err)
	}
	for i, c := range clones {
		if err := c.Resume(t.Context()); err != nil {
			t.Errorf("clone %d: resume: %v", i, err)
		}
	}
	if n := s.Live(); n != 3 {
		t.Errorf("%d VMM processes, want 3", n)
	}
	// The clones do not depend on the source, and the next agent finds them.
	kill(t, v)
	again, err := s.Again().Attach(t.Context(), clones[0].Handle())
	if err != nil {
		t.Fatalf("attach to a clone: %v; it %s", err, clones[0].Exit())
	}
	if err := again.Pause(t.Context()); err != nil {
		t.Errorf("pause of an attached clone: %v", err)
	}
	for _, c := range clones {
		running(t, c)
		kill(t, c)
	}
}

func testSnapshotOfRestored(t *testing.T, s Subject) {
	v := start(t, s)
	snap, _ := snapshotter(t, s, v)
	first, second := t.TempDir(), t.TempDir()
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := snap.Snapshot(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	child := restored(t, s, first)
	// As restored, and after it ran, by another agent.
	if err := child.(vmm.Snapshotter).Snapshot(t.Context(), t.TempDir()); err != nil {
		t.Errorf("snapshot of what was just restored: %v", err)
	}
	if err := child.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := child.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := s.Again().Attach(t.Context(), child.Handle())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.(vmm.Snapshotter).Snapshot(t.Context(), second); err != nil {
		t.Fatalf("snapshot of a restored vm: %v", err)
	}
	if err := os.RemoveAll(first); err != nil {
		t.Fatal(err)
	}
	grandchild := restored(t, s, second)
	if err := grandchild.Resume(t.Context()); err != nil {
		t.Errorf("resume: %v", err)
	}
	kill(t, grandchild)
	kill(t, child)
	kill(t, v)
}

func testFailedSnapshot(t *testing.T, s Subject) {
	v := start(t, s)
	snap, _ := snapshotter(t, s, v)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := snap.Snapshot(ended, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := snap.Snapshot(t.Context(), "/nonexistent/dir"); err == nil {
		t.Error("into nowhere: no error")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := snap.Snapshot(t.Context(), dir); err != nil {
		t.Errorf("snapshot after failed ones: %v", err)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Errorf("resume after failed snapshots: %v", err)
	}
	kill(t, v)
	if err := snap.Snapshot(t.Context(), t.TempDir()); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("of a dead vm: %v, want unavailable", err)
	}
}

func testBadSnapshots(t *testing.T, s Subject) {
	v := start(t, s)
	snap, restore := snapshotter(t, s, v)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := snap.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	kill(t, v)
	try := func(what string, spec vmm.Spec, dir string, want *errdefs.Class) {
		t.Helper()
		v, err := restore.Restore(t.Context(), spec, dir)
		if err == nil {
			kill(t, v)
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	other := s.Clone()
	other.MemMiB *= 2
	try("more memory", other, dir, errdefs.InvalidArgument)
	other = s.Clone()
	other.VCPUs++
	try("more vCPUs", other, dir, errdefs.InvalidArgument)
	other = s.Clone()
	other.Root = otherRoot(t, other)
	try("another root", other, dir, errdefs.InvalidArgument)
	other = s.Clone()
	other.ID = ""
	try("no id", other, dir, errdefs.InvalidArgument)
	try("empty directory", s.Clone(), t.TempDir(), errdefs.Corrupt)
	try("no directory", s.Clone(), "/nonexistent", errdefs.Corrupt)

	files, err := os.ReadDir(dir)
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, int64(len(whole)/2)); err != nil {
			t.Fatal(err)
		}
		try("half of "+f.Name(), s.Clone(), dir, errdefs.Corrupt)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		try("without "+f.Name(), s.Clone(), dir, errdefs.Corrupt)
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again := restored(t, s, dir) // a failed restore changes nothing
	kill(t, again)
}

// otherRoot returns a root with another number of layers.
func otherRoot(t *testing.T, s vmm.Spec) vmm.Root {
	t.Helper()
	if len(s.Root.Layers) > 0 {
		return vmm.Root{Overlay: s.Root.Overlay}
	}
	base := filepath.Join(t.TempDir(), "base")
	if err := os.WriteFile(base, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	return vmm.Root{Layers: []string{base}, Overlay: s.Root.Overlay}
}

// stackOf is a root of n layers, in files of their own.
func stackOf(t *testing.T, n int) vmm.Root {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := vmm.Root{Overlay: file("overlay")}
	for i := range n {
		root.Layers = append(root.Layers, file("layer"+string(rune('a'+i))))
	}
	return root
}

func testStack(t *testing.T, s Subject) {
	if !s.Driver.Needs().Kernel {
		t.Skip("this driver has no block devices, and says itself how many layers it takes")
	}
	s.Spec.Root = stackOf(t, 3)
	v := start(t, s)
	running(t, v)
	snap, restorer := snapshotter(t, s, v)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := snap.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	kill(t, v)
	for n := 1; n <= 4; n++ {
		clone := s.Clone()
		clone.Root = stackOf(t, n)
		restored, err := restorer.Restore(t.Context(), clone, dir)
		if n != 3 {
			if err == nil {
				kill(t, restored)
			}
			if !errors.Is(err, errdefs.InvalidArgument) {
				t.Errorf("restore with %d layers of 3: %v, want invalid argument", n, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("restore: %v", err)
		}
		if err := restored.Resume(t.Context()); err != nil {
			t.Errorf("resume: %v", err)
		}
		running(t, restored)
		kill(t, restored)
	}
	keys := map[string]int{}
	for n := range vmm.MaxLayers + 1 {
		other := s.Spec
		other.Root = stackOf(t, n)
		for range 2 {
			key, err := restorer.SnapshotKey(t.Context(), other)
			if have, ok := keys[key]; err != nil || ok && have != n {
				t.Errorf("the key of %d layers is that of %d, %v", n, have, err)
			}
			keys[key] = n
			other.Root = stackOf(t, n) // other files
		}
	}
	if len(keys) != vmm.MaxLayers+1 {
		t.Errorf("%d keys for %d numbers of layers", len(keys), vmm.MaxLayers+1)
	}
	s.Spec.Root = stackOf(t, vmm.MaxLayers)
	kill(t, start(t, s))
}

func testSnapshotKeys(t *testing.T, s Subject) {
	restorer, ok := s.Driver.(vmm.Restorer)
	if !ok {
		t.Skip("this driver has no snapshots")
	}
	key := func(r vmm.Restorer, spec vmm.Spec) string {
		t.Helper()
		k, err := r.SnapshotKey(t.Context(), spec)
		if err != nil || k == "" {
			t.Fatalf("key %q, %v", k, err)
		}
		return k
	}
	want := key(restorer, s.Spec)
	if got := key(restorer, s.Clone()); got != want {
		t.Error("a clone has another key")
	}
	if got := key(s.Again().(vmm.Restorer), s.Spec); got != want {
		t.Error("the next agent has another key")
	}
	link := s.Driver.Needs().Link
	for name, change := range map[string]func(*vmm.Spec){
		"memory": func(s *vmm.Spec) { s.MemMiB *= 2 },
		"vCPUs":  func(s *vmm.Spec) { s.VCPUs *= 2 },
		"root":   func(s *vmm.Spec) { s.Root = otherRoot(t, *s) },
		"link":   func(s *vmm.Spec) { s.Link = &vmm.Link{Kind: link, Name: "tap0", MAC: "02:fc:00:00:00:05"} },
	} {
		other := s.Spec
		change(&other)
		if key(restorer, other) == want {
			t.Errorf("other %s, the same key", name)
		}
	}
}
