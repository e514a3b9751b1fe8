package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/gvisor"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
)

// DefaultStateDir is the state directory of the agent whose instance is "wrenn".
const DefaultStateDir = "/var/lib/wrenn"

// Config says how an agent works. Defaults returns one that is complete; errors
// about a value name the flag of `wrenn serve` that sets it.
type Config struct {
	// StateDir holds kernels, templates, disks and records. An agent has it alone.
	StateDir string
	// Version is what the agent says of itself.
	Version string

	// VMM is the name of a driver, or host.AutoVMM.
	VMM string
	// Firecracker and Jailer are Firecracker's programs. An empty Jailer is the
	// one in PATH, if there is one; "none" is to do without.
	Firecracker, Jailer string
	// Sentry is the path of gVisor's program.
	Sentry string
	// CPU is what QEMU's guests see without KVM, one of qemu.CPUs.
	CPU string

	// Listen is the TCP address of the API. Other machines may reach it only if there is
	// an API key.
	Listen string
	// TLSCert and TLSKey are files in PEM of what Listen shows; they are read again when
	// they change. TLSSelfSigned has an authority of the agent's own make them, in
	// StateDir, for Domain. Without any of these Listen speaks no TLS.
	TLSCert, TLSKey string
	TLSSelfSigned   bool
	// SocketGroup is the group, by name or number, whose members may command the host over
	// the agent's Unix socket, like root. Empty is no group.
	SocketGroup string
	// AllowHosts are host names by which clients may call the API, beside
	// localhost, Listen's host and the address that they connect to.
	AllowHosts []string
	// Domain is the domain below which the ports of sandboxes have names: clients of the
	// REST API are told it, and use <port>-<sandbox>.<Domain>.
	Domain string
	// Rates bound how often each API key may call.
	Rates auth.Rates
	// MaxTimeout is the longest life that a call of the REST API may ask for.
	MaxTimeout time.Duration
	// MaxConns bounds the connections of clients at a time, MaxConnsEach those of
	// one client. 0 is what the agent's descriptors allow, and a quarter of MaxConns.
	MaxConns, MaxConnsEach int

	// HostRange holds the addresses by which the host sees sandboxes, LinkRange
	// those of the links between them; IPv4 /16 each. The zero value is the range
	// that was used last, or a free one.
	HostRange, LinkRange netip.Prefix
	// Egress is what sandboxes may reach, unless their own policy says less.
	Egress network.Mode
	// Limits are those of each sandbox's network, unless its own are lower.
	Limits network.Limits
	// DNS are the resolvers of the guests; those of the host if empty.
	DNS []netip.Addr
	// GuestCA holds certificates in PEM that guests trust besides those of their template.
	GuestCA string
	// Pool is how many networks are kept built ahead of use.
	Pool int

	// OverlayMiB is the size of each sandbox's disk.
	OverlayMiB int
	// DiskBytes and DiskOps are what each sandbox may read from and write to its
	// disk in a second: bytes, and requests. 0 is no limit.
	DiskBytes, DiskOps int64
	// Capacity is what all sandboxes may take together.
	Capacity sandbox.Capacity
	// Warm is how many waiting guests are kept, or sandbox.WarmAuto.
	Warm int
	// MaxTemplateDiskMiB bounds what templates, images and the cache of builds take of the
	// disk together; 0 is no bound.
	MaxTemplateDiskMiB int
	// BootTimeout is how long a guest may take to come up.
	BootTimeout time.Duration
	// KeepStopped is how long a sandbox that ended by itself is remembered,
	// KeepPaused how long one may stay paused before it is destroyed; 0 is for ever.
	KeepStopped, KeepPaused time.Duration
	// DestroyAtEnd destroys all sandboxes when the agent ends. Otherwise they go
	// on, and the next agent on StateDir adopts them.
	DestroyAtEnd bool

	// Log must be set.
	Log *slog.Logger

	// parts are what tests replace; the zero value is the real ones.
	parts parts
}

// Defaults returns the settings of an agent about which nothing is said.
func Defaults() Config {
	cpus := runtime.NumCPU()
	return Config{
		StateDir: DefaultStateDir, Version: "dev",
		VMM: host.AutoVMM, Firecracker: "firecracker", CPU: qemu.DefaultCPU,
		Listen: "127.0.0.1:50051", Domain: "localhost",
		Rates: auth.Rates{Requests: 50, Burst: 100, Creates: 5, CreatesBurst: 10}, MaxTimeout: 24 * time.Hour,
		Egress: network.Public, Pool: 4,
		OverlayMiB: 4096, DiskBytes: 256 << 20, DiskOps: 16384,
		Capacity: sandbox.Capacity{
			Resources: sandbox.Resources{Sandboxes: 1000, VCPUs: 32 * cpus, MemMiB: machineMemMiB() * 9 / 10},
			Starts:    max(2, cpus), StartQueue: 2 * time.Minute, FreeDiskMiB: 512,
		},
		Warm: sandbox.WarmAuto, BootTimeout: 2 * time.Minute, KeepStopped: time.Hour,
		Log: slog.New(slog.DiscardHandler),
	}
}

