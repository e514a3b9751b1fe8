package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// A sandbox is unknown whose record cannot be used. Its id is taken, its VM, its
// disk and its network are left alone, and what it takes of the host is counted:
// as far as it can be made out, and as the default size where it cannot.

// standIn completes the record that stands in for one that cannot be used.
func (m *Manager) standIn(rec *Record) {
	if rec.VCPUs == 0 {
		rec.VCPUs, rec.MemMiB, rec.DiskMiB = 1, 512, m.cfg.OverlayMiB
	}
}

// fence keeps the networks of unknown sandboxes from being taken for strays. That
// of a VM is the one that its process is in. Where that cannot be found out, every
// network that no record names is kept.
func (m *Manager) fence(ctx context.Context) error {
	var unknown []*box
	for _, b := range m.all() {
		if rec := b.record(); rec.State == Unknown && rec.Slot == 0 {
			unknown = append(unknown, b)
		}
	}
	if len(unknown) == 0 {
		return m.unfence(ctx)
	}
	strays, err := m.cfg.Network.Strays(ctx)
	if err != nil {
		return fmt.Errorf("look for the networks of unknown sandboxes: %w", err)
	}
	m.mu.Lock()
	for s := range m.held {
		strays = append(strays, s)
	}
	m.mu.Unlock()
	var paths []string
	slots := map[string]network.Slot{}
	for _, s := range strays {
		path := m.cfg.Network.Plan().Addrs(s).NetNSPath
		paths, slots[path] = append(paths, path), s
	}
	sure := true
	for _, b := range unknown {
		if !b.tryHold("looked at") {
			sure = false
			continue
		}
		path, err := m.cfg.NetNSOf(m.cfg.RunDir, string(b.id), paths)
		if s, ok := slots[path]; ok && err == nil {
			err = m.giveSlot(b, s)
		}
		if err != nil {
			m.log.Warn("network of an unknown sandbox not found", "sandbox", b.id, "err", err)
			sure = false
		}
		b.unhold()
	}
	if sure {
		return m.unfence(ctx)
	}
	for _, s := range strays {
		// One that is taken by now is a sandbox's that is known.
		if m.cfg.Network.Claim(s) == nil {
			m.mu.Lock()
			m.held[s] = true
			m.mu.Unlock()
		}
	}
	return nil
}

// giveSlot notes that a slot belongs to an unknown sandbox. Called with the op
// lock held.
func (m *Manager) giveSlot(b *box, s network.Slot) error {
	if err := m.claim(s); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	m.used = m.used.minus(b.rec.takes())
	b.rec.Slot, b.rec.HostIP = s, m.cfg.Network.Plan().Addrs(s).HostIP
	m.used = m.used.plus(b.rec.takes())
	return nil
}

// claim is Network.Claim, of a slot that is held, too.
func (m *Manager) claim(s network.Slot) error {
	m.mu.Lock()
	held := m.held[s]
	delete(m.held, s)
	m.mu.Unlock()
	if held {
		return nil
	}
	return m.cfg.Network.Claim(s)
}

// unfence frees the slots that turned out to belong to no sandbox.
func (m *Manager) unfence(ctx context.Context) error {
	m.mu.Lock()
	held := maps.Clone(m.held)
	m.mu.Unlock()
	var errs []error
	for s := range held {
		err := m.cfg.Network.Close(ctx, s)
		if err == nil {
			err = m.cfg.Network.Release(s)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		m.mu.Lock()
		delete(m.held, s)
		m.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Recover looks again at a sandbox that is unknown or unreachable, now and not
// when the host does so by itself. It is what its record says if that can be used
// now, be it that it can be read again or that somebody mended it.
func (m *Manager) Recover(ctx context.Context, id ID) (Info, error) {
	b, ctx, end, err := m.begin(ctx, id, OpRecover, "recovered")
	if err != nil {
		return Info{}, err
	}
	defer end()
	err = m.lookInto(ctx, b)
	if info := b.info(); err == nil {
		return info, nil
	} else if info.Reason == NotUnderstood {
		return info, errdefs.Corrupt.Errorf("recover sandbox %s: %s", id, m.told(err))
	}
	return b.info(), errdefs.Unavailable.Errorf("recover sandbox %s: %s", id, m.told(err))
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
	if !errdefs.CannotRead(err) && !errors.Is(err, errNewer) && m.fallBack(ctx, b) {
		return nil
	}
	again := m.store.unknown(b.id, err)
	b.mu.Lock()
	news := b.rec.Reason != again.Reason
	b.rec.Reason, b.rec.Detail = again.Reason, again.Detail
	b.mu.Unlock()
	if news {
		m.tellUnknown(b)
	}
	m.lookAgain(b)
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
		if err := m.claim(slot); err != nil {
			if !m.vmGone(ctx, rec) {
				return fmt.Errorf("the record's network slot: %w", err)
			}
			// It is another's since the VM ended.
			rec.Slot, rec.HostIP = 0, netip.Addr{}
		}
	}
	m.mu.Lock()
	b.mu.Lock()
	m.used = m.used.minus(was.takes())
	if rec.State != Stopped {
		m.used = m.used.plus(rec.takes())
	}
	b.rec = rec
	b.looks = 0
	b.mu.Unlock()
	m.mu.Unlock()
	if rec.Warm == "" {
		m.tell(Event{Time: time.Now().UTC(), ID: b.id, From: Unknown, To: rec.State, Reason: rec.Reason})
	}
	m.log.Info("sandbox is known again", "sandbox", b.id, "state", rec.State)
	return nil
}

// vmGone says whether it is proven that the VM of a record is not there.
func (m *Manager) vmGone(ctx context.Context, rec Record) bool {
	if rec.VM == nil {
		return true
	}
	_, err := m.driverOf(*rec.VM).Attach(ctx, *rec.VM)
	return errors.Is(err, errdefs.NotFound)
}

// fallBack takes an unknown sandbox up by the record before the damaged one. That
// may name what is not so any more; it is believed only if the VM that it names is
// there and, where it runs, the guest takes the token. Called with the op lock
// held.
func (m *Manager) fallBack(ctx context.Context, b *box) bool {
	rec, err := m.store.loadFile(b.id, m.store.previous(b.id))
	if err == nil && rec.State == Creating && rec.VM != nil && rec.Warm == "" {
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
	b.mu.Lock()
	b.rec = rec
	b.mu.Unlock()
	err = m.reach(ctx, b)
	b.mu.Lock()
	b.rec = was
	g := b.guest
	if err != nil {
		b.guest = nil
	}
	b.mu.Unlock()
	if err != nil {
		if g != nil {
			g.Close()
		}
		m.log.Warn("the record before the damaged one does not do either", "sandbox", b.id, "err", err)
		return false
	}
	if err := m.install(ctx, b, rec); err != nil {
		return false
	}
	if err := m.save(b, func(*Record) {}); err != nil {
		m.log.Error("record not mended", "sandbox", b.id, "err", err)
	}
	m.log.Warn("the record was damaged, the one before is in force", "sandbox", b.id)
	return true
}

// tellUnknown puts it into the events and the log that a sandbox is unknown.
func (m *Manager) tellUnknown(b *box) {
	rec := b.record()
	m.log.Error("record cannot be used, the sandbox is left alone", "sandbox", b.id, "reason", rec.Reason, "detail", rec.Detail)
	if last, ok := m.events.lastOf(b.id); !ok || last.To != Unknown || last.Reason != rec.Reason {
		m.tell(Event{Time: time.Now().UTC(), ID: b.id, From: last.To, To: Unknown, Reason: rec.Reason})
	}
}
