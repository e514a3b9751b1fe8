package sandbox

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/diskfree"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The free space of the host's disk has two levels. Nothing new is made of the space
// that Capacity.FreeDiskMiB keeps free. When no more than that is left, half of it is
// divided among the sandboxes. A sandbox that writes more than its share is stopped
// until there is room again. The other half is for what is written before that is
// seen. A VM that its VMM stopped because the disk was full is treated alike.
const (
	// diskLook and diskLookSoon bound the pause between two looks at the disk.
	diskLook     = time.Second
	diskLookSoon = 50 * time.Millisecond
	// fastWriter is how many bytes in a second all sandboxes together may write
	// without the disk being looked at too late.
	fastWriter = 4 << 30
	// stallLook is how often all VMs are asked whether they stand still, stallLookSoon
	// while room is scarce or one of them does.
	// stallLook is no multiple of other periods, so that other work finds no sandbox busy.
	stallLook     = 47 * time.Second
	stallLookSoon = time.Second
	// stallAsk bounds such a question, and asksAtOnce how many are under way.
	stallAsk   = 2 * time.Second
	asksAtOnce = 16
	// goOnTimeout bounds what a guest may take to say that it goes on.
	goOnTimeout = 5 * time.Second
	// steady is how long a sandbox must have gone on before its next stall begins a
	// new series.
	steady = time.Minute
	// patientLooks is how many looks find the op lock of a fast writer taken before the
	// operation that holds it is broken off.
	patientLooks = 2
)

// disk watches the free space of the state directory's file system and stops the
// sandboxes that would use it up. It is safe for concurrent use.
type disk struct {
	*registry
	*work
	ledger *ledger
	log    *slog.Logger
	// free is how many bytes are free, of which keep must remain.
	free func() int64
	keep int64
	// grows says that the limit of all disks together follows the free space.
	grows bool

	state struct {
		sync.Mutex
		// free is what the last look found; promised is what copies under way may
		// take of it.
		free, promised int64
		// scarce says that no more is left than what is kept free. share is then
		// what each sandbox may write, and base how much its disk took before.
		scarce bool
		share  int64
		base   map[ID]int64
		// missed counts the looks that found the op lock of a fast writer taken.
		missed map[ID]int
		asking bool
		asked  time.Time
	}
}

func newDisk(r *registry, w *work, l *ledger, free func() int64, c Capacity) *disk {
	return &disk{registry: r, work: w, ledger: l, log: r.log, free: free, keep: int64(c.FreeDiskMiB) << 20, grows: c.DiskMiB == 0}
}

// enough is how much must be free for room not to be scarce any more: more than what is
// kept, so that scarcity does not come and go with each block.
func (d *disk) enough() int64 { return d.keep + d.keep/4 }

// overShare says whether a sandbox whose disk takes so much has used up its share.
func (d *disk) overShare(id ID, taken int64) bool {
	d.state.Lock()
	defer d.state.Unlock()
	base, ok := d.state.base[id]
	return d.state.scarce && ok && taken-base > d.state.share
}

func errDiskFull(id ID) error {
	return errdefs.Exhausted.Errorf("the host's disk is full; sandbox %s goes on when there is room", id)
}

// full refuses an operation that needs a VM which the full disk has stopped.
func (b *box) full(op Operation) error {
	switch op {
	case OpCall, OpHibernate, OpFork, OpSnapshot:
		if b.record().Reason == DiskFull {
			return errDiskFull(b.id)
		}
	}
	return nil
}

// why returns err, or that the disk is full if the VM did not do for that reason what
// was asked of it. Called with the op lock held.
func (d *disk) why(b *box, err error) error {
	if stalled(d.life, b.op.vm) != nil {
		return errDiskFull(b.id)
	}
	return errdefs.DiskFull(err)
}

// stalled says why a VM was stopped by its VMM, nil if it was not or if that is not
// known.
func stalled(ctx context.Context, vm vmm.VM) error {
	s, ok := vm.(vmm.Staller)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stallAsk)
	defer cancel()
	why, err := s.Stalled(ctx)
	if err != nil {
		return nil
	}
	return why
}

// reserve sets aside what a copy may take of the disk, until done is called.
func (d *disk) reserve(bytes int64) (done func(), err error) {
	free := d.free()
	d.state.Lock()
	defer d.state.Unlock()
	if left := free - d.state.promised; left-bytes < d.keep {
		return nil, errdefs.Exhausted.Errorf("not enough disk: it may take %d MiB, %d are free on the host, %d must remain",
			mib(bytes), mib(left), mib(d.keep))
	}
	d.state.promised += bytes
	return func() {
		d.state.Lock()
		defer d.state.Unlock()
		d.state.promised -= bytes
	}, nil
}

// mib rounds up, so that little is not shown as nothing.
func mib(bytes int64) int64 { return (max(bytes, 0) + 1<<20 - 1) >> 20 }

