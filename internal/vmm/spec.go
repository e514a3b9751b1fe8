package vmm

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Spec describes a VM as plain data: what the VM is, not how a VMM is told so.
// All files that it names exist, except Console, which Start makes.
type Spec struct {
	// ID names the VM in the process list and in the driver's sockets.
	ID string
	// RunDir is the directory for the driver's sockets and other short-lived
	// files. The caller makes it and removes it after Kill; only the driver
	// writes there. Its path has at most 64 bytes, because a socket's path has
	// only 108.
	RunDir string
	// NetNS is the path of the network namespace that the VMM runs in; empty
	// for a VM without network.
	NetNS string

	VCPUs  int
	MemMiB int

	// Kernel is what the VM boots. It is zero for a driver whose Needs name no
	// kernel.
	Kernel Kernel
	// Init is an image of a file system with the guest's first program, /init, for a
	// driver whose Needs name one. It takes the place of an initrd.
	Init string
	// Boot holds the facts that the guest is started with.
	Boot guestapi.Boot
	// Root is the guest's root file system. It is zero for a guest that runs
	// from its initrd.
	Root Root
	// Link is the guest's eth0; nil for none.
	Link *Link

	// Console is the file that receives what the guest prints, bounded by
	// MaxConsoleBytes.
	Console string

	// UID and GID are what the VMM runs as; zero means root. The files that the
	// spec names belong to root. The driver gives the VMM, and no other process
	// of that user, access to them.
	UID, GID int

	// Cgroup is the VM's own cgroup, relative to the root of each hierarchy;
	// empty for none. The driver makes it, sets Limits, and removes it when the
	// VM has ended.
	Cgroup string
	Limits Limits
}

// Kernel is a kernel and what it is booted with.
type Kernel struct {
	// Image is an uncompressed vmlinux.
	Image string
	// Initrd is a cpio archive; empty for none.
	Initrd string
	// Args come on the kernel's command line after those of the driver, which
	// they may overrule, and before the boot facts.
	Args string
}

// MaxLayers is how many layers a root file system can have below its overlay. The
// disks of so many, the overlay's included, fit into each driver's machine.
const MaxLayers = 8

const _ = uint(guestapi.MaxLayers - MaxLayers) // a guest takes as many

// Root is a root file system in layers.
type Root struct {
	// Layers are images that many VMs share, lowest first, MaxLayers at most; the guest
	// cannot write to them. The lowest one is a whole root file system, each of the others
	// the overlay of a guest that had those below.
	Layers []string
	// Overlay is the VM's own file, which takes what the guest writes.
	Overlay string
}

// LinkKind is a kind of link.
type LinkKind string

// The kinds of links.
const (
	// Tap is a tap device that belongs to Spec.UID. A VMM that emulates a
	// network card takes one.
	Tap LinkKind = "tap"
	// Packet is an end of a veth pair. A driver without a network card exchanges
	// Ethernet frames with it through a packet socket.
	Packet LinkKind = "packet"
)

// Link is a network link in Spec.NetNS that leads to the guest's eth0.
type Link struct {
	Kind LinkKind
	// Name of the link in the namespace.
	Name string
	// MAC is the guest's own address.
	MAC string
}

// Limits bound what a VM takes of its host: CPUMilli, MemMiB and PIDs through
// its cgroup, the others through the driver. Zero means no limit.
type Limits struct {
	// CPUMilli is thousandths of a host CPU.
	CPUMilli int
	MemMiB   int
	PIDs     int
	// DiskBytes and DiskOps bound what is read from and written to the VM's
	// disks in a second. A cgroup cannot bound that everywhere: with version 1
	// the host's page cache writes to the disk, on no cgroup's account.
	DiskBytes, DiskOps int64
}

// Disk is a layer of a root file system as a block device of the guest.
type Disk struct {
	// Name of the device in the guest, without /dev.
	Name     string
	Path     string
	ReadOnly bool
}

// Disks are the layers of a root file system for a driver whose guests have
// block devices, in the order in which the guest's kernel finds them.
func (r Root) Disks() []Disk {
	var disks []Disk
	add := func(path string, readOnly bool) {
		disks = append(disks, Disk{Name: "vd" + string(rune('a'+len(disks))), Path: path, ReadOnly: readOnly})
	}
	for _, layer := range r.Layers {
		add(layer, true)
	}
	if r.Overlay != "" {
		add(r.Overlay, false)
	}
	return disks
}

// Machine returns the spec of the machine alone: without what the guest cannot see
// (names, places, users, limits), and without what is no part of the machine (the
// kernel, the boot facts, the contents of the disks).
func (s Spec) Machine() Spec {
	m := Spec{VCPUs: s.VCPUs, MemMiB: s.MemMiB}
	for range s.Root.Layers { // each is at a place of its own, so one name is enough
		m.Root.Layers = append(m.Root.Layers, "base")
	}
	if s.Root.Overlay != "" {
		m.Root.Overlay = "overlay"
	}
	if s.Link != nil {
		m.Link = &Link{Kind: s.Link.Kind, Name: s.Link.Name, MAC: strings.ToLower(s.Link.MAC)}
	}
	return m
}

// BootKey is a text that is equal for two specs whose guests are started with
// the same facts. It is a part of the key of a boot snapshot, as SnapshotKey is.
func (s Spec) BootKey() string {
	return fmt.Sprintf("%s %+v", s.Kernel.Args, s.Boot)
}

