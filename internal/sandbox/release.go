package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// releaseTimeout bounds one attempt to free everything of a sandbox.
	releaseTimeout = 30 * time.Second
	// retryFirst and retryMost bound the pause before the next attempt.
	retryFirst = time.Second
	retryMost  = time.Minute
)

// Destroy ends a sandbox for good, whatever its state; a create in progress is
// aborted. Any number of callers may destroy the same sandbox: each returns
// when it is gone, or when ctx ends, with the rest done behind its back.
func (m *Manager) Destroy(ctx context.Context, id ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	return m.destroyBox(ctx, b)
}

func (m *Manager) destroyBox(ctx context.Context, b *box) error {
	result := make(chan error, 1)
	if !m.goes("destroy", func() { result <- m.destroy(b) }) {
		return errdefs.Unavailable.Errorf("the host has shut down")
	}
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (m *Manager) destroy(b *box) error {
	b.mu.Lock()
	if b.abort != nil {
		b.abort(errDestroyed)
	}
	b.mu.Unlock()
	// An aborted operation ends soon; the request need not wait for it.
	if err := b.hold(context.Background(), "destroyed"); err != nil {
		return err
	}
	defer b.unhold()
	if b.state() == Stopped {
		return m.forget(b)
	}
	return m.release(b, Destroyed, "")
}

// release frees all that a record names, and is the one way to do so: for a
// failed create, a destroy, an expiry, a dead VM and the start after a crash.
// What cannot be freed keeps the sandbox in stopping, to be tried again; its
// slot is not given away before. Called with the op lock held.
func (m *Manager) release(b *box, reason Reason, detail string) error {
	m.leavePool(b)
	if b.state() != Stopping {
		err := m.move(b, Stopping, func(r *Record) { r.Reason, r.Detail = reason, detail })
		if err != nil {
			return err
		}
	}
	b.kill(errdefs.Unavailable.Errorf("sandbox %s is gone: %s", b.id, reason))
	b.mu.Lock()
	guest := b.guest
	b.guest = nil
	b.mu.Unlock()
	if guest != nil {
		guest.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	rec := b.record()
	if err := m.free(ctx, b, rec); err != nil {
		m.postpone(b)
		m.log.Error("sandbox not freed, will try again", "sandbox", b.id, "reason", rec.Reason, "err", err)
		return errdefs.Unavailable.Errorf("sandbox %s is %s but not all of it could be freed yet; the host tries again by itself", b.id, rec.Reason)
	}
	if err := m.move(b, Stopped, func(r *Record) { r.VM = nil }); err != nil {
		return err
	}
	m.giveBack(b, rec)
	if rec.Reason == Destroyed || reason == Destroyed || rec.Warm != "" {
		return m.forget(b)
	}
	return nil
}

// free takes apart everything that the record names; "not there" is done. The
// VMM goes first, for it uses all the rest; one that an earlier agent started
// is found by its run directory.
func (m *Manager) free(ctx context.Context, b *box, rec Record) error {
	err := m.freeHost(ctx, b, rec)
	if serr := m.store.dropSnapshots(b.id); serr != nil {
		err = errors.Join(err, serr)
	}
	return err
}

// freeHost takes apart what a hibernated sandbox does not need either.
func (m *Manager) freeHost(ctx context.Context, b *box, rec Record) error {
	if b.vm != nil {
		if err := b.vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill vm: %w", err)
		}
	} else if _, err := m.cfg.KillStrays(ctx, m.cfg.RunDir, m.cgroups(), func(name string) bool { return name != string(b.id) }); err != nil {
		return fmt.Errorf("kill vm: %w", err)
	}
	var errs []error
	if rec.Slot != 0 {
		if err := m.cfg.Network.Close(ctx, rec.Slot); err != nil {
			errs = append(errs, fmt.Errorf("close network: %w", err))
		}
	}
	if err := os.RemoveAll(m.runDir(b.id)); err != nil {
		errs = append(errs, fmt.Errorf("remove run directory: %w", err))
	}
	if err := remove(m.store.overlay(b.id)); err != nil {
		errs = append(errs, fmt.Errorf("remove overlay: %w", err))
	}
	return errors.Join(errs...)
}

// giveBack returns the slot and the capacity of a freed record.
func (m *Manager) giveBack(b *box, rec Record) {
	if rec.Slot != 0 {
		if err := m.cfg.Network.Release(rec.Slot); err != nil {
			m.log.Error("slot not given back", "sandbox", rec.ID, "slot", rec.Slot, "err", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used = m.used.minus(rec.takes())
	if rec.Warm == "" {
		m.ends[rec.Reason]++
	}
	m.settled(b)
	m.pool.wake()
}

// settled ends a series of failures. Called with Manager.mu held.
func (m *Manager) settled(b *box) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures > 0 {
		m.pending--
		b.failures = 0
	}
}

// forget drops a stopped sandbox. Called with the op lock held.
func (m *Manager) forget(b *box) error {
	if err := m.store.forget(b.id); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boxes[b.id] == b {
		delete(m.boxes, b.id)
	}
	return nil
}

// sweepEvery is how often the janitor looks around.
const sweepEvery = time.Second

// janitor expires, retries and forgets until the manager's life ends.
func (m *Manager) janitor() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.sweep(time.Now())
		case <-m.life.Done():
			return
		}
	}
}

