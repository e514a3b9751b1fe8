package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
)

// hibernateTries is how often in a row an expired sandbox may keep the host from
// hibernating it. Then it ends. The pauses between are four minutes together.
const hibernateTries = 10

// OnTimeout is what becomes of a sandbox that expires, by its idle timeout or its deadline.
type OnTimeout string

const (
	DestroyOnTimeout   OnTimeout = "destroy"
	HibernateOnTimeout OnTimeout = "hibernate"
	// HibernateFilesOnTimeout keeps the files alone: the sandbox boots when it is resumed.
	HibernateFilesOnTimeout OnTimeout = "hibernate_files"
)

// pauses says whether the sandbox is kept.
func (o OnTimeout) pauses() bool { return o == HibernateOnTimeout || o == HibernateFilesOnTimeout }

// check sets an empty one, which a field of a request had, to its default.
func (o *OnTimeout) check(field string) error {
	switch *o {
	case "":
		*o = DestroyOnTimeout
	case DestroyOnTimeout, HibernateOnTimeout, HibernateFilesOnTimeout:
	default:
		return fmt.Errorf("%s is %.40q, must be destroy, hibernate or hibernate_files", field, string(*o))
	}
	return nil
}

// Hibernation says what a hibernation keeps, and of which guest.
type Hibernation struct {
	// FilesOnly keeps the sandbox's disk and not its memory: the resume is a boot, and
	// its programs are gone.
	FilesOnly bool
	// HealthyGuest refuses a guest that does not answer or does not sync its disk.
	HealthyGuest bool
}

// ErrGuestSilent is the error of Hibernate if the guest had to be healthy and is not.
var ErrGuestSilent = errdefs.WrongState.Errorf("the sandbox's guest does not answer")

// moveTimeout bounds an operation that writes a sandbox's memory to the disk, or reads
// it from there.
func moveTimeout(rec Record) time.Duration {
	moved := rec.MemMiB
	if rec.flat() {
		moved += rec.DiskMiB
	}
	return opTimeout + stillTimeout + perGiB(perGiBMove, moved)
}

// Hibernate writes a running or paused sandbox to disk and ends its VM: memory,
// vCPUs and network are free then. Until the snapshot is complete nothing is
// lost: on error the sandbox is as it was. Streams to the guest end. A guest that
// does not sync its disk prevents it only if what says so; otherwise the sandbox's
// detail tells of it. Without its memory, such a sandbox lacks what was not synced. One
// that was paused before it loses its memory runs for the time of a sync.
func (m *Manager) Hibernate(ctx context.Context, id ID, what Hibernation) error {
	b, ctx, end, err := m.begin(ctx, id, OpHibernate, "hibernated")
	if err != nil {
		return err
	}
	defer end()
	return m.hibernate(ctx, b, what)
}

// hibernate writes a sandbox to disk and frees the rest. Called with the op lock held.
func (m *Manager) hibernate(ctx context.Context, b *box, what Hibernation) error {
	fail := func(err error) error { return fmt.Errorf("hibernate sandbox %s: %w", b.id, errdefs.DiskFull(err)) }
	if err := b.full(OpHibernate); err != nil {
		return err
	}
	if rec := b.record(); !what.FilesOnly {
		room := int64(rec.MemMiB) << 20
		if rec.flat() { // or else the disk takes no more room than before
			room += m.store.takenBytes(b.id)
		}
		copied, err := m.disk.reserve(room)
		if err != nil {
			return fail(err)
		}
		defer copied()
	}
	dir, err := m.store.stageSnapshot(b.id)
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir) // gone once it is published
	began := time.Now()
	_, err = m.freeze(ctx, b, freezing{op: OpHibernate, dir: dir, what: what, keep: func(ctx context.Context, was frozen) error {
		return m.keepHibernated(ctx, b, dir, what, was)
	}})
	if err != nil {
		return err
	}
	m.log.Info("snapshot written", "sandbox", b.id, "files_only", what.FilesOnly, "took", time.Since(began).Round(time.Millisecond))
	b.op.kill(errdefs.Unavailable.Errorf("sandbox %s is hibernated", b.id))
	_ = m.freeHibernated(b) // the janitor tries again
	return nil
}

