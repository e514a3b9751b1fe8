package sandbox

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Network gives sandboxes their namespaces; *network.Network is one.
type Network interface {
	Plan() network.Plan
	Setup(context.Context) error
	Acquire(context.Context, vmm.LinkKind) (network.Slot, error)
	Claim(network.Slot) error
	Release(network.Slot) error
	Open(context.Context, network.Slot) error
	Close(context.Context, network.Slot) error
	Strays(context.Context) ([]network.Slot, error)
	RemoveStrays(context.Context) ([]network.Slot, error)
	ParsePolicy(network.Egress) (network.Policy, error)
	SetPolicy(context.Context, network.Slot, network.Policy) error
	SetLimits(context.Context, network.Slot, network.Limits) error
	CheckAll(context.Context, []network.Slot) (network.Findings, error)
	Repair(context.Context, network.Slot, network.Policy, network.Limits) error
	Denied(context.Context, network.Slot, network.Policy) ([]network.Denial, error)
	CountersAll(context.Context) (map[network.Slot]network.Counters, error)
}

// Templates gives sandboxes their disks; *template.Store is one.
type Templates interface {
	Get(name string) (template.Template, error)
	Resolve(project, text string) (template.Info, template.Build, error)
	Root(template.Info, template.Build) (template.Template, error)
	RootOf(template, base string) (template.Template, error)
	Has(id, build string) bool
	List() ([]template.Info, error)
	CountSpawn(id string)
	Delete(ctx context.Context, id, tag string, inUse func(template.Info) error) error
	Prune(ctx context.Context, needed func(template.Info, template.Build) bool) error
	Unused(needed func(template.Info, template.Build) bool) ([]template.Unused, error)
	NewOverlay(ctx context.Context, path string, sizeMiB int) error
	NewDisk(ctx context.Context, path string, sizeMiB int) error
	CloneOverlay(ctx context.Context, path, from string) error
	Ready(ctx context.Context, id, build, key string) (template.Ready, error)
	StageReady(ctx context.Context, id, build string) (template.Stage, error)
	DropReady(id, build, key string) error
	Snapshot(ctx context.Context, id, build string) (template.Snapshot, error)
	StageSnapshot(context.Context, template.Naming) (template.SnapshotStage, error)
	Bytes(id, build string) int64
	Verify(ctx context.Context, want func(kind template.Kind, name string) bool, fn func(template.Verified) error) error
}

// Guest is a running guest; *guest.Client is one.
type Guest interface {
	WaitReady(context.Context) error
	Init(context.Context, guest.Init) (version string, err error)
	Quiesce(ctx context.Context, quiet bool) error
	Freeze(context.Context) (since time.Time, err error)
	Exec(context.Context, guest.Command) (guest.Result, error)
	Start(ctx context.Context, cmd guest.Command, tag string) (ended <-chan guest.Ended, err error)
	Unpack(ctx context.Context, dir, owner string, stream io.Reader) error
	Pack(ctx context.Context, path string, w io.Writer) error
	Metrics(context.Context) (guestapi.Metrics, error)
	Close()
}

// Config is what a Manager works with. Every field except Others and Quota must be set.
type Config struct {
	// StateDir holds the records and disks, under sandboxes/.
	StateDir string
	// RunDir holds a directory per running VM, for its sockets.
	RunDir string

	// Drivers run new VMs, the best first: a sandbox gets the first that can run it, unless
	// its create names one. There is one at least.
	Drivers []vmm.Driver
	// Others are drivers that run no new VMs: those that they started, and snapshots of
	// these, may still be there.
	Others    []vmm.Driver
	Network   Network
	Templates Templates
	// Guests connects to the guest at an address; it does no I/O.
	Guests func(addr netip.Addr, token string) Guest
	// KillStrays ends the VMs with a directory under runRoot or a cgroup
	// under parent whose name keep refuses, and returns those names;
	// launch.KillStrays is one.
	KillStrays func(ctx context.Context, runRoot, parent string, keep func(name string) bool) ([]string, error)
	// NetNSOf returns which of the network namespaces the VM of that name under
	// runRoot is in; launch.NetNSOf is one.
	NetNSOf func(runRoot, name string, paths []string) (string, error)

	Capacity Capacity
	// Quota returns the quota of a project. It may be nil for none, and does not wait
	// for sandboxes.
	Quota      func(project string) Quota
	OverlayMiB int
	// DNS are the resolvers that guests use.
	DNS []netip.Addr
	// GuestCA holds certificates in PEM that guests trust besides those of their template;
	// empty for none.
	GuestCA string
	// DiskBytes and DiskOps are what each sandbox may read from and write to its
	// disk in a second; zero for no limit.
	DiskBytes, DiskOps int64
	// BaseUID and a sandbox's slot add up to the user and group that its VMM
	// runs as, and no other.
	BaseUID int

	// BootTimeout bounds a create from the start of its VM until the guest
	// is ready.
	BootTimeout time.Duration
	// Warm is how many waiting guests of the default kind there are to be; WarmAuto is as
	// many as are not felt.
	Warm int
	// KeepStopped is how long the record of a sandbox that ended by itself
	// can still be read.
	KeepStopped time.Duration
	// KeepPaused is how long a sandbox may stay paused before it expires; 0
	// is for ever. A paused sandbox's own timeout stands still.
	KeepPaused time.Duration

	// MaxLife bounds the life that traffic gives a sandbox which it resumes; MaxTimeout
	// when zero.
	MaxLife time.Duration

	Log *slog.Logger

	// poolCalm is poolCalm unless a test sets it.
	poolCalm time.Duration
	// freeMem is set by tests, in place of what is available of the host's memory.
	freeMem func() int64
	// storeHook is set by tests: see store.hook.
	storeHook func(step string) error
	// freeDisk is set by tests, in place of what is free on the host's disk.
	freeDisk func() int64
}

// maxLife is MaxLife with its default.
func (c Config) maxLife() time.Duration {
	if c.MaxLife == 0 {
		return MaxTimeout
	}
	return c.MaxLife
}
