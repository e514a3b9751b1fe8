package vmm

// Needs says what a driver takes of a host and of a Spec.
type Needs struct {
	// Kernel: the driver boots Spec.Kernel. Without it the driver has a kernel
	// of its own, and a Spec names none.
	Kernel bool
	// Init: the driver boots Spec.Init. Without it a Spec names none.
	Init bool
	// Flat: the driver takes a root of one layer, an EROFS image, and an overlay that is an
	// empty file of the disk's size. What the guest writes there means nothing without the
	// VM: a snapshot's memory holds the disk, and a restored VM begins with an empty file
	// again, and with the very images that the other VM had.
	Flat bool
	// KVM: the driver runs no VM without KVM that boots guests.
	KVM bool
	// Link is the kind of link that the driver takes.
	Link LinkKind
	// Install is the command that installs what the driver starts, with a remark
	// behind a #.
	Install string
}

// Speed says how fast programs run in a guest. A greater Speed is faster.
type Speed int

// The speeds of guests.
const (
	// Emulated: the VMM translates the guest's code.
	Emulated Speed = iota + 1
	// NearNative: the CPU runs the guest's code, and a system call costs more
	// than on the host.
	NearNative
	// Native: the CPU runs the guest's code and its kernel's.
	Native
)

func (s Speed) String() string {
	switch s {
	case Emulated:
		return "emulated, 10 to 50 times slower than the host"
	case NearNative:
		return "near native, system calls cost more"
	case Native:
		return "native"
	}
	return "unknown"
}

// Isolation is what stands between a guest and the host, besides the jail that
// every driver puts around its VMM. The set is closed.
type Isolation string

// The kinds of isolation.
const (
	Hardware        Isolation = "hardware virtualisation"
	Paravirtual     Isolation = "paravirtualisation"
	Emulation       Isolation = "emulation"
	UserSpaceKernel Isolation = "a user-space kernel"
)

// HostCPU is the CPU of guests that see the host's.
const HostCPU = "host"

// Report is what a driver's Check found.
type Report struct {
	// Version of the VMM program.
	Version string
	// Accel is what runs the guest's code, in a word: "kvm", "tcg".
	Accel string
	// CPU is what guests see, in a word: HostCPU, "x86-64-v3".
	CPU string
	// Isolation and Speed are what follows for guests.
	Isolation Isolation
	Speed     Speed
	// Why gives the reason for this acceleration in a sentence.
	Why string
	// Warning names what works but should be mended; empty if nothing should.
	Warning string
}
