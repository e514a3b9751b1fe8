package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// Lease is the right to call a guest. While one is held the sandbox counts as
// active, unless it is from Glance.
type Lease struct {
	// Addr is where the guest is reached from the host.
	Addr netip.Addr
	// Token is what the guest demands.
	Token string
	// Alive ends when this incarnation of the VM does; its cause is classed.
	Alive context.Context

	// marked is not nil if the guest did not answer when it was last asked.
	marked  error
	guest   Guest
	release func()
}

// Context returns a context that ends with ctx or with the VM.
func (l *Lease) Context(ctx context.Context) (context.Context, context.CancelFunc) {
	return both(ctx, l.Alive)
}

// endedWithin is how long after its last connection a VM is seen to be gone.
const endedWithin = time.Second

// Ended says why this incarnation of the VM ended: a call to its guest broke off
// for that reason. nil says that the VM lives. A connection breaks a moment
// before the VM is seen to be gone, so it waits for that a little, within ctx.
func (l *Lease) Ended(ctx context.Context) error {
	timer := time.NewTimer(endedWithin)
	defer timer.Stop()
	select {
	case <-l.Alive.Done():
	case <-timer.C:
	case <-ctx.Done():
	}
	return context.Cause(l.Alive)
}

// Release ends the lease; further calls do nothing, nor does one on a lease that
// no manager gave.
func (l *Lease) Release() {
	if l.release != nil {
		l.release()
	}
}

// Lease takes a lease on a running sandbox. It waits, within ctx, for an
// operation in progress.
func (r *registry) Lease(ctx context.Context, id ID) (*Lease, error) {
	return r.lease(ctx, id, func(b *box) (release func()) {
		b.beginLease()
		return sync.OnceFunc(func() { r.endLease(b) })
	})
}

// Glance is Lease for a caller that has not shown that it may use the sandbox: its call
// is no activity and keeps nothing from ending.
func (r *registry) Glance(ctx context.Context, id ID) (*Lease, error) {
	return r.lease(ctx, id, func(*box) func() { return nil })
}

// lease takes a lease. It calls begin with the op lock held.
func (r *registry) lease(ctx context.Context, id ID, begin func(*box) (release func())) (*Lease, error) {
	b, err := r.find(id)
	if err != nil {
		return nil, err
	}
	if err := check(id, OpCall, b.state()); err != nil {
		return nil, err
	}
	if err := b.hold(ctx, "called"); err != nil {
		return nil, err
	}
	defer b.unhold()
	if err := b.full(OpCall); err != nil {
		return nil, err
	}
	rec := b.record()
	if err := check(id, OpCall, rec.State); err != nil {
		return nil, err
	}
	var marked error
	if rec.Reason == Unreachable {
		marked = unreached(rec)
	}
	return &Lease{
		Addr: rec.HostIP, Token: rec.Token, Alive: b.op.alive, marked: marked, guest: b.op.guest, release: begin(b),
	}, nil
}

func (b *box) beginLease() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.leases++
	b.mu.attempts, b.mu.refusals = 0, 0
}

func (b *box) endLease(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.leases--
	b.mu.rec.LastActiveAt = now
}

// endLease notes on disk, too, that the sandbox was active.
func (r *registry) endLease(b *box) {
	now := time.Now().UTC()
	b.endLease(now)
	r.touch(b, now)
}

// active notes that the sandbox was active now.
func (r *registry) active(b *box) {
	now := time.Now().UTC()
	b.mu.Lock()
	b.mu.rec.LastActiveAt = now
	b.mu.Unlock()
	r.touch(b, now)
}

// touch notes on disk when the sandbox was active.
func (r *registry) touch(b *box, now time.Time) {
	if err := r.store.touch(b.id, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.log.Warn("activity not noted", "sandbox", b.id, "err", err)
	}
}

// Command is what Exec runs, Result what came of it.
type (
	Command = guest.Command
	Result  = guest.Result
)

// Exec runs one command in a running sandbox, or in one that Wake resumes for it. When
// the VM dies before the command ends the error is Unavailable.
func (m *Manager) Exec(ctx context.Context, id ID, cmd Command) (Result, error) {
	for range connectTries {
		b, err := m.find(id)
		if err != nil {
			return Result{}, err
		}
		rec := b.record()
		if !rec.AutoResume || rec.State != Paused && rec.State != Hibernated {
			break
		}
		if err := m.Wake(ctx, id); err != nil {
			return Result{}, fmt.Errorf("exec: %w", err)
		}
	}
	return m.registry.Exec(ctx, id, cmd)
}

// Exec runs one command in a running sandbox.
func (r *registry) Exec(ctx context.Context, id ID, cmd Command) (Result, error) {
	lease, err := r.Lease(ctx, id)
	if err != nil {
		return Result{}, err
	}
	defer lease.Release()
	ctx, cancel := lease.Context(ctx)
	defer cancel()
	if lease.marked != nil {
		probe, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		if err := lease.guest.WaitReady(probe); err != nil {
			return Result{}, fmt.Errorf("exec in sandbox %s: %w", id, lease.marked)
		}
	}
	result, err := lease.guest.Exec(ctx, cmd)
	if err != nil {
		if errors.Is(err, errdefs.Unavailable) {
			if ended := lease.Ended(ctx); ended != nil {
				err = ended
			}
		}
		return result, fmt.Errorf("exec in sandbox %s: %w", id, r.stillFull(id, err))
	}
	return result, nil
}

// stillFull returns the error of a call that was not answered in time, or that the
// disk is full if that has stopped the sandbox.
func (r *registry) stillFull(id ID, err error) error {
	if !errors.Is(err, errdefs.TimedOut) {
		return err
	}
	if info, gerr := r.Get(id); gerr == nil && info.Reason == DiskFull {
		return errDiskFull(id)
	}
	return err
}
