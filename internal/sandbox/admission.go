package sandbox

import (
	"context"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Capacity is what all sandboxes of the host together may take.
type Capacity struct {
	Sandboxes int
	VCPUs     int
	// MemMiB counts each guest's memory and VMMOverheadMiB.
	MemMiB int
	// Starts is how many VMs may be starting at once; more wait their turn,
	// StartQueue at most.
	Starts     int
	StartQueue time.Duration
}

// VMMOverheadMiB is what a VMM takes besides its guest's memory, rounded up
// from QEMU's resident size.
const VMMOverheadMiB = 96

// The hard limits of a VMM's cgroup: what it may take besides its vCPUs' time
// and its guest's memory, so that a guest that breaks out of bounds ends, and
// no neighbour.
const (
	vmmCPUMilli    = 250
	maxOverheadMiB = 512
	maxVMMTasks    = 256
)

// admit reserves capacity for one more sandbox, or says which limit is in the
// way. Called with Manager.mu held.
func (m *Manager) admit(vcpus, memMiB int) error {
	used := m.used
	switch c := m.cfg.Capacity; {
	case used.Sandboxes+1 > c.Sandboxes:
		return errdefs.Exhausted.Errorf("no room for another sandbox: %d of %d exist", used.Sandboxes, c.Sandboxes)
	case used.VCPUs+vcpus > c.VCPUs:
		return errdefs.Exhausted.Errorf("not enough vcpus: %d asked, %d of %d free", vcpus, c.VCPUs-used.VCPUs, c.VCPUs)
	case used.MemMiB+memMiB+VMMOverheadMiB > c.MemMiB:
		return errdefs.Exhausted.Errorf("not enough memory: %d MiB asked (and %d MiB for the VMM), %d of %d MiB free",
			memMiB, VMMOverheadMiB, c.MemMiB-used.MemMiB, c.MemMiB)
	}
	m.account(vcpus, memMiB, 1)
	return nil
}

// account adds n sandboxes of a size to what is used. Called with Manager.mu
// held.
func (m *Manager) account(vcpus, memMiB, n int) {
	m.used.Sandboxes += n
	m.used.VCPUs += n * vcpus
	m.used.MemMiB += n * (memMiB + VMMOverheadMiB)
}

// startSlot waits for its turn to start a VM; done gives the turn to the next.
func (m *Manager) startSlot(ctx context.Context) (done func(), err error) {
	timer := time.NewTimer(m.cfg.Capacity.StartQueue)
	defer timer.Stop()
	select {
	case m.starts <- struct{}{}:
		return func() { <-m.starts }, nil
	case <-timer.C:
		return nil, errdefs.Exhausted.Errorf("%d sandboxes are starting already; none finished within %s", cap(m.starts), m.cfg.Capacity.StartQueue)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
