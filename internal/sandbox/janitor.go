package sandbox

import (
	"context"
	"time"
)

// sweepEvery is how often the janitor looks around.
const sweepEvery = time.Second

// chore is what is due of a sandbox.
type chore string

const (
	choreNone      chore = ""
	choreExpire    chore = "expire"
	choreHibernate chore = "hibernate"
	choreFree      chore = "free again" // what could not be freed
	choreLook      chore = "look again" // at what could not be reached or read
	choreBroken    chore = "free"       // what a create left that panicked
	choreForget    chore = "forget"
)

// janitor expires, frees again and forgets.
type janitor struct{ *Manager }

// run does so until the manager's life ends.
func (j janitor) run() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			j.sweep(time.Now())
		case <-j.life.Done():
			return
		}
	}
}

// sweep starts what is due, each on its own goroutine: a stuck VM delays
// no other sandbox. One whose op lock is taken is left for the next time.
func (j janitor) sweep(now time.Time) {
	for _, b := range j.all() {
		if j.due(b, now) != choreNone && b.tryHold("freed") {
			j.goes("sweep", func() {
				defer b.unhold()
				j.attend(b, time.Now())
			})
		}
	}
}

// due says what is to be done.
func (j janitor) due(b *box, now time.Time) chore {
	rec := b.record()
	switch {
	case b.expired(now, j.cfg.KeepPaused) && rec.OnTimeout == HibernateOnTimeout && rec.State == Running:
		return choreHibernate
	case b.expired(now, j.cfg.KeepPaused):
		return choreExpire
	case b.retryDue(now):
		return choreFree
	case b.lookDue(now):
		return choreLook
	case rec.State == Creating, rec.State == Waiting && !j.pool.holds(b) && !b.failing():
		return choreBroken
	case rec.State == Stopped && !now.Before(rec.StateAt.Add(j.cfg.KeepStopped)):
		return choreForget
	}
	return choreNone
}

// attend does what is due, judged again under the op lock. Called with the op lock held.
func (j janitor) attend(b *box, now time.Time) {
	var err error
	switch j.due(b, now) {
	case choreHibernate:
		j.hibernateExpired(b)
	case choreExpire:
		err = j.release(b, Expired, "")
	case choreFree:
		if b.state() == Hibernated {
			err = j.freeHibernated(b)
		} else {
			err = j.release(b, b.record().Reason, "")
		}
	case choreLook:
		ctx, abort := context.WithCancelCause(j.life)
		defer abort(nil)
		b.setAbort(abort) // for a destroy
		err = j.lookInto(ctx, b)
	case choreBroken:
		err = j.release(b, CreateFailed, "the create broke off")
	case choreForget:
		err = j.forget(b)
	}
	if err != nil {
		j.log.Debug("chore not done", "sandbox", b.id, "err", err)
	}
}

// expired: nothing has happened in the sandbox for as long as it may stay so.
func (b *box) expired(now time.Time, keepPaused time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := &b.mu.rec
	// The clock has been put back: a sandbox gets no more time by that than once more.
	for _, at := range []*time.Time{&rec.LastActiveAt, &rec.StateAt} {
		if at.After(now) {
			*at = now
		}
	}
	switch {
	case b.mu.leases > 0:
		return false
	case rec.State == Running && b.mu.attempts > 0 && now.Before(b.mu.retryAt):
		return false
	case rec.State == Running:
		return rec.Timeout > 0 && !now.Before(rec.LastActiveAt.Add(rec.Timeout))
	case rec.State == Paused:
		return keepPaused > 0 && !now.Before(rec.StateAt.Add(keepPaused))
	default:
		return false
	}
}

// failing says whether something of the box could not be freed.
func (b *box) failing() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.failures > 0
}

// retryDue: what could not be freed is to be tried again.
func (b *box) retryDue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := &b.mu.rec
	unfinished := rec.State == Stopping || rec.State == Hibernated && rec.Slot != 0 || rec.State == Waiting && b.mu.failures > 0
	return unfinished && !now.Before(b.mu.retryAt)
}

// lookDue: the sandbox could not be reached, or its record not be read, and that is to
// be tried again.
func (b *box) lookDue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := &b.mu.rec
	marked := rec.Reason == Unreachable && (rec.State == Running || rec.State == Paused)
	return (marked || rec.State == Unknown && rec.Reason == Unreadable) && !now.Before(b.mu.lookAt)
}
