package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// wakeTimeout bounds the time from a restore until the guest answers; a
	// guest that takes longer never will.
	wakeTimeout = 20 * time.Second
	// perGiBMove is added to a time limit for each GiB of memory that is written to
	// the disk or read from it in full.
	perGiBMove = 2 * time.Minute
)

// The ways in which a sandbox can start.
const (
	FromWarm     = "warm" // a waiting guest
	FromReady    = "ready snapshot"
	FromBoot     = "cold boot"
	FromSnapshot = "snapshot" // the state of another sandbox
	fromDisk     = "its own snapshot"
	fromOwnDisk  = "its own disk"
)

// telling is what a guest is told as soon as it runs.
type telling int

const (
	// tellIdentity: it is a new sandbox, with this name and this token.
	tellIdentity telling = iota
	// tellClone is tellIdentity to a guest that was another sandbox: its boot has a new
	// id, too.
	tellClone
	// tellResume: it is the sandbox that it was, at a later time.
	tellResume
	// tellNothing: it is to wait for its identity. It does once what it will do first,
	// so that translated code is kept.
	tellNothing
)

// source is what a VM starts from, as plain data.
type source struct {
	// lifetime is what the sandbox gets of time when it runs.
	lifetime
	// from is one of the ways above. why says why nothing better could be used.
	from, why string
	tell      telling

	// disk is the file that the sandbox's disk is cloned from; empty for an empty disk.
	disk string
	// memory is the directory of the snapshot that the VM is restored from; empty for a
	// VM that boots.
	memory string
	// token is what the guest in the memory takes; empty for the sandbox's own.
	token string
	// verify, if not nil, is the sandbox's own snapshot. What the VM starts from of it is read
	// in full while disk, network and VM are prepared. The VM runs only when all of it is what was written.
	verify *saved
	// gone is the error if the snapshot is not there any more.
	gone error

	// boot is what is tried if the memory cannot be used; nil for nothing.
	boot *source
	// state says that the memory is the state of a sandbox's programs, which a boot
	// loses.
	state bool
	// bootKey is the key of a boot snapshot that is dropped if it is to blame.
	bootKey string

	// stage, if not nil, is to become the boot snapshot with the key stageMeta.Key of the
	// guest that boots.
	stage     *template.Stage
	stageMeta template.Meta

	// log is told what becomes of the template's program; it may be nil. unmade, if not
	// nil, is told why a boot snapshot was not made.
	log    ProgramLog
	unmade func(error)
}

// close ends the making of a boot snapshot, whatever came of it.
func (s *source) close() {
	if s.stage != nil {
		s.stage.Discard()
	}
}

// instead returns what is tried after the memory could not be used, if anything.
func (s source) instead(cause error) (next source, ok bool) {
	switch class := errdefs.ClassOf(cause); {
	case s.boot == nil:
		return source{}, false
	case class == errdefs.NotFound: // the guest has no such user, booted or not
		return source{}, false
	case s.state && class != errdefs.Unsupported:
		return source{}, false
	}
	next = *s.boot
	next.lifetime = s.lifetime
	if next.why == "" {
		next.why = firstLine(cause)
	}
	return next, true
}

// vms brings the VMs of sandboxes up, watches over them, and freezes them.
type vms struct {
	*registry
	*work
	*host
	disk  *disk
	log   *slog.Logger
	store store
	// starts has an element for each VM that is starting.
	starts chan struct{}
	// started is called when a VM has started, ended when one has ended by itself, with
	// the op lock of its sandbox held.
	started func()
	ended   func(*box, vmm.Exit)
}

// start brings up the VM of a sandbox whose record has a slot and moves it to running;
// a waiting guest stays in waiting. It returns the source that the VM started from in
// the end. What it made on an error is in the record, and is the caller's to free.
//
// The deadline: from its turn to start until its guest has been told what it is, a
// sandbox has Config.BootTimeout, and perGiBMove for each GiB of a memory that is
// verified; ctx bounds all of it. A restored guest has wakeTimeout to answer. The program
// of a template has a time of its own, in which others may start VMs.
//
// The fall back to a boot: memory that cannot be used is replaced by source.boot if ctx
// has not ended. Memory that is the state of a sandbox is replaced only if no VMM of
// this host supports it; any other failure may pass, and a boot would lose the state.
//
// Called with the op lock held.
func (v *vms) start(ctx context.Context, b *box, tmpl template.Template, src source) (source, error) {
	giveBack := func() {}
	if src.tell != tellNothing { // the pool starts a VM only while no other starts
		end := phase(ctx, "wait")
		done, err := v.startSlot(ctx)
		if err != nil {
			return src, err
		}
		giveBack = sync.OnceFunc(done)
		defer giveBack()
		end()
	}
	limit := v.cfg.BootTimeout
	if src.verify != nil {
		limit += perGiB(perGiBMove, b.record().MemMiB)
	}
	ctx, t, cancel := newTurn(ctx, limit, giveBack)
	defer cancel()
	whole := verifying(ctx, src)
	defer whole()
	defer cancel()

	src, err := v.prepare(ctx, b, tmpl, src)
	if err != nil {
		return src, err
	}
	if src.memory != "" {
		err := v.restore(ctx, b, tmpl, src, whole)
		if err != nil && context.Cause(ctx) == nil {
			src, err = v.fallBack(ctx, b, tmpl, src, err)
		}
		if err != nil {
			return src, err
		}
	}
	if src.memory == "" {
		if err := whole(); err != nil {
			return src, err
		}
		if err := v.boot(ctx, b, tmpl, src, t); err != nil {
			return src, err
		}
	}
	if b.hidden() {
		return src, nil
	}
	return src, v.move(b, Running, func(r *Record) { src.begin(r); r.EnvdVersion = b.op.envd })
}

