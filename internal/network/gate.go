package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
)

// proxyMark is on what the agent sends from a namespace on behalf of the guest
// there. It takes CAP_NET_ADMIN or CAP_NET_RAW on the host to set it, and VMMs
// have neither.
const proxyMark = 0x5772656e // "Wren"

// sinkAddr is what the agent's DNS says of names that are not let through. It is set
// aside for addresses that lead nowhere (RFC 7600).
var sinkAddr = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// gate is the way out of a sandbox that has names in its policy: a proxy in the
// agent whose sockets are in the sandbox's namespace. They listen on the tap's
// address there, so only that guest reaches them. When the agent ends they are
// gone, and the rules that point to them let nothing pass.
type gate struct {
	proxy *egress.Proxy
	ports gatePorts
}

type gatePorts struct{ conns, dnsConns, dnsPacket uint16 }

// gates are those of the open slots.
type gates struct {
	mu   sync.Mutex
	open map[Slot]*gate
	// shared bounds what all of them take: each connection costs the agent two
	// descriptors, which no number of sandboxes may use up.
	shared *egress.Shared
}

func newGates() gates {
	limit := uint64(8192)
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err == nil {
		limit = max(1, min(limit, r.Cur/4))
	}
	return gates{shared: egress.NewShared(int(limit))}
}

func (gs *gates) of(s Slot) *gate {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	return gs.open[s]
}

func (gs *gates) put(s Slot, g *gate) {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	if gs.open == nil {
		gs.open = map[Slot]*gate{}
	}
	gs.open[s] = g
}

// close ends a slot's gate and all connections through it; none is done.
func (gs *gates) close(s Slot) {
	gs.mu.Lock()
	g := gs.open[s]
	delete(gs.open, s)
	gs.mu.Unlock()
	if g != nil {
		g.proxy.Close()
	}
}

// Detach ends what the agent itself does for open slots, as its own end would:
// sandboxes with names in their policy reach nothing by name from then on,
// until SetPolicy. Call it when the slots are left to a later agent.
func (n *Network) Detach() {
	n.gates.mu.Lock()
	open := n.gates.open
	n.gates.open = nil
	n.gates.mu.Unlock()
	var wg sync.WaitGroup
	for _, g := range open {
		wg.Go(g.proxy.Close)
	}
	wg.Wait()
}

// NameCounts returns what the proxies of all slots have done since New.
func (n *Network) NameCounts() egress.Counts { return n.gates.shared.Counts() }

// openGate opens the sockets in the namespace at path and serves them.
func (n *Network) openGate(ctx context.Context, s Slot, path string, policy egress.Policy) (*gate, error) {
	cfg := egress.Config{Original: original, Shared: n.gates.shared, Log: n.opts.Log, Sink: sinkAddr, Denials: n.denials.of(s)}
	cfg.Dial = func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) { return dialMarked(ctx, path, to) }
	for _, r := range n.opts.Resolvers {
		cfg.Resolvers = append(cfg.Resolvers, netip.AddrPortFrom(r, 53))
	}
	if err := inNS(path, func() (err error) {
		at := netip.AddrPortFrom(GuestGateway, 0)
		if cfg.Conns, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at)); err != nil {
			return err
		}
		if cfg.DNSConns, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at)); err != nil {
			return errors.Join(err, cfg.Conns.Close())
		}
		if cfg.DNSPacket, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at)); err != nil {
			return errors.Join(err, cfg.Conns.Close(), cfg.DNSConns.Close())
		}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("listen for the sandbox: %w", err)
	}
	return &gate{
		ports: gatePorts{
			conns:     cfg.Conns.Addr().(*net.TCPAddr).AddrPort().Port(),
			dnsConns:  cfg.DNSConns.Addr().(*net.TCPAddr).AddrPort().Port(),
			dnsPacket: cfg.DNSPacket.LocalAddr().(*net.UDPAddr).AddrPort().Port(),
		},
		proxy: egress.New(ctx, cfg, policy),
	}, nil
}

// answering returns the ports without those that a policy has no use for.
func (ports gatePorts) answering(p Policy) gatePorts {
	if p.OwnDNS {
		ports.dnsConns, ports.dnsPacket = 0, 0
	}
	return ports
}

// turned says whether a connection of the guest's was turned to the agent.
func turned(f *netlink.ConntrackFlow) bool { return f.Reverse.SrcIP.Equal(GuestGateway.AsSlice()) }

// serve says whether a connection of the guest's was turned to one of the ports.
func (ports gatePorts) serve(f *netlink.ConntrackFlow) bool {
	if !turned(f) {
		return false
	}
	if f.Forward.Protocol == unix.IPPROTO_UDP {
		return f.Reverse.SrcPort == ports.dnsPacket
	}
	return f.Reverse.SrcPort == ports.conns || f.Reverse.SrcPort == ports.dnsConns
}

// forgetBeside deletes, in the calling thread's namespace, the connections that
// the guest began, except those that are kept, which go to the agent. The kernel
// must still know these, or their answers would come from an address that the guest
// did not connect to.
func forgetBeside(kept func(*netlink.ConntrackFlow) bool) error {
	if noneTracked() {
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open conntrack: %w", err)
	}
	defer h.Close()
	if _, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, flowFilter(func(f *netlink.ConntrackFlow) bool {
		return f.Forward.SrcIP.Equal(GuestAddr.Addr().AsSlice()) && !kept(f)
	})); err != nil {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

// flowFilter says which connections are meant.
type flowFilter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow makes it the library's.
func (m flowFilter) MatchConntrackFlow(f *netlink.ConntrackFlow) bool { return m(f) }

// original returns where a connection was going before the rules turned it.
func original(c *net.TCPConn) (to netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return to, err
	}
	cerr := raw.Control(func(fd uintptr) {
		// A sockaddr_in, which is as long as an IPv6 address.
		var sa *unix.IPv6Mreq
		if sa, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err != nil {
			return
		}
		b := sa.Multiaddr
		to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
	})
	if err := errors.Join(err, cerr); err != nil {
		return to, fmt.Errorf("find where the connection was going: %w", err)
	}
	if to == c.LocalAddr().(*net.TCPAddr).AddrPort() {
		return to, errors.New("the connection was made to the proxy itself")
	}
	return to, nil
}

