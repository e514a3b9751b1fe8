package launch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
)

// memoryMountSize bounds a file system in memory.
const memoryMountSize = "64m"

// Mount is something that only a program sees, in its own mount namespace. The
// kernel removes it when the program ends.
type Mount struct {
	// Source is a file or directory to show, or a device to make again, and not
	// a symbolic link; empty for an empty file system in memory.
	Source string
	// Target is the path of the mount. It exists, or lies in an earlier mount, in
	// which it is made.
	Target   string
	ReadOnly bool
	// UID and GID own, as seen through this mount, the files that belong to root
	// on disk. So a program that is not root can use files that no other user of
	// the host can.
	UID, GID int
}

// mountAll makes mounts in the calling thread's namespace, in their order.
func mountAll(mounts []Mount) error {
	var owners owners
	defer owners.close()
	for _, m := range mounts {
		if err := m.make(&owners); err != nil {
			// The text may reach a client, so it has no path of the host.
			return fmt.Errorf("mount %s: %w", filepath.Base(m.Target), err)
		}
	}
	return nil
}

func (m Mount) make(owners *owners) error {
	if m.Source == "" {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			return err
		}
		return unix.Mount("tmpfs", m.Target, "tmpfs", unix.MS_NOSUID, "mode=0755,size="+memoryMountSize)
	}
	info, err := os.Lstat(m.Source)
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeCharDevice != 0 {
		return m.makeDevice(info)
	}
	if err := makeTarget(m.Target, info.IsDir()); err != nil {
		return err
	}
	tree, err := m.open(owners)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, m.Target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// open returns the mount, which is not attached to any path yet.
func (m Mount) open(owners *owners) (int, error) {
	if info, err := os.Lstat(m.Source); err != nil || info.Mode()&os.ModeSymlink != 0 {
		return -1, errors.Join(err, errors.New("it is a link, or nothing"))
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if m.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if m.UID != 0 || m.GID != 0 {
		ns, err := owners.get(m.UID, m.GID)
		if err != nil {
			return -1, errors.Join(err, unix.Close(tree))
		}
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(ns.Fd())
	}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr)
	if (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)) && attr.Attr_set&unix.MOUNT_ATTR_IDMAP != 0 {
		err = errdefs.Unsupported.Errorf("its file system cannot show root's files as another user's (idmapped mounts: ext4, xfs or btrfs can)")
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(tree))
	}
	return tree, nil
}

// makeDevice makes a device with the same number that belongs to the mount's owner.
// The host's device belongs to root, and its file system has no idmapped mounts.
func (m Mount) makeDevice(info os.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("its number is not known")
	}
	if err := os.MkdirAll(filepath.Dir(m.Target), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(m.Target, unix.S_IFCHR|0o600, int(stat.Rdev)); err != nil {
		return err
	}
	return os.Chown(m.Target, m.UID, m.GID)
}

// makeTarget makes the file or directory that a mount covers, unless it exists.
func makeTarget(path string, dir bool) error {
	if dir {
		return os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// owners are user namespaces that map root to a mount's owner.
type owners struct {
	open map[[2]int]*os.File
}

func (o *owners) get(uid, gid int) (*os.File, error) {
	if ns := o.open[[2]int{uid, gid}]; ns != nil {
		return ns, nil
	}
	ns, err := userNS(uid, gid)
	if errors.Is(err, unix.ENOSPC) {
		return nil, errdefs.Unsupported.Errorf("this host allows no more user namespaces (user.max_user_namespaces)")
	}
	if err != nil {
		return nil, fmt.Errorf("make user namespace: %w", err)
	}
	if o.open == nil {
		o.open = map[[2]int]*os.File{}
	}
	o.open[[2]int{uid, gid}] = ns
	return ns, nil
}

func (o *owners) close() {
	for _, ns := range o.open {
		ns.Close()
	}
}

// userNS makes a user namespace in which root is the given user of the host. Only a
// process can make one, so userNS starts a child in it. The child never runs: as
// its tracer, userNS stops it before its first instruction. The calling thread must
// be locked.
func userNS(uid, gid int) (*os.File, error) {
	pid, _, err := syscall.StartProcess("/proc/self/exe", []string{"userns"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}},
			Ptrace:      true,
			Pdeathsig:   unix.SIGKILL,
		},
	})
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	killed := unix.Kill(pid, unix.SIGKILL)
	for {
		var status unix.WaitStatus
		_, werr := unix.Wait4(pid, &status, unix.WALL, nil)
		if errors.Is(werr, unix.EINTR) || werr == nil && status.Stopped() {
			continue
		}
		if err = errors.Join(err, killed, werr); err != nil && ns != nil {
			ns.Close()
		}
		return ns, err
	}
}

// Mount makes a mount in the namespace of the running program. The target is an
// existing directory directly below the program's root.
func (p *Process) Mount(m Mount) error {
	err := osthread.Do(func() error {
		var owners owners
		defer owners.close()
		tree, err := m.open(&owners)
		if err != nil {
			return err
		}
		defer unix.Close(tree)
		if err := p.enterMounts(); err != nil {
			return err
		}
		return unix.MoveMount(tree, "", unix.AT_FDCWD, filepath.Base(m.Target), unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", filepath.Base(m.Target), err)
	}
	return nil
}

// Unmount takes back what Mount made. A program that has ended has no mounts.
func (p *Process) Unmount(target string) error {
	err := osthread.Do(func() error {
		if err := p.enterMounts(); err != nil {
			return err
		}
		return unix.Unmount(filepath.Base(target), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	})
	select {
	case <-p.Done():
		return nil
	default:
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", filepath.Base(target), err)
	}
	return nil
}

// enterMounts moves the calling thread into the program's mount namespace, and its
// working directory to the program's root.
func (p *Process) enterMounts() error {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", p.ref.PID), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open its root: %w", err)
	}
	defer unix.Close(root)
	// Threads share their working directory until one unshares it.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare directories: %w", err)
	}
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return errdefs.Unavailable.Errorf("the process has exited")
	}
	var entered error
	if err := conn.Control(func(fd uintptr) { entered = unix.Setns(int(fd), unix.CLONE_NEWNS) }); err != nil {
		return errdefs.Unavailable.Errorf("the process has exited")
	}
	if entered != nil {
		return fmt.Errorf("enter its mounts: %w", entered)
	}
	// The pidfd led to a process that still existed, so the pid was that process's
	// when its root was opened.
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("enter its root: %w", err)
	}
	return nil
}
