package vmm

import "fmt"

// Cause is what ended a VM. The set is closed.
type Cause string

const (
	// Unknown: neither the guest nor the VMM gave a reason.
	Unknown         Cause = ""
	GuestPoweredOff Cause = "the guest powered off"
	GuestRebooted   Cause = "the guest rebooted"
	GuestPanicked   Cause = "the guest panicked"
	// VMMFailed: the VMM ended with an error in its log or in its exit status.
	VMMFailed Cause = "the VMM failed"
	// Killed: a signal ended the VMM.
	Killed Cause = "the VMM was killed"
	// OutOfMemory: the host's kernel killed the VMM, which needed more memory
	// than its cgroup has.
	OutOfMemory Cause = "the VMM was out of memory"
)

// Exit says how a VMM ended.
type Exit struct {
	// Code is the exit status. It is -1 when a signal ended the VMM or when the
	// status is unknown, because an adopted VMM is no child of the agent.
	Code int
	// Signal that ended the VMM, 0 if none.
	Signal int
	// Cause is taken from the cgroup, the exit and the end of the console, in
	// this order. The console holds only what the guest claims.
	Cause Cause
	// Detail is the end of the VMM's own diagnostics, for the log.
	Detail string
}

// String completes a sentence about the VMM: "exited with status 1".
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
