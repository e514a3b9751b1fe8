package envd

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Body is the machine that envd is PID 1 of: a microVM, or a guest of gVisor, whose
// kernel does for it what envd does for a microVM.
type Body interface {
	// boot makes a guest of the machine; see Boot.
	boot(b *booter) (guestapi.Boot, error)
	// can says what its kernel does for envd.
	can() abilities
	// setClock sets the wall clock, always or only if it is off by more than programs
	// should notice.
	setClock(now time.Time, always bool) error
	// addEntropy makes guests that were restored from one snapshot draw different
	// numbers from then on.
	addEntropy(data []byte) error
	// end ends the machine, whose processes have ended. If it returns, it failed.
	end(log *slog.Logger) error
}

// abilities are what a kernel does for envd, which does it itself where it does not.
type abilities struct {
	// freezes: it freezes cgroups. Else a freeze stops processes by a signal.
	freezes bool
	// keepsMemory: it ends a process before there is no memory left.
	keepsMemory bool
}

// ThisBody is the body that envd was started in as PID 1 with these arguments: gVisor's
// guests have the boot facts there, microVMs on the command line of their kernel.
func ThisBody(args []string) Body {
	if slices.ContainsFunc(args, guestapi.IsFact) {
		return container{strings.Join(args[1:], " ")}
	}
	return machine{}
}

// machine is a microVM.
type machine struct{}

func (machine) boot(b *booter) (guestapi.Boot, error)     { return b.boot() }
func (machine) can() abilities                            { return abilities{freezes: true, keepsMemory: true} }
func (machine) setClock(now time.Time, always bool) error { return setClock(now, always) }
func (machine) addEntropy(data []byte) error              { return addEntropy(data) }

func (machine) end(log *slog.Logger) error {
	// At a shutdown the kernel resets the network card while the link is up. A
	// process that uses the card after that waits in a busy loop for ever.
	if err := downEthernet(); err != nil {
		log.Warn("take eth0 down", "err", err)
	}
	unix.Sync()
	// A restart ends every VMM. Some VMMs have ACPI but cannot switch the machine
	// off: the kernel would halt for ever.
	return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// container is a guest of gVisor. Its root, its network, /proc, /sys and /dev are there
// when envd starts. Its clock is the host's, and so are its random numbers.
type container struct {
	facts string
}

func (container) can() abilities                     { return abilities{} }
func (container) setClock(_ time.Time, _ bool) error { return nil }
func (container) addEntropy(_ []byte) error          { return nil }

// end ends PID 1, and the sentry with it.
func (container) end(*slog.Logger) error {
	unix.Sync()
	os.Exit(0)
	return nil
}

func (c container) boot(b *booter) (guestapi.Boot, error) {
	unix.Umask(0o022)
	p, _, err := guestapi.ParseCmdline(c.facts)
	if err != nil {
		return guestapi.Boot{}, err
	}
	if p.Probe {
		return p, ErrProbe
	}
	b.optional("make cgroups", c.cgroups())
	// gVisor covers an empty /tmp with a file system in memory.
	if err := unix.Unmount("/tmp", unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		b.optional("uncover /tmp", err)
	}
	b.mounts(memoryMounts)
	b.names(p)
	b.limits()
	return p, nil
}

const (
	// processBytes is what a process or thread costs the host beside its own memory: the
	// sentry runs it in one of the host's. minProcesses is how many cost no more than the
	// host gives a sentry in any case.
	processBytes = 512 << 10
	minProcesses = 128

	cgroupTop = "/sys/fs/cgroup"
	ownCgroup = cgroupTop + "/envd"
)

// cgroups makes the cgroup of users' processes.
func (container) cgroups() error {
	total, err := totalMemory()
	if err != nil {
		return err
	}
	b := boundsOf(total)
	b.processes = max(minProcesses, total/processBytes)
	return errors.Join(inOwnCgroup(), limitCgroups(cgroupTop, CgroupRoot, b))
}

// inOwnCgroup moves envd into a cgroup of its own: one with processes in it can divide
// nothing among its children.
func inOwnCgroup() error {
	if err := os.MkdirAll(ownCgroup, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(ownCgroup, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return fmt.Errorf("move envd: %w", err)
	}
	return nil
}
