package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// rig is a manager on fakes of everything below it.
type rig struct {
	*Manager
	t      *testing.T
	dir    string
	net    *fakeNetwork
	tmpl   *fakeTemplates
	host   *vmmtest.Host
	driver *vmmtest.Fake
	faults *faults
	exec   func(context.Context, guest.Command) (guest.Result, error)
	told   func(token string, in guest.Init) // by whoever shows the token
	// envd is the version that guests state.
	envd    string
	metrics func(context.Context) (guestapi.Metrics, error)
	open    atomic.Int64 // guests not closed
	found   Recovery
	dead    []*Manager
	changed func(*Config)
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	f := newFaults()
	r := &rig{t: t, dir: t.TempDir(), faults: f, net: newFakeNetwork(f), host: vmmtest.NewHost()}
	r.tmpl = newFakeTemplates(f, filepath.Join(r.dir, "ready"))
	if len(change) > 0 {
		r.changed = change[0]
	}
	r.start()
	return r
}

// start opens a manager on what is there.
func (r *rig) start() {
	r.t.Helper()
	r.driver = vmmtest.NewFake(r.host)
	r.driver.Lenient = true
	if err := r.tryStart(r.t.Context()); err != nil {
		r.t.Fatalf("open: %v", err)
	}
}

func (r *rig) tryStart(ctx context.Context) error {
	f := r.faults
	m, found, err := Open(ctx, r.config())
	if err != nil {
		return err
	}
	f.mu.Lock()
	dead := f.dead
	f.mu.Unlock()
	if dead { // killed while it started, and let go on only to end
		m.end()
		m.lock.release()
		return errFault
	}
	r.Manager, r.found = m, found
	r.t.Cleanup(func() {
		if slices.Contains(r.dead, m) {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := m.Shutdown(ctx, false); err != nil {
			r.t.Errorf("shutdown: %v", err)
		}
	})
	return nil
}

func (r *rig) config() Config {
	f := r.faults // of this agent, not of the next
	cfg := Config{
		StateDir: filepath.Join(r.dir, "state"), RunDir: filepath.Join(r.dir, "run"),
		Drivers: []vmm.Driver{hookedDriver{r.driver, r.faults}}, Network: r.net, Templates: r.tmpl,
		Guests: func(_ netip.Addr, token string) Guest {
			r.open.Add(1)
			return fakeGuest{f, &r.open, r.exec, func(in guest.Init) string {
				if r.told != nil {
					r.told(token, in)
				}
				return r.envd
			}, r.metrics}
		},
		KillStrays: func(ctx context.Context, _, _ string, keep func(string) bool) ([]string, error) {
			if err := f.called(ctx, "kill strays"); err != nil {
				return nil, err
			}
			var killed []string
			for _, id := range r.host.Live() {
				if !keep(id) {
					r.host.Die(id)
					killed = append(killed, id)
				}
			}
			return killed, nil
		},
		NetNSOf: func(_, name string, paths []string) (string, error) {
			if err := f.called(context.Background(), "proc netns"); err != nil {
				return "", err
			}
			if spec, ok := r.host.Spec(name); ok && slices.Contains(paths, spec.NetNS) {
				return spec.NetNS, nil
			}
			return "", nil
		},
		Capacity:   Capacity{Resources: Resources{Sandboxes: 10_000, VCPUs: 10_000, MemMiB: 1 << 30, DiskMiB: 1 << 30}, Starts: 50, StartQueue: time.Minute},
		OverlayMiB: 64, BootTimeout: time.Minute, KeepStopped: time.Hour,
		storeHook: func(step string) error { return f.called(context.Background(), "record "+step) },
		Log:       slog.New(slog.NewTextHandler(testLog{r.t}, nil)),
	}
	if r.changed != nil {
		r.changed(&cfg)
	}
	return cfg
}

// die ends the agent as kill -9 would: nothing of it acts any more.
func (r *rig) die() {
	r.faults.die()
	if r.Manager == nil { // killed while it started: the kernel drops its lock
		os.Remove(filepath.Join(r.dir, "state", "lock"))
	} else {
		r.dead = append(r.dead, r.Manager)
		r.end()
		r.lock.release()
		r.work.mu.Lock()
		r.work.ended = true
		r.work.mu.Unlock()
	}
	r.faults = newFaults()
	r.net, r.tmpl = r.net.restart(r.faults), newFakeTemplates(r.faults, filepath.Join(r.dir, "ready"))
	r.open.Store(0)
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	if testing.Verbose() {
		l.t.Logf("%s", p)
	}
	return len(p), nil
}

func (r *rig) create() ID {
	r.t.Helper()
	info, err := r.Create(r.t.Context(), CreateRequest{})
	if err != nil {
		r.t.Fatalf("create: %v", err)
	}
	return info.ID
}

// wantNothing fails the test unless nothing at all is held for any sandbox. It
// waits a little for a release behind the test's back.
func (r *rig) wantNothing() {
	r.t.Helper()
	var left []string
	for deadline := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		if left = r.held(); len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, what := range left {
		r.t.Error(what)
	}
}

func (r *rig) held() (left []string) {
	add := func(format string, args ...any) { left = append(left, fmt.Sprintf(format, args...)) }
	if live := r.host.Live(); len(live) != 0 {
		add("VMs are left: %v", live)
	}
	r.net.mu.Lock()
	if len(r.net.open) != 0 || len(r.net.taken) != 0 {
		add("slots are left: open %v, taken %v", r.net.open, r.net.taken)
	}
	r.net.mu.Unlock()
	if n := r.open.Load(); n != 0 {
		add("%d guest connections are left", n)
	}
	if files, _ := filepath.Glob(filepath.Join(r.dir, "run", "*")); len(files) != 0 {
		add("run directories are left: %v", files)
	}
	if files, _ := filepath.Glob(filepath.Join(r.dir, "state", "sandboxes", "*", "overlay*")); len(files) != 0 {
		add("disks are left: %v", files)
	}
	for _, half := range []string{"state/sandboxes/.fork-*", "templates/snapshots/.*"} {
		if files, _ := filepath.Glob(filepath.Join(r.dir, half)); len(files) != 0 {
			add("half-made things are left: %v", files)
		}
	}
	if taken := r.taken(); taken != (Resources{}) {
		add("capacity is left reserved: %+v", taken)
	}
	return left
}

// taken is what all sandboxes together take.
func (r *rig) taken() Resources {
	total, _ := r.ledger.stats()
	return total
}

func (r *rig) wantState(id ID, want State) Info {
	r.t.Helper()
	info, err := r.Get(id)
	if err != nil {
		r.t.Fatalf("get: %v", err)
	}
	if info.State != want {
		r.t.Errorf("state is %s (%s %s), want %s", info.State, info.Reason, info.Detail, want)
	}
	return info
}

// eventually waits for what a goroutine brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func wantClass(t *testing.T, err error, want *errdefs.Class) {
	t.Helper()
	if got := errdefs.ClassOf(err); got != want {
		t.Errorf("error is %v (class %v), want class %v", err, got, want)
	}
}

