// Package launch starts VMMs as confined processes, watches them until they
// exit, and adopts those that an earlier agent started.
package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// killTimeout bounds how long Kill waits for a process that was sent
	// SIGKILL. A process that takes longer hangs in the kernel.
	killTimeout = 10 * time.Second
	// trimEvery is the time between two looks at the size of the files that a
	// process appends to itself.
	trimEvery = time.Second
	// detailBytes bounds Exit.Detail.
	detailBytes = 2 << 10
)

// Process is a VMM that runs in a session of its own. It does not depend on the
// agent that started it: the agent may be killed, and a later one adopts the
// process. Process is safe for concurrent use.
type Process struct {
	ref   Ref
	child bool // this agent has to reap it
	pidfd *os.File
	// opener gives the process its read-only file; nil if it has none.
	opener  *opener
	outlets []*outlet
	printed chan struct{}
	failed  atomic.Bool // Fail was called

	ended   chan struct{} // closed when the watcher has ended
	done    chan struct{}
	exit    vmm.Exit // valid once done is closed
	cleanup error    // why the cgroup could not be removed; valid once done is closed
}

// Adopt watches a process that an earlier agent started. If the process has
// exited the error is errdefs.NotFound, and Adopt removes its cgroup.
func Adopt(ctx context.Context, ref Ref) (*Process, error) {
	pidfd, err := openSame(ref)
	if errors.Is(err, errdefs.NotFound) {
		return nil, errors.Join(err, RemoveCgroup(ctx, ref.Cgroup))
	}
	if err != nil {
		return nil, err
	}
	p := &Process{ref: ref, printed: make(chan struct{}, 1)}
	for _, to := range ref.prints() {
		if to.pipe == "" {
			continue
		}
		var carried func()
		if to.path == ref.Log {
			carried = notify(p.printed)
		}
		// A process whose pipe is gone runs on; only its output is lost.
		if o, err := takeOutlet(to, carried); err == nil {
			p.outlets = append(p.outlets, o)
		}
	}
	return watch(p, pidfd)
}

// watch starts the watcher of a process. It takes over pidfd, also when it fails.
func watch(p *Process, pidfd int) (*Process, error) {
	// For a non-blocking descriptor the runtime's poller waits, not a thread.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", p.ref.PID, err), unix.Close(pidfd))
	}
	p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	if err := p.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", p.ref.PID, err), p.pidfd.Close())
	}
	p.done, p.ended = make(chan struct{}), make(chan struct{})
	go p.wait()
	return p, nil
}

// wait is the watcher. It ends when the process has exited or was released.
func (p *Process) wait() {
	defer close(p.ended)
	defer close(p.printed) // no outlet sends any more then
	defer p.pidfd.Close()
	for {
		p.trim()
		err := p.exitWithin(trimEvery)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			for _, o := range p.outlets {
				o.close()
			}
			return // Release has closed the descriptor
		}
	}
	defer close(p.done)
	if p.opener != nil {
		p.opener.close()
	}
	p.exit = vmm.Exit{Code: -1}
	if p.child {
		_ = reap(p.ref.PID, &p.exit) // without a status, the exit is unknown
	}
	oomKilled := oomKilled(p.ref.Cgroup) // read before the cgroup is removed
	p.cleanup = RemoveCgroup(context.Background(), p.ref.Cgroup)
	p.finishOutput()
	if p.ref.Log != "" {
		tail, _ := vmm.Tail(p.ref.Log, detailBytes) // a log that cannot be read gives no detail
		p.exit.Detail = strings.TrimSpace(string(tail))
	}
	var console []byte
	if p.ref.Console != "" {
		console, _ = vmm.Tail(p.ref.Console, lastConsole) // likewise
	}
	p.exit.Cause = causeOf(p.exit, oomKilled, console)
	if p.failed.Load() {
		p.exit.Cause = vmm.VMMFailed
	}
}

// finishOutput brings into the files what the process, which has exited, printed
// last, and removes the pipes.
func (p *Process) finishOutput() {
	for _, o := range p.outlets {
		o.drain()
	}
	for _, to := range p.ref.prints() {
		if to.pipe != "" {
			os.Remove(to.pipe) // its directory may be gone too
		}
	}
	p.trim()
}

// exitWithin waits for the exit, at most d.
func (p *Process) exitWithin(d time.Duration) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := p.pidfd.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool { return exited(int(fd)) })
}

// Started says that the program has opened all files that it needs; from then on
// it cannot open one for writing by its name. If the program did not get its
// read-only file for reading only, Started returns an error.
func (p *Process) Started() error {
	if p.opener != nil && !p.opener.close() {
		return errors.New("the program did not get its file for reading alone")
	}
	return nil
}

// Release ends the watching of an adopted process, which runs on. Done is never
// closed after that.
func (p *Process) Release() {
	p.pidfd.Close()
	<-p.ended
}

// trim bounds the files that a program of an earlier version appends to itself.
func (p *Process) trim() {
	for _, to := range p.ref.prints() {
		if to.pipe == "" && to.path != "" {
			_, _ = trim(to.path, vmm.MaxConsoleBytes) // the next look tries again
		}
	}
}

// notify returns a function that sends to a channel with room for one value, unless
// a value waits there already.
func notify(c chan<- struct{}) func() {
	return func() {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Printed receives a value after the program has printed to its log. It is closed
// when the process has ended or was released.
func (p *Process) Printed() <-chan struct{} { return p.printed }

// Fail ends a process whose VM can never go on. The exit's cause is then
// vmm.VMMFailed. Fail does not wait for the end.
func (p *Process) Fail() error {
	p.failed.Store(true)
	if err := p.signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process %d: %w", p.ref.PID, err)
	}
	return nil
}

// Ref is what Adopt needs.
func (p *Process) Ref() Ref { return p.ref }

// Done is closed when the process has exited and its cgroup is gone.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the process ended; valid once Done is closed.
func (p *Process) Exit() vmm.Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return vmm.Exit{Code: -1}
	}
}

// EndedBy says whether a call to the process failed with err because the process
// has ended, and how it ended.
func (p *Process) EndedBy(err error) (vmm.Exit, bool) {
	if !errors.Is(err, errdefs.Unavailable) {
		return vmm.Exit{}, false
	}
	// The connection breaks a moment before the watcher sees the exit.
	timer := time.NewTimer(50 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.exit, true
	case <-timer.C:
		return vmm.Exit{}, false
	}
}

// Kill ends the process and returns when the process and its cgroup are gone, or
// when ctx or killTimeout ends the wait. The process is sent SIGKILL in any case.
// Killing a process that has ended is no error.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process %d: %w", p.ref.PID, err)
	}
	timer := time.NewTimer(killTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.cleanup
	case <-ctx.Done():
		return fmt.Errorf("kill process %d: %w", p.ref.PID, context.Cause(ctx))
	case <-timer.C:
		return errdefs.Unavailable.Errorf("process %d is still there %s after SIGKILL", p.ref.PID, killTimeout)
	}
}

// signal sends a signal to the process, unless it has ended.
func (p *Process) signal(sig unix.Signal) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return nil // closed, because the watcher saw the end
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return nil // likewise
	}
	if errors.Is(sent, unix.ESRCH) {
		return nil
	}
	return sent
}

// reap collects the status of a child that has exited or is about to. Without
// exit the status is dropped.
func reap(pid int, exit *vmm.Exit) error {
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
