package launch

import (
	"bytes"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// lastConsole is how much of a console's end is searched for the guest's last
// words.
const lastConsole = 16 << 10

// words are what a Linux kernel writes to its console when it ends, whatever its
// log level, and what envd writes, which restarts the machine to end it. A panic
// may be followed by a restart, too.
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

// vmmError marks an error in Firecracker's log. It is the only VMM that ends with
// status 0 after one.
const vmmError = ":ERROR:"

// causeOf says what ended a VMM: oomKilled is whether the kernel has killed
// something in its cgroup for want of memory.
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
