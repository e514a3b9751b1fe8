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
	// freezes says whether its kernel freezes cgroups. Else a freeze stops processes by a
	// signal.
	freezes() bool
	// setClock sets the wall clock, always or only if it is off by more than programs
	// should notice.
	setClock(now time.Time, always bool) error
	// addEntropy makes guests that were restored from one snapshot draw different
	// numbers from then on.
	addEntropy(data []byte) error
	// end ends the machine, whose processes have ended. If it returns, it failed.
	end(log *slog.Logger) error
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
func (machine) freezes() bool                             { return true }
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

func (container) freezes() bool                      { return false }
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
	b.optional("make cgroups", errors.Join(inOwnCgroup(), limitCgroups(cgroupTop, CgroupRoot)))
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
	cgroupTop = "/sys/fs/cgroup"
	ownCgroup = cgroupTop + "/envd"
)

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
