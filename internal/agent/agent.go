// Package agent assembles a host agent: it chooses the VMM, claims users and
// addresses, takes over the sandboxes of a state directory, and serves the API.
package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/certs"
	"git.omukk.dev/wrenn/sandbox/internal/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/gateway"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/server"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// endTimeout bounds the end of an agent.
const endTimeout = 30 * time.Second

// answerTime is what the answer to the call that drained the agent has to reach its caller.
const answerTime = 5 * time.Second

// Network makes the networks of sandboxes; *network.Network is one.
type Network interface {
	sandbox.Network
	// Run keeps networks built ahead of use until ctx ends.
	Run(ctx context.Context)
	// Detach closes what the agent itself holds of networks that go on.
	Detach()
	// Teardown removes what all networks share.
	Teardown(ctx context.Context) error
	Stats() network.Stats
	// NameCounts counts what went through the proxies of all networks.
	NameCounts() egress.Counts
}

// parts are what an agent stands on: this host's, unless a test sets others.
type parts struct {
	drivers []vmm.Driver
	network func(network.Plan, network.Options) Network
	guests  func(addr netip.Addr, token string) sandbox.Guest
	// killStrays and netNSOf are those of sandbox.Config.
	killStrays func(ctx context.Context, runRoot, parent string, keep func(name string) bool) ([]string, error)
	netNSOf    func(runRoot, name string, paths []string) (string, error)
	// run is /run, claims the directory of claims on users.
	run, claims string
}

func (p parts) withDefaults(c Config) parts {
	if p.drivers == nil {
		p.drivers = c.drivers()
	}
	if p.network == nil {
		p.network = func(plan network.Plan, o network.Options) Network { return network.New(plan, o) }
	}
	if p.guests == nil {
		p.guests = func(addr netip.Addr, token string) sandbox.Guest {
			return guest.New(netip.AddrPortFrom(addr, guestapi.Port), token)
		}
	}
	if p.killStrays == nil {
		p.killStrays, p.netNSOf = launch.KillStrays, launch.NetNSOf
	}
	if p.run == "" {
		p.run, p.claims = "/run", uidClaims
	}
	return p
}

// Agent is a host agent. It has taken over its state directory, and holds it
// until Run returns.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	templates *template.Store
	base      base
	keys      *auth.Store
	requests  *idempotency.Store
	images    *image.Store
	builds    *build.Engine
	certs     *certs.Source // nil for no TLS
	listener  net.Listener
	socket    net.Listener
	door      *gateway.Gateway
	publisher *publisher
	// drained is closed when a drain is done.
	drained chan struct{}
}

// base is an agent without its API: what manages sandboxes.
type base struct {
	uids    int
	network Network
	manager *sandbox.Manager
	// quota is that of a project; nil is none.
	quota func(project string) sandbox.Quota
}

// New takes over the state directory and listens, so that an address in use is
// found before anything is touched. The sandboxes that run are adopted. The
// caller must call Run, which ends what New began.
func New(ctx context.Context, cfg Config) (_ *Agent, err error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	cfg.parts = cfg.parts.withDefaults(cfg)
	templates, chosen, err := cfg.look(ctx)
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: cfg.Log, templates: templates, drained: make(chan struct{})}
	a.logChoice(chosen)
	if a.keys, err = auth.Open(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("open keys: %w", err)
	}
	if err := cfg.checkKeys(a.keys); err != nil {
		return nil, err
	}
	if a.certs, err = cfg.certificate(); err != nil {
		return nil, fmt.Errorf("open certificate: %w", err)
	}
	if a.certs == nil && !cfg.onLoopback() {
		a.log.Warn("API keys and all that sandboxes say cross the network in the clear; --tls-cert or --tls-self-signed mends that")
	}
	if a.listener, err = net.Listen("tcp", cfg.Listen); err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("listen: %w: is it another agent? Name another address with --listen", err)
		}
		return nil, fmt.Errorf("listen: %w", err)
	}
	a.base.quota = func(project string) sandbox.Quota { return sandbox.Quota(a.keys.Quota(project)) }
	// A signal that comes now takes effect when the state is taken over: half a
	// recovery would leave rules and routes behind.
	found, err := a.base.takeOver(context.WithoutCancel(ctx), cfg, chosen, templates)
	if err != nil {
		a.listener.Close()
		return nil, err
	}
	if err := a.openEdges(); err != nil {
		return nil, errors.Join(err, a.giveBack())
	}
	plan := a.base.network.Plan()
	a.log.Info("state taken over: "+found.String(), "dir", cfg.StateDir, "host_range", plan.Hosts, "link_range", plan.Veths)
	if len(cfg.DNS) == 0 && len(network.HostResolvers()) == 0 {
		a.log.Warn("the host has no resolver that a guest can reach; guests ask public ones, --dns names others", "dns", cfg.resolvers())
	}
	version := server.Version{Version: cfg.Version, VMMs: vmmsOf(chosen)}
	version.URL, version.Domain = cfg.address(a.listener.Addr().(*net.TCPAddr).AddrPort(), a.certs != nil)
	if cfg.TLSSelfSigned {
		version.CAFile = certs.CAFile(cfg.tlsDir())
	}
	a.door = a.newDoor(version)
	return a, nil
}

