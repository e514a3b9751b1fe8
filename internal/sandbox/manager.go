package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Network gives sandboxes their namespaces; *network.Network is one.
type Network interface {
	Plan() network.Plan
	Setup(context.Context) error
	Acquire(context.Context) (network.Slot, error)
	Claim(network.Slot) error
	Release(network.Slot) error
	Open(context.Context, network.Slot) error
	Close(context.Context, network.Slot) error
	Strays(context.Context) ([]network.Slot, error)
	RemoveStrays(context.Context) ([]network.Slot, error)
	ParsePolicy(allowInternet *bool, allow, deny []string) (network.Policy, error)
	SetPolicy(context.Context, network.Slot, network.Policy) error
	SetLimits(context.Context, network.Slot, network.Limits) error
	CheckAll(context.Context, []network.Slot) (network.Findings, error)
	Repair(context.Context, network.Slot, network.Policy, network.Limits) error
	CountersAll(context.Context) (map[network.Slot]network.Counters, error)
}

// Templates gives sandboxes their disks; *template.Store is one.
type Templates interface {
	Get(name string) (template.Template, error)
	NewOverlay(ctx context.Context, path string, sizeMiB int) error
	CloneOverlay(ctx context.Context, path, from string) error
	Ready(ctx context.Context, name, key string) (template.Ready, error)
	StageReady(ctx context.Context, name string) (template.Stage, error)
	DropReady(name, key string) error
	Snapshot(ctx context.Context, name string) (template.Snapshot, error)
	Snapshots() ([]template.Snapshot, error)
	StageSnapshot(ctx context.Context, name string) (template.Stage, error)
	DropSnapshot(name string) error
	Verify(ctx context.Context, want func(kind template.Kind, name string) bool, fn func(template.Verified) error) error
}

// Guest is a running guest; *guest.Client is one.
type Guest interface {
	WaitReady(context.Context) error
	Init(context.Context, guest.Init) error
	Quiesce(ctx context.Context, quiet bool) error
	Freeze(context.Context) error
	Exec(context.Context, guest.Command) (guest.Result, error)
	Close()
}

// Config is what a Manager works with. Every field must be set, but for Others.
type Config struct {
	// StateDir holds the records and disks, under sandboxes/.
	StateDir string
	// RunDir holds a directory per running VM, for its sockets.
	RunDir string

	// Driver runs new VMs.
	Driver vmm.Driver
	// Others are drivers whose VMs and snapshots may still be there from when
	// they were the Driver.
	Others    []vmm.Driver
	Network   Network
	Templates Templates
	// Guests connects to the guest at an address; it does no I/O.
	Guests func(addr netip.Addr, token string) Guest
	// KillStrays ends the VMs with a directory under runRoot or a cgroup
	// under parent whose name keep refuses, and returns those names;
	// launch.KillStrays is one.
	KillStrays func(ctx context.Context, runRoot, parent string, keep func(name string) bool) ([]string, error)
	// NetNSOf returns which of the network namespaces the VM of that name under
	// runRoot is in; launch.NetNSOf is one.
	NetNSOf func(runRoot, name string, paths []string) (string, error)

	Capacity   Capacity
	OverlayMiB int
	// DNS are the resolvers that guests use.
	DNS []netip.Addr
	// DiskBytes and DiskOps are what each sandbox may read from and write to its
	// disk in a second; zero for no limit.
	DiskBytes, DiskOps int64
	// BaseUID and a sandbox's slot add up to the user and group that its VMM
	// runs as, shared with nobody.
	BaseUID int

	// BootTimeout bounds a create from the start of its VM until the guest
	// is ready.
	BootTimeout time.Duration
	// Warm is how many guests of the default kind wait ahead of use.
	Warm int
	// KeepStopped is how long the record of a sandbox that ended by itself
	// can still be read.
	KeepStopped time.Duration
	// KeepPaused is how long a sandbox may stay paused before it expires; 0
	// is for ever. A paused sandbox's own timeout stands still.
	KeepPaused time.Duration

	Log *slog.Logger

	// warmCalm is warmCalm unless a test sets it.
	warmCalm time.Duration
	// storeHook is tests': see store.hook.
	storeHook func(step string) error
	// freeDisk is tests': it stands for what is free on the host's disk.
	freeDisk func() int64
}