// Cmdline is the kernel command line of a guest that boots Kernel. machine is
// what the driver's machine needs on it. Of two words that contradict each other
// a kernel takes the later one.
func (s Spec) Cmdline(machine string) string {
	var names guestapi.Disks
	for _, d := range s.Root.Disks() {
		if d.ReadOnly {
			names.Layers = append(names.Layers, d.Name)
		} else {
			names.Overlay = d.Name
		}
	}
	return strings.Join(strings.Fields(machine+" "+s.Kernel.Args+" "+guestapi.Cmdline(s.Boot, names)), " ")
}

// The bounds of a Spec. Those of sandboxes are usually tighter.
const (
	MaxVCPUs  = 64
	MinMemMiB = 32
	MaxMemMiB = 1 << 20

	// maxRunDir leaves room for a socket's name in the 108 bytes of its path.
	maxRunDir = 64
	// maxCmdline is the room that the Linux boot protocol for x86 has for a
	// command line, less what a driver adds.
	maxCmdline = 1900
	// minMaxFile leaves room for what a VMM writes of its devices.
	minMaxFile = 64 << 20
)

var (
	specID     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	cgroupName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*(/[a-zA-Z0-9][a-zA-Z0-9_.-]*)*$`)
	linkName   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}$`)
)

// Validate says whether a driver with these needs can take the spec: whether
// every number is within its bounds and every file that the spec names is there.
// Errors are errdefs.InvalidArgument, and name no path of the host.
func (s Spec) Validate(needs Needs) error {
	for _, check := range []func() error{
		s.validateNumbers,
		func() error { return s.validateBoot(needs) },
		s.validateFiles,
		func() error { return s.validateLink(needs) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (s Spec) validateNumbers() error {
	bad := errdefs.InvalidArgument.Errorf
	switch {
	case !specID.MatchString(s.ID):
		return bad("vm id %.80q: want 1 to 63 of a-z, 0-9 and -", s.ID)
	case s.VCPUs < 1 || s.VCPUs > MaxVCPUs:
		return bad("%d vCPUs: want 1 to %d", s.VCPUs, MaxVCPUs)
	case s.MemMiB < MinMemMiB || s.MemMiB > MaxMemMiB:
		return bad("%d MiB of memory: want %d to %d", s.MemMiB, MinMemMiB, MaxMemMiB)
	case len(s.RunDir) > maxRunDir:
		return bad("run directory's path of %d bytes: want at most %d", len(s.RunDir), maxRunDir)
	case s.UID < 0 || s.GID < 0:
		return bad("uid %d, gid %d: want none below 0", s.UID, s.GID)
	case s.Cgroup != "":
		return ValidateCgroup(s.Cgroup)
	}
	return nil
}

// validateBoot checks the kernel and its command line. Drivers without a kernel
// take the same boot facts, so that a driver can be exchanged for another.
func (s Spec) validateBoot(needs Needs) error {
	bad := errdefs.InvalidArgument.Errorf
	switch {
	case !needs.Kernel && s.Kernel != Kernel{}:
		return bad("kernel: this driver boots none")
	case needs.Kernel && !isFile(s.Kernel.Image):
		return bad("kernel: not there")
	case s.Kernel.Initrd != "" && !isFile(s.Kernel.Initrd):
		return bad("initrd: not there")
	case !needs.Init && s.Init != "":
		return bad("image of init: this driver boots none")
	case needs.Init && !isFile(s.Init):
		return bad("image of init: not there")
	}
	line := s.Cmdline("")
	if len(line) > maxCmdline {
		return bad("kernel command line of %d bytes: want at most %d", len(line), maxCmdline)
	}
	for _, c := range s.Kernel.Args + line {
		if c < ' ' || c > '~' {
			return bad("kernel command line: want printable ASCII")
		}
	}
	return nil
}

func (s Spec) validateFiles() error {
	bad := errdefs.InvalidArgument.Errorf
	for i, layer := range s.Root.Layers {
		if !isFile(layer) {
			return bad("layer %d of the root file system: not there", i+1)
		}
	}
	switch {
	case len(s.Root.Layers) > MaxLayers:
		return bad("root file system of %d layers: want at most %d", len(s.Root.Layers), MaxLayers)
	case !isDir(s.RunDir):
		return bad("run directory: not there")
	case s.NetNS != "" && !isFile(s.NetNS):
		return bad("network namespace: not there")
	case !filepath.IsAbs(s.Console) || !isDir(filepath.Dir(s.Console)):
		return bad("console: its directory is not there")
	case s.Root.Overlay != "" && !isFile(s.Root.Overlay):
		return bad("overlay: not there")
	}
	return nil
}

func (s Spec) validateLink(needs Needs) error {
	bad := errdefs.InvalidArgument.Errorf
	if s.Link == nil {
		return nil
	}
	if s.Link.Kind != needs.Link {
		return bad("link of kind %.20q: this driver takes %q", s.Link.Kind, needs.Link)
	}
	if !linkName.MatchString(s.Link.Name) {
		return bad("link %.80q: not a link's name", s.Link.Name)
	}
	if mac, err := net.ParseMAC(s.Link.MAC); err != nil || len(mac) != 6 {
		return bad("MAC %.80q: not a MAC", s.Link.MAC)
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

// MaxFile is the size of the largest file that the VMM of a valid spec has to
// write: its overlay, or the guest's memory.
func (s Spec) MaxFile() int64 {
	size := max(minMaxFile, int64(s.MemMiB)<<20)
	if info, err := os.Stat(s.Root.Overlay); err == nil {
		size = max(size, info.Size())
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
