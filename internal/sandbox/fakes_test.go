package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// faults makes calls of the fakes misbehave, by the call's name. All fakes of
// one agent share it.
type faults struct {
	mu    sync.Mutex
	hooks map[string]func(context.Context) error
	calls map[string]int
	order []string
	// dead: the agent was killed; no call of it comes back before grave closes.
	dead  bool
	grave chan struct{}
}

func newFaults() *faults {
	return &faults{hooks: map[string]func(context.Context) error{}, calls: map[string]int{}, grave: make(chan struct{})}
}

// on sets what a call does before its work; with " done" behind its name,
// after it.
func (f *faults) on(call string, hook func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hooks[call] = hook
}

// do is a call: hook, effect, hook.
func (f *faults) do(ctx context.Context, call string, effect func() error) error {
	if err := f.called(ctx, call); err != nil {
		return err
	}
	if err := effect(); err != nil {
		return err
	}
	return f.called(ctx, call+" done")
}

func (f *faults) called(ctx context.Context, call string) error {
	f.mu.Lock()
	dead := f.dead
	f.calls[call]++
	f.order = append(f.order, call)
	hook := f.hooks[call]
	f.mu.Unlock()
	if dead {
		f.rest()
	}
	if hook != nil {
		return hook(ctx)
	}
	return nil
}

// die is kill -9 from within: nothing of this agent acts any more.
func (f *faults) die() {
	f.mu.Lock()
	f.dead = true
	f.mu.Unlock()
}

func (f *faults) rest() {
	<-f.grave
	runtime.Goexit()
}

func (f *faults) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

// hookedDriver is a driver whose calls go through faults.
type hookedDriver struct {
	vmm.Driver
	*faults
}

type hookedVM struct {
	vmm.VM
	*faults
}

func (d hookedDriver) Start(ctx context.Context, spec vmm.Spec) (vm vmm.VM, err error) {
	err = d.do(ctx, "start", func() error { vm, err = d.Driver.Start(ctx, spec); return err })
	if err != nil && vm != nil { // the boundary promises that nothing is left
		vm.Kill(context.Background())
	}
	return hookedVM{vm, d.faults}, err
}

func (d hookedDriver) Attach(ctx context.Context, h vmm.Handle) (vm vmm.VM, err error) {
	err = d.do(ctx, "attach", func() error { vm, err = d.Driver.Attach(ctx, h); return err })
	return hookedVM{vm, d.faults}, err
}

func (d hookedDriver) Restore(ctx context.Context, spec vmm.Spec, dir string) (vm vmm.VM, err error) {
	err = d.do(ctx, "restore", func() error { vm, err = d.Driver.(vmm.Restorer).Restore(ctx, spec, dir); return err })
	if err != nil && vm != nil { // the boundary promises that nothing is left
		vm.Kill(context.Background())
	}
	return hookedVM{vm, d.faults}, err
}

func (d hookedDriver) SnapshotKey(ctx context.Context, spec vmm.Spec) (string, error) {
	return d.Driver.(vmm.Restorer).SnapshotKey(ctx, spec)
}

func (v hookedVM) Snapshot(ctx context.Context, dir string) error {
	err := v.do(ctx, "snapshot", func() error { return v.VM.(vmm.Snapshotter).Snapshot(ctx, dir) })
	if err != nil { // the boundary promises that nothing is left
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() != "overlay.ext4" {
				os.Remove(filepath.Join(dir, e.Name()))
			}
		}
	}
	return err
}

func (v hookedVM) Pause(ctx context.Context) error {
	return v.do(ctx, "pause", func() error { return v.VM.Pause(ctx) })
}

func (v hookedVM) Resume(ctx context.Context) error {
	return v.do(ctx, "resume", func() error { return v.VM.Resume(ctx) })
}

func (v hookedVM) Stalled(ctx context.Context) (why, err error) {
	return v.VM.(vmm.Staller).Stalled(ctx)
}

func (v hookedVM) Kill(ctx context.Context) error {
	return v.do(ctx, "kill", func() error { return v.VM.Kill(ctx) })
}