// Manager owns the sandboxes of a host. It is safe for concurrent use; values
// that it returns are copies.
//
// Locks: Manager.mu, then box.mu; neither is held across I/O. A box's op lock
// comes before both and is the one that is held across I/O.
type Manager struct {
	cfg    Config
	store  store
	log    *slog.Logger
	lock   *dirLock
	events *eventLog
	starts chan struct{}
	disk   disk

	// life ends at Shutdown; what hangs off it is counted in wg.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	boxes   map[ID]*box
	pool    pool
	used    Resources
	ends    map[Reason]int // since the start
	pending int            // releases and slots that did not come off yet
	// held are slots that may belong to unknown sandboxes.
	held map[network.Slot]bool
	// blamed: the log has it that no guest can be reached.
	blamed   bool
	draining bool // no more creates
	ended    bool // no more goroutines
}

// box is a sandbox in memory.
type box struct {
	id ID
	// op is the op lock: full while somebody changes the sandbox.
	op chan struct{}

	mu  sync.Mutex
	rec Record
	// doing names what the holder of op does, for those who wait.
	doing string
	vm    vmm.VM
	guest Guest
	// alive ends with this incarnation of the VM, its cause says why.
	alive context.Context
	kill  context.CancelCauseFunc
	// abort cancels the operation in progress; nil where there is none.
	abort context.CancelCauseFunc
	// leases counts the calls and streams in progress.
	leases int
	// failures and retryAt belong to a release that did not finish.
	failures int
	// naps counts the times in a row that it could not be hibernated when it
	// expired, refusals those of them that were not the host's fault.
	naps, refusals int
	retryAt        time.Time
	// looks counts the times in a row that a sandbox could not be reached, or its
	// record not be read; lookAt is when the next is due.
	looks  int
	lookAt time.Time
	// far: its VM answers, and its guest does not.
	far bool
	// stalls counts the times in a row that it stood still for want of room,
	// wokenAt is when it went on after that, wakeAt when that may be tried.
	stalls          int
	wokenAt, wakeAt time.Time
}

func newBox(rec Record) *box {
	b := &box{id: rec.ID, op: make(chan struct{}, 1), rec: rec}
	b.renew()
	return b
}

// renew begins another incarnation of the VM. Called with mu held, or before
// anybody else knows the box.
func (b *box) renew() {
	b.alive, b.kill = context.WithCancelCause(context.Background())
}

// hold takes the op lock, waiting within ctx.
func (b *box) hold(ctx context.Context, doing string) error {
	select {
	case b.op <- struct{}{}:
	default:
		select {
		case b.op <- struct{}{}:
		case <-ctx.Done():
			b.mu.Lock()
			defer b.mu.Unlock()
			return errdefs.Busy.Errorf("sandbox %s is being %s", b.id, b.doing)
		}
	}
	b.nowDoing(doing)
	return nil
}

// tryHold takes the op lock if nobody has it.
func (b *box) tryHold(doing string) bool {
	select {
	case b.op <- struct{}{}:
		b.nowDoing(doing)
		return true
	default:
		return false
	}
}

func (b *box) nowDoing(doing string) {
	b.mu.Lock()
	b.doing = doing
	b.mu.Unlock()
}

func (b *box) unhold() {
	b.mu.Lock()
	b.abort = nil
	b.mu.Unlock()
	<-b.op
}

func (b *box) record() Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec
}

func (b *box) state() State { return b.record().State }

// info is a copy for callers; a sandbox with work in flight is active now.
func (b *box) info() Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := b.rec
	if b.leases > 0 {
		rec.LastActiveAt = time.Now().UTC()
	}
	return rec.info()
}

