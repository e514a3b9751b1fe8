package vmm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// killTimeout bounds how long Kill waits for a process that was sent
	// SIGKILL. One that takes longer hangs in the kernel.
	killTimeout = 10 * time.Second
	// trimEvery is how often the watcher looks at the size of the files that
	// the process appends to.
	trimEvery = time.Second
	// detailBytes bounds Exit.Detail.
	detailBytes = 2 << 10
)

// Program is a VMM to be launched.
type Program struct {
	// Args is the argument vector; Args[0] is the program's absolute path. No
	// shell ever sees it.
	Args []string
	// Files become descriptors 3, 4, …; the caller closes its own copies.
	// Nothing else of the agent's is open in the program.
	Files []*os.File
	// NetNS is the path of the network namespace to run in; empty for ours.
	NetNS string
	// RunDir marks the program as ours for KillStrays; empty for no mark.
	RunDir string
	// Log receives what the program prints, bounded like Console; empty to
	// throw it away.
	Log string
	// Console is a file that the program itself appends to (O_APPEND), which
	// the watcher keeps below MaxConsoleBytes; empty for none.
	Console string
}

// Identity names a process for good: a pid alone comes back.
type Identity struct {
	PID int `json:"pid"`
	// Started is when, in clock ticks after the boot.
	Started uint64 `json:"started"`
	// Boot is the id of the boot that both numbers belong to.
	Boot string `json:"boot"`
}

// Process is a VMM that runs in a session of its own. It depends on nothing of
// the agent's: the agent may be killed, and later adopt the process again.
// Safe for concurrent use.
type Process struct {
	id    Identity
	child bool // ours to reap
	pidfd *os.File

	log, console string

	done chan struct{}
	exit Exit // valid once done is closed
}

// Launch starts the program and returns when it runs. Its standard input is
// empty; it is watched until it has exited.
func Launch(p Program) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	defer null.Close()
	out := null
	if p.Log != "" {
		out, err = os.OpenFile(p.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("launch: open log: %w", err)
		}
		defer out.Close()
	}
	files := []uintptr{null.Fd(), out.Fd(), out.Fd()}
	for _, f := range p.Files {
		files = append(files, f.Fd())
	}

	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	if p.RunDir != "" {
		env = append(env, runDirEnv+"="+p.RunDir)
	}
	pidfd := -1
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   env,
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	// What we open ourselves is never inherited. What our parent left open in
	// us is, unless it is told now.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	var pid int
	err = onSpareThread(func() error {
		if err := enterNetNS(p.NetNS); err != nil {
			return err
		}
		pid, _, err = syscall.StartProcess(p.Args[0], p.Args, attr)
		return err
	})
	runtime.KeepAlive(p.Files)
	if err != nil {
		return nil, fmt.Errorf("launch %s: %w", p.Args[0], err)
	}
	id, err := identify(pid)
	if err != nil {
		// Not reaped yet, so the number is still its own.
		return nil, errors.Join(fmt.Errorf("launch: %w", err), unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0), reap(pid, nil), unix.Close(pidfd))
	}
	return watch(&Process{id: id, child: true, log: p.Log, console: p.Console}, pidfd)
}

// Adopt watches a process that an earlier agent launched. One that has exited,
// or whose pid belongs to another by now, is errdefs.NotFound. log and console
// are those of its Program.
func Adopt(id Identity, log, console string) (*Process, error) {
	gone := errdefs.NotFound.Errorf("process %d has exited", id.PID)
	if id.PID <= 0 {
		return nil, gone
	}
	pidfd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return nil, gone
		}
		return nil, fmt.Errorf("open process %d: %w", id.PID, err)
	}
	// The descriptor pins whoever has the number now. If that one started
	// when ours did, it is ours.
	now, err := identify(id.PID)
	if err != nil || now != id || exited(pidfd) {
		return nil, errors.Join(gone, unix.Close(pidfd))
	}
	return watch(&Process{id: id, log: log, console: console}, pidfd)
}

func watch(p *Process, pidfd int) (*Process, error) {
	// A non-blocking descriptor is waited for by the runtime's poller; no
	// thread sits on it.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, fmt.Errorf("watch process %d: %w", p.id.PID, err)
	}
	p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	if err := p.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", p.id.PID, err), p.pidfd.Close())
	}
	p.done = make(chan struct{})
	go p.wait()
	return p, nil
}

// wait is the watcher; it ends with the process.
func (p *Process) wait() {
	defer close(p.done)
	defer p.pidfd.Close()
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		panic(err) // a closed file's; this one is open
	}
	for {
		p.trim()
		p.pidfd.SetReadDeadline(time.Now().Add(trimEvery))
		err := conn.Read(func(fd uintptr) bool { return exited(int(fd)) })
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	p.exit = Exit{At: time.Now().UTC(), Code: -1}
	if p.child {
		reap(p.id.PID, &p.exit)
	}
	p.trim()
	if p.log != "" {
		tail, _ := Tail(p.log, detailBytes)
		p.exit.Detail = strings.TrimSpace(string(tail))
	}
}

func (p *Process) trim() {
	for _, path := range []string{p.log, p.console} {
		if path != "" {
			trim(path, MaxConsoleBytes) // it is tried again soon
		}
	}
}

// ID is what Adopt needs.
func (p *Process) ID() Identity { return p.id }

// Done is closed when the process has exited.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the process ended; valid once Done is closed.
func (p *Process) Exit() Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return Exit{Code: -1}
	}
}

// Kill ends the process and returns when it is gone, or when ctx or a bound of
// its own says that this takes too long; the process has then been told all
// the same. Killing a process that is gone is no error.
func (p *Process) Kill(ctx context.Context) error {
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		var sent error
		err = conn.Control(func(fd uintptr) {
			sent = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0)
		})
		if sent != nil && !errors.Is(sent, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", p.id.PID, sent)
		}
	}
	// An error of the descriptor's means that the watcher is done with it.
	timer := time.NewTimer(killTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill process %d: %w", p.id.PID, context.Cause(ctx))
	case <-timer.C:
		return errdefs.Unavailable.Errorf("process %d is still there %s after SIGKILL", p.id.PID, killTimeout)
	}
}

// onSpareThread runs f on a thread that ends with it, so that f may move the
// thread into other namespaces and never has to come back.
func onSpareThread(f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end. Hold it while another one works.
			defer runtime.UnlockOSThread()
			errc <- onSpareThread(f)
			return
		}
		errc <- f() // still locked: the thread ends here
	}()
	return <-errc
}

func enterNetNS(path string) error {
	if path == "" {
		return nil
	}
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// exited reports whether the process of a pidfd has.
func exited(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// reap collects the status of our child, which has exited or is about to.
func reap(pid int, exit *Exit) error {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || exit == nil {
			return err
		}
		break
	}
	if status.Signaled() {
		exit.Signal = int(status.Signal())
	} else {
		exit.Code = status.ExitStatus()
	}
	return nil
}

// identify reads who has the pid now.
func identify(pid int) (Identity, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Identity{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	started, err := startTime(string(stat))
	if err != nil {
		return Identity{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Identity{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Identity{PID: pid, Started: started, Boot: strings.TrimSpace(string(boot))}, nil
}

// startTime finds field 22 of a /proc/PID/stat. The second field is the
// program's name in parentheses and may hold anything, spaces and parentheses
// included, so counting begins after the last one.
func startTime(stat string) (uint64, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("malformed stat %q", stat)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