// fakeNetwork keeps the book of slots as the real one does, and opens nothing.
type fakeNetwork struct {
	*faults
	mu    sync.Mutex
	taken map[network.Slot]bool
	open  map[network.Slot]bool
	// policies and limits are of open slots, broken of those that lack
	// something; what is true cannot be repaired.
	policies map[network.Slot]network.Policy
	limits   map[network.Slot]network.Limits
	broken   map[network.Slot]bool
	// fenced are strays that did not come off.
	fenced map[network.Slot]bool
	// strict lets no sandbox have settings of its own.
	strict bool
	limit  int
	// denied is what Denied returns of open slots.
	denied map[network.Slot][]network.Denial
}

func newFakeNetwork(f *faults) *fakeNetwork {
	return &fakeNetwork{
		faults: f, taken: map[network.Slot]bool{}, open: map[network.Slot]bool{}, limit: int(network.MaxSlot),
		policies: map[network.Slot]network.Policy{}, limits: map[network.Slot]network.Limits{}, broken: map[network.Slot]bool{},
		fenced: map[network.Slot]bool{},
	}
}

func (n *fakeNetwork) Plan() network.Plan              { return network.DefaultPlan() }
func (n *fakeNetwork) Setup(ctx context.Context) error { return n.called(ctx, "network.setup") }

func (n *fakeNetwork) Acquire(ctx context.Context, _ vmm.LinkKind) (network.Slot, error) {
	if err := n.called(ctx, "network.acquire"); err != nil {
		return 0, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := network.Slot(1); int(s) <= n.limit; s++ {
		if !n.taken[s] {
			n.taken[s] = true
			return s, nil
		}
	}
	return 0, errdefs.Exhausted.Errorf("all %d slots are in use", n.limit)
}

func (n *fakeNetwork) Claim(s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken[s] {
		return errdefs.AlreadyExists.Errorf("slot %d is taken", s)
	}
	n.taken[s] = true
	return nil
}

func (n *fakeNetwork) Release(s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case !n.taken[s]:
		return fmt.Errorf("slot %d released twice", s)
	case n.open[s]:
		return fmt.Errorf("slot %d released while open", s)
	}
	delete(n.taken, s)
	return nil
}

func (n *fakeNetwork) Open(ctx context.Context, s network.Slot) error {
	return n.do(ctx, "network.open", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.open[s] || !n.taken[s] {
			return fmt.Errorf("slot %d opened twice or untaken", s)
		}
		n.open[s] = true
		return nil
	})
}

func (n *fakeNetwork) Close(ctx context.Context, s network.Slot) error {
	return n.do(ctx, "network.close", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.open, s)
		delete(n.policies, s)
		delete(n.limits, s)
		delete(n.broken, s)
		return nil
	})
}

// ParsePolicy takes names for what they are, to be recognised again.
func (n *fakeNetwork) ParsePolicy(e network.Egress) (network.Policy, error) {
	if slices.Contains(append(slices.Clone(e.Allow), e.Deny...), "nonsense!") {
		return network.Policy{}, errdefs.InvalidArgument.Errorf("nonsense! is no range and no name")
	}
	if n.strict && len(e.Allow) > 0 {
		return network.Policy{}, errdefs.Denied.Errorf("this host allows nothing")
	}
	p := network.Policy{AllowNames: e.Allow, DenyNames: e.Deny, OwnDNS: e.DNS != nil && len(e.Allow) > 0}
	if e.AllowInternet != nil && !*e.AllowInternet {
		p.Mode = network.None
	}
	return p, nil
}

func (n *fakeNetwork) SetPolicy(ctx context.Context, s network.Slot, p network.Policy) error {
	return n.do(ctx, "network.policy", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if !n.open[s] {
			return errdefs.NotFound.Errorf("slot %d is not open", s)
		}
		n.policies[s] = p
		return nil
	})
}

func (n *fakeNetwork) SetLimits(ctx context.Context, s network.Slot, l network.Limits) error {
	return n.do(ctx, "network.limits", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if !n.open[s] {
			return errdefs.NotFound.Errorf("slot %d is not open", s)
		}
		n.limits[s] = l
		return nil
	})
}

func (n *fakeNetwork) CheckAll(ctx context.Context, slots []network.Slot) (network.Findings, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	found := network.Findings{Slots: map[network.Slot]error{}}
	for _, s := range slots {
		if _, ok := n.broken[s]; ok || !n.open[s] {
			found.Slots[s] = errors.New("something is missing")
		}
	}
	return found, nil
}

