package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The room on the host's disk has two levels. What Capacity.FreeDiskMiB keeps
// free is no room for anything new. When it is all that is left, half of it is
// divided among the sandboxes, and one that writes more than its share stands
// still until there is room again; the other half is for what is written before
// that is seen. A VM that its VMM stopped because the disk was full all the same
// is treated alike.
const (
	// diskLook and diskLookSoon bound the pause between two looks at the disk.
	diskLook     = time.Second
	diskLookSoon = 50 * time.Millisecond
	// fastWriter is how many bytes in a second all sandboxes together may write
	// without the disk being looked at too late.
	fastWriter = 4 << 30
	// stallLook is how often all VMs are asked whether they stand still, stallLookSoon
	// while room is scarce or one of them does.
	// Not a multiple of what else is looked at, so that nothing finds a sandbox busy.
	stallLook     = 47 * time.Second
	stallLookSoon = time.Second
	// stallAsk bounds such a question, and asksAtOnce how many are under way.
	stallAsk   = 2 * time.Second
	asksAtOnce = 16
	// goOnTimeout bounds what a guest may take to say that it goes on.
	goOnTimeout = 5 * time.Second
	// steady is how long a sandbox must have gone on before its next stall is
	// the first of a series.
	steady = time.Minute
	// patientLooks is after how many looks in vain an operation is broken off
	// that keeps a fast writer running.
	patientLooks = 2
)

// disk is what is known of the room on the file system of the state directory.
type disk struct {
	// keep is Capacity.FreeDiskMiB in bytes.
	keep int64
	// grows says that the limit of all disks together is what the room makes it.
	grows bool

	mu sync.Mutex
	// free is what the last look found; promised is what copies under way may
	// take of it.
	free, promised int64
	// scarce says that no more is left than what is kept free. share is then
	// what each sandbox may write, and base how much its disk took before.
	scarce bool
	share  int64
	base   map[ID]int64
	// missed counts the looks in vain for the op lock of a fast writer.
	missed map[ID]int
	asking bool
	asked  time.Time
}

// enough is when there is room again: more than what is kept, so that it does not
// come and go with each block.
func (d *disk) enough() int64 { return d.keep + d.keep/4 }

// used says whether a sandbox whose disk takes so much has used up its share.
func (d *disk) used(id ID, taken int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	base, ok := d.base[id]
	return d.scarce && ok && taken-base > d.share
}

func errDiskFull(id ID) error {
	return errdefs.Exhausted.Errorf("the host's disk is full; sandbox %s goes on when there is room", id)
}

// full refuses what needs a VM that does not stand still for want of room.
func (b *box) full(op Operation) error {
	switch op {
	case OpCall, OpHibernate, OpFork, OpSnapshot:
		if b.record().Reason == DiskFull {
			return errDiskFull(b.id)
		}
	}
	return nil
}

// whyStill returns err, or that the disk is full if that is why the VM did not
// do what was asked of it. Called with the op lock held.
func (m *Manager) whyStill(b *box, err error) error {
	if why := stalled(m.life, b.vm); why != nil {
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

// room sets aside what a copy may take of the disk, until done is called.
func (m *Manager) room(need int64) (done func(), err error) {
	free := m.freeBytes()
	d := &m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	keep := int64(m.cfg.Capacity.FreeDiskMiB) << 20
	if left := free - d.promised; left-need < keep {
		return nil, errdefs.Exhausted.Errorf("not enough disk: it may take %d MiB, %d are free on the host, %d must remain",
			mib(need), mib(left), mib(keep))
	}
	d.promised += need
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.promised -= need
	}, nil
}

// mib rounds up, so that little is not told as nothing.
func mib(bytes int64) int64 { return (max(bytes, 0) + 1<<20 - 1) >> 20 }

// mayGoOn refuses to resume a paused sandbox that would stand still at once.
// Called with the op lock held.
func (m *Manager) mayGoOn(b *box) error {
	m.disk.mu.Lock()
	scarce := m.disk.scarce
	m.disk.mu.Unlock()
	if scarce && (m.disk.used(b.id, m.store.takenBytes(b.id)) || stalled(m.life, b.vm) != nil) {
		return errDiskFull(b.id)
	}
	return nil
}

// watchDisk looks at the room until the manager's life ends: the more often, the
// sooner it may be used up.
func (m *Manager) watchDisk() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			timer.Reset(m.lookAtDisk(time.Now()))
		case <-m.life.Done():
			return
		}
	}
}

