package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// stillTimeout bounds how long the guest may take to write out what it has in memory
// and to stop its programs. Then a hibernation goes on without.
const stillTimeout = 40 * time.Second

// freezing says what freeze does, as plain data.
type freezing struct {
	// op is what the state is written for, in the text of errors.
	op Operation
	// dir is where the VMM writes memory and devices.
	dir string
	// disk, if not nil, copies the sandbox's disk while the VMM writes.
	disk func(ctx context.Context, overlay string) error
	// keep is called when all is written. The VM goes on only if it fails.
	keep func(ctx context.Context, was frozen) error
}

// frozen is what freeze found.
type frozen struct {
	// record is what the record said.
	record Record
	// paused is how long programs stood still that ran before.
	paused time.Duration
	// unsynced says why the guest did not sync its disk, if it did not.
	unsynced error
}

// opBoot is the making of a boot snapshot, which is part of a create.
const opBoot Operation = "boot snapshot"

// freeze has the guest stop its programs and sync its disk, stops the VM, writes its
// state, and lets it go on as it was: what hibernate, fork, named and boot snapshots
// share. On any error the sandbox goes on as it was.
//
// Programs are stopped because a copy must not run under the identity, the clock and
// the random numbers of another sandbox; only Init lets them go on. A fork and a named
// snapshot need the guest's help, and a paused sandbox runs for as long as that takes.
// A hibernated sandbox stays what it is and can do without; a paused one is written as
// it stands. The guest of a boot snapshot has no programs, and is waited for until it
// is idle.
//
// A VM that does not go on is not given up: it is brought to what its record says when
// it answers again. Called with the op lock held.
func (v *vms) freeze(ctx context.Context, b *box, f freezing) (frozen, error) {
	was := frozen{record: b.record()}
	snapshotter, ok := b.op.vm.(vmm.Snapshotter)
	if !ok {
		return was, errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", v.cfg.Driver.Name())
	}
	stopped, err := v.stillGuest(ctx, b, f.op, &was)
	if err != nil {
		return was, err
	}
	err = b.op.vm.Pause(ctx)
	if err == nil {
		err = write(ctx, snapshotter, f, v.store.overlay(b.id))
	}
	if err == nil && f.keep != nil {
		if err = f.keep(ctx, was); err == nil {
			return was, nil
		}
	}
	if errors.Is(err, errUnsettled) {
		err = fmt.Errorf("%s sandbox %s: %w", f.op, b.id, errdefs.DiskFull(err))
		v.unreachable(b, fmt.Errorf("%w; its vm stands still until the host can write its record", err))
		return was, err
	}
	if err == nil {
		// What the source cannot come back from is not the copy's fault.
		wake, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
		defer cancel()
		if err = v.asBefore(wake, b, was.record); err == nil {
			was.paused = time.Since(stopped)
			return was, nil
		}
	}
	return was, v.backTo(ctx, b, f.op, was.record, err)
}

// write has the VMM write memory and devices while the disk is copied.
func write(ctx context.Context, vm vmm.Snapshotter, f freezing, overlay string) error {
	var disk error
	var wg sync.WaitGroup
	if f.disk != nil {
		wg.Go(func() { disk = f.disk(ctx, overlay) })
	}
	err := vm.Snapshot(ctx, f.dir)
	wg.Wait()
	return errors.Join(err, disk)
}