func (n *fakeNetwork) Repair(ctx context.Context, s network.Slot, p network.Policy, l network.Limits) error {
	return n.do(ctx, "network.repair", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.broken[s] {
			return errdefs.Unavailable.Errorf("the tap is gone")
		}
		delete(n.broken, s)
		n.policies[s], n.limits[s] = p, l
		return nil
	})
}

func (n *fakeNetwork) Denied(ctx context.Context, s network.Slot, _ network.Policy) ([]network.Denial, error) {
	if err := n.called(ctx, "network.denied"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.open[s] {
		return nil, errdefs.NotFound.Errorf("slot %d is not open", s)
	}
	return slices.Clone(n.denied[s]), nil
}

func (n *fakeNetwork) CountersAll(ctx context.Context) (map[network.Slot]network.Counters, error) {
	if err := n.called(ctx, "network.counters"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	all := map[network.Slot]network.Counters{}
	for s := range n.open {
		all[s] = network.Counters{InBytes: uint64(s)}
	}
	return all, nil
}

func (n *fakeNetwork) Strays(ctx context.Context) (strays []network.Slot, err error) {
	if err := n.called(ctx, "network.look"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := range n.open {
		if !n.taken[s] {
			strays = append(strays, s)
		}
	}
	return strays, nil
}

// RemoveStrays fences what does not come off.
func (n *fakeNetwork) RemoveStrays(ctx context.Context) (removed []network.Slot, err error) {
	if err := n.called(ctx, "network.strays"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	for s := range n.open {
		if !n.taken[s] {
			n.taken[s], n.fenced[s] = true, true
		}
	}
	strays := slices.Sorted(maps.Keys(n.fenced))
	n.mu.Unlock()
	for _, s := range strays {
		if cerr := n.Close(ctx, s); cerr != nil {
			err = errors.Join(err, cerr)
			continue
		}
		n.mu.Lock()
		delete(n.fenced, s)
		n.mu.Unlock()
		err = errors.Join(err, n.Release(s))
		removed = append(removed, s)
	}
	return removed, err
}

// restart is what the next agent finds: what is open, and an empty book.
func (n *fakeNetwork) restart(f *faults) *fakeNetwork {
	n.mu.Lock()
	defer n.mu.Unlock()
	next := newFakeNetwork(f)
	maps.Copy(next.open, n.open)
	maps.Copy(next.policies, n.policies)
	maps.Copy(next.limits, n.limits)
	maps.Copy(next.broken, n.broken)
	return next
}

// fakeTemplates has the template "minimal", disks of no size, and ready
// snapshots in a directory that outlives the agent. Named snapshots are in a real
// store.
type fakeTemplates struct {
	*faults
	dir    string
	making chan struct{}
	base   string       // digest of the base image
	start  atomic.Value // template.Program; the agent reads ahead while a test begins
	noFlat atomic.Bool  // there is no EROFS
	found  atomic.Int64 // ready snapshots, when somebody looked
	*template.Store
}

func newFakeTemplates(f *faults, dir string) *fakeTemplates {
	state := filepath.Join(filepath.Dir(dir), "templates")
	os.Remove(filepath.Join(state, "templates", "lock")) // the kernel drops that of the dead
	store, err := template.Open(state, slog.New(slog.DiscardHandler))
	if err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "init.erofs"), []byte("init"), 0o600); err != nil {
		panic(err)
	}
	return &fakeTemplates{faults: f, dir: dir, making: make(chan struct{}, 1), Store: store}
}

// minimal is the fake template, which is not in the store.
var minimal = template.Info{
	ID: template.HostID("minimal"), Names: []string{"minimal"},
	Builds: []template.Build{{ID: "00000000-0000-4000-8000-000000000000", Status: template.StatusReady, VCPUs: 1, MemMiB: 512}},
	Tags:   []template.Tag{{Name: template.DefaultTag, Build: "00000000-0000-4000-8000-000000000000"}},
}

func (t *fakeTemplates) List() ([]template.Info, error) {
	all, err := t.Store.List()
	return append(all, minimal), err
}

func (t *fakeTemplates) Resolve(project, text string) (template.Info, template.Build, error) {
	if info, b, err := template.Resolve([]template.Info{minimal}, project, text); err == nil {
		return info, b, nil
	}
	return t.Store.Resolve(project, text)
}

func (t *fakeTemplates) Root(info template.Info, b template.Build) (template.Template, error) {
	start, _ := t.start.Load().(template.Program)
	return template.Template{
		ID: info.ID, Build: b.ID, Name: info.Name(),
		Boot: template.Boot{
			Kernel: "/vmlinux", Initrd: "/initrd.img", InitImage: filepath.Join(filepath.Dir(t.dir), "init.erofs"), InitSHA256: "init",
		},
		EROFS:  t.flat(),
		Layers: []template.Layer{{Path: "/base.ext4", SHA256: t.base}}, RootSHA256: t.base, Start: start,
	}, nil
}

// flat is the one image of the template, whose digest follows the base image's.
func (t *fakeTemplates) flat() template.Layer {
	if t.noFlat.Load() {
		return template.Layer{}
	}
	return template.Layer{Path: "/root.erofs", SHA256: "flat " + t.base}
}

func (t *fakeTemplates) Get(name string) (template.Template, error) {
	info, b, err := t.Resolve("", name)
	if err != nil {
		return template.Template{}, err
	}
	return t.Root(info, b)
}

func (t *fakeTemplates) RootOf(name, _ string) (template.Template, error) { return t.Get(name) }

func (t *fakeTemplates) Has(id, build string) bool { return id == minimal.ID || t.Store.Has(id, build) }

func (t *fakeTemplates) StageSnapshot(ctx context.Context, n template.Naming) (template.SnapshotStage, error) {
	if err := t.called(ctx, "snapshot.stage"); err != nil {
		return template.SnapshotStage{}, err
	}
	if n.Name == "minimal" {
		return template.SnapshotStage{}, errdefs.AlreadyExists.Errorf("%q is the name of a template", n.Name)
	}
	stage, err := t.Store.StageSnapshot(ctx, n)
	add, publish := stage.AddOverlay, stage.Publish
	stage.AddOverlay = func(ctx context.Context, disk string) error {
		return t.do(ctx, "snapshot.overlay", func() error { return add(ctx, disk) })
	}
	stage.Publish = func(ctx context.Context, m template.Meta, b template.Build) (info template.Info, _ template.Build, err error) {
		shown := false
		err = t.do(ctx, "snapshot.publish", func() error {
			info, b, err = publish(ctx, m, b)
			shown = err == nil
			return err
		})
		if err != nil && shown { // the store promises that it is there or not
			err = errors.Join(err, t.Store.Delete(context.WithoutCancel(ctx), info.ID, "", nil))
		}
		return info, b, err
	}
	return stage, err
}

func (t *fakeTemplates) Snapshot(ctx context.Context, id, build string) (s template.Snapshot, err error) {
	err = t.do(ctx, "snapshot.read", func() error { s, err = t.Store.Snapshot(ctx, id, build); return err })
	return s, err
}

func (t *fakeTemplates) Ready(_ context.Context, _, _, key string) (template.Ready, error) {
	dir := filepath.Join(t.dir, key)
	if _, err := os.Stat(dir); err != nil {
		return template.Ready{}, errdefs.NotFound.Errorf("no ready snapshot")
	}
	t.found.Add(1)
	token, _ := os.ReadFile(filepath.Join(dir, "token"))
	return template.Ready{Dir: dir, Overlay: filepath.Join(dir, "overlay.ext4"), BootToken: string(token)}, nil
}

func (t *fakeTemplates) DropReady(_, _, key string) error {
	return os.RemoveAll(filepath.Join(t.dir, key))
}

func (t *fakeTemplates) StageReady(ctx context.Context, _, _ string) (template.Stage, error) {
	select {
	case t.making <- struct{}{}:
	case <-ctx.Done():
		return template.Stage{}, context.Cause(ctx)
	}
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return template.Stage{}, err
	}
	tmp, err := os.MkdirTemp(t.dir, ".ready-")
	stage := template.Stage{Parts: template.Parts{
		Dir: tmp,
		AddOverlay: func(ctx context.Context, disk string) error {
			return t.do(ctx, "ready.overlay", func() error { return os.Link(disk, filepath.Join(tmp, "overlay.ext4")) })
		},
		Discard: func() {
			os.RemoveAll(tmp)
			<-t.making
		},
	}}
	stage.Publish = func(ctx context.Context, m template.Meta) error {
		if m.BootToken != "" {
			if err := os.WriteFile(filepath.Join(tmp, "token"), []byte(m.BootToken), 0o600); err != nil {
				return err
			}
		}
		return t.do(ctx, "ready.publish", func() error { return os.Rename(tmp, filepath.Join(t.dir, m.Key)) })
	}
	return stage, err
}

func (t *fakeTemplates) CloneOverlay(ctx context.Context, path, from string) error {
	err := t.do(ctx, "overlay clone", func() error { return os.Link(from, path) })
	if err != nil {
		os.Remove(path)
	}
	return err
}

func (t *fakeTemplates) NewOverlay(ctx context.Context, path string, _ int) error {
	err := t.do(ctx, "overlay", func() error { return os.WriteFile(path, nil, 0o600) })
	if err != nil { // the store promises that no half a disk is left
		os.Remove(path)
	}
	return err
}

func (t *fakeTemplates) NewDisk(ctx context.Context, path string, mib int) error {
	err := t.do(ctx, "overlay", func() error { return os.WriteFile(path, nil, 0o600) })
	if err != nil {
		os.Remove(path)
	}
	return err
}

// fakeGuest answers at once.
type fakeGuest struct {
	*faults
	open *atomic.Int64
	exec func(context.Context, guest.Command) (guest.Result, error)
	told func(guest.Init) (version string)
	// metrics is nil for a guest that has none.
	metrics func(context.Context) (guestapi.Metrics, error)
}

func (g fakeGuest) WaitReady(ctx context.Context) error { return g.called(ctx, "guest.ready") }
func (g fakeGuest) Init(ctx context.Context, i guest.Init) (version string, err error) {
	if i.AccessToken == "" {
		return "", errors.New("no token")
	}
	return g.told(i), g.called(ctx, "guest.init")
}
func (g fakeGuest) Quiesce(ctx context.Context, _ bool) error { return g.called(ctx, "guest.quiesce") }
func (g fakeGuest) Freeze(ctx context.Context) (time.Time, error) {
	return time.Now(), g.called(ctx, "guest.freeze")
}
func (g fakeGuest) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.dead { // the dead have closed all
		g.open.Add(-1)
	}
}
func (g fakeGuest) Metrics(ctx context.Context) (guestapi.Metrics, error) {
	if g.metrics == nil {
		return guestapi.Metrics{}, errdefs.Unavailable.Errorf("no metrics")
	}
	return g.metrics(ctx)
}
func (g fakeGuest) Exec(ctx context.Context, cmd guest.Command) (guest.Result, error) {
	if err := g.called(ctx, "guest.exec"); err != nil {
		return guest.Result{}, err
	}
	if g.exec != nil {
		return g.exec(ctx, cmd)
	}
	return guest.Result{Stdout: []byte(cmd.Cmd)}, nil
}

func (g fakeGuest) Start(ctx context.Context, cmd guest.Command, _ string) (<-chan guest.Ended, error) {
	if err := g.called(ctx, "guest.start"); err != nil {
		return nil, err
	}
	ended := make(chan guest.Ended, 1)
	if g.exec == nil {
		context.AfterFunc(ctx, func() { close(ended) })
		return ended, nil
	}
	go func() {
		defer close(ended)
		result, err := g.exec(ctx, cmd)
		if ctx.Err() == nil {
			ended <- guest.Ended{Result: result, Err: err}
		}
	}()
	return ended, nil
}
func (g fakeGuest) Unpack(ctx context.Context, _, _ string, stream io.Reader) error {
	_, err := io.Copy(io.Discard, stream)
	return errors.Join(err, g.called(ctx, "guest.unpack"))
}
func (g fakeGuest) Pack(ctx context.Context, path string, w io.Writer) error {
	_, err := io.WriteString(w, path)
	return errors.Join(err, g.called(ctx, "guest.pack"))
}

// hang blocks until the context ends.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