// keepHibernated publishes what freeze wrote and moves the sandbox to hibernated. On
// error neither is on disk, unless the error is errUnsettled: the next agent would
// believe both. Called with the op lock held.
func (m *Manager) keepHibernated(ctx context.Context, b *box, dir string, what Hibernation, was frozen) error {
	detail := ""
	if was.unsynced != nil {
		detail = "hibernated without the guest's help, its disk by itself may lack the last writes: " + m.detail(was.unsynced)
		if what.FilesOnly {
			detail = "hibernated without the guest's help, its files may lack the last writes: " + m.detail(was.unsynced)
		}
		m.log.Warn("guest does not sync its disk, it is hibernated all the same", "sandbox", b.id, "err", was.unsynced)
	}
	err := m.store.publishSnapshot(ctx, b.record(), dir)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = m.move(b, Hibernated, func(r *Record) { r.Restored, r.FilesOnly, r.Detail = false, what.FilesOnly, detail })
	}
	if err == nil {
		return nil
	}
	var either unsettled
	if derr := m.store.dropSnapshots(b.id); derr == nil && errors.As(err, &either) {
		return either.error // without a snapshot no agent believes that it hibernates
	}
	return err
}

// freeHibernated frees what a hibernated sandbox does not need: VM, network, capacity,
// the disk's copy. What cannot be freed is tried again. Called with the op lock
// held.
func (h *holdings) freeHibernated(b *box) error {
	// Without its snapshot, the VM and its disk are what is left of the sandbox.
	if err := h.store.checkSnapshot(b.id); err != nil {
		b.postpone()
		return fmt.Errorf("free hibernated sandbox %s: %w", b.id, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	rec := b.record()
	b.closeGuest()
	err := h.free(ctx, b)
	if err == nil {
		err = h.save(b, func(r *Record) { r.VM, r.Slot, r.HostIP = nil, 0, netip.Addr{} })
	}
	if err != nil {
		b.postpone()
		h.log.Error("hibernated sandbox not freed, will try again", "sandbox", b.id, "err", err)
		return errdefs.Unavailable.Errorf(
			"sandbox %s is hibernated but not all of it could be freed yet; the host tries again by itself", b.id)
	}
	b.op.vm = nil
	b.renew()
	b.settled()
	h.releaseSlot(rec)
	h.ledger.adopt(b.id, rec.Project, b.record().takes())
	return nil
}

// resumeFromDisk lets a hibernated sandbox go on. With how.filesOnly, and if its snapshot has
// no memory, it boots from its disk. Its snapshot is not touched before it runs: on error
// it is hibernated as before. Called with the op lock held.
func (m *Manager) resumeFromDisk(ctx context.Context, b *box, how resuming) error {
	fail := func(err error) error { return fmt.Errorf("resume sandbox %s: %w", b.id, errdefs.DiskFull(err)) }
	if m.Draining() {
		return fail(errShutDown)
	}
	rec := b.record()
	if how.filesOnly && rec.flat() {
		return noFilesAlone(rec)
	}
	if rec.Slot != 0 || b.op.vm != nil {
		if err := m.freeHibernated(b); err != nil {
			return err
		}
	}
	tmpl, err := m.rootOf(rec)
	if err != nil {
		return fail(err)
	}
	kept, err := m.store.openSnapshot(b.id)
	if err != nil {
		return fail(err)
	}
	ctx, took := withPhases(ctx)
	end := phase(ctx, "reserve")
	if err := m.readmit(ctx, b); err != nil {
		return fail(err)
	}
	end()
	src := m.store.ownSource(b.id, kept, how.filesOnly || rec.FilesOnly)
	src.lifetime = how.lifetime
	_, err = m.start(ctx, b, tmpl, src)
	if err != nil {
		if cause := b.cause(ctx); cause != nil {
			err = cause
		}
		if b.state() == Hibernated && !errors.Is(err, errDestroyed) {
			_ = m.freeHibernated(b)
		}
		return fail(err)
	}
	// The disk has moved on from here: this snapshot must never be used again.
	if err := m.store.dropSnapshots(b.id); err != nil {
		m.log.Error("old snapshot not removed", "sandbox", b.id, "err", err)
	}
	m.log.Info("sandbox started", append([]any{"sandbox", b.id, "from", src.from}, took.attrs()...)...)
	return nil
}

// ownSource returns what a hibernated sandbox starts from: its snapshot, or the disk in it
// alone.
func (s store) ownSource(id ID, kept saved, filesOnly bool) source {
	dir := s.snapshot(id)
	src := source{
		disk: filepath.Join(dir, snapshotOverlay), verify: &kept,
		gone: errdefs.Corrupt.Errorf("the snapshot has no disk"), // an empty one would be worse than none
	}
	if filesOnly {
		src.from, src.tell = fromOwnDisk, tellIdentity
	} else {
		src.from, src.tell, src.memory, src.state = fromDisk, tellResume, dir, true
	}
	return src
}

// readmit takes capacity and a slot for a hibernated sandbox and notes them in
// its record. Called with the op lock held.
func (h *holdings) readmit(ctx context.Context, b *box) (err error) {
	var temp undo.Stack
	defer func() { err = errors.Join(err, temp.Unwind(ctx)) }()
	rec := b.record()
	more := need(rec.VCPUs, rec.MemMiB, rec.DiskMiB).minus(rec.takes())
	if err := h.admit(ctx, b.id, rec.Project, more, h.makeWay); err != nil {
		return err
	}
	temp.Push("admission", func(context.Context) error { h.ledger.adopt(b.id, rec.Project, rec.takes()); return nil })
	slot, err := h.acquireSlot(ctx, h.driverOf(rec), h.makeWay)
	if err != nil {
		return err
	}
	temp.Push("slot", func(context.Context) error { return h.cfg.Network.Release(slot) })
	hostIP := h.cfg.Network.Plan().Addrs(slot).HostIP
	if err := h.save(b, func(r *Record) {
		if r.Slot, r.HostIP = slot, hostIP; passed(r.EndAt, time.Now()) {
			r.EndAt = time.Time{} // it would end at once
		}
	}); err != nil {
		return err
	}
	temp.Keep()
	return nil
}

// takeUpHibernated makes true what the record of a hibernated sandbox says. If
// its snapshot is not there, the agent ended before the snapshot was certain, or before
// the record of its resume was: then the VM is there, or nothing is. Called with the op
// lock held.
func (m *Manager) takeUpHibernated(ctx context.Context, b *box, found *Recovery) *[]ID {
	err := m.store.checkSnapshot(b.id)
	if err == nil {
		if err := m.store.dropTemporary(b.id); err != nil {
			m.log.Error("garbage not removed", "sandbox", b.id, "err", err)
		}
		_ = m.freeHibernated(b)
		return nil
	}
	// Nothing is gained by forgetting the sandbox: its files may be mended.
	m.log.Error("hibernated sandbox has no usable snapshot", "sandbox", b.id, "err", err)
	rec := b.record()
	if rec.VM == nil || errors.Is(err, errdefs.Unavailable) { // or it cannot be read now
		return nil
	}
	if err := m.attach(ctx, b, rec); err != nil {
		m.log.Warn("nor has it a vm that can be taken up", "sandbox", b.id, "err", err)
		return nil
	}
	if err := m.move(b, Running, nil); err != nil {
		m.log.Error("sandbox not taken up", "sandbox", b.id, "err", err)
		return nil
	}
	return m.takeUpVM(ctx, b, found)
}

// hibernateExpired is what the janitor does to an expired sandbox that is to hibernate.
// What the host itself cannot do costs no sandbox. A sandbox that keeps the host from it
// for long ends if it expired by its idle timeout. A deadline that hibernates never ends
// a sandbox: it is tried again, and until then the sandbox is paused, so that one that
// refuses for ever gets no more of the CPUs. Called with the op lock held.
func (m *Manager) hibernateExpired(b *box, what Hibernation) {
	ctx, stop := context.WithTimeoutCause(m.life, moveTimeout(b.record()), errdefs.Unavailable.Errorf("it took too long"))
	defer stop()
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b.setAbort(abort)
	b.setPausing(time.Now().UTC())
	err := unreached(b.record())
	if b.record().flat() {
		what.FilesOnly = false // more than its user asked for; there are no files alone
	}
	if b.op.vm != nil {
		err = m.hibernate(ctx, b, what)
	}
	if err == nil || m.life.Err() != nil || errors.Is(err, errDestroyed) || context.Cause(b.op.alive) != nil {
		return
	}
	refusals := b.notHibernated(hostsFault(err))
	rec := b.record()
	atDeadline := rec.pauseDue(time.Now())
	if refusals >= hibernateTries && !atDeadline {
		_ = m.release(b, Expired, "it could not be hibernated: "+m.detail(err))
		return
	}
	m.log.Error("expired sandbox not hibernated, will try again", "sandbox", b.id, "err", err)
	if atDeadline && rec.State == Running && rec.Reason != DiskFull && b.op.vm != nil {
		ctx, stop := context.WithTimeout(m.life, opTimeout)
		defer stop()
		if err := m.pause(ctx, b); err != nil {
			m.log.Error("expired sandbox not paused either", "sandbox", b.id, "err", err)
		}
	}
}

// notHibernated counts an attempt that failed and sets when the next is due. It returns
// how often in a row that was not the host's fault.
func (b *box) notHibernated(hostsFault bool) (refusals int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.attempts++
	b.mu.refusals++
	if hostsFault {
		b.mu.refusals = 0
	}
	b.mu.retryAt = time.Now().Add(backOff(b.mu.attempts))
	return b.mu.refusals
}

// hostsFault says whether a hibernation failed with something that neither guest
// nor VM can bring about: the host's disk is full, or cannot be written.
func hostsFault(err error) bool {
	var errno syscall.Errno
	switch errdefs.ClassOf(err) {
	case errdefs.Exhausted:
		return true
	case nil:
		return errors.As(err, &errno)
	}
	return false
}
