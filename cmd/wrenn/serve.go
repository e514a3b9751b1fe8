package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/gateway"
	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/server"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
)

const defaultStateDir = "/var/lib/wrenn"

func stateDirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "state-dir", env("WRENN_STATE_DIR", defaultStateDir), "directory of kernels, templates, disks and records (env WRENN_STATE_DIR)")
}

// hostConfig is what serve and doctor know of the host.
type hostConfig struct {
	stateDir    string
	vmm         string
	firecracker string
	jailer      string
	hosts       string
	links       string
}

func (c *hostConfig) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	stateDirFlag(cmd, &c.stateDir)
	f.StringVar(&c.vmm, "vmm", env("WRENN_VMM", "auto"), "VMM to run sandboxes with: auto, firecracker or qemu (env WRENN_VMM)")
	f.StringVar(&c.firecracker, "firecracker", env("WRENN_FIRECRACKER", "firecracker"), "Firecracker's program (env WRENN_FIRECRACKER)")
	f.StringVar(&c.jailer, "jailer", env("WRENN_JAILER", ""), "its jailer; empty for the one in PATH, if there is one, none to do without (env WRENN_JAILER)")
	f.StringVar(&c.hosts, "host-range", env("WRENN_HOST_RANGE", ""), "IPv4 /16 by which the host sees its sandboxes; empty for the one used last, or a free one (env WRENN_HOST_RANGE)")
	f.StringVar(&c.links, "link-range", env("WRENN_LINK_RANGE", ""), "IPv4 /16 of the links between host and sandboxes; empty for the one used last, or a free one (env WRENN_LINK_RANGE)")
}

// instance is the prefix of all that this agent makes outside its state
// directory. It follows from that directory, so that agents with directories
// of their own share a host without settings.
func instance(stateDir string) string {
	if stateDir == defaultStateDir {
		return "wrenn"
	}
	return fmt.Sprintf("wrenn%x", sha256.Sum256([]byte(stateDir)))[:len("wrenn")+4]
}

// rangesFile is where the address ranges in use are recorded.
func (c *hostConfig) rangesFile() string { return filepath.Join(c.stateDir, "network.json") }

// plan checks the settings and returns them as a plan, of which the ranges that
// no flag names are left to be chosen; all problems at once.
func (c *hostConfig) plan() (network.Plan, error) {
	var errs []error
	dir, err := filepath.Abs(c.stateDir)
	if err != nil {
		errs = append(errs, fmt.Errorf("--state-dir: %w", err))
	}
	c.stateDir = dir
	plan := network.Plan{Instance: instance(dir)}
	for flag, r := range map[string]struct {
		text string
		to   *netip.Prefix
	}{"host-range": {c.hosts, &plan.Hosts}, "link-range": {c.links, &plan.Veths}} {
		if r.text == "" {
			continue
		}
		if *r.to, err = netip.ParsePrefix(r.text); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	if len(errs) == 0 {
		if err := plan.ValidateGiven(); err != nil {
			errs = append(errs, err)
		}
	}
	if c.vmm != host.AutoVMM && c.vmm != firecracker.Name && c.vmm != qemu.Name {
		errs = append(errs, fmt.Errorf("--vmm %q is unknown: use auto, firecracker or qemu", c.vmm))
	}
	return plan, errors.Join(errs...)
}

// drivers returns those of all VMMs, the best one first. To see whether KVM
// works they boot the prepared kernel; retry boots it again where it was too slow
// the last time.
func (c *hostConfig) drivers(retry bool) []vmm.Driver {
	kernel := filepath.Join(c.stateDir, "kernels", "default")
	probe := func(name string) kvm.Probe {
		return kvm.Probe{
			CacheFile: filepath.Join(c.stateDir, "kvm-probe-"+name+".json"),
			Kernel:    filepath.Join(kernel, "vmlinux"), Initrd: filepath.Join(kernel, "initrd.img"),
			UID: probeUID, GID: probeUID,
			Retry: retry,
		}
	}
	return []vmm.Driver{
		firecracker.New(firecracker.Config{Binary: c.firecracker, Jailer: c.jailer, Probe: probe(firecracker.Name)}),
		qemu.New(qemu.Config{Probe: probe(qemu.Name)}),
	}
}

type serveConfig struct {
	hostConfig
	listen     string
	insecure   bool
	allowHost  string
	onShutdown string
	dns        string
	egress     string
	pool       int
	warm       int
	warmErr    error // of its environment variable
	netIn      string
	netOut     string
	limits     network.Limits
	overlayMiB int
	diskRate   string
	diskBytes  int64 // what it says
	diskOps    int64
	capacity   sandbox.Capacity
	boot       time.Duration
	keep       time.Duration
	keepPaused time.Duration
	logFormat  string
	verbose    bool

	maxConns, maxConnsEach int
}

// machineMemMiB is the memory of this machine.
func machineMemMiB() int {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 1024
	}
	return int(info.Totalram * uint64(info.Unit) >> 20)
}