// perGiB is a duration for each GiB of memory.
func perGiB(each time.Duration, memMiB int) time.Duration {
	return each * time.Duration(memMiB) / 1024
}

// verifying reads a snapshot that must be verified, beside what start does. The
// function that it returns waits for that and returns the result.
func verifying(ctx context.Context, src source) func() error {
	if src.verify == nil {
		return func() error { return nil }
	}
	result := make(chan error, 1)
	var names []string
	if src.memory == "" {
		names = []string{snapshotOverlay}
	}
	go func() { result <- src.verify.verify(ctx, names...) }()
	return sync.OnceValue(func() error { return <-result })
}

// startSlot waits for its turn to start a VM; done gives the turn to the next.
func (v *vms) startSlot(ctx context.Context) (done func(), err error) {
	timer := time.NewTimer(v.cfg.Capacity.StartQueue)
	defer timer.Stop()
	select {
	case v.starts <- struct{}{}:
		return func() { <-v.starts; v.started() }, nil
	case <-timer.C:
		return nil, errdefs.Exhausted.Errorf("%d sandboxes are starting already; none finished within %s",
			cap(v.starts), v.cfg.Capacity.StartQueue)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// prepare makes what the VM needs before it starts: disk, network, run
// directory. The first two are independent.
func (v *vms) prepare(ctx context.Context, b *box, tmpl template.Template, src source) (source, error) {
	rec := b.record()
	var opened error
	var wg sync.WaitGroup
	endDisk, endNetwork := phase(ctx, "disk"), phase(ctx, "network")
	wg.Go(func() {
		opened = v.openNetwork(ctx, rec)
		endNetwork()
	})
	src, made := v.makeDisk(ctx, rec, tmpl, src)
	endDisk()
	wg.Wait()
	if err := errors.Join(made, opened); err != nil {
		return src, err
	}
	if err := os.MkdirAll(v.runDir(b.id), 0o700); err != nil {
		return src, fmt.Errorf("make run directory: %w", errdefs.DiskFull(err))
	}
	return src, nil
}

// makeDisk makes a sandbox's overlay. A boot snapshot that was removed gives way to a
// boot.
func (v *vms) makeDisk(ctx context.Context, rec Record, tmpl template.Template, src source) (source, error) {
	from := src.disk
	if rec.flat() {
		from = ""
	}
	err := v.cloneDisk(ctx, rec.ID, from)
	if rec.flat() {
		err = v.linkInit(ctx, rec.ID, tmpl, src)
	}
	if errors.Is(err, fs.ErrNotExist) && (from != "" || rec.flat() && src.memory != "") {
		next, ok := src.instead(src.gone)
		if !ok {
			return src, src.gone
		}
		src, from, err = next, "", nil
		if rec.flat() {
			err = v.linkInit(ctx, rec.ID, tmpl, src)
		}
	}
	switch {
	case err != nil || from != "":
	case rec.flat():
		err = v.cfg.Templates.NewDisk(ctx, v.store.overlay(rec.ID), rec.DiskMiB)
	default:
		err = v.cfg.Templates.NewOverlay(ctx, v.store.overlay(rec.ID), rec.DiskMiB)
	}
	if err != nil {
		return src, fmt.Errorf("make overlay: %w", err)
	}
	return src, nil
}

// cloneDisk clones a disk, if there is one to be cloned. Its room is reserved before.
func (v *vms) cloneDisk(ctx context.Context, id ID, from string) error {
	if from == "" {
		return nil
	}
	copied, err := v.disk.reserve(takenBytes(from))
	if err != nil {
		return err
	}
	defer copied()
	return v.cfg.Templates.CloneOverlay(ctx, v.store.overlay(id), from)
}

// restore starts the VM from the memory of a source and tells its guest what it is.
// Called with the op lock held.
func (v *vms) restore(ctx context.Context, b *box, tmpl template.Template, src source, whole func() error) error {
	err := v.load(ctx, b, tmpl, src, whole)
	if err != nil {
		if damage := whole(); errdefs.ClassOf(damage) == errdefs.Corrupt {
			return damage // which is why the driver could not
		}
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wakeTimeout,
		errdefs.Unavailable.Errorf("the restored guest did not answer within %s", wakeTimeout))
	defer cancel()
	return v.tellGuest(ctx, b, src)
}

// load starts the VM from the memory of a source and lets its guest run. Called with
// the op lock held.
func (v *vms) load(ctx context.Context, b *box, tmpl template.Template, src source, whole func() error) error {
	end := phase(ctx, "load")
	vm, err := v.restoreVM(ctx, b.record(), tmpl, src.memory)
	if err != nil {
		return fmt.Errorf("restore vm: %w", err)
	}
	if err := v.attached(b, vm, src); err != nil {
		return err
	}
	end()
	if src.verify != nil {
		end := phase(ctx, "check")
		if err := whole(); err != nil {
			return err
		}
		end()
	}
	defer phase(ctx, "wake")()
	ctx, cancel := b.while(ctx)
	defer cancel()
	if err := vm.Resume(ctx); err != nil {
		return fmt.Errorf("wake vm: %w", err)
	}
	return nil
}

// attached ties a VM that was started to its sandbox, watches over it and notes its
// handle in the record. Called with the op lock held.
func (v *vms) attached(b *box, vm vmm.VM, src source) error {
	v.adoptVM(b, vm)
	handle := vm.Handle()
	return v.save(b, func(r *Record) {
		r.VM, r.Restored = &handle, src.memory != ""
		r.VMM, r.Isolation = handle.Driver, v.isolationOf(handle.Driver)
	})
}

// tellGuest tells a guest that runs what it is. Called with the op lock held.
func (v *vms) tellGuest(ctx context.Context, b *box, src source) error {
	rec := b.record()
	ctx, cancel := b.while(ctx)
	defer cancel()
	// No packet is lost before the guest runs: the first connection is the one.
	g := b.op.guest
	if src.token != "" {
		g = v.cfg.Guests(rec.HostIP, src.token)
		defer g.Close()
	}
	if src.tell == tellNothing {
		defer phase(ctx, "rehearse")()
		b.op.opens = src.token
		// A rehearsal would let the template's program run.
		if err := g.Quiesce(ctx, src.token == ""); err != nil {
			return v.bootFailed(b, "rehearse guest", err)
		}
		return nil
	}
	defer phase(ctx, "init")()
	in := v.identity(rec, src.memory != "")
	switch src.tell {
	case tellIdentity:
		// A program may have read it, or a kernel drawn it before it was read.
		in.NewBootID = src.memory != "" && (src.token != "" || rec.flat())
	case tellClone:
		in.NewBootID = src.memory != ""
	case tellResume:
		in = guest.Init{AccessToken: rec.Token, Entropy: entropy(), Restored: true, CABundle: v.cfg.GuestCA}
	}
	err := b.init(ctx, g, in)
	if src.from == fromOwnDisk && errdefs.ClassOf(err) == errdefs.NotFound {
		// A disk without the account of its user is of use to root, and can be mended.
		v.log.Warn("the disk lacks the sandbox's user, root is the guest's", "sandbox", b.id, "user", in.DefaultUser)
		in.DefaultUser, in.DefaultWorkdir = "root", ""
		err = b.init(ctx, g, in)
	}
	if err != nil {
		return v.bootFailed(b, "initialise guest", err)
	}
	return nil
}

// identity is what a guest is told of itself when it starts to be a sandbox.
func (h *host) identity(rec Record, restored bool) guest.Init {
	env := rec.Login.Env
	if env == nil { // nil would leave those of before
		env = map[string]string{}
	}
	return guest.Init{
		AccessToken: rec.Token, Hostname: string(rec.ID), SandboxID: string(rec.ID),
		DefaultUser: rec.user(), DefaultWorkdir: rec.Login.Workdir, Env: env, Entropy: entropy(), Restored: restored,
		CloneKey: rec.CloneKey, CABundle: h.cfg.GuestCA,
	}
}

// boot starts the VM from its kernel, waits for the guest, and runs the template's
// program in it. If a boot snapshot is to
// be made of it, this is the moment: the guest has not been told yet what it is. Called
// with the op lock held.
func (v *vms) boot(ctx context.Context, b *box, tmpl template.Template, src source, t *turn) error {
	end := phase(ctx, "spawn")
	rec := b.record()
	driver := v.bootDriver(rec)
	vm, err := driver.Start(ctx, v.spec(driver, rec, tmpl))
	if err != nil {
		return fmt.Errorf("start vm: %w", err)
	}
	if err := v.attached(b, vm, src); err != nil {
		return err
	}
	end()
	end = phase(ctx, "guest")
	ctx, cancel := b.while(ctx)
	defer cancel()
	if err := b.op.guest.WaitReady(ctx); err != nil {
		return v.bootFailed(b, "wait for guest", err)
	}
	end()
	if hasProgram(tmpl) {
		var err error
		if src, err = v.startProgram(ctx, b, tmpl, src, t); err != nil {
			return err
		}
	}
	if src.stage != nil {
		end := phase(ctx, "snapshot")
		if err := v.makeBootSnapshot(ctx, b, tmpl, src); err != nil {
			return v.bootFailed(b, "go on after the snapshot", err)
		}
		end()
	}
	return v.tellGuest(ctx, b, src)
}

// fallBack takes back a restore that failed with cause and prepares what is tried
// instead. A boot snapshot that is to blame is dropped: the next create makes another.
// Called with the op lock held.
func (v *vms) fallBack(ctx context.Context, b *box, tmpl template.Template, src source, cause error) (source, error) {
	if _, err := os.Stat(src.memory); errors.Is(err, fs.ErrNotExist) && src.state {
		return src, src.gone
	}
	next, ok := src.instead(cause)
	if !ok {
		return src, cause
	}
	v.log.Warn("not restored, the sandbox boots", "sandbox", b.id, "from", src.from, "key", src.bootKey, "err", cause)
	blamed := []*errdefs.Class{errdefs.Corrupt, errdefs.Unsupported, errdefs.InvalidArgument, errdefs.Unavailable}
	if src.bootKey != "" && slices.Contains(blamed, errdefs.ClassOf(cause)) {
		if err := v.cfg.Templates.DropReady(tmpl.ID, tmpl.Build, src.bootKey); err != nil {
			v.log.Error("boot snapshot not removed", "template", tmpl.Name, "key", src.bootKey, "err", err)
		}
	}
	if err := v.stopStart(ctx, b); err != nil {
		return src, err
	}
	return v.makeDisk(ctx, b.record(), tmpl, next)
}

// stopStart takes back what was started of a sandbox, except its network and
// directories, so that it can be started in another way. Called with the op lock held.
func (v *vms) stopStart(ctx context.Context, b *box) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if b.op.vm != nil {
		if err := b.op.vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill vm: %w", err)
		}
	}
	b.closeGuest()
	b.op.vm = nil
	b.renew()
	if err := v.save(b, func(r *Record) { r.VM, r.Restored = nil, false }); err != nil {
		return err
	}
	if err := os.RemoveAll(v.runDir(b.id)); err != nil {
		return fmt.Errorf("remove run directory: %w", err)
	}
	if err := os.Mkdir(v.runDir(b.id), 0o700); err != nil {
		return fmt.Errorf("make run directory: %w", errdefs.DiskFull(err))
	}
	return errors.Join(remove(v.store.overlay(b.id)), remove(v.store.initImage(b.id)))
}

