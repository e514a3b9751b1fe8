package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// faults makes the next calls of a fake fail or hang, by the call's name.
type faults struct {
	mu    sync.Mutex
	hooks map[string]func(context.Context) error
	calls map[string]int
}

// on sets what a call does before its work.
func (f *faults) on(call string, hook func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hooks == nil {
		f.hooks = map[string]func(context.Context) error{}
	}
	f.hooks[call] = hook
}

func (f *faults) called(ctx context.Context, call string) error {
	f.mu.Lock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[call]++
	hook := f.hooks[call]
	f.mu.Unlock()
	if hook != nil {
		return hook(ctx)
	}
	return nil
}

func (f *faults) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

// fakeNetwork keeps the book of slots as the real one does, and opens nothing.
type fakeNetwork struct {
	faults
	mu    sync.Mutex
	taken map[network.Slot]bool
	open  map[network.Slot]bool
	limit int
}

func newFakeNetwork() *fakeNetwork {
	return &fakeNetwork{taken: map[network.Slot]bool{}, open: map[network.Slot]bool{}, limit: int(network.MaxSlot)}
}

func (n *fakeNetwork) Plan() network.Plan              { return network.DefaultPlan() }
func (n *fakeNetwork) Setup(ctx context.Context) error { return n.called(ctx, "network.setup") }

func (n *fakeNetwork) Acquire(ctx context.Context) (network.Slot, error) {
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
	if err := n.called(ctx, "network.open"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[s] || !n.taken[s] {
		return fmt.Errorf("slot %d opened twice or untaken", s)
	}
	n.open[s] = true
	return nil
}

func (n *fakeNetwork) Close(ctx context.Context, s network.Slot) error {
	if err := n.called(ctx, "network.close"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, s)
	return nil
}

func (n *fakeNetwork) Strays(_ context.Context, used func(network.Slot) bool) ([]network.Slot, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var strays []network.Slot
	for _, s := range slices.Sorted(maps.Keys(n.open)) {
		if !used(s) {
			strays = append(strays, s)
		}
	}
	return strays, nil
}

// restart is what the next agent finds: what is open, and an empty book.
func (n *fakeNetwork) restart() *fakeNetwork {
	n.mu.Lock()
	defer n.mu.Unlock()
	next := newFakeNetwork()
	maps.Copy(next.open, n.open)
	return next
}

// fakeTemplates has the template "minimal", and disks of no size.
type fakeTemplates struct{ faults }

func (t *fakeTemplates) Get(name string) (template.Template, error) {
	if name != "minimal" {
		return template.Template{}, errdefs.NotFound.Errorf("template %q does not exist", name)
	}
	return template.Template{Name: name, Boot: template.Boot{Kernel: "/vmlinux", Initrd: "/initrd.img"}, Base: "/base.ext4"}, nil
}

func (t *fakeTemplates) NewOverlay(ctx context.Context, path string, _ int) error {
	if err := t.called(ctx, "overlay"); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o600)
}

// fakeGuest answers at once.
type fakeGuest struct {
	*faults
	open *atomic.Int64
	exec func(context.Context, guest.Command) (guest.Result, error)
}

func (g fakeGuest) WaitReady(ctx context.Context) error { return g.called(ctx, "guest.ready") }
func (g fakeGuest) Init(ctx context.Context, i guest.Init) error {
	if i.AccessToken == "" {
		return errors.New("no token")
	}
	return g.called(ctx, "guest.init")
}
func (g fakeGuest) Close() { g.open.Add(-1) }
func (g fakeGuest) Exec(ctx context.Context, cmd guest.Command) (guest.Result, error) {
	if err := g.called(ctx, "guest.exec"); err != nil {
		return guest.Result{}, err
	}
	if g.exec != nil {
		return g.exec(ctx, cmd)
	}
	return guest.Result{Stdout: []byte(cmd.Cmd)}, nil
}

// hang blocks until the context ends.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
