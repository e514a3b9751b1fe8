package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Bounds of a sandbox's size. A host's Capacity may be narrower.
const (
	MaxVCPUs   = 32
	MinMemMiB  = 128
	MaxMemMiB  = 256 << 10
	MaxTimeout = 365 * 24 * time.Hour
)

// CreateRequest describes a new sandbox; zero values take the defaults.
type CreateRequest struct {
	// Template is "minimal" when empty.
	Template string
	// VCPUs is 1 when zero.
	VCPUs int
	// MemMiB is 512 when zero.
	MemMiB int
	// Timeout is the inactivity after which the sandbox expires; 0 is never.
	Timeout time.Duration
	// OnTimeout is what happens then; destroy when empty.
	OnTimeout OnTimeout
	// Network is what the sandbox may reach.
	Network NetworkSettings
	// Login is what its programs begin with; what it does not say is the
	// template's or the snapshot's.
	Login Login

	// diskMiB is a fork's; Config.OverlayMiB when zero.
	diskMiB int
	// warm is the key of what a guest is made from that is to wait for its
	// sandbox; empty for a sandbox.
	warm string
}

// The ways in which a sandbox can start.
const (
	FromWarm  = "warm" // a guest that was waiting
	FromReady = "ready snapshot"
	FromBoot  = "cold boot"
	// FromSnapshot is the state of another sandbox.
	FromSnapshot = "snapshot"
)

// Created is what came of a Create.
type Created struct {
	Info
	// From says what the sandbox started from, Why why it had to boot.
	From, Why string
	// Phases are what the time went into, in this order, some of it at the same
	// time.
	Phases []Phase
}

// Phase is a part of an operation.
type Phase struct {
	Name string
	Took time.Duration
}

