package launch

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// LogName is the file in a run directory that holds what the VMM prints. If a
// program wipes its environment, KillStrays knows the program by this file.
const LogName = "vmm.log"

// Program is a VMM to be started.
type Program struct {
	// Args is the argument vector; Args[0] is the program's absolute path. Start
	// uses no shell.
	Args []string
	// Files become descriptors 3, 4, …; the caller closes its own copies. The
	// program inherits no other descriptor of the agent.
	Files []*os.File
	// NetNS is the path of the network namespace to run in; empty for the
	// agent's.
	NetNS string
	// RunDir marks the program for KillStrays; empty for no mark.
	RunDir string
	// Log receives what the program prints to standard error, and Console what
	// it prints to standard output. Both stay below vmm.MaxConsoleBytes, also
	// while no agent runs. Without Console, Log receives both; without either,
	// the output is lost.
	Log, Console string
	// Cgroup is made with Limits before the program starts in it, and removed
	// with all processes in it when the program has ended; empty for the agent's.
	Cgroup string
	Limits vmm.Limits
	// Private gives the program mount, process, IPC and UTS namespaces of its
	// own. In them the program is process 1: it sees no other process of the
	// host, gets only the signals that it handles, SIGKILL and SIGSTOP, and when
	// it ends, what it has started ends too.
	Private bool
	// UserNS gives the program a user namespace of its own, in which it is root and
	// the only user, and below that mount, process, IPC, UTS and network
	// namespaces of its own; the last one is empty. Outside it is UID and GID. It needs
	// no other of Private, Mounts, NetNS and Root. Args[0] need not be in a directory
	// that UID can reach.
	UserNS bool
	// Stdouts is how many more descriptors of its standard output the program has,
	// after Files.
	Stdouts int
	// Mounts are made in that mount namespace, in this order, before the program
	// starts; they imply Private.
	Mounts []Mount
	// Syscalls are the only system calls that the program and its children can
	// make; nil for all. The function only says which arguments of them are refused.
	Syscalls []int
	// Root becomes the program's root directory, in which Args[0] is found;
	// empty to keep the agent's.
	Root string
	// UID and GID are what the program runs as, with no other groups; zero for
	// root.
	UID, GID int
	// MaxFile is the largest file that the program can write, in bytes; 0 for no
	// bound.
	MaxFile int64
	// ReadOnly is a file that the program opens by this path for reading and
	// writing, and gets for reading only; empty for none. See Process.Started.
	ReadOnly string
}

// ProgramOf returns what the VMM of a spec is started with, whatever the driver.
func ProgramOf(s vmm.Spec) Program {
	return Program{
		NetNS: s.NetNS, RunDir: s.RunDir,
		Log: filepath.Join(s.RunDir, LogName), Console: s.Console,
		Cgroup: s.Cgroup, Limits: s.Limits, MaxFile: s.MaxFile(),
	}
}

// Version asks a program for its version. name is what the program is called in
// errors; line matches the first line that the program prints, and has the version
// in its last group.
func Version(ctx context.Context, binary, name string, line *regexp.Regexp) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err := vmm.Cancelled(ctx, err); err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", name, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	match := line.FindStringSubmatch(first)
	if match == nil {
		return "", fmt.Errorf("no version of %s in %.200q", name, first)
	}
	return match[len(match)-1], nil
}

// AtLeast says whether a version is the given one or a later one.
func AtLeast(version string, major, minor int) bool {
	var x, y int
	_, _ = fmt.Sscanf(version, "%d.%d", &x, &y) // no version is before all others
	return x > major || x == major && y >= minor
}

// Memo keeps the answer of a driver's check. One caller at a time checks; the
// others wait for the answer.
type Memo[T any] struct {
	turn  chan struct{} // holds a value while a caller checks
	known *T            // guarded by turn
}

// NewMemo returns a Memo without an answer.
func NewMemo[T any]() *Memo[T] { return &Memo[T]{turn: make(chan struct{}, 1)} }

// Get returns the answer that is kept, or that of check, which is kept if check
// says so.
func (m *Memo[T]) Get(ctx context.Context, check func() (answer T, keep bool, err error)) (T, error) {
	var none T
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
	if m.known != nil {
		return *m.known, nil
	}
	answer, keep, err := check()
	if err != nil {
		return none, err
	}
	if keep {
		m.known = &answer
	}
	return answer, nil
}
