package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
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
	// readyVersion tells snapshots apart that other code made of the same
	// parts.
	readyVersion = "1"
	// bootName is a guest's host name until it is told its own, which is as
	// long: files that hold it are written in place.
	bootName = "sb-0000000000000000"
	// wakeTimeout bounds the time from a restore until the guest answers; a
	// guest that takes longer never will.
	wakeTimeout = 20 * time.Second
	// saveTimeout bounds the making of a ready snapshot, perGiBSave is added for
	// each GiB of memory.
	saveTimeout = time.Minute
	perGiBSave  = 2 * time.Minute
)

// origin is what a new sandbox starts from: a ready snapshot, or a cold boot.
type origin struct {
	key   string
	shape template.Shape
	// ready is where to restore from; zero for a cold boot.
	ready template.Ready
	// stage, if set, is to become the ready snapshot of the guest that is
	// booted.
	stage *template.Stage
	// why says why it is a cold boot, for the log.
	why string
}

func (o *origin) close() {
	if o.stage != nil {
		o.stage.Discard()
	}
}

// origin looks for the ready snapshot that fits a sandbox. The first that finds
// none is to make it; who comes meanwhile waits for it. It never fails: without
// a snapshot the sandbox boots.
func (m *Manager) origin(ctx context.Context, rec Record, tmpl template.Template) origin {
	cold := func(why string, err error) origin {
		m.log.Warn("no ready snapshot, the sandbox boots", "sandbox", rec.ID, "why", why, "err", err)
		return origin{why: why}
	}
	restorer, ok := m.cfg.Driver.(vmm.Restorer)
	if !ok {
		return origin{why: "the driver cannot restore"}
	}
	spec := m.spec(rec, tmpl)
	machine, err := restorer.SnapshotKey(ctx, spec)
	if err != nil {
		return cold("the snapshot's key is not known", err)
	}
	o := origin{
		key:   readyKey(machine, spec, tmpl, rec.DiskMiB),
		shape: template.Shape{Driver: m.cfg.Driver.Name(), VCPUs: rec.VCPUs, MemMiB: rec.MemMiB, DiskMiB: rec.DiskMiB},
	}
	look := func() error {
		var err error
		o.ready, err = m.cfg.Templates.Ready(ctx, tmpl.Name, o.key)
		return err
	}
	if err := look(); err == nil {
		return o
	} else if !errors.Is(err, errdefs.NotFound) && !errors.Is(err, errdefs.Corrupt) {
		return cold("the snapshot cannot be read", err)
	} else if errors.Is(err, errdefs.Corrupt) {
		m.log.Warn("ready snapshot is damaged, another is made", "template", tmpl.Name, "key", o.key, "err", err)
	}
	wait, cancel := context.WithTimeout(ctx, m.cfg.BootTimeout)
	defer cancel()
	stage, err := m.cfg.Templates.StageReady(wait, tmpl.Name)
	if err != nil {
		return cold("the snapshot cannot be made", err)
	}
	if err := look(); err == nil { // made while we waited
		stage.Discard()
		return o
	}
	o.stage, o.why = &stage, "the first of its kind"
	return o
}

