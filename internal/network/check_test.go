package network

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Whatever is taken away is found, named, and mended under a running guest; the
// policy and the limits of before hold again.
func TestCheckAndRepair(t *testing.T) {
	limits := Limits{InBytes: 30_000_000, InPackets: 90_000, Connections: 100}
	policy := Policy{Deny: prefixes("198.51.100.0/24")}
	n := world(t, Options{})
	ctx := t.Context()
	s, a, g := open(t, n)
	other, _, _ := open(t, n)
	must(t, n.SetPolicy(ctx, s, policy))
	must(t, n.SetLimits(ctx, s, limits))
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	serve(t, internet, internetAddr, 7050)
	denied := netip.MustParseAddr("198.51.100.50")
	internetHas(t, denied)
	far := serve(t, internet, denied, 7050)
	works := func(what string) {
		t.Helper()
		if err := n.Check(ctx, s); err != nil {
			t.Errorf("%s: check = %v", what, err)
		}
		if ask(t, here, "tcp", a.HostIP, 49983, timeout) == "" {
			t.Errorf("%s: the host does not reach the guest", what)
		}
		if ask(t, g.ns, "tcp", internetAddr, 7050, timeout) == "" {
			t.Errorf("%s: the guest does not reach the internet", what)
		}
		if ask(t, g.ns, "udp", denied, 7050, silence) != "" {
			t.Errorf("%s: the guest reaches what its policy denies", what)
		}
		if got := limitsOf(t, a); got != limits {
			t.Errorf("%s: limits are %+v", what, got)
		}
	}
	works("as opened")
	far.drain()

	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	for _, c := range breakages(t, n, a, ns) {

		c.breaks()
		if err := n.Check(ctx, s); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: check = %v, want it to say %q", c.name, err, c.says)
		}
		if err := n.Repair(ctx, s, policy, limits); err != nil {
			t.Fatalf("%s: repair = %v", c.name, err)
		}
		works(c.name)
		if err := n.Check(ctx, other); err != nil {
			t.Errorf("%s: the other slot: %v", c.name, err)
		}
		far.nothing(t, c.name)
	}

	// What no repair can bring back.
	in(t, ns, func() {
		tap := linkNamed(t, Tap)
		must(t, netlink.LinkSetDown(tap))
		must(t, netlink.LinkSetName(tap, "gone"))
	})
	if err := n.Repair(ctx, s, policy, limits); !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "tap") {
		t.Errorf("repair without a tap = %v", err)
	}
	must(t, removeNS(a.NetNSPath))
	if err := n.Repair(ctx, s, policy, limits); !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "namespace") {
		t.Errorf("repair without a namespace = %v", err)
	}
	if err := n.Check(ctx, 0); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("check of slot 0 = %v", err)
	}
	found, err := n.CheckAll(ctx, []Slot{s, other, other + 7})
	if err != nil || found.Host != nil || len(found.Slots) != 2 || found.Slots[s] == nil || found.Slots[other+7] == nil {
		t.Errorf("check of all = %+v, %v", found, err)
	}
}

func linkNamed(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

// breakage takes something of a slot or of the host away. says is what Check says of it.
type breakage struct {
	name, says string
	breaks     func()
}

// breakages are all that Repair can mend of a slot whose namespace is ns.
func breakages(t *testing.T, n *Network, a Addrs, ns netns.NsHandle) []breakage {
	inside := func(fn func()) func() { return func() { in(t, ns, fn) } }
	link := func(name string) netlink.Link { return linkNamed(t, name) }
	drop := func(r ruleset, flush string) {
		must(t, transact(func(c *nftables.Conn) error {
			if flush != "" {
				c.FlushChain(&nftables.Chain{Name: flush, Table: r.nftTable()})
				return nil
			}
			c.DelTable(r.nftTable())
			return nil
		}))
	}
	host := hostRules(n.plan, nil, n.share)
	slot := slotRules(a, nil)
	ranges := n.rangeRoutes()
	return []breakage{
		{"host address", "address on the link", func() {
			must(t, netlink.AddrDel(link(a.Veth), &netlink.Addr{IPNet: ipNet(a.HostVeth)}))
		}},
		{"host link", "link to the host is down", func() { must(t, netlink.LinkSetDown(link(a.Veth))) }},
		{"host route", "route to the sandbox", func() {
			must(t, netlink.RouteDel(&netlink.Route{Dst: ipNet(netip.PrefixFrom(a.HostIP, 32)), LinkIndex: link(a.Veth).Attrs().Index}))
		}},
		{"veth pair", "link to the host is missing", func() { must(t, netlink.LinkDel(link(a.Veth))) }},
		{"host's end under another name", "link to the host is missing", func() {
			must(t, netlink.LinkSetDown(link(a.Veth)))
			must(t, netlink.LinkSetName(link(a.Veth), "astray"))
		}},
		{"range route", "unreachable route", func() { must(t, netlink.RouteDel(&ranges[0])) }},
		{"host table", "host's rules", func() { drop(host, "") }},
		{"host's forward rules", "host's rules", func() { drop(host, "forward") }},
		{"forwarding", "ip_forward", func() { must(t, writeSysctl("net/ipv4/ip_forward", "0")) }},
		{"namespace's forwarding", "ip_forward", inside(func() { must(t, writeSysctl("net/ipv4/ip_forward", "0")) })},
		{"tap down", "tap0 is down", inside(func() { must(t, netlink.LinkSetDown(link(Tap))) })},
		{"tap's address", "address of tap0", inside(func() {
			must(t, netlink.AddrDel(link(Tap), &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(GuestGateway, GuestAddr.Bits()))}))
		})},
		{"veth down", "veth0 is down", inside(func() { must(t, netlink.LinkSetDown(link(peerName))) })},
		{"default route", "default route", inside(func() {
			must(t, netlink.RouteDel(&netlink.Route{LinkIndex: link(peerName).Attrs().Index, Gw: a.HostVeth.Addr().AsSlice()}))
		})},
		{"neighbour", "hardware address", inside(func() {
			must(t, netlink.NeighDel(&netlink.Neigh{LinkIndex: link(Tap).Attrs().Index, IP: GuestAddr.Addr().AsSlice()}))
		})},
		{"guard table", "rules", inside(func() { drop(slot[0], "") })},
		{"sandbox table", "rules", inside(func() { drop(slot[1], "") })},
		{"guard's rules", "rules", inside(func() { drop(slot[0], "ingress") })},
		{"egress rules", "rules", inside(func() { drop(slot[1], egressChain) })},
		{"policy", "policy is empty", inside(func() {
			must(t, transact(func(c *nftables.Conn) error {
				now, err := policyInUse(c)
				must(t, err)
				c.FlushChain(now)
				return nil
			}))
		})},
		{"everything in nftables", "rules", inside(func() {
			must(t, transact(func(c *nftables.Conn) error { c.FlushRuleset(); return nil }))
		})},
	}
}

