package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// SocketPath is where the agent of a state directory, an absolute path, takes calls of
// those who command the host.
func SocketPath(stateDir string) string { return socketPath("/run", stateDir) }

func socketPath(run, stateDir string) string {
	return filepath.Join(run, instance(stateDir), "agent.sock")
}

// socket is a Unix socket for root, the agent's own user and, if it has a group, the
// members of that. The file's mode says so, and each connection is looked at.
type socket struct {
	*net.UnixListener
	uid, gid int // gid is 0 for no group
	log      *slog.Logger
}

// listenUnix makes the socket, in place of one that an agent left which was killed. The
// caller holds the state directory's lock.
func listenUnix(path string, gid int, log *slog.Logger) (_ *socket, err error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	mode := fs.FileMode(0o600)
	if gid != 0 {
		mode = 0o660
		err = os.Chown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("open socket to its group: %w", err)
	}
	return &socket{UnixListener: l, uid: os.Geteuid(), gid: gid, log: log}, nil
}

// Accept returns the next connection of a user that may command the host; it closes
// those of others.
func (s *socket) Accept() (net.Conn, error) {
	for {
		c, err := s.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := s.check(c); err != nil {
			s.log.Warn("connection to the agent's socket refused", "err", err)
			c.Close()
			continue
		}
		return c, nil
	}
}

// check returns why the user at the other end may not command the host.
func (s *socket) check(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var groups []uint32
	var perr error
	err = raw.Control(func(fd uintptr) {
		if peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); perr == nil && s.gid != 0 {
			groups, perr = peerGroups(int(fd))
		}
	})
	if err = errors.Join(err, perr); err != nil {
		return fmt.Errorf("ask who calls: %w", err)
	}
	if !s.admits(peer, groups) {
		return errdefs.Denied.Errorf("process %d of user %d may not command this host", peer.Pid, peer.Uid)
	}
	return nil
}

// admits says whether a user with these further groups may command the host.
func (s *socket) admits(peer *unix.Ucred, groups []uint32) bool {
	return peer.Uid == 0 || int(peer.Uid) == s.uid ||
		s.gid != 0 && (int(peer.Gid) == s.gid || slices.Contains(groups, uint32(s.gid)))
}

// peerGroups returns the supplementary groups of the process that connected.
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 1<<16) // the kernel's most
	size := uint32(len(groups) * 4)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return nil, errno
	}
	return groups[:size/4], nil
}

// groupID returns the id of a group by its name or number; 0 for the empty name.
func groupID(name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	if gid, err := strconv.ParseUint(name, 10, 31); err == nil && gid > 0 {
		return int(gid), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}