// readyKey is the digest of all that a ready snapshot depends on. Two
// sandboxes with the same key start from the same bytes.
func readyKey(machine string, spec vmm.Spec, tmpl template.Template, diskMiB int) string {
	h := sha256.New()
	for _, part := range []string{
		readyVersion, machine, spec.BootKey(),
		tmpl.KernelSHA256, tmpl.InitrdSHA256, tmpl.EnvdSHA256, tmpl.BaseSHA256,
		fmt.Sprint(spec.VCPUs), fmt.Sprint(spec.MemMiB), fmt.Sprint(diskMiB),
	} {
		fmt.Fprintf(h, "%d:%s\n", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// kindKey is the key of the ready snapshot that a request would start from.
func (m *Manager) kindKey(ctx context.Context, req CreateRequest, tmpl template.Template) (string, error) {
	restorer, ok := m.cfg.Driver.(vmm.Restorer)
	if !ok {
		return "", errdefs.Unsupported.Errorf("the vmm %s cannot restore snapshots", m.cfg.Driver.Name())
	}
	rec := Record{ID: bootName, Slot: 1, VCPUs: req.VCPUs, MemMiB: req.MemMiB}
	spec := m.spec(rec, tmpl)
	machine, err := restorer.SnapshotKey(ctx, spec)
	if err != nil {
		return "", err
	}
	return readyKey(machine, spec, tmpl, m.cfg.OverlayMiB), nil
}

// restoreVM starts a VM from a snapshot with the driver whose it is: the
// others find that they do not support it.
func (m *Manager) restoreVM(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	restorer, ok := m.cfg.Driver.(vmm.Restorer)
	if !ok {
		return nil, errdefs.Unsupported.Errorf("the vmm %s cannot restore snapshots", m.cfg.Driver.Name())
	}
	vm, err := restorer.Restore(ctx, spec, dir)
	for _, d := range m.cfg.Others {
		if !errors.Is(err, errdefs.Unsupported) {
			break
		}
		if restorer, ok := d.(vmm.Restorer); ok {
			if other, e := restorer.Restore(ctx, spec, dir); e == nil {
				return other, nil
			}
		}
	}
	return vm, err
}

// memory is what a VM is restored from.
type memory struct {
	// dir is the snapshot's.
	dir string
	// token is what the guest in it knows as its own; empty for the sandbox's.
	token string
	// whole, if not nil, waits until all of the snapshot has been read, and says
	// whether it is what was written.
	whole func() error
}

// restore starts a sandbox's VM from a snapshot, its disk in place, and tells
// its guest in who it is now. Called with the op lock held.
func (m *Manager) restore(ctx context.Context, b *box, tmpl template.Template, from memory, in guest.Init, took *phases) error {
	if err := m.load(ctx, b, tmpl, from, took); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wakeTimeout,
		errdefs.Unavailable.Errorf("the restored guest did not answer within %s", wakeTimeout))
	defer cancel()
	ctx, cancelBoth := both(ctx, b.alive)
	defer cancelBoth()
	// No packet is lost before the guest runs: the first connection is the one.
	g := b.guest
	if from.token != "" {
		g = m.cfg.Guests(b.record().HostIP, from.token)
		defer g.Close()
	}
	if err := g.Init(ctx, in); err != nil {
		return m.bootFailed(b, "initialise guest", err)
	}
	took.end("init")
	return nil
}

// load starts a sandbox's VM from a snapshot and lets its guest run, which has
// not been told who it is. Called with the op lock held.
func (m *Manager) load(ctx context.Context, b *box, tmpl template.Template, from memory, took *phases) error {
	vm, err := m.restoreVM(ctx, m.spec(b.record(), tmpl), from.dir)
	if err != nil {
		return fmt.Errorf("restore vm: %w", err)
	}
	m.adopt(b, vm)
	handle := vm.Handle()
	if err := m.save(b, func(r *Record) { r.VM, r.Restored = &handle, true }); err != nil {
		return err
	}
	took.end("load")
	if from.whole != nil {
		if err := from.whole(); err != nil {
			return err
		}
		took.end("check")
	}
	ctx, cancel := both(ctx, b.alive)
	defer cancel()
	if err := vm.Resume(ctx); err != nil {
		return fmt.Errorf("wake vm: %w", err)
	}
	took.end("wake")
	return nil
}

// unstart takes back what was started of a sandbox, but for its network and
// directories, so that it can be started in another way.
func (m *Manager) unstart(ctx context.Context, b *box) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	b.mu.Lock()
	vm, guest := b.vm, b.guest
	b.mu.Unlock()
	if vm != nil {
		if err := vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill vm: %w", err)
		}
	}
	if guest != nil {
		guest.Close()
	}
	b.mu.Lock()
	b.vm, b.guest = nil, nil
	b.renew()
	b.mu.Unlock()
	if err := m.save(b, func(r *Record) { r.VM, r.Restored = nil, false }); err != nil {
		return err
	}
	if err := os.RemoveAll(m.runDir(b.id)); err != nil {
		return fmt.Errorf("remove run directory: %w", err)
	}
	if err := os.Mkdir(m.runDir(b.id), 0o700); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	return remove(m.store.overlay(b.id))
}