func (r *CreateRequest) check() error {
	if r.Template == "" {
		r.Template = "minimal"
	}
	if r.VCPUs == 0 {
		r.VCPUs = 1
	}
	if r.MemMiB == 0 {
		r.MemMiB = 512
	}
	var errs []error
	if r.VCPUs < 1 || r.VCPUs > MaxVCPUs {
		errs = append(errs, fmt.Errorf("vcpus is %d, must be 1 to %d", r.VCPUs, MaxVCPUs))
	}
	if r.MemMiB < MinMemMiB || r.MemMiB > MaxMemMiB {
		errs = append(errs, fmt.Errorf("memory is %d MiB, must be %d to %d", r.MemMiB, MinMemMiB, MaxMemMiB))
	}
	errs = append(errs, checkTimeout(r.Timeout), r.OnTimeout.check(), CheckUser(r.Login.User), CheckEnv(r.Login.Env))
	if err := errors.Join(errs...); err != nil {
		return errdefs.InvalidArgument.Errorf("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

func checkTimeout(d time.Duration) error {
	if d < 0 || d > MaxTimeout {
		return fmt.Errorf("timeout is %d s, must be 0 (never) to %d", d/time.Second, MaxTimeout/time.Second)
	}
	return nil
}

var errDestroyed = errdefs.Busy.Errorf("somebody destroyed the sandbox meanwhile")

// Create makes a sandbox and returns when commands can run in it. ctx bounds
// the making only: the sandbox outlives it. On error nothing is left.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (Created, error) {
	asked := req
	if err := req.check(); err != nil {
		return Created{}, err
	}
	if _, err := m.policy(req.Network); err != nil {
		return Created{}, err
	}
	tmpl, err := m.cfg.Templates.Get(req.Template)
	if errors.Is(err, errdefs.NotFound) {
		return m.createFrom(ctx, asked)
	}
	if err != nil {
		return Created{}, err
	}
	req.Login = req.Login.Over(tmpl.Defaults.Login)
	if _, err := m.room(0); err != nil {
		return Created{}, fmt.Errorf("create sandbox: %w", err)
	}
	if created, ok, err := m.createWarm(ctx, req, tmpl); ok || err != nil {
		return created, err
	}
	return m.make(ctx, req, tmpl.BaseSHA256, func(ctx context.Context, b *box, took *phases) error {
		return m.boot(ctx, b, tmpl, took)
	})
}

// make makes a sandbox whose VM start brings up; on error nothing is left.
func (m *Manager) make(ctx context.Context, req CreateRequest, base string, start func(context.Context, *box, *phases) error) (Created, error) {
	var took phases
	took.begin()
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b, err := m.reserve(ctx, req, base, abort)
	if err != nil {
		return Created{}, fmt.Errorf("create sandbox: %w", err)
	}
	defer b.unhold()

	took.end("reserve")
	if err := start(ctx, b, &took); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		err = errdefs.DiskFull(err)
		reason := CreateFailed
		if errors.Is(err, errDestroyed) {
			reason = Destroyed
		}
		detail := err.Error()
		if errors.Is(err, context.Canceled) {
			detail = "the caller left while the sandbox was being created"
		}
		m.release(b, reason, detail)
		return Created{}, fmt.Errorf("create sandbox %s: %w", b.id, err)
	}
	return took.created(b), nil
}

// reserve takes capacity, a slot and an ID, and commits to them by writing the
// record. The box comes back with its op lock held.
func (m *Manager) reserve(ctx context.Context, req CreateRequest, base string, abort context.CancelCauseFunc) (_ *box, err error) {
	var temp undo.Stack
	defer func() { err = errors.Join(err, temp.Unwind(ctx)) }()

	need := m.need(req.VCPUs, req.MemMiB)
	if req.diskMiB != 0 {
		need.DiskMiB = req.diskMiB
	}
	giveUp := m.giveUpWarm
	if req.warm != "" { // none makes way for another
		giveUp = func(context.Context, Resources) bool { return false }
	}
	if err := m.admitted(ctx, need, giveUp); err != nil {
		return nil, err
	}
	temp.Push("admission", func(context.Context) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.used = m.used.minus(need)
		return nil
	})

	slot, err := m.cfg.Network.Acquire(ctx)
	for errors.Is(err, errdefs.Exhausted) && giveUp(ctx, Resources{}) {
		slot, err = m.cfg.Network.Acquire(ctx)
	}
	if err != nil {
		return nil, err
	}
	temp.Push("slot", func(context.Context) error { return m.cfg.Network.Release(slot) })

	id := newID()
	for err = m.store.reserve(id); errors.Is(err, fs.ErrExist); err = m.store.reserve(id) {
		id = newID()
	}
	if err != nil {
		return nil, fmt.Errorf("reserve id: %w", errdefs.DiskFull(err))
	}
	temp.Push("record", func(context.Context) error { return m.store.forget(id) })

	now := time.Now().UTC()
	b := newBox(Record{
		Version: recordVersion, ID: id, State: Creating,
		Template: req.Template, VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: need.DiskMiB, Timeout: req.Timeout,
		OnTimeout: req.OnTimeout, Base: base, Network: req.Network.clone(), Login: req.Login, Warm: req.warm,
		Slot: slot, HostIP: m.cfg.Network.Plan().Addrs(slot).HostIP, Token: newToken(),
		CloneKey:  newToken(),
		CreatedAt: now, StateAt: now, LastActiveAt: now,
	})
	b.abort = abort
	if err := m.store.save(b.rec); err != nil {
		return nil, err
	}
	b.tryHold("created")

	m.mu.Lock()
	draining := m.draining // began meanwhile, and has not seen this box
	if !draining {
		m.boxes[id] = b
	}
	m.mu.Unlock()
	if draining {
		return nil, errdefs.Unavailable.Errorf("the host is shutting down")
	}
	temp.Keep()
	if !b.waits() {
		m.tell(Event{Time: now, ID: id, To: Creating})
	}
	return b, nil
}

// boot brings a reserved sandbox up, from a ready snapshot if there is one.
// Called with the op lock held; the caller releases on error.
func (m *Manager) boot(ctx context.Context, b *box, tmpl template.Template, took *phases) error {
	from := m.origin(ctx, b.record(), tmpl)
	defer from.close()
	done, err := m.startSlot(ctx)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, m.cfg.BootTimeout,
		errdefs.Unavailable.Errorf("the guest was not ready within %s", m.cfg.BootTimeout))
	defer cancel()
	took.end("wait")
	if err := m.prepare(ctx, b, &from, took); err != nil {
		return err
	}
	took.begin()

	restored := from.ready.Dir != ""
	if restored {
		if err := m.restore(ctx, b, tmpl, memory{dir: from.ready.Dir}, identity(b.record(), true), took); err != nil {
			if context.Cause(ctx) != nil || errdefs.ClassOf(err) == errdefs.NotFound { // no such user
				return err
			}
			m.log.Warn("not restored, the sandbox boots", "sandbox", b.id, "key", from.key, "err", err)
			if err := m.unrestore(ctx, b, tmpl, from.key, err); err != nil {
				return err
			}
			restored, from.why = false, "the restore failed: "+first(err)
		}
	}
	if !restored {
		if err := m.coldBoot(ctx, b, tmpl, &from, took); err != nil {
			return err
		}
	}

	took.from = FromReady
	if !restored {
		took.from, took.why = FromBoot, from.why
	}
	took.log(m.log, b)
	return m.move(b, Running, nil)
}

