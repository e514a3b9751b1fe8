package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

const (
	// adoptTimeout bounds one attempt to reach a VM and its guest, and how long
	// the agent's start waits for those that an earlier agent left.
	adoptTimeout = 10 * time.Second
	// probeTimeout bounds the question whether a guest answers that did not when
	// it was last asked.
	probeTimeout = 5 * time.Second
	// maxDetail bounds the text of a record's detail in bytes.
	maxDetail = 600
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
	// The host's settings may be other ones now, and what an agent did for a
	// policy ended with it.
	err := errors.Join(attached, m.setNetwork(ctx, rec))
	if err != nil {
		return err
	}
	if rec.State == Paused {
		if err := b.vm.Pause(ctx); err != nil {
			return fmt.Errorf("keep vm paused: %w", err)
		}
		return nil
	}
	if m.leaveStalled(b) {
		return nil // it goes on when there is room
	}
	if err := b.vm.Resume(ctx); err != nil {
		return fmt.Errorf("keep vm running: %w", err)
	}
	ctx, cancelBoth := both(ctx, b.alive)
	defer cancelBoth()
	err = b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: rec.Token})
	b.mu.Lock()
	b.far = err != nil
	b.mu.Unlock()
	if err != nil {
		return fmt.Errorf("ask guest: %w", err)
	}
	return nil
}

// attach takes up the VM of a record, unless it is. A guest may answer though its
// VMM does not, so it has a client in any case.
func (m *Manager) attach(ctx context.Context, b *box, rec Record) error {
	if b.vm != nil {
		select {
		case <-b.vm.Done():
			return errGone
		default:
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.guest == nil { // its record was not believed before
			b.guest = m.cfg.Guests(rec.HostIP, rec.Token)
		}
		return nil
	}
	vm, err := m.driverOf(*rec.VM).Attach(ctx, *rec.VM)
	if errors.Is(err, errdefs.NotFound) {
		return fmt.Errorf("attach vm: %w: %w", errGone, err)
	}
	b.mu.Lock()
	old := b.guest
	b.guest = nil
	if err != nil {
		b.guest = m.cfg.Guests(rec.HostIP, rec.Token)
	}
	b.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if err != nil {
		return fmt.Errorf("attach vm: %w", err)
	}
	m.adopt(b, vm)
	return nil
}

// reached notes what came of an attempt to reach a sandbox, and frees it if its VM
// is gone. Called with the op lock held.
func (m *Manager) reached(b *box, err error) {
	switch {
	case errors.Is(err, errGone) && b.vm != nil:
		m.releaseEnded(b, b.vm.Exit())
	case errors.Is(err, errGone):
		m.release(b, Lost, m.told(err))
	case err != nil:
		m.unreachable(b, err)
	default:
		b.mu.Lock()
		b.looks = 0
		b.mu.Unlock()
		if b.record().Reason == Unreachable {
			_ = m.mark(b, "", "") // the log has it if it is not saved
		}
	}
}

// unreachable marks a sandbox whose VM, guest or network does not do what it
// should, and has it tried again. Nothing of it is touched. Called with the op
// lock held.
func (m *Manager) unreachable(b *box, err error) {
	_ = m.mark(b, Unreachable, m.told(err))
	m.lookAgain(b)
}

// lookAgain sets when the janitor looks at a sandbox again.
func (m *Manager) lookAgain(b *box) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.looks++
	b.lookAt = time.Now().Add(backOff(b.looks))
}

func (b *box) lookDue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	marked := b.rec.Reason == Unreachable && (b.rec.State == Running || b.rec.State == Paused)
	return (marked || b.rec.State == Unknown && b.rec.Reason == Unreadable) && !now.Before(b.lookAt)
}

// look tries again to reach a sandbox that is marked as unreachable. Called with
// the op lock held.
func (m *Manager) look(ctx context.Context, b *box) error {
	rec := b.record()
	// Whatever a save that failed has left on disk: nothing goes on before the
	// record says again what it is.
	if err := m.save(b, func(*Record) {}); err != nil {
		m.lookAgain(b)
		return err
	}
	mended, cancel := context.WithTimeout(ctx, opTimeout)
	broken := m.cfg.Network.Repair(mended, rec.Slot, m.policyInForce(rec), rec.Network.Limits)
	cancel()
	err := m.reach(ctx, b)
	if err == nil {
		err = broken
	}
	if !errors.Is(err, errGone) && errors.Join(context.Cause(b.alive), context.Cause(ctx)) != nil {
		return err // it has ended and is about to be freed, or nobody waits any more
	}
	m.reached(b, err)
	return err
}

// unreached is the answer to who needs what there is no way to.
func unreached(rec Record) error {
	return errdefs.Unavailable.Errorf("sandbox %s does not answer; the host tries again by itself: %s", rec.ID, rec.Detail)
}

// told is an error as a record's detail has it: short, printable and without the
// host's directories.
func (m *Manager) told(err error) string {
	text := strings.NewReplacer(m.cfg.RunDir+"/", "", m.cfg.StateDir+"/", "", "/run/netns/", "").Replace(pathless(err))
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return ';'
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return -1
		}
		return r
	}, text)
	if len(text) > maxDetail {
		text = strings.ToValidUTF8(text[:maxDetail], "") + "…"
	}
	return text
}

// HostFault says what is wrong with the host if it reaches none of several guests
// though their VMs answer; empty otherwise.
func (m *Manager) HostFault() string {
	far := 0
	for _, b := range m.all() {
		b.mu.Lock()
		rec, alone := b.rec, b.far
		b.mu.Unlock()
		switch {
		case rec.State != Running || rec.Warm != "":
		case rec.Reason == Unreachable && alone:
			far++
		default:
			return ""
		}
	}
	if far < 2 {
		return ""
	}
	return fmt.Sprintf("none of the %d guests can be reached, though their VMs answer: look at this host's routes and firewalls, wrenn doctor helps", far)
}

// blame logs once that the fault is the host's, and once that it is over.
func (m *Manager) blame() {
	fault := m.HostFault()
	m.mu.Lock()
	news := (fault != "") != m.blamed
	m.blamed = fault != ""
	m.mu.Unlock()
	switch {
	case news && fault != "":
		m.log.Error(fault)
	case news:
		m.log.Info("guests can be reached again")
	}
}
