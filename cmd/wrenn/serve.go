package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/certs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
)

// hostFlags are the flags that serve, setup and doctor share.
type hostFlags struct {
	agent.Config
	hostRange, linkRange string
	guestCA              string
}

func newHostFlags(cmd *cobra.Command) *hostFlags {
	c := &hostFlags{Config: agent.Defaults()}
	c.Version = buildVersion()
	f := cmd.Flags()
	f.StringVar(&c.StateDir, "state-dir", env("WRENN_STATE_DIR", c.StateDir),
		"directory of kernels, templates, disks and records (env WRENN_STATE_DIR)")
	f.StringVar(&c.VMM, "vmm", env("WRENN_VMM", c.VMM),
		"VMM of sandboxes that name none: auto, "+strings.Join(agent.VMMs(), ", ")+" (env WRENN_VMM)")
	f.StringVar(&c.CPU, "cpu", env("WRENN_CPU", c.CPU),
		"CPU that guests see without KVM: "+strings.Join(qemu.CPUs(), ", ")+"; with KVM they see the host's (env WRENN_CPU)")
	f.StringVar(&c.Firecracker, "firecracker", env("WRENN_FIRECRACKER", c.Firecracker), "Firecracker's program (env WRENN_FIRECRACKER)")
	f.StringVar(&c.Jailer, "jailer", env("WRENN_JAILER", c.Jailer),
		"its jailer; empty for the one in PATH, if there is one, none to do without (env WRENN_JAILER)")
	f.StringVar(&c.Sentry, "sentry", env("WRENN_SENTRY", beside("sentry")), "gVisor's program (env WRENN_SENTRY)")
	f.StringVar(&c.hostRange, "host-range", env("WRENN_HOST_RANGE", ""),
		"IPv4 /16 by which the host sees its sandboxes; empty for the one used last, or a free one (env WRENN_HOST_RANGE)")
	f.StringVar(&c.linkRange, "link-range", env("WRENN_LINK_RANGE", ""),
		"IPv4 /16 of the links between host and sandboxes; empty for the one used last, or a free one (env WRENN_LINK_RANGE)")
	f.StringVar(&c.guestCA, "guest-ca", env("WRENN_GUEST_CA", ""),
		"file of certificates in PEM that guests trust besides their own, as behind a proxy that opens TLS (env WRENN_GUEST_CA)")
	return c
}

// parse fills in the settings that the flags have as text.
func (c *hostFlags) parse() error {
	var errs []error
	dir, err := filepath.Abs(c.StateDir)
	if err != nil {
		errs = append(errs, fmt.Errorf("--state-dir: %w", err))
	}
	c.StateDir = dir
	for _, r := range []struct {
		flag, text string
		to         *netip.Prefix
	}{{"host-range", c.hostRange, &c.HostRange}, {"link-range", c.linkRange, &c.LinkRange}} {
		if r.text == "" {
			continue
		}
		if *r.to, err = netip.ParsePrefix(r.text); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", r.flag, err))
		}
	}
	if c.guestCA != "" {
		if c.GuestCA, err = certs.ReadBundle(c.guestCA); err != nil {
			errs = append(errs, fmt.Errorf("--guest-ca: %w", err))
		}
	}
	return errors.Join(errs...)
}

// host returns the settings that setup and doctor have.
func (c *hostFlags) host() (agent.Config, error) {
	if err := c.parse(); err != nil {
		return agent.Config{}, err
	}
	return c.Config, c.CheckHost()
}

// serveFlags are the flags of serve.
type serveFlags struct {
	*hostFlags
	allowHost, onShutdown, dns, egress string
	netIn, netOut, diskRate            string
	warm                               string
	logFormat                          string
	verbose                            bool
}

