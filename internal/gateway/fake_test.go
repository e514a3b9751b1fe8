package gateway

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// manager is a double of a sandbox.Manager. The guests of its sandboxes are on the
// loopback; their addresses are the same, and a test tells them apart by their ports.
type manager struct {
	mu    sync.Mutex
	boxes map[sandbox.ID]*box
}

// box is a sandbox of a manager.
type box struct {
	info   sandbox.Info
	tokens sandbox.Tokens
	alive  context.Context
	addr   netip.Addr // of the guest; 127.0.0.1 unless it is set
	// wake is what Wake does, with no lock held; nil lets the sandbox run.
	wake func(context.Context) error
	// err is what Tokens, Get and Lease fail with, by name.
	err map[string]error
	// wakes, leases and glances count calls.
	wakes, leases, glances int
}

// newManager returns a manager with idA and idB, which run until alive ends.
func newManager(alive context.Context) *manager {
	m := &manager{boxes: map[sandbox.ID]*box{}}
	for _, id := range []sandbox.ID{idA, idB} {
		m.boxes[id] = &box{info: sandbox.Info{ID: id, State: sandbox.Running}, tokens: sandbox.Tokens{Envd: tokenA}, alive: alive}
	}
	return m
}

// find returns a sandbox, or the error of a call.
func (m *manager) find(id sandbox.ID, call string) (*box, error) {
	b := m.boxes[id]
	if b == nil {
		return nil, errdefs.NotFound.Errorf("sandbox %s does not exist", id)
	}
	return b, b.err[call]
}

// change changes a sandbox.
func (m *manager) change(id sandbox.ID, how func(*box)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	how(m.boxes[id])
}

// calls are the numbers of wakes and leases of a sandbox.
func (m *manager) calls(id sandbox.ID) (wakes, leases int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boxes[id].wakes, m.boxes[id].leases
}

func (m *manager) Get(id sandbox.ID) (sandbox.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := m.find(id, "Get")
	if err != nil {
		return sandbox.Info{}, err
	}
	return b.info, nil
}

func (m *manager) Tokens(id sandbox.ID) (sandbox.Tokens, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := m.find(id, "Tokens")
	if err == nil && (b.info.State == sandbox.Stopping || b.info.State == sandbox.Stopped) {
		err = errdefs.NotFound.Errorf("sandbox %s has ended", id)
	}
	if err != nil {
		return sandbox.Tokens{}, err
	}
	return b.tokens, nil
}

func (m *manager) WithTokens(fits func(sandbox.Tokens) bool) (found sandbox.ID, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, b := range m.boxes {
		if fits(b.tokens) {
			found, ok = id, true
		}
	}
	return found, ok
}

func (m *manager) Lease(_ context.Context, id sandbox.ID) (*sandbox.Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := m.find(id, "Lease")
	if err == nil && b.info.State != sandbox.Running {
		err = errdefs.WrongState.Errorf("sandbox %s is %s", id, b.info.State)
	}
	if err != nil {
		return nil, err
	}
	b.leases++
	addr := b.addr
	if !addr.IsValid() {
		addr = netip.MustParseAddr("127.0.0.1")
	}
	return &sandbox.Lease{Addr: addr, Token: b.tokens.Envd, Alive: b.alive}, nil
}

func (m *manager) Glance(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error) {
	lease, err := m.Lease(ctx, id)
	if err == nil {
		m.change(id, func(b *box) { b.leases--; b.glances++ })
	}
	return lease, err
}

func (m *manager) Wake(ctx context.Context, id sandbox.ID) error {
	m.mu.Lock()
	b := m.boxes[id]
	b.wakes++
	wake := b.wake
	m.mu.Unlock()
	if wake != nil {
		if err := wake(ctx); err != nil {
			return err
		}
	}
	m.change(id, func(b *box) { b.info.State, b.info.Pausing = sandbox.Running, false })
	return nil
}

// envd serves h on envd's port of an address of this process's own, and returns the
// address.
func envd(t *testing.T, h http.HandlerFunc) netip.Addr {
	t.Helper()
	pid := os.Getpid()
	addr := netip.AddrFrom4([4]byte{127, byte(144 + pid>>16&0x3f), byte(pid >> 8), byte(pid)})
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, guestapi.Port).String())
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-served })
	return addr
}
