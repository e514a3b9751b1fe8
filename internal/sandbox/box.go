package sandbox

import (
	"context"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// box is a sandbox, a waiting guest or a build sandbox, in memory. Its fields stand in two groups:
// those under mu and those under the op lock. TestBoxLocks holds that.
type box struct {
	id ID
	// lock is the op lock. It is full while an operation changes the sandbox, and is
	// held across I/O.
	lock chan struct{}
	// usage is what the sandbox used.
	usage usage

	// mu is held for a moment, never across I/O.
	mu struct {
		sync.Mutex
		rec Record
		// doing names what the holder of the op lock does, for those who wait.
		doing string
		// abort cancels the operation in progress; nil where there is none.
		abort context.CancelCauseFunc
		// pausingAt is when the pause in progress was begun; zero if there is none.
		pausingAt time.Time
		// resumption is the last resume that callers shared.
		resumption *resumption
		// leases counts the calls and streams in progress.
		leases int
		// failures counts the attempts in a row to free what the sandbox has.
		failures int
		// attempts counts the times in a row that the sandbox expired and was not
		// hibernated, refusals those of them that were not the host's fault.
		attempts, refusals int
		// retryAt is when the next attempt of either kind is due.
		retryAt time.Time
		// looks counts the times in a row that the sandbox could not be reached, or its
		// record not be read; lookAt is when the next is due.
		looks  int
		lookAt time.Time
		// far: the VM answers, and the guest does not.
		far bool
		// stalls counts the times in a row that the VM stopped for want of room. goneOnAt
		// is when it went on after that, goOnAt when that may be tried.
		stalls           int
		goneOnAt, goOnAt time.Time
		// guest and alive are those of op, to be asked what it uses.
		guest Guest
		alive context.Context
	}

	// op is read and written under the op lock alone.
	op struct {
		vm    vmm.VM
		guest Guest
		// envd is the version that the guest stated when it was told last what it is;
		// empty for none.
		envd string
		// opens is the token that a waiting guest takes until it is told what it is; empty
		// for the record's.
		opens string
		// alive ends with this incarnation of the VM; its cause says why.
		alive context.Context
		kill  context.CancelCauseFunc
		// actor is who asked for the operation in progress; zero for the host itself.
		actor Actor
	}
}

// newBox returns a box that no other goroutine knows yet. It needs no lock.
func newBox(rec Record) *box {
	b := &box{id: rec.ID, lock: make(chan struct{}, 1)}
	b.mu.rec = rec
	b.renew()
	return b
}

// renew begins another incarnation of the VM. Called with the op lock held, or by
// newBox.
func (b *box) renew() {
	b.op.alive, b.op.kill = context.WithCancelCause(context.Background())
}

// hold takes the op lock, waiting within ctx. What is done under it is done for the
// actor of ctx.
func (b *box) hold(ctx context.Context, doing string) error {
	select {
	case b.lock <- struct{}{}:
	default:
		select {
		case b.lock <- struct{}{}:
		case <-ctx.Done():
			b.mu.Lock()
			defer b.mu.Unlock()
			return errdefs.Busy.Errorf("sandbox %s is being %s", b.id, b.mu.doing)
		}
	}
	b.setDoing(doing)
	b.actFor(ctx)
	return nil
}

// actFor sets who the operation in progress is done for. Called with the op lock held.
func (b *box) actFor(ctx context.Context) { b.op.actor = ActorOf(ctx) }

// tryHold takes the op lock if it is free, for the host itself.
func (b *box) tryHold(doing string) bool {
	select {
	case b.lock <- struct{}{}:
		b.setDoing(doing)
		return true
	default:
		return false
	}
}

func (b *box) setDoing(doing string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.doing = doing
}

// unhold gives the op lock back. Called with the op lock held.
func (b *box) unhold() {
	b.setAbort(nil)
	b.op.actor = Actor{}
	b.setPausing(time.Time{})
	<-b.lock
}

// setPausing notes when a pause was begun, which lasts until the op lock is given back.
func (b *box) setPausing(at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.pausingAt = at
}

// pausingSince is when the pause in progress was begun, now if there is none.
func (b *box) pausingSince(now time.Time) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.pausingAt.IsZero() {
		return now
	}
	return b.mu.pausingAt
}

