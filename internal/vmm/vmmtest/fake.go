// Package vmmtest tests drivers and their users: it holds the contract that every
// driver meets, and a fake driver whose n-th call can fail, hang or die.
package vmmtest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Op is a call of a driver or of a VM.
type Op string

// The calls that a fault can be injected into.
const (
	OpCheck  Op = "check"
	OpStart  Op = "start"
	OpAttach Op = "attach"
	OpPause  Op = "pause"
	OpResume Op = "resume"
	OpKill   Op = "kill"

	OpSnapshot Op = "snapshot"
	OpRestore  Op = "restore"
)

// Ops returns every Op, so that a fault matrix can range over them.
func Ops() []Op {
	return []Op{OpCheck, OpStart, OpAttach, OpPause, OpResume, OpKill, OpSnapshot, OpRestore}
}

// Fault is what happens to one call. Its parts combine: the call hangs first,
// then (with After) takes effect, then the VM dies, then Err is returned.
type Fault struct {
	// Err is returned; nil leaves the call's own result.
	Err error
	// Hang holds the call until its context ends, whose error it then
	// returns, or until Fake.Release.
	Hang bool
	// Die ends the VM that the call is about, as if it had crashed.
	Die bool
	// After lets the call take effect before Err is returned, as when the answer
	// is lost. A Start, Restore or Snapshot leaves nothing all the same, as the
	// contract promises.
	After bool
}

// Host is the machine on which fake VMs run. A guest that is booted with
// Boot.Probe powers off at once. A Host outlives its Fakes, as VMs outlive agents:
// a second Fake on the same Host is the driver of the next agent. Host is safe for
// concurrent use.
type Host struct {
	mu   sync.Mutex
	next int
	vms  map[int]*machine
}

// machine is a running VM, or one that ran.
type machine struct {
	pid    int
	spec   vmm.Spec
	paused bool
	// stall, if set, stops it whenever it runs; stalled says that it has.
	stall   error
	stalled bool
	done    chan struct{}
	exit    vmm.Exit
}

// NewHost returns a machine without VMs.
func NewHost() *Host { return &Host{vms: map[int]*machine{}} }

// Live returns the ids of the VMs that run or are paused, sorted; an id twice
// is two VMs.
func (h *Host) Live() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	ids := []string{}
	for _, m := range h.vms {
		ids = append(ids, m.spec.ID)
	}
	slices.Sort(ids)
	return ids
}

// Paused reports whether the VM with that id is there and paused.
func (h *Host) Paused(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			return m.paused
		}
	}
	return false
}

// Spec returns what the VM with that id was started with.
func (h *Host) Spec(id string) (vmm.Spec, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			return m.spec, true
		}
	}
	return vmm.Spec{}, false
}

// Die ends every VM with that id, as if its VMM had been killed from outside.
func (h *Host) Die(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			h.end(m, vmm.Exit{Code: -1, Signal: 9})
		}
	}
}

// Stall lets the VM with that id stand still for a reason, as if it wrote to a
// disk that takes no more; nil ends that, and it goes on at its next Resume.
func (h *Host) Stall(id string, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			m.stall = why
			m.stalled = m.stalled || why != nil
		}
	}
}

// Stalled reports whether the VM with that id stands still for such a reason.
func (h *Host) Stalled(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			return m.stalled
		}
	}
	return false
}

// Exit ends every VM with that id, as if its guest had powered off.
func (h *Host) Exit(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		if m.spec.ID == id {
			h.end(m, vmm.Exit{Code: 0})
		}
	}
}

// Reboot ends every VM.
func (h *Host) Reboot() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.vms {
		h.end(m, vmm.Exit{Code: -1})
	}
}

// end is called with mu held.
func (h *Host) end(m *machine, exit vmm.Exit) {
	if h.vms[m.pid] == nil {
		return
	}
	delete(h.vms, m.pid)
	m.exit = exit
	close(m.done)
}

