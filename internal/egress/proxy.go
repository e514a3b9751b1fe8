// Package egress lets a sandbox connect by name: a transparent proxy that
// reads which host a connection is for, asks the resolvers itself, and dials
// what they say; and a DNS server that knows the same names and no others.
//
// What a guest claims decides where it gets, not only whether: the address
// that it chose is not used. So a false name leads to that name's owner. What
// goes on inside of TLS is not seen: a server that a policy lets through may
// serve, or relay to, other names than the one shown.
//
// The package knows nothing of namespaces and rules. The caller gives it sockets
// and a function that dials, and makes sure that nothing gets out beside the
// proxy.
package egress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstBytes is how long a client may take to show the name of a server.
	firstBytes = 10 * time.Second
	// sinkPatience is that of a client that goes to Config.Sink: nothing but a
	// refusal awaits it, and some protocols have the server speak first.
	sinkPatience = 2 * time.Second
	dialTimeout  = 10 * time.Second
	// idleTimeout ends a connection that carries nothing, in either direction.
	idleTimeout = 30 * time.Minute
	// maxUses bounds the names that one connection may ask for in turn.
	maxUses = 256

	// The addresses of denied names are asked for again after banRefresh, and
	// forgotten banTTL after they were last seen: many names have more
	// addresses than one answer shows.
	banRefresh = 30 * time.Second
	banTTL     = 10 * time.Minute
	// banWait bounds how long a change of policy waits for them.
	banWait    = 2 * time.Second
	banLookups = 16
)

// Policy is what a proxy lets through.
type Policy struct {
	// Allow and Deny are names as ParseName returns them. Allow wins. Deny also
	// covers the addresses that its names without a * have.
	Allow, Deny []string
	// Open lets through names that neither list has.
	Open bool
	// MayDial says which addresses the proxy may connect to for a name; allowed says
	// that the name is in Allow.
	MayDial func(a netip.Addr, allowed bool) bool
}

// Config is what a proxy works with.
type Config struct {
	// Conns brings the guest's connections, DNSConns and DNSPacket its
	// questions. The proxy closes them.
	Conns, DNSConns *net.TCPListener
	DNSPacket       *net.UDPConn
	// Original returns where a connection was going before it was turned here.
	Original func(*net.TCPConn) (netip.AddrPort, error)
	// Dial connects on the sandbox's behalf.
	Dial func(context.Context, netip.AddrPort) (*net.TCPConn, error)
	// Resolvers are asked from the host.
	Resolvers []netip.AddrPort
	// MaxConns bounds the connections at a time. Shared bounds and counts what
	// all proxies that have it take together; if it is nil, the proxy makes one
	// for itself.
	MaxConns int
	Shared   *Shared
	// Sink is the address that names which are not let through have in DNS, so that
	// the proxy can tell a client why it gets no further. The caller leads
	// what the guest sends there to Conns. Without Sink, such names do not exist.
	Sink netip.Addr
	// Denials, if not nil, keeps what the policy refuses.
	Denials *Denials
	// Log receives refusals at debug level, some a second.
	Log *slog.Logger
}

// Proxy serves one sandbox. Safe for concurrent use.
type Proxy struct {
	cfg      Config
	resolver resolver
	http     *httpSide
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	asked    *rate // questions
	logged   *rate

	mu sync.Mutex
	// All of policies must let a use through: the settled policy, and while a
	// change is under way the coming one.
	policies []parsedPolicy
	// seen are the addresses of names that are or were denied, and until when
	// they count; banned are those of the names that are denied now.
	seen   map[string]map[netip.Addr]time.Time
	banned map[netip.Addr]bool
	links  map[*link]struct{}
}

// parsedPolicy is a policy whose lists of names are ready for a look-up.
type parsedPolicy struct {
	Policy
	allow, deny names
}

// use is one thing that a connection is used for: a name, and an address that it
// has.
type use struct {
	name string
	addr netip.Addr
}

func parse(p Policy) parsedPolicy { return parsedPolicy{p, namesOf(p.Allow), namesOf(p.Deny)} }

// name says whether the name alone is let through.
func (r parsedPolicy) name(name string) bool {
	return name != "" && (r.allow.match(name) || r.Open && !r.deny.match(name))
}

// permits says whether a name may lead to an address; banned says that a denied name
// has the address.
func (r parsedPolicy) permits(u use, banned bool) bool {
	allowed := r.allow.match(u.name)
	return r.name(u.name) && (allowed || !banned) && r.MayDial(u.addr, allowed)
}

