// Package vmm is the boundary to the programs that run microVMs.
//
// A driver runs a VM and nothing else: disks, network and guest exist before
// it starts and outlive its death.
package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
)

// Driver runs microVMs with one kind of VMM. Safe for concurrent use. Each method
// of it and of its VMs that fails with its ctx done says context.Cause of that,
// whatever else it saw.
type Driver interface {
	// Name is the driver's name in handles and settings: "qemu", "firecracker".
	Name() string

	// Check says whether VMs can be run here, and how. It may boot a probe
	// guest the first time; later calls answer from a cache that lasts as
	// long as the host's kernel and the VMM stay the same.
	Check(ctx context.Context) (Report, error)

	// Start boots a VM and returns it running; the guest's kernel has then
	// begun to boot, no more. ctx bounds the call only: the VM lives in a
	// session of its own until it exits or is killed, whatever becomes of
	// ctx and of the calling process. On error nothing is left.
	Start(ctx context.Context, spec Spec) (VM, error)

	// Attach takes up a VM that an earlier process started. A VM that has
	// exited meanwhile is errdefs.NotFound; one that runs but does not
	// answer is errdefs.Unavailable.
	Attach(ctx context.Context, h Handle) (VM, error)
}

// VM is one VMM process with its guest. Safe for concurrent use. What a type
// does not implement it does not support; optional abilities are interfaces
// of their own.
type VM interface {
	// Handle is what Attach needs, to be stored in the record.
	Handle() Handle

	// Pause stops the vCPUs; memory stays. Pausing a paused VM is no error.
	Pause(ctx context.Context) error

	// Resume lets the vCPUs run. Resuming a running VM is no error.
	Resume(ctx context.Context) error

	// Kill ends the VM and returns when its processes are gone. Killing a VM
	// that is gone is no error.
	Kill(ctx context.Context) error

	// Done is closed when the VMM has exited, for whatever reason.
	Done() <-chan struct{}

	// Exit says how the VMM ended; valid once Done is closed.
	Exit() Exit
}

// Cancelled returns why ctx is done, if it is, in place of an error that came of
// that. So what was cancelled says so, and not what the VMM made of it.
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

// Snapshotter is a VM that can be written to disk.
type Snapshotter interface {
	// Snapshot writes memory and device state into dir, an existing directory
	// for this snapshot alone; the disks are the caller's to copy meanwhile.
	// Only a paused VM can be written, others are errdefs.WrongState; it stays
	// paused, and may be resumed. A dir that holds a snapshot already is
	// errdefs.AlreadyExists; on other errors nothing of it is left there. The
	// files are not flushed to stable storage: whoever publishes the directory
	// does that.
	Snapshot(ctx context.Context, dir string) error
}

// Staller is a VM that its VMM stops by itself when the host takes no more of
// what the guest writes to its disks. No write is lost: Resume tries it again, and
// Pause keeps it for a later Resume and for a snapshot. A driver without it tells
// the guest of an I/O error instead.
type Staller interface {
	// Stalled says why the VM stands still although nobody paused it, nil if it
	// does not: errdefs.Exhausted if the host's disk is full, another error if
	// it failed to write otherwise. An err means that it could not be asked.
	Stalled(ctx context.Context) (why, err error)
}

// Restorer is a Driver that can start a VM from a snapshot.
type Restorer interface {
	// Restore is Start from a snapshot that a VM of the same driver wrote into
	// dir; the VM comes back paused. The spec has the shape of that VM's
	// (errdefs.InvalidArgument else), its disks hold what they held then. The
	// memory file is mapped privately by every VM restored from it, so dir
	// must not change while one lives; no VMM can change it, either. A snapshot that is incomplete or
	// damaged, as far as that can be seen without reading all of its memory,
	// is errdefs.Corrupt; one of another version of the VMM is
	// errdefs.Unsupported.
	Restore(ctx context.Context, spec Spec, dir string) (VM, error)

	// SnapshotKey identifies what a snapshot of the spec's VM depends on
	// besides the files that the spec names: the VMM and its version, the
	// acceleration, the CPU, the machine and its devices. Snapshots with
	// different keys cannot be restored from each other's specs.
	SnapshotKey(ctx context.Context, spec Spec) (string, error)
}