func (h *Host) boot(spec vmm.Spec) *machine {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	m := &machine{pid: h.next, spec: spec, done: make(chan struct{})}
	h.vms[m.pid] = m
	if spec.Boot.Probe {
		h.end(m, vmm.Exit{Code: 0})
	}
	return m
}

func (h *Host) find(pid int) *machine {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.vms[pid]
}

// Fake is a vmm.Driver without VMMs. Safe for concurrent use.
type Fake struct {
	host *Host
	// Lenient checks only which kinds of kernel and link a Spec names, and not
	// the files, for callers whose other parts are fakes too. Set it before use.
	Lenient bool
	// OwnKernel makes it a driver that needs no kernel, initrd or tap, as one with
	// a kernel in user space. Set it before use.
	OwnKernel bool
	// Flat makes it such a driver (vmm.Needs), with a kernel of its own. Set it before use.
	Flat bool
	// Called is its name, "fake" if empty. Set it before use.
	Called string

	mu      sync.Mutex
	calls   map[Op]int
	faults  map[Op]map[int]Fault
	release chan struct{}
	hanging int
}

var (
	_ vmm.Driver      = (*Fake)(nil)
	_ vmm.Restorer    = (*Fake)(nil)
	_ vmm.Snapshotter = (*fakeVM)(nil)
	_ vmm.Staller     = (*fakeVM)(nil)
)

// NewFake returns a driver of VMs on the host.
func NewFake(h *Host) *Fake {
	return &Fake{host: h, calls: map[Op]int{}, faults: map[Op]map[int]Fault{}, release: make(chan struct{})}
}

// Inject lets fault happen to the n-th call of op from now on; 1 is the next.
func (f *Fake) Inject(op Op, n int, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.faults[op] == nil {
		f.faults[op] = map[int]Fault{}
	}
	f.faults[op][f.calls[op]+n] = fault
}

// Calls returns how often op was called.
func (f *Fake) Calls(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// Hanging returns how many calls hang at this moment.
func (f *Fake) Hanging() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hanging
}

// Release lets all calls go on that hang now.
func (f *Fake) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.release)
	f.release = make(chan struct{})
}

// run is one call: its fault, if any, around its effect. about returns the VM
// that the call is about, once there is one.
func (f *Fake) run(ctx context.Context, op Op, about func() *machine, effect func() error) error {
	f.mu.Lock()
	f.calls[op]++
	fault, faulty := f.faults[op][f.calls[op]]
	delete(f.faults[op], f.calls[op])
	release := f.release
	if faulty && fault.Hang {
		f.hanging++
	}
	f.mu.Unlock()

	released := false
	if faulty && fault.Hang {
		select {
		case <-ctx.Done():
		case <-release:
			released = true
		}
		f.mu.Lock()
		f.hanging--
		f.mu.Unlock()
	}
	// A kill works under a cancelled context too, unless it hangs.
	if ctx.Err() != nil && !released && (op != OpKill || fault.Hang) {
		return fmt.Errorf("%s vm: %w", op, context.Cause(ctx))
	}
	var err error
	if fault.Err == nil || fault.After {
		err = effect()
	}
	if m := about(); fault.Die && m != nil {
		f.host.mu.Lock()
		f.host.end(m, vmm.Exit{Code: -1, Signal: 9})
		f.host.mu.Unlock()
	}
	if fault.Err != nil {
		return fault.Err
	}
	return err
}

// Name implements vmm.Driver.
func (f *Fake) Name() string { return cmp.Or(f.Called, "fake") }

// Needs implements vmm.Driver.
func (f *Fake) Needs() vmm.Needs {
	switch {
	case f.Flat:
		return vmm.Needs{Init: true, Flat: true, Link: vmm.Packet}
	case f.OwnKernel:
		return vmm.Needs{Link: vmm.Packet}
	}
	return vmm.Needs{Kernel: true, Link: vmm.Tap}
}

