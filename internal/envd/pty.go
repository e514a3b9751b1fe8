package envd

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
)

// openPTY opens a new terminal: the master for envd, in non-blocking mode, so that
// closing it wakes readers and writers, and the slave for a process.
func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("unlock terminal: %w", err)
	}
	peer, err := openPeer(fd)
	if err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("open terminal's other end: %w", err)
	}
	return os.NewFile(uintptr(fd), "ptmx"), os.NewFile(uintptr(peer), "pts"), nil
}

// openPeer opens the slave through its master: no path can mislead it.
func openPeer(master int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// setSize tells the terminal its size, and its processes that it changed.
func setSize(master *os.File, size *processv1.PTY_Size) error {
	raw, err := master.SyscallConn()
	if err != nil {
		return err
	}
	ws := unix.Winsize{Col: clamp16(size.GetCols()), Row: clamp16(size.GetRows())}
	var ioctlErr error
	if err := raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &ws)
	}); err != nil {
		return err
	}
	return ioctlErr
}

func clamp16(n uint32) uint16 { return uint16(min(n, 1<<16-1)) }
