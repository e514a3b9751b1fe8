package envd

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// modulesTop is the directory of the directories of kernel modules.
	modulesTop = "/lib/modules"
	// modprobeLink leads to envd, which is modprobe in a guest that has none. The name is
	// the same for every kernel, for a link to it outlives a guest on its disk.
	modprobeLink = "/run/wrenn-modprobe"
	// modprobeFile is envd in the directory of its kernel's modules.
	modprobeFile = "wrenn-modprobe"
)

// loadable are the kernel modules of the initrd that a guest loads on demand.
type loadable struct {
	dir     *os.File
	release string
}

// keepLoadable opens the directory of modules before the root of the initrd goes out of
// sight, and moves envd into it. A kernel without such modules is nil.
func keepLoadable() (*loadable, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, err
	}
	release := unix.ByteSliceToString(uts.Release[:])
	dir, err := os.Open(filepath.Join(modulesTop, release))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// envd's file is in memory for as long as envd runs.
	if err := os.Rename("/init", filepath.Join(dir.Name(), modprobeFile)); err != nil {
		dir.Close()
		return nil, err
	}
	return &loadable{dir: dir, release: release}, nil
}

// bring puts the modules where modprobe looks for them in the guest's root, and makes the
// device files by which the kernel finds out which module it needs. The directory can be
// written, in memory: packages of kernel headers put links into it.
func (l *loadable) bring() error {
	defer l.dir.Close()
	dir := filepath.Join(modulesTop, l.release)
	from := fmt.Sprintf("/proc/self/fd/%d", l.dir.Fd())
	if err := (mount{from, dir, "", unix.MS_BIND, ""}).do(); err != nil {
		return err
	}
	return errors.Join(deviceFiles(dir, "/dev"), linkModprobe(dir))
}

// linkModprobe makes envd modprobe, for users and for the kernel, in a guest that has
// none. A package that brings one replaces the link.
func linkModprobe(dir string) error {
	if err := os.Symlink(filepath.Join(dir, modprobeFile), modprobeLink); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, name := range []string{"/sbin/modprobe", "/usr/sbin/modprobe"} {
		if _, err := os.Lstat(name); err == nil {
			return nil
		}
	}
	if err := os.MkdirAll("/sbin", 0o755); err != nil {
		return err
	}
	return os.Symlink(modprobeLink, "/sbin/modprobe")
}

// openDevices are device files that every user may open, as udev has it.
var openDevices = map[string]bool{"net/tun": true, "fuse": true}

// deviceFiles makes the files of devices in dev whose modules are in dir, which is what
// opening them loads: those of modules.devname, and those of loop devices.
func deviceFiles(dir, dev string) error {
	list, err := os.Open(filepath.Join(dir, "modules.devname"))
	if err != nil {
		return err
	}
	defer list.Close()
	var errs []error
	lines := bufio.NewScanner(list)
	for lines.Scan() {
		// tun net/tun c10:200
		var module, name string
		var kind rune
		var major, minor uint32
		n, _ := fmt.Sscanf(lines.Text(), "%s %s %c%d:%d", &module, &name, &kind, &major, &minor)
		if n != 5 || strings.HasPrefix(module, "#") || !filepath.IsLocal(name) {
			continue
		}
		errs = append(errs, deviceFile(filepath.Join(dev, name), kind, major, minor, openDevices[name]))
		if module == "loop" {
			for i := range uint32(8) {
				errs = append(errs, deviceFile(filepath.Join(dev, fmt.Sprintf("loop%d", i)), 'b', 7, i, false))
			}
		}
	}
	return errors.Join(append(errs, lines.Err())...)
}

func deviceFile(path string, kind rune, major, minor uint32, open bool) error {
	mode := uint32(0o600)
	switch kind {
	case 'c':
		mode |= unix.S_IFCHR
	case 'b':
		mode |= unix.S_IFBLK
	default:
		return fmt.Errorf("make %s: device of kind %c", path, kind)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	err := unix.Mknod(path, mode, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	if open {
		return os.Chmod(path, 0o666)
	}
	return nil
}
