package launch

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// readBack bounds the question for a VM's state after a call to it has failed.
const readBack = 2 * time.Second

// VM is what the VMs of all drivers that start a VMM have in common. Drivers embed
// it in their own.
type VM struct {
	*Process
	// Version of the VMM.
	Version string
	// CPU is what the guest sees.
	CPU string

	driver string
	state  any
}

// NewVM returns the VM of a process, whose guest sees that CPU. state is the driver's part of the handle; it
// names the process too.
func NewVM(p *Process, driver, version, cpu string, state any) VM {
	return VM{Process: p, Version: version, CPU: cpu, driver: driver, state: state}
}

// Attach adopts the process of a handle, and reads the driver's state from it.
// process is the part of state that identifies the process. Attach does not ask
// whether the VMM answers: the driver does, and passes the error to GiveUp.
func Attach(ctx context.Context, driver string, h vmm.Handle, state any, process *Ref) (VM, error) {
	if h.Driver != driver {
		return VM{}, errdefs.InvalidArgument.Errorf("attach: handle of driver %.40q, not of %s", h.Driver, driver)
	}
	if err := json.Unmarshal(h.State, state); err != nil {
		return VM{}, errdefs.InvalidArgument.Errorf("attach: malformed handle: %w", err)
	}
	p, err := Adopt(ctx, *process)
	if err != nil {
		return VM{}, fmt.Errorf("attach: %w", err)
	}
	return NewVM(p, driver, h.Version, h.CPU, state), nil
}

// GiveUp ends an attachment because the VMM failed to answer with err, and says
// what that means: errdefs.NotFound if the VMM has exited.
func (v VM) GiveUp(ctx context.Context, err error) error {
	if _, ended := v.EndedBy(err); ended {
		return errdefs.NotFound.Errorf("attach: the vm has exited")
	}
	v.Release()
	return fmt.Errorf("attach: %w", vmm.Cancelled(ctx, err))
}

// Handle implements vmm.VM.
func (v VM) Handle() vmm.Handle {
	state, err := json.Marshal(v.state)
	if err != nil {
		panic(err) // strings and numbers always encode
	}
	return vmm.Handle{Driver: v.driver, Version: v.Version, CPU: v.CPU, State: state}
}

// Change brings the VM into a state by a call to the VMM; what names the call. If
// the call was refused or its answer is lost, reached says whether the VM is in
// that state all the same.
func (v VM) Change(ctx context.Context, what string, call func() error, reached func(context.Context) bool) error {
	err := call()
	if err == nil {
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBack)
	defer cancel()
	if reached(back) {
		return nil
	}
	err = vmm.Cancelled(ctx, err)
	if exit, ended := v.EndedBy(err); ended {
		return errdefs.Unavailable.Errorf("%s vm: its VMM %s", what, exit)
	}
	return fmt.Errorf("%s vm: %w", what, err)
}

// StartError says why a VMM did not start, when a call to it failed with err.
func (p *Process) StartError(err error, program string) error {
	exit, ended := p.EndedBy(err)
	switch {
	case ended && exit.Signal != 0: // something killed it, so its log says nothing
		return errdefs.Unavailable.Errorf("the vmm %s while it started", exit)
	case ended:
		// This error has no class: the VMM's log may name files of the host, and
		// the text of a classed error reaches clients.
		return fmt.Errorf("%s %s: %s", program, exit, exit.Detail)
	}
	return err
}