// mayResume refuses to resume a paused sandbox that would be stopped at once.
// Called with the op lock held.
func (d *disk) mayResume(b *box) error {
	if d.scarce() && (d.overShare(b.id, d.store.takenBytes(b.id)) || stalled(d.life, b.op.vm) != nil) {
		return errDiskFull(b.id)
	}
	return nil
}

func (d *disk) scarce() bool {
	d.state.Lock()
	defer d.state.Unlock()
	return d.state.scarce
}

// stats returns how many bytes were free at the last look.
func (d *disk) stats() (free int64) {
	d.state.Lock()
	defer d.state.Unlock()
	return d.state.free
}

// watch looks at the free space until the manager's life ends: the more often, the
// sooner it may be used up.
func (d *disk) watch() {
	timer := time.NewTimer(d.look(time.Now()))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			timer.Reset(d.look(time.Now()))
		case <-d.life.Done():
			return
		}
	}
}

// look does what the free space demands, and returns when to look again.
func (d *disk) look(now time.Time) time.Duration {
	free := d.free()
	d.grow(free)
	scarce := d.judge(free)
	marked := false
	for _, b := range d.all() {
		rec := b.record()
		switch {
		case !rec.State.writes():
		case rec.Reason == DiskFull:
			marked = true
			if !scarce && b.mayGoOn(now) && b.tryHold("continued") {
				d.goes("continue", func() {
					defer b.unhold()
					d.goOn(b)
				})
			}
		case scarce:
			d.limit(b)
		}
	}
	d.askStalled(now, scarce || marked)
	if free == math.MaxInt64 {
		return diskLook
	}
	away := time.Duration(float64(free-d.keep) / fastWriter * float64(time.Second))
	return min(max(away, diskLookSoon), diskLook)
}

// judge says whether room is scarce, and divides it when that begins.
func (d *disk) judge(free int64) (scarce bool) {
	sandboxes := int64(0)
	for _, b := range d.all() {
		if s := b.state(); s == Running || s == Paused || s == Building {
			sandboxes++
		}
	}
	d.state.Lock()
	defer d.state.Unlock()
	s := &d.state
	s.free = free
	switch {
	case !s.scarce && free < d.keep:
		s.scarce, s.share = true, free/2/max(sandboxes, 1)
		s.base, s.missed = map[ID]int64{}, map[ID]int{}
		d.log.Warn("the host's disk is nearly full: nothing new is made, and a sandbox that writes more than its share is stopped",
			"free_mib", mib(free), "kept_mib", mib(d.keep), "share_mib", mib(s.share))
	case s.scarce && free >= d.enough():
		s.scarce, s.base, s.missed = false, nil, nil
		d.log.Info("the host's disk has room again", "free_mib", mib(free), "kept_mib", mib(d.keep))
	}
	return s.scarce
}

// grow lets the limit of all disks together, if none is set, follow the
// free space: an agent may have started on a full disk.
func (d *disk) grow(free int64) {
	if d.grows {
		d.ledger.grow(free)
	}
}

// limit stops a running sandbox that has used up its share of a scarce
// disk. An operation that goes on for long is broken off: it needs the room, too.
func (d *disk) limit(b *box) {
	taken := d.store.takenBytes(b.id)
	share := d.shareOf(b.id, taken)
	if !d.overShare(b.id, taken) {
		return
	}
	held := b.tryHold("stopped for want of room")
	if missed := d.countMissed(b.id, held); !held {
		if missed >= patientLooks {
			b.cancel(errDiskFull(b.id))
		}
		return
	}
	d.goes("stop for want of room", func() {
		defer b.unhold()
		if rec := b.record(); !rec.State.writes() || rec.Reason == DiskFull || b.op.vm == nil {
			return
		}
		ctx, cancel := context.WithTimeout(d.life, opTimeout)
		defer cancel()
		if err := b.op.vm.Pause(ctx); err != nil {
			d.log.Error("sandbox not stopped for want of room, will try again", "sandbox", b.id, "err", err)
			return
		}
		d.standStill(b, fmt.Sprintf("the host's disk is nearly full, and it wrote more than its share of %d MiB; it goes on when %d MiB are free",
			mib(share), mib(d.enough())))
	})
}

// shareOf returns what each sandbox may write, and notes what the disk of one takes
// when it is first seen.
func (d *disk) shareOf(id ID, taken int64) int64 {
	d.state.Lock()
	defer d.state.Unlock()
	if _, ok := d.state.base[id]; !ok && d.state.base != nil {
		d.state.base[id] = taken
	}
	return d.state.share
}

// countMissed counts the looks that found the op lock of a fast writer taken.
func (d *disk) countMissed(id ID, held bool) int {
	d.state.Lock()
	defer d.state.Unlock()
	if held || d.state.missed == nil {
		delete(d.state.missed, id)
		return 0
	}
	d.state.missed[id]++
	return d.state.missed[id]
}

