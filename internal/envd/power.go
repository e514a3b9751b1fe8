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
func PowerOff(log *slog.Logger, body Body) {
	if err := unix.Kill(-1, unix.SIGTERM); err == nil {
		awaitAlone(stopGrace)
		_ = unix.Kill(-1, unix.SIGKILL)
		awaitAlone(time.Second)
	}
	log.Error("power off", "err", body.end(log))
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
