package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A sandbox is unknown whose record cannot be used. Its id is taken, its VM, its
// disk and its network are left alone, and what it takes of the host is counted:
// as far as it can be made out, and as the default size where it cannot.

// standIn completes the record that stands in for one that cannot be used.
func (h *host) standIn(rec *Record) {
	if rec.VCPUs == 0 {
		rec.VCPUs, rec.MemMiB, rec.DiskMiB = 1, 512, h.cfg.OverlayMiB
	}
}

// Recover looks again at a sandbox that is unknown or unreachable, now and not
// when the host does so by itself. It is what its record says if that can be used
// now, because it can be read again or was mended.
func (m *Manager) Recover(ctx context.Context, id ID) (Info, error) {
	b, ctx, end, err := m.begin(ctx, id, OpRecover, "recovered")
	if err != nil {
		return Info{}, err
	}
	defer end()
	err = m.lookInto(ctx, b)
	if info := b.info(); err == nil {
		m.note(b, Updated, ActorOf(ctx))
		return info, nil
	} else if info.Reason == NotUnderstood {
		return info, errdefs.Corrupt.Errorf("recover sandbox %s: %s", id, m.detail(err))
	}
	return b.info(), errdefs.Unavailable.Errorf("recover sandbox %s: %s", id, m.detail(err))
}

// lookInto looks again at a sandbox of which something is wrong. Called with the op
// lock held.
func (m *Manager) lookInto(ctx context.Context, b *box) error {
	switch rec := b.record(); {
	case rec.State == Unknown:
		return m.reread(ctx, b)
	case rec.State == Hibernated:
		var found Recovery
		m.takeUpHibernated(ctx, b, &found)
		return nil
	case rec.Reason == Unreachable:
		return m.look(ctx, b)
	default:
		return nil
	}
}

// reread reads the record of an unknown sandbox again and takes the sandbox up if
// that can be used. Called with the op lock held.
func (m *Manager) reread(ctx context.Context, b *box) error {
	rec, err := m.store.load(b.id)
	if err == nil {
		err = m.install(ctx, b, rec)
	}
	if err == nil {
		var found Recovery
		m.takeUp(ctx, b, &found)
		return nil
	}
	if !errdefs.CannotRead(err) && !errors.Is(err, errNewer) && m.usePrevious(ctx, b) {
		return nil
	}
	again := m.store.unknown(b.id, err)
	news := b.record().Reason != again.Reason
	b.set(func(r *Record) { r.Reason, r.Detail = again.Reason, again.Detail })
	if news {
		m.tellUnknown(b)
	}
	b.lookLater()
	return err
}

// install makes an unknown sandbox be what a record says. The record must not
// name what is another's: its slot is free, or known to be this sandbox's. Called
// with the op lock held.
func (m *Manager) install(ctx context.Context, b *box, rec Record) error {
	was := b.record()
	slot := rec.Slot
	if rec.State == Stopped {
		slot = 0
	}
	if was.Slot != 0 && slot != was.Slot {
		return errdefs.Corrupt.Errorf("the record names network slot %d, and the vm is in %d", slot, was.Slot)
	}
	if slot != 0 && was.Slot == 0 {
		if err := m.fence.claim(slot); err != nil {
			if !m.vmGone(ctx, rec) {
				return fmt.Errorf("the record's network slot: %w", err)
			}
			// It is another's since the VM ended.
			rec.Slot, rec.HostIP = 0, netip.Addr{}
		}
	}
	b.set(func(r *Record) { *r = rec })
	b.reached()
	if rec.State == Stopped {
		m.ledger.give(b.id)
	} else {
		m.ledger.adopt(b.id, rec.Project, rec.takes())
	}
	if !rec.State.hidden() {
		m.tell(b, Event{Time: time.Now().UTC(), From: Unknown, To: rec.State, Reason: rec.Reason, Actor: b.op.actor})
	}
	m.log.Info("sandbox is known again", "sandbox", b.id, "state", rec.State)
	return nil
}

// usePrevious takes an unknown sandbox up by the record before the damaged one. That
// may name what is not so any more; it is believed only if the VM that it names is
// there and, where it runs, the guest takes the token. Called with the op lock
// held.
func (m *Manager) usePrevious(ctx context.Context, b *box) bool {
	rec, err := m.store.loadFile(b.id, m.store.previous(b.id))
	if err == nil && rec.State == Creating && rec.VM != nil {
		// The one after that said that it runs, or its VM would not be there.
		rec.State = Running
	}
	if err != nil || rec.State != Running && rec.State != Paused {
		return false
	}
	was := b.record()
	if was.Slot != rec.Slot { // that of the VM is known, or nothing is
		return false
	}
	b.set(func(r *Record) { *r = rec })
	err = m.reach(ctx, b)
	b.set(func(r *Record) { *r = was })
	if err != nil {
		b.closeGuest()
		m.log.Warn("the record before the damaged one does not do either", "sandbox", b.id, "err", err)
		return false
	}
	if err := m.install(ctx, b, rec); err != nil {
		return false
	}
	if err := m.rewrite(b); err != nil {
		m.log.Error("record not mended", "sandbox", b.id, "err", err)
	}
	m.log.Warn("the record was damaged, the one before is in force", "sandbox", b.id)
	return true
}

// tellUnknown puts it into the events and the log that a sandbox is unknown.
func (r *registry) tellUnknown(b *box) {
	rec := b.record()
	r.log.Error("record cannot be used, the sandbox is left alone", "sandbox", b.id, "reason", rec.Reason, "detail", rec.Detail)
	if last, ok := r.events.lastOf(b.id); !ok || last.To != Unknown || last.Reason != rec.Reason {
		r.tell(b, Event{Time: time.Now().UTC(), From: last.To, To: Unknown, Reason: rec.Reason, Labels: last.Labels})
	}
}