// saveReady makes a ready snapshot of a guest that has booted and that nobody
// told who it is. A failure costs the snapshot only, unless the guest does not
// go on afterwards.
func (m *Manager) saveReady(ctx context.Context, b *box, tmpl template.Template, o *origin) error {
	rec := b.record()
	limit := saveTimeout + perGiBSave*time.Duration(rec.MemMiB)/1024
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	copied, err := m.room(int64(rec.MemMiB)<<20 + m.store.takenBytes(b.id))
	if err == nil {
		defer copied()
		err = m.picture(ctx, b, o.stage)
	}
	if err == nil {
		err = o.stage.Publish(ctx, template.Meta{Key: o.key, Shape: o.shape})
	}
	if err == nil {
		m.log.Info("ready snapshot made", "template", tmpl.Name, "key", o.key, "vcpus", rec.VCPUs, "memory", rec.MemMiB, "took", time.Since(began).Round(time.Millisecond))
		return nil
	}
	var broken vmBroken
	if cause := context.Cause(b.alive); cause != nil || errors.As(err, &broken) {
		return errors.Join(cause, err)
	}
	m.log.Warn("ready snapshot not made", "template", tmpl.Name, "err", err)
	return nil
}

// vmBroken is the error of a VM that does not go on after a snapshot.
type vmBroken struct{ error }

func (e vmBroken) Unwrap() error { return e.error }

// picture writes a guest's memory and disk into a stage and lets it go on.
func (m *Manager) picture(ctx context.Context, b *box, stage *template.Stage) (err error) {
	snapshotter, ok := b.vm.(vmm.Snapshotter)
	if !ok {
		return errdefs.Unsupported.Errorf("the vmm %s cannot make snapshots", m.cfg.Driver.Name())
	}
	if err := b.guest.Quiesce(ctx, true); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
		defer cancel()
		if rerr := b.vm.Resume(ctx); rerr != nil {
			err = errors.Join(err, vmBroken{fmt.Errorf("resume vm: %w", rerr)})
		}
	}()
	if err := b.vm.Pause(ctx); err != nil {
		return err
	}
	var disk error
	var wg sync.WaitGroup
	wg.Go(func() { disk = stage.AddOverlay(ctx, m.store.overlay(b.id)) })
	err = snapshotter.Snapshot(ctx, stage.Dir)
	wg.Wait()
	return errors.Join(err, disk)
}

// Prepare makes the ready snapshot that a request would start from, unless it
// is there, by making and destroying a sandbox; made says whether it had to.
func (m *Manager) Prepare(ctx context.Context, req CreateRequest) (made bool, err error) {
	if err := req.check(); err != nil {
		return false, err
	}
	if _, ok := m.cfg.Driver.(vmm.Restorer); !ok {
		return false, errdefs.Unsupported.Errorf("the vmm %s cannot restore snapshots", m.cfg.Driver.Name())
	}
	tmpl, err := m.cfg.Templates.Get(req.Template)
	if err != nil {
		return false, err
	}
	rec := Record{ID: "sb-0000000000000000", Slot: 1, VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: m.cfg.OverlayMiB}
	there := func() (bool, error) {
		o := m.origin(ctx, rec, tmpl)
		defer o.close()
		if o.ready.Dir == "" && o.stage == nil {
			return false, fmt.Errorf("prepare ready snapshot: %s", o.why)
		}
		return o.ready.Dir != "", nil
	}
	if ok, err := there(); ok || err != nil {
		return false, err
	}
	info, err := m.Create(ctx, req)
	if err != nil {
		return false, err
	}
	if err := m.Destroy(context.WithoutCancel(ctx), info.ID); err != nil {
		return false, err
	}
	ok, err := there()
	if err == nil && !ok {
		err = errors.New("prepare ready snapshot: none was made, the log says why")
	}
	return true, err
}

// readAhead looks at the ready snapshot of the default kind, which is read and
// checked the first time: the first create need not wait for that.
func (m *Manager) readAhead() {
	var req CreateRequest
	if req.check() != nil {
		return
	}
	tmpl, err := m.cfg.Templates.Get(req.Template)
	if err != nil {
		return // whoever creates a sandbox learns why
	}
	if key, err := m.kindKey(m.life, req, tmpl); err == nil {
		_, _ = m.cfg.Templates.Ready(m.life, tmpl.Name, key)
	}
}

// first is an error's first line.
func first(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// identity is what a guest is told of itself when it starts to be a sandbox.
func identity(rec Record, restored bool) guest.Init {
	env := rec.Login.Env
	if env == nil { // nil would leave those of before
		env = map[string]string{}
	}
	return guest.Init{
		AccessToken: rec.Token, Hostname: string(rec.ID), SandboxID: string(rec.ID),
		DefaultUser: rec.user(), DefaultWorkdir: rec.Login.Workdir, Env: env, Entropy: entropy(), Restored: restored,
		CloneKey: rec.CloneKey,
	}
}