func TestStateTable(t *testing.T) {
	legal := map[[2]State]bool{
		{Unknown, Stopping}: true,
		{Waiting, Running}:  true,
		{Creating, Running}: true, {Creating, Stopping}: true,
		{Running, Paused}: true, {Running, Hibernated}: true, {Running, Stopping}: true,
		{Paused, Running}: true, {Paused, Hibernated}: true, {Paused, Stopping}: true,
		{Hibernated, Running}: true, {Hibernated, Stopping}: true,
		{Stopping, Stopped}: true,
	}
	for _, from := range States() {
		for _, to := range States() {
			t.Run(fmt.Sprintf("%s to %s", from, to), func(t *testing.T) {
				r := newRig(t)
				id := r.create()
				b, _ := r.find(id)
				b.hold(t.Context(), "tested")
				b.mu.Lock()
				b.mu.rec.State = from
				b.mu.Unlock()
				err := r.move(b, to, nil)
				if got := err == nil; got != legal[[2]State{from, to}] {
					t.Errorf("move: %v", err)
				}
				if want := map[bool]State{true: to, false: from}[err == nil]; b.state() != want {
					t.Errorf("state is %s, want %s", b.state(), want)
				}
				b.mu.Lock()
				b.mu.rec.State = Running
				b.mu.Unlock()
				b.unhold()
			})
		}
	}
}

