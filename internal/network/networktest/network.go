// Package networktest has a network without a host, for tests of what stands on
// one: it counts slots and reads policies like the real one, and does no I/O.
package networktest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Network is such a network. Safe for concurrent use.
type Network struct {
	*network.Network

	mu      sync.Mutex
	taken   map[network.Slot]bool
	open    map[network.Slot]bool
	removed bool
}

// New returns a network of which no slot is in use.
func New(plan network.Plan, o network.Options) *Network {
	return &Network{Network: network.New(plan, o), taken: map[network.Slot]bool{}, open: map[network.Slot]bool{}}
}

// OpenSlots returns the slots that are open, in order.
func (n *Network) OpenSlots() []network.Slot {
	n.mu.Lock()
	defer n.mu.Unlock()
	var open []network.Slot
	for s := range n.open {
		open = append(open, s)
	}
	slices.Sort(open)
	return open
}

// TornDown reports whether Teardown was called after the last Setup.
func (n *Network) TornDown() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.removed
}

// Setup prepares nothing.
func (n *Network) Setup(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.removed = false
	return nil
}

// Teardown is an error while a slot is in use.
func (n *Network) Teardown(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.taken)+len(n.open) > 0 {
		return fmt.Errorf("%d slots are taken and %d open", len(n.taken), len(n.open))
	}
	n.removed = true
	return nil
}

// Acquire reserves the first free slot.
func (n *Network) Acquire(context.Context, vmm.LinkKind) (network.Slot, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := network.Slot(1); s.Valid(); s++ {
		if !n.taken[s] {
			n.taken[s] = true
			return s, nil
		}
	}
	return 0, errdefs.Exhausted.Errorf("all slots are in use")
}

// Claim reserves a slot.
func (n *Network) Claim(s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken[s] {
		return errdefs.AlreadyExists.Errorf("slot %d is taken", s)
	}
	n.taken[s] = true
	return nil
}

// Release gives a closed slot back.
func (n *Network) Release(s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.taken[s] || n.open[s] {
		return fmt.Errorf("slot %d is not taken, or open", s)
	}
	delete(n.taken, s)
	return nil
}

// Open opens a taken slot.
func (n *Network) Open(_ context.Context, s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.taken[s] || n.open[s] {
		return fmt.Errorf("slot %d is not taken, or open", s)
	}
	n.open[s] = true
	return nil
}

// Close closes a slot.
func (n *Network) Close(_ context.Context, s network.Slot) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, s)
	return nil
}

// Stats counts the slots.
func (n *Network) Stats() network.Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return network.Stats{Reserved: len(n.taken), Open: len(n.open)}
}

// CountersAll counts nothing for each open slot.
func (n *Network) CountersAll(context.Context) (map[network.Slot]network.Counters, error) {
	all := map[network.Slot]network.Counters{}
	for _, s := range n.OpenSlots() {
		all[s] = network.Counters{}
	}
	return all, nil
}

// Denied finds nothing refused.
func (n *Network) Denied(context.Context, network.Slot, network.Policy) ([]network.Denial, error) {
	return nil, nil
}

// Strays finds none: a slot that is open is taken.
func (n *Network) Strays(context.Context) ([]network.Slot, error) {
	return nil, nil
}

// RemoveStrays has none to remove.
func (n *Network) RemoveStrays(context.Context) ([]network.Slot, error) { return nil, nil }

// SetPolicy takes every policy.
func (n *Network) SetPolicy(context.Context, network.Slot, network.Policy) error { return nil }

// SetLimits takes all limits.
func (n *Network) SetLimits(context.Context, network.Slot, network.Limits) error { return nil }

// CheckAll finds nothing wrong.
func (n *Network) CheckAll(context.Context, []network.Slot) (network.Findings, error) {
	return network.Findings{}, nil
}

// Repair has nothing to mend.
func (n *Network) Repair(context.Context, network.Slot, network.Policy, network.Limits) error {
	return nil
}

// Run builds nothing ahead of use.
func (n *Network) Run(ctx context.Context) { <-ctx.Done() }
