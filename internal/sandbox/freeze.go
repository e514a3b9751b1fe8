package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// stillTimeout bounds how long the guest may take to write out what it has in memory
// and to stop its programs. Then a hibernation goes on without.
const stillTimeout = 40 * time.Second

// opCapture is the copying of a build sandbox's disk.
const opCapture Operation = "capture of the disk of build"

// freezing says what freeze does, as plain data.
type freezing struct {
	// op is what the state is written for, in the text of errors.
	op Operation
	// dir is where the VMM writes memory and devices.
	dir string
	// what says what a hibernation keeps. Other operations keep memory and files.
	what Hibernation
	// disk, if not nil, copies the sandbox's disk while the VMM writes.
	disk func(ctx context.Context, overlay string) error
	// programs is the guest of a boot snapshot in which the template's program runs.
	programs Guest
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
// it stands. The guest of a boot snapshot has no programs except its template's, and is
// waited for until it is idle if it has none.
//
// A VM that does not go on is not given up: it is brought to what its record says when
// it answers again. Called with the op lock held.
func (v *vms) freeze(ctx context.Context, b *box, f freezing) (frozen, error) {
	was := frozen{record: b.record()}
	if f.what.FilesOnly && was.record.flat() {
		return was, noFilesAlone(was.record)
	}
	if _, ok := b.op.vm.(vmm.Snapshotter); !ok && !f.what.FilesOnly {
		return was, errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", was.record.vmm())
	}
	stopped, err := v.stillGuest(ctx, b, f, &was)
	if err != nil {
		return was, err
	}
	err = b.op.vm.Pause(ctx)
	if err == nil {
		err = v.write(ctx, b, f)
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
		if err = v.asBefore(wake, b, f.op, was.record); err == nil {
			was.paused = time.Since(stopped)
			return was, nil
		}
	}
	return was, v.backTo(ctx, b, f.op, was.record, err)
}

// write has the VMM write memory and devices, if they are kept, while the disk is copied.
// A disk that is in the memory is not copied; the image of init, which the guest reads,
// gets a name there. Called with the op lock held.
func (v *vms) write(ctx context.Context, b *box, f freezing) error {
	flat := b.record().flat()
	var disk, memory error
	var wg sync.WaitGroup
	if f.disk != nil && !flat {
		wg.Go(func() { disk = f.disk(ctx, v.store.overlay(b.id)) })
	}
	if !f.what.FilesOnly {
		memory = b.op.vm.(vmm.Snapshotter).Snapshot(ctx, f.dir)
	}
	wg.Wait()
	if flat && memory == nil {
		memory = v.linkFile(ctx, filepath.Join(f.dir, initName), v.store.initImage(b.id))
	}
	return errors.Join(memory, disk)
}

// stillGuest has the guest do its part of a freeze and returns since when its programs
// stand still. On error they run as before. Called with the op lock held.
func (v *vms) stillGuest(ctx context.Context, b *box, f freezing, was *frozen) (since time.Time, err error) {
	op := f.op
	switch op {
	case opBoot:
		if f.programs != nil {
			ctx, cancel := stillWithin(ctx)
			defer cancel()
			return f.programs.Freeze(ctx)
		}
		return time.Now(), b.op.guest.Quiesce(ctx, true)
	case OpHibernate:
		return time.Now(), v.stillForHibernation(ctx, b, f.what, was)
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

// stillForHibernation is stillGuest for a hibernation, which can do without the guest's
// help unless what says otherwise. A paused sandbox whose memory is lost runs until its
// disk is synced. Called with the op lock held.
func (v *vms) stillForHibernation(ctx context.Context, b *box, what Hibernation, was *frozen) error {
	paused := was.record.State == Paused
	if paused && what == (Hibernation{}) {
		return nil
	}
	if paused {
		if err := b.op.vm.Resume(ctx); err != nil {
			return v.backTo(ctx, b, OpHibernate, was.record, err)
		}
	}
	was.unsynced = v.askStill(ctx, b, what)
	if was.unsynced == nil {
		return nil
	}
	err, still := b.cause(ctx), stalled(v.life, b.op.vm) != nil
	switch {
	case err != nil:
	case still:
		err = errDiskFull(b.id)
	case what.HealthyGuest:
		err = fmt.Errorf("%w: %s", ErrGuestSilent, v.detail(was.unsynced))
	default:
		return nil
	}
	if paused {
		return v.backTo(ctx, b, OpHibernate, was.record, err)
	}
	if !still {
		v.thawFailed(ctx, b)
	}
	return fmt.Errorf("%s sandbox %s: %w", OpHibernate, b.id, err)
}

// askStill is tryStill of a guest that must answer first, if what says so. Called with
// the op lock held.
func (v *vms) askStill(ctx context.Context, b *box, what Hibernation) error {
	if what.HealthyGuest {
		ctx, cancel := context.WithTimeout(ctx, wakeTimeout)
		defer cancel()
		if err := b.op.guest.WaitReady(ctx); err != nil {
			return err
		}
	}
	return v.tryStill(ctx, b)
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
// programs of a paused sandbox stay frozen: its resume thaws them. So do those of a guest
// that has just booted, until it is told what it is: it does not take the record's token
// yet. Called with the op lock held.
func (v *vms) asBefore(ctx context.Context, b *box, op Operation, was Record) error {
	switch {
	case op == opBoot:
		return b.op.vm.Resume(ctx)
	case was.State == Paused:
		return b.op.vm.Pause(ctx)
	case was.State == Running, was.State == Building:
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
	back := v.asBefore(ctx, b, op, was)
	switch {
	case back == nil || context.Cause(b.op.alive) != nil:
	case op == opBoot:
		return errors.Join(err, fmt.Errorf("%w: %w", errStuck, back))
	case op == opCapture: // what its build does in it fails
		b.op.kill(errdefs.Unavailable.Errorf("the build sandbox does not go on: %w", back))
	default:
		v.unreachable(b, fmt.Errorf("%w; then %w", err, back))
	}
	return err
}