// logChoice says which drivers there are.
func (a *Agent) logChoice(c host.Choice) {
	for i, u := range c.Usable {
		is, why := "vmm chosen", c.Why
		if i > 0 {
			is, why = "vmm usable, too", u.Report.Why
		}
		a.log.Info(is, "vmm", u.Driver.Name(), "version", u.Report.Version, "accel", u.Report.Accel, "cpu", u.Report.CPU, "why", why)
		if u.Report.Warning != "" {
			a.log.Warn("vmm runs with less than it could have", "vmm", u.Driver.Name(), "why", u.Report.Warning)
		}
	}
}

// vmmsOf is what the API says of the drivers.
func vmmsOf(c host.Choice) (all []server.VMM) {
	for _, u := range c.Usable {
		r := u.Report
		all = append(all, server.VMM{
			Name: u.Driver.Name(), Version: r.Version, Accel: r.Accel, CPU: r.CPU,
			Isolation: string(r.Isolation), Speed: r.Speed.String(), Why: r.Why,
		})
	}
	for _, o := range c.Others {
		all = append(all, server.VMM{Name: o.Driver.Name(), Unusable: o.Err.Error()})
	}
	all[0].Why = c.Why
	return all
}

// look opens the templates and chooses a VMM; it changes nothing.
func (c Config) look(ctx context.Context) (*template.Store, host.Choice, error) {
	templates, err := template.Open(c.StateDir, c.Log)
	if err != nil {
		return nil, host.Choice{}, err
	}
	if _, err := templates.Get("minimal"); err != nil {
		return nil, host.Choice{}, fmt.Errorf("%w; prepare this host with `wrenn setup --state-dir %s`", err, c.StateDir)
	}
	chosen, err := host.Choose(ctx, c.VMM, c.parts.drivers)
	if err != nil {
		return nil, host.Choice{}, fmt.Errorf("%w; `wrenn doctor` says more", err)
	}
	return templates, chosen, nil
}

// takeOver claims users for VMMs and opens the sandboxes of the state directory.
func (b *base) takeOver(ctx context.Context, c Config, chosen host.Choice, templates *template.Store) (sandbox.Recovery, error) {
	plan, err := c.plan()
	if err != nil {
		return sandbox.Recovery{}, err
	}
	if b.uids, err = claimUIDs(c.parts.claims, c.StateDir); err != nil {
		return sandbox.Recovery{}, err
	}
	b.network = c.parts.network(plan, network.Options{
		BaseUID: b.uids, Egress: c.Egress, Limits: c.Limits,
		Kind: chosen.First().Driver.Needs().Link, Resolvers: c.resolvers(), Pool: c.Pool, RangesFile: c.rangesFile(), Log: c.Log,
	})
	var drivers, others []vmm.Driver
	for _, u := range chosen.Usable {
		drivers = append(drivers, u.Driver)
	}
	for _, r := range chosen.Others {
		others = append(others, r.Driver)
	}
	var found sandbox.Recovery
	b.manager, found, err = sandbox.Open(ctx, sandbox.Config{
		StateDir: c.StateDir, RunDir: filepath.Join(c.parts.run, plan.Instance),
		Drivers: drivers, Others: others,
		Network: b.network, Templates: templates, Guests: c.parts.guests,
		KillStrays: c.parts.killStrays, NetNSOf: c.parts.netNSOf,
		Capacity: c.Capacity, Quota: b.quota, MaxLife: c.MaxTimeout, OverlayMiB: c.OverlayMiB, DNS: c.resolvers(), GuestCA: c.GuestCA,
		DiskBytes: c.DiskBytes, DiskOps: c.DiskOps, BaseUID: b.uids,
		BootTimeout: c.BootTimeout, Warm: c.Warm, KeepStopped: c.KeepStopped, KeepPaused: c.KeepPaused,
		Log: c.Log,
	})
	return found, err
}