func newServe() *cobra.Command {
	var c serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the host agent",
		Long: `Run the host agent of this machine. It needs root, and what 'wrenn setup' has
prepared. Sandboxes outlive it: the next agent on the same state directory
adopts those that run.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.config()
			if err != nil {
				return err
			}
			// A reader of the log that goes away is no reason to end.
			signal.Ignore(syscall.SIGPIPE)
			a, err := agent.New(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			return a.Run(cmd.Context())
		},
	}
	c.hostFlags = newHostFlags(cmd)
	c.apiFlags(cmd)
	c.networkFlags(cmd)
	c.sandboxFlags(cmd)
	return cmd
}

func (c *serveFlags) apiFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.Listen, "listen", env("WRENN_LISTEN", c.Listen), "address of the API (env WRENN_LISTEN)")
	f.StringVar(&c.TLSCert, "tls-cert", env("WRENN_TLS_CERT", ""),
		"certificate that --listen shows, with its chain, in PEM; read again when it changes (env WRENN_TLS_CERT)")
	f.StringVar(&c.TLSKey, "tls-key", env("WRENN_TLS_KEY", ""), "the certificate's key in PEM (env WRENN_TLS_KEY)")
	f.BoolVar(&c.TLSSelfSigned, "tls-self-signed", false,
		"speak TLS with a certificate for --domain of an authority that the agent makes; 'wrenn env' tells clients of it")
	f.StringVar(&c.SocketGroup, "socket-group", env("WRENN_SOCKET_GROUP", ""),
		"group whose members command this host over the agent's Unix socket, as root does; none when empty (env WRENN_SOCKET_GROUP)")
	f.StringVar(&c.allowHost, "allow-host", env("WRENN_ALLOW_HOST", ""),
		"host names, comma-separated, by which clients may call the API, beside localhost and the address they connect to (env WRENN_ALLOW_HOST)")
	f.StringVar(&c.Domain, "domain", env("WRENN_DOMAIN", c.Domain),
		"domain below which ports of sandboxes have names, <port>-<sandbox>.<domain>; it and its subdomains must lead here (env WRENN_DOMAIN)")
	f.Float64Var(&c.Rates.Requests, "rate", c.Rates.Requests,
		"requests per second of each API key, twice as many at once; 0 is no limit")
	f.Float64Var(&c.Rates.Creates, "create-rate", c.Rates.Creates,
		"sandboxes that each API key may make per second, twice as many at once; 0 is no limit")
	f.DurationVar(&c.MaxTimeout, "max-timeout", c.MaxTimeout, "longest life that a request to the REST API may ask for")
	f.IntVar(&c.MaxConns, "max-connections", c.MaxConns,
		"most connections of clients at a time; 0 is 16384, or a quarter of the descriptors that the agent may have")
	f.IntVar(&c.MaxConnsEach, "max-client-connections", c.MaxConnsEach,
		"most connections of one client address at a time; 0 is a quarter of --max-connections")
	f.StringVar(&c.logFormat, "log-format", env("WRENN_LOG_FORMAT", "text"), "text or json (env WRENN_LOG_FORMAT)")
	f.BoolVarP(&c.verbose, "verbose", "v", false, "log more")
}

func (c *serveFlags) networkFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.dns, "dns", env("WRENN_DNS", ""), "resolvers of the guests, comma-separated; the host's own when empty (env WRENN_DNS)")
	f.StringVar(&c.egress, "egress", env("WRENN_EGRESS", string(c.Egress)),
		"what sandboxes may reach: public (the internet, no private networks), none, or all (env WRENN_EGRESS)")
	f.StringVar(&c.netIn, "net-in", env("WRENN_NET_IN", "0"),
		"bytes per second into each sandbox, like 10M or 64KiB; 0 is no limit (env WRENN_NET_IN)")
	f.StringVar(&c.netOut, "net-out", env("WRENN_NET_OUT", "0"), "bytes per second out of each sandbox (env WRENN_NET_OUT)")
	f.IntVar(&c.Limits.Connections, "net-connections", c.Limits.Connections,
		"most connections at a time that each sandbox may have begun; 0 is a 128th of the host's connection table, and no setting allows more")
	f.IntVar(&c.Pool, "pool", c.Pool, "networks kept built ahead of use")
}

func (c *serveFlags) sandboxFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.onShutdown, "on-shutdown", env("WRENN_ON_SHUTDOWN", "leave"),
		"what becomes of sandboxes: leave (for the next agent) or destroy (env WRENN_ON_SHUTDOWN)")
	f.StringVar(&c.warm, "warm", env("WRENN_WARM", autoWarm),
		"guests of the default template and size kept running ahead of use, so that a create need not start one; "+
			"their memory is given back when a sandbox needs it; auto is as many as are not felt, none of a slow VMM (env WRENN_WARM)")
	f.IntVar(&c.OverlayMiB, "disk", c.OverlayMiB, "size of each sandbox's disk in MiB; it takes only what is written")
	f.StringVar(&c.diskRate, "disk-rate", fmt.Sprintf("%dMiB", c.DiskBytes>>20),
		"bytes per second that each sandbox may read from and write to its disk, like 100M or 64KiB; 0 is no limit")
	f.Int64Var(&c.DiskOps, "disk-iops", c.DiskOps, "reads and writes of its disk per second that each sandbox may make; 0 is no limit")
	f.IntVar(&c.Capacity.Sandboxes, "max-sandboxes", c.Capacity.Sandboxes, "most sandboxes at a time")
	f.IntVar(&c.Capacity.VCPUs, "max-vcpus", c.Capacity.VCPUs, "most virtual CPUs of all sandboxes together")
	f.IntVar(&c.Capacity.MemMiB, "max-memory", c.Capacity.MemMiB, "most memory of all sandboxes together, in MiB")
	f.IntVar(&c.Capacity.DiskMiB, "max-disk", c.Capacity.DiskMiB,
		"most disk of all sandboxes together, in MiB of their full sizes; 0 is 16 times what is free, since disks take only what is written")
	f.IntVar(&c.MaxTemplateDiskMiB, "max-template-disk", c.MaxTemplateDiskMiB,
		"most disk of templates, images and the cache of builds together, in MiB; the cache makes way first; 0 is no bound")
	f.IntVar(&c.Capacity.FreeDiskMiB, "keep-free", c.Capacity.FreeDiskMiB,
		"MiB that stay free on the state directory's file system: "+
			"with less, nothing new is made, and sandboxes that write more than their share stand still")
	f.IntVar(&c.Capacity.Starts, "max-starts", c.Capacity.Starts, "most VMs starting at a time; others wait")
	f.DurationVar(&c.Capacity.StartQueue, "start-queue", c.Capacity.StartQueue, "how long a create waits for its turn to start")
	f.DurationVar(&c.BootTimeout, "boot-timeout", c.BootTimeout, "how long a guest may take to come up")
	f.DurationVar(&c.KeepPaused, "keep-paused", c.KeepPaused, "how long a sandbox may stay paused before it is destroyed; 0 is for ever")
	f.DurationVar(&c.KeepStopped, "keep-stopped", c.KeepStopped, "how long a sandbox that ended by itself is remembered")
}

// autoWarm has the host decide how many guests wait.
const autoWarm = "auto"

func (c *serveFlags) parseWarm() (err error) {
	if c.warm == autoWarm {
		c.Warm = sandbox.WarmAuto
		return nil
	}
	if c.Warm, err = strconv.Atoi(c.warm); err != nil || c.Warm < 0 {
		return fmt.Errorf("--warm or WRENN_WARM %q is neither %s nor a number from 0 up", c.warm, autoWarm)
	}
	return nil
}

// config returns the settings that the flags say, or everything that is wrong
// with them.
func (c *serveFlags) config() (agent.Config, error) {
	errs := []error{c.hostFlags.parse(), c.parseWarm()}
	c.Egress = network.Mode(c.egress)
	c.Rates.Burst, c.Rates.CreatesBurst = atOnce(c.Rates.Requests), atOnce(c.Rates.Creates)
	c.AllowHosts, c.DNS = nil, nil
	for name := range strings.SplitSeq(c.allowHost, ",") {
		if name = strings.TrimSpace(name); name != "" {
			c.AllowHosts = append(c.AllowHosts, name)
		}
	}
	if c.dns != "" {
		for text := range strings.SplitSeq(c.dns, ",") {
			addr, err := netip.ParseAddr(strings.TrimSpace(text))
			if err != nil {
				errs = append(errs, fmt.Errorf("--dns: %w", err))
				continue
			}
			c.DNS = append(c.DNS, addr)
		}
	}
	for _, limit := range []struct {
		flag, text string
		rate       *int64
	}{{"net-in", c.netIn, &c.Limits.InBytes}, {"net-out", c.netOut, &c.Limits.OutBytes}, {"disk-rate", c.diskRate, &c.DiskBytes}} {
		var err error
		if *limit.rate, err = parseRate(limit.text); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", limit.flag, err))
		}
	}
	if c.onShutdown != "leave" && c.onShutdown != "destroy" {
		errs = append(errs, fmt.Errorf("--on-shutdown %q is unknown: use leave or destroy", c.onShutdown))
	}
	c.DestroyAtEnd = c.onShutdown == "destroy"
	if c.logFormat != "text" && c.logFormat != "json" {
		errs = append(errs, fmt.Errorf("--log-format %q is unknown: use text or json", c.logFormat))
	}
	c.Log = c.logger()
	errs = append(errs, c.Check())
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("the host agent needs root: sudo wrenn serve"))
	}
	return c.Config, errors.Join(errs...)
}

// atOnce is how many requests may come at once where perSecond may in a second.
func atOnce(perSecond float64) int { return int(math.Ceil(2 * min(perSecond, 1<<20))) }

func (c *serveFlags) logger() *slog.Logger {
	opts := &slog.HandlerOptions{}
	if c.verbose {
		opts.Level = slog.LevelDebug
	}
	out := printer{os.Stderr} // the log quotes guests and VMMs
	if c.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(out, opts))
	}
	return slog.New(slog.NewTextHandler(out, opts))
}