// sweep starts what is due, each on its own goroutine: a stuck VM delays
// nobody else. One whose op lock is taken is left for the next time.
func (m *Manager) sweep(now time.Time) {
	for _, b := range m.all() {
		if m.due(b, now) && b.tryHold("freed") {
			m.goes("sweep", func() {
				defer b.unhold()
				m.attend(b, time.Now())
			})
		}
	}
}

func (m *Manager) due(b *box, now time.Time) bool {
	return m.expired(b, now) || b.retryDue(now) || b.lookDue(now) || m.stale(b, now) || b.state() == Creating && !m.inPool(b)
}

// attend does what is due, judged again under the op lock.
func (m *Manager) attend(b *box, now time.Time) {
	switch {
	case m.expired(b, now) && b.record().OnTimeout == HibernateOnTimeout && b.state() == Running:
		m.hibernateExpired(b)
	case m.expired(b, now):
		m.release(b, Expired, "")
	case b.retryDue(now) && b.state() == Hibernated:
		_ = m.letGo(b)
	case b.retryDue(now):
		m.release(b, b.record().Reason, "")
	case b.lookDue(now):
		ctx, abort := context.WithCancelCause(m.life)
		defer abort(nil)
		b.mu.Lock()
		b.abort = abort // by who destroys it
		b.mu.Unlock()
		_ = m.lookInto(ctx, b)
	case b.state() == Creating && !m.inPool(b): // and nobody holds it: its create panicked
		m.release(b, CreateFailed, "the create broke off")
	case m.stale(b, now):
		if err := m.forget(b); err != nil {
			m.log.Error("record not forgotten", "sandbox", b.id, "err", err)
		}
	}
}

// expired: nothing has happened in the sandbox for as long as it may stay so.
func (m *Manager) expired(b *box, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	// The clock has been put back: nobody gets more time by that than once more.
	for _, at := range []*time.Time{&b.rec.LastActiveAt, &b.rec.StateAt} {
		if at.After(now) {
			*at = now
		}
	}
	switch {
	case b.leases > 0:
		return false
	case b.rec.State == Running && b.naps > 0 && now.Before(b.retryAt):
		return false
	case b.rec.State == Running:
		return b.rec.Timeout > 0 && !now.Before(b.rec.LastActiveAt.Add(b.rec.Timeout))
	case b.rec.State == Paused:
		return m.cfg.KeepPaused > 0 && !now.Before(b.rec.StateAt.Add(m.cfg.KeepPaused))
	default:
		return false
	}
}

func (b *box) retryDue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	unfinished := b.rec.State == Stopping || b.rec.State == Hibernated && b.rec.Slot != 0
	return unfinished && !now.Before(b.retryAt)
}

func (m *Manager) stale(b *box, now time.Time) bool {
	rec := b.record()
	return rec.State == Stopped && !now.Before(rec.StateAt.Add(m.cfg.KeepStopped))
}

// entropy is the seed that a guest gets from its host.
func entropy() []byte {
	b := make([]byte, 64)
	rand.Read(b)
	return b
}
