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

	// guestMiB is the guests' part of MemMiB.
	guestMiB int
}

const diskOvercommit = 16

func (r Resources) plus(o Resources) Resources {
	return Resources{r.Sandboxes + o.Sandboxes, r.VCPUs + o.VCPUs, r.MemMiB + o.MemMiB, r.DiskMiB + o.DiskMiB, r.guestMiB + o.guestMiB}
}

func (r Resources) minus(o Resources) Resources {
	return Resources{r.Sandboxes - o.Sandboxes, r.VCPUs - o.VCPUs, r.MemMiB - o.MemMiB, r.DiskMiB - o.DiskMiB, r.guestMiB - o.guestMiB}
}

// times is what so many sandboxes take that each take r.
func (r Resources) times(n int) Resources {
	return Resources{r.Sandboxes * n, r.VCPUs * n, r.MemMiB * n, r.DiskMiB * n, r.guestMiB * n}
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
	return Resources{Sandboxes: 1, VCPUs: vcpus, MemMiB: memMiB + vmmOverheadMiB(memMiB), DiskMiB: diskMiB, guestMiB: memMiB}
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
	by    map[ID]share
	total Resources
	// projects is what the sandboxes of each project take together.
	projects map[string]Resources
}

// share is what one sandbox takes, and the project that it counts for.
type share struct {
	project string
	Resources
}

func newLedger(c Capacity, free func() int64) *ledger {
	return &ledger{free: free, keepMiB: int64(c.FreeDiskMiB), limit: c.Resources, by: map[ID]share{}, projects: map[string]Resources{}}
}

// take admits a sandbox of a project that needs so much more than it takes, or says
// which limit is in the way: the host's (errdefs.Exhausted) or the quota's (overQuota).
func (l *ledger) take(id ID, project string, quota Quota, more Resources) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := quota.exceeded(project, l.projects[project], more); err != nil {
		return err
	}
	if err := l.admit(more); err != nil {
		return err
	}
	l.put(id, share{project, l.by[id].plus(more)})
	return nil
}

// assign makes a sandbox that is admitted count for a project, or says which bound of
// the quota is in the way.
func (l *ledger) assign(id ID, project string, quota Quota) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	takes := l.by[id].Resources
	if err := quota.exceeded(project, l.projects[project], takes); err != nil {
		return err
	}
	l.put(id, share{project, takes})
	return nil
}

// allows says which bound of a quota is in the way of so much more. It reserves nothing.
func (l *ledger) allows(project string, quota Quota, more Resources) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return quota.exceeded(project, l.projects[project], more)
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
func (l *ledger) adopt(id ID, project string, takes Resources) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(id, share{project, takes})
}

// give takes back all that a sandbox took.
func (l *ledger) give(id ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(id, share{})
	delete(l.by, id)
}

// put is called with mu held.
func (l *ledger) put(id ID, now share) {
	was := l.by[id]
	l.total = l.total.minus(was.Resources).plus(now.Resources)
	l.by[id] = now
	l.count(was.project, Resources{}.minus(was.Resources))
	l.count(now.project, now.Resources)
}

// count adds to what the sandboxes of a project take. Called with mu held.
func (l *ledger) count(project string, more Resources) {
	if project == "" {
		return
	}
	l.projects[project] = l.projects[project].plus(more)
	if l.projects[project] == (Resources{}) {
		delete(l.projects, project)
	}
}

// fits says whether so much more is within the limits when some sandboxes have given
// back what they take.
func (l *ledger) fits(more Resources, without []ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := l.total.plus(more)
	for _, id := range without {
		total = total.minus(l.by[id].Resources)
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