// lookAtDisk does what the room demands, and returns when to look again.
func (m *Manager) lookAtDisk(now time.Time) time.Duration {
	free := m.freeBytes()
	m.growCapacity(free)
	scarce := m.judge(free)
	marked := false
	for _, b := range m.all() {
		rec := b.record()
		switch {
		case rec.State != Running:
		case rec.Reason == DiskFull:
			marked = true
			if !scarce && b.wakes(now) && b.tryHold("continued") {
				m.goes("continue", func() {
					defer b.unhold()
					m.goOn(b)
				})
			}
		case scarce:
			m.rein(b)
		}
	}
	m.askStalled(now, scarce || marked)
	if free == math.MaxInt64 {
		return diskLook
	}
	away := time.Duration(float64(free-m.disk.keep) / fastWriter * float64(time.Second))
	return min(max(away, diskLookSoon), diskLook)
}

// judge says whether room is scarce, and divides it when it begins to be.
func (m *Manager) judge(free int64) (scarce bool) {
	sandboxes := int64(0)
	for _, b := range m.all() {
		if s := b.state(); s == Running || s == Paused {
			sandboxes++
		}
	}
	d := &m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = free
	switch {
	case !d.scarce && free < d.keep:
		d.scarce, d.share = true, free/2/max(sandboxes, 1)
		d.base, d.missed = map[ID]int64{}, map[ID]int{}
		m.log.Warn("the host's disk is nearly full: nothing new is made, and a sandbox that writes more than its share stands still",
			"free_mib", mib(free), "kept_mib", mib(d.keep), "share_mib", mib(d.share))
	case d.scarce && free >= d.enough():
		d.scarce, d.base, d.missed = false, nil, nil
		m.log.Info("the host's disk has room again", "free_mib", mib(free), "kept_mib", mib(d.keep))
	}
	return d.scarce
}

