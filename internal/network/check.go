package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Check says what of an open slot, or of the host's part that all slots share,
// is missing or wrong; nil if nothing is. Repair mends it.
func (n *Network) Check(ctx context.Context, s Slot) error {
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	found, err := n.CheckAll(ctx, []Slot{s})
	if err != nil {
		return err
	}
	return errors.Join(found.Host, found.Slots[s])
}

// Findings are what CheckAll found to be missing or wrong.
type Findings struct {
	// Host concerns what all slots share; Setup mends it. Nil if it is right.
	Host error
	// Slots concerns one slot each; Repair mends it. Slots that are right are
	// not in it.
	Slots map[Slot]error
}

// CheckAll checks many slots: it looks once at the host and once into each
// namespace. What it says of a slot that is opened or closed at the same time
// means nothing: call Check or Repair again while no other call can change it.
func (n *Network) CheckAll(ctx context.Context, slots []Slot) (Findings, error) {
	found := Findings{Slots: map[Slot]error{}}
	v, err := n.look()
	if err != nil {
		return found, fmt.Errorf("check networks: %w", err)
	}
	found.Host = v.host
	err = osthread.Do(func() error {
		for _, s := range slots {
			if err := ctx.Err(); err != nil {
				return err
			}
			if !s.Valid() {
				return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
			}
			a := n.plan.Addrs(s)
			if err := errors.Join(v.checkHostSide(a), n.checkNS(s, a)); err != nil {
				found.Slots[s] = err
			}
		}
		return nil
	})
	if err != nil {
		return found, fmt.Errorf("check networks: %w", err)
	}
	return found, nil
}

// view is the host's side of all slots at one moment.
type view struct {
	host   error
	links  map[string]netlink.Link
	addrs  map[int][]netip.Prefix   // by link
	routes map[netip.Prefix]hostway // ours
}

type hostway struct {
	link int
	gw   netip.Addr
}

func (n *Network) look() (v view, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return v, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := listed(h.LinkList)
	if err != nil {
		return v, fmt.Errorf("list links: %w", err)
	}
	addrs, err := listed(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return v, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := listed(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return v, fmt.Errorf("list routes: %w", err)
	}
	v.links, v.addrs, v.routes = map[string]netlink.Link{}, map[int][]netip.Prefix{}, map[netip.Prefix]hostway{}
	for _, l := range links {
		v.links[l.Attrs().Name] = l
	}
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok {
			v.addrs[a.LinkIndex] = append(v.addrs[a.LinkIndex], p)
		}
	}
	unreachable := map[netip.Prefix]bool{}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		dst, _ := prefixOf(r.Dst)
		if r.Type == unix.RTN_UNREACHABLE && r.Priority == n.routeMetric() {
			unreachable[dst] = true
			continue
		}
		gw, _ := netip.AddrFromSlice(r.Gw)
		v.routes[dst] = hostway{r.LinkIndex, gw.Unmap()}
	}
	var errs []error
	for _, p := range []netip.Prefix{n.plan.Hosts, n.plan.Veths} {
		if !unreachable[p] {
			errs = append(errs, fmt.Errorf("the host's unreachable route of %s is missing", p))
		}
	}
	errs = append(errs, checkSysctl("the host", "net/ipv4/ip_forward", "1"))
	if err := checkTables(n.hostRules()); err != nil {
		errs = append(errs, fmt.Errorf("the host's rules: %w", err))
	}
	v.host = errors.Join(errs...)
	return v, nil
}

// checkHostSide compares a slot's part of the view with what it should be.
func (v view) checkHostSide(a Addrs) error {
	l := v.links[a.Veth]
	if l == nil {
		return errors.New("the link to the host is missing")
	}
	at := l.Attrs()
	var errs []error
	if at.Flags&net.FlagUp == 0 {
		errs = append(errs, errors.New("the link to the host is down"))
	}
	if !slices.Contains(v.addrs[at.Index], a.HostVeth) {
		errs = append(errs, errors.New("the host's address on the link is missing"))
	}
	if v.routes[netip.PrefixFrom(a.HostIP, 32)] != (hostway{at.Index, a.NSVeth.Addr()}) {
		errs = append(errs, errors.New("the host's route to the sandbox is missing"))
	}
	return errors.Join(errs...)
}