// adoptVM ties a VM to its sandbox and watches over it. Called with the op lock held.
func (v *vms) adoptVM(b *box, vm vmm.VM) {
	rec := b.record()
	b.op.vm = vm
	b.setGuest(v.cfg.Guests(rec.HostIP, rec.Token))
	kill := b.op.kill
	v.goes("watch vm", func() { v.watch(b, vm, kill) })
}

// watch waits for the end of a VM and frees its sandbox, unless the sandbox's end was
// the cause. kill is that of the incarnation.
func (v *vms) watch(b *box, vm vmm.VM, kill context.CancelCauseFunc) {
	select {
	case <-vm.Done():
	case <-v.life.Done():
		return
	}
	exit := vm.Exit()
	kill(errdefs.Unavailable.Errorf("the vm of sandbox %s ended: it %s", b.id, exit))
	if v.life.Err() != nil || b.hold(v.life, "freed") != nil {
		return // the next agent finds it
	}
	defer b.unhold()
	if slices.Contains([]State{Running, Paused, Waiting, Building}, b.state()) && b.op.vm == vm {
		v.ended(b, exit)
	}
}

// bootFailed says why a guest did not come up: the end of the console
// explains it more often than the error does. Called with the op lock held.
func (v *vms) bootFailed(b *box, verb string, err error) error {
	if cause := context.Cause(b.op.alive); cause != nil {
		err = cause
	}
	return fmt.Errorf("%s: %w%s", verb, v.disk.why(b, err), v.consoleEnd(b.id))
}
