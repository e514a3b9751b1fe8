package sandbox

import (
	"context"
	"time"
)

// expireMost is how many sandboxes expire at the same time at most, in each of the two
// ways: guests that are slow to hibernate keep no other sandbox from its end.
const expireMost = 20

// sweepEvery is how often the janitor looks around at least. It does so at each
// deadline, too.
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
	timer := time.NewTimer(sweepEvery)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-j.woken:
		case <-j.life.Done():
			return
		}
		next := j.sweep(time.Now())
		timer.Reset(max(min(time.Until(next), sweepEvery), time.Millisecond))
	}
}

// wakeJanitor has the janitor look around now.
func (m *Manager) wakeJanitor() {
	select {
	case m.woken <- struct{}{}:
	default:
	}
}

// sweep starts what is due, each on its own goroutine: a stuck VM delays
// no other sandbox. One whose op lock is taken is left for the next time. It returns
// when the next deadline is, if there is one soon.
func (j janitor) sweep(now time.Time) (next time.Time) {
	next = now.Add(sweepEvery)
	for _, b := range j.all() {
		rec := b.record()
		if at := rec.endsAt(); at.After(now) && at.Before(next) {
			next = at
		}
		if chore := j.due(b, now); chore != choreNone {
			j.dispatch(b, chore)
		}
	}
	return next
}

// dispatch starts what is due of a sandbox, unless its op lock is taken, or as many
// expire as may at the same time.
func (j janitor) dispatch(b *box, chore chore) {
	turns := j.expiring[chore]
	if turns != nil {
		select {
		case turns <- struct{}{}:
		default:
			return
		}
	}
	if !b.tryHold("freed") {
		if turns != nil {
			<-turns
		}
		return
	}
	j.goes("sweep", func() {
		defer j.expired(turns)
		defer b.unhold()
		j.attend(b, time.Now())
	})
}

// expired lets another sandbox expire, now if one had to wait.
func (j janitor) expired(turns chan struct{}) {
	if turns == nil {
		return
	}
	full := len(turns) == cap(turns)
	<-turns
	if full {
		j.wakeJanitor()
	}
}

// due says what is to be done.
func (j janitor) due(b *box, now time.Time) chore {
	expiry := b.expiry(now, j.cfg.KeepPaused)
	rec := b.record()
	switch {
	case expiry.pauses():
		return choreHibernate
	case expiry != "":
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
		j.hibernateExpired(b, Hibernation{FilesOnly: b.expiry(now, j.cfg.KeepPaused) == HibernateFilesOnTimeout})
	case choreExpire:
		detail := ""
		if rec := b.record(); rec.ended(now) {
			detail = "its deadline has passed"
		}
		err = j.release(b, Expired, detail)
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
	unfinished := rec.State == Stopping || rec.State == Hibernated && rec.Slot != 0 || rec.State.hidden() && b.mu.failures > 0
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
