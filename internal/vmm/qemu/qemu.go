// Package qemu runs microVMs with QEMU, under KVM or by translation (TCG).
package qemu

import (
	"context"
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

// loadPoll is the time between two questions whether a VM has been restored.
const loadPoll = time.Millisecond

// logPace is the least time between two questions for a VM's state that messages in
// QEMU's log cause.
const logPace = time.Second

// Config says what a Driver works with.
type Config struct {
	// Binary is qemu-system-x86_64's path or its name in PATH; empty for that
	// name.
	Binary string
	// Probe tells whether KVM works. Until it says so, KVM is not used.
	Probe kvm.Probe
	// CPU is what guests see without KVM, one of CPUs; empty for DefaultCPU.
	CPU string
}

// Driver implements vmm.Driver.
type Driver struct {
	cfg     Config
	checked *launch.Memo[vmm.Report]
}

// New returns a driver. It starts nothing yet.
func New(cfg Config) *Driver {
	if cfg.Binary == "" {
		cfg.Binary = "qemu-system-x86_64"
	}
	if cfg.CPU == "" {
		cfg.CPU = DefaultCPU
	}
	return &Driver{cfg: cfg, checked: launch.NewMemo[vmm.Report]()}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Needs implements vmm.Driver.
func (d *Driver) Needs() vmm.Needs { return needs }

var needs = vmm.Needs{
	Kernel: true, Link: vmm.Tap,
	Install: "sudo apt-get install -y --no-install-recommends qemu-system-x86",
}

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	report, err := d.Check(ctx)
	if err != nil {
		return nil, err
	}
	if err := spec.Validate(needs); err != nil {
		return nil, err
	}
	v, err := d.launch(ctx, spec, report, nil)
	if err != nil {
		return nil, fmt.Errorf("start vm: %w", err)
	}
	return v, nil
}

// launch starts QEMU with a valid spec: to boot the VM or, with a snapshot, to
// restore it.
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

	// The socket exists before QEMU does, so there is no wait for it to appear: a
	// connection is accepted once QEMU serves, and breaks if QEMU ends.
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
	m := machine{binary: binary, version: report.Version, accel: report.Accel, cpu: model(report), spec: spec}
	files, want := []*os.File{socket}, statusRunning
	if from != nil {
		m.memory = from.memory()
		files, want = append(files, from.state), statusPaused
	}
	program := launch.ProgramOf(spec)
	program.Args, program.Files = argv(m), files
	program.Private, program.Syscalls = true, calls
	// QEMU maps the memory privately, but opens its file for writing all the same.
	program.ReadOnly = m.memory
	process, err := launch.Start(program)
	if err != nil {
		return nil, err
	}
	steps.Push("kill vmm", process.Kill)
	socket.Close() // QEMU holds the only copy now, so its end breaks connections at once

	v := newVM(process, report, state{
		Process: process.Ref(),
		QMP:     qmpSocket(spec.RunDir),
		Shape:   shapeOf(spec, report),
	})
	steps.Push("close connection", func(context.Context) error { v.line.hangUp(); return nil })
	if err := v.awaitStart(ctx, want); err != nil {
		return nil, process.StartError(err, "qemu")
	}
	if err := process.Started(); err != nil {
		return nil, err
	}
	steps.Keep()
	go v.watch()
	return v, nil
}

// awaitStart waits until a new VM is booting or restored.
func (v *vm) awaitStart(ctx context.Context, want string) error {
	return v.with(ctx, callTimeout, func(m *monitor) error {
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
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	v := &vm{}
	base, err := launch.Attach(ctx, Name, h, &v.state, &v.state.Process)
	if err != nil {
		return nil, err
	}
	v.VM, v.line = base, lineTo(v.state.QMP)
	status, err := v.status(ctx)
	if err != nil {
		v.line.hangUp()
		return nil, v.GiveUp(ctx, err)
	}
	go v.watch()
	if v.endIfFailed(status) {
		return nil, errdefs.NotFound.Errorf("attach: the VMM has failed: vm is %s", status)
	}
	return v, nil
}

// watch ends a VM whose VMM has failed. QEMU keeps such a VM, and writes to its log
// what has happened; so watch asks for the VM's state after each message in the log.
// watch ends with the process, or when that is released, and closes the connection then.
func (v *vm) watch() {
	defer v.line.hangUp()
	for range v.Printed() {
		status, err := v.status(context.Background())
		if err == nil && v.endIfFailed(status) {
			continue // until the process has ended
		}
		// A log that grows without end leads to a question each logPace.
		select {
		case <-time.After(logPace):
		case <-v.Done():
		}
	}
}

// endIfFailed ends the VMM if its VM can never go on, and says whether it did.
func (v *vm) endIfFailed(status string) bool {
	if status != statusInternalError {
		return false
	}
	_ = v.Fail() // a VMM that cannot be killed is found by the next question
	return true
}

// state is the driver's part of a handle.
type state struct {
	Process launch.Ref `json:"process"`
	QMP     string     `json:"qmp"`
	Shape   shape      `json:"shape"`
}

// vm implements vmm.VM.
type vm struct {
	launch.VM
	state state
	line  *line
}

func newVM(p *launch.Process, report vmm.Report, s state) *vm {
	v := &vm{state: s, line: newLine(s.QMP)}
	v.VM = launch.NewVM(p, Name, report.Version, report.CPU, &v.state)
	return v
}

func (v *vm) Pause(ctx context.Context) error {
	return v.change(ctx, "pause", "stop", statusPaused)
}

func (v *vm) Resume(ctx context.Context) error {
	return v.change(ctx, "resume", "cont", statusRunning)
}

// change runs a command that brings the VM into the wanted state.
func (v *vm) change(ctx context.Context, what, command, want string) error {
	return v.Change(ctx, what, func() error {
		return v.with(ctx, callTimeout, func(m *monitor) error {
			done, err := m.send(command, nil, nil)
			if err != nil {
				return err
			}
			after, err := m.send(queryStatus, nil, nil)
			if err != nil {
				return err
			}
			if err := m.receive(command, done, nil); err != nil {
				return err
			}
			status, err := m.receiveStatus(after)
			if err == nil && !is(status, want) {
				err = errdefs.WrongState.Errorf("vm is %s", status)
			}
			return err
		})
	}, func(ctx context.Context) bool {
		status, err := v.status(ctx)
		return err == nil && is(status, want)
	})
}

func (v *vm) status(ctx context.Context) (status string, err error) {
	err = v.with(ctx, callTimeout, func(m *monitor) error {
		status, err = m.status()
		return err
	})
	return status, err
}

// is says whether a VM with that status is in the wanted state. A VM that QEMU
// stopped because of an I/O error counts as paused, and stays so until it is
// resumed. It counts as running too: QEMU may stop it again as soon as it runs.
func is(status, want string) bool {
	return status == want || status == statusIOError
}

// Stalled implements vmm.Staller.
func (v *vm) Stalled(ctx context.Context) (why, err error) {
	err = v.with(ctx, callTimeout, func(m *monitor) error {
		status, err := m.status()
		if err == nil && v.endIfFailed(status) {
			return errdefs.Unavailable.Errorf("the VMM has failed: vm is %s", status)
		}
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

// with runs f on the connection to QEMU, which nothing else uses until f returns. ctx and limit
// bound the wait for it and f.
func (v *vm) with(ctx context.Context, limit time.Duration, f func(*monitor) error) error {
	return v.line.with(ctx, limit, f)
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