// validate refuses a spec that this driver cannot take.
func (f *Fake) validate(spec vmm.Spec) error {
	if !f.Lenient {
		return spec.Validate(f.Needs())
	}
	needs := f.Needs()
	if needs.Kernel == (spec.Kernel == vmm.Kernel{}) {
		return errdefs.InvalidArgument.Errorf("kernel %+v: want one: %v", spec.Kernel, needs.Kernel)
	}
	if needs.Init != (spec.Init != "") || needs.Flat && len(spec.Root.Layers) != 1 {
		return errdefs.InvalidArgument.Errorf("init %q over %d layers", spec.Init, len(spec.Root.Layers))
	}
	if spec.Link != nil && spec.Link.Kind != needs.Link {
		return errdefs.InvalidArgument.Errorf("link of kind %q: want %q", spec.Link.Kind, needs.Link)
	}
	return nil
}

// Check implements vmm.Driver.
func (f *Fake) Check(ctx context.Context) (vmm.Report, error) {
	report := vmm.Report{Version: "1.0.0", Accel: "tcg", CPU: fakeCPU, Isolation: vmm.Emulation, Speed: vmm.Emulated, Why: "it is a fake"}
	if f.OwnKernel || f.Flat {
		report.Accel, report.Isolation, report.Speed = "systrap", vmm.UserSpaceKernel, vmm.NearNative
	}
	err := f.run(ctx, OpCheck, func() *machine { return nil }, func() error { return nil })
	if err != nil {
		return vmm.Report{}, err
	}
	return report, nil
}

// Start implements vmm.Driver.
func (f *Fake) Start(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	if err := f.validate(spec); err != nil {
		return nil, err
	}
	return f.bring(ctx, OpStart, func() *machine { return f.host.boot(spec) })
}

// bring runs a call that makes a VM.
func (f *Fake) bring(ctx context.Context, op Op, boot func() *machine) (vmm.VM, error) {
	var m *machine
	err := f.run(ctx, op, func() *machine { return m }, func() error {
		m = boot()
		return nil
	})
	if err != nil {
		if m != nil {
			f.host.mu.Lock()
			f.host.end(m, vmm.Exit{Code: -1, Signal: 9})
			f.host.mu.Unlock()
		}
		return nil, err
	}
	return &fakeVM{fake: f, m: m}, nil
}

// fakeSnapshot is the one file of a fake's snapshot.
const fakeSnapshot = "fake-snapshot.json"

type fakeShape struct {
	Driver               string
	VCPUs, MemMiB, Disks int
	NIC, Kernel          bool
}

func (f *Fake) shapeOf(s vmm.Spec) fakeShape {
	return fakeShape{
		Driver: f.Name(), VCPUs: s.VCPUs, MemMiB: s.MemMiB, Disks: len(s.Root.Disks()),
		NIC: s.Link != nil, Kernel: s.Kernel != vmm.Kernel{},
	}
}

// Restore implements vmm.Restorer.
func (f *Fake) Restore(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	if err := f.validate(spec); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(dir, fakeSnapshot))
	var shape fakeShape
	if err != nil || json.Unmarshal(data, &shape) != nil {
		return nil, errdefs.Corrupt.Errorf("restore vm: snapshot is incomplete")
	}
	if shape.Driver == "" { // of an earlier version
		shape.Driver = f.Name()
	}
	if shape.Driver != f.Name() {
		return nil, errdefs.Unsupported.Errorf("restore vm: snapshot is of the vmm %s", shape.Driver)
	}
	if shape != f.shapeOf(spec) {
		return nil, errdefs.InvalidArgument.Errorf("restore vm: snapshot is of a vm with %+v, not %+v", shape, f.shapeOf(spec))
	}
	return f.bring(ctx, OpRestore, func() *machine {
		m := f.host.boot(spec)
		f.host.mu.Lock()
		defer f.host.mu.Unlock()
		m.paused = true
		return m
	})
}

// SnapshotKey implements vmm.Restorer.
func (f *Fake) SnapshotKey(_ context.Context, spec vmm.Spec) (string, error) {
	key, err := json.Marshal(f.shapeOf(spec))
	return "fake 1.0.0 " + string(key), err
}

