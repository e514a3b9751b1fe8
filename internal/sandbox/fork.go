package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
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
	dir, source, paused, err := m.photograph(ctx, id)
	if err != nil {
		return Forked{}, err
	}
	// Whoever runs from it has it open.
	defer os.RemoveAll(dir)

	forked := Forked{Paused: paused, Sandboxes: make([]Info, count)}
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() { forked.Sandboxes[i], errs[i] = m.fork(ctx, source, dir) })
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

// photograph writes the state of a sandbox to a directory that is garbage to
// the next agent, and lets it go on.
func (m *Manager) photograph(ctx context.Context, id ID) (dir string, source Record, paused time.Duration, err error) {
	b, ctx, end, err := m.begin(ctx, id, OpFork, "forked")
	if err != nil {
		return "", Record{}, 0, err
	}
	defer end()
	source = b.record()
	snapshotter, ok := b.vm.(vmm.Snapshotter)
	if !ok {
		return "", source, 0, errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", m.cfg.Driver.Name())
	}
	dir, err = os.MkdirTemp(m.store.dir, ".fork-")
	if err != nil {
		return "", source, 0, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	tmp := dir
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	back := func(context.Context) error { return nil }
	if source.State == Running {
		if err := b.guest.Quiesce(ctx, false); err != nil {
			return "", source, 0, fmt.Errorf("fork sandbox %s: %w", id, err)
		}
		back = func(ctx context.Context) error {
			if err := b.vm.Resume(ctx); err != nil {
				return err
			}
			return b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: source.Token})
		}
	}
	began := time.Now()
	if source.State == Running {
		err = b.vm.Pause(ctx)
	}
	if err == nil {
		var disk error
		var wg sync.WaitGroup
		wg.Go(func() {
			disk = m.cfg.Templates.CloneOverlay(ctx, filepath.Join(dir, snapshotOverlay), m.store.overlay(id))
		})
		err = snapshotter.Snapshot(ctx, dir)
		wg.Wait()
		err = errors.Join(err, disk)
	}
	if err != nil {
		return "", source, 0, m.backTo(ctx, b, "fork", back, err)
	}
	// What the source cannot come back from is no fork's fault, but its end.
	wake, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	if err := back(wake); err != nil {
		return "", source, 0, m.backTo(ctx, b, "fork", back, err)
	}
	return dir, source, time.Since(began), nil
}

// fork makes one sandbox from the state of another in dir.
func (m *Manager) fork(ctx context.Context, source Record, dir string) (Info, error) {
	tmpl, err := m.cfg.Templates.Get(source.Template)
	if err != nil {
		return Info{}, err
	}
	if tmpl.BaseSHA256 != source.Base {
		return Info{}, errdefs.Unsupported.Errorf("template %q has another base image than when the sandbox was made", source.Template)
	}
	req := CreateRequest{
		Template: source.Template, VCPUs: source.VCPUs, MemMiB: source.MemMiB,
		Timeout: source.Timeout, OnTimeout: source.OnTimeout, diskMiB: source.DiskMiB,
	}
	created, err := m.make(ctx, req, source.Base, func(ctx context.Context, b *box, took *phases) error {
		done, err := m.startSlot(ctx)
		if err != nil {
			return err
		}
		defer done()
		ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.BootTimeout,
			errdefs.Unavailable.Errorf("the guest was not ready within %s", m.cfg.BootTimeout))
		defer cancel()
		from := origin{}
		from.ready.Dir, from.ready.Overlay = dir, filepath.Join(dir, snapshotOverlay)
		if err := m.prepare(ctx, b, &from, took); err != nil {
			return err
		}
		if from.ready.Dir == "" {
			return errdefs.Corrupt.Errorf("the snapshot has no disk")
		}
		took.begin()
		// Its variables are those of the source; until it is told otherwise, so
		// is its token.
		in := identity(b.record(), true)
		in.Env, in.DefaultUser = nil, ""
		if err := m.restore(ctx, b, tmpl, dir, in, source.Token, took); err != nil {
			return err
		}
		took.from = FromSnapshot
		m.log.Info("sandbox forked", append([]any{"sandbox", b.id, "source", source.ID}, took.attrs...)...)
		return m.move(b, Running, nil)
	})
	return created.Info, err
}