// machineMemMiB is the memory of this machine.
func machineMemMiB() int {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 1024
	}
	return int(info.Totalram * uint64(info.Unit) >> 20)
}

// Check returns every value of c that no agent can work with.
func (c Config) Check() error {
	_, err := c.plan()
	errs := []error{err, c.checkListen(), c.checkNames(), c.checkNetwork()}
	for _, least := range []struct {
		flag     string
		n, least int
	}{
		{"pool", c.Pool, 0}, {"warm", c.Warm, sandbox.WarmAuto}, {"disk", c.OverlayMiB, 64},
		{"max-sandboxes", c.Capacity.Sandboxes, 1}, {"max-vcpus", c.Capacity.VCPUs, 1},
		{"max-memory", c.Capacity.MemMiB, 1}, {"max-starts", c.Capacity.Starts, 1}, {"max-template-disk", c.MaxTemplateDiskMiB, 0},
	} {
		if least.n < least.least {
			errs = append(errs, fmt.Errorf("--%s is too small", least.flag))
		}
	}
	if r := c.Rates; !(r.Requests >= 0) || !(r.Creates >= 0) || c.MaxTimeout < time.Second {
		errs = append(errs, errors.New("--rate and --create-rate must not be negative; --max-timeout at least 1s"))
	}
	if c.MaxConns < 0 || c.MaxConnsEach < 0 {
		errs = append(errs, errors.New("--max-connections and --max-client-connections must not be negative"))
	}
	if c.BootTimeout <= 0 || c.Capacity.StartQueue <= 0 || c.KeepStopped < 0 || c.KeepPaused < 0 ||
		c.Capacity.DiskMiB < 0 || c.Capacity.FreeDiskMiB < 0 {
		errs = append(errs, errors.New(
			"--boot-timeout and --start-queue must be positive; --keep-stopped, --keep-paused, --max-disk and --keep-free not negative"))
	}
	if c.DiskBytes < 0 {
		errs = append(errs, errors.New("--disk-rate must not be negative"))
	}
	if c.DiskOps < 0 || c.DiskOps > 1_000_000_000 {
		errs = append(errs, errors.New("--disk-iops must be 0 to 1000000000"))
	}
	if err := c.Limits.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("--net-in, --net-out, --net-connections: %w", err))
	}
	return errors.Join(errs...)
}

func (c Config) checkListen() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return errors.New("--tls-cert and --tls-key belong together: give both")
	}
	if c.TLSSelfSigned && c.TLSCert != "" {
		return errors.New("--tls-self-signed makes a certificate: give it or --tls-cert and --tls-key")
	}
	return nil
}

// onLoopback says that no other machine reaches Listen.
func (c Config) onLoopback() bool {
	host, _, err := net.SplitHostPort(c.Listen)
	ip, perr := netip.ParseAddr(host)
	return err == nil && (host == "localhost" || perr == nil && ip.IsLoopback())
}

// checkKeys refuses an agent that others reach while there is no key, with which
// each of them would command this host.
func (c Config) checkKeys(keys *auth.Store) error {
	if c.onLoopback() {
		return nil
	}
	made, err := keys.Any()
	if err != nil || made {
		return err
	}
	return errdefs.WrongState.Errorf("--listen %s can be reached from other machines, and there is no API key yet: "+
		"make one with `wrenn key create --state-dir %s`, or listen on loopback", c.Listen, c.StateDir)
}

// domainPattern matches names of labels of letters, digits and inner dashes.
var domainPattern = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (c Config) checkNames() error {
	var errs []error
	if !domainPattern.MatchString(c.Domain) || len(c.Domain) > 200 {
		errs = append(errs, fmt.Errorf("--domain %q is no domain name: give it in lower case, without scheme, port or wildcard", c.Domain))
	}
	for _, name := range c.names() {
		if _, err := netip.ParseAddr(name); err != nil && strings.ContainsAny(name, ":/*@ ") {
			errs = append(errs, fmt.Errorf(
				"--allow-host %q is neither a host name nor an address: give it without scheme, port or wildcard", name))
		}
	}
	return errors.Join(errs...)
}

func (c Config) checkNetwork() error {
	var errs []error
	if _, err := network.ParseMode(string(c.Egress)); err != nil {
		errs = append(errs, fmt.Errorf("--egress: %w", err))
	}
	for _, addr := range c.DNS {
		if !network.ReachableResolver(addr) {
			errs = append(errs, fmt.Errorf(
				"--dns %s: guests cannot reach it: they speak IPv4, and not to loopback or link-local addresses", addr))
		}
	}
	return errors.Join(errs...)
}

