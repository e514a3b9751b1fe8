// Package gvisor runs guests with gVisor's sentry: a kernel in user space, which runs
// their programs on the host's CPU without KVM.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// Name is the driver's name in handles and settings.
const Name = "gvisor"

// Config says what a Driver works with.
type Config struct {
	// Sentry is the path of the program bin/sentry.
	Sentry string
	// Dir is an existing directory with a path of at most 40 bytes, in which the
	// probe guest of a check has its files for a moment; empty for /run.
	Dir string
	// UID and GID are what the probe's sentry runs as. They are no root's, as those of
	// sandboxes.
	UID, GID int
}

// Driver implements vmm.Driver.
type Driver struct {
	cfg Config

	mu      sync.Mutex
	program os.FileInfo // what checked is about
	checked *launch.Memo[facts]
}

// New returns a driver. It starts nothing yet.
func New(cfg Config) *Driver {
	if cfg.Dir == "" {
		cfg.Dir = "/run"
	}
	return &Driver{cfg: cfg}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Needs implements vmm.Driver.
func (d *Driver) Needs() vmm.Needs { return needs }

var needs = vmm.Needs{
	Init: true, Flat: true, Link: vmm.Packet,
	Install: "make build # bin/sentry belongs beside wrenn",
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
	v, err := d.boot(ctx, spec, f)
	if err != nil {
		return nil, fmt.Errorf("start vm: %w", err)
	}
	return v, nil
}

// boot starts a sentry with a valid spec, and its guest.
func (d *Driver) boot(ctx context.Context, spec vmm.Spec, f facts) (_ *vm, err error) {
	size, err := diskBytes(spec)
	if err != nil {
		return nil, err
	}
	return d.launch(ctx, machine{spec, size}, f, "", func(v *vm) error {
		if err := v.call(ctx, callTimeout, methodStart, spec.ID, nil); err != nil {
			return err
		}
		return v.write(running)
	})
}

// diskBytes is the length of a spec's overlay. The sentry makes the file empty.
func diskBytes(spec vmm.Spec) (int64, error) {
	if spec.Root.Overlay == "" {
		return 0, nil
	}
	info, err := os.Stat(spec.Root.Overlay)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// launch starts a sentry with a valid spec, and lets begin bring its guest to life. from
// is the directory of the snapshot that the VM begins with, empty for none.
func (d *Driver) launch(ctx context.Context, m machine, f facts, from string, begin func(*vm) error) (_ *vm, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(vmm.Cancelled(ctx, err), steps.Unwind(ctx))
		}
	}()
	control := filepath.Join(m.spec.RunDir, controlName)
	steps.Push("remove control socket", func(context.Context) error { return remove(control) })
	steps.Push("remove state", func(context.Context) error { return remove(statePath(control)) })
	if err := os.WriteFile(statePath(control), []byte{byte(created)}, 0o600); err != nil {
		return nil, err
	}
	up, files, err := open(m, control)
	defer func() { closeAll(files) }()
	if err != nil {
		return nil, err
	}
	defer up.Close()
	program := launch.ProgramOf(m.spec)
	program.Args, program.Files, program.Stdouts = argv(m, d.cfg.Sentry), files, stdouts
	program.UserNS, program.NetNS, program.UID, program.GID = true, "", m.spec.UID, m.spec.GID
	program.MaxFile = maxFile(m)
	process, err := launch.Start(program)
	if err != nil {
		return nil, err
	}
	steps.Push("kill vmm", process.Kill)
	closeAll(files) // the sentry holds the only copies now, so its end shows at once

	v := newVM(process, f.report, state{Process: process.Ref(), Control: control, ID: m.spec.ID, From: from, Shape: shapeOf(m, f)})
	err = awaitUp(ctx, up)
	if err == nil {
		err = v.setNetwork(ctx, m.spec)
	}
	if err == nil {
		err = begin(v)
	}
	if err != nil {
		return nil, process.StartError(err, "sentry")
	}
	steps.Keep()
	return v, nil
}