// checkNS compares a slot's namespace with what it should be. It changes the
// namespace of the calling thread.
func (n *Network) checkNS(s Slot, a Addrs) error {
	ns, err := netns.GetFromPath(a.NetNSPath)
	if err != nil {
		return errNoNS
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return errNoNS // it is a file and no namespace
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in namespace: %w", err)
	}
	defer h.Close()
	index, wrong, err := checkLinks(h, n.slots.kindOf(s))
	if err != nil {
		return err
	}
	errs := []error{wrong}
	for _, check := range []func(*netlink.Handle, map[string]int, Addrs) (error, error){checkAddrs, checkRoute, checkNeighbour} {
		wrong, err := check(h, index, a)
		if err != nil {
			return err
		}
		errs = append(errs, wrong)
	}
	for _, c := range nsSysctls {
		errs = append(errs, checkSysctl("the namespace", c.name, c.value))
	}
	wrong, err = n.checkRules(s, a)
	if err != nil {
		return err
	}
	return errors.Join(append(errs, wrong)...)
}

// checkLinks returns the index of each link by its name, what is wrong with the
// slot's links, and why they could not be listed. The guest's link must be of the kind,
// unless that is empty.
func checkLinks(h *netlink.Handle, kind vmm.LinkKind) (index map[string]int, wrong, err error) {
	links, err := listed(h.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list links of namespace: %w", err)
	}
	var errs []error
	index = map[string]int{}
	for _, l := range links {
		index[l.Attrs().Name] = l.Attrs().Index
		switch name := l.Attrs().Name; {
		case l.Attrs().Flags&net.FlagUp != 0:
		case name == PacketEnd:
			errs = append(errs, errGivenUp)
		case name == Tap || name == peerName:
			errs = append(errs, fmt.Errorf("%s is down", name))
		}
	}
	if index[peerName] == 0 {
		errs = append(errs, errors.New(peerName+" is missing"))
	}
	if index[Tap] == 0 || kind == vmm.Packet && index[PacketEnd] == 0 {
		errs = append(errs, errNoTap)
	}
	return index, errors.Join(errs...), nil
}

// checkAddrs compares the addresses of the links that exist.
func checkAddrs(h *netlink.Handle, index map[string]int, a Addrs) (wrong, err error) {
	addrs, err := listed(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of namespace: %w", err)
	}
	var errs []error
	for name, addr := range map[string]netip.Prefix{Tap: netip.PrefixFrom(GuestGateway, GuestAddr.Bits()), peerName: a.NSVeth} {
		if index[name] != 0 && !slices.ContainsFunc(addrs, func(ad netlink.Addr) bool {
			p, _ := prefixOf(ad.IPNet)
			return ad.LinkIndex == index[name] && p == addr
		}) {
			errs = append(errs, fmt.Errorf("the address of %s is missing", name))
		}
	}
	return errors.Join(errs...), nil
}

// checkRoute looks for the default route.
func checkRoute(h *netlink.Handle, index map[string]int, a Addrs) (wrong, err error) {
	routes, err := listed(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list routes of namespace: %w", err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		def := r.Dst == nil || r.Dst.IP.IsUnspecified() && isAll(r.Dst)
		return def && r.LinkIndex == index[peerName] && r.Gw.Equal(a.HostVeth.Addr().AsSlice())
	}) {
		wrong = errors.New("the namespace's default route is missing")
	}
	return wrong, nil
}

