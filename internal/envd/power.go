package envd

import (
	"log/slog"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace is how long processes may take to end before a power-off.
const stopGrace = 2 * time.Second

// PowerOffRequests delivers the signals that ask PID 1 to end: SIGTERM, SIGINT
// (which is what ctrl-alt-del becomes) and SIGPWR.
func PowerOffRequests() <-chan os.Signal {
	// No other signal may end PID 1. They go to a channel that is never read:
	// children would inherit that they are ignored.
	signal.Notify(make(chan os.Signal, 1))
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	return signals
}

// PowerOff ends the machine: processes first, then disks. Only PID 1 of a
// guest may call it. It does not return.
func PowerOff(log *slog.Logger) {
	if err := unix.Kill(-1, unix.SIGTERM); err == nil {
		awaitAlone(stopGrace)
		_ = unix.Kill(-1, unix.SIGKILL)
		awaitAlone(time.Second)
	}
	// At a shutdown the kernel resets the network card while the link is up. A
	// process that uses the card after that waits in a busy loop for ever.
	if err := downEthernet(); err != nil {
		log.Warn("take eth0 down", "err", err)
	}
	unix.Sync()
	// A restart ends every VMM. Some VMMs have ACPI but cannot switch the machine
	// off: the kernel would halt for ever.
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	log.Error("power off", "err", err)
	select {} // PID 1 must not return: that would be a kernel panic
}

// awaitAlone waits until PID 1 has no children left, or the time is up.
func awaitAlone(limit time.Duration) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(pollInterval) {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err == unix.ECHILD {
			return
		}
	}
}

// Uptime is the time since the machine was switched on.
func Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano()).Round(time.Millisecond)
}
