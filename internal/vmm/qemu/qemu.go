// Package qemu runs microVMs with QEMU, under KVM or by translation (TCG).
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// Name is the driver's name in handles and settings.
const Name = "qemu"

// loadPoll is how often a VM that is being restored is asked whether it is.
const loadPoll = time.Millisecond

// readBack bounds the question for a VM's state after an answer went missing.
const readBack = 2 * time.Second

// Config says what a Driver works with.
type Config struct {
	// Binary is qemu-system-x86_64's path or its name in PATH; empty for that
	// name.
	Binary string
	// Probe tells whether KVM works. As long as it cannot, KVM is not used.
	Probe kvm.Probe
}

// Driver implements vmm.Driver.
type Driver struct {
	cfg Config

	checking chan struct{} // held by the one that probes
	checked  *vmm.Report   // guarded by checking
}

// New returns a driver; it does nothing yet.
func New(cfg Config) *Driver {
	if cfg.Binary == "" {
		cfg.Binary = "qemu-system-x86_64"
	}
	return &Driver{cfg: cfg, checking: make(chan struct{}, 1)}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	report, err := d.Check(ctx)
	if err != nil {
		return nil, err
	}
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	v, err := d.launch(ctx, spec, report, nil)
	if err != nil {
		return nil, fmt.Errorf("start vm: %w", err)
	}
	return v, nil
}

// launch starts QEMU with a valid spec, to boot it or, with a snapshot, to go on
// where that stopped.
func (d *Driver) launch(ctx context.Context, spec vmm.Spec, report vmm.Report, from *snapshot) (_ *vm, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	binary, err := d.binary()
	if err != nil {
		return nil, err
	}
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(vmm.Cancelled(ctx, err), steps.Unwind(ctx))
		}
	}()

	// The socket is there before QEMU is, so nobody has to wait for it to
	// appear: a connection is accepted when QEMU serves, and breaks if it dies.
	socket, err := listen(qmpSocket(spec.RunDir))
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	steps.Push("remove control socket", func(context.Context) error { return remove(qmpSocket(spec.RunDir)) })

	if err := os.Mkdir(jail(spec.RunDir), 0o555); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	steps.Push("remove jail", func(context.Context) error { return remove(jail(spec.RunDir)) })
	m := machine{binary: binary, version: report.Version, accel: report.Accel, spec: spec}
	files, want := []*os.File{socket}, statusRunning
	if from != nil {
		m.memory = from.memory()
		files, want = append(files, from.state), statusPaused
	}
	process, err := launch.Start(launch.Program{
		Args:    argv(m),
		Files:   files,
		NetNS:   spec.NetNS,
		RunDir:  spec.RunDir,
		Log:     vmmLog(spec.RunDir),
		Console: spec.Console,
		Cgroup:  spec.Cgroup,
		Limits:  spec.Limits,

		Private:  true,
		Syscalls: calls,
		MaxFile:  spec.MaxFile(),
		// It maps the memory privately, but opens it for writing all the
		// same.
		ReadOnly: m.memory,
	})
	if err != nil {
		return nil, err
	}
	steps.Push("kill vmm", process.Kill)
	socket.Close() // with QEMU's copy alone open, its death is seen at once

	v := &vm{process: process, version: report.Version, state: state{
		Process: process.Ref(),
		QMP:     qmpSocket(spec.RunDir),
		Shape:   shapeOf(spec, report),
	}}
	err = v.with(ctx, callTimeout, func(m *monitor) error {
		status, err := m.status()
		for ; err == nil && status == statusInMigrate; status, err = m.status() {
			if err := sleep(ctx, loadPoll); err != nil {
				return err
			}
		}
		if err == nil && status != want {
			err = fmt.Errorf("vm is %s", status)
		}
		return err
	})
	exit, ended := v.process.EndedBy(err)
	switch {
	case ended && exit.Signal != 0: // somebody killed it: its own words are empty
		return nil, errdefs.Unavailable.Errorf("the vmm %s while it started", exit)
	case ended:
		// Unclassed: QEMU's own words name the host's files.
		return nil, fmt.Errorf("qemu %s: %s", exit, exit.Detail)
	case err != nil:
		return nil, err
	}
	if err := process.Started(); err != nil {
		return nil, err
	}
	steps.Keep()
	return v, nil
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	v := &vm{version: h.Version}
	if h.Driver != Name {
		return nil, errdefs.InvalidArgument.Errorf("attach: handle of driver %.40q, not of %s", h.Driver, Name)
	}
	if err := json.Unmarshal(h.State, &v.state); err != nil {
		return nil, errdefs.InvalidArgument.Errorf("attach: malformed handle: %w", err)
	}
	process, err := launch.Adopt(ctx, v.state.Process)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	v.process = process
	if _, err := v.status(ctx); err != nil {
		if _, ended := process.EndedBy(err); ended {
			return nil, errdefs.NotFound.Errorf("attach: the vm has exited")
		}
		process.Release()
		return nil, fmt.Errorf("attach: %w", vmm.Cancelled(ctx, err))
	}
	return v, nil
}

