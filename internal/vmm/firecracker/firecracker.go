// Package firecracker runs microVMs with Firecracker, under KVM.
package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// Name is the driver's name in handles and settings.
const Name = "firecracker"

const (
	// maxVCPUs is Firecracker's own bound.
	maxVCPUs = 32
	// upPoll is how often a new process is tried until it answers.
	upPoll = time.Millisecond
	// readBack bounds the question for a VM's state after an answer went missing.
	readBack = 2 * time.Second
)

// Config says what a Driver works with.
type Config struct {
	// Binary is firecracker's path or its name in PATH; empty for that name.
	Binary string
	// Jailer is the jailer's, of the same release; empty for that name, and to
	// do without one that is not there; "none" to do without in any case.
	Jailer string
	// Probe tells whether KVM works.
	Probe kvm.Probe
}

// Driver implements vmm.Driver.
type Driver struct {
	cfg Config
	// kvm is cfg.Probe's, or what a test has in its place.
	kvm func(ctx context.Context, name, version string, start func(context.Context, vmm.Spec) (vmm.VM, error)) (kvm.Verdict, error)

	checking chan struct{} // held by the one that probes
	checked  *found        // guarded by checking
}

// New returns a driver; it does nothing yet.
func New(cfg Config) *Driver {
	if cfg.Binary == "" {
		cfg.Binary = "firecracker"
	}
	return &Driver{cfg: cfg, kvm: cfg.Probe.KVM, checking: make(chan struct{}, 1)}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	f, err := d.check(ctx)
	if err != nil {
		return nil, err
	}
	if err := validate(spec); err != nil {
		return nil, err
	}
	v, err := d.launch(ctx, spec, f.bin, "")
	if err != nil {
		return nil, fmt.Errorf("start vm: %w", err)
	}
	return v, nil
}

// validate says whether Firecracker can take the spec. (Of odd numbers of vCPUs
// its description says no; that it takes some as long as no hyperthreads are
// asked for, it does not promise.)
func validate(s vmm.Spec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if s.VCPUs > maxVCPUs || s.VCPUs > 1 && s.VCPUs%2 != 0 {
		return errdefs.InvalidArgument.Errorf("%d vCPUs: firecracker runs 1 or an even number, at most %d", s.VCPUs, maxVCPUs)
	}
	return nil
}

// launch starts Firecracker with a valid spec, to boot it or, with the directory
// of a snapshot that fits, to go on where that stopped.
func (d *Driver) launch(ctx context.Context, spec vmm.Spec, bin programs, from string) (_ *vm, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(vmm.Cancelled(ctx, err), steps.Unwind(ctx))
		}
	}()
	at := place{spec.RunDir}
	// A socket that is there already would be somebody's, to Firecracker.
	if err := os.RemoveAll(at.socketDir()); err != nil {
		return nil, err
	}
	for dir, uid := range map[string]int{at.jails(): 0, at.socketDir(): spec.UID} {
		steps.Push("remove directory", func(context.Context) error { return os.RemoveAll(dir) })
		if err := makeDir(dir, uid); err != nil {
			return nil, err
		}
	}
	process, err := launch.Start(program(bin, spec, from))
	if err != nil {
		return nil, err
	}
	steps.Push("kill vmm", process.Kill)
	v := newVM(process, bin.version, state{
		Process: process.Ref(), ID: spec.ID, Socket: at.socket(),
		UID: spec.UID, GID: spec.GID, Shape: shapeOf(spec),
	})
	err = v.bring(ctx, spec, from)
	exit, ended := process.EndedBy(err)
	switch {
	case ended && exit.Signal != 0: // somebody killed it: its own words are empty
		return nil, errdefs.Unavailable.Errorf("the vmm %s while it started", exit)
	case ended:
		// Unclassed: its own words are not meant for clients.
		return nil, fmt.Errorf("firecracker %s: %s", exit, exit.Detail)
	case err != nil:
		return nil, err
	}
	steps.Keep()
	return v, nil
}

