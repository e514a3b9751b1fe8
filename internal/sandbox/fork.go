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
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// MaxForks bounds one Fork.
const MaxForks = 100

// Forked is what came of a Fork.
type Forked struct {
	Sandboxes []Info
	// Paused is how long the source stood still.
	Paused time.Duration
}

// Fork makes count new sandboxes from the present state of a running or paused
// one, which goes on: the same memory and disk, with a network, an identity and
// a token of their own. Either all are made or none. Streams to the source stay
// the source's.
func (m *Manager) Fork(ctx context.Context, id ID, count int) (Forked, error) {
	if count < 1 || count > MaxForks {
		return Forked{}, errdefs.InvalidArgument.Errorf("count is %d, must be 1 to %d", count, MaxForks)
	}
	b, err := m.find(id)
	if err != nil {
		return Forked{}, err
	}
	if err := b.full(OpFork); err != nil {
		return Forked{}, err
	}
	copied, err := m.room(int64(b.record().MemMiB)<<20 + m.store.takenBytes(id))
	if err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	defer copied()
	// Garbage to the next agent.
	dir, err := os.MkdirTemp(m.store.dir, ".fork-")
	if err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, errdefs.DiskFull(err))
	}
	// Whoever runs from it has it open.
	defer os.RemoveAll(dir)
	from := photo{Ready: template.Ready{Dir: dir, Overlay: filepath.Join(dir, snapshotOverlay)}}
	source, paused, err := m.photograph(ctx, id, OpFork, "forked", dir, func(ctx context.Context, disk string) error {
		return m.cfg.Templates.CloneOverlay(ctx, from.Overlay, disk)
	})
	if err != nil {
		return Forked{}, err
	}
	from.token = source.Token

	forked := Forked{Paused: paused, Sandboxes: make([]Info, count)}
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() { forked.Sandboxes[i], errs[i] = m.fork(ctx, source, from) })
	}
	wg.Wait()
	if failed := errors.Join(errs...); failed != nil {
		for i, err := range errs {
			if err != nil {
				failed = err // the first says enough
				continue
			}
			wg.Go(func() {
				if err := m.Destroy(context.WithoutCancel(ctx), forked.Sandboxes[i].ID); err != nil {
					m.log.Error("fork not destroyed", "sandbox", forked.Sandboxes[i].ID, "err", err)
				}
			})
		}
		wg.Wait()
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, failed)
	}
	return forked, nil
}

// photograph writes the state of a sandbox to a directory, its disk through
// addDisk, and lets it go on. source is what its record said then; paused is how
// long it stood still.
func (m *Manager) photograph(ctx context.Context, id ID, op Operation, doing, dir string, addDisk func(ctx context.Context, disk string) error) (source Record, paused time.Duration, err error) {
	b, ctx, end, err := m.begin(ctx, id, op, doing)
	if err != nil {
		return Record{}, 0, err
	}
	defer end()
	source = b.record()
	snapshotter, ok := b.vm.(vmm.Snapshotter)
	if !ok {
		return source, 0, errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", m.cfg.Driver.Name())
	}
	back := m.asBefore(b, source)
	if source.State == Paused {
		// The guest has to help: it runs for as long as that takes.
		if err := b.vm.Resume(ctx); err != nil {
			return source, 0, m.backTo(ctx, b, string(op), back, err)
		}
	}
	stopped, err := m.freeze(ctx, b)
	if err != nil {
		if source.State == Paused {
			return source, 0, m.backTo(ctx, b, string(op), back, err)
		}
		return source, 0, fmt.Errorf("%s sandbox %s: %w", op, id, m.whyStill(b, err))
	}
	began := stopped
	if source.State == Paused {
		began = time.Now() // it stood still anyway
	}
	err = b.vm.Pause(ctx)
	if err == nil {
		var disk error
		var wg sync.WaitGroup
		wg.Go(func() {
			disk = addDisk(ctx, m.store.overlay(id))
		})
		err = snapshotter.Snapshot(ctx, dir)
		wg.Wait()
		err = errors.Join(err, disk)
	}
	if err != nil {
		return source, 0, m.backTo(ctx, b, string(op), back, err)
	}
	// What the source cannot come back from is no fork's fault, but its end.
	wake, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	if err := back(wake); err != nil {
		return source, 0, m.backTo(ctx, b, string(op), back, err)
	}
	return source, time.Since(began), nil
}