// checkNeighbour looks for the guest's hardware address.
func checkNeighbour(h *netlink.Handle, index map[string]int, _ Addrs) (wrong, err error) {
	if index[Tap] == 0 {
		return nil, nil
	}
	neighs, err := listed(func() ([]netlink.Neigh, error) { return h.NeighList(index[Tap], netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	if !slices.ContainsFunc(neighs, func(ng netlink.Neigh) bool {
		return ng.IP.Equal(GuestAddr.Addr().AsSlice()) && strings.EqualFold(ng.HardwareAddr.String(), GuestMAC)
	}) {
		wrong = errors.New("the guest's hardware address is not known")
	}
	return wrong, nil
}

// checkRules compares the rules of the calling thread's namespace, unless they
// were right after the last nftables transaction there.
func (n *Network) checkRules(s Slot, a Addrs) (wrong, err error) {
	gen, err := generation()
	if err != nil {
		return nil, err
	}
	if n.whole.at(s, gen) {
		return nil, nil
	}
	if err := errors.Join(checkTables(slotRules(a, nil)...), checkPolicy()); err != nil {
		return errors.Join(errNoRules, err), nil
	}
	n.whole.set(s, gen)
	return nil, nil
}

// generations are the numbers of the last nftables transactions in the
// namespaces whose rules were found whole: until the number changes, they are.
type generations struct {
	sync.Mutex
	m map[Slot]uint32
}

func (g *generations) at(s Slot, gen uint32) bool {
	g.Lock()
	defer g.Unlock()
	return gen != 0 && g.m[s] == gen
}

// set notes a number; 0 forgets.
func (g *generations) set(s Slot, gen uint32) {
	g.Lock()
	defer g.Unlock()
	if g.m == nil {
		g.m = map[Slot]uint32{}
	}
	if g.m[s] = gen; gen == 0 {
		delete(g.m, s)
	}
}

// generation is the number of the last nftables transaction in the calling
// thread's namespace.
func generation() (uint32, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0)
	req.AddData(&nl.Nfgenmsg{Version: nl.NFNETLINK_V0})
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("ask for the rules' generation: %w", err)
	}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return 0, fmt.Errorf("parse the rules' generation: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_GEN_ID && len(a.Value) == 4 {
				return binary.BigEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, errors.New("the kernel does not tell the rules' generation")
}

// What Repair asks of a finding.
var (
	errNoNS  = errors.New("the network namespace is missing")
	errNoTap = errors.New("the tap is missing")
	// errGivenUp: a packet socket whose link goes down once receives nothing any more.
	errGivenUp = errors.New(PacketEnd + " is down")
	errNoRules = errors.New("the namespace's rules are not whole")
)

// checkTables says whether the chains of the rule sets are there, in their
// hooks, and hold rules where rules belong, in the calling thread's namespace.
// What a chain of policies holds is not compared: it is different in each slot.
func checkTables(rs ...ruleset) error {
	return look(func(c *nftables.Conn) error {
		all, err := c.ListChains()
		if err != nil {
			return fmt.Errorf("list chains: %w", err)
		}
		type key struct {
			family nftables.TableFamily
			table  string
			chain  string
		}
		have := map[key]*nftables.Chain{}
		for _, ch := range all {
			have[key{ch.Table.Family, ch.Table.Name, ch.Name}] = ch
		}
		var errs []error
		for _, r := range rs {
			for _, want := range r.chains {
				ch := have[key{nftables.TableFamily(r.family), r.name, want.name}]
				switch {
				case ch == nil:
					errs = append(errs, fmt.Errorf("chain %s of table %s is missing", want.name, r.name))
					continue
				case want.hook != "" && (ch.Hooknum == nil || *ch.Hooknum != *hooks[want.hook]):
					errs = append(errs, fmt.Errorf("chain %s of table %s is in no hook", want.name, r.name))
					continue
				case want.drop && (ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop):
					errs = append(errs, fmt.Errorf("chain %s of table %s lets through what no rule names", want.name, r.name))
				}
				if len(want.rules) == 0 {
					continue
				}
				rules, err := c.GetRules(ch.Table, ch)
				if err != nil {
					return fmt.Errorf("list rules of %s: %w", want.name, err)
				}
				if len(rules) < len(want.rules) {
					errs = append(errs, fmt.Errorf("chain %s of table %s has %d of %d rules", want.name, r.name, len(rules), len(want.rules)))
				}
			}
		}
		return errors.Join(errs...)
	})
}

// checkPolicy says whether the egress chain leads to a policy chain that is not
// empty: an empty one lets nothing out.
func checkPolicy() error {
	return look(func(c *nftables.Conn) error {
		now, err := policyInUse(c)
		if err != nil {
			return err
		}
		rules, err := c.GetRules(now.Table, now)
		if err != nil {
			return fmt.Errorf("read policy: %w", err)
		}
		if len(rules) == 0 {
			return errors.New("the policy is empty")
		}
		return nil
	})
}

// policyInUse is the policy chain that the egress chain jumps to.
func policyInUse(c *nftables.Conn) (*nftables.Chain, error) {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable}
	rules, err := c.GetRules(t, &nftables.Chain{Name: egressChain, Table: t})
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if v, ok := e.(*expr.Verdict); ok && v.Kind == expr.VerdictJump {
				return &nftables.Chain{Name: v.Chain, Table: t}, nil
			}
		}
	}
	return nil, errors.New("no policy is in use")
}

