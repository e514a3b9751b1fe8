package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// Recovery is what Open found of an earlier agent's sandboxes.
type Recovery struct {
	// Adopted go on as they were.
	Adopted []ID
	// Unreachable have their VM, but it or its guest does not answer.
	Unreachable []ID
	// Lost had lost their VM.
	Lost []ID
	// Freed were half made or half gone.
	Freed []ID
	// Unknown have a record that cannot be used, and were left alone.
	Unknown []ID
	// Strays belonged to no record.
	Strays []string
}

func (r Recovery) String() string {
	return fmt.Sprintf("adopted %d, unreachable %d, lost %d, freed %d half-made, removed %d strays, left alone %d with unusable records",
		len(r.Adopted), len(r.Unreachable), len(r.Lost), len(r.Freed), len(r.Strays), len(r.Unknown))
}

// Open takes over the state directory: it adopts the sandboxes that run, frees
// what is half made or belongs to no sandbox, and then accepts calls. Another agent
// on the same directory is errdefs.Busy.
func Open(ctx context.Context, cfg Config) (*Manager, Recovery, error) {
	lock, err := lockDir(cfg.StateDir)
	if err != nil {
		return nil, Recovery{}, err
	}
	m := newManager(cfg, lock)
	found, err := m.recover(ctx)
	if err != nil {
		m.end()
		m.wg.Wait()
		_ = os.Remove(cfg.RunDir) // unless a VM has its own there
		lock.release()
		return nil, Recovery{}, fmt.Errorf("recover sandboxes: %w", err)
	}
	m.goes("janitor", janitor{m}.run)
	m.goes("reconciler", m.reconciler.run)
	m.goes("disk", m.disk.watch)
	m.goes("sampler", sampler{m}.run)
	m.goes("denials", newTeller(m).run)
	m.goes("prune templates", func() { m.pruneTemplates(m.life) })
	m.goes("read ahead", func() { m.readAhead(m.life) })
	if cfg.Warm != 0 {
		m.goes("pool", m.keeper.run)
	}
	return m, found, nil
}

// newManager returns a manager that knows no sandbox yet.
func newManager(cfg Config, lock *dirLock) *Manager {
	disk := store{dir: filepath.Join(cfg.StateDir, "sandboxes"), hook: cfg.storeHook}
	free := disk.freeBytes
	if cfg.freeDisk != nil {
		free = cfg.freeDisk
	}
	m := &Manager{
		registry: &registry{store: disk, log: cfg.Log, boxes: map[ID]*box{}, ends: map[Reason]int{}},
		work:     newWork(cfg.Log),
		host:     &host{cfg: cfg, store: disk, log: cfg.Log},
		ledger:   newLedger(cfg.Capacity, free),
		fence:    &fence{net: cfg.Network, slots: map[network.Slot]bool{}},
		pool:     newPool(),
		owners:   newOwners(),
		names:    newOwners(),
		lock:     lock, store: disk, log: cfg.Log, woken: make(chan struct{}, 1),
		expiring: map[chore]chan struct{}{
			choreExpire: make(chan struct{}, expireMost), choreHibernate: make(chan struct{}, expireMost),
		},
	}
	m.disk = newDisk(m.registry, m.work, m.ledger, free, cfg.Capacity)
	m.vms = &vms{
		registry: m.registry, work: m.work, host: m.host, disk: m.disk, log: cfg.Log, store: disk,
		starts: make(chan struct{}, cfg.Capacity.Starts), started: m.pool.stir,
	}
	m.holdings = &holdings{m.vms, m.ledger, m.pool}
	m.keeper = keeper{m.holdings}
	m.pool.want(m.decide(cfg.Drivers[0]))
	m.vms.ended = m.releaseEnded
	m.reconciler = &reconciler{vms: m.vms, fence: m.fence, ledger: m.ledger}
	return m
}

func (m *Manager) recover(ctx context.Context) (found Recovery, err error) {
	if err := os.MkdirAll(m.store.dir, 0o700); err != nil {
		return found, fmt.Errorf("make sandbox directory: %w", err)
	}
	m.disk.grow(m.disk.free())
	if m.events, err = openEvents(filepath.Join(m.cfg.StateDir, "events.jsonl"), m.log); err != nil {
		return found, err
	}
	if err := os.MkdirAll(m.cfg.RunDir, 0o711); err != nil {
		return found, fmt.Errorf("make run directory: %w", err)
	}
	if err := m.cfg.Network.Setup(ctx); err != nil {
		return found, fmt.Errorf("set up network: %w", err)
	}
	records, left, err := m.store.loadAll()
	if err != nil {
		return found, err
	}
	if left != nil {
		m.log.Warn("garbage not removed", "err", left)
	}
	for _, rec := range records {
		m.enter(rec)
	}
	if err := m.removeStrays(ctx, &found); err != nil {
		return found, err
	}
	return m.takeUpAll(ctx, found), nil
}

