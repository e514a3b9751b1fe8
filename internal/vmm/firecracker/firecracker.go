// Package firecracker runs microVMs with Firecracker, under KVM.
package firecracker

import (
	"context"
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
	// upPoll is the time between two attempts to reach a new process.
	upPoll = time.Millisecond
)

// Config says what a Driver works with.
type Config struct {
	// Binary is firecracker's path or its name in PATH; empty for that name.
	Binary string
	// Jailer is the path or name of the jailer of the same release. Empty means
	// the jailer in PATH, or none if there is none; "none" means none.
	Jailer string
	// Probe tells whether KVM works.
	Probe kvm.Probe
}

// Driver implements vmm.Driver.
type Driver struct {
	cfg Config
	// kvm is cfg.Probe.KVM, or what a test puts in its place.
	kvm     func(ctx context.Context, name, version string, start func(context.Context, vmm.Spec) (vmm.VM, error)) (kvm.Verdict, error)
	checked *launch.Memo[found]
}

// New returns a driver. It starts nothing yet.
func New(cfg Config) *Driver {
	if cfg.Binary == "" {
		cfg.Binary = "firecracker"
	}
	return &Driver{cfg: cfg, kvm: cfg.Probe.KVM, checked: launch.NewMemo[found]()}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Needs implements vmm.Driver.
func (d *Driver) Needs() vmm.Needs { return needs }

var needs = vmm.Needs{
	Kernel: true, KVM: true, Link: vmm.Tap,
	Install: "sudo install firecracker jailer /usr/local/bin/ # both come with a Firecracker release; it needs KVM",
}

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

// validate says whether Firecracker can take the spec. Firecracker's description
// refuses odd numbers of vCPUs. It takes some as long as no hyperthreads are asked
// for, but does not promise that.
func validate(s vmm.Spec) error {
	if err := s.Validate(needs); err != nil {
		return err
	}
	if s.VCPUs > maxVCPUs || s.VCPUs > 1 && s.VCPUs%2 != 0 {
		return errdefs.InvalidArgument.Errorf("%d vCPUs: firecracker runs 1 or an even number, at most %d", s.VCPUs, maxVCPUs)
	}
	return nil
}

// launch starts Firecracker with a valid spec: to boot the VM or, with the
// directory of a snapshot that fits, to restore it.
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
	// Firecracker takes a socket that exists already for another process's.
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
	if err := v.bring(ctx, spec, from); err != nil {
		return nil, process.StartError(err, "firecracker")
	}
	steps.Keep()
	return v, nil
}

// bring makes a new process the VM of a spec.
func (v *vm) bring(ctx context.Context, spec vmm.Spec, from string) error {
	if err := v.up(ctx); err != nil {
		return err
	}
	// Firecracker has made its socket, and no guest runs yet. From here on only
	// root can replace the socket.
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
		last, limit, want = load(spec, v.Version), moveLimit(spec.MemMiB), statePaused
	}
	err := v.api.call(ctx, limit, last, nil)
	if refused(err) || ctx.Err() != nil {
		return err
	}
	// If the answer was lost, the VM's state tells what it was.
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

// up waits until the process answers, and checks that it is the right one.
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
		case err == nil && now.Version != v.Version:
			return errdefs.Unavailable.Errorf("firecracker has become %s, and was %s when the agent started: restart the agent", now.Version, v.Version)
		case err == nil || !errors.Is(err, errdefs.Unavailable) || ctx.Err() != nil:
			return err
		}
		select {
		case <-tick.C:
		case <-v.Process.Done():
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// refused says whether an error is Firecracker's refusal.
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
	base, err := launch.Attach(ctx, Name, h, &st, &st.Process)
	if err != nil {
		return nil, err
	}
	v := newVM(base.Process, h.Version, st)
	now, err := v.api.describe(ctx, callTimeout)
	if err == nil && now.ID != st.ID {
		err = errdefs.Unavailable.Errorf("another vm answers: %.80q", now.ID)
	}
	if err != nil {
		return nil, v.GiveUp(ctx, err)
	}
	return v, nil
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
	launch.VM
	state state
	api   *client
	// writing holds a value while a snapshot's directory is mounted.
	writing chan struct{}
}

func newVM(p *launch.Process, version string, st state) *vm {
	v := &vm{state: st, api: newClient(st.Socket), writing: make(chan struct{}, 1)}
	v.VM = launch.NewVM(p, Name, version, vmm.HostCPU, &v.state)
	return v
}

func (v *vm) Pause(ctx context.Context) error {
	return v.change(ctx, "pause", turn("Paused"), statePaused)
}

func (v *vm) Resume(ctx context.Context) error {
	return v.change(ctx, "resume", turn("Resumed"), stateRunning)
}

// change makes a call that brings the VM into the wanted state.
func (v *vm) change(ctx context.Context, what string, r request, want string) error {
	return v.Change(ctx, what,
		func() error { return v.api.call(ctx, callTimeout, r, nil) },
		func(ctx context.Context) bool {
			now, err := v.api.describe(ctx, callTimeout)
			return err == nil && now.State == want
		})
}

// makeDir makes a directory that only one user can use; an existing directory is
// given to that user.
func makeDir(dir string, uid int) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chown(dir, uid, -1)
}