// dialMarked connects from the namespace at path. Only the making of the
// socket needs a thread there, not the waiting.
func dialMarked(ctx context.Context, path string, to netip.AddrPort) (*net.TCPConn, error) {
	var f *os.File
	if err := inNS(path, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make socket: %w", err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, proxyMark); err != nil {
			return errors.Join(fmt.Errorf("mark socket: %w", err), unix.Close(fd))
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil &&
			!errors.Is(err, unix.EINPROGRESS) {
			return errors.Join(fmt.Errorf("connect: %w", err), unix.Close(fd))
		}
		f = os.NewFile(uintptr(fd), "connection")
		return nil
	}); err != nil {
		return nil, err
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	if err := raw.Write(func(fd uintptr) (done bool) {
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || n != 0 {
			failed = errors.Join(err, unix.Errno(n))
			return true
		}
		_, err := unix.Getpeername(int(fd))
		return err == nil
	}); err != nil {
		return nil, errors.Join(fmt.Errorf("connect: %w", err), ctx.Err())
	}
	if failed != nil {
		return nil, fmt.Errorf("connect: %w", failed)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return c.(*net.TCPConn), nil
}

// policyChain is one of the chains that a policy fills.
type policyChain struct {
	name  string
	rules []rule
}

// policyChainsOf are all chains of a policy; without a gate only what the
// guest sends out has rules.
func policyChainsOf(v rangePolicy, p Policy, g *gate) []policyChain {
	if g == nil {
		return []policyChain{{egressChain, v.rules(refuse())}, {turnChain, nil}, {hearChain, nil}, {speakChain, nil}}
	}
	return []policyChain{
		{egressChain, v.beside().rules(refuse())},
		{turnChain, v.turn(p, g.ports)},
		{hearChain, g.ports.answering(p).hear()},
		{speakChain, v.speak(p)},
	}
}

// named says whether names make a difference.
func (v rangePolicy) named(p Policy) bool {
	if v.mode == None {
		return len(p.AllowNames) > 0
	}
	return len(p.DenyNames) > 0
}

// beside is what passes without the proxy.
func (v rangePolicy) beside() rangePolicy {
	v.mode, v.resolvers, v.deny = None, nil, nil
	return v
}

// dialled is what the proxy may connect to for names that no list has, or for those
// that are allowed.
func (v rangePolicy) dialled(allowed bool) rangePolicy {
	v.resolvers = nil
	if allowed {
		v.deny = nil
	}
	if v.mode == None {
		v.mode = Public
	}
	return v
}

// names is the policy as the proxy asks it.
func (v rangePolicy) names(p Policy) egress.Policy {
	policy := egress.Policy{
		Allow:   p.AllowNames,
		MayDial: func(a netip.Addr, allowed bool) bool { return v.dialled(allowed).permits(a) },
	}
	if v.mode != None { // or else all names are denied
		policy.Open, policy.Deny = true, p.DenyNames
	}
	return policy
}

// turn sends the guest's new connections to the agent. What is not turned meets the egress chain as ever.
func (v rangePolicy) turn(p Policy, ports gatePorts) []rule {
	to := func(port uint16) term { return dnatTo(netip.AddrPortFrom(GuestGateway, port)) }
	var rules []rule
	leave := func(list []addrRange) {
		if len(list) > 0 {
			rules = append(rules, rule{ipv4.daddrIn(list), back()})
		}
	}
	if !p.OwnDNS {
		rules = append(rules, rule{ipv4.daddr(eq, netip.PrefixFrom(sinkAddr, 32)), isTCP(), to(ports.conns)})
	}
	leave(v.allow)
	if !p.OwnDNS {
		rules = append(rules,
			rule{dport(unix.IPPROTO_UDP, 53), to(ports.dnsPacket)},
			rule{dport(unix.IPPROTO_TCP, 53), to(ports.dnsConns)})
	}
	leave(v.never)
	if len(p.AllowNames) == 0 { // no name leads to what is denied
		leave(v.deny)
	}
	if p.OwnDNS {
		rules = append(rules, rule{dport(unix.IPPROTO_TCP, 53), back()})
	}
	return append(rules, rule{isTCP(), to(ports.conns)})
}

// hear lets in what was turned here, and answers to the proxy.
func (ports gatePorts) hear() []rule {
	var rules []rule
	for _, p := range []struct {
		proto byte
		port  uint16
	}{{unix.IPPROTO_TCP, ports.conns}, {unix.IPPROTO_TCP, ports.dnsConns}, {unix.IPPROTO_UDP, ports.dnsPacket}} {
		if p.port != 0 {
			rules = append(rules, rule{iif(Tap), dnatted(), dport(p.proto, p.port), accept()})
		}
	}
	return append(rules, rule{iif(peerName), established(), replyDirection(), accept()})
}

// speak lets the agent answer the guest, and the proxy connect to what the
// policy's ranges permit.
func (v rangePolicy) speak(p Policy) []rule {
	rules := []rule{{oif(Tap), dnatted(), replyDirection(), accept()}}
	for _, r := range v.dialled(len(p.AllowNames) > 0).rules(reject()) {
		rules = append(rules, append(rule{oif(peerName), marked(proxyMark)}, r...))
	}
	return rules
}
