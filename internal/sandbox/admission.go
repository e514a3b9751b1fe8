package sandbox

import (
	"context"
	"errors"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Resources is what sandboxes take of the host.
type Resources struct {
	Sandboxes int
	VCPUs     int
	// MemMiB counts each guest's memory and its VMM's overhead.
	MemMiB int
	// DiskMiB counts each disk's full size, of which it takes only what is
	// written: a host may well have less. As a limit, 0 is diskOvercommit
	// times the most that was free since the manager opened.
	DiskMiB int
}

const diskOvercommit = 16

func (r Resources) plus(o Resources) Resources {
	return Resources{r.Sandboxes + o.Sandboxes, r.VCPUs + o.VCPUs, r.MemMiB + o.MemMiB, r.DiskMiB + o.DiskMiB}
}

func (r Resources) minus(o Resources) Resources {
	return Resources{r.Sandboxes - o.Sandboxes, r.VCPUs - o.VCPUs, r.MemMiB - o.MemMiB, r.DiskMiB - o.DiskMiB}
}

func (r Resources) within(limit Resources) bool {
	return r.Sandboxes <= limit.Sandboxes && r.VCPUs <= limit.VCPUs && r.MemMiB <= limit.MemMiB && r.DiskMiB <= limit.DiskMiB
}

// Capacity is what all sandboxes of the host together may take.
type Capacity struct {
	Resources
	// FreeDiskMiB must remain free on the state directory's file system: with
	// less, nothing new is made, and no sandbox writes more than its share.
	FreeDiskMiB int
	// Starts is how many VMs may be starting at once; more wait their turn,
	// StartQueue at most.
	Starts     int
	StartQueue time.Duration
}

// vmmOverheadMiB is what a VMM may take besides its guest's memory, and what it
// is counted for. QEMU's own is about 25 MiB, the code that it has translated at
// most 64 (see the driver's arguments); what it keeps to find the guest's pages
// grows with their number, as do the host's page tables.
func vmmOverheadMiB(memMiB int) int { return 128 + memMiB/16 }

// The hard limits of a VMM's cgroup besides that: what it may take beyond its
// vCPUs' time, so that a guest that breaks out of bounds ends, and no neighbour.
const (
	vmmCPUMilli = 250
	maxVMMTasks = 256
)

// need is what a new sandbox of a size takes.
func (m *Manager) need(vcpus, memMiB int) Resources {
	return Resources{Sandboxes: 1, VCPUs: vcpus, MemMiB: memMiB + vmmOverheadMiB(memMiB), DiskMiB: m.cfg.OverlayMiB}
}

// takes is what a record's sandbox takes.
func (r Record) takes() Resources {
	takes := Resources{Sandboxes: 1, DiskMiB: r.DiskMiB}
	if r.Slot != 0 {
		takes = takes.plus(r.awake())
	}
	return takes
}

// awake is what a record's sandbox takes only when it is not hibernated.
func (r Record) awake() Resources {
	return Resources{VCPUs: r.VCPUs, MemMiB: r.MemMiB + vmmOverheadMiB(r.MemMiB)}
}

// admitted reserves what a new sandbox needs. Guests that wait for a sandbox of
// another kind make way for it, by giveUp, one after the other.
func (m *Manager) admitted(ctx context.Context, need Resources, giveUp func(context.Context, Resources) bool) error {
	for {
		m.mu.Lock()
		err := error(errdefs.Unavailable.Errorf("the host is shutting down"))
		if !m.draining {
			err = m.admit(need)
		}
		m.mu.Unlock()
		if !errors.Is(err, errdefs.Exhausted) || !giveUp(ctx, need) {
			return err
		}
	}
}

// admit reserves what a new sandbox needs, or says which limit is in the way
// and how much is free. Called with Manager.mu held.
func (m *Manager) admit(need Resources) error {
	limit := m.cfg.Capacity
	used := m.used.plus(need)
	free := limit.minus(m.used)
	switch {
	case used.Sandboxes > limit.Sandboxes:
		return errdefs.Exhausted.Errorf("no room for another sandbox: %d of %d exist", m.used.Sandboxes, limit.Sandboxes)
	case used.VCPUs > limit.VCPUs:
		return errdefs.Exhausted.Errorf("not enough vcpus: %d asked, %d of %d free", need.VCPUs, free.VCPUs, limit.VCPUs)
	case used.MemMiB > limit.MemMiB:
		return errdefs.Exhausted.Errorf("not enough memory: %d MiB asked with what the vmm takes; %d of %d MiB free", need.MemMiB, free.MemMiB, limit.MemMiB)
	case used.DiskMiB > limit.DiskMiB:
		return errdefs.Exhausted.Errorf("not enough disk: %d MiB asked, %d of %d MiB free", need.DiskMiB, free.DiskMiB, limit.DiskMiB)
	}
	if now := m.freeBytes() >> 20; now < int64(limit.FreeDiskMiB) {
		return errdefs.Exhausted.Errorf("not enough disk: %d MiB are free on the host, %d must remain", now, limit.FreeDiskMiB)
	}
	m.used = used
	return nil
}

// startSlot waits for its turn to start a VM; done gives the turn to the next.
func (m *Manager) startSlot(ctx context.Context) (done func(), err error) {
	timer := time.NewTimer(m.cfg.Capacity.StartQueue)
	defer timer.Stop()
	select {
	case m.starts <- struct{}{}:
		return func() { <-m.starts; m.stir() }, nil
	case <-timer.C:
		return nil, errdefs.Exhausted.Errorf("%d sandboxes are starting already; none finished within %s", cap(m.starts), m.cfg.Capacity.StartQueue)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
