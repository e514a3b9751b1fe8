package sandbox

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Manager owns the sandboxes of a host. It is safe for concurrent use; values
// that it returns are copies.
//
// Locks: the op lock of a box comes first and is the only one that is held across I/O.
// Inside of it the mutexes of registry, pool and the others are taken, and box.mu last.
type Manager struct {
	*registry
	*work
	*host
	*vms
	*holdings
	*reconciler

	ledger *ledger
	disk   *disk
	fence  *fence
	pool   *pool
	keeper keeper
	owners *owners
	// names has the names of sandboxes that are being made.
	names *owners
	lock  *dirLock
	store store
	// woken has an element when the janitor is to look around.
	woken chan struct{}
	// expiring has, for each way to expire, an element for each sandbox that does.
	expiring map[chore]chan struct{}
	log      *slog.Logger
}

// Get returns one sandbox. It never waits for an operation.
func (r *registry) Get(id ID) (Info, error) {
	b, err := r.find(id)
	if err != nil {
		return Info{}, err
	}
	return b.info(), nil
}

// List returns all sandboxes, oldest first; stopped ones only on demand. It
// never waits for an operation.
func (r *registry) List(stopped bool) []Info { return r.Select(Filter{Stopped: stopped}) }

// Select is List with a filter.
func (r *registry) Select(f Filter) []Info {
	boxes := r.all()
	infos := []Info{}
	if f.Project == nil && f.Metadata == nil {
		infos = make([]Info, 0, len(boxes))
	}
	for _, b := range boxes {
		if info, ok := b.infoIf(f.matches); ok {
			infos = append(infos, info)
		}
	}
	slices.SortFunc(infos, func(a, b Info) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return infos
}

// Stats are the manager's numbers at one moment.
type Stats struct {
	States map[State]int
	// Ended counts since the manager opened.
	Ended           map[Reason]int
	Reserved, Limit Resources
	// Pending counts what could not be freed yet.
	Pending int
	// Warm is how many guests wait, WarmWanted how many should.
	Warm, WarmWanted int
	// Marked counts the sandboxes that run or are paused and do not work as they
	// should.
	Marked map[Reason]int
	// DiskFree and DiskKept are what is free on the host's disk, and what is
	// kept so, in bytes.
	DiskFree, DiskKept int64
}

// Stats returns the manager's numbers. It never waits for an operation.
func (m *Manager) Stats() Stats {
	s := Stats{States: map[State]int{}, Ended: m.endings(), Marked: map[Reason]int{}, DiskFree: m.disk.stats(), DiskKept: m.disk.keep}
	for _, b := range m.all() {
		rec := b.record()
		s.States[rec.State]++
		if rec.Reason.passes() {
			s.Marked[rec.Reason]++
		}
		if b.failing() {
			s.Pending++
		}
	}
	s.Reserved, s.Limit = m.ledger.stats()
	s.Warm, s.WarmWanted = m.pool.size(), m.pool.wants()
	return s
}

// Console returns at most n bytes from the end of the guest's console. Where a guest that
// was restored has printed nothing yet, it says so.
func (r *registry) Console(id ID, n int64) ([]byte, error) {
	b, err := r.find(id)
	if err != nil {
		return nil, err
	}
	console, err := r.store.tail(id, n)
	if err == nil && len(console) == 0 && b.record().Restored {
		console = []byte(restoredConsole)
	}
	return console, err
}

const restoredConsole = "[wrenn: the guest goes on from a snapshot, and has printed nothing since]\n"

// Pause stops the vCPUs of a running sandbox. On error it runs as before.
func (m *Manager) Pause(ctx context.Context, id ID) error {
	b, ctx, end, err := m.begin(ctx, id, OpPause, "paused")
	if err != nil {
		return err
	}
	defer end()
	return m.pause(ctx, b)
}

// pause stops the vCPUs of a running sandbox. On error it runs as before. Called with
// the op lock held.
func (m *Manager) pause(ctx context.Context, b *box) error {
	was := b.record()
	err := b.op.vm.Pause(ctx)
	if err == nil {
		err = m.move(b, Paused, nil)
	}
	if err != nil {
		return m.backTo(ctx, b, OpPause, was, err)
	}
	return nil
}

// Resume lets a paused or hibernated sandbox go on, its clock set right. On
// error it stays as it is.
func (m *Manager) Resume(ctx context.Context, id ID) error {
	b, ctx, end, err := m.begin(ctx, id, OpResume, "resumed")
	if err != nil {
		return err
	}
	defer end()
	return m.resume(ctx, b, resuming{})
}

// resume lets a paused or hibernated sandbox go on. On error it stays as it is. Called
// with the op lock held.
func (m *Manager) resume(ctx context.Context, b *box, r resuming) error {
	was := b.record()
	if was.State == Hibernated {
		return m.resumeFromDisk(ctx, b, r)
	}
	if r.filesOnly {
		return errdefs.WrongState.Errorf("sandbox %s is paused in the host's memory; only a hibernated one can boot from its disk", b.id)
	}
	if b.op.vm == nil {
		return unreached(was)
	}
	if err := m.disk.mayResume(b); err != nil {
		return err
	}
	err := goOn(ctx, b)
	if err == nil {
		err = m.move(b, Running, r.begin)
	}
	if err != nil {
		return m.backTo(ctx, b, OpResume, was, err)
	}
	return nil
}

// begin finds a sandbox, takes its op lock, which end gives back, and looks at
// its state again. The context that it returns ends when ctx does, when the sandbox is
// destroyed, and when the operation's time limit has passed.
func (m *Manager) begin(ctx context.Context, id ID, op Operation, doing string) (*box, context.Context, func(), error) {
	b, err := m.find(id)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := m.take(ctx, b, op, doing); err != nil {
		return nil, nil, nil, err
	}
	if op == OpPause || op == OpHibernate {
		b.setPausing(time.Now().UTC())
	}
	ctx, end := m.bounded(ctx, b, op)
	return b, ctx, end, nil
}

// take takes the op lock of a sandbox, waiting within ctx, if its state allows op.
func (m *Manager) take(ctx context.Context, b *box, op Operation, doing string) error {
	// Not worth waiting for: no operation ends in a state that allows this.
	if s := b.state(); s == Stopping || s == Stopped {
		return check(b.id, op, s)
	}
	if err := b.hold(ctx, doing); err != nil {
		return err
	}
	rec := b.record()
	err := check(b.id, op, rec.State)
	if err == nil {
		err = b.full(op)
	}
	if err == nil && b.op.vm == nil && (rec.State == Running || rec.State == Paused) && slices.Contains(opsOnVM, op) {
		err = unreached(rec)
	}
	if err != nil {
		b.unhold()
	}
	return err
}

// bounded returns a context for an operation, which ends when ctx does, when the sandbox
// is destroyed, and when the operation's time limit has passed. end gives the op lock
// back. Called with the op lock held.
func (m *Manager) bounded(ctx context.Context, b *box, op Operation) (_ context.Context, end func()) {
	rec := b.record()
	limit := opTimeout
	switch {
	case rec.State == Hibernated: // it waits for its turn to start, and may boot
		limit = moveTimeout(rec) + m.cfg.Capacity.StartQueue + m.cfg.BootTimeout + programTime
	case op == OpHibernate || op == OpFork || op == OpSnapshot:
		limit = moveTimeout(rec)
	}
	ctx, stop := context.WithTimeoutCause(ctx, limit, errdefs.Unavailable.Errorf("the vm did not answer within %s", limit))
	ctx, abort := context.WithCancelCause(ctx)
	b.setAbort(abort)
	return ctx, func() { b.unhold(); abort(nil); stop() }
}

// opsOnVM are the operations that need a VM which answers.
var opsOnVM = []Operation{OpPause, OpResume, OpHibernate, OpFork, OpSnapshot}

// opTimeout bounds what a VM may take for a pause or a resume.
const opTimeout = 30 * time.Second

// SetTimeout sets after how much inactivity, counted from now, a sandbox
// expires; 0 is never.
func (m *Manager) SetTimeout(ctx context.Context, id ID, timeout time.Duration) (Info, error) {
	if err := checkTimeout(timeout); err != nil {
		return Info{}, errdefs.InvalidArgument.Errorf("%w", err)
	}
	b, _, end, err := m.begin(ctx, id, OpTimeout, "given another timeout")
	if err != nil {
		return Info{}, err
	}
	defer end()
	err = m.save(b, func(r *Record) { r.Timeout, r.LastActiveAt = timeout, time.Now().UTC() })
	if err == nil {
		m.note(b, Updated, ActorOf(ctx))
	}
	return b.info(), err
}
