package envd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children starts processes and learns through the pidfd of each how it ended.
// So the reaping of orphans, which is PID 1's duty, never takes the exit status of
// a process that children has started.
type children struct {
	// mu is held from a fork until the pid is in ours, and from the inspection
	// of a dead child until it is reaped.
	mu   sync.Mutex
	ours map[int]struct{}
	// reaped tells the reaper that a process in ours is gone: it may have hidden
	// dead orphans, because the kernel shows one dead child at a time.
	reaped chan struct{}
}

func newChildren() *children {
	return &children{ours: make(map[int]struct{}), reaped: make(chan struct{}, 1)}
}

// child is a started process. Its pidfd stays open until wait has returned.
type child struct {
	pid   int
	pidfd *os.File
}

// start is fork and exec. attr.Sys is changed. The error is that of the
// system call, unwrapped.
func (c *children) start(path string, argv []string, attr *syscall.ProcAttr) (*child, error) {
	fd := -1
	attr.Sys.PidFD = &fd
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return nil, err
	}
	if fd < 0 {
		// No other part of envd supports a kernel without pidfds either.
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		return nil, syscall.ENOSYS
	}
	// Non-blocking makes Go's poller take it, so that waiting needs no thread.
	_ = unix.SetNonblock(fd, true)
	c.ours[pid] = struct{}{}
	return &child{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// wait returns when the process has ended, and reaps it. To be called once.
func (c *children) wait(p *child) (syscall.WaitStatus, error) {
	var status syscall.WaitStatus
	var waitErr error
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Read(func(uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		var pid int
		for {
			pid, waitErr = syscall.Wait4(p.pid, &status, syscall.WNOHANG, nil)
			if waitErr != syscall.EINTR {
				break
			}
		}
		if pid == 0 && waitErr == nil {
			return false
		}
		delete(c.ours, p.pid)
		return true
	})
	select {
	case c.reaped <- struct{}{}:
	default:
	}
	return status, errors.Join(err, waitErr)
}

// signal sends a signal to that very process, never to a later one with the
// same pid.
func (p *child) signal(sig syscall.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) {
		sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0)
	}); err != nil {
		return err
	}
	return sendErr
}

// reapOrphans reaps every child that start did not start, until ctx ends: the
// duty of PID 1. onReap, if not nil, is called after each look that reaped
// something.
func (c *children) reapOrphans(ctx context.Context, log *slog.Logger, onReap func()) {
	dead := make(chan os.Signal, 1)
	signal.Notify(dead, unix.SIGCHLD)
	defer signal.Stop(dead)
	for {
		n, err := c.reapDead()
		if err != nil {
			log.Warn("reap orphans", "err", err)
		}
		if n > 0 && onReap != nil {
			onReap()
		}
		select {
		case <-ctx.Done():
			return
		case <-dead:
		case <-c.reaped:
		}
	}
}

// reapDead reaps dead orphans until there are none, or until the kernel shows a
// dead process of ours first. The waiter of that process signals reaped.
func (c *children) reapDead() (n int, err error) {
	for {
		again, err := c.reapOne()
		if err != nil || !again {
			return n, err
		}
		n++
	}
}

func (c *children) reapOne() (reaped bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := peekDead()
	if err != nil || pid == 0 {
		return false, err
	}
	if _, ours := c.ours[pid]; ours {
		return false, nil
	}
	if _, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); err != nil {
		return false, fmt.Errorf("wait for %d: %w", pid, err)
	}
	return true, nil
}

// peekDead returns the pid of a dead child without reaping it, or 0.
func peekDead() (int, error) {
	// The kernel's siginfo_t for SIGCHLD on 64-bit machines.
	var info struct {
		signo, errno, code, _ int32
		pid                   int32
		uid                   uint32
		status                int32
		_                     [100]byte
	}
	for {
		err := unix.Waitid(unix.P_ALL, 0, (*unix.Siginfo)(unsafe.Pointer(&info)),
			unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		switch err {
		case nil:
			return int(info.pid), nil
		case unix.ECHILD:
			return 0, nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("look for dead children: %w", err)
		}
	}
}
