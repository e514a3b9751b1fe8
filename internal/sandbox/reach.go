package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// adoptTimeout bounds one attempt to reach a VM and its guest, and how long
	// the agent's start waits for those that an earlier agent left.
	adoptTimeout = 10 * time.Second
	// probeTimeout bounds the question whether a guest answers that did not when
	// it was last asked.
	probeTimeout = 5 * time.Second
)

// errGone says that a VM has been proven not to be there any more. No other error
// does.
var errGone = errors.New("the vm is gone")

// reach brings VM, network and guest to what the record says: an agent may have
// died, or given up, between the VM's change and the record's. It does as much of
// it as it can. Called with the op lock held.
func (m *Manager) reach(ctx context.Context, b *box) error {
	rec := b.record()
	ctx, cancel := context.WithTimeoutCause(ctx, adoptTimeout, errdefs.Unavailable.Errorf("there was no answer within %s", adoptTimeout))
	defer cancel()
	if rec.VM == nil {
		return errors.New("the record names no vm")
	}
	attached := m.attach(ctx, b, rec)
	if errors.Is(attached, errGone) {
		return attached
	}
	// The host's policy may be another one now, and what an agent did for a
	// policy ended with it.
	err := errors.Join(attached, m.setNetwork(ctx, rec))
	if err != nil {
		return err
	}
	if rec.State == Paused {
		if err := b.op.vm.Pause(ctx); err != nil {
			return fmt.Errorf("keep vm paused: %w", err)
		}
		return nil
	}
	if m.disk.leaveStalled(b) {
		return nil // it goes on when there is room
	}
	if err := b.op.vm.Resume(ctx); err != nil {
		return fmt.Errorf("keep vm running: %w", err)
	}
	ctx, cancelBoth := b.while(ctx)
	defer cancelBoth()
	err = thaw(ctx, b)
	b.setFar(err != nil)
	if err != nil {
		return fmt.Errorf("ask guest: %w", err)
	}
	return nil
}

// attach takes up the VM of a record, if that is not done yet. A guest may answer though
// its VMM does not, so it has a client in any case. Called with the op lock held.
func (v *vms) attach(ctx context.Context, b *box, rec Record) error {
	if b.op.vm != nil {
		select {
		case <-b.op.vm.Done():
			return errGone
		default:
		}
		if b.op.guest == nil { // its record was not believed before
			b.setGuest(v.cfg.Guests(rec.HostIP, rec.Token))
		}
		return nil
	}
	vm, err := v.driverOf(rec).Attach(ctx, *rec.VM)
	if errors.Is(err, errdefs.NotFound) {
		return fmt.Errorf("attach vm: %w: %w", errGone, err)
	}
	b.closeGuest()
	if err != nil {
		b.setGuest(v.cfg.Guests(rec.HostIP, rec.Token))
		return fmt.Errorf("attach vm: %w", err)
	}
	v.adoptVM(b, vm)
	return nil
}

// reached notes what came of an attempt to reach a sandbox, and frees it if its VM
// is gone. Called with the op lock held.
func (m *Manager) reached(b *box, err error) {
	switch {
	case errors.Is(err, errGone) && b.op.vm != nil:
		m.releaseEnded(b, b.op.vm.Exit())
	case errors.Is(err, errGone):
		m.release(b, Lost, m.detail(err))
	case err != nil:
		m.unreachable(b, err)
	default:
		b.reached()
		if b.record().Reason == Unreachable {
			_ = m.mark(b, "", "") // the log has it if it is not saved
		}
		m.noteEnvd(b)
	}
}

// noteEnvd notes the version of a guest that an earlier agent did not ask for it. Called
// with the op lock held.
func (v *vms) noteEnvd(b *box) {
	version := b.op.envd
	if version == "" || version == b.record().EnvdVersion {
		return
	}
	if err := v.save(b, func(r *Record) { r.EnvdVersion = version }); err != nil {
		v.log.Warn("version of the guest's envd not kept", "sandbox", b.id, "err", err)
	}
}

// unreachable marks a sandbox whose VM, guest or network does not do what it
// should, and has it tried again. Nothing of it is touched. Called with the op
// lock held.
func (v *vms) unreachable(b *box, err error) {
	_ = v.mark(b, Unreachable, v.detail(err))
	b.lookLater()
}

// setFar notes whether the VM answers and the guest does not.
func (b *box) setFar(far bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.far = far
}

// isFar says whether the VM answers and the guest does not.
func (b *box) isFar() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.far
}

// reached ends a series of looks in vain.
func (b *box) reached() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.looks = 0
}

// look tries again to reach a sandbox that is marked as unreachable. Called with
// the op lock held.
func (m *Manager) look(ctx context.Context, b *box) error {
	rec := b.record()
	// Whatever a save that failed has left on disk: nothing goes on before the
	// record says again what it is.
	if err := m.rewrite(b); err != nil {
		b.lookLater()
		return err
	}
	mended, cancel := context.WithTimeout(ctx, opTimeout)
	broken := m.cfg.Network.Repair(mended, rec.Slot, m.policyInForce(rec), rec.Network.Limits)
	cancel()
	err := m.reach(ctx, b)
	if err == nil {
		err = broken
	}
	if !errors.Is(err, errGone) && errors.Join(context.Cause(b.op.alive), context.Cause(ctx)) != nil {
		return err // it has ended and is about to be freed, or the caller has left
	}
	m.reached(b, err)
	return err
}

// unreached is the answer to who needs what there is no way to.
func unreached(rec Record) error {
	return errdefs.Unavailable.Errorf("sandbox %s does not answer; the host tries again by itself: %s", rec.ID, rec.Detail)
}