// New serves the sockets of cfg until Close. It returns when the addresses of
// denied names are known, or ctx ends.
func New(ctx context.Context, cfg Config, policy Policy) *Proxy {
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = defaultMaxConns
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Shared == nil {
		cfg.Shared = NewShared(cfg.MaxConns + maxDNSConns)
	}
	p := &Proxy{
		cfg: cfg, resolver: resolver{servers: cfg.Resolvers, shared: cfg.Shared},
		asked: newRate(questionRate), logged: newRate(logRate),
		policies: []parsedPolicy{parse(policy)}, seen: map[string]map[netip.Addr]time.Time{}, links: map[*link]struct{}{},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.http = newHTTPSide(p)
	p.learn(ctx)
	p.wg.Go(func() { p.http.serve() })
	p.wg.Go(func() { p.accept(cfg.Conns, cfg.MaxConns, p.serve) })
	p.wg.Go(func() { p.accept(cfg.DNSConns, maxDNSConns, p.serveDNSConn) })
	p.wg.Go(p.serveDatagrams)
	p.wg.Go(p.keepLearning)
	return p
}

// Close ends the proxy and every connection through it, and waits until all
// is gone. It may be called again.
func (p *Proxy) Close() {
	p.cancel()
	p.cfg.Conns.Close()
	p.cfg.DNSConns.Close()
	p.cfg.DNSPacket.Close()
	p.http.close()
	p.mu.Lock()
	for l := range p.links {
		l.cancel()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

// Restrict lets through only what both the settled policy and this one do,
// and ends connections that this refuses. A later Restrict takes the place of
// this one; Settle makes the policy the only one.
func (p *Proxy) Restrict(ctx context.Context, policy Policy) {
	p.mu.Lock()
	p.policies = append(p.policies[:1:1], parse(policy))
	p.mu.Unlock()
	p.learn(ctx)
	p.sweep()
}

// Settle makes the policy of the last Restrict the only one.
func (p *Proxy) Settle() {
	p.mu.Lock()
	p.policies = p.policies[len(p.policies)-1:]
	p.banLocked()
	p.mu.Unlock()
	p.sweep()
}

// sweep ends the connections that are used for what is refused by now.
func (p *Proxy) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		for u := range l.uses {
			if !p.permitsLocked(u) {
				l.cancel()
				reset(l.client)
				break
			}
		}
	}
}

func (p *Proxy) permitsLocked(u use) bool {
	for _, r := range p.policies {
		if !r.permits(u, p.banned[u.addr]) {
			return false
		}
	}
	return true
}

// admit notes a use of the connection, if the policy permits it. A later policy
// that refuses the use ends the connection.
func (p *Proxy) admit(l *link, u use) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.permitsLocked(u) || l.ctx.Err() != nil {
		return false
	}
	if _, ok := l.uses[u]; !ok && len(l.uses) >= maxUses {
		return false
	}
	l.uses[u] = struct{}{}
	return true
}

// denies returns the rule that refuses a name, "" if none does. A question for it and
// the answer can carry data of the guest's, so a name that is refused is not asked for.
func (p *Proxy) denies(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.policies {
		if rule := r.denies(name); rule != "" {
			return rule
		}
	}
	return ""
}

// learn asks for the addresses of the denied names. What no resolver knows is
// not denied by address; the name itself is in any case.
func (p *Proxy) learn(ctx context.Context) {
	p.mu.Lock()
	var list []string
	for _, r := range p.policies {
		for name := range r.deny.exact {
			list = append(list, name)
		}
	}
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, banWait)
	defer cancel()
	turn := make(chan struct{}, banLookups)
	var wg sync.WaitGroup
	for _, name := range list {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			addrs, err := p.resolver.lookup(ctx, name)
			if err != nil {
				p.cfg.Log.Debug("denied name has no known address", "name", name, "err", err)
				return
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.seen[name] == nil {
				p.seen[name] = map[netip.Addr]time.Time{}
			}
			for _, a := range addrs {
				p.seen[name][a] = time.Now().Add(banTTL)
			}
		})
	}
	wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.banLocked()
}

// banLocked brings banned up to the present rules, and forgets what is over.
func (p *Proxy) banLocked() {
	p.banned = map[netip.Addr]bool{}
	now := time.Now()
	for name, addrs := range p.seen {
		denied := slices.ContainsFunc(p.policies, func(r parsedPolicy) bool { return r.deny.exact[name] })
		if !denied {
			delete(p.seen, name)
		}
		for a, until := range addrs {
			if now.After(until) {
				delete(addrs, a)
			} else if denied {
				p.banned[a] = true
			}
		}
	}
}

func (p *Proxy) keepLearning() {
	tick := time.NewTicker(banRefresh)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
			p.learn(p.ctx)
			p.sweep()
		}
	}
}

// maxLogged is more than a name has.
const maxLogged = 256

// refuse counts and logs a refusal.
func (p *Proxy) refuse(what, name string, dst netip.AddrPort, why string) {
	p.cfg.Shared.refused.Add(1)
	if !p.logged.allow() {
		return
	}
	if len(name) > maxLogged {
		name = name[:maxLogged]
	}
	p.cfg.Log.Debug("egress refused", "what", what, "name", name, "to", dst, "why", why)
}

// link is one connection of the guest, until both ends are gone.
type link struct {
	client *net.TCPConn
	dst    netip.AddrPort // where the guest meant to go
	ctx    context.Context
	cancel context.CancelFunc // ends it, with all that was dialled for it
	heard  []byte             // read from the client and not passed on
	tls    bool               // the client has begun TLS
	uses   map[use]struct{}   // under Proxy.mu

	http     *http.Transport // of the requests, if it speaks HTTP
	requests atomic.Int64
}

