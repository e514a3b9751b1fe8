// Package vmm is the contract of drivers: the programs that run sandboxes.
//
// A driver runs a VM and nothing else. The files of the disks, the network
// namespace and the directories exist before the VM starts, and outlive it.
package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"time"
)

// Driver runs VMs with one kind of VMM. It is safe for concurrent use. A method
// of a driver or of its VMs that fails after its ctx has ended returns
// context.Cause(ctx), not what the VMM made of the cancellation.
type Driver interface {
	// Name is the driver's name in handles and settings: "qemu", "firecracker".
	Name() string

	// Needs says what the driver takes of a host and of a Spec. It never changes.
	Needs() Needs

	// Check says whether VMs can be run on this host, and how. The first call
	// may boot a probe guest; later calls answer from a cache, which lasts as
	// long as the host's kernel and the VMM stay the same.
	Check(ctx context.Context) (Report, error)

	// Start boots a VM and returns it running, when the guest's kernel has begun
	// to boot. ctx bounds the call only: the VM runs in a session
	// of its own until it exits or is killed, also when ctx or the calling
	// process ends. After an error nothing of the VM is left.
	Start(ctx context.Context, spec Spec) (VM, error)

	// Attach finds a VM that an earlier process started. The error is
	// errdefs.NotFound if the VM has exited, and errdefs.Unavailable if it runs
	// but does not answer.
	Attach(ctx context.Context, h Handle) (VM, error)
}

// VM is one VMM process with its guest. It is safe for concurrent use. Snapshotter
// and Staller are abilities that a VM need not have.
type VM interface {
	// Handle is what Attach needs. It is stored in the sandbox's record.
	Handle() Handle

	// Pause stops the vCPUs; memory stays. Pausing a paused VM is no error.
	Pause(ctx context.Context) error

	// Resume lets the vCPUs run. Resuming a running VM is no error.
	Resume(ctx context.Context) error

	// Kill ends the VM and returns when its processes are gone. Killing a VM
	// that has ended is no error.
	Kill(ctx context.Context) error

	// Done is closed when the VMM has exited.
	Done() <-chan struct{}

	// Exit says how the VMM ended. It is valid once Done is closed.
	Exit() Exit
}

// Snapshotter is a VM that can be written to disk.
type Snapshotter interface {
	// Snapshot writes memory and device state into dir, an existing directory
	// for this snapshot alone; the caller copies the disks in the meantime. The
	// VM must be paused, else the error is errdefs.WrongState. It stays paused,
	// and may be resumed. If dir holds a snapshot already the error is
	// errdefs.AlreadyExists; after other errors nothing of the snapshot is left
	// in dir. Snapshot does not flush the files to stable storage; the caller
	// that publishes dir does.
	Snapshot(ctx context.Context, dir string) error
}

// Staller is a VM that its VMM stops when the host does not take what the guest
// writes to its disks. No write is lost: Resume tries it again, and Pause keeps
// it for a later Resume and for a snapshot. A driver without this ability tells
// the guest of an I/O error instead.
type Staller interface {
	// Stalled says why the VMM has stopped the VM, and is nil if it has not:
	// errdefs.Exhausted if the host's disk is full, another error otherwise.
	// With an err the VM could not be asked. A VM that can never go on, because
	// its VMM has failed, is no stalled one: the driver ends it.
	Stalled(ctx context.Context) (why, err error)
}

// Restorer is a Driver that can start a VM from a snapshot.
type Restorer interface {
	// Restore is Start from a snapshot that a VM of the same driver wrote into
	// dir; the VM comes back paused. Its disks hold what the other VM's held
	// then. The spec must have the shape of that VM's, else the error is
	// errdefs.InvalidArgument.
	//
	// The VM maps the snapshot's memory privately, so dir must not change while
	// the VM lives. The VMM cannot change dir either.
	//
	// A snapshot that is incomplete or damaged is errdefs.Corrupt, as far as
	// that shows without a read of all its memory. A snapshot of another version
	// of the VMM is errdefs.Unsupported.
	Restore(ctx context.Context, spec Spec, dir string) (VM, error)

	// SnapshotKey identifies what a snapshot of the spec's VM depends on, except
	// the contents of the files and the boot facts that the spec names: the VMM
	// and its version, the acceleration, the CPU, the machine and its devices. A
	// VM cannot be restored from a snapshot with another key.
	SnapshotKey(ctx context.Context, spec Spec) (string, error)
}

// Handle is enough to find a VM again after a restart of the agent.
type Handle struct {
	Driver string `json:"driver"`
	// Version of the VMM that runs the VM.
	Version string `json:"version"`
	// CPU is what the guest sees, as in Report; empty if an earlier agent started
	// the VM.
	CPU string `json:"cpu,omitempty"`
	// State is the driver's own: pid, start time, sockets.
	State json.RawMessage `json:"state"`
}

// Cancelled returns context.Cause(ctx) in place of an error that came of the end
// of ctx, and other errors unchanged. So the caller learns that it was the
// cancellation, and not what the VMM made of it.
func Cancelled(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	// A connection may see the deadline a moment before its context does.
	if at, ok := ctx.Deadline(); ok && errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(at) {
		<-ctx.Done()
	}
	if ctx.Err() == nil || errors.Is(err, context.Cause(ctx)) {
		return err
	}
	return context.Cause(ctx)
}