// askStalled asks the VMs of the running sandboxes whether they stand still, on a
// goroutine: one round at a time.
func (d *disk) askStalled(now time.Time, soon bool) {
	every := stallLook
	if soon {
		every = stallLookSoon
	}
	d.state.Lock()
	defer d.state.Unlock()
	if d.state.asking || now.Sub(d.state.asked) < every {
		return
	}
	d.state.asked = now
	d.state.asking = d.goes("ask vms", func() {
		defer func() {
			d.state.Lock()
			defer d.state.Unlock()
			d.state.asking = false
		}()
		d.askAll()
	})
}

// askAll asks the VMs of the running sandboxes whether they stand still.
func (d *disk) askAll() {
	var wg sync.WaitGroup
	defer wg.Wait()
	bound := make(chan struct{}, asksAtOnce)
	for _, b := range d.all() {
		bound <- struct{}{}
		if rec := b.record(); d.life.Err() != nil || !rec.State.writes() || rec.Reason == DiskFull || !b.tryHold("asked for its state") {
			<-bound
			continue
		}
		wg.Go(func() {
			defer func() { b.unhold(); <-bound }()
			d.leaveStalled(b)
		})
	}
}

// leaveStalled says whether the VM of a running sandbox stands still for want of room,
// and marks the sandbox if so. Called with the op lock held.
func (d *disk) leaveStalled(b *box) bool {
	rec := b.record()
	if !rec.State.writes() {
		return false
	}
	if rec.Reason == DiskFull {
		return true
	}
	why := stalled(d.life, b.op.vm)
	if why == nil {
		return false
	}
	d.standStill(b, fmt.Sprintf("%v: what it writes waits, and is written when there is room", why))
	return true
}

// writes says whether the programs of a sandbox in that state run and fill the disk.
func (s State) writes() bool { return s == Running || s == Building }

// standStill marks a sandbox whose VM is stopped. A build sandbox does not go on: what its
// build does in it fails. Called with the op lock held.
func (d *disk) standStill(b *box, detail string) {
	if b.state() == Building {
		b.op.kill(errdefs.Exhausted.Errorf("the host's disk is full: the build sandbox was stopped (%s)", detail))
		return
	}
	b.stalled(time.Now())
	_ = d.mark(b, DiskFull, detail) // the log has it if it is not saved
}

// stalled notes that the VM has stopped, and sets when it may be tried to let it go on.
func (b *box) stalled(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Sub(b.mu.goneOnAt) > steady {
		b.mu.stalls = 0
	}
	b.mu.stalls++
	if b.mu.stalls > 1 {
		b.mu.goOnAt = now.Add(backOff(b.mu.stalls - 1))
	}
}

// wentOn notes what came of an attempt to let the VM go on.
func (b *box) wentOn(now time.Time, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if ok {
		b.mu.goneOnAt = now
		return
	}
	b.mu.stalls++
	b.mu.goOnAt = now.Add(backOff(b.mu.stalls))
}

// mayGoOn says whether it may be tried to let a sandbox go on.
func (b *box) mayGoOn(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !now.Before(b.mu.goOnAt)
}

// goOn lets a sandbox go on that was stopped, its clock set right. Called with the
// op lock held.
func (d *disk) goOn(b *box) {
	rec := b.record()
	if rec.State != Running || rec.Reason != DiskFull || b.op.vm == nil {
		return
	}
	ctx, cancel := context.WithTimeout(d.life, goOnTimeout)
	defer cancel()
	err := goOn(ctx, b)
	if why := stalled(d.life, b.op.vm); why != nil || d.life.Err() != nil {
		b.wentOn(time.Now(), false)
		d.log.Warn("sandbox does not go on yet", "sandbox", b.id, "why", why)
		return
	}
	if err != nil { // which is not for want of room
		d.log.Warn("sandbox goes on, but does not answer", "sandbox", b.id, "err", err)
	}
	b.wentOn(time.Now(), true)
	_ = d.mark(b, "", "") // the log has it if it is not saved
}

// goOn lets the VM of a sandbox run, and its programs, with the clock set right. Called
// with the op lock held.
func goOn(ctx context.Context, b *box) error {
	if err := b.op.vm.Resume(ctx); err != nil {
		return err
	}
	return thaw(ctx, b)
}

// thaw sets the guest's clock and lets its programs run. Called with the op lock held.
func thaw(ctx context.Context, b *box) error {
	return b.init(ctx, b.op.guest, guest.Init{Time: time.Now(), AccessToken: b.record().Token})
}

// freeBytes is what VMMs can still write on the store's file system; not knowing
// counts as plenty.
func (s store) freeBytes() int64 {
	free, err := diskfree.Bytes(s.dir)
	if err != nil {
		return math.MaxInt64
	}
	return free
}

// takenBytes is what a sandbox's disk takes on the host's.
func (s store) takenBytes(id ID) int64 { return takenBytes(s.overlay(id)) }

// takenBytes is what a file takes on the disk; not knowing counts as nothing.
func takenBytes(path string) int64 {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}