// save changes the record, on disk first. Called with the op lock held.
func (m *Manager) save(b *box, change func(*Record)) error {
	rec := b.record()
	change(&rec)
	err := m.store.save(rec)
	if err != nil && rec.State != Stopping && rec.State != Stopped {
		return fmt.Errorf("save sandbox %s: %w", b.id, err)
	}
	// A full disk must not keep a sandbox from being freed: after a crash the
	// older record leads to the same release.
	b.mu.Lock()
	if b.rec.LastActiveAt.After(rec.LastActiveAt) {
		rec.LastActiveAt = b.rec.LastActiveAt
	}
	b.rec = rec
	b.mu.Unlock()
	if err != nil {
		m.log.Error("record not saved", "sandbox", b.id, "state", rec.State, "err", err)
	}
	return nil
}

// move is the one place where a state changes. Called with the op lock held.
func (m *Manager) move(b *box, to State, change func(*Record)) error {
	from := b.record()
	if !slices.Contains(moves[from.State], to) {
		return fmt.Errorf("sandbox %s cannot become %s from %s", b.id, to, from.State)
	}
	now := time.Now().UTC()
	err := m.save(b, func(r *Record) {
		r.State, r.StateAt = to, now
		if r.Reason == "" || r.Reason.passes() {
			r.Reason, r.Detail = "", ""
		}
		if to == Running || to == Paused {
			r.LastActiveAt = now
		}
		if change != nil {
			change(r)
		}
	})
	if err != nil {
		return err
	}
	rec := b.record()
	switch {
	case rec.Warm != "":
		m.log.Info("warm guest "+string(to), "sandbox", b.id, "reason", rec.Reason)
		return nil
	case from.Warm != "": // it begins to be a sandbox
		m.tell(Event{Time: rec.CreatedAt, ID: b.id, To: from.State})
		from.StateAt = rec.CreatedAt
	}
	m.tell(Event{Time: now, ID: b.id, From: from.State, To: to, Reason: rec.Reason})
	m.log.Info("sandbox "+string(to), "sandbox", b.id, "from", from.State, "reason", rec.Reason, "after", now.Sub(from.StateAt).Round(time.Millisecond))
	return nil
}

// mark notes on a sandbox, whose state stays, why it does not work as it
// should, or with an empty reason that it does again. A mark that is there
// already is not told again. The error concerns the record on disk alone: until
// the agent ends the mark stands all the same. Called with the op lock held.
func (m *Manager) mark(b *box, reason Reason, detail string) error {
	rec := b.record()
	if rec.Reason == reason && rec.Detail == detail {
		return nil
	}
	err := m.save(b, func(r *Record) { r.Reason, r.Detail = reason, detail })
	if err != nil {
		// It is true all the same. The next agent finds out by itself.
		m.log.Error("mark not saved", "sandbox", b.id, "reason", reason, "err", err)
		b.mu.Lock()
		b.rec.Reason, b.rec.Detail = reason, detail
		b.mu.Unlock()
	}
	if rec.Reason != reason {
		m.tell(Event{Time: time.Now().UTC(), ID: b.id, From: rec.State, To: rec.State, Reason: reason})
		m.log.Info("sandbox marked", "sandbox", b.id, "state", rec.State, "reason", reason, "detail", detail)
	}
	return err
}

// tell puts an event into the log.
func (m *Manager) tell(e Event) {
	if err := m.events.add(e); err != nil {
		m.log.Warn("event not kept", "sandbox", e.ID, "to", e.To, "err", err)
	}
}

// find returns the box of an ID.
func (m *Manager) find(id ID) (*box, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.boxes[id]
	if b == nil || b.waits() {
		return nil, errdefs.NotFound.Errorf("sandbox %s does not exist", id)
	}
	return b, nil
}

// all returns the boxes in no particular order.
func (m *Manager) all() []*box {
	m.mu.Lock()
	defer m.mu.Unlock()
	boxes := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		boxes = append(boxes, b)
	}
	return boxes
}

// Get returns one sandbox. It never waits for an operation.
func (m *Manager) Get(id ID) (Info, error) {
	b, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	return b.info(), nil
}