// bring makes a process that has just been started the VM of a spec.
func (v *vm) bring(ctx context.Context, spec vmm.Spec, from string) error {
	if err := v.up(ctx); err != nil {
		return err
	}
	// It has made its socket, and no guest runs yet: from here on nobody can put
	// something else in that socket's place.
	if err := makeDir(place{spec.RunDir}.socketDir(), 0); err != nil {
		return err
	}
	last, limit, want := start(), callTimeout, stateRunning
	if from == "" {
		for _, r := range configure(spec) {
			if err := v.api.call(ctx, callTimeout, r, nil); err != nil {
				return err
			}
		}
	} else {
		last, limit, want = load(spec, v.version), moveLimit(spec.MemMiB), statePaused
	}
	err := v.api.call(ctx, limit, last, nil)
	if refused(err) || ctx.Err() != nil {
		return err
	}
	// Whether it came back or got lost, the answer is in the VM's state.
	now, e := v.api.describe(ctx, callTimeout)
	switch {
	case e != nil && err == nil:
		return e
	case e != nil:
		return err
	case now.State == want:
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("vm is %s, not %s", now.State, want)
}

// up waits until the process answers, and looks at who does.
func (v *vm) up(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout,
		errdefs.Unavailable.Errorf("the VMM did not come up within %s", callTimeout))
	defer cancel()
	tick := time.NewTicker(upPoll)
	defer tick.Stop()
	for {
		now, err := v.api.describe(ctx, callTimeout)
		switch {
		case err == nil && now.ID != v.state.ID:
			return fmt.Errorf("the VMM calls itself %q", now.ID)
		case err == nil && now.State != stateNotStarted:
			return fmt.Errorf("a new vm is %s", now.State)
		case err == nil && now.Version != v.version:
			return errdefs.Unavailable.Errorf("firecracker has become %s, and was %s when the agent started: restart the agent", now.Version, v.version)
		case err == nil || !errors.Is(err, errdefs.Unavailable) || ctx.Err() != nil:
			return err
		}
		select {
		case <-tick.C:
		case <-v.process.Done():
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// refused reports whether an error is Firecracker's own no.
func refused(err error) bool {
	var f *fault
	return errors.As(err, &f)
}

// moveLimit bounds a call that moves the guest's memory.
func moveLimit(memMiB int) time.Duration {
	return callTimeout + perGiB*time.Duration(memMiB)/1024
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	var st state
	if h.Driver != Name {
		return nil, errdefs.InvalidArgument.Errorf("attach: handle of driver %.40q, not of %s", h.Driver, Name)
	}
	if err := json.Unmarshal(h.State, &st); err != nil {
		return nil, errdefs.InvalidArgument.Errorf("attach: malformed handle: %w", err)
	}
	process, err := launch.Adopt(ctx, st.Process)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	v := newVM(process, h.Version, st)
	now, err := v.api.describe(ctx, callTimeout)
	if err == nil && now.ID != st.ID {
		err = errdefs.Unavailable.Errorf("another vm answers: %.80q", now.ID)
	}
	if err == nil {
		return v, nil
	}
	if _, ended := process.EndedBy(err); ended {
		return nil, errdefs.NotFound.Errorf("attach: the vm has exited")
	}
	process.Release()
	return nil, fmt.Errorf("attach: %w", vmm.Cancelled(ctx, err))
}

// state is the driver's part of a handle.
type state struct {
	Process launch.Ref `json:"process"`
	ID      string     `json:"id"`
	Socket  string     `json:"socket"`
	// UID and GID are what the VMM runs as.
	UID   int   `json:"uid"`
	GID   int   `json:"gid"`
	Shape shape `json:"shape"`
}

// vm implements vmm.VM.
type vm struct {
	process *launch.Process
	version string
	state   state
	api     *client
	// writing is held by the one that has a snapshot's directory mounted.
	writing chan struct{}
}

func newVM(p *launch.Process, version string, st state) *vm {
	return &vm{process: p, version: version, state: st, api: newClient(st.Socket), writing: make(chan struct{}, 1)}
}

func (v *vm) Handle() vmm.Handle {
	state, err := json.Marshal(v.state)
	if err != nil {
		panic(err) // strings and numbers always encode
	}
	return vmm.Handle{Driver: Name, Version: v.version, State: state}
}

func (v *vm) Done() <-chan struct{}          { return v.process.Done() }
func (v *vm) Exit() vmm.Exit                 { return v.process.Exit() }
func (v *vm) Kill(ctx context.Context) error { return v.process.Kill(ctx) }

func (v *vm) Pause(ctx context.Context) error {
	return v.change(ctx, "pause", turn("Paused"), statePaused)
}

func (v *vm) Resume(ctx context.Context) error {
	return v.change(ctx, "resume", turn("Resumed"), stateRunning)
}

// change makes a call that brings the VM into the wanted state, or finds it
// there. If the call was refused or its answer is lost, the VM's state decides
// what has happened.
func (v *vm) change(ctx context.Context, what string, r request, want string) error {
	err := v.api.call(ctx, callTimeout, r, nil)
	if err == nil {
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBack)
	defer cancel()
	if now, e := v.api.describe(back, readBack); e == nil && now.State == want {
		return nil
	}
	err = vmm.Cancelled(ctx, err)
	if exit, ok := v.process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("%s vm: its VMM %s", what, exit)
	}
	return fmt.Errorf("%s vm: %w", what, err)
}

// makeDir makes a directory that is open to one user alone, or makes it so.
func makeDir(dir string, uid int) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chown(dir, uid, -1)
}
