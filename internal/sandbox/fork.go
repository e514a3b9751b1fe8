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
)

// MaxForks bounds one Fork.
const MaxForks = 100

// ForkRequest says how many forks are made, and how long they live.
type ForkRequest struct {
	Count int
	// Life is from the moment at which a fork runs until its deadline; zero gives it the
	// source's deadline.
	Life time.Duration
}

func (r ForkRequest) check() error {
	switch {
	case r.Count < 1 || r.Count > MaxForks:
		return errdefs.InvalidArgument.Errorf("count is %d, must be 1 to %d", r.Count, MaxForks)
	case r.Life < 0 || r.Life > MaxTimeout:
		return errdefs.InvalidArgument.Errorf("life is %d s, must be 0 (none) to %d", r.Life/time.Second, MaxTimeout/time.Second)
	}
	return nil
}

// Forked is what came of a Fork.
type Forked struct {
	Sandboxes []Info
	// Paused is how long the source stood still.
	Paused time.Duration
}

// Fork makes new sandboxes from the present state of a running or paused one, which
// goes on, with the deadline that it had: the same memory and disk, with a network, an
// identity and a token of their own. They belong to the project of the source and have
// all that its creator said of it, except its name and owner key. Either all are made or none.
// Streams to the source stay the source's.
func (m *Manager) Fork(ctx context.Context, id ID, req ForkRequest) (Forked, error) {
	if err := req.check(); err != nil {
		return Forked{}, err
	}
	b, err := m.find(id)
	if err != nil {
		return Forked{}, err
	}
	if err := b.full(OpFork); err != nil {
		return Forked{}, err
	}
	rec := b.record()
	if err := m.ledger.allows(rec.Project, m.quotaOf(rec.Project), need(rec.VCPUs, rec.MemMiB, rec.DiskMiB).times(req.Count)); err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	copied, err := m.disk.reserve(int64(rec.MemMiB)<<20 + m.store.takenBytes(id))
	if err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	defer copied()
	// Garbage to the next agent.
	dir, err := os.MkdirTemp(m.store.dir, ".fork-")
	if err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, errdefs.DiskFull(err))
	}
	// A VM that runs from it has it open.
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, snapshotOverlay)
	was, err := m.copyState(ctx, id, "forked", freezing{op: OpFork, dir: dir, disk: func(ctx context.Context, overlay string) error {
		return m.cfg.Templates.CloneOverlay(ctx, disk, overlay)
	}})
	if err != nil {
		return Forked{}, err
	}
	sandboxes, err := m.forkAll(ctx, was.record, req, source{memory: dir, disk: disk, token: was.record.Token})
	if err != nil {
		return Forked{}, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	m.note(b, Checkpointed, ActorOf(ctx))
	return Forked{Paused: was.paused, Sandboxes: sandboxes}, nil
}

// copyState freezes a sandbox for an operation that copies its state.
func (m *Manager) copyState(ctx context.Context, id ID, doing string, f freezing) (frozen, error) {
	b, ctx, end, err := m.begin(ctx, id, f.op, doing)
	if err != nil {
		return frozen{}, err
	}
	defer end()
	return m.freeze(ctx, b, f)
}

// forkAll makes sandboxes from a copy of another. Either all are made or none.
func (m *Manager) forkAll(ctx context.Context, of Record, req ForkRequest, src source) ([]Info, error) {
	made, errs := make([]Info, req.Count), make([]error, req.Count)
	var wg sync.WaitGroup
	for i := range req.Count {
		wg.Go(func() { made[i], errs[i] = m.fork(ctx, of, req.Life, src) })
	}
	wg.Wait()
	if errors.Join(errs...) == nil {
		return made, nil
	}
	var failed error
	for i, err := range errs {
		if err != nil {
			failed = err // one of them says enough
			continue
		}
		wg.Go(func() {
			if err := m.Destroy(context.WithoutCancel(ctx), made[i].ID); err != nil {
				m.log.Error("fork not destroyed", "sandbox", made[i].ID, "err", err)
			}
		})
	}
	wg.Wait()
	return nil, failed
}

// fork makes one sandbox from a copy of another, with the life given or the deadline of
// the other.
func (m *Manager) fork(ctx context.Context, of Record, life time.Duration, src source) (Info, error) {
	tmpl, err := m.rootOf(of)
	if err != nil {
		return Info{}, err
	}
	req := CreateRequest{
		VMM: m.driverOf(of).Name(), snapshot: of.Snapshot, VCPUs: of.VCPUs, MemMiB: of.MemMiB, DiskMiB: of.DiskMiB,
		Timeout: of.Timeout, OnTimeout: of.OnTimeout, EndAt: of.EndAt, OnEnd: of.OnEnd,
		Life: of.Life, AutoResume: of.AutoResume, Busy: of.Busy,
		Network: of.Network, Ingress: of.Ingress, Login: of.Login, Labels: of.Labels.clone(),
	}
	req.Labels.OwnerKey, req.Labels.Name = "", ""
	if life > 0 {
		req.EndAt, req.Life = time.Time{}, life
	} else if of.EndAt.IsZero() {
		req.Life = 0
	}
	created, err := m.create(ctx, req, tmpl, fromSnapshot(src))
	return created.Info, err
}
