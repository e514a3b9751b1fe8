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
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// freezeTimeout bounds how long the guest may take to stop its programs.
	freezeTimeout = 10 * time.Second
	// syncTimeout bounds the guest's sync before its VM is stopped for good. One
	// that takes longer, or cannot, is stopped without.
	syncTimeout = 30 * time.Second
	// hibernateTries is how often in a row an expired sandbox may keep the host from
	// hibernating it. Then it ends. The pauses between are four minutes together.
	hibernateTries = 10
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
// lost: on error the sandbox is as it was. Streams to the guest end. A guest that
// does not sync its disk keeps nobody from it; the sandbox's detail says so then.
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
	unsynced := ""
	if was.State == Running {
		// No program sees the time of now before the resume has set the clock. A
		// sandbox can do without, for it stays who it is.
		if err := m.quiesce(ctx, b); err != nil {
			for _, of := range []context.Context{b.alive, ctx} {
				if cause := context.Cause(of); cause != nil {
					m.thaw(ctx, b)
					return fmt.Errorf("hibernate sandbox %s: %w", b.id, cause)
				}
			}
			if stalled(m.life, b.vm) != nil {
				return fmt.Errorf("hibernate sandbox %s: %w", b.id, errDiskFull(b.id))
			}
			unsynced = "hibernated without the guest's help, its disk by itself may lack the last writes: " + m.told(err)
			m.log.Warn("guest does not sync its disk, it is hibernated all the same", "sandbox", b.id, "err", err)
		}
		back = m.asBefore(b, was)
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
		err = m.move(b, Hibernated, func(r *Record) { r.Restored, r.Detail = false, unsynced })
	}
	if err != nil {
		return m.unhibernate(ctx, b, back, err)
	}
	m.log.Info("snapshot written", "sandbox", b.id, "took", time.Since(began).Round(time.Millisecond))
	b.kill(errdefs.Unavailable.Errorf("sandbox %s is hibernated", b.id))
	_ = m.letGo(b) // the janitor goes on with what is left
	return nil
}

// quiesce has the guest stop its programs and sync its disk, which alone is worth
// something, too; or only sync, if the programs cannot be stopped.
func (m *Manager) quiesce(ctx context.Context, b *box) error {
	freeze, endFreeze := context.WithTimeoutCause(ctx, freezeTimeout, errdefs.Unavailable.Errorf("the guest did not stop its programs within %s", freezeTimeout))
	defer endFreeze()
	err := b.guest.Freeze(freeze)
	if err == nil {
		return nil
	}
	m.log.Warn("programs not stopped before the hibernation", "sandbox", b.id, "err", err)
	ctx, cancel := context.WithTimeoutCause(ctx, syncTimeout, errdefs.Unavailable.Errorf("the guest did not sync its disk within %s", syncTimeout))
	defer cancel()
	return b.guest.Quiesce(ctx, false)
}

// unhibernate lets a sandbox go on whose hibernation failed with err. On disk
// there may be a snapshot and a record that says so, which the next agent would
// believe; as long as that cannot be changed the VM stands still, so that both are
// the same. Called with the op lock held.
func (m *Manager) unhibernate(ctx context.Context, b *box, back func(context.Context) error, err error) error {
	err = errdefs.DiskFull(err)
	derr := m.store.dropSnapshots(b.id)
	if serr := m.save(b, func(*Record) {}); derr != nil && serr != nil {
		err = fmt.Errorf("hibernate sandbox %s: %w", b.id, err)
		m.unreachable(b, fmt.Errorf("%w; its vm stands still until the host can write its record: %w", err, serr))
		return err
	}
	return m.backTo(ctx, b, "hibernate", back, err)
}

// letGo frees what a hibernated sandbox does not need: VM, network, capacity,
// the disk's copy. What cannot be freed is tried again. Called with the op lock
// held.
func (m *Manager) letGo(b *box) error {
	// Without it, the VM and its disk are what is left of the sandbox.
	if err := m.store.checkSnapshot(b.id); err != nil {
		m.postpone(b)
		return fmt.Errorf("free hibernated sandbox %s: %w", b.id, err)
	}
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
	b.vm, b.naps, b.refusals = nil, 0, 0
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
// its snapshot is not there, the agent ended before it was certain, or before what
// came of its resume was: then the VM is, or nothing.
func (m *Manager) takeUpHibernated(ctx context.Context, b *box, found *Recovery) *[]ID {
	err := m.store.checkSnapshot(b.id)
	if err == nil {
		if err := m.store.dropTemporary(b.id); err != nil {
			m.log.Error("garbage not removed", "sandbox", b.id, "err", err)
		}
		_ = m.letGo(b)
		return nil
	}
	// Nothing is gained by forgetting it: its files may be mended.
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
// hibernate. One that keeps the host from it ends; what the host itself cannot do
// costs no sandbox. Called with the op lock held.
func (m *Manager) hibernateExpired(b *box) {
	ctx, stop := context.WithTimeoutCause(m.life, moveTimeout(b.record()), errdefs.Unavailable.Errorf("it took too long"))
	defer stop()
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b.mu.Lock()
	b.abort = abort
	vm := b.vm
	b.mu.Unlock()
	err := unreached(b.record())
	if vm != nil {
		err = m.hibernate(ctx, b)
	}
	if err == nil || m.life.Err() != nil || errors.Is(err, errDestroyed) || context.Cause(b.alive) != nil {
		return
	}
	b.mu.Lock()
	b.naps++
	b.refusals++
	if hostsFault(err) {
		b.refusals = 0
	}
	over := b.refusals >= hibernateTries
	b.retryAt = time.Now().Add(backOff(b.naps))
	b.mu.Unlock()
	if over {
		m.release(b, Expired, "it could not be hibernated: "+m.told(err))
		return
	}
	m.log.Error("expired sandbox not hibernated, will try again", "sandbox", b.id, "err", err)
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
			if errdefs.CannotRead(err) {
				return errdefs.Unavailable.Errorf("the snapshot cannot be read at this moment: %s", pathless(err))
			}
			if err != nil || info.Size() != size {
				return errdefs.Corrupt.Errorf("the snapshot is damaged: its %s is not %d bytes long", name, size)
			}
		}
		return nil
	}
	err := template.CheckState(s.snapshot(id))
	if errors.Is(err, errdefs.Unavailable) {
		return fmt.Errorf("the snapshot: %w", err)
	}
	if err != nil {
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
