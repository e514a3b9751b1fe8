package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// syncTimeout bounds the guest's sync before its VM is stopped for good.
	syncTimeout = 30 * time.Second
	// perGiBMove is added to the time limit of a hibernation and its end for
	// each GiB of memory: a slow disk takes that long.
	perGiBMove = 2 * time.Minute
)

// OnTimeout is what becomes of a sandbox that expires.
type OnTimeout string

const (
	DestroyOnTimeout   OnTimeout = "destroy"
	HibernateOnTimeout OnTimeout = "hibernate"
)

func (o *OnTimeout) check() error {
	switch *o {
	case "":
		*o = DestroyOnTimeout
	case DestroyOnTimeout, HibernateOnTimeout:
	default:
		return fmt.Errorf("on_timeout is %.40q, must be destroy or hibernate", string(*o))
	}
	return nil
}

// Hibernate writes a running or paused sandbox to disk and ends its VM: memory,
// vCPUs and network are free then. Until the snapshot is complete nothing is
// lost: on error the sandbox is as it was. Streams to the guest end.
func (m *Manager) Hibernate(ctx context.Context, id ID) error {
	b, ctx, end, err := m.begin(ctx, id, OpHibernate, "hibernated")
	if err != nil {
		return err
	}
	defer end()
	return m.hibernate(ctx, b)
}

// hibernate is called with the op lock held.
func (m *Manager) hibernate(ctx context.Context, b *box) error {
	was := b.record()
	snapshotter, ok := b.vm.(vmm.Snapshotter)
	if !ok {
		return errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", m.cfg.Driver.Name())
	}
	if err := b.full(OpHibernate); err != nil {
		return err
	}
	copied, err := m.room(int64(was.MemMiB) << 20)
	if err != nil {
		return fmt.Errorf("hibernate sandbox %s: %w", b.id, err)
	}
	defer copied()
	back := func(context.Context) error { return nil }
	if was.State == Running {
		// The disk alone is worth something, too.
		sync, cancel := context.WithTimeout(ctx, syncTimeout)
		err := b.guest.Quiesce(sync, false)
		cancel()
		if err != nil {
			return fmt.Errorf("hibernate sandbox %s: %w", b.id, m.whyStill(b, err))
		}
		back = func(ctx context.Context) error {
			if err := b.vm.Resume(ctx); err != nil {
				return err
			}
			return b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: was.Token})
		}
		if err := b.vm.Pause(ctx); err != nil {
			return m.backTo(ctx, b, "hibernate", back, err)
		}
	}
	began := time.Now()
	err = m.store.takeSnapshot(ctx, b.id, func(dir string) error { return snapshotter.Snapshot(ctx, dir) })
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = m.move(b, Hibernated, func(r *Record) { r.Restored = false })
	}
	if err != nil {
		// Whatever the disk says: without a snapshot the VM is what counts.
		if derr := m.store.dropSnapshots(b.id); derr != nil {
			m.release(b, VMExited, fmt.Sprintf("hibernate: %v; then %v", err, derr))
			return fmt.Errorf("hibernate sandbox %s: %w", b.id, errdefs.DiskFull(err))
		}
		err = m.backTo(ctx, b, "hibernate", back, err)
		if b.state() == was.State {
			m.save(b, func(*Record) {}) // over what a failed save may have left
		}
		return err
	}
	m.log.Info("snapshot written", "sandbox", b.id, "took", time.Since(began).Round(time.Millisecond))
	b.kill(errdefs.Unavailable.Errorf("sandbox %s is hibernated", b.id))
	_ = m.letGo(b) // the janitor goes on with what is left
	return nil
}