// freeze has the guest write out what it has in memory and stops its programs,
// which only Init lets go on: in a copy that is made now none of them runs under
// the identity, the clock and the random numbers of another. since is when they
// stopped, or a little earlier.
func (m *Manager) freeze(ctx context.Context, b *box) (since time.Time, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, syncTimeout,
		errdefs.Unavailable.Errorf("the guest did not write out its memory within %s", syncTimeout))
	defer cancel()
	// Most of it while they run.
	if err := b.guest.Quiesce(ctx, false); err != nil {
		return time.Time{}, err
	}
	since = time.Now()
	err = b.guest.Freeze(ctx)
	if err == nil {
		return since, nil
	}
	m.thaw(ctx, b)
	return since, err
}

// thaw lets the programs of a guest go on whose freeze failed, which may have
// stopped them all the same.
func (m *Manager) thaw(ctx context.Context, b *box) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	if err := b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: b.record().Token}); err != nil {
		m.log.Warn("programs may still be stopped", "sandbox", b.id, "err", err)
	}
}

// asBefore returns what brings a VM back to what it was when an operation began.
// The programs of one that was paused stay frozen: its resume thaws them.
func (m *Manager) asBefore(b *box, was Record) func(context.Context) error {
	return func(ctx context.Context) error {
		if was.State == Paused {
			return b.vm.Pause(ctx)
		}
		if err := b.vm.Resume(ctx); err != nil {
			return err
		}
		return b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: was.Token})
	}
}

// photo is the state of a sandbox that others start from.
type photo struct {
	template.Ready
	// token is what its guest knows as its own, or as its clones'.
	token string
	// why, if set, says why the memory cannot be restored: they boot from the
	// disk alone. bootable says that it can be booted.
	why      string
	bootable bool
}

// develop starts a sandbox's VM from a photo. Called with the op lock held; the
// caller releases on error.
func (m *Manager) develop(ctx context.Context, b *box, tmpl template.Template, p photo, took *phases) error {
	done, err := m.startSlot(ctx)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.BootTimeout,
		errdefs.Unavailable.Errorf("the guest was not ready within %s", m.cfg.BootTimeout))
	defer cancel()
	took.end("wait")
	from := origin{ready: p.Ready}
	if err := m.prepare(ctx, b, &from, took); err != nil {
		return err
	}
	deleted := errdefs.NotFound.Errorf("the snapshot was deleted meanwhile")
	if from.ready.Dir == "" { // an empty disk would be worse than none
		return deleted
	}
	took.begin()
	took.from, took.why = FromSnapshot, ""
	if p.why == "" {
		in := identity(b.record(), true)
		in.NewBootID = true
		err := m.restore(ctx, b, tmpl, memory{dir: p.Dir, token: p.token}, in, took)
		if err == nil {
			return nil
		}
		if _, gone := os.Stat(p.Dir); errors.Is(gone, fs.ErrNotExist) {
			return deleted
		}
		if !p.bootable || context.Cause(ctx) != nil || errdefs.ClassOf(err) != errdefs.Unsupported {
			return err
		}
		p.why = first(err)
		if err := m.unstart(ctx, b); err != nil {
			return err
		}
		if err := m.cfg.Templates.CloneOverlay(ctx, m.store.overlay(b.id), p.Overlay); err != nil {
			return fmt.Errorf("make overlay: %w", err)
		}
	}
	took.from, took.why = FromBoot, p.why
	return m.coldBoot(ctx, b, tmpl, &origin{why: p.why}, took)
}

// fork makes one sandbox from the photo of another.
func (m *Manager) fork(ctx context.Context, source Record, from photo) (Info, error) {
	tmpl, err := m.cfg.Templates.Get(source.Template)
	if err != nil {
		return Info{}, err
	}
	if tmpl.BaseSHA256 != source.Base {
		return Info{}, errdefs.Unsupported.Errorf("template %q has another base image than when the sandbox was made", source.Template)
	}
	req := CreateRequest{
		Template: source.Template, VCPUs: source.VCPUs, MemMiB: source.MemMiB,
		Timeout: source.Timeout, OnTimeout: source.OnTimeout, Network: source.Network, Login: source.Login, diskMiB: source.DiskMiB,
	}
	created, err := m.make(ctx, req, source.Base, func(ctx context.Context, b *box, took *phases) error {
		if err := m.develop(ctx, b, tmpl, from, took); err != nil {
			return err
		}
		m.log.Info("sandbox forked", append([]any{"sandbox", b.id, "source", source.ID}, took.attrs...)...)
		return m.move(b, Running, nil)
	})
	return created.Info, err
}