// growCapacity lets the limit of all disks together, if none is set, follow the
// room: an agent may have started on a full disk.
func (m *Manager) growCapacity(free int64) {
	if !m.disk.grows {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	limit := &m.cfg.Capacity.DiskMiB
	*limit = max(*limit, int(min(free>>20, math.MaxInt32)*diskOvercommit))
}

// rein lets a running sandbox stand still that has used up its share of a scarce
// disk. An operation that goes on for long is broken off: it needs the room, too.
func (m *Manager) rein(b *box) {
	d := &m.disk
	taken := m.store.takenBytes(b.id)
	d.mu.Lock()
	if _, ok := d.base[b.id]; !ok {
		d.base[b.id] = taken
	}
	share, enough := d.share, d.enough()
	d.mu.Unlock()
	if !d.used(b.id, taken) {
		return
	}
	held := b.tryHold("stopped for want of room")
	d.mu.Lock()
	d.missed[b.id]++
	missed := d.missed[b.id]
	if held {
		delete(d.missed, b.id)
	}
	d.mu.Unlock()
	if !held {
		b.mu.Lock()
		if b.abort != nil && missed >= patientLooks {
			b.abort(errDiskFull(b.id))
		}
		b.mu.Unlock()
		return
	}
	m.goes("stop for want of room", func() {
		defer b.unhold()
		if rec := b.record(); rec.State != Running || rec.Reason == DiskFull || b.vm == nil {
			return
		}
		ctx, cancel := context.WithTimeout(m.life, opTimeout)
		defer cancel()
		if err := b.vm.Pause(ctx); err != nil {
			m.log.Error("sandbox not stopped for want of room, will try again", "sandbox", b.id, "err", err)
			return
		}
		m.standStill(b, fmt.Sprintf("the host's disk is nearly full, and it wrote more than its share of %d MiB; it goes on when %d MiB are free",
			mib(share), mib(enough)))
	})
}

// askStalled asks the VMs of the running sandboxes whether they stand still, on a
// goroutine: one round at a time.
func (m *Manager) askStalled(now time.Time, soon bool) {
	every := stallLook
	if soon {
		every = stallLookSoon
	}
	d := &m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.asking || now.Sub(d.asked) < every {
		return
	}
	d.asking, d.asked = true, now
	began := m.goes("ask vms", func() {
		defer func() {
			d.mu.Lock()
			d.asking = false
			d.mu.Unlock()
		}()
		var wg sync.WaitGroup
		defer wg.Wait()
		bound := make(chan struct{}, asksAtOnce)
		for _, b := range m.all() {
			bound <- struct{}{}
			if rec := b.record(); m.life.Err() != nil || rec.State != Running || rec.Reason == DiskFull || !b.tryHold("asked for its state") {
				<-bound
				continue
			}
			wg.Go(func() {
				defer func() { b.unhold(); <-bound }()
				m.leaveStalled(b)
			})
		}
	})
	d.asking = began
}

// leaveStalled says whether a running sandbox stands still for want of room, and
// sees to it that it is known. Called with the op lock held.
func (m *Manager) leaveStalled(b *box) bool {
	rec := b.record()
	if rec.State != Running {
		return false
	}
	if rec.Reason == DiskFull {
		return true
	}
	why := stalled(m.life, b.vm)
	if why == nil {
		return false
	}
	m.standStill(b, fmt.Sprintf("%v: what it writes waits, and is written when there is room", why))
	return true
}

// standStill marks a sandbox whose VM is stopped. Called with the op lock held.
func (m *Manager) standStill(b *box, detail string) {
	now := time.Now()
	b.mu.Lock()
	if now.Sub(b.wokenAt) > steady {
		b.stalls = 0
	}
	b.stalls++
	if b.stalls > 1 {
		b.wakeAt = now.Add(backOff(b.stalls - 1))
	}
	b.mu.Unlock()
	_ = m.mark(b, DiskFull, detail) // the log has it if it is not saved
}

// wakes says whether it may be tried to let a sandbox go on.
func (b *box) wakes(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !now.Before(b.wakeAt)
}

// goOn lets a sandbox go on that stood still, its clock set right. Called with the
// op lock held.
func (m *Manager) goOn(b *box) {
	rec := b.record()
	if rec.State != Running || rec.Reason != DiskFull || b.vm == nil {
		return
	}
	ctx, cancel := context.WithTimeout(m.life, goOnTimeout)
	defer cancel()
	err := b.vm.Resume(ctx)
	if err == nil {
		err = b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: rec.Token})
	}
	if why := stalled(m.life, b.vm); why != nil || m.life.Err() != nil {
		b.mu.Lock()
		b.stalls++
		b.wakeAt = time.Now().Add(backOff(b.stalls))
		b.mu.Unlock()
		m.log.Warn("sandbox does not go on yet", "sandbox", b.id, "why", why)
		return
	}
	if err != nil { // which is not for want of room
		m.log.Warn("sandbox goes on, but does not answer", "sandbox", b.id, "err", err)
	}
	b.mu.Lock()
	b.wokenAt = time.Now()
	b.mu.Unlock()
	_ = m.mark(b, "", "") // the log has it if it is not saved
}

// freeBytes is what is free on the state directory's file system.
func (m *Manager) freeBytes() int64 {
	if m.cfg.freeDisk != nil {
		return m.cfg.freeDisk()
	}
	return m.store.freeBytes()
}

// freeBytes is what VMMs can still write on the store's file system; not knowing
// counts as plenty.
func (s store) freeBytes() int64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &st); err != nil {
		return math.MaxInt64
	}
	return int64(st.Bavail) * st.Bsize
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

// stillFull returns the error of a call that was not answered in time, or that the
// disk is full if the sandbox stood still for that.
func (m *Manager) stillFull(id ID, err error) error {
	if !errors.Is(err, errdefs.TimedOut) {
		return err
	}
	if info, gerr := m.Get(id); gerr == nil && info.Reason == DiskFull {
		return errDiskFull(id)
	}
	return err
}