// accept hands connections to serve, at most limit at a time; more are closed
// at once, so that the guest knows.
func (p *Proxy) accept(from *net.TCPListener, limit int, serve func(*net.TCPConn)) {
	own := make(chan struct{}, limit)
	for {
		c, err := from.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || p.ctx.Err() != nil {
				return
			}
			// Out of descriptors, say: what is closed gives some back.
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if !takeTurn(own) {
			reset(c)
			continue
		}
		if !takeTurn(p.cfg.Shared.conns) {
			<-own
			reset(c)
			continue
		}
		p.wg.Go(func() {
			defer func() { <-own; <-p.cfg.Shared.conns }()
			stop := context.AfterFunc(p.ctx, func() { c.Close() })
			defer stop()
			defer c.Close()
			serve(c)
		})
	}
}

// takeTurn says whether there is one left.
func takeTurn(turns chan struct{}) bool {
	select {
	case turns <- struct{}{}:
		return true
	default:
		return false
	}
}

// reset closes a connection so that its other end knows it was not served.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func (p *Proxy) serve(c *net.TCPConn) {
	p.cfg.Shared.accepted.Add(1)
	p.cfg.Shared.open.Add(1)
	defer p.cfg.Shared.open.Add(-1)
	// A guest that is paused does not answer, and is there all the same.
	c.SetKeepAlive(false)
	dst, err := p.cfg.Original(c)
	if err != nil {
		p.refuse("connection", "", dst, "it was not turned here")
		return
	}
	l := &link{client: c, dst: dst, uses: map[use]struct{}{}}
	l.ctx, l.cancel = context.WithCancel(p.ctx)
	defer l.cancel()
	stop := context.AfterFunc(l.ctx, func() { reset(c) })
	defer stop()
	p.mu.Lock()
	p.links[l] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.links, l)
		p.mu.Unlock()
	}()
	if err := p.carry(l); err != nil {
		r := &refusal{why: err.Error()}
		errors.As(err, &r)
		p.refuse("connection", r.name, dst, r.why)
		if r.rule != "" {
			kind := KindTCP
			if l.tls {
				kind = KindTLS
			}
			p.deny(kind, dst, r)
		}
		if r.rule != "" && l.tls {
			l.alert()
			return
		}
		reset(c)
	}
}

func refused(name, format string, args ...any) error {
	return &refusal{name: name, why: fmt.Sprintf(format, args...)}
}

// denied is refused by a rule of the policy.
func denied(rule, name, format string, args ...any) error {
	return &refusal{name: name, why: fmt.Sprintf(format, args...), rule: rule}
}

// carry serves a connection until it ends; an error is a refusal.
func (p *Proxy) carry(l *link) error {
	patience := firstBytes
	if l.dst.Addr() == p.cfg.Sink {
		patience = sinkPatience
	}
	isHTTP, name, err := l.hear(patience)
	switch {
	case err != nil:
		return err
	case isHTTP:
		p.http.carry(l)
		return nil
	case name == "":
		return denied(ruleNoName, "", "the client shows no name")
	}
	up, err := p.connect(l, name)
	if err != nil {
		return err
	}
	defer up.Close()
	l.relay(up.TCPConn)
	return nil
}

// connect dials what the name stands for.
func (p *Proxy) connect(l *link, name string) (*upstream, error) {
	if rule := p.denies(name); rule != "" {
		return nil, denied(rule, name, "%s", rule)
	}
	addrs, err := p.resolver.lookup(l.ctx, name)
	if err != nil {
		return nil, refused(name, "%v", err)
	}
	if len(addrs) == 0 {
		return nil, refused(name, "the name has no address")
	}
	// One of the name's own that the guest has chosen comes first.
	if i := slices.Index(addrs, l.dst.Addr()); i > 0 {
		addrs = slices.Clone(addrs)
		addrs[0], addrs[i] = addrs[i], addrs[0]
	}
	var dialErr error
	for _, a := range addrs {
		if !p.admit(l, use{name, a}) {
			continue
		}
		var up *upstream
		if up, dialErr = p.dial(l, netip.AddrPortFrom(a, l.dst.Port())); dialErr == nil {
			return up, nil
		}
		if l.ctx.Err() != nil {
			break
		}
	}
	if dialErr == nil {
		dialErr = denied(ruleAddress, name, "the name leads to %v, which the policy does not permit", addrs)
	}
	return nil, dialErr
}

// upstream is a connection to a server, which ends with its link at the latest.
type upstream struct {
	*net.TCPConn
	forget func() bool // that the link's end closes it
}

func (u *upstream) Close() error {
	u.forget()
	return u.TCPConn.Close()
}

func (p *Proxy) dial(l *link, to netip.AddrPort) (*upstream, error) {
	ctx, cancel := context.WithTimeout(l.ctx, dialTimeout)
	defer cancel()
	c, err := p.cfg.Dial(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", to, err)
	}
	// Unlike the guest, a far end may be gone without a word.
	c.SetKeepAlive(true)
	return &upstream{c, context.AfterFunc(l.ctx, func() { c.Close() })}, nil
}