func TestOperationsByState(t *testing.T) {
	may := map[State][]Operation{
		Waiting:    nil,
		Creating:   {OpDestroy},
		Running:    {OpPause, OpHibernate, OpFork, OpSnapshot, OpCall, OpTimeout, OpDeadline, OpRecover, OpDestroy},
		Paused:     {OpResume, OpHibernate, OpFork, OpSnapshot, OpTimeout, OpDeadline, OpRecover, OpDestroy},
		Hibernated: {OpResume, OpTimeout, OpDeadline, OpRecover, OpDestroy},
		Unknown:    {OpRecover, OpDestroy},
		Stopping:   {OpDestroy},
		Stopped:    {OpDestroy},
	}
	for _, state := range States() {
		for _, op := range []Operation{
			OpPause, OpHibernate, OpFork, OpSnapshot, OpResume, OpCall, OpTimeout, OpDeadline, OpRecover, OpDestroy,
		} {
			err := check("sb-0", op, state)
			if got := err == nil; got != slices.Contains(may[state], op) {
				t.Errorf("%s of a %s sandbox: %v", op, state, err)
			}
			if err != nil {
				wantClass(t, err, errdefs.WrongState)
				if !strings.Contains(err.Error(), string(state)) {
					t.Errorf("%q does not name the state %s", err, state)
				}
			}
		}
	}
}

func TestLifeOfASandbox(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	id := r.create()
	info := r.wantState(id, Running)
	if info.Template != "minimal" || info.VCPUs != 1 || info.MemMiB != 512 || info.HostIP != addr("10.11.0.1") || !info.ExpiresAt.IsZero() {
		t.Errorf("defaults are not those of the contract: %+v", info)
	}
	if res, err := r.Exec(ctx, id, Command{Cmd: "x"}); err != nil || string(res.Stdout) != "x" {
		t.Errorf("exec: %v, %v", res, err)
	}
	if err := r.Resume(ctx, id); true {
		wantClass(t, err, errdefs.WrongState)
	}
	if err := r.Pause(ctx, id); err != nil {
		t.Fatalf("pause: %v", err)
	}
	r.wantState(id, Paused)
	if !r.host.Paused(string(id)) {
		t.Error("the VM is not paused")
	}
	if err := r.Pause(ctx, id); true {
		wantClass(t, err, errdefs.WrongState)
	}
	if _, err := r.Exec(ctx, id, Command{Cmd: "x"}); true {
		wantClass(t, err, errdefs.WrongState)
	}
	if err := r.Resume(ctx, id); err != nil {
		t.Fatalf("resume: %v", err)
	}
	r.wantState(id, Running)
	if err := r.Destroy(ctx, id); err != nil {
		t.Fatalf("destroy: %v", err)
	}
	if _, err := r.Get(id); true {
		wantClass(t, err, errdefs.NotFound)
	}
	if err := r.Destroy(ctx, id); true {
		wantClass(t, err, errdefs.NotFound)
	}
	r.wantNothing()
}

func TestRecordIsOnDiskBeforeGetShowsIt(t *testing.T) {
	r := newRig(t)
	r.tmpl.on("overlay", func(context.Context) error {
		infos := r.List(true)
		if len(infos) != 1 || infos[0].State != Creating {
			t.Errorf("list shows %+v during a create", infos)
		}
		rec, err := r.store.load(infos[0].ID)
		if err != nil || rec.State != Creating || rec.Slot == 0 {
			t.Errorf("record during a create: %+v, %v", rec, err)
		}
		return nil
	})
	id := r.create()
	if rec, err := (store{dir: r.store.dir}).load(id); err != nil || rec.State != Running || rec.VM == nil || rec.Token == "" {
		t.Errorf("record after a create: %+v, %v", rec, err)
	}
}

// createSteps are the calls below the manager that a create makes.
var createSteps = []string{"network.acquire", "overlay", "network.open", "start", "guest.ready", "guest.init"}

func TestCreateFailsAtEachStep(t *testing.T) {
	boom := errors.New("boom")
	for _, step := range createSteps {
		t.Run(step, func(t *testing.T) {
			r := newRig(t)
			r.faults.on(step, func(context.Context) error { return boom })
			if _, err := r.Create(t.Context(), CreateRequest{}); !errors.Is(err, boom) {
				t.Errorf("create: %v, want boom", err)
			}
			r.wantNothing()
			for _, info := range r.List(true) {
				if info.State != Stopped || info.Reason != CreateFailed || !strings.Contains(info.Detail, "boom") {
					t.Errorf("left on the list: %+v", info)
				}
			}
		})
	}
}