func newServe() *cobra.Command {
	var c serveConfig
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the host agent",
		Long: `Run the host agent of this machine. It needs root, and what 'wrenn setup' has
prepared. Sandboxes outlive it: the next agent on the same state directory
adopts those that run.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.serve(cmd.Context()) },
	}
	c.hostConfig.flags(cmd)
	cpus := runtime.NumCPU()
	f := cmd.Flags()
	f.StringVar(&c.listen, "listen", env("WRENN_LISTEN", "127.0.0.1:50051"), "address of the API (env WRENN_LISTEN)")
	f.BoolVar(&c.insecure, "insecure", false, "let --listen name an address that others can reach; the API has no authentication")
	f.StringVar(&c.allowHost, "allow-host", env("WRENN_ALLOW_HOST", ""), "host names, comma-separated, by which clients may call the API, beside localhost and the address they connect to (env WRENN_ALLOW_HOST)")
	f.IntVar(&c.maxConns, "max-connections", 0, "most connections of clients at a time; 0 is 16384, or a quarter of the descriptors that the agent may have")
	f.IntVar(&c.maxConnsEach, "max-client-connections", 0, "most connections of one client address at a time; 0 is a quarter of --max-connections")
	f.StringVar(&c.onShutdown, "on-shutdown", env("WRENN_ON_SHUTDOWN", "leave"), "what becomes of sandboxes: leave (for the next agent) or destroy (env WRENN_ON_SHUTDOWN)")
	f.StringVar(&c.dns, "dns", env("WRENN_DNS", ""), "resolvers of the guests, comma-separated; the host's own when empty (env WRENN_DNS)")
	f.StringVar(&c.egress, "egress", env("WRENN_EGRESS", string(network.Public)), "what sandboxes may reach: public (the internet, no private networks), none, or all (env WRENN_EGRESS)")
	f.StringVar(&c.netIn, "net-in", env("WRENN_NET_IN", "0"), "bytes per second into each sandbox, like 10M or 64KiB; 0 is no limit (env WRENN_NET_IN)")
	f.StringVar(&c.netOut, "net-out", env("WRENN_NET_OUT", "0"), "bytes per second out of each sandbox (env WRENN_NET_OUT)")
	f.IntVar(&c.limits.Connections, "net-connections", 0, "most connections at a time that each sandbox may have begun; 0 is a 128th of the host's connection table, and more than that is none")
	f.IntVar(&c.pool, "pool", 4, "networks kept built ahead of use")
	warm, err := strconv.Atoi(env("WRENN_WARM", "0"))
	c.warmErr = err
	f.IntVar(&c.warm, "warm", warm, "guests of the default template and size kept running ahead of use, so that a create need not start one; they take room until a sandbox needs it (env WRENN_WARM)")
	f.IntVar(&c.overlayMiB, "disk", 4096, "size of each sandbox's disk in MiB; it takes only what is written")
	f.StringVar(&c.diskRate, "disk-rate", "256MiB", "bytes per second that each sandbox may read from and write to its disk, like 100M or 64KiB; 0 is no limit")
	f.Int64Var(&c.diskOps, "disk-iops", 16384, "reads and writes of its disk per second that each sandbox may make; 0 is no limit")
	f.IntVar(&c.capacity.Sandboxes, "max-sandboxes", 1000, "most sandboxes at a time")
	f.IntVar(&c.capacity.VCPUs, "max-vcpus", 32*cpus, "most virtual CPUs of all sandboxes together")
	f.IntVar(&c.capacity.MemMiB, "max-memory", machineMemMiB()*9/10, "most memory of all sandboxes together, in MiB")
	f.IntVar(&c.capacity.DiskMiB, "max-disk", 0, "most disk of all sandboxes together, in MiB of their full sizes; 0 is 16 times what is free, since disks take only what is written")
	f.IntVar(&c.capacity.FreeDiskMiB, "keep-free", 512,
		"MiB that stay free on the state directory's file system: "+
			"with less, nothing new is made, and sandboxes that write more than their share stand still")
	f.IntVar(&c.capacity.Starts, "max-starts", max(2, cpus), "most VMs starting at a time; others wait")
	f.DurationVar(&c.capacity.StartQueue, "start-queue", 2*time.Minute, "how long a create waits for its turn to start")
	f.DurationVar(&c.boot, "boot-timeout", 2*time.Minute, "how long a guest may take to come up")
	f.DurationVar(&c.keepPaused, "keep-paused", 0, "how long a sandbox may stay paused before it is destroyed; 0 is for ever")
	f.DurationVar(&c.keep, "keep-stopped", time.Hour, "how long a sandbox that ended by itself is remembered")
	f.StringVar(&c.logFormat, "log-format", env("WRENN_LOG_FORMAT", "text"), "text or json (env WRENN_LOG_FORMAT)")
	f.BoolVarP(&c.verbose, "verbose", "v", false, "log more")
	return cmd
}

// check validates the settings, all problems at once.
func (c *serveConfig) check() (network.Plan, []netip.Addr, error) {
	plan, err := c.plan()
	errs := []error{err}
	host, _, err := net.SplitHostPort(c.listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("--listen: %w", err))
	} else if ip, err := netip.ParseAddr(host); !c.insecure && host != "localhost" && (err != nil || !ip.IsLoopback()) {
		errs = append(errs, fmt.Errorf("--listen %s can be reached from outside, and whoever reaches it commands this host: use a loopback address, or --insecure if something else guards it", c.listen))
	}
	errs = append(errs, c.checkDoor()...)
	if c.onShutdown != "leave" && c.onShutdown != "destroy" {
		errs = append(errs, fmt.Errorf("--on-shutdown %q is unknown: use leave or destroy", c.onShutdown))
	}
	if c.logFormat != "text" && c.logFormat != "json" {
		errs = append(errs, fmt.Errorf("--log-format %q is unknown: use text or json", c.logFormat))
	}
	if c.warmErr != nil {
		errs = append(errs, fmt.Errorf("WRENN_WARM: %w", c.warmErr))
	}
	if _, err := network.ParseMode(c.egress); err != nil {
		errs = append(errs, fmt.Errorf("--egress: %w", err))
	}
	for name, n := range map[string]int{
		"pool": c.pool + 1, "warm": c.warm + 1,
		"disk": c.overlayMiB - 63, "max-sandboxes": c.capacity.Sandboxes, "max-vcpus": c.capacity.VCPUs,
		"max-memory": c.capacity.MemMiB, "max-starts": c.capacity.Starts,
	} {
		if n < 1 {
			errs = append(errs, fmt.Errorf("--%s is too small", name))
		}
	}
	if c.boot <= 0 || c.capacity.StartQueue <= 0 || c.keep < 0 || c.keepPaused < 0 || c.capacity.DiskMiB < 0 || c.capacity.FreeDiskMiB < 0 {
		errs = append(errs, errors.New("--boot-timeout and --start-queue must be positive; --keep-stopped, --keep-paused, --max-disk and --keep-free not negative"))
	}
	for flag, limit := range map[string]struct {
		text string
		rate *int64
	}{"net-in": {c.netIn, &c.limits.InBytes}, "net-out": {c.netOut, &c.limits.OutBytes}, "disk-rate": {c.diskRate, &c.diskBytes}} {
		if *limit.rate, err = parseRate(limit.text); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	if c.diskOps < 0 || c.diskOps > 1_000_000_000 {
		errs = append(errs, errors.New("--disk-iops must be 0 to 1000000000"))
	}
	if err := c.limits.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("--net-in, --net-out, --net-connections: %w", err))
	}
	dns := network.Resolvers()
	if c.dns != "" {
		dns = nil
		for _, s := range strings.Split(c.dns, ",") {
			addr, err := netip.ParseAddr(strings.TrimSpace(s))
			if err != nil {
				errs = append(errs, fmt.Errorf("--dns: %w", err))
			} else if !network.ReachableResolver(addr) {
				errs = append(errs, fmt.Errorf("--dns %s: guests cannot reach it: they speak IPv4, and not to loopback or link-local addresses", addr))
			}
			dns = append(dns, addr)
		}
	}
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("the host agent needs root: sudo wrenn serve"))
	}
	return plan, dns, errors.Join(errs...)
}

func (c *serveConfig) logger() *slog.Logger {
	opts := &slog.HandlerOptions{}
	if c.verbose {
		opts.Level = slog.LevelDebug
	}
	out := printer{os.Stderr} // what guests and VMMs say is in it
	if c.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(out, opts))
	}
	return slog.New(slog.NewTextHandler(out, opts))
}

// shutdownTimeout bounds the end of the agent.
const shutdownTimeout = 30 * time.Second

// names are the host names of this agent that its flags say.
func (c *serveConfig) names() []string {
	names := []string{}
	if host, _, err := net.SplitHostPort(c.listen); err == nil && host != "" {
		if ip, err := netip.ParseAddr(host); err != nil || !ip.IsUnspecified() {
			names = append(names, host)
		}
	}
	for _, name := range strings.Split(c.allowHost, ",") {
		if name = strings.TrimSpace(name); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// checkDoor returns what is wrong with the settings of the API's server.
func (c *serveConfig) checkDoor() []error {
	var errs []error
	for _, name := range c.names() {
		if _, err := netip.ParseAddr(name); err != nil && strings.ContainsAny(name, ":/*@ ") {
			errs = append(errs, fmt.Errorf("--allow-host %q is neither a host name nor an address: give it without scheme, port or wildcard", name))
		}
	}
	if c.maxConns == 0 {
		c.maxConns = defaultConns()
	}
	if c.maxConnsEach == 0 {
		c.maxConnsEach = max(1, c.maxConns/4)
	}
	if c.maxConns < 1 || c.maxConnsEach < 1 {
		errs = append(errs, errors.New("--max-connections and --max-client-connections must not be negative"))
	}
	return errs
}

// defaultConns is how many connections clients may have: what they and the way
// to the guests take leaves half of the descriptors to the agent.
func defaultConns() int {
	const most = 16384
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return most / 16
	}
	return int(min(most, max(16, files.Cur/4)))
}

// door returns the server of the API; slots counts the network's slots.
func (c *serveConfig) door(manager *sandbox.Manager, version server.Version, slots func() map[string]int, log *slog.Logger) *gateway.Gateway {
	var panics atomic.Int64
	mux := http.NewServeMux()
	door := gateway.New(gateway.Config{
		Sandboxes: manager, Control: mux, Names: c.names(), Panics: &panics, Log: log,
		MaxConns: c.maxConns, MaxConnsEach: c.maxConnsEach,
	})
	mux.Handle(server.New(manager, version, &panics, log))
	mux.Handle("/", server.Health(manager))
	mux.Handle("GET /metrics", server.Metrics(manager, slots, func() server.Edge {
		return server.Edge{Panics: panics.Load(), RefusedConnections: door.Refused()}
	}))
	return door
}

func (c *serveConfig) serve(ctx context.Context) (err error) {
	plan, dns, err := c.check()
	if err != nil {
		return err
	}
	// Whoever reads the log may go away: that is no reason to end.
	signal.Ignore(syscall.SIGPIPE)
	log := c.logger()
	templates, err := template.Open(c.stateDir, log)
	if err != nil {
		return err
	}
	if _, err := templates.Get("minimal"); err != nil {
		return fmt.Errorf("%w; prepare this host with `wrenn setup --state-dir %s`", err, c.stateDir)
	}
	chosen, err := host.Choose(ctx, c.vmm, c.drivers(false))
	if err != nil {
		return fmt.Errorf("%w; `wrenn doctor` says more", err)
	}
	name, report := chosen.Driver.Name(), chosen.Report
	log.Info("vmm chosen", "vmm", name, "version", report.Version, "accel", report.Accel, "why", chosen.Why)
	if report.Warning != "" {
		log.Warn("vmm runs with less than it could have", "vmm", name, "why", report.Warning)
	}

	// The listener comes first: an address in use is found before anything
	// is touched.
	listener, err := net.Listen("tcp", c.listen)
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("listen: %w: is it another agent? Name another address with --listen", err)
		}
		return fmt.Errorf("listen: %w", err)
	}
	defer listener.Close()

	uids, err := claimUIDs(uidClaims, c.stateDir)
	if err != nil {
		return err
	}
	cfg := c.managerConfig(plan, uids, chosen, templates, log)
	net := network.New(plan, network.Options{
		BaseUID: cfg.BaseUID, Egress: network.Policy{Mode: network.Mode(c.egress)}, Limits: c.limits,
		Resolvers: dns, Pool: c.pool, RangesFile: c.rangesFile(), Log: log,
	})
	cfg.Network = net
	cfg.Capacity, cfg.OverlayMiB, cfg.DNS = c.capacity, c.overlayMiB, dns
	cfg.DiskBytes, cfg.DiskOps = c.diskBytes, c.diskOps
	cfg.BootTimeout, cfg.KeepStopped, cfg.KeepPaused, cfg.Warm = c.boot, c.keep, c.keepPaused, c.warm
	// Whoever ends us now waits until the state is taken over, and is then
	// served as always: half a recovery would leave rules and routes that
	// nobody looks after.
	manager, found, err := sandbox.Open(context.WithoutCancel(ctx), cfg)
	if err != nil {
		return err
	}
	log.Info("state taken over: "+found.String(), "dir", c.stateDir, "host_range", net.Plan().Hosts, "link_range", net.Plan().Veths)
	if c.dns == "" && len(network.HostResolvers()) == 0 {
		log.Warn("the host has no resolver that a guest can reach; guests ask public ones, --dns names others", "dns", dns)
	}
	pool, endPool := context.WithCancel(context.WithoutCancel(ctx))
	pooled := make(chan struct{})
	go func() { defer close(pooled); net.Run(pool) }()
	defer func() { endPool(); <-pooled }()

	version := server.Version{Version: buildVersion(), VMM: name, VMMVersion: report.Version + " (" + report.Accel + ")"}
	door := c.door(manager, version, func() map[string]int { return net.Stats().ByState() }, log)

	served := make(chan error, 1)
	go func() { served <- door.Serve(listener) }()
	log.Info("serving", "listen", listener.Addr().String(), "pid", strconv.Itoa(os.Getpid()))

	select {
	case err = <-served:
	case <-ctx.Done():
		log.Info("shutting down", "sandboxes", c.onShutdown)
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	// New calls are refused from here on; those in progress may end while the
	// manager winds up. Streams do not end by themselves.
	drained := make(chan error, 1)
	go func() { drained <- door.Shutdown(end) }()
	merr := manager.Shutdown(end, c.onShutdown == "destroy")
	door.Close()
	<-drained
	endPool()
	<-pooled
	net.Detach()
	if merr == nil && len(manager.List(false)) == 0 {
		// Nothing needs the host's rules, routes and users any more.
		merr = errors.Join(net.Teardown(end), releaseUIDs(uidClaims, uids))
	}
	return errors.Join(err, merr)
}