// release gives back what takeOver took of the host, after the manager has shut
// down. Sandboxes that go on still need it.
func (b *base) release(ctx context.Context, claims string) error {
	if len(b.manager.List(false)) > 0 {
		return nil
	}
	return errors.Join(b.network.Teardown(ctx), releaseUIDs(claims, b.uids))
}

// openEdges opens what callers need besides the manager. It comes after half-made
// sandboxes are gone.
func (a *Agent) openEdges() (err error) {
	a.requests, err = idempotency.Open(filepath.Join(a.cfg.StateDir, "idempotency"), func(id string) bool {
		return a.base.manager.Ran(sandbox.ID(id))
	})
	if err != nil {
		return fmt.Errorf("open requests: %w", err)
	}
	if err := a.openBuilds(); err != nil {
		return err
	}
	gid, err := groupID(a.cfg.SocketGroup)
	if err != nil {
		return fmt.Errorf("--socket-group: %w", err)
	}
	if a.socket, err = listenUnix(socketPath(a.cfg.parts.run, a.cfg.StateDir), gid, a.log); err != nil {
		return fmt.Errorf("listen on the agent's socket: %w", err)
	}
	return nil
}

// giveBack undoes what New did until the edges were opened.
func (a *Agent) giveBack() error {
	a.listener.Close()
	end, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	if err := a.base.manager.Shutdown(end, false); err != nil {
		return err
	}
	a.base.network.Detach()
	return a.base.release(end, a.cfg.parts.claims)
}

// newDoor returns the server of the API.
func (a *Agent) newDoor(version server.Version) *gateway.Gateway {
	var panics atomic.Int64
	mux := http.NewServeMux()
	most, each := a.cfg.conns()
	limiter := auth.NewLimiter(a.cfg.Rates)
	door := gateway.New(gateway.Config{
		Sandboxes: a.base.manager, Control: mux, REST: a.newREST(limiter, version.Domain), Names: a.cfg.names(),
		Panics: &panics, Log: a.log, MaxConns: most, MaxConnsEach: each, TLS: a.tls(),
	})
	a.publisher = newPublisher(a.base.manager, door, a.log)
	server.Register(mux, server.Config{
		Publish: a.publisher.listen,
		Keys:    a.keys, Limiter: limiter, Keyless: a.cfg.onLoopback(),
		Manager: a.base.manager, Version: version, Templates: a.templateNames, Store: a.templates, DiskMiB: a.cfg.OverlayMiB,
		Builds: a.builds, Images: a.images, Export: server.ExportBy(a.base.manager),
		End: func() { close(a.drained) }, Panics: &panics, Log: a.log,
		Slots:   func() map[string]int { return a.base.network.Stats().ByState() },
		Names:   func() server.NameCounts { return server.NameCounts(a.base.network.NameCounts()) },
		Refused: door.Refused,
	})
	return door
}

// templateNames returns the names of the host's own templates, without snapshots.
func (a *Agent) templateNames() ([]string, error) {
	all, err := a.templates.List()
	var names []string
	for _, t := range all {
		if t.Project == "" && t.Source == "" {
			names = append(names, t.Names...)
		}
	}
	return names, err
}