func TestCreateCancelledAtEachStep(t *testing.T) {
	for _, step := range createSteps {
		t.Run(step, func(t *testing.T) {
			r := newRig(t)
			ctx, cancel := context.WithCancel(t.Context())
			r.faults.on(step, func(ctx context.Context) error { cancel(); return hang(ctx) })
			start := time.Now()
			_, err := r.Create(ctx, CreateRequest{})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("create: %v, want cancelled", err)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("cancelling took %s", took)
			}
			r.wantNothing()
		})
	}
}

func TestDestroyDuringCreateAtEachStep(t *testing.T) {
	for _, step := range createSteps[1:] { // before, there is nothing to destroy
		t.Run(step, func(t *testing.T) {
			r := newRig(t)
			r.faults.on(step, hang)
			created := make(chan error, 1)
			go func() {
				_, err := r.Create(t.Context(), CreateRequest{})
				created <- err
			}()
			eventually(t, "the create shows", func() bool { return len(r.List(false)) == 1 })
			id := r.List(false)[0].ID
			if err := r.Destroy(t.Context(), id); err != nil {
				t.Errorf("destroy: %v", err)
			}
			wantClass(t, <-created, errdefs.Busy)
			if _, err := r.Get(id); true {
				wantClass(t, err, errdefs.NotFound)
			}
			r.wantNothing()
		})
	}
}

func TestManyDestroysFreeOnce(t *testing.T) {
	r := newRig(t)
	id := r.create()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := r.Destroy(t.Context(), id); err != nil && !errors.Is(err, errdefs.NotFound) {
				t.Errorf("destroy: %v", err)
			}
			if live := r.host.Live(); len(live) != 0 {
				t.Errorf("destroy returned while the VM lives: %v", live)
			}
		})
	}
	wg.Wait()
	if n := r.driver.Calls(vmmtest.OpKill); n != 1 {
		t.Errorf("the VM was killed %d times", n)
	}
	if n := r.net.count("network.close"); n != 1 {
		t.Errorf("the network was closed %d times", n)
	}
	r.wantNothing()
}

func TestGetAndListDoNotWaitForAStuckCreate(t *testing.T) {
	r := newRig(t)
	ready := r.create()
	r.faults.on("guest.ready", hang)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Create(ctx, CreateRequest{}) }()
	eventually(t, "the create shows", func() bool { return len(r.List(false)) == 2 })
	for range 100 {
		if n := len(r.List(true)); n != 2 {
			t.Fatalf("%d on the list", n)
		}
		if _, err := r.Get(ready); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	<-done
}

func TestFailedPauseLeavesItRunning(t *testing.T) {
	for name, fault := range map[string]vmmtest.Fault{
		"refused":     {Err: errors.New("boom")},
		"answer lost": {Err: errors.New("boom"), After: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			r.driver.Inject(vmmtest.OpPause, 1, fault)
			if err := r.Pause(t.Context(), id); err == nil {
				t.Error("pause succeeded")
			}
			r.wantState(id, Running)
			if r.host.Paused(string(id)) {
				t.Error("the VM is paused")
			}
			if _, err := r.Exec(t.Context(), id, Command{Cmd: "x"}); err != nil {
				t.Errorf("exec: %v", err)
			}
		})
	}
}

func TestFailedResumeLeavesItPaused(t *testing.T) {
	r := newRig(t)
	id := r.create()
	if err := r.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	r.faults.on("guest.init", func(context.Context) error { return errors.New("boom") })
	if err := r.Resume(t.Context(), id); err == nil {
		t.Error("resume succeeded")
	}
	r.wantState(id, Paused)
	if !r.host.Paused(string(id)) {
		t.Error("the VM runs")
	}
	r.faults.on("guest.init", nil)
	if err := r.Resume(t.Context(), id); err != nil {
		t.Errorf("second resume: %v", err)
	}
}

// A VM that answers neither the operation nor the way back is kept, told, and
// brought to what its record says when it answers again.
func TestVMThatDoesNotComeBackIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		r.driver.Inject(vmmtest.OpPause, 1, vmmtest.Fault{Err: errors.New("boom"), After: true})
		r.driver.Inject(vmmtest.OpResume, 1, vmmtest.Fault{Err: errors.New("bang")})
		if err := r.Pause(t.Context(), id); err == nil {
			t.Error("pause succeeded")
		}
		info := r.wantState(id, Running)
		if info.Reason != Unreachable || !strings.Contains(info.Detail, "bang") {
			t.Errorf("reason %s, %s", info.Reason, info.Detail)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if info := r.wantState(id, Running); info.Reason != "" || r.host.Paused(string(id)) {
			t.Errorf("reason %s, %s; its VM is paused: %v", info.Reason, info.Detail, r.host.Paused(string(id)))
		}
		r.wantConsistent()
		if got := r.history(2); !slices.Equal(got, []string{"3 running running unreachable", "4 running running "}) {
			t.Errorf("events are %q", got)
		}
	})
}

