package vmm

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// lastConsole is how much of a console's end is searched for the guest's last
// words.
const lastConsole = 16 << 10

// words are what a Linux kernel writes to its console when it ends, whatever its
// log level, and what envd writes, which restarts the machine to end it. A panic
// may be followed by a restart, too.
var words = []struct {
	text  string
	cause Cause
}{
	{"Kernel panic - not syncing", GuestPanicked},
	{`msg="powering off"`, GuestPoweredOff},
	{"reboot: Power down", GuestPoweredOff},
	{"reboot: System halted", GuestPoweredOff},
	{"sysrq: Power Off", GuestPoweredOff},
	{"reboot: Restarting system", GuestRebooted},
	{"reboot: machine restart", GuestRebooted},
	{"sysrq: Resetting", GuestRebooted},
}

// vmmError marks an error in Firecracker's log. It is the only VMM that ends with
// status 0 after one.
const vmmError = ":ERROR:"

// causeOf says what ended a VMM: oomKilled is whether the kernel has killed
// something in its cgroup for want of memory.
func causeOf(e Exit, oomKilled bool, console []byte) Cause {
	switch {
	case oomKilled && (e.Signal == int(unix.SIGKILL) || e.Signal == 0 && e.Code < 0):
		return OutOfMemory
	case e.Signal != 0:
		return Killed
	case e.Code > 0:
		return VMMFailed
	}
	for _, w := range words {
		if bytes.Contains(console, []byte(w.text)) {
			return w.cause
		}
	}
	if bytes.Contains([]byte(e.Detail), []byte(vmmError)) {
		return VMMFailed
	}
	return Unknown
}