// unrestore takes back a restore that failed with cause. If the snapshot is to
// blame, it is dropped: the next create makes another.
func (m *Manager) unrestore(ctx context.Context, b *box, tmpl template.Template, key string, cause error) error {
	blamed := slices.Contains([]*errdefs.Class{errdefs.Corrupt, errdefs.Unsupported, errdefs.InvalidArgument, errdefs.Unavailable}, errdefs.ClassOf(cause))
	if blamed {
		if err := m.cfg.Templates.DropReady(tmpl.Name, key); err != nil {
			m.log.Error("ready snapshot not removed", "template", tmpl.Name, "key", key, "err", err)
		}
	}
	if err := m.unstart(ctx, b); err != nil {
		return err
	}
	if err := m.cfg.Templates.NewOverlay(ctx, m.store.overlay(b.id), b.record().DiskMiB); err != nil {
		return fmt.Errorf("make overlay: %w", err)
	}
	return nil
}

// coldBoot starts the VM from its kernel and waits for the guest. If a ready
// snapshot is to be made of it, this is the moment: nobody has told the guest
// yet who it is.
func (m *Manager) coldBoot(ctx context.Context, b *box, tmpl template.Template, from *origin, took *phases) error {
	vm, err := m.cfg.Driver.Start(ctx, m.spec(b.record(), tmpl))
	if err != nil {
		return fmt.Errorf("start vm: %w", err)
	}
	m.adopt(b, vm)
	handle := vm.Handle()
	if err := m.save(b, func(r *Record) { r.VM = &handle }); err != nil {
		return err
	}
	took.end("spawn")
	ctx, cancel := both(ctx, b.alive)
	defer cancel()
	if err := b.guest.WaitReady(ctx); err != nil {
		return m.bootFailed(b, "wait for guest", err)
	}
	took.end("guest")
	if from.stage != nil {
		if err := m.saveReady(ctx, b, tmpl, from); err != nil {
			return m.bootFailed(b, "go on after the snapshot", err)
		}
		took.end("snapshot")
	}
	if err := b.guest.Init(ctx, identity(b.record(), false)); err != nil {
		return m.bootFailed(b, "initialise guest", err)
	}
	took.end("init")
	return nil
}

// prepare makes what the VM needs before it starts: disk, network, run
// directory. The first two are independent.
func (m *Manager) prepare(ctx context.Context, b *box, from *origin, took *phases) error {
	rec := b.record()
	began := time.Now()
	var opened error
	var openTook time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		opened = m.openNetwork(ctx, rec)
		openTook = time.Since(began)
	})
	var made error
	if from.ready.Dir != "" {
		copied, err := m.room(takenBytes(from.ready.Overlay))
		if err != nil {
			wg.Wait()
			return err
		}
		defer copied()
		made = m.cfg.Templates.CloneOverlay(ctx, m.store.overlay(b.id), from.ready.Overlay)
		if errors.Is(made, fs.ErrNotExist) {
			from.ready, from.why = template.Ready{}, "the ready snapshot was removed meanwhile"
		}
	}
	if from.ready.Dir == "" {
		made = m.cfg.Templates.NewOverlay(ctx, m.store.overlay(b.id), rec.DiskMiB)
	}
	took.add("disk", time.Since(began))
	wg.Wait()
	took.add("network", openTook)
	if made != nil {
		made = fmt.Errorf("make overlay: %w", made)
	}
	if err := errors.Join(made, opened); err != nil {
		return err
	}
	dir := m.runDir(b.id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make run directory: %w", errdefs.DiskFull(err))
	}
	return nil
}