func TestDestroyInterruptsAHungPause(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.driver.Inject(vmmtest.OpPause, 1, vmmtest.Fault{Hang: true})
	paused := make(chan error, 1)
	go func() { paused <- r.Pause(context.Background(), id) }()
	eventually(t, "pause hangs", func() bool { return r.driver.Hanging() == 1 })
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Errorf("destroy: %v", err)
	}
	wantClass(t, <-paused, errdefs.Busy)
	r.wantNothing()
}

func TestWaiterLearnsWhatIsGoingOn(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.driver.Inject(vmmtest.OpPause, 1, vmmtest.Fault{Hang: true})
	paused := make(chan error, 1)
	go func() { paused <- r.Pause(context.Background(), id) }()
	eventually(t, "pause hangs", func() bool { return r.driver.Hanging() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := r.Exec(ctx, id, Command{Cmd: "x"})
	wantClass(t, err, errdefs.Busy)
	if err == nil || !strings.Contains(err.Error(), "being paused") {
		t.Errorf("%v does not say what is going on", err)
	}
	r.driver.Release()
	if err := <-paused; err != nil {
		t.Errorf("pause: %v", err)
	}
}

func TestVMDeath(t *testing.T) {
	r := newRig(t)
	r.exec = func(ctx context.Context, _ guest.Command) (guest.Result, error) { return guest.Result{}, hang(ctx) }
	id := r.create()
	result := make(chan error, 1)
	go func() {
		_, err := r.Exec(context.Background(), id, Command{Cmd: "sleep"})
		result <- err
	}()
	eventually(t, "exec runs", func() bool { return r.faults.count("guest.exec") == 1 })
	if err := os.WriteFile(r.store.console(id), []byte("hello\nKernel panic - not syncing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.host.Die(string(id))
	wantClass(t, <-result, errdefs.Unavailable)
	eventually(t, "it is stopped", func() bool { info, _ := r.Get(id); return info.State == Stopped })
	info := r.wantState(id, Stopped)
	if info.Reason != VMExited || !strings.Contains(info.Detail, "Kernel panic") {
		t.Errorf("reason %s, detail %q", info.Reason, info.Detail)
	}
	if len(r.List(false)) != 0 || len(r.List(true)) != 1 {
		t.Error("a stopped sandbox is listed only on demand")
	}
	r.wantNothing()
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Errorf("destroy of a stopped sandbox: %v", err)
	}
	if len(r.List(true)) != 0 {
		t.Error("still remembered after destroy")
	}
}

func TestVMDeathWhileBooting(t *testing.T) {
	r := newRig(t)
	r.faults.on("guest.ready", func(ctx context.Context) error {
		r.host.Die(r.host.Live()[0])
		return hang(ctx)
	})
	start := time.Now()
	_, err := r.Create(t.Context(), CreateRequest{})
	wantClass(t, err, errdefs.Unavailable)
	if took := time.Since(start); took > time.Second {
		t.Errorf("the create took %s to notice", took)
	}
	r.wantNothing()
}

func TestWhatCannotBeFreedIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		r.net.on("network.close", func(context.Context) error { return errors.New("device busy") })
		wantClass(t, r.Destroy(t.Context(), id), errdefs.Unavailable)
		r.wantState(id, Stopping)
		if other := r.create(); r.wantState(other, Running).HostIP == addr("10.11.0.1") {
			t.Error("the slot was given away before it was free")
		} else {
			defer r.Destroy(context.Background(), other)
		}
		time.Sleep(3 * time.Second)
		r.wantState(id, Stopping)
		r.net.on("network.close", nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if _, err := r.Get(id); true {
			wantClass(t, err, errdefs.NotFound)
		}
	})
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.exec = func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			time.Sleep(cmd.Timeout)
			return guest.Result{}, nil
		}
		create := func(timeout time.Duration) ID {
			info, err := r.Create(t.Context(), CreateRequest{Timeout: timeout})
			if err != nil {
				t.Fatal(err)
			}
			return info.ID
		}
		idle, busy, paused, forever := create(10*time.Second), create(10*time.Second), create(10*time.Second), create(0)
		if err := r.Pause(t.Context(), paused); err != nil {
			t.Fatal(err)
		}
		go r.Exec(context.Background(), busy, Command{Cmd: "sleep", Timeout: time.Minute})

		time.Sleep(9 * time.Second)
		r.wantState(idle, Running)
		time.Sleep(3 * time.Second)
		if info := r.wantState(idle, Stopped); info.Reason != Expired {
			t.Errorf("reason %s", info.Reason)
		}
		time.Sleep(50 * time.Second) // the exec has ended 2 s ago
		r.wantState(busy, Running)
		time.Sleep(7 * time.Second)
		r.wantState(busy, Running)
		time.Sleep(3 * time.Second)
		r.wantState(busy, Stopped)
		r.wantState(paused, Paused)
		r.wantState(forever, Running)

		time.Sleep(2 * time.Hour)
		if n := len(r.List(true)); n != 2 {
			t.Errorf("%d remembered after the time to forget", n)
		}
	})
}

func TestAStuckVMDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var ids []ID
		for range 5 {
			info, err := r.Create(t.Context(), CreateRequest{Timeout: 10 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, info.ID)
		}
		r.driver.Inject(vmmtest.OpKill, 1, vmmtest.Fault{Hang: true})
		time.Sleep(12 * time.Second)
		synctest.Wait()
		left := 0
		for _, id := range ids {
			if info, _ := r.Get(id); info.State != Stopped {
				left++
			}
		}
		if left != 1 {
			t.Errorf("%d of 5 are left besides the stuck one", left-1)
		}
		r.driver.Release()
		synctest.Wait()
	})
}

func TestAdmission(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"sandboxes": {func(c *Config) { c.Capacity.Sandboxes = 2 }, "2 of 2"},
		"vcpus":     {func(c *Config) { c.Capacity.VCPUs = 2 }, "0 of 2 free"},
		"memory":    {func(c *Config) { c.Capacity.MemMiB = 2*(512+vmmOverheadMiB(512)) + 100 }, "100 of"},
		"disk":      {func(c *Config) { c.Capacity.DiskMiB = 2*64 + 10 }, "10 of 138"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.change)
			first := r.create()
			r.create()
			_, err := r.Create(t.Context(), CreateRequest{})
			wantClass(t, err, errdefs.Exhausted)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			}
			if err := r.Destroy(t.Context(), first); err != nil {
				t.Fatal(err)
			}
			r.create()
		})
	}
	t.Run("slots", func(t *testing.T) {
		r := newRig(t)
		r.net.limit = 1
		r.create()
		_, err := r.Create(t.Context(), CreateRequest{})
		wantClass(t, err, errdefs.Exhausted)
		if n := len(r.List(true)); n != 1 {
			t.Errorf("%d on the list", n)
		}
	})
}

func TestStartsWaitTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) {
			c.Capacity.Starts, c.Capacity.StartQueue = 1, 5*time.Second
			c.Drivers = []vmm.Driver{struct{ vmm.Driver }{c.Drivers[0]}} // which cannot restore
		})
		ctx, cancel := context.WithCancel(t.Context())
		r.faults.on("guest.ready", hang)
		done := make(chan struct{})
		go func() { defer close(done); r.Create(ctx, CreateRequest{}) }()
		synctest.Wait()
		_, err := r.Create(t.Context(), CreateRequest{})
		wantClass(t, err, errdefs.Exhausted)
		cancel()
		<-done
		r.wantNothing()
	})
}