// newREST returns the handler of the REST API, which tells clients of a domain.
func (a *Agent) newREST(limiter *auth.Limiter, domain string) http.Handler {
	manager, templates := e2b.OfHost(a.base.manager, a.templates, a.cfg.OverlayMiB)
	return e2b.New(e2b.Config{
		Manager: manager, Templates: templates, Builds: e2b.BuildsOf(a.builds, a.templates), DiskMiB: a.cfg.OverlayMiB,
		LocalImages: a.cfg.onLoopback(), Keys: a.keys, Limiter: limiter, Requests: a.requests,
		Domain: domain, DefaultTemplate: template.DefaultName, MaxTimeout: a.cfg.MaxTimeout, Log: a.log,
	})
}

// tls is what the TCP listener speaks; nil for plain HTTP.
func (a *Agent) tls() *tls.Config {
	if a.certs == nil {
		return nil
	}
	return a.certs.TLS()
}

// Handler answers the API's requests and passes those for sandboxes on. It works
// from New until Run returns.
func (a *Agent) Handler() http.Handler { return a.door }

// Addr is the address on which the agent listens.
func (a *Agent) Addr() net.Addr { return a.listener.Addr() }

// Run serves the API until ctx ends, and then ends the agent. It is called once.
// New calls are refused while the manager shuts down; those in progress may end.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer a.listener.Close()
	pool, endPool := context.WithCancel(context.WithoutCancel(ctx))
	pooled := make(chan struct{})
	go func() { defer close(pooled); a.base.network.Run(pool) }()
	published := make(chan struct{})
	go func() { defer close(published); a.publisher.run(pool) }()

	served := make(chan error, 2)
	for _, l := range []net.Listener{a.listener, a.socket} {
		go func() { served <- a.door.Serve(l) }()
	}
	a.log.Info("serving", "listen", a.Addr().String(), "socket", a.socket.Addr().String(), "pid", strconv.Itoa(os.Getpid()))
	destroy, grace := a.cfg.DestroyAtEnd, time.Duration(0)
	select {
	case err = <-served:
	case <-a.drained:
		a.log.Info("drained")
		destroy = false // what a drain has saved, or what it could not end in its time
		grace = answerTime
	case <-ctx.Done():
		a.log.Info("shutting down", "sandboxes", map[bool]string{false: "leave", true: "destroy"}[a.cfg.DestroyAtEnd])
	}

	a.socket.Close() // its file goes before the directory that the manager removes
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	drained := make(chan error, 1)
	go func() { drained <- a.door.Shutdown(end) }()
	berr := a.builds.Close(end)
	merr := a.base.manager.Shutdown(end, destroy)
	select {
	case derr := <-drained:
		drained <- derr
	case <-time.After(grace):
	}
	a.door.Close() // streams do not end by themselves
	<-drained
	endPool()
	<-pooled
	<-published
	a.base.network.Detach()
	if merr == nil {
		merr = a.base.release(end, a.cfg.parts.claims)
	}
	return errors.Join(err, berr, merr, a.templates.Close(), a.keys.Close())
}

// Prepare makes the boot snapshot of the default template and size, unless it is
// there; made says which. While an agent has the state directory it is
// errdefs.Busy.
func Prepare(ctx context.Context, cfg Config) (made bool, err error) {
	if err := cfg.CheckHost(); err != nil {
		return false, err
	}
	cfg.parts = cfg.parts.withDefaults(cfg)
	templates, chosen, err := cfg.look(ctx)
	if err != nil {
		return false, err
	}
	// The sandboxes that are there are the next agent's to count.
	cfg.Capacity = sandbox.Capacity{
		Resources: sandbox.Resources{Sandboxes: 1 << 20, VCPUs: 1 << 20, MemMiB: 1 << 30},
		Starts:    max(2, runtime.NumCPU()), StartQueue: time.Minute,
	}
	cfg.Warm, cfg.Pool = 0, 0
	var b base
	if _, err := b.takeOver(ctx, cfg, chosen, templates); err != nil {
		return false, err
	}
	made, err = b.manager.Prepare(ctx, sandbox.CreateRequest{})
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	serr := b.manager.Shutdown(end, false)
	if serr == nil {
		serr = b.release(end, cfg.parts.claims)
	}
	return made, errors.Join(err, serr)
}
