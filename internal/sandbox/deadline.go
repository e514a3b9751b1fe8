package sandbox

import (
	"context"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// checkEnd says whether a sandbox can get this deadline; zero is none.
func checkEnd(at, now time.Time) error {
	if at.After(now.Add(MaxTimeout)) {
		return fmt.Errorf("deadline %s is more than %d s ahead", at.UTC().Format(time.RFC3339), MaxTimeout/time.Second)
	}
	return nil
}

// asEnd is a deadline as records have it.
func asEnd(at time.Time) time.Time {
	if at.IsZero() {
		return time.Time{}
	}
	return at.UTC().Truncate(time.Millisecond)
}

// SetDeadline sets when a sandbox ends, whatever happens in it, and what happens then;
// the zero time is never, an empty then leaves that as it is. A time that has passed
// ends a sandbox now that is running or paused. A hibernated one has no running
// deadline: it keeps a later one for when it is resumed.
func (m *Manager) SetDeadline(ctx context.Context, id ID, at time.Time, then OnTimeout) (Info, error) {
	err := checkEnd(at, time.Now())
	if err == nil && then != "" {
		err = then.check("on_deadline")
	}
	if err != nil {
		return Info{}, errdefs.InvalidArgument.Errorf("%w", err)
	}
	b, _, end, err := m.begin(ctx, id, OpDeadline, "given another deadline")
	if err != nil {
		return Info{}, err
	}
	err = m.save(b, func(r *Record) {
		r.EndAt = asEnd(at)
		if then != "" {
			r.OnEnd = then
		}
	})
	if err == nil {
		m.note(b, Updated, ActorOf(ctx))
	}
	info := b.info()
	end()
	m.wakeJanitor()
	return info, err
}

// endsAt is the deadline if it is running, zero if not.
func (r *Record) endsAt() time.Time {
	if r.State == Running || r.State == Paused {
		return r.EndAt
	}
	return time.Time{}
}

// ended says whether a running deadline has passed.
func (r *Record) ended(now time.Time) bool { return passed(r.endsAt(), now) }

// pauseDue says whether a deadline has passed that hibernates the sandbox.
func (r *Record) pauseDue(now time.Time) bool { return r.ended(now) && r.OnEnd.pauses() }

// idleEnd is when a sandbox ends in which nothing happens, and what happens then; zero
// is never.
func (r *Record) idleEnd(keepPaused time.Duration) (at time.Time, then OnTimeout) {
	switch {
	case r.State == Running && r.Timeout > 0:
		return r.LastActiveAt.Add(r.Timeout), r.OnTimeout
	case r.State == Paused && keepPaused > 0:
		return r.StateAt.Add(keepPaused), DestroyOnTimeout
	}
	return time.Time{}, ""
}

// passed says whether a time has come; the zero time never does.
func passed(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// expiry says what is due of a sandbox whose idle timeout or deadline has passed,
// whichever came first; empty if neither has.
func (b *box) expiry(now time.Time, keepPaused time.Duration) OnTimeout {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := &b.mu.rec
	// The clock has been put back: a sandbox gets no more time by that than once more.
	for _, at := range []*time.Time{&rec.LastActiveAt, &rec.StateAt} {
		if at.After(now) {
			*at = now
		}
	}
	idleAt, then := rec.idleEnd(keepPaused)
	idle := b.mu.leases == 0 && passed(idleAt, now)
	failed := b.mu.attempts > 0 // to hibernate
	switch {
	case !rec.ended(now) && !idle:
		return ""
	case rec.ended(now) && (!idle || rec.EndAt.Before(idleAt) || failed && !rec.OnEnd.pauses()):
		then = rec.OnEnd
	}
	if !then.pauses() {
		return DestroyOnTimeout
	}
	if failed && now.Before(b.mu.retryAt) {
		return ""
	}
	return then
}
