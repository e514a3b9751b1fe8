package launch

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Ref identifies a process beyond the reuse of its pid, and names what the
// launcher looks after for it. It is enough for a later agent to adopt the
// process.
type Ref struct {
	PID int `json:"pid"`
	// Started is the start time in clock ticks after the boot. A later process
	// with the same pid has another one.
	Started uint64 `json:"started"`
	// Boot is the id of the boot that PID and Started belong to.
	Boot string `json:"boot"`

	Log     string `json:"log,omitempty"`
	Console string `json:"console,omitempty"`
	// LogPipe and ConsolePipe lead to these files. A program that an earlier
	// version started has none, and writes to the files itself.
	LogPipe     string `json:"log_pipe,omitempty"`
	ConsolePipe string `json:"console_pipe,omitempty"`
	Cgroup      string `json:"cgroup,omitempty"`
}

// print is a file that holds what a program prints, and the pipe that leads to it.
type print struct {
	pipe, path string
	// stamped: a file beside it says when it was written.
	stamped bool
}

func (r Ref) prints() []print {
	return []print{{r.LogPipe, r.Log, false}, {r.ConsolePipe, r.Console, true}}
}

// openSame returns a pidfd of the process that ref identifies. If that process has
// exited the error is errdefs.NotFound, also when its pid is another's by now.
func openSame(ref Ref) (int, error) {
	gone := errdefs.NotFound.Errorf("process %d has exited", ref.PID)
	if ref.PID <= 0 {
		return -1, gone
	}
	pidfd, err := unix.PidfdOpen(ref.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, gone
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", ref.PID, err)
	}
	// The descriptor holds the process that has the pid now. If that process
	// started when the one of ref did, it is the same.
	now, err := identify(ref.PID)
	if overloaded(err) { // which proves nothing
		return -1, errors.Join(err, unix.Close(pidfd))
	}
	if err != nil || now.Started != ref.Started || now.Boot != ref.Boot || exited(pidfd) {
		return -1, errors.Join(gone, unix.Close(pidfd))
	}
	return pidfd, nil
}

// identify reads which process has the pid now.
func identify(pid int) (Ref, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	started, err := startTime(string(stat))
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Ref{PID: pid, Started: started, Boot: strings.TrimSpace(string(boot))}, nil
}

// startTime finds field 22 of a /proc/PID/stat. The second field is the program's
// name in parentheses, which may itself hold spaces and parentheses, so startTime
// counts from the last parenthesis.
func startTime(stat string) (uint64, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("malformed stat %q", stat)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// exited says whether the process of a pidfd has exited.
func exited(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}