// letGo frees what a hibernated sandbox does not need: VM, network, capacity,
// the disk's copy. What cannot be freed is tried again. Called with the op lock
// held.
func (m *Manager) letGo(b *box) error {
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	rec := b.record()
	b.mu.Lock()
	g := b.guest
	b.guest = nil
	b.mu.Unlock()
	if g != nil {
		g.Close()
	}
	err := m.freeHost(ctx, b, rec)
	if err == nil {
		err = m.save(b, func(r *Record) { r.VM, r.Slot, r.HostIP = nil, 0, netip.Addr{} })
	}
	if err != nil {
		m.postpone(b)
		m.log.Error("hibernated sandbox not freed, will try again", "sandbox", b.id, "err", err)
		return errdefs.Unavailable.Errorf("sandbox %s is hibernated but not all of it could be freed yet; the host tries again by itself", b.id)
	}
	b.mu.Lock()
	b.vm, b.naps = nil, 0
	b.renew()
	b.mu.Unlock()
	if rec.Slot != 0 {
		if err := m.cfg.Network.Release(rec.Slot); err != nil {
			m.log.Error("slot not given back", "sandbox", b.id, "slot", rec.Slot, "err", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if rec.Slot != 0 {
		m.used = m.used.minus(rec.awake())
	}
	m.settled(b)
	return nil
}

// awaken lets a hibernated sandbox go on. Its snapshot is not touched before it
// runs: on error it is hibernated as before. Called with the op lock held.
func (m *Manager) awaken(ctx context.Context, b *box) (err error) {
	rec := b.record()
	fail := func(err error) error { return fmt.Errorf("resume sandbox %s: %w", b.id, errdefs.DiskFull(err)) }
	if rec.Slot != 0 || b.vm != nil {
		if err := m.letGo(b); err != nil {
			return err
		}
	}
	tmpl, err := m.cfg.Templates.Get(rec.Template)
	if err != nil {
		return fail(err)
	}
	if tmpl.BaseSHA256 != rec.Base {
		return errdefs.Unsupported.Errorf("resume sandbox %s: template %q has another base image than when the sandbox was made", b.id, rec.Template)
	}
	if err := m.store.checkSnapshot(b.id); err != nil {
		return fail(err)
	}
	// The snapshot is read while disk, network and VM are prepared from it. The
	// VM runs only when all of it is what was written.
	check, endCheck := context.WithCancel(ctx)
	result := make(chan error, 1)
	go func() { result <- m.store.verifySnapshot(check, b.id) }()
	whole := sync.OnceValue(func() error { return <-result })
	defer whole()
	defer endCheck()
	var took phases
	took.begin()
	if err := m.readmit(ctx, b, rec); err != nil {
		return fail(err)
	}
	err = func() error {
		done, err := m.startSlot(ctx)
		if err != nil {
			return err
		}
		defer done()
		took.end("reserve")
		dir := m.store.snapshot(b.id)
		from := origin{}
		from.ready.Dir, from.ready.Overlay = dir, filepath.Join(dir, snapshotOverlay)
		if err := m.prepare(ctx, b, &from, &took); err != nil {
			return err
		}
		if from.ready.Dir == "" { // an empty disk would be worse than none
			return errdefs.Corrupt.Errorf("the snapshot has no disk")
		}
		took.begin()
		in := guest.Init{AccessToken: rec.Token, Entropy: entropy(), Restored: true}
		if err := m.restore(ctx, b, tmpl, memory{dir: dir, whole: whole}, in, &took); err != nil {
			if damage := whole(); errdefs.ClassOf(damage) == errdefs.Corrupt {
				return damage // which is why the driver could not
			}
			return err
		}
		return m.move(b, Running, nil)
	}()
	if err != nil {
		for _, of := range []context.Context{b.alive, ctx} {
			if cause := context.Cause(of); cause != nil {
				err = cause
				break
			}
		}
		if b.state() == Hibernated && !errors.Is(err, errDestroyed) {
			_ = m.letGo(b)
		}
		return fail(err)
	}
	// The disk has moved on from here: this snapshot must never be used again.
	if err := m.store.dropSnapshots(b.id); err != nil {
		m.log.Error("old snapshot not removed", "sandbox", b.id, "err", err)
	}
	m.log.Info("sandbox resumed from disk", append([]any{"sandbox", b.id}, took.attrs...)...)
	return nil
}

// readmit takes capacity and a slot for a hibernated sandbox and notes them in
// its record.
func (m *Manager) readmit(ctx context.Context, b *box, rec Record) (err error) {
	var temp undo.Stack
	defer func() { err = errors.Join(err, temp.Unwind(ctx)) }()
	need := rec.awake()
	if err := m.admitted(ctx, need, m.giveUpWarm); err != nil {
		return err
	}
	temp.Push("admission", func(context.Context) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.used = m.used.minus(need)
		return nil
	})
	slot, err := m.cfg.Network.Acquire(ctx)
	for errors.Is(err, errdefs.Exhausted) && m.giveUpWarm(ctx, Resources{}) {
		slot, err = m.cfg.Network.Acquire(ctx)
	}
	if err != nil {
		return err
	}
	temp.Push("slot", func(context.Context) error { return m.cfg.Network.Release(slot) })
	hostIP := m.cfg.Network.Plan().Addrs(slot).HostIP
	if err := m.save(b, func(r *Record) { r.Slot, r.HostIP = slot, hostIP }); err != nil {
		m.save(b, func(*Record) {}) // over what a failed save may have left
		return err
	}
	temp.Keep()
	return nil
}

// takeUpHibernated makes true what the record of a hibernated sandbox says. If
// its snapshot is not there, the agent ended before it was certain: then the VM
// is, or nothing.
func (m *Manager) takeUpHibernated(ctx context.Context, b *box, found *Recovery) *[]ID {
	rec := b.record()
	err := m.store.checkSnapshot(b.id)
	if err == nil {
		if err := m.store.dropTemporary(b.id); err != nil {
			m.log.Error("garbage not removed", "sandbox", b.id, "err", err)
		}
		_ = m.letGo(b)
		return nil
	}
	if rec.VM == nil {
		// Nothing is gained by forgetting it: its files may be mended.
		m.log.Error("hibernated sandbox has no usable snapshot", "sandbox", b.id, "err", err)
		return nil
	}
	rec.State = Running
	if err := m.reattach(ctx, b, rec); err != nil {
		m.release(b, Lost, err.Error())
		return &found.Lost
	}
	if err := m.move(b, Running, nil); err != nil {
		m.release(b, Lost, err.Error())
		return &found.Lost
	}
	return &found.Adopted
}

// postpone sets when the janitor tries again.
func (m *Manager) postpone(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures == 0 {
		m.pending++
	}
	b.failures++
	b.retryAt = time.Now().Add(backOff(b.failures))
}

// backOff is the pause after so many failures in a row.
func backOff(failures int) time.Duration {
	return min(retryFirst<<min(failures-1, 10), retryMost)
}

// hibernateExpired is what the janitor does to an expired sandbox that is to
// hibernate. Called with the op lock held.
func (m *Manager) hibernateExpired(b *box) {
	ctx, stop := context.WithTimeout(m.life, moveTimeout(b.record()))
	defer stop()
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b.mu.Lock()
	b.abort = abort
	b.mu.Unlock()
	if err := m.hibernate(ctx, b); err != nil {
		b.mu.Lock()
		b.naps++
		b.retryAt = time.Now().Add(backOff(b.naps))
		b.mu.Unlock()
		m.log.Error("expired sandbox not hibernated, will try again", "sandbox", b.id, "err", err)
	}
}

// moveTimeout bounds a hibernation or its end.
func moveTimeout(rec Record) time.Duration {
	return opTimeout + syncTimeout + perGiBMove*time.Duration(rec.MemMiB)/1024
}

// The files of a hibernated sandbox's snapshot, beside the driver's.
const (
	snapshotOverlay  = "overlay.ext4"
	snapshotManifest = "manifest.json"
)

func (s store) snapshot(id ID) string { return s.path(id, "snapshot") }

// takeSnapshot publishes what write makes of memory and devices, together with
// the disk, as the sandbox's snapshot. The VM stands still meanwhile. The disk
// is the same file under a second name.
func (s store) takeSnapshot(ctx context.Context, id ID, write func(dir string) error) (err error) {
	if err := s.dropSnapshots(id); err != nil { // of before the last resume
		return err
	}
	tmp, err := os.MkdirTemp(s.path(id), ".snapshot-")
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	defer os.RemoveAll(tmp) // gone after the rename
	if err := write(tmp); err != nil {
		return err
	}
	if err := s.at("snapshot"); err != nil {
		return err
	}
	if err := os.Link(s.overlay(id), filepath.Join(tmp, snapshotOverlay)); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	err = template.SealState(ctx, tmp)
	if err == nil {
		err = os.Rename(tmp, s.snapshot(id))
	}
	if err == nil {
		err = syncDir(s.path(id))
	}
	if err == nil {
		err = s.at("snapshot published")
	}
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}

// sizesManifest is the manifest of a snapshot that an earlier version wrote: it
// has sizes and no digests.
type sizesManifest struct {
	Version int              `json:"version"`
	Sizes   map[string]int64 `json:"sizes"`
}

// checkSnapshot says whether a sandbox's snapshot is there and complete.
func (s store) checkSnapshot(id ID) error {
	if sizes, ok := s.oldManifest(id); ok {
		for name, size := range sizes {
			info, err := os.Lstat(filepath.Join(s.snapshot(id), name))
			if err != nil || info.Size() != size {
				return errdefs.Corrupt.Errorf("the snapshot is damaged: its %s is not %d bytes long", name, size)
			}
		}
		return nil
	}
	if err := template.CheckState(s.snapshot(id)); err != nil {
		return fmt.Errorf("the snapshot is damaged: %w", err)
	}
	return nil
}

// verifySnapshot reads all of a sandbox's snapshot: errdefs.Corrupt if it is not
// what was written.
func (s store) verifySnapshot(ctx context.Context, id ID) error {
	if _, ok := s.oldManifest(id); ok {
		return s.checkSnapshot(id)
	}
	if err := template.VerifyState(ctx, s.snapshot(id)); err != nil {
		return fmt.Errorf("the snapshot is damaged: %w", err)
	}
	return nil
}

// snapshotBytes is the size of the snapshot's files; what cannot be seen counts
// as nothing.
func (s store) snapshotBytes(id ID) (n int64) {
	entries, _ := os.ReadDir(s.snapshot(id))
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			n += info.Size()
		}
	}
	return n
}

func (s store) oldManifest(id ID) (sizes map[string]int64, ok bool) {
	data, err := os.ReadFile(filepath.Join(s.snapshot(id), snapshotManifest))
	if err != nil {
		return nil, false
	}
	var meta sizesManifest
	if json.Unmarshal(data, &meta) != nil || meta.Version != 1 || meta.Sizes[snapshotOverlay] == 0 {
		return nil, false
	}
	return meta.Sizes, true
}

// dropSnapshots removes a sandbox's snapshot, and what is left of unfinished
// ones.
func (s store) dropSnapshots(id ID) error {
	if err := s.at("snapshot drop"); err != nil {
		return err
	}
	// The manifest goes first: what is left is not a snapshot.
	if err := remove(filepath.Join(s.snapshot(id), snapshotManifest)); err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	if err := os.RemoveAll(s.snapshot(id)); err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	return s.dropTemporary(id)
}

func (s store) dropTemporary(id ID) error {
	entries, err := os.ReadDir(s.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".snapshot-") {
			if err := os.RemoveAll(s.path(id, e.Name())); err != nil {
				return fmt.Errorf("remove snapshot: %w", err)
			}
		}
	}
	return nil
}