// names are the host names by which clients may call the agent, as far as the
// settings say them.
func (c Config) names() []string {
	var names []string
	if host, _, err := net.SplitHostPort(c.Listen); err == nil && host != "" {
		if ip, err := netip.ParseAddr(host); err != nil || !ip.IsUnspecified() {
			names = append(names, host)
		}
	}
	// The first is the API's usual name, the second that of all sandboxes for clients that
	// name theirs in a header.
	names = append(names, "api."+c.Domain, "sandbox."+c.Domain, c.Domain)
	return append(names, c.AllowHosts...)
}

// conns returns MaxConns and MaxConnsEach with their defaults. Clients, and the
// connections to guests that they cause, leave half of the descriptors to the
// agent.
func (c Config) conns() (most, each int) {
	most, each = c.MaxConns, c.MaxConnsEach
	if most == 0 {
		most = 16384
		var files unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
			most /= 16
		} else {
			most = int(min(uint64(most), max(16, files.Cur/4)))
		}
	}
	if each == 0 {
		each = max(1, most/4)
	}
	return most, each
}

// resolvers returns DNS with its default.
func (c Config) resolvers() []netip.Addr {
	if len(c.DNS) > 0 {
		return c.DNS
	}
	return network.Resolvers()
}

// instance is the prefix of everything that an agent makes outside its state
// directory. It follows from that directory, so that agents with directories of
// their own share a host without settings.
func instance(stateDir string) string {
	if stateDir == DefaultStateDir {
		return "wrenn"
	}
	return fmt.Sprintf("wrenn%x", sha256.Sum256([]byte(stateDir)))[:len("wrenn")+4]
}

// rangesFile is where the address ranges in use are recorded.
func (c Config) rangesFile() string { return filepath.Join(c.StateDir, "network.json") }

// plan returns the address plan, without the ranges that c leaves to be chosen.
func (c Config) plan() (network.Plan, error) {
	var errs []error
	if !filepath.IsAbs(c.StateDir) {
		errs = append(errs, fmt.Errorf("--state-dir %q is no absolute path", c.StateDir))
	}
	plan := network.Plan{Instance: instance(c.StateDir), Hosts: c.HostRange, Veths: c.LinkRange}
	if err := plan.ValidateGiven(); err != nil {
		errs = append(errs, err)
	}
	if c.VMM != host.AutoVMM && !slices.Contains(VMMs(), c.VMM) {
		errs = append(errs, fmt.Errorf("--vmm %q is unknown: use %s or %s", c.VMM, host.AutoVMM, strings.Join(VMMs(), ", ")))
	}
	if !slices.Contains(qemu.CPUs(), c.CPU) {
		errs = append(errs, fmt.Errorf("--cpu %q is unknown: use %s", c.CPU, strings.Join(qemu.CPUs(), ", ")))
	}
	return plan, errors.Join(errs...)
}

// VMMs are the names of all drivers.
func VMMs() []string { return []string{firecracker.Name, gvisor.Name, qemu.Name} }

// drivers returns the driver of each VMM, of two with guests as fast the better one first. To see whether KVM
// works they boot the prepared kernel, unless the result of an earlier boot is kept.
func (c Config) drivers() []vmm.Driver {
	kernel := filepath.Join(c.StateDir, "kernels", "default")
	probe := func(name string) kvm.Probe {
		return kvm.Probe{
			CacheFile: filepath.Join(c.StateDir, "kvm-probe-"+name+".json"),
			Kernel:    filepath.Join(kernel, "vmlinux"), Initrd: filepath.Join(kernel, "initrd.img"),
			UID: probeUID, GID: probeUID,
		}
	}
	return []vmm.Driver{
		firecracker.New(firecracker.Config{Binary: c.Firecracker, Jailer: c.Jailer, Probe: probe(firecracker.Name)}),
		qemu.New(qemu.Config{Probe: probe(qemu.Name), CPU: c.CPU}),
		gvisor.New(gvisor.Config{Sentry: c.Sentry, UID: probeUID, GID: probeUID}),
	}
}

// CheckHost returns what is wrong with the settings that setup and doctor have,
// too: StateDir, VMM, CPU and the ranges.
func (c Config) CheckHost() error {
	_, err := c.plan()
	return err
}

// Doctor looks at everything that this host needs to run an agent; envd is the
// path of the guest daemon that the initrd should hold.
func (c Config) Doctor(ctx context.Context, envd string) ([]host.Check, error) {
	plan, err := c.plan()
	if err != nil {
		return nil, err
	}
	// A record that only root can read is no fault of the host's.
	if recorded, err := plan.ReadRanges(c.rangesFile()); err == nil {
		plan = recorded
	}
	return host.Doctor(ctx, host.Options{StateDir: c.StateDir, Envd: envd, Drivers: c.drivers(), VMM: c.VMM, Plan: plan}), nil
}