// state is the driver's part of a handle.
type state struct {
	Process launch.Ref `json:"process"`
	QMP     string     `json:"qmp"`
	Shape   shape      `json:"shape"`
}

// vm implements vmm.VM.
type vm struct {
	process *launch.Process
	version string
	state   state
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
	return v.change(ctx, "pause", "stop", statusPaused)
}

func (v *vm) Resume(ctx context.Context) error {
	return v.change(ctx, "resume", "cont", statusRunning)
}

// change runs a command that brings the VM into the wanted state, or finds it
// there. If the answer is lost, the VM's state decides what has happened.
func (v *vm) change(ctx context.Context, what, command, want string) error {
	err := v.with(ctx, callTimeout, func(m *monitor) error {
		if err := m.call(command, nil, nil); err != nil {
			return err
		}
		status, err := m.status()
		if err == nil && !is(status, want) {
			err = errdefs.WrongState.Errorf("vm is %s", status)
		}
		return err
	})
	if err == nil {
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBack)
	defer cancel()
	if status, e := v.status(back); e == nil && is(status, want) {
		return nil
	}
	err = vmm.Cancelled(ctx, err)
	if exit, ok := v.process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("%s vm: its VMM %s", what, exit)
	}
	return fmt.Errorf("%s vm: %w", what, err)
}

func (v *vm) status(ctx context.Context) (status string, err error) {
	err = v.with(ctx, callTimeout, func(m *monitor) error {
		status, err = m.status()
		return err
	})
	return status, err
}

// is reports whether a VM is in the wanted state. One that QEMU stopped is as good
// as paused, and stays so until it is resumed; one that it stopped again as soon as
// it was resumed has been resumed.
func is(status, want string) bool {
	return status == want || status == statusIOError
}

// Stalled implements vmm.Staller.
func (v *vm) Stalled(ctx context.Context) (why, err error) {
	err = v.with(ctx, callTimeout, func(m *monitor) error {
		status, err := m.status()
		if err != nil || status != statusIOError {
			return err
		}
		var disks []struct {
			IOStatus string `json:"io-status"`
		}
		if err := m.call("query-block", nil, &disks); err != nil {
			return err
		}
		why = errdefs.Unavailable.Errorf("the host cannot write the disk")
		for _, d := range disks {
			if d.IOStatus == "nospace" {
				why = errdefs.Exhausted.Errorf("the host's disk is full")
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("ask vm: %w", err)
	}
	return why, nil
}

// with runs f on a connection of its own, and nobody else's meanwhile.
func (v *vm) with(ctx context.Context, limit time.Duration, f func(*monitor) error) error {
	m, err := dial(ctx, v.state.QMP, limit)
	if err != nil {
		return err
	}
	defer m.close()
	return f(m)
}

// sleep waits for d or for ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// listen makes the control socket and returns it as a file that QEMU inherits.
func listen(path string) (*os.File, error) {
	if err := remove(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