// Spec describes a VM. It is plain data; everything that it names exists
// already, but for the console file, which Start makes.
type Spec struct {
	// ID names the VM in the process list and the driver's sockets.
	ID string
	// RunDir is the directory, made by the caller, for the driver's sockets
	// and other short-lived files. Start may write there, nobody else does;
	// the caller removes it after Kill. At most 64 bytes long, because a
	// socket's path has only 108.
	RunDir string
	// NetNS is the path of the network namespace that the VMM lives in; empty
	// for a VM without network.
	NetNS string

	VCPUs  int
	MemMiB int

	// Kernel is an uncompressed vmlinux.
	Kernel string
	Initrd string
	// Cmdline is the guest's part of the kernel command line; the driver adds
	// what its machine needs (console, reboot).
	Cmdline string

	// Disks appear in the guest as vda, vdb, … in this order.
	Disks []Disk
	// NIC is the guest's eth0; nil for none.
	NIC *NIC

	// Console is the file that receives the guest's serial console, bounded
	// by MaxConsoleBytes.
	Console string

	// UID and GID are what the VMM runs as; zero means root. The files that the
	// spec names are root's and stay so: it is the driver's business that the
	// VMM can use them, and nothing else.
	UID, GID int

	// Cgroup is the sandbox's own cgroup, relative to each hierarchy's root;
	// empty for none. The launcher makes it, sets Limits, and removes it
	// when the VM is gone.
	Cgroup string
	Limits Limits
}

// Disk is one virtio block device, backed by a raw file.
type Disk struct {
	Path     string
	ReadOnly bool
}

// NIC is one virtio network device on a tap that exists in Spec.NetNS and belongs
// to Spec.UID.
type NIC struct {
	Tap string
	MAC string
}

// Limits bound what a VM takes of its host: the first three its VMM's cgroup,
// the others the driver. Zero means no limit.
type Limits struct {
	// CPUMilli is thousandths of a host CPU.
	CPUMilli int
	MemMiB   int
	PIDs     int
	// DiskBytes and DiskOps are what may be read from and written to the VM's
	// disks in a second. (A cgroup cannot bound that everywhere: with version 1
	// what is written goes through the host's cache, and is nobody's there.)
	DiskBytes, DiskOps int64
}

// Handle is enough to find a VM again after a restart of the agent.
type Handle struct {
	Driver string `json:"driver"`
	// Version of the VMM that runs the VM.
	Version string `json:"version"`
	// State is the driver's own: pid, start time, sockets.
	State json.RawMessage `json:"state"`
}

// Cause is what ended a VM. The set is closed.
type Cause string

const (
	// Unknown: neither the guest nor the VMM said anything.
	Unknown         Cause = ""
	GuestPoweredOff Cause = "the guest powered off"
	GuestRebooted   Cause = "the guest rebooted"
	GuestPanicked   Cause = "the guest panicked"
	// VMMFailed: the VMM gave up, with an error in its log or its exit status.
	VMMFailed Cause = "the VMM failed"
	// Killed: a signal ended the VMM.
	Killed Cause = "the VMM was killed"
	// OutOfMemory: the host's kernel killed the VMM, which needed more memory
	// than its cgroup has.
	OutOfMemory Cause = "the VMM was out of memory"
)

// Exit says how a VMM ended.
type Exit struct {
	At time.Time
	// Code is the exit status, or -1 when a signal ended the VMM or the
	// status is unknown (an adopted VMM is not our child).
	Code int
	// Signal that ended the VMM, 0 if none.
	Signal int
	// Cause is taken from the cgroup, the exit and the end of the console, in this
	// order. What the guest's console says is the guest's word.
	Cause Cause
	// Detail is the end of the VMM's own diagnostics, for the log.
	Detail string
}

// String says it as what the VMM did: "exited with status 1".
func (e Exit) String() string {
	how := "exited with unknown status"
	switch {
	case e.Signal != 0:
		how = fmt.Sprintf("killed by signal %d", e.Signal)
	case e.Code >= 0:
		how = fmt.Sprintf("exited with status %d", e.Code)
	}
	if e.Cause == Unknown || e.Cause == Killed || e.Cause == VMMFailed && e.Code > 0 {
		return how
	}
	return how + ": " + string(e.Cause)
}

// Report is what a driver's Check found.
type Report struct {
	// Version of the VMM program.
	Version string
	// Accel is "kvm" or "tcg".
	Accel string
	// Why says in a sentence why this acceleration was chosen.
	Why string
	// Warning says what works, but should be mended; empty if nothing is.
	Warning string
}