// Snapshot implements vmm.Snapshotter.
func (v *fakeVM) Snapshot(ctx context.Context, dir string) error {
	path := filepath.Join(dir, fakeSnapshot)
	wrote := false
	err := v.fake.run(ctx, OpSnapshot, v.self, func() error {
		h := v.fake.host
		h.mu.Lock()
		gone, paused := h.vms[v.m.pid] == nil, v.m.paused
		h.mu.Unlock()
		if gone {
			return errdefs.Unavailable.Errorf("snapshot vm: its VMM %s", v.m.exit)
		}
		if !paused {
			return errdefs.WrongState.Errorf("snapshot vm: vm is running, not paused")
		}
		data, err := json.Marshal(v.fake.shapeOf(v.m.spec))
		if err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, os.ErrExist) {
			return errdefs.AlreadyExists.Errorf("snapshot vm: the directory holds one")
		}
		if err != nil {
			return err
		}
		wrote = true
		_, err = f.Write(data)
		return errors.Join(err, f.Close())
	})
	if err != nil && wrote {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// Attach implements vmm.Driver.
func (f *Fake) Attach(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	var state fakeState
	if h.Driver != f.Name() || json.Unmarshal(h.State, &state) != nil {
		return nil, errdefs.InvalidArgument.Errorf("attach: not a handle of this driver")
	}
	m := f.host.find(state.PID)
	err := f.run(ctx, OpAttach, func() *machine { return m }, func() error {
		if m == nil || f.host.find(state.PID) == nil {
			return errdefs.NotFound.Errorf("attach: the vm has exited")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &fakeVM{fake: f, m: m}, nil
}

type fakeState struct {
	PID int `json:"pid"`
}

// fakeCPU is what guests of a Fake see.
const fakeCPU = "x86-64-v0"

type fakeVM struct {
	fake *Fake
	m    *machine
}

func (v *fakeVM) Handle() vmm.Handle {
	state, err := json.Marshal(fakeState{v.m.pid})
	if err != nil {
		panic(err) // a number always encodes
	}
	return vmm.Handle{Driver: v.fake.Name(), Version: "1.0.0", CPU: fakeCPU, State: state}
}

func (v *fakeVM) Pause(ctx context.Context) error  { return v.set(ctx, OpPause, true) }
func (v *fakeVM) Resume(ctx context.Context) error { return v.set(ctx, OpResume, false) }

func (v *fakeVM) set(ctx context.Context, op Op, paused bool) error {
	return v.fake.run(ctx, op, v.self, func() error {
		h := v.fake.host
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.vms[v.m.pid] == nil {
			return errdefs.Unavailable.Errorf("%s vm: its VMM %s", op, v.m.exit)
		}
		v.m.paused = paused
		v.m.stalled = v.m.stall != nil
		return nil
	})
}

// Stalled implements vmm.Staller.
func (v *fakeVM) Stalled(context.Context) (why, err error) {
	h := v.fake.host
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.vms[v.m.pid] == nil:
		return nil, errdefs.Unavailable.Errorf("ask vm: its VMM %s", v.m.exit)
	case !v.m.stalled:
		return nil, nil
	case v.m.stall == nil:
		return errdefs.Exhausted.Errorf("the host's disk is full"), nil
	}
	return v.m.stall, nil
}

func (v *fakeVM) Kill(ctx context.Context) error {
	return v.fake.run(ctx, OpKill, v.self, func() error {
		h := v.fake.host
		h.mu.Lock()
		defer h.mu.Unlock()
		h.end(v.m, vmm.Exit{Code: -1, Signal: 9})
		return nil
	})
}

func (v *fakeVM) self() *machine        { return v.m }
func (v *fakeVM) Done() <-chan struct{} { return v.m.done }

func (v *fakeVM) Exit() vmm.Exit {
	select {
	case <-v.m.done:
		return v.m.exit
	default:
		return vmm.Exit{Code: -1}
	}
}