func checkSysctl(where, name, want string) error {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err == nil && strings.TrimSpace(string(b)) != want {
		err = fmt.Errorf("%s is not %s", name, want)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	return nil
}

// Repair mends what Check finds of an open slot, under a running VM: the
// host's part, links, addresses and routes, and the rules, which come back
// with the policy and the limits given. Until those are in force nothing is
// let out. Nothing is touched that is right.
//
// Unavailable means that it cannot be mended: the namespace or the tap is
// gone, and the VMM holds the end of a wire that leads nowhere. Then only a new
// network and a new VMM help.
func (n *Network) Repair(ctx context.Context, s Slot, p Policy, l Limits) error {
	if err := errors.Join(p.Validate(), l.Validate()); err != nil {
		return err
	}
	found, err := n.CheckAll(ctx, []Slot{s})
	if err != nil {
		return err
	}
	if found.Host != nil {
		if err := n.Setup(ctx); err != nil {
			return fmt.Errorf("repair the host's network: %w", err)
		}
	}
	wrong := found.Slots[s]
	if wrong == nil {
		return nil
	}
	if errors.Is(wrong, errNoNS) || errors.Is(wrong, errNoTap) || errors.Is(wrong, errGivenUp) {
		return errdefs.Unavailable.Errorf("the sandbox's network is gone and cannot be mended under a running VM: %w", wrong)
	}
	if err := n.rebuild(ctx, s, errors.Is(wrong, errNoRules)); err != nil {
		return fmt.Errorf("repair network slot %d: %w", s, err)
	}
	if err := errors.Join(n.SetPolicy(ctx, s, p), n.SetLimits(ctx, s, l)); err != nil {
		return err
	}
	if err := n.Check(ctx, s); err != nil {
		return errdefs.Unavailable.Errorf("the sandbox's network could not be mended: %w", err)
	}
	return nil
}

// rebuild makes all of a slot anew except its namespace and its tap. It resets
// the rules, to ones that refuse everything, only if rules is true.
func (n *Network) rebuild(ctx context.Context, s Slot, rules bool) error {
	a := n.plan.Addrs(s)
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer host.Close()
	ns, err := netns.GetFromPath(a.NetNSPath)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer ns.Close()
	if err := osthread.Do(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		if rules {
			if err := resetRules(a); err != nil {
				return fmt.Errorf("set sandbox rules: %w", err)
			}
		}
		for _, c := range nsSysctls {
			if err := writeSysctl(c.name, c.value); err != nil {
				return err
			}
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in namespace: %w", err)
		}
		defer h.Close()
		if err := rebuildVeth(host, h, a, ns); err != nil {
			return err
		}
		return n.wireNS(ctx, s, a, h)
	}); err != nil {
		return err
	}
	return n.wireHost(ctx, s, a, host)
}

// resetRules makes the tables of the calling thread's namespace anew, with a
// policy that refuses everything.
func resetRules(a Addrs) error {
	return transact(func(c *nftables.Conn) error {
		for _, r := range slotRules(a, []rule{{reject()}}) {
			queueRemoval(c, r)
			if err := r.add(c); err != nil {
				return err
			}
		}
		return nil
	})
}

// rebuildVeth makes the veth pair anew if an end of it is missing, or has
// another name or namespace. h speaks to the slot's namespace ns.
func rebuildVeth(host, h *netlink.Handle, a Addrs, ns netns.NsHandle) error {
	_, inside := h.LinkByName(peerName)
	_, outside := host.LinkByName(a.Veth)
	if inside == nil && outside == nil {
		return nil
	}
	if err := removeLink(host, a); err != nil {
		return fmt.Errorf("remove half a link: %w", err)
	}
	if l, err := h.LinkByName(peerName); err == nil {
		if err := h.LinkDel(l); err != nil {
			return fmt.Errorf("remove half a link: %w", err)
		}
	}
	return addVeth(host, a, ns)
}

func isAll(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0
}