// open opens what the sentry of a machine inherits, in the order of the descriptors in
// argv, and the pipe by which it says that it serves. The socket exists before the
// sentry does, so there is no wait for it to appear.
func open(m machine, control string) (up *os.File, files []*os.File, err error) {
	up, say, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	files = append(files, say)
	for _, open := range []func() (*os.File, error){
		func() (*os.File, error) { return listen(control) },
		func() (*os.File, error) { return specFile(m) },
		func() (*os.File, error) { return os.Open(os.DevNull) },
		func() (*os.File, error) { return os.Open(m.spec.Init) },
		func() (*os.File, error) { return openIf(m.layer(), os.O_RDONLY) },
		func() (*os.File, error) { return openIf(m.spec.Root.Overlay, os.O_RDWR) },
	} {
		f, err := open()
		if err != nil {
			return nil, files, errors.Join(err, up.Close())
		}
		if f != nil {
			files = append(files, f)
		}
	}
	return up, files, nil
}

func openIf(path string, flag int) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	return os.OpenFile(path, flag, 0)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// maxFile is the largest file that a machine's sentry has to write. Its memory and its
// overlay grow by a GiB at a time and may have gaps; a snapshot has both in one file.
func maxFile(m machine) int64 {
	return 2*(int64(m.spec.MemMiB)<<20+m.diskBytes) + 4<<30
}

// awaitUp waits until a new sentry serves its control socket.
func awaitUp(ctx context.Context, up *os.File) error {
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout, errdefs.Unavailable.Errorf("the VMM did not start within %s", callTimeout))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { up.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := up.Read(make([]byte, 1))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF):
		return errdefs.Unavailable.Errorf("the VMM has ended")
	}
	return err
}

// setNetwork gives the guest its loopback and its eth0.
func (v *vm) setNetwork(ctx context.Context, s vmm.Spec) error {
	var socket []*os.File
	mtu := 0
	if s.Link != nil {
		f, n, err := openPacket(s.NetNS, s.Link.Name)
		if err != nil {
			return err
		}
		defer f.Close()
		socket, mtu = []*os.File{f}, n
	}
	args, err := network(s, mtu)
	if err != nil {
		return err
	}
	return v.call(ctx, callTimeout, methodSetNetwork, args, nil, socket...)
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	v := &vm{}
	base, err := launch.Attach(ctx, Name, h, &v.state, &v.state.Process)
	if err != nil {
		return nil, err
	}
	v.VM = base
	if err := v.call(ctx, callTimeout, methodState, v.state.ID, nil); err != nil {
		return nil, v.GiveUp(ctx, err)
	}
	return v, nil
}

// state is the driver's part of a handle.
type state struct {
	Process launch.Ref `json:"process"`
	// Control is the path of the control socket.
	Control string `json:"control"`
	// ID is what the sentry calls its guest.
	ID string `json:"id"`
	// From is the directory of the snapshot that the VM begins with.
	From  string `json:"from,omitempty"`
	Shape shape  `json:"shape"`
}

// vm implements vmm.VM.
type vm struct {
	launch.VM
	state state
}

func newVM(p *launch.Process, report vmm.Report, s state) *vm {
	v := &vm{state: s}
	v.VM = launch.NewVM(p, Name, report.Version, report.CPU, &v.state)
	return v
}

func (v *vm) call(ctx context.Context, limit time.Duration, method string, arg, result any, files ...*os.File) error {
	return call(ctx, v.state.Control, limit, method, arg, result, files...)
}

func (v *vm) Pause(ctx context.Context) error { return v.change(ctx, "pause", v.pause) }

func (v *vm) Resume(ctx context.Context) error { return v.change(ctx, "resume", v.resume) }

// change makes a change to the VM's state, alone.
func (v *vm) change(ctx context.Context, what string, change func(context.Context) error) error {
	err := v.alone(ctx, func() error { return change(ctx) })
	if err == nil {
		return nil
	}
	err = vmm.Cancelled(ctx, err)
	if exit, ended := v.EndedBy(err); ended {
		return errdefs.Unavailable.Errorf("%s vm: its VMM %s", what, exit)
	}
	return fmt.Errorf("%s vm: %w", what, err)
}