// setAbort sets what cancels the operation in progress.
func (b *box) setAbort(abort context.CancelCauseFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.abort = abort
}

// cancel cancels the operation in progress, if there is one.
func (b *box) cancel(cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.abort != nil {
		b.mu.abort(cause)
	}
}

func (b *box) record() Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.rec
}

func (b *box) state() State { return b.record().State }

// waits says whether the box is a waiting guest, or is becoming one.
func (b *box) waits() bool { return b.state() == Waiting }

// hidden says whether the box is no sandbox to callers: a waiting guest, or a build
// sandbox.
func (b *box) hidden() bool { return b.state().hidden() }

// set replaces the record in memory alone.
func (b *box) set(change func(*Record)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.mu.rec)
}

// info is a copy for callers; a sandbox with work in flight is active now.
func (b *box) info() Info {
	info, _ := b.infoIf(func(*Record) bool { return true })
	return info
}

// infoIf is info of a sandbox whose record fits. Others are not copied.
func (b *box) infoIf(fits func(*Record) bool) (_ Info, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !fits(&b.mu.rec) {
		return Info{}, false
	}
	rec := b.mu.rec
	if b.mu.leases > 0 {
		rec.LastActiveAt = time.Now().UTC()
	}
	info := rec.info()
	due := rec.pauseDue(time.Now())
	info.Pausing = due || rec.State == Running && !b.mu.pausingAt.IsZero()
	switch {
	case rec.State != Running:
	case due:
		info.PausedAt = rec.EndAt
	default:
		info.PausedAt = b.mu.pausingAt
	}
	return info, true
}

// init tells a guest of the sandbox, through a client g of it, what it is or what time it
// is. Called with the op lock held.
func (b *box) init(ctx context.Context, g Guest, in guest.Init) error {
	version, err := g.Init(ctx, in)
	if err == nil {
		b.op.envd = version
	}
	return err
}

// closeGuest ends the connections to the guest. Called with the op lock held.
func (b *box) closeGuest() {
	if b.op.guest != nil {
		b.op.guest.Close()
		b.setGuest(nil)
	}
}

// setGuest sets the client of this incarnation's guest. Called with the op lock held.
func (b *box) setGuest(g Guest) {
	b.op.guest = g
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.guest, b.mu.alive = g, b.op.alive
}

// cause says why an operation must end: the VM has ended, or ctx has. nil says that
// it need not. Called with the op lock held.
func (b *box) cause(ctx context.Context) error {
	for _, of := range []context.Context{b.op.alive, ctx} {
		if cause := context.Cause(of); cause != nil {
			return cause
		}
	}
	return nil
}

// while returns a context that ends with ctx or with this incarnation of the VM.
// Called with the op lock held.
func (b *box) while(ctx context.Context) (context.Context, context.CancelFunc) {
	return both(ctx, b.op.alive)
}

// both returns a context that ends when either does.
func both(ctx, other context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(other, func() { cancel(context.Cause(other)) })
	return ctx, func() { stop(); cancel(nil) }
}

// postpone sets when it is tried again to free what could not be freed.
func (b *box) postpone() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.failures++
	b.mu.retryAt = time.Now().Add(backOff(b.mu.failures))
}

// lookLater sets when the janitor looks at the sandbox again.
func (b *box) lookLater() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.looks++
	b.mu.lookAt = time.Now().Add(backOff(b.mu.looks))
}

// backOff is the pause after so many failures in a row.
func backOff(failures int) time.Duration {
	return min(retryFirst<<min(failures-1, 10), retryMost)
}
