package sandbox

import (
	"context"
	"errors"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// releaseTimeout bounds one attempt to free everything of a sandbox.
	releaseTimeout = 30 * time.Second
	// retryFirst and retryMost bound the pause before the next attempt.
	retryFirst = time.Second
	retryMost  = time.Minute
)

// holdings gives sandboxes what they take of the host, and takes it back.
type holdings struct {
	*vms
	ledger *ledger
	pool   *pool
}

// Destroy ends a sandbox for good, whatever its state; a create in progress is
// aborted. Any number of callers may destroy the same sandbox: each returns
// when it is gone. When ctx ends first, the rest is done all the same.
func (m *Manager) Destroy(ctx context.Context, id ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	return m.destroy(ctx, b)
}

func (h *holdings) destroy(ctx context.Context, b *box) error {
	result := make(chan error, 1)
	if !h.goes("destroy", func() { result <- h.destroyNow(context.WithoutCancel(ctx), b) }) {
		return errdefs.Unavailable.Errorf("the host has shut down")
	}
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// destroyNow waits for the op lock however long an operation takes.
func (h *holdings) destroyNow(ctx context.Context, b *box) error {
	b.cancel(destroyed{errDestroyed, ctx})
	// An aborted operation ends soon; the request need not wait for it.
	if err := b.hold(ctx, "destroyed"); err != nil {
		return err
	}
	defer b.unhold()
	if b.state() == Stopped {
		return h.forget(b)
	}
	return h.release(b, Destroyed, "")
}

// release frees all that a record names, and is the one way to do so: for a
// failed create, a destroy, an expiry, a dead VM and the start after a crash.
// What cannot be freed keeps the sandbox in stopping, to be tried again; its
// slot is not given to another before. What is hidden stays in its state until it is
// forgotten. Called with the op lock held.
func (h *holdings) release(b *box, reason Reason, detail string) error {
	h.pool.drop(b)
	if s := b.state(); s != Stopping && !s.hidden() {
		err := h.move(b, Stopping, func(r *Record) { r.Reason, r.Detail = reason, detail })
		if err != nil {
			return err
		}
	}
	b.op.kill(errdefs.Unavailable.Errorf("sandbox %s is gone: %s", b.id, reason))
	b.closeGuest()
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	rec := b.record()
	hidden, destroyed := rec.State.hidden(), rec.Reason == Destroyed || reason == Destroyed
	err := h.free(ctx, b)
	if derr := h.store.dropSnapshots(b.id); derr != nil {
		err = errors.Join(err, derr)
	}
	if err == nil && (hidden || destroyed) {
		err = h.store.forget(b.id) // before another sandbox can have its slot
	}
	if err != nil {
		b.postpone()
		h.log.Error("sandbox not freed, will try again", "sandbox", b.id, "state", rec.State, "reason", rec.Reason, "err", err)
		return errdefs.Unavailable.Errorf("sandbox %s is %s but not all of it could be freed yet; the host tries again by itself", b.id, rec.Reason)
	}
	if hidden {
		h.log.Info(string(rec.State)+" guest freed", "sandbox", b.id, "reason", reason, "detail", detail)
	} else if err := h.stopped(b, destroyed); err != nil {
		return err
	}
	b.settled()
	h.releaseSlot(rec)
	h.ledger.give(b.id)
	if hidden || destroyed {
		h.drop(b)
	}
	if rec.State != Waiting {
		h.pool.wake() // there is room
	}
	return nil
}

// stopped notes that all of a sandbox is freed, and its files, too, if it was destroyed.
// Called with the op lock held.
func (r *registry) stopped(b *box, destroyed bool) error {
	save := r.save
	if destroyed {
		save = inMemory
	}
	err := r.moveWith(save, b, Stopped, func(r *Record) { r.VM = nil })
	if err == nil {
		r.countEnd(b.record().Reason)
	}
	return err
}

// releaseEnded frees a sandbox whose VM has ended, and says how. Called with the op
// lock held.
func (h *holdings) releaseEnded(b *box, exit vmm.Exit) {
	reason := VMExited
	if exit.Cause == vmm.OutOfMemory {
		reason = OutOfMemory
	}
	_ = h.release(b, reason, exit.String()+h.consoleEnd(b.id))
	h.pool.wake() // it may have been a waiting guest
}

// settled ends a series of failures.
func (b *box) settled() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.failures, b.mu.attempts, b.mu.refusals = 0, 0, 0
}