// AccessToken returns what a sandbox's guest demands of its callers; empty once
// the sandbox has ended. It never waits for an operation. Secret.
func (m *Manager) AccessToken(id ID) (string, error) {
	b, err := m.find(id)
	if err != nil {
		return "", err
	}
	rec := b.record()
	if rec.State == Stopping || rec.State == Stopped {
		return "", nil
	}
	return rec.Token, nil
}

// List returns all sandboxes, oldest first; stopped ones only on demand. It
// never waits for an operation.
func (m *Manager) List(stopped bool) []Info {
	boxes := m.all()
	infos := make([]Info, 0, len(boxes))
	for _, b := range boxes {
		if b.waits() {
			continue
		}
		if info := b.info(); stopped || info.State != Stopped {
			infos = append(infos, info)
		}
	}
	slices.SortFunc(infos, func(a, b Info) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return infos
}

// Stats are the manager's numbers at one moment.
type Stats struct {
	States map[State]int
	// Ended counts since the manager opened.
	Ended           map[Reason]int
	Reserved, Limit Resources
	// Pending counts what could not be freed yet.
	Pending int
	// Warm guests wait for a sandbox to be; WarmWanted are meant to.
	Warm, WarmWanted int
	// Marked counts those that run or are paused and do not work as they
	// should.
	Marked map[Reason]int
	// DiskFree and DiskKept are what is free on the host's disk, and what is
	// kept so, in bytes.
	DiskFree, DiskKept int64
}

// Stats returns the manager's numbers. It never waits for an operation.
func (m *Manager) Stats() Stats {
	s := Stats{States: map[State]int{}, Ended: map[Reason]int{}, Marked: map[Reason]int{}}
	for _, info := range m.List(true) {
		s.States[info.State]++
		if info.Reason.passes() {
			s.Marked[info.Reason]++
		}
	}
	m.disk.mu.Lock()
	s.DiskFree, s.DiskKept = m.disk.free, m.disk.keep
	m.disk.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.Copy(s.Ended, m.ends)
	s.Reserved, s.Limit, s.Pending = m.used, m.cfg.Capacity.Resources, m.pending
	s.Warm, s.WarmWanted = len(m.pool.waiting), m.cfg.Warm
	return s
}

// Draining says whether the manager has begun to shut down.
func (m *Manager) Draining() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.draining
}

// Console returns at most n bytes from the end of the guest's console.
func (m *Manager) Console(id ID, n int64) ([]byte, error) {
	if _, err := m.find(id); err != nil {
		return nil, err
	}
	return m.store.tail(id, n)
}

// Pause stops the vCPUs of a running sandbox. On error it runs as before.
func (m *Manager) Pause(ctx context.Context, id ID) error {
	b, ctx, end, err := m.begin(ctx, id, OpPause, "paused")
	if err != nil {
		return err
	}
	defer end()

	err = b.vm.Pause(ctx)
	if err == nil {
		err = m.move(b, Paused, nil)
	}
	if err != nil {
		return m.backTo(ctx, b, "pause", b.vm.Resume, err)
	}
	return nil
}

// Resume lets a paused or hibernated sandbox go on, its clock set right. On
// error it stays as it is.
func (m *Manager) Resume(ctx context.Context, id ID) error {
	b, ctx, end, err := m.begin(ctx, id, OpResume, "resumed")
	if err != nil {
		return err
	}
	defer end()
	if b.state() == Hibernated {
		return m.awaken(ctx, b)
	}

	if err := m.mayGoOn(b); err != nil {
		return err
	}
	err = b.vm.Resume(ctx)
	if err == nil {
		err = b.guest.Init(ctx, guest.Init{Time: time.Now(), AccessToken: b.record().Token})
	}
	if err == nil {
		err = m.move(b, Running, nil)
	}
	if err != nil {
		return m.backTo(ctx, b, "resume", b.vm.Pause, err)
	}
	return nil
}

