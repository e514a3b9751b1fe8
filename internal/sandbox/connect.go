package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// minWokenLife is how long a sandbox lives at least that traffic resumed.
	minWokenLife = 5 * time.Minute
	// wakeWait bounds how long traffic waits for an operation in progress, a pause
	// before all, before the sandbox can be resumed.
	wakeWait = time.Minute
	// wakePause is how long traffic does not try again to resume a sandbox that could not
	// be resumed: each attempt may read all of its memory.
	wakePause = 5 * time.Second
	// connectTries is how often a sandbox is resumed for one caller if it is paused again
	// before the caller has it.
	connectTries = 3
)

// ConnectRequest asks that a sandbox runs, and for how long.
type ConnectRequest struct {
	// Timeout is from now on. It shortens no life; zero gives none.
	Timeout time.Duration
	// FilesOnly boots a hibernated sandbox from its disk.
	FilesOnly bool
	// PausedOnly refuses a running sandbox with errdefs.WrongState.
	PausedOnly bool
	// OnEnd replaces what happens at the end unless it is empty.
	OnEnd OnTimeout
}

func (r ConnectRequest) check() error {
	err := checkTimeout(r.Timeout)
	if err == nil && r.OnEnd != "" {
		err = r.OnEnd.check("on_end")
	}
	if err != nil {
		return errdefs.InvalidArgument.Errorf("%w", err)
	}
	return nil
}

// lifetime is what a sandbox that begins to run gets of time. The zero lifetime leaves
// all as it is.
type lifetime struct {
	// life is from the moment at which the sandbox runs until its deadline; 0 leaves the
	// deadline as it is.
	life time.Duration
	// onEnd is what happens then; empty leaves that as it is.
	onEnd OnTimeout
}

// begin changes the record of a sandbox that has just begun to run.
func (l lifetime) begin(r *Record) {
	if l.life > 0 {
		r.EndAt = asEnd(r.StartedAt.Add(l.life))
	}
	if l.onEnd != "" {
		r.OnEnd = l.onEnd
	}
}

// resuming says how a paused or hibernated sandbox goes on.
type resuming struct {
	lifetime
	// filesOnly boots a hibernated sandbox from its disk.
	filesOnly bool
}

// begin is lifetime's. A deadline that has passed would end the sandbox at once.
func (r resuming) begin(rec *Record) {
	r.lifetime.begin(rec)
	if passed(rec.EndAt, rec.StartedAt) {
		rec.EndAt = time.Time{}
	}
}

// resumption is one resume, for all callers that come while it is under way.
type resumption struct {
	done      chan struct{}
	filesOnly bool
	// Set before done is closed: what came of it, and when.
	err   error
	ended time.Time
}

func (r *resumption) underWay() bool {
	if r == nil {
		return false
	}
	select {
	case <-r.done:
		return false
	default:
		return true
	}
}

// Connect lets a sandbox run at least until Timeout from now. It waits, within ctx, for
// an operation in progress. The deadline of a running sandbox only moves to a later
// time. A paused or hibernated one is resumed, once for all callers that come at the
// same time, and goes on being resumed when they leave; resumed is true for each of
// them.
func (m *Manager) Connect(ctx context.Context, id ID, req ConnectRequest) (info Info, resumed bool, err error) {
	if err := req.check(); err != nil {
		return Info{}, false, err
	}
	b, err := m.find(id)
	if err != nil {
		return Info{}, false, err
	}
	if r := b.resumption(); req.FilesOnly && r.underWay() && !r.filesOnly {
		return Info{}, false, errdefs.WrongState.Errorf("sandbox %s is being resumed with its memory", id)
	}
	life := lifetime{req.Timeout, req.OnEnd}
	resumed, err = m.ensureRuns(ctx, b, ctx, func(rec Record, resumed bool) (*resuming, error) {
		switch {
		case rec.State != Running:
			return &resuming{life, req.FilesOnly}, nil
		case req.PausedOnly && !resumed:
			return nil, errdefs.WrongState.Errorf("sandbox %s is already running", id)
		}
		return nil, m.extend(b, life, resumed)
	})
	if err != nil {
		return Info{}, false, fmt.Errorf("connect to sandbox %s: %w", id, err)
	}
	return b.info(), resumed, nil
}

// Wake resumes a paused or hibernated sandbox for a call that came for it, once for all
// that come at the same time: errdefs.WrongState if it is not to be resumed so. It waits
// a minute at most for an operation in progress, then it is errdefs.Busy. The sandbox
// lives as long as after its create, and minWokenLife at least, if its life was bounded
// then. nil says that it runs.
func (m *Manager) Wake(ctx context.Context, id ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, wakeWait)
	defer cancel()
	_, err = m.ensureRuns(ctx, b, patience, func(rec Record, resumed bool) (*resuming, error) {
		var life lifetime
		if rec.Life > 0 {
			life.life = min(max(rec.Life, minWokenLife), m.cfg.maxLife())
		}
		switch due := rec.pauseDue(time.Now()); {
		case rec.State == Running && !due:
			return nil, nil
		case !rec.AutoResume, rec.FilesOnly, rec.OnEnd == HibernateFilesOnTimeout:
			return nil, errdefs.WrongState.Errorf("sandbox %s is %s, and no call resumes it", id, rec.State)
		case rec.State == Running: // a pause and a resume would come to the same
			return nil, m.extend(b, life, false)
		}
		return &resuming{lifetime: life}, b.failedToResume(time.Now().Add(-wakePause))
	})
	if err != nil {
		return fmt.Errorf("wake sandbox %s: %w", id, err)
	}
	return nil
}

