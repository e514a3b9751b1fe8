package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// reconcileEvery is how often what exists is compared with the records.
const reconcileEvery = time.Minute

// reconciler compares what exists on the host with the records.
type reconciler struct {
	*vms
	fence  *fence
	ledger *ledger

	mu sync.Mutex
	// faultLogged: the log says that no guest can be reached.
	faultLogged bool
}

// run does so until the manager's life ends.
func (r *reconciler) run() {
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			ctx, cancel := context.WithTimeout(r.life, releaseTimeout)
			r.reconcile(ctx)
			cancel()
		case <-r.life.Done():
			return
		}
	}
}

// reconcile removes what carries our mark and belongs to no sandbox, and rebuilds
// what was taken from a sandbox's network. A sandbox whose network cannot be
// rebuilt is marked as unreachable: its memory and its disk are all right.
func (r *reconciler) reconcile(ctx context.Context) {
	var found Recovery
	if err := r.removeStrays(ctx, &found); err != nil {
		r.log.Error("strays not removed", "err", err)
	}
	if len(found.Strays) > 0 {
		r.log.Warn("strays removed", "strays", found.Strays)
	}

	r.logHostFault()

	var slots []network.Slot
	boxes := r.slots()
	for slot, b := range boxes {
		if s := b.state(); s == Running || s == Paused {
			slots = append(slots, slot)
		}
	}
	wrong, err := r.cfg.Network.CheckAll(ctx, slots)
	if err != nil {
		r.log.Error("networks not checked", "err", err)
		return
	}
	if wrong.Host != nil {
		r.log.Warn("the host's part of the networks is set up again", "wrong", wrong.Host)
		if err := r.cfg.Network.Setup(ctx); err != nil {
			r.log.Error("the host's part of the networks not set up", "err", err)
		}
	}
	for slot, wrong := range wrong.Slots {
		// An operation on it may be the reason; it is looked at again.
		if b := boxes[slot]; b.tryHold("repaired") {
			r.goes("repair", func() {
				defer b.unhold()
				r.repair(b, slot, wrong)
			})
		}
	}
}

// repair rebuilds the network of a sandbox. Called with the op lock held.
func (r *reconciler) repair(b *box, slot network.Slot, wrong error) {
	rec := b.record()
	if rec.Slot != slot || rec.State != Running && rec.State != Paused {
		return
	}
	ctx, cancel := context.WithTimeout(r.life, opTimeout)
	defer cancel()
	err := r.cfg.Network.Repair(ctx, slot, r.policyInForce(rec), rec.Network.Limits)
	switch {
	case err == nil:
		r.log.Warn("network repaired", "sandbox", b.id, "slot", slot, "wrong", wrong)
	case errors.Is(err, errdefs.Unavailable):
		r.unreachable(b, err)
	default:
		r.log.Error("network not repaired, will try again", "sandbox", b.id, "slot", slot, "wrong", wrong, "err", err)
	}
}

// removeStrays ends the VMs and closes the slots that belong to no sandbox. Whose
// directory is there has a sandbox, whatever its record says.
func (r *reconciler) removeStrays(ctx context.Context, found *Recovery) error {
	known := func(name string) bool {
		b := r.lookup(ID(name))
		if b != nil || !idPattern.MatchString(name) {
			return b != nil
		}
		_, err := os.Lstat(r.store.path(ID(name)))
		return !errors.Is(err, fs.ErrNotExist)
	}
	killed, err := r.cfg.KillStrays(ctx, r.cfg.RunDir, r.cgroups(), known)
	if err != nil {
		return fmt.Errorf("kill stray vms: %w", err)
	}
	found.Strays = append(found.Strays, killed...)
	if err := r.fenceUnknown(ctx); err != nil {
		r.log.Error("stray networks are left, they may belong to unknown sandboxes", "err", err)
		return nil
	}
	// What cannot be removed is fenced off, counted and tried again there.
	strays, err := r.cfg.Network.RemoveStrays(ctx)
	if err != nil {
		r.log.Error("stray networks not removed, their slots are fenced off", "err", err)
	}
	for _, s := range strays {
		found.Strays = append(found.Strays, fmt.Sprintf("slot %d", s))
	}
	entries, err := os.ReadDir(r.cfg.RunDir)
	if err != nil {
		return fmt.Errorf("read run directory: %w", err)
	}
	for _, e := range entries {
		if idPattern.MatchString(e.Name()) && !known(e.Name()) {
			if err := os.RemoveAll(filepath.Join(r.cfg.RunDir, e.Name())); err != nil {
				return fmt.Errorf("remove stray run directory: %w", err)
			}
		}
	}
	return nil
}

