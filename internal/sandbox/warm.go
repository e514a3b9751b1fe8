package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// warmCalm is how long nobody must have started a sandbox before a guest is
	// made ahead: neither a create nor the first command of the sandbox just
	// made has to share the CPUs with it.
	warmCalm = time.Second
	// warmLook is how often the pool is looked at when nothing happens: a
	// guest of another kernel or envd than today's is of no use.
	warmLook = 30 * time.Second
)

// errMakeWay ends the making of a guest whose room a sandbox needs.
var errMakeWay = errdefs.Busy.Errorf("a sandbox needs the room")

// pool is the guests that wait for the sandboxes that they will be: restored
// from the ready snapshot, rehearsed, and told nothing yet. Each has a record,
// in creating and marked as warm, so that whatever happens to the agent they
// are freed as any half-made sandbox is. Guarded by Manager.mu.
type pool struct {
	waiting []*box // the oldest first
	// making is closed when no more guest is on its way into the pool, nil if
	// none is; stop ends its making.
	making chan struct{}
	stop   context.CancelCauseFunc
	// stirred is when somebody last started a sandbox.
	stirred time.Time
	// woken has an element when there is something to look at.
	woken chan struct{}
}

func (p *pool) wake() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// waits says whether the box is no sandbox yet, and nobody's business.
func (b *box) waits() bool { return b.record().Warm != "" }

// inPool says whether a guest waits for its sandbox. Who takes it out of the
// pool has its op lock.
func (m *Manager) inPool(b *box) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.pool.waiting, b)
}

func (m *Manager) leavePool(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pool.waiting = slices.DeleteFunc(m.pool.waiting, func(w *box) bool { return w == b })
}

// stir notes that somebody starts a sandbox, or has started one.
func (m *Manager) stir() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pool.stirred = time.Now()
	m.pool.wake()
}

// takeOut takes the oldest waiting guest that fits out of the pool, its op lock
// held; nil if there is none.
func (m *Manager) takeOut(doing string, abort context.CancelCauseFunc, fits func(Record) bool) *box {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.draining { // Shutdown ends them
		return nil
	}
	for i, b := range m.pool.waiting {
		// One whose lock is taken has lost its VM.
		if !fits(b.record()) || !b.tryHold(doing) {
			continue
		}
		m.pool.waiting = slices.Delete(m.pool.waiting, i, i+1)
		b.mu.Lock()
		b.abort = abort
		b.mu.Unlock()
		return b
	}
	return nil
}

// createWarm makes a sandbox of a guest that waits for one of its kind. It says
// so if there is none, or none that still answers.
func (m *Manager) createWarm(ctx context.Context, req CreateRequest, tmpl template.Template) (_ Created, ok bool, err error) {
	if m.cfg.Warm == 0 {
		return Created{}, false, nil
	}
	var took phases
	took.begin()
	took.from = FromWarm
	began := time.Now().UTC()
	key, err := m.kindKey(ctx, req, tmpl)
	if err != nil {
		return Created{}, false, nil // whoever makes one from scratch says why
	}
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	m.stir()
	defer m.stir()
	for {
		b := m.takeOut("created", abort, func(r Record) bool { return r.Warm == key && r.Template == req.Template })
		if b == nil {
			return Created{}, false, nil
		}
		took.end("reserve")
		err := m.handOut(ctx, b, req, began, &took)
		if err == nil {
			return took.created(b), true, nil
		}
		if cause := context.Cause(ctx); cause != nil {
			return Created{}, false, fmt.Errorf("create sandbox: %w", cause)
		}
		if errdefs.ClassOf(err) == errdefs.NotFound { // no guest has that user
			return Created{}, false, fmt.Errorf("create sandbox: %w", err)
		}
		m.log.Warn("warm guest of no use", "sandbox", b.id, "err", err)
	}
}

// handOut tells a guest that waited who it is, and makes a sandbox of its
// record. Before that it is nobody's, on disk too. Called with the op lock
// held, which it gives back; on error nothing is left of the guest.
func (m *Manager) handOut(ctx context.Context, b *box, req CreateRequest, began time.Time, took *phases) (err error) {
	defer func() {
		if err != nil {
			m.release(b, CreateFailed, err.Error())
		}
		b.unhold()
	}()
	ctx, cancel := both(ctx, b.alive)
	defer cancel()
	// In place before the first of the user's code, which comes after Init.
	rec := b.record()
	if rec.Network = req.Network.clone(); !rec.Network.IsZero() {
		if err := m.setNetwork(ctx, rec); err != nil {
			return err
		}
		took.end("network")
	}
	wake, cancelWake := context.WithTimeoutCause(ctx, wakeTimeout,
		errdefs.Unavailable.Errorf("the waiting guest did not answer within %s", wakeTimeout))
	defer cancelWake()
	rec.Login = req.Login
	if err := b.guest.Init(wake, identity(rec, true)); err != nil {
		return m.bootFailed(b, "initialise guest", err)
	}
	took.end("init")
	err = m.move(b, Running, func(r *Record) {
		r.Warm, r.CreatedAt = "", began
		r.Timeout, r.OnTimeout, r.Network, r.Login = req.Timeout, req.OnTimeout, rec.Network, rec.Login
	})
	if err == nil {
		took.end("commit")
		took.log(m.log, b)
	}
	return err
}