// Strays are freed while slots are built, removed and pooled: never one of
// those.
func TestStraysAtRuntime(t *testing.T) {
	n := world(t, Options{Pool: 2})
	ctx := t.Context()
	before := inventory(t)
	stop := run(t, n)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 8 {
				s, err := n.Acquire(ctx, kind)
				must(t, err)
				if err := n.Open(ctx, s); err != nil {
					t.Errorf("open slot %d: %v", s, err)
				}
				if err := n.Check(ctx, s); err != nil {
					t.Errorf("slot %d of another sandbox was changed: %v", s, err)
				}
				must(t, errors.Join(n.Close(ctx, s), n.Release(s)))
			}
		})
	}
	go func() { wg.Wait(); close(done) }()
	for looking := true; looking; {
		select {
		case <-done:
			looking = false
		default:
		}
		// One that was just closed and released may be looked at again, and
		// is found gone; its removal is as good as none.
		if _, err := n.RemoveStrays(ctx); err != nil {
			t.Errorf("remove strays: %v", err)
		}
	}

	// A real one goes; one that cannot is fenced until it can.
	stray, fenced := Slot(900), Slot(901)
	other := New(testPlan(), Options{})
	must(t, other.Claim(stray))
	must(t, other.build(ctx, stray))
	must(t, os.MkdirAll(netnsDir+"/tnet-901/full", 0o755))
	removed, err := n.RemoveStrays(ctx)
	if !slices.Equal(removed, []Slot{stray}) || err == nil {
		t.Errorf("removed %v, %v; want %d removed and an error for %d", removed, err, stray, fenced)
	}
	if st := n.Stats(); st.Fenced != 1 || !n.slots.reserved(fenced) {
		t.Errorf("stats = %+v, want one fenced", st)
	}
	if err := n.Release(fenced); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release of a fenced slot = %v", err)
	}
	must(t, os.Remove(netnsDir+"/tnet-901/full"))
	if removed, err = n.RemoveStrays(ctx); err != nil || !slices.Equal(removed, []Slot{fenced}) {
		t.Errorf("removed %v, %v; want the fenced one", removed, err)
	}
	stop()
	if st := n.Stats(); st != (Stats{}) {
		t.Errorf("stats = %+v, want none", st)
	}
	if after := inventory(t); !slices.Equal(before, after) {
		t.Errorf("before %v\nafter %v", before, after)
	}
}

// A slot of which something is left is not handed out again.
func TestCloseVerifies(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	must(t, n.Open(ctx, s))
	a := n.plan.Addrs(s)
	left := &netlink.Route{Dst: ipNet(netip.PrefixFrom(a.HostIP, 32)), Gw: internetAddr.AsSlice(), Priority: 7}
	must(t, netlink.RouteAdd(left))
	if err := n.Close(ctx, s); err == nil || !strings.Contains(err.Error(), "route") {
		t.Errorf("close with a route left = %v", err)
	}
	if err := n.Release(s); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release = %v", err)
	}
	if st := n.Stats(); st != (Stats{Reserved: 1, Open: 1, Fenced: 1}) {
		t.Errorf("stats = %+v", st)
	}
	must(t, netlink.RouteDel(left))
	must(t, n.Close(ctx, s))
	must(t, n.Release(s))
	if st := n.Stats(); st != (Stats{}) {
		t.Errorf("stats = %+v", st)
	}
}
