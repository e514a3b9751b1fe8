package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
)

// shareDir makes the directory of namespaces a shared mount of its own, just as
// "ip netns add" does the first time. If we left that to it, it would cover
// the namespaces pinned before, which then could not be removed any more.
// It reports whether it made the mount.
func shareDir(dir string) (made bool, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, fmt.Errorf("make directory of namespaces: %w", err)
	}
	err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount yet
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return false, fmt.Errorf("mount directory of namespaces: %w", err)
		}
		made = true
		err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return made, fmt.Errorf("share directory of namespaces: %w", err)
	}
	return made, nil
}

// unshareDir takes shareDir's mount back, unless a namespace is in it.
func unshareDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		return nil
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil &&
		!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount directory of namespaces: %w", err)
	}
	return nil
}

var errNSExists = errors.New("namespace exists")

// makeNS makes a network namespace, pins it at path as "ip netns" does, and
// calls fn on a thread inside of it. errNSExists means that path was there and
// is untouched; any other error leaves nothing, unless it is fn's: then the
// namespace stays for the caller to remove.
func makeNS(path string, fn func(ns netns.NsHandle) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if errors.Is(err, os.ErrExist) {
		return errNSExists
	}
	if err != nil {
		return fmt.Errorf("make namespace: %w", err)
	}
	f.Close()
	pinned := false
	err = osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		ns, err := netns.Get()
		if err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		defer ns.Close()
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin namespace: %w", err)
		}
		pinned = true
		return fn(ns)
	})
	if err != nil && !pinned {
		os.Remove(path)
	}
	return err
}

// removeNS unpins the namespace at path; the kernel frees it when the last
// process in it is gone. Not there is done.
func removeNS(path string) error {
	// Lazily, because a command such as "ip netns exec" may use it.
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil &&
		!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin namespace: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace: %w", err)
	}
	return nil
}

// inNS calls fn on a thread in the namespace at path.
func inNS(path string, fn func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer ns.Close()
	return osthread.Do(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		return fn()
	})
}

// makePacketPair makes a veth pair in the calling thread's namespace. Its far end is for a
// packet socket alone: it has no address and answers no question for one, and its MAC is
// not the guest's, so that the namespace takes no frame that is for the guest.
func makePacketPair() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Tap
	veth := netlink.NewVeth(attrs)
	veth.PeerName = PacketEnd
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in namespace: %w", err)
	}
	defer h.Close()
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair of the guest: %w", err)
	}
	end, err := h.LinkByName(PacketEnd)
	if err != nil {
		return fmt.Errorf("find %s: %w", PacketEnd, err)
	}
	if err := h.LinkSetARPOff(end); err != nil {
		return fmt.Errorf("set %s silent: %w", PacketEnd, err)
	}
	return nil
}

// makeTap makes a persistent tap in the calling thread's namespace. A process
// of user uid may attach to it by name.
func makeTap(name string, uid int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open tun device: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("make tap: %w", err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make tap: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid); err != nil {
		return fmt.Errorf("set tap owner: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make tap persistent: %w", err)
	}
	return nil
}