// stillGuest has the guest do its part of a freeze and returns since when its programs
// stand still. On error they run as before. Called with the op lock held.
func (v *vms) stillGuest(ctx context.Context, b *box, op Operation, was *frozen) (since time.Time, err error) {
	switch {
	case op == opBoot:
		return time.Now(), b.op.guest.Quiesce(ctx, true)
	case op == OpHibernate && was.record.State == Paused:
		return time.Now(), nil
	case op == OpHibernate:
		was.unsynced = v.tryStill(ctx, b)
		if was.unsynced == nil {
			return time.Now(), nil
		}
		if cause := b.cause(ctx); cause != nil {
			v.thawFailed(ctx, b)
			return since, fmt.Errorf("%s sandbox %s: %w", op, b.id, cause)
		}
		if stalled(v.life, b.op.vm) != nil {
			return since, fmt.Errorf("%s sandbox %s: %w", op, b.id, errDiskFull(b.id))
		}
		return time.Now(), nil
	}
	if was.record.State == Paused {
		if err := b.op.vm.Resume(ctx); err != nil {
			return since, v.backTo(ctx, b, op, was.record, err)
		}
	}
	since, err = v.stillPrograms(ctx, b)
	switch {
	case err == nil && was.record.State == Paused:
		return time.Now(), nil // it stood still anyway
	case err == nil:
		return since, nil
	case was.record.State == Paused:
		return since, v.backTo(ctx, b, op, was.record, err)
	}
	return since, fmt.Errorf("%s sandbox %s: %w", op, b.id, v.disk.why(b, err))
}

// stillPrograms has the guest stop its programs and sync its disk. since is when the
// programs stopped, or a little earlier. Called with the op lock held.
func (v *vms) stillPrograms(ctx context.Context, b *box) (since time.Time, err error) {
	ctx, cancel := stillWithin(ctx)
	defer cancel()
	since, err = b.op.guest.Freeze(ctx)
	if err != nil {
		v.thawFailed(ctx, b)
	}
	return since, err
}

// tryStill is stillPrograms, or a sync alone if the guest cannot stop its programs.
// Called with the op lock held.
func (v *vms) tryStill(ctx context.Context, b *box) error {
	ctx, cancel := stillWithin(ctx)
	defer cancel()
	_, err := b.op.guest.Freeze(ctx)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	v.log.Warn("programs not stopped before the hibernation", "sandbox", b.id, "err", err)
	return b.op.guest.Quiesce(ctx, false)
}

// stillWithin bounds what a guest may take for its part of a freeze.
func stillWithin(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, stillTimeout,
		errdefs.Unavailable.Errorf("the guest did not stop its programs and write out its memory within %s", stillTimeout))
}

// thawFailed lets the programs of a guest go on whose freeze failed, which may have
// stopped them all the same. Called with the op lock held.
func (v *vms) thawFailed(ctx context.Context, b *box) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	if err := thaw(ctx, b); err != nil {
		v.log.Warn("programs may still be stopped", "sandbox", b.id, "err", err)
	}
}

// asBefore brings a VM back to what its record said when an operation began. The
// programs of a paused sandbox stay frozen: its resume thaws them. The guest of a create
// has none. Called with the op lock held.
func (v *vms) asBefore(ctx context.Context, b *box, was Record) error {
	switch was.State {
	case Paused:
		return b.op.vm.Pause(ctx)
	case Running:
		return goOn(ctx, b)
	default:
		return b.op.vm.Resume(ctx)
	}
}

// errStuck is the error of a VM in a create that does not go on after a snapshot.
var errStuck = errors.New("the vm does not go on")

// backTo brings the VM back to what an operation that failed with err found, and says
// what the operation failed of. A VM that does not even do that is tried again later.
// Called with the op lock held.
func (v *vms) backTo(ctx context.Context, b *box, op Operation, was Record, err error) error {
	if cause := b.cause(ctx); cause != nil {
		err = cause
	}
	if !errors.Is(err, errDestroyed) {
		err = v.disk.why(b, err)
	}
	err = fmt.Errorf("%s sandbox %s: %w", op, b.id, err)
	if errors.Is(err, errDestroyed) {
		return err // the destroy waits for the op lock
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	back := v.asBefore(ctx, b, was)
	switch {
	case back == nil || context.Cause(b.op.alive) != nil:
	case op == opBoot:
		return errors.Join(err, fmt.Errorf("%w: %w", errStuck, back))
	default:
		v.unreachable(b, fmt.Errorf("%w; then %w", err, back))
	}
	return err
}
