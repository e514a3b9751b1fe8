package sandbox

import (
	"math"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Resources is what sandboxes take of the host.
type Resources struct {
	Sandboxes int
	VCPUs     int
	// MemMiB counts each guest's memory and its VMM's overhead.
	MemMiB int
	// DiskMiB counts each disk's full size, though a disk takes only what is written:
	// a host may have less. As a limit, 0 is diskOvercommit times the most that was
	// free since the manager opened.
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
	// Starts is how many VMs may be starting at once. More wait for their turn,
	// StartQueue at most.
	Starts     int
	StartQueue time.Duration
}

// vmmOverheadMiB is what a VMM may take besides its guest's memory, and what it
// is counted for. QEMU's own is about 25 MiB, the code that it has translated at
// most 64 (see the driver's arguments); what it keeps to find the guest's pages
// grows with their number, as do the host's page tables.
func vmmOverheadMiB(memMiB int) int { return 128 + memMiB/16 }

// need is what a sandbox takes while it has a VM.
func need(vcpus, memMiB, diskMiB int) Resources {
	return Resources{Sandboxes: 1, VCPUs: vcpus, MemMiB: memMiB + vmmOverheadMiB(memMiB), DiskMiB: diskMiB}
}

// takes is what a record's sandbox takes: only its disk while it is hibernated.
func (r Record) takes() Resources {
	if r.Slot == 0 {
		return Resources{Sandboxes: 1, DiskMiB: r.DiskMiB}
	}
	return need(r.VCPUs, r.MemMiB, r.DiskMiB)
}

// ledger knows what each sandbox takes of the host, and admits new ones. It is safe
// for concurrent use.
type ledger struct {
	// free is how many bytes are free on the host's disk, of which keepMiB must
	// remain.
	free    func() int64
	keepMiB int64

	mu    sync.Mutex
	limit Resources
	by    map[ID]Resources
	total Resources
}

func newLedger(c Capacity, free func() int64) *ledger {
	return &ledger{free: free, keepMiB: int64(c.FreeDiskMiB), limit: c.Resources, by: map[ID]Resources{}}
}

// take admits a sandbox that needs so much more than it takes, or says which limit
// is in the way (errdefs.Exhausted).
func (l *ledger) take(id ID, more Resources) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.admit(more); err != nil {
		return err
	}
	l.put(id, l.by[id].plus(more))
	return nil
}

// admit says which limit is in the way. Called with mu held.
func (l *ledger) admit(more Resources) error {
	limit, total := l.limit, l.total.plus(more)
	free := limit.minus(l.total)
	switch {
	case total.Sandboxes > limit.Sandboxes:
		return errdefs.Exhausted.Errorf("no room for another sandbox: %d of %d exist", l.total.Sandboxes, limit.Sandboxes)
	case total.VCPUs > limit.VCPUs:
		return errdefs.Exhausted.Errorf("not enough vcpus: %d asked, %d of %d free", more.VCPUs, free.VCPUs, limit.VCPUs)
	case total.MemMiB > limit.MemMiB:
		return errdefs.Exhausted.Errorf("not enough memory: %d MiB asked with what the vmm takes; %d of %d MiB free",
			more.MemMiB, free.MemMiB, limit.MemMiB)
	case total.DiskMiB > limit.DiskMiB:
		return errdefs.Exhausted.Errorf("not enough disk: %d MiB asked, %d of %d MiB free", more.DiskMiB, free.DiskMiB, limit.DiskMiB)
	}
	if now := l.free() >> 20; now < l.keepMiB {
		return errdefs.Exhausted.Errorf("not enough disk: %d MiB are free on the host, %d must remain", now, l.keepMiB)
	}
	return nil
}

// adopt notes what a sandbox takes, whatever the limits are.
func (l *ledger) adopt(id ID, takes Resources) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(id, takes)
}

// give takes back all that a sandbox took.
func (l *ledger) give(id ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(id, Resources{})
	delete(l.by, id)
}

// put is called with mu held.
func (l *ledger) put(id ID, takes Resources) {
	l.total = l.total.minus(l.by[id]).plus(takes)
	l.by[id] = takes
}

// fits says whether so much more is within the limits when some sandboxes have given
// back what they take.
func (l *ledger) fits(more Resources, without []ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := l.total.plus(more)
	for _, id := range without {
		total = total.minus(l.by[id])
	}
	return total.within(l.limit)
}

// grow raises the limit of all disks together if so many free bytes allow more.
func (l *ledger) grow(free int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit.DiskMiB = max(l.limit.DiskMiB, int(min(free>>20, math.MaxInt32)*diskOvercommit))
}

// stats returns what all sandboxes together take, and the limits.
func (l *ledger) stats() (total, limit Resources) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, l.limit
}