// slots returns the boxes that have one, by it.
func (r *reconciler) slots() map[network.Slot]*box {
	slots := map[network.Slot]*box{}
	for _, b := range r.all() {
		if rec := b.record(); rec.Slot != 0 && rec.State != Stopped {
			slots[rec.Slot] = b
		}
	}
	return slots
}

// fenceUnknown keeps the networks of unknown sandboxes from being taken for strays. That
// of a VM is the one that its process is in. Where that cannot be found out, every
// network that no record names is kept.
func (r *reconciler) fenceUnknown(ctx context.Context) error {
	var unknown []*box
	for _, b := range r.all() {
		if rec := b.record(); rec.State == Unknown && rec.Slot == 0 {
			unknown = append(unknown, b)
		}
	}
	if len(unknown) == 0 {
		return r.fence.free(ctx)
	}
	strays, err := r.cfg.Network.Strays(ctx)
	if err != nil {
		return fmt.Errorf("look for the networks of unknown sandboxes: %w", err)
	}
	strays = append(strays, r.fence.held()...)
	var paths []string
	slots := map[string]network.Slot{}
	for _, s := range strays {
		path := r.cfg.Network.Plan().Addrs(s).NetNSPath
		paths, slots[path] = append(paths, path), s
	}
	sure := true
	for _, b := range unknown {
		if !b.tryHold("looked at") {
			sure = false
			continue
		}
		path, err := r.cfg.NetNSOf(r.cfg.RunDir, string(b.id), paths)
		if s, ok := slots[path]; ok && err == nil {
			err = r.giveSlot(b, s)
		}
		if err != nil {
			r.log.Warn("network of an unknown sandbox not found", "sandbox", b.id, "err", err)
			sure = false
		}
		b.unhold()
	}
	if sure {
		return r.fence.free(ctx)
	}
	for _, s := range strays {
		// One that is taken by now is a sandbox's that is known.
		if r.cfg.Network.Claim(s) == nil {
			r.fence.hold(s)
		}
	}
	return nil
}

// giveSlot notes that a slot belongs to an unknown sandbox. Called with the op
// lock held.
func (r *reconciler) giveSlot(b *box, s network.Slot) error {
	if err := r.fence.claim(s); err != nil {
		return err
	}
	b.set(func(rec *Record) { rec.Slot, rec.HostIP = s, r.cfg.Network.Plan().Addrs(s).HostIP })
	rec := b.record()
	r.ledger.adopt(b.id, r.projectOf(rec), rec.takes())
	return nil
}

// HostFault says what is wrong with the host if it reaches none of several guests
// though their VMs answer; empty otherwise.
func (r *reconciler) HostFault() string {
	far := 0
	for _, b := range r.all() {
		rec := b.record()
		switch {
		case rec.State != Running:
		case rec.Reason == Unreachable && b.isFar():
			far++
		default:
			return ""
		}
	}
	if far < 2 {
		return ""
	}
	return fmt.Sprintf("none of the %d guests can be reached, though their VMs answer: "+
		"look at this host's routes and firewalls, wrenn doctor helps", far)
}

// logHostFault logs once that the fault is the host's, and once that it is over.
func (r *reconciler) logHostFault() {
	fault := r.HostFault()
	r.mu.Lock()
	news := (fault != "") != r.faultLogged
	r.faultLogged = fault != ""
	r.mu.Unlock()
	switch {
	case news && fault != "":
		r.log.Error(fault)
	case news:
		r.log.Info("guests can be reached again")
	}
}