func TestBadRequests(t *testing.T) {
	r := newRig(t)
	for name, req := range map[string]CreateRequest{
		"negative vcpus":   {VCPUs: -1},
		"huge vcpus":       {VCPUs: 1<<31 - 1},
		"negative memory":  {MemMiB: -512},
		"tiny memory":      {MemMiB: 1},
		"huge memory":      {MemMiB: 1<<31 - 1},
		"negative timeout": {Timeout: -time.Second},
		"huge timeout":     {Timeout: (1<<31 - 1) * time.Second},
	} {
		_, err := r.Create(t.Context(), req)
		if errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := r.Create(t.Context(), CreateRequest{Template: "nope"})
	wantClass(t, err, errdefs.NotFound)
	if n := len(r.List(true)); n != 0 {
		t.Errorf("%d on the list", n)
	}
	r.wantNothing()
	for _, id := range []string{"", "sb-", "sb-XYZ", "../../etc", "sb-0123456789abcdef/..", "sb-0123456789abcde\x00", strings.Repeat("sb-", 100)} {
		if _, err := ParseID(id); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func TestListIsSorted(t *testing.T) {
	r := newRig(t)
	var want []ID
	for range 20 {
		want = append(want, r.create())
	}
	var got []ID
	for _, info := range r.List(false) {
		got = append(got, info.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("list is %v, want %v", got, want)
	}
}

func TestShutdown(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.faults.on("guest.ready", hang)
	r.faults.on("guest.init", hang) // the first call to one that is restored
	created := make(chan error, 1)
	go func() {
		_, err := r.Create(context.Background(), CreateRequest{})
		created <- err
	}()
	eventually(t, "the create shows", func() bool { return len(r.List(false)) == 2 })
	for range 2 {
		if err := r.Shutdown(t.Context(), false); err != nil {
			t.Errorf("shutdown: %v", err)
		}
	}
	wantClass(t, <-created, errdefs.Unavailable)
	_, err := r.Create(t.Context(), CreateRequest{})
	wantClass(t, err, errdefs.Unavailable)
	if live := r.host.Live(); !slices.Equal(live, []string{string(id)}) {
		t.Errorf("left running: %v, want %v", live, id)
	}
}

func TestShutdownThatDestroys(t *testing.T) {
	r := newRig(t)
	for range 10 {
		r.create()
	}
	if err := r.Shutdown(t.Context(), true); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	r.wantNothing()
}

func TestShutdownMeetsItsDeadlineWithAHungVM(t *testing.T) {
	r := newRig(t)
	r.create()
	r.driver.Inject(vmmtest.OpKill, 1, vmmtest.Fault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := r.Shutdown(ctx, true); err == nil {
		t.Error("shutdown claims success")
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("shutdown took %s", took)
	}
	r.driver.Release()
}

func TestRestartAdopts(t *testing.T) {
	r := newRig(t)
	running, paused, dead := r.create(), r.create(), r.create()
	if err := r.Pause(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	before := r.wantState(running, Running)
	r.die()
	r.host.Die(string(dead))
	r.start()

	after := r.wantState(running, Running)
	if after.HostIP != before.HostIP || !after.CreatedAt.Equal(before.CreatedAt) || !after.LastActiveAt.Equal(before.LastActiveAt) {
		t.Errorf("after the restart %+v, before %+v", after, before)
	}
	if _, err := r.Exec(t.Context(), running, Command{Cmd: "x"}); err != nil {
		t.Errorf("exec: %v", err)
	}
	r.wantState(paused, Paused)
	if err := r.Resume(t.Context(), paused); err != nil {
		t.Errorf("resume: %v", err)
	}
	if info := r.wantState(dead, Stopped); info.Reason != Lost {
		t.Errorf("reason %s", info.Reason)
	}
	if len(r.found.Adopted) != 2 || len(r.found.Lost) != 1 {
		t.Errorf("found %s", r.found)
	}
	for _, id := range []ID{running, paused} {
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Errorf("destroy: %v", err)
		}
	}
	r.wantNothing()
}

func TestRestartFreesTheHalfMadeAndTheStray(t *testing.T) {
	r := newRig(t)
	stray, corrupt, half := r.create(), r.create(), r.create()
	r.die()
	if err := os.RemoveAll(r.store.path(stray)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.store.record(corrupt), []byte(`{"version": 1, "id": "sb-`), 0o600); err != nil {
		t.Fatal(err)
	}
	rec, err := (store{dir: r.store.dir}).load(half)
	if err != nil {
		t.Fatal(err)
	}
	rec.State, rec.VM = Creating, nil
	if err := (store{dir: r.store.dir}).save(rec); err != nil {
		t.Fatal(err)
	}
	r.start()
	if len(r.found.Freed) != 1 || len(r.found.Adopted) != 1 || len(r.found.Strays) != 2 {
		t.Errorf("found %s: %+v", r.found, r.found)
	}
	// The record before the damaged one does.
	r.wantState(corrupt, Running)
	if err := r.Destroy(t.Context(), corrupt); err != nil {
		t.Error(err)
	}
	r.wantNothing()
	if info := r.wantState(half, Stopped); info.Reason != CreateFailed {
		t.Errorf("reason %s", info.Reason)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	r := newRig(t)
	_, _, err := Open(t.Context(), r.config())
	wantClass(t, err, errdefs.Busy)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("%v does not name the holder", err)
	}
}

func TestDeadlineSurvivesTheAgent(t *testing.T) {
	r := newRig(t)
	info, err := r.Create(t.Context(), CreateRequest{Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	if _, err := r.Exec(t.Context(), info.ID, Command{Cmd: "x"}); err != nil {
		t.Fatal(err)
	}
	before := r.wantState(info.ID, Running)
	if !before.ExpiresAt.After(info.ExpiresAt) {
		t.Error("an exec does not move the deadline")
	}
	r.die()
	r.start()
	if after := r.wantState(info.ID, Running); !after.ExpiresAt.Equal(before.ExpiresAt) {
		t.Errorf("the deadline was %s and is %s", before.ExpiresAt, after.ExpiresAt)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"sb-0123456789abcdef","state":"running","slot":1}`))
	f.Add([]byte(`{"version":1,"id":"../..","state":"running","slot":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			return
		}
		if _, err := ParseID(string(r.ID)); err != nil {
			t.Errorf("a record with the id %q was believed", r.ID)
		}
		if r.Slot < 0 || r.Slot > network.MaxSlot || !slices.Contains(States(), r.State) {
			t.Errorf("believed: %+v", r)
		}
	})
}

func FuzzParseID(f *testing.F) {
	f.Add("sb-0123456789abcdef")
	f.Add("sb-../../0123456789")
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ParseID(s); err == nil && filepath.Base(string(id)) != s {
			t.Errorf("%q is no plain name", s)
		}
	})
}

// An ID as clients write it is the same ID in every spelling, and nothing else is
// one.
func TestParseLooseID(t *testing.T) {
	const id = ID("sb-0123456789abcdef")
	for text, want := range map[string]ID{
		"sb-0123456789abcdef": id, "sb0123456789abcdef": id, "sb0123456789abcdef-x": id, "sb-0123456789abcdef-wrenn": id,
		"sb0123456789abcdef-": id, "SB0123456789abcdef": "", "sb0123456789abcde": "", "sb--0123456789abcdef": "",
		"sb0123456789abcdef-a/b": "", "sb0123456789abcdef x": "", "": "", "x-sb0123456789abcdef": "", "sb0123456789abcdef\n": "",
	} {
		got, ok := ParseLooseID(text)
		if got != want || ok != (want != "") {
			t.Errorf("%q is %q, %v", text, got, ok)
		}
		if ok && got.Short() != "sb0123456789abcdef" {
			t.Errorf("%q is written %q", got, got.Short())
		}
	}
}

func FuzzParseLooseID(f *testing.F) {
	f.Add("sb0123456789abcdef-wrenn")
	f.Add("sb-../../0123456789")
	f.Fuzz(func(t *testing.T, s string) {
		id, ok := ParseLooseID(s)
		if !ok {
			return
		}
		if _, err := ParseID(string(id)); err != nil {
			t.Errorf("%q is %q: %v", s, id, err)
		}
		if again, ok := ParseLooseID(id.Short()); again != id || !ok {
			t.Errorf("%q is %q, written %q that is %q", s, id, id.Short(), again)
		}
	})
}

// TestDestroyWritesOnce: what is destroyed is written as stopping, and then removed. Its
// address slot is another's only after that.
func TestDestroyWritesOnce(t *testing.T) {
	r := newRig(t)
	id := r.create()
	before := len(r.faults.order)
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, step := range r.faults.order[before:] {
		if strings.HasPrefix(step, "record save") || step == "record forget" {
			seen = append(seen, step)
		}
	}
	if want := []string{"record save stopping", "record saved stopping", "record forget"}; !slices.Equal(seen, want) {
		t.Errorf("steps %v", seen)
	}
	// What cannot be removed keeps its slot, and is tried again.
	id = r.create()
	slot := r.lookup(id).record().Slot
	r.faults.on("record forget", func(context.Context) error { return errFault })
	wantClass(t, r.Destroy(t.Context(), id), errdefs.Unavailable)
	if r.wantState(id, Stopping); !r.net.taken[slot] {
		t.Error("its slot is free")
	}
	r.faults.on("record forget", nil)
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	r.wantNothing()
}