// backTo returns the VM to where an operation found it. One that does not even do
// that is not given up: it is brought to what its record says when it answers
// again.
func (m *Manager) backTo(ctx context.Context, b *box, op string, back func(context.Context) error, err error) error {
	for _, of := range []context.Context{b.alive, ctx} {
		if cause := context.Cause(of); cause != nil {
			err = cause
			break
		}
	}
	if !errors.Is(err, errDestroyed) {
		err = m.whyStill(b, err)
	}
	err = fmt.Errorf("%s sandbox %s: %w", op, b.id, err)
	if errors.Is(err, errDestroyed) {
		return err // whoever destroys it waits for the op lock
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
	defer cancel()
	if berr := back(ctx); berr != nil && context.Cause(b.alive) == nil {
		m.unreachable(b, fmt.Errorf("%w; then %w", err, berr))
	}
	return err
}

// begin finds a sandbox, takes its op lock, which end gives back, and looks at
// its state again. The context that it returns ends, too, when somebody
// destroys the sandbox, and after opTimeout.
func (m *Manager) begin(ctx context.Context, id ID, op Operation, doing string) (*box, context.Context, func(), error) {
	b, err := m.find(id)
	if err != nil {
		return nil, nil, nil, err
	}
	// Not worth waiting for: no operation ends in a state that allows this.
	if s := b.state(); s == Stopping || s == Stopped {
		return nil, nil, nil, check(id, op, s)
	}
	if err := b.hold(ctx, doing); err != nil {
		return nil, nil, nil, err
	}
	rec := b.record()
	err = check(id, op, rec.State)
	if err == nil {
		err = b.full(op)
	}
	if err == nil && b.vm == nil && (rec.State == Running || rec.State == Paused) && slices.Contains(opsOnVM, op) {
		err = unreached(rec)
	}
	if err != nil {
		b.unhold()
		return nil, nil, nil, err
	}
	limit := opTimeout
	if op == OpHibernate || op == OpFork || op == OpSnapshot || rec.State == Hibernated {
		limit = moveTimeout(rec)
	}
	ctx, stop := context.WithTimeoutCause(ctx, limit, errdefs.Unavailable.Errorf("the vm did not answer within %s", limit))
	ctx, abort := context.WithCancelCause(ctx)
	b.mu.Lock()
	b.abort = abort
	b.mu.Unlock()
	return b, ctx, func() { b.unhold(); abort(nil); stop() }, nil
}

// opsOnVM are the operations that nothing is to be done about while there is no
// way to the VM.
var opsOnVM = []Operation{OpPause, OpResume, OpHibernate, OpFork, OpSnapshot}

// opTimeout bounds what a VM may take for a pause or a resume.
const opTimeout = 30 * time.Second

// SetTimeout sets after how much inactivity, counted from now, a sandbox
// expires; 0 is never.
func (m *Manager) SetTimeout(ctx context.Context, id ID, timeout time.Duration) (Info, error) {
	if err := checkTimeout(timeout); err != nil {
		return Info{}, errdefs.InvalidArgument.Errorf("%w", err)
	}
	b, _, end, err := m.begin(ctx, id, OpTimeout, "given another timeout")
	if err != nil {
		return Info{}, err
	}
	defer end()
	err = m.save(b, func(r *Record) { r.Timeout, r.LastActiveAt = timeout, time.Now().UTC() })
	return b.info(), err
}

// Lease is the right to call a guest. While one is held the sandbox counts as
// active.
type Lease struct {
	// Addr is where the guest is reached from the host.
	Addr netip.Addr
	// Token is what the guest demands.
	Token string
	// Alive ends when this incarnation of the VM does; its cause is classed.
	Alive context.Context

	// marked is not nil if the guest did not answer when it was last asked.
	marked  error
	guest   Guest
	release func()
}

// Context returns a context that ends with ctx or with the VM.
func (l *Lease) Context(ctx context.Context) (context.Context, context.CancelFunc) {
	return both(ctx, l.Alive)
}

// endedWithin is how long after its last connection a VM is seen to be gone.
const endedWithin = time.Second

// Ended says why this incarnation of the VM ended: a call to its guest broke off
// for that reason. nil says that the VM lives. A connection breaks a moment
// before the VM is seen to be gone, so it waits for that a little, within ctx.
func (l *Lease) Ended(ctx context.Context) error {
	timer := time.NewTimer(endedWithin)
	defer timer.Stop()
	select {
	case <-l.Alive.Done():
	case <-timer.C:
	case <-ctx.Done():
	}
	return context.Cause(l.Alive)
}

// Release ends the lease; further calls do nothing, nor does one on a lease that
// no manager gave.
func (l *Lease) Release() {
	if l.release != nil {
		l.release()
	}
}

// Lease takes a lease on a running sandbox. It waits, within ctx, for an
// operation in progress.
func (m *Manager) Lease(ctx context.Context, id ID) (*Lease, error) {
	b, err := m.find(id)
	if err != nil {
		return nil, err
	}
	if err := check(id, OpCall, b.state()); err != nil {
		return nil, err
	}
	if err := b.hold(ctx, "called"); err != nil {
		return nil, err
	}
	defer b.unhold()
	if err := b.full(OpCall); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := check(id, OpCall, b.rec.State); err != nil {
		return nil, err
	}
	var marked error
	if b.rec.Reason == Unreachable {
		marked = unreached(b.rec)
	}
	b.leases++
	b.naps, b.refusals = 0, 0
	var once sync.Once
	return &Lease{
		Addr: b.rec.HostIP, Token: b.rec.Token, Alive: b.alive, marked: marked, guest: b.guest,
		release: func() { once.Do(func() { m.endLease(b) }) },
	}, nil
}

func (m *Manager) endLease(b *box) {
	now := time.Now().UTC()
	b.mu.Lock()
	b.leases--
	b.rec.LastActiveAt = now
	b.mu.Unlock()
	if err := m.store.touch(b.id, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("activity not noted", "sandbox", b.id, "err", err)
	}
}

// Command is what Exec runs, Result what came of it.
type (
	Command = guest.Command
	Result  = guest.Result
)

// Exec runs one command in a running sandbox. When the VM dies meanwhile the
// error is Unavailable.
func (m *Manager) Exec(ctx context.Context, id ID, cmd Command) (Result, error) {
	lease, err := m.Lease(ctx, id)
	if err != nil {
		return Result{}, err
	}
	defer lease.Release()
	ctx, cancel := lease.Context(ctx)
	defer cancel()
	if lease.marked != nil {
		probe, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		if err := lease.guest.WaitReady(probe); err != nil {
			return Result{}, fmt.Errorf("exec in sandbox %s: %w", id, lease.marked)
		}
	}
	result, err := lease.guest.Exec(ctx, cmd)
	if err != nil {
		if errors.Is(err, errdefs.Unavailable) {
			if ended := lease.Ended(ctx); ended != nil {
				err = ended
			}
		}
		return result, fmt.Errorf("exec in sandbox %s: %w", id, m.stillFull(id, err))
	}
	return result, nil
}

// both returns a context that ends when either does.
func both(ctx, other context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(other, func() { cancel(context.Cause(other)) })
	return ctx, func() { stop(); cancel(nil) }
}

// newID returns a random ID: 64 bits, and a directory of that name decides
// whether it is new.
func newID() ID {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return ID("sb-" + hex.EncodeToString(b[:]))
}

func newToken() string { return rand.Text() }

// runDir is the directory of a sandbox's VM.
func (m *Manager) runDir(id ID) string { return filepath.Join(m.cfg.RunDir, string(id)) }

// cgroups is the parent of the VMs' cgroups. It is named after the instance,
// as all that is ours outside the state directory.
func (m *Manager) cgroups() string { return m.cfg.Network.Plan().Instance }

// goes runs fn on a goroutine that Shutdown waits for, unless that has begun
// to wait. A panic costs that work alone.
func (m *Manager) goes(what string, fn func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return false
	}
	m.wg.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				m.log.Error("panic", "in", what, "panic", p, "stack", string(debug.Stack()))
			}
		}()
		fn()
	})
	return true
}