// ensureRuns resumes a sandbox if decide says so. It calls decide with the op lock held,
// which it takes within patience; resumed is true after a resume that the caller shared.
// It waits for that within ctx.
func (m *Manager) ensureRuns(
	ctx context.Context, b *box, patience context.Context, decide func(rec Record, resumed bool) (*resuming, error),
) (resumed bool, err error) {
	last := b.resumption()
	for range connectTries {
		r := b.resumption()
		if !r.underWay() {
			if err := m.take(patience, b, OpConnect, "resumed"); err != nil {
				return false, err
			}
			// A resume that came and went while this caller waited was the caller's, too.
			r = b.resumption()
			resumed = resumed || r != last && r.err == nil
			want, err := decide(b.record(), resumed)
			if want != nil && r != last && r.err != nil {
				err = r.err
			}
			if want == nil || err != nil {
				b.unhold()
				return resumed, err
			}
			r = m.resumeForAll(b, *want)
		}
		select {
		case <-r.done:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		if r.err != nil {
			return false, r.err
		}
		resumed, last = true, r
	}
	return false, errdefs.Busy.Errorf("it was paused again as soon as it ran")
}

// resumeForAll begins to resume a sandbox for all who ask for that until it is done.
// Called with the op lock held, which it gives back when that is over.
func (m *Manager) resumeForAll(b *box, want resuming) *resumption {
	r := &resumption{done: make(chan struct{}), filesOnly: want.filesOnly, err: errShutDown}
	b.setResumption(r)
	ctx, end := m.bounded(m.life, b, OpConnect)
	if !m.goes("resume", func() {
		defer close(r.done)
		defer end()
		err := m.resume(ctx, b, want)
		r.ended = time.Now()
		switch {
		case errors.Is(err, errDestroyed):
			r.err = check(b.id, OpConnect, Stopping)
		case m.life.Err() == nil:
			r.err = err
		}
	}) {
		end()
		close(r.done)
	}
	return r
}

// extend moves the deadline of a sandbox that runs to a later time. One that was
// resumed for several callers has all their lives from the same moment on. Called with
// the op lock held.
func (r *registry) extend(b *box, l lifetime, resumed bool) error {
	rec := b.record()
	from := time.Now()
	if resumed {
		from = rec.StartedAt
	}
	end := asEnd(from.Add(l.life))
	if rec.EndAt.IsZero() || !end.After(rec.EndAt) {
		end = rec.EndAt
	}
	if l.onEnd == "" {
		l.onEnd = rec.OnEnd
	}
	if end.Equal(rec.EndAt) && l.onEnd == rec.OnEnd {
		return nil
	}
	err := r.save(b, func(r *Record) { r.EndAt, r.OnEnd = end, l.onEnd })
	if err == nil && !resumed { // which is an event of its own
		r.note(b, Updated, b.op.actor)
	}
	return err
}

// SetEnd moves the deadline of a running sandbox, at once; with extend, only to a later
// time. A time that has passed ends it now: what happens then is what would have
// happened at the deadline, and has happened when SetEnd returns if it is a destroy.
func (m *Manager) SetEnd(ctx context.Context, id ID, at time.Time, extend bool) error {
	if err := checkEnd(at, time.Now()); err != nil {
		return errdefs.InvalidArgument.Errorf("%w", err)
	}
	if at.IsZero() {
		return errdefs.InvalidArgument.Errorf("no end is named")
	}
	b, _, end, err := m.begin(ctx, id, OpEnd, "given another end")
	if err != nil {
		return err
	}
	defer m.wakeJanitor()
	defer end()
	rec := b.record()
	if extend && (rec.EndAt.IsZero() || !asEnd(at).After(rec.EndAt)) {
		return nil
	}
	if err = m.save(b, func(r *Record) { r.EndAt = asEnd(at) }); err == nil {
		m.note(b, Updated, ActorOf(ctx))
	}
	if now := time.Now(); err == nil && passed(at, now) && rec.OnEnd == DestroyOnTimeout {
		janitor{m}.attend(b, now)
	}
	return err
}

// Tokens are the secrets of a sandbox, the same for its whole life.
type Tokens struct {
	// Envd is what the guest demands of its callers, Traffic what the ports of the
	// sandbox's own servers demand; that is empty if they are public.
	Envd, Traffic string
}

// String tells no secret.
func (Tokens) String() string { return "tokens of a sandbox" }

// Tokens returns the secrets of a sandbox that has not ended. It never waits for an
// operation.
func (r *registry) Tokens(id ID) (Tokens, error) {
	b, err := r.find(id)
	if err != nil {
		return Tokens{}, err
	}
	rec := b.record()
	if rec.State == Stopping || rec.State == Stopped {
		return Tokens{}, errdefs.NotFound.Errorf("sandbox %s has ended", id)
	}
	return Tokens{Envd: rec.Token, Traffic: rec.TrafficToken}, nil
}

// WithTokens returns the sandbox whose secrets fit, of those that have not ended. fits is
// called for each, so that the time it takes says nothing about which; it must not call
// the manager.
func (r *registry) WithTokens(fits func(Tokens) bool) (found ID, ok bool) {
	for _, b := range r.all() {
		rec := b.record()
		if rec.State.hidden() || rec.State == Stopping || rec.State == Stopped {
			continue
		}
		if fits(Tokens{Envd: rec.Token, Traffic: rec.TrafficToken}) {
			found, ok = b.id, true
		}
	}
	return found, ok
}

// resumption returns the last resume of the box by resumeForAll; nil if there was none.
func (b *box) resumption() *resumption {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.resumption
}

// failedToResume is the error of the last such resume if it failed after a time. Called
// with the op lock held.
func (b *box) failedToResume(after time.Time) error {
	if r := b.resumption(); r != nil && r.ended.After(after) {
		return r.err
	}
	return nil
}

func (b *box) setResumption(r *resumption) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.resumption = r
}
