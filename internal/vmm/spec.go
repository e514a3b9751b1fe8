package vmm

import (
	"net"
	"os"
	"path/filepath"
	"regexp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The bounds of a Spec. The manager's own are usually tighter.
const (
	MaxVCPUs  = 64
	MinMemMiB = 32
	MaxMemMiB = 1 << 20
	MaxDisks  = 8

	// maxRunDir leaves room for a socket's name in the 108 bytes of its path.
	maxRunDir = 64
	// maxCmdline is what the Linux x86 boot protocol has room for, less what a
	// driver adds.
	maxCmdline = 1900
)

var (
	specID     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	cgroupName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*(/[a-zA-Z0-9][a-zA-Z0-9_.-]*)*$`)
	tapName    = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}$`)
)

// Validate says whether a driver can take the spec: every number within its
// bounds, and every file that it names there. Errors are
// errdefs.InvalidArgument.
func (s Spec) Validate() error {
	bad := errdefs.InvalidArgument.Errorf
	switch {
	case !specID.MatchString(s.ID):
		return bad("vm id %.80q: want 1 to 63 of a-z, 0-9 and -", s.ID)
	case s.VCPUs < 1 || s.VCPUs > MaxVCPUs:
		return bad("%d vCPUs: want 1 to %d", s.VCPUs, MaxVCPUs)
	case s.MemMiB < MinMemMiB || s.MemMiB > MaxMemMiB:
		return bad("%d MiB of memory: want %d to %d", s.MemMiB, MinMemMiB, MaxMemMiB)
	case len(s.Cmdline) > maxCmdline:
		return bad("kernel command line of %d bytes: want at most %d", len(s.Cmdline), maxCmdline)
	case len(s.RunDir) > maxRunDir:
		return bad("run directory's path of %d bytes: want at most %d", len(s.RunDir), maxRunDir)
	case len(s.Disks) > MaxDisks:
		return bad("%d disks: want at most %d", len(s.Disks), MaxDisks)
	case s.UID < 0 || s.GID < 0:
		return bad("uid %d, gid %d: want none below 0", s.UID, s.GID)
	}
	if s.Cgroup != "" {
		if err := ValidateCgroup(s.Cgroup); err != nil {
			return err
		}
	}
	for _, c := range s.Cmdline {
		if c < ' ' || c > '~' {
			return bad("kernel command line: want printable ASCII")
		}
	}
	if !isDir(s.RunDir) {
		return bad("run directory: not there")
	}
	if !isFile(s.Kernel) {
		return bad("kernel: not there")
	}
	if s.Initrd != "" && !isFile(s.Initrd) {
		return bad("initrd: not there")
	}
	if s.NetNS != "" && !isFile(s.NetNS) {
		return bad("network namespace: not there")
	}
	if !filepath.IsAbs(s.Console) || !isDir(filepath.Dir(s.Console)) {
		return bad("console: its directory is not there")
	}
	for i, d := range s.Disks {
		if !isFile(d.Path) {
			return bad("disk %d: not there", i)
		}
	}
	if s.NIC != nil {
		if !tapName.MatchString(s.NIC.Tap) {
			return bad("tap %.80q: not a link's name", s.NIC.Tap)
		}
		if mac, err := net.ParseMAC(s.NIC.MAC); err != nil || len(mac) != 6 {
			return bad("MAC %.80q: not a MAC", s.NIC.MAC)
		}
	}
	return nil
}

// ValidateCgroup says whether a name can be that of a cgroup. Errors are
// errdefs.InvalidArgument.
func ValidateCgroup(name string) error {
	if len(name) > 200 || !cgroupName.MatchString(name) {
		return errdefs.InvalidArgument.Errorf("cgroup %.80q: want names of letters, digits and ._- between slashes", name)
	}
	return nil
}

// minMaxFile leaves room for what a VMM writes of its devices.
const minMaxFile = 64 << 20

// MaxFile is the largest file that the VMM of a valid spec has to write: a disk,
// or the guest's memory.
func (s Spec) MaxFile() int64 {
	size := max(minMaxFile, int64(s.MemMiB)<<20)
	for _, d := range s.Disks {
		if info, err := os.Stat(d.Path); err == nil && !d.ReadOnly {
			size = max(size, info.Size())
		}
	}
	return size
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && filepath.IsAbs(path) && info.IsDir()
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && filepath.IsAbs(path) && !info.IsDir()
}