// giveUpWarm ends a guest that waits, the oldest first, so that a sandbox has
// the room that it needs; false if there is none, or if all of them together
// would not do.
func (m *Manager) giveUpWarm(ctx context.Context, need Resources) bool {
	m.stir()
	m.mu.Lock()
	making, stop := m.pool.making, m.pool.stop
	used, limit := m.used.plus(need), m.cfg.Capacity.Resources
	for _, b := range m.boxes {
		if b.waits() {
			used = used.minus(b.record().takes())
		}
	}
	m.mu.Unlock()
	if making != nil { // it takes room as well
		stop(errMakeWay)
		select {
		case <-making:
			return true
		case <-ctx.Done():
			return false
		}
	}
	if !used.within(limit) {
		return false
	}
	b := m.takeOut("given up", nil, func(Record) bool { return true })
	if b == nil {
		return false
	}
	defer b.unhold()
	return m.release(b, Destroyed, "a sandbox needs the room") == nil
}

// keepWarm keeps the pool full until the manager's life ends. It makes one
// guest at a time, and only while nobody starts a sandbox.
func (m *Manager) keepWarm() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	failures, retryAt := 0, time.Time{}
	for {
		select {
		case <-m.life.Done():
			return
		case <-m.pool.woken:
		case <-timer.C:
		}
		if wait := max(m.untilCalm(), time.Until(retryAt)); wait > 0 {
			timer.Reset(wait)
			continue
		}
		made, err := m.refill()
		again := warmLook
		switch {
		case m.Draining():
			return
		case err == nil:
			failures, retryAt = 0, time.Time{}
			if made {
				again = 0
			}
		case errors.Is(err, errdefs.Exhausted), errors.Is(err, errMakeWay):
			// The room is needed for sandboxes: not before somebody gives some
			// back, or the next look.
			m.log.Debug("no room for a warm guest", "err", err)
		default:
			failures++
			again = backOff(failures)
			retryAt = time.Now().Add(again)
			m.log.Warn("warm guest not made", "failures", failures, "err", err)
		}
		timer.Reset(again)
	}
}

// untilCalm is how long to wait before the CPUs may be taken for a guest that
// nobody asked for.
func (m *Manager) untilCalm() time.Duration {
	calm := warmCalm
	if m.cfg.warmCalm != 0 {
		calm = m.cfg.warmCalm
	}
	if len(m.starts) > 0 { // whose ends wake us
		return warmLook
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Until(m.pool.stirred.Add(calm))
}

// refill ends the guests in the pool that are out of date, and makes one if there
// are too few.
func (m *Manager) refill() (made bool, err error) {
	ctx, abort := context.WithCancelCause(m.life)
	defer abort(nil)
	making := make(chan struct{})
	m.mu.Lock()
	m.pool.making, m.pool.stop = making, abort
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.pool.making = nil
		m.mu.Unlock()
		close(making)
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.BootTimeout,
		errdefs.Unavailable.Errorf("the guest was not ready within %s", m.cfg.BootTimeout))
	defer cancel()
	var req CreateRequest
	if err := req.check(); err != nil {
		return false, err
	}
	tmpl, err := m.cfg.Templates.Get(req.Template)
	if err == nil {
		req.warm, err = m.kindKey(ctx, req, tmpl)
	}
	if err != nil {
		return false, err
	}
	for {
		old := m.takeOut("replaced", nil, func(r Record) bool { return r.Warm != req.warm })
		if old == nil {
			break
		}
		err := m.release(old, Destroyed, "it is out of date")
		old.unhold()
		if err != nil {
			return false, err
		}
	}
	m.mu.Lock()
	full := len(m.pool.waiting) >= m.cfg.Warm
	m.mu.Unlock()
	if full {
		return false, nil
	}
	ready, err := m.cfg.Templates.Ready(ctx, tmpl.Name, req.warm)
	if errors.Is(err, errdefs.NotFound) || errors.Is(err, errdefs.Corrupt) {
		return false, nil // the first create makes it, and wakes us
	}
	if err != nil {
		return false, err
	}
	if err := m.warmUp(ctx, req, tmpl, ready, abort); err != nil {
		return false, err
	}
	return true, nil
}

// warmUp restores a guest and puts it into the pool.
func (m *Manager) warmUp(ctx context.Context, req CreateRequest, tmpl template.Template, ready template.Ready, abort context.CancelCauseFunc) error {
	var took phases
	took.begin()
	b, err := m.reserve(ctx, req, tmpl.BaseSHA256, abort)
	if err != nil {
		return err
	}
	defer b.unhold()
	took.end("reserve")
	from := origin{key: req.warm, ready: ready}
	err = m.prepare(ctx, b, &from, &took)
	if err == nil && from.ready.Dir == "" {
		err = errors.New(from.why)
	}
	if err == nil {
		took.begin()
		err = m.load(ctx, b, tmpl, memory{dir: from.ready.Dir}, &took)
	}
	if err == nil {
		// What it does for its sandbox first it has done once: translated code
		// is as good as kept.
		var cancel context.CancelFunc
		ctx, cancel = both(ctx, b.alive)
		defer cancel()
		if err = b.guest.Quiesce(ctx, true); err != nil {
			err = m.bootFailed(b, "rehearse guest", err)
		}
		took.end("rehearse")
	}
	m.mu.Lock()
	if err == nil {
		if err = context.Cause(ctx); err == nil && m.draining {
			err = errdefs.Unavailable.Errorf("the host is shutting down")
		}
	}
	if err == nil {
		m.pool.waiting = append(m.pool.waiting, b)
	}
	m.mu.Unlock()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		m.release(b, CreateFailed, err.Error())
		return err
	}
	m.log.Info("warm guest waits", append([]any{"sandbox", b.id}, took.attrs...)...)
	return nil
}