// enter makes a record of an earlier agent known.
func (m *Manager) enter(rec Record) {
	if rec.State != Stopped && rec.State != Unknown && rec.Slot != 0 {
		// No two sandboxes have one slot: one of the records is wrong, and the VMs
		// show which.
		if err := m.cfg.Network.Claim(rec.Slot); err != nil {
			for _, b := range m.all() {
				if other := b.record(); other.Slot == rec.Slot && other.State != Unknown && other.State != Stopped {
					m.fence.hold(rec.Slot)
					m.enter(m.store.unknown(other.ID, fmt.Errorf("the record's network slot: %w", err)))
				}
			}
			rec = m.store.unknown(rec.ID, fmt.Errorf("the record's network slot: %w", err))
		}
	}
	if rec.State == Unknown {
		m.standIn(&rec)
	}
	m.adopt(rec)
	if rec.State != Stopped {
		m.ledger.adopt(rec.ID, m.projectOf(rec), rec.takes())
	}
}

// takeUpAll brings every record to a state that is true. It waits for that no
// longer than adoptTimeout: what takes more goes on behind it, its op lock held.
func (m *Manager) takeUpAll(ctx context.Context, found Recovery) Recovery {
	var mu sync.Mutex
	var wg sync.WaitGroup
	bound := make(chan struct{}, 16)
	for _, b := range m.all() {
		wg.Add(1)
		b.hold(context.Background(), "recovered")
		m.goes("take up", func() {
			defer wg.Done()
			bound <- struct{}{}
			defer func() { <-bound }()
			defer b.unhold()
			list := m.takeUp(ctx, b, &found)
			if list != nil {
				mu.Lock()
				*list = append(*list, b.id)
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	late := time.NewTimer(adoptTimeout + time.Second)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		m.log.Warn("some sandboxes are still being taken up")
	}
	m.logHostFault()
	mu.Lock()
	defer mu.Unlock()
	return found
}

// takeUp brings one record to a state that is true, and returns the list of
// found in which its ID belongs. Called with the op lock held.
func (m *Manager) takeUp(ctx context.Context, b *box, found *Recovery) *[]ID {
	switch rec := b.record(); rec.State {
	case Creating, Waiting, Building:
		_ = m.release(b, CreateFailed, "the agent stopped while the sandbox was being created")
		return &found.Freed
	case Stopped:
		if rec.BootKey != "" { // a waiting guest of an earlier agent's
			_ = m.forget(b)
		}
		return nil
	case Stopping:
		_ = m.release(b, rec.Reason, rec.Detail)
		return &found.Freed
	case Running, Paused:
		return m.takeUpVM(ctx, b, found)
	case Hibernated:
		return m.takeUpHibernated(ctx, b, found)
	case Unknown:
		if m.reread(ctx, b) == nil {
			return &found.Adopted
		}
		m.tellUnknown(b)
		return &found.Unknown
	default:
		return nil
	}
}

// takeUpVM adopts the VM of a sandbox that has one. Lost is only what is proven to
// be gone.
func (m *Manager) takeUpVM(ctx context.Context, b *box, found *Recovery) *[]ID {
	// Of a hibernation that did not come to its end.
	if err := m.store.dropSnapshots(b.id); err != nil {
		m.log.Error("garbage not removed", "sandbox", b.id, "err", err)
	}
	err := m.reach(ctx, b)
	m.reached(b, err)
	switch {
	case errors.Is(err, errGone):
		return &found.Lost
	case err != nil:
		return &found.Unreachable
	default:
		return &found.Adopted
	}
}

// Shutdown ends the manager: no more creates, those in progress are undone.
// The VMs are left for the next agent, or, with destroy, ended in parallel, but
// for those of unknown sandboxes, which a person decides about.
// It may be called again; each call returns when all is done or ctx ends.
func (m *Manager) Shutdown(ctx context.Context, destroy bool) error {
	m.drain()
	m.pool.close()

	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, b := range m.all() {
		state := b.state()
		creating := state == Creating || state.hidden()
		destroy := destroy && state != Unknown || state == Building
		if !creating && !destroy {
			continue
		}
		if creating {
			b.cancel(errShutDown)
		}
		wg.Go(func() {
			var err error
			if destroy || m.pool.holds(b) {
				err = m.destroy(ctx, b)
			} else if err = b.hold(ctx, "awaited"); err == nil {
				b.unhold()
			}
			if err != nil && !errors.Is(err, errdefs.NotFound) {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := m.stop(ctx); err != nil {
		return errors.Join(append(errs, err)...)
	}
	m.events.shut()
	// Unless a VM's directory is in it, for the next agent to find.
	_ = os.Remove(m.cfg.RunDir)
	m.lock.release()
	return errors.Join(errs...)
}

// dirLock keeps a second agent out of a state directory. The kernel drops it
// with the process, however that ends.
type dirLock struct {
	once sync.Once
	f    *os.File
}

func lockDir(dir string) (*dirLock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errdefs.Busy.Errorf("another agent (pid %s) uses the state directory %s", strings.TrimSpace(string(holder[:n])), dir)
		}
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	holder := fmt.Appendln(nil, os.Getpid())
	_, err = f.WriteAt(holder, 0)
	if err := errors.Join(err, f.Truncate(int64(len(holder)))); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	return &dirLock{f: f}, nil
}

func (l *dirLock) release() { l.once.Do(func() { l.f.Close() }) }
