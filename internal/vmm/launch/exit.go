package launch

import (
	"bytes"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// lastConsole is how much of a console's end causeOf searches.
const lastConsole = 16 << 10

// words are what a Linux kernel writes to its console when it ends, at any log
// level, and what envd writes, which ends a machine by a restart. The order matters:
// a restart may follow a panic.
var words = []struct {
	text  string
	cause vmm.Cause
}{
	{"Kernel panic - not syncing", vmm.GuestPanicked},
	{`msg="powering off"`, vmm.GuestPoweredOff},
	{"reboot: Power down", vmm.GuestPoweredOff},
	{"reboot: System halted", vmm.GuestPoweredOff},
	{"sysrq: Power Off", vmm.GuestPoweredOff},
	{"reboot: Restarting system", vmm.GuestRebooted},
	{"reboot: machine restart", vmm.GuestRebooted},
	{"sysrq: Resetting", vmm.GuestRebooted},
}

// vmmError marks an error in the log of Firecracker, the only VMM that ends with
// status 0 after an error.
const vmmError = ":ERROR:"

// causeOf says what ended a VMM. oomKilled says whether the kernel has killed a
// process in the VMM's cgroup because the cgroup was out of memory.
func causeOf(e vmm.Exit, oomKilled bool, console []byte) vmm.Cause {
	switch {
	case oomKilled && (e.Signal == int(unix.SIGKILL) || e.Signal == 0 && e.Code < 0):
		return vmm.OutOfMemory
	case e.Signal != 0:
		return vmm.Killed
	case e.Code > 0:
		return vmm.VMMFailed
	}
	for _, w := range words {
		if bytes.Contains(console, []byte(w.text)) {
			return w.cause
		}
	}
	if bytes.Contains([]byte(e.Detail), []byte(vmmError)) {
		return vmm.VMMFailed
	}
	return vmm.Unknown
}