// spec is the VM of a record.
func (m *Manager) spec(rec Record, tmpl template.Template) vmm.Spec {
	needs := m.cfg.Driver.Needs()
	spec := vmm.Spec{
		ID: string(rec.ID), RunDir: m.runDir(rec.ID), NetNS: m.cfg.Network.Plan().Addrs(rec.Slot).NetNSPath,
		VCPUs: rec.VCPUs, MemMiB: rec.MemMiB,
		Boot:    guestapi.Boot{Addr: network.GuestAddr, Gateway: network.GuestGateway, DNS: m.cfg.DNS, Hostname: bootName},
		Root:    vmm.Root{Base: tmpl.Base, Overlay: m.store.overlay(rec.ID)},
		Link:    &vmm.Link{Kind: needs.Link, Name: network.Tap, MAC: network.GuestMAC},
		Console: m.store.console(rec.ID),
		UID:     m.cfg.BaseUID + int(rec.Slot), GID: m.cfg.BaseUID + int(rec.Slot),
		Cgroup: m.cgroups() + "/" + string(rec.ID),
		Limits: vmm.Limits{
			CPUMilli: rec.VCPUs*1000 + vmmCPUMilli,
			MemMiB:   rec.MemMiB + vmmOverheadMiB(rec.MemMiB),
			PIDs:     maxVMMTasks,

			DiskBytes: m.cfg.DiskBytes, DiskOps: m.cfg.DiskOps,
		},
	}
	if needs.Kernel {
		spec.Kernel = vmm.Kernel{Image: tmpl.Kernel, Initrd: tmpl.Initrd}
	}
	return spec
}

// adopt ties a VM to its sandbox and watches over it.
func (m *Manager) adopt(b *box, vm vmm.VM) {
	b.mu.Lock()
	b.vm = vm
	b.guest = m.cfg.Guests(b.rec.HostIP, b.rec.Token)
	kill := b.kill
	b.mu.Unlock()
	m.goes("watch vm", func() { m.watch(b, vm, kill) })
}

// watch waits for the VM's end and frees the sandbox, unless it was its end
// that ended the VM.
func (m *Manager) watch(b *box, vm vmm.VM, kill context.CancelCauseFunc) {
	select {
	case <-vm.Done():
	case <-m.life.Done():
		return
	}
	exit := vm.Exit()
	kill(errdefs.Unavailable.Errorf("the vm of sandbox %s ended: it %s", b.id, exit))
	if m.life.Err() != nil || b.hold(m.life, "freed") != nil {
		return // the next agent finds it
	}
	defer b.unhold()
	if s := b.state(); s != Running && s != Paused && !m.inPool(b) || b.vm != vm {
		return
	}
	m.releaseEnded(b, exit)
}

// releaseEnded frees a sandbox whose VM has ended, and says how.
func (m *Manager) releaseEnded(b *box, exit vmm.Exit) {
	reason := VMExited
	if exit.Cause == vmm.OutOfMemory {
		reason = OutOfMemory
	}
	m.release(b, reason, exit.String()+m.lastWords(b.id))
}

// bootFailed says why a guest did not come up: what the console said last
// explains it more often than the error does.
func (m *Manager) bootFailed(b *box, verb string, err error) error {
	if cause := context.Cause(b.alive); cause != nil {
		err = cause
	}
	return fmt.Errorf("%s: %w%s", verb, m.whyStill(b, err), m.lastWords(b.id))
}

// lastWords is the end of the guest's console, for an error's text.
func (m *Manager) lastWords(id ID) string {
	const lines = 8
	data, err := m.store.tail(id, 1<<10)
	if err != nil || len(data) == 0 {
		return ""
	}
	text := strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsGraphic(r) {
			return r
		}
		return -1
	}, string(data))
	all := strings.Split(strings.TrimSpace(text), "\n")
	return "; the console ends: " + strings.Join(all[max(0, len(all)-lines):], " | ")
}

// phases measures the stages of a create, for the log and for the caller.
type phases struct {
	last  time.Time
	list  []Phase
	attrs []any // the same, for the log

	from, why string
}

func (p *phases) begin() { p.last = time.Now() }

func (p *phases) end(name string) {
	now := time.Now()
	p.add(name, now.Sub(p.last))
	p.last = now
}

func (p *phases) add(name string, took time.Duration) {
	p.list = append(p.list, Phase{name, took})
	p.attrs = append(p.attrs, name, took.Round(100*time.Microsecond))
}

func (p *phases) log(log *slog.Logger, b *box) {
	how := []any{"sandbox", b.id, "from", p.from}
	if p.why != "" {
		how = append(how, "why", p.why)
	}
	log.Info("sandbox started", append(how, p.attrs...)...)
}

func (p *phases) created(b *box) Created {
	return Created{Info: b.info(), From: p.from, Why: p.why, Phases: p.list}
}
