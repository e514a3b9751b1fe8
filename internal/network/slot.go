package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Open builds the network of a reserved slot: namespace, link to the guest, veth pair,
// rules, addresses and routes. The rules are in force before a link is up. A
// VMM started in the namespace attaches to the guest's end of the link; what it serves is reached from
// the host at the slot's HostIP.
//
// NotFound for a slot that is not reserved, WrongState for one that is open.
// After an error nothing is left, except in two cases: the removal failed too
// (the error says so), or something of the slot's name existed before, which
// Open does not touch. Release then refuses the slot until a Close succeeds.
func (n *Network) Open(ctx context.Context, s Slot) (err error) {
	built, err := n.slots.opening(s)
	if err != nil || built && n.exists(s) {
		return err
	}
	if built {
		// It was removed while it waited in the pool.
		if err := n.Close(ctx, s); err != nil {
			return err
		}
		if _, err := n.slots.opening(s); err != nil {
			return err
		}
	}
	return n.build(ctx, s)
}

// build makes a slot that is marked dirty.
func (n *Network) build(ctx context.Context, s Slot) (err error) {
	a := n.plan.Addrs(s)
	// One inverse for all steps: Close, whichever of them were done.
	defer func() {
		if err != nil {
			err = fmt.Errorf("open network slot %d: %w", s, err)
			if !errors.Is(err, errNSExists) {
				err = errors.Join(err, n.Close(ctx, s))
			}
		}
	}()
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer host.Close()

	if err := makeNS(a.NetNSPath, func(ns netns.NsHandle) error {
		return n.fillNS(ctx, s, a, host, ns)
	}); err != nil {
		return err
	}

	return n.wireHost(ctx, s, a, host)
}

// wireHost makes the host's end of a slot's link work. What is right already
// stays as it is.
func (n *Network) wireHost(ctx context.Context, s Slot, a Addrs, host *netlink.Handle) error {
	link, err := host.LinkByName(a.Veth)
	if err != nil {
		return fmt.Errorf("find link: %w", err)
	}
	// A namespace cannot speak IPv6 to the host, not even link-locally.
	if err := disableIPv6(a.Veth); err != nil {
		return err
	}
	if err := host.AddrReplace(link, &netlink.Addr{IPNet: ipNet(a.HostVeth)}); err != nil {
		return fmt.Errorf("set host link address: %w", err)
	}
	if err := n.step(ctx, s, "host address"); err != nil {
		return err
	}
	if err := host.LinkSetUp(link); err != nil {
		return fmt.Errorf("set host link up: %w", err)
	}
	if err := n.step(ctx, s, "host link up"); err != nil {
		return err
	}
	if err := host.RouteReplace(&netlink.Route{
		LinkIndex: link.Attrs().Index, Protocol: routeProtocol,
		Dst: ipNet(netip.PrefixFrom(a.HostIP, 32)), Gw: a.NSVeth.Addr().AsSlice(),
	}); err != nil {
		return fmt.Errorf("add route to sandbox: %w", err)
	}
	return n.step(ctx, s, "host route")
}

// kindOf finds out which kind of link is in a slot's namespace; vmm.Tap where there is
// none.
func (n *Network) kindOf(s Slot) vmm.LinkKind {
	kind := vmm.Tap
	if !s.Valid() || !n.exists(s) {
		return kind
	}
	err := inNS(n.plan.Addrs(s).NetNSPath, func() error {
		_, err := net.InterfaceByName(PacketEnd)
		if err == nil {
			kind = vmm.Packet
		}
		return nil
	})
	if err != nil {
		n.opts.Log.Warn("kind of a network's link not found out", "slot", int(s), "err", err)
	}
	return kind
}

// exists says whether a slot's namespace is there, and with it its links. It
// asks the file system only: a link's name is looked up under a lock that the
// making of other slots holds.
func (n *Network) exists(s Slot) bool {
	var st unix.Statfs_t
	err := unix.Statfs(n.plan.Addrs(s).NetNSPath, &st)
	return err == nil && st.Type == unix.NSFS_MAGIC
}

// nsSysctls are what makes a namespace a router. Strict about sources: each
// address has one way here, so anything else is forged. What else a router
// does (redirects) the rules do not let through. All but unreachable errors are
// limited in rate, as is the default: refusals are for the guest alone, which
// should learn of each at once, and so take nothing of what the kernel lets
// the whole host send.
var nsSysctls = []struct{ name, value string }{
	{"net/ipv4/ip_forward", "1"},
	{"net/ipv4/conf/all/rp_filter", "1"},
	{"net/ipv4/icmp_ratemask", "6160"},
	// What has ended is not counted as a connection, so it is not kept either.
	{"net/netfilter/nf_conntrack_tcp_timeout_time_wait", strconv.Itoa(closedSecs)},
	{"net/netfilter/nf_conntrack_tcp_timeout_close", strconv.Itoa(closedSecs)},
	// The agent's sockets here are for what the guest and strangers say.
	{"net/ipv4/tcp_rmem", "4096\t131072\t524288"},
	{"net/ipv4/tcp_wmem", "4096\t16384\t524288"},
	{"net/ipv4/tcp_max_tw_buckets", "1024"},
}

// fillNS builds the namespace's inside, on a thread that is in it. host speaks
// to the host's namespace wherever the thread is.
func (n *Network) fillNS(ctx context.Context, s Slot, a Addrs, host *netlink.Handle, ns netns.NsHandle) error {
	if err := n.step(ctx, s, "namespace"); err != nil {
		return err
	}
	for _, c := range nsSysctls {
		if err := writeSysctl(c.name, c.value); err != nil {
			return err
		}
	}
	for _, link := range []string{"all", "default"} {
		if err := disableIPv6(link); err != nil {
			return err
		}
	}
	if err := n.step(ctx, s, "sysctl"); err != nil {
		return err
	}
	if err := n.makeLink(s); err != nil {
		return err
	}
	if err := n.step(ctx, s, "tap"); err != nil {
		return err
	}
	if err := addVeth(host, a, ns); err != nil {
		return err
	}
	if err := n.step(ctx, s, "veth"); err != nil {
		return err
	}
	if err := addTables(slotRules(a, egressRules(n.plan, n.opts, Policy{}))...); err != nil {
		return fmt.Errorf("set sandbox rules: %w", err)
	}
	if err := n.step(ctx, s, "rules"); err != nil {
		return err
	}

	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in namespace: %w", err)
	}
	defer h.Close()
	if err := applyLimits(h, Limits{}, n.opts.Limits); err != nil {
		return err
	}
	if err := n.step(ctx, s, "limits"); err != nil {
		return err
	}
	return n.wireNS(ctx, s, a, h)
}

// makeLink makes the link that leads to the guest, in the calling thread's namespace.
func (n *Network) makeLink(s Slot) error {
	switch {
	case n.slots.kindOf(s) == vmm.Packet:
		return makePacketPair()
	case n.opts.BaseUID != 0:
		return makeTap(Tap, n.opts.BaseUID+int(s))
	}
	return makeTap(Tap, 0)
}

// addVeth makes a slot's veth pair, one end in the host's namespace.
func addVeth(host *netlink.Handle, a Addrs, ns netns.NsHandle) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a.Veth
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = peerName, netlink.NsFd(ns)
	if err := host.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair: %w", err)
	}
	return nil
}

// wireNS makes the namespace's links work; h speaks to it. What is right
// already stays as it is.
func (n *Network) wireNS(ctx context.Context, s Slot, a Addrs, h *netlink.Handle) error {
	up := func(name string, addr *netlink.Addr) (int, error) {
		l, err := h.LinkByName(name)
		if err != nil {
			return 0, fmt.Errorf("find %s: %w", name, err)
		}
		if addr != nil {
			if err := h.AddrReplace(l, addr); err != nil {
				return 0, fmt.Errorf("set address of %s: %w", name, err)
			}
		}
		if err := h.LinkSetUp(l); err != nil {
			return 0, fmt.Errorf("set %s up: %w", name, err)
		}
		return l.Attrs().Index, n.step(ctx, s, name+" up")
	}
	if _, err := up("lo", nil); err != nil {
		return err
	}
	if err := setMAC(h, Tap, TapMAC); err != nil {
		return err
	}
	if _, err := h.LinkByName(PacketEnd); err == nil {
		if _, err := up(PacketEnd, nil); err != nil {
			return err
		}
	}
	tap, err := up(Tap, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(GuestGateway, GuestAddr.Bits()))})
	if err != nil {
		return err
	}
	peer, err := up(peerName, &netlink.Addr{IPNet: ipNet(a.NSVeth)})
	if err != nil {
		return err
	}
	// The guest has one address and one MAC; asking would only cost time.
	mac, err := net.ParseMAC(GuestMAC)
	if err != nil {
		return fmt.Errorf("parse guest MAC: %w", err)
	}
	if err := h.NeighSet(&netlink.Neigh{
		LinkIndex: tap, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
		IP: GuestAddr.Addr().AsSlice(), HardwareAddr: mac,
	}); err != nil {
		return fmt.Errorf("set guest neighbour: %w", err)
	}
	if err := n.step(ctx, s, "neighbour"); err != nil {
		return err
	}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: peer, Gw: a.HostVeth.Addr().AsSlice()}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return n.step(ctx, s, "default route")
}

// Close removes everything of a slot, the namespace last, so that whatever
// fails can be found and tried again by its name. What is gone already is
// done, and a slot that was never opened, or is not reserved, can be closed too.
// It finishes even if ctx is cancelled. The VMM must be gone before: a process
// left in the namespace keeps it, nameless and cut off, until it ends.
func (n *Network) Close(_ context.Context, s Slot) (err error) {
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if n.slots.pooled(s) {
		return errdefs.WrongState.Errorf("network slot %d is in the pool", s)
	}
	defer func() {
		if err != nil {
			n.slots.fence(s)
		}
	}()
	a := n.plan.Addrs(s)
	n.gates.close(s)
	n.denials.forget(s)
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("close network slot %d: open netlink: %w", s, err)
	}
	defer host.Close()
	if err := removeLink(host, a); err != nil {
		return fmt.Errorf("close network slot %d: remove link: %w", s, err)
	}
	// The next sandbox with this address must not inherit its connections,
	// neither those it made nor those made to it.
	if err := forgetAll(
		func(f *netlink.ConntrackFilter) error {
			return f.AddIP(netlink.ConntrackOrigSrcIP, a.HostIP.AsSlice())
		},
		func(f *netlink.ConntrackFilter) error {
			return f.AddIP(netlink.ConntrackOrigDstIP, a.HostIP.AsSlice())
		},
	); err != nil {
		return fmt.Errorf("close network slot %d: %w", s, err)
	}
	if err := removeNS(a.NetNSPath); err != nil {
		return fmt.Errorf("close network slot %d: %w", s, err)
	}
	if err := n.verifyGone(host, a); err != nil {
		return fmt.Errorf("close network slot %d: %w", s, err)
	}
	n.whole.set(s, 0)
	n.slots.closed(s)
	return nil
}

// verifyGone checks that nothing of a slot's name is on the host, before the slot
// may be handed out again.
func (n *Network) verifyGone(host *netlink.Handle, a Addrs) error {
	if _, err := os.Lstat(a.NetNSPath); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the namespace is still there: %w", err)
	}
	if _, err := host.LinkByName(a.Veth); !errors.As(err, new(netlink.LinkNotFoundError)) {
		return errors.Join(errors.New("the link is still there"), err)
	}
	// Which of the host's routes these addresses would take, not the whole
	// table: that would cost more with every sandbox.
	for _, ip := range []netip.Addr{a.HostIP, a.NSVeth.Addr()} {
		rs, err := host.RouteGetWithOptions(ip.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
		if errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look up route to %s: %w", ip, err)
		}
		for _, r := range rs {
			if dst, ok := prefixOf(r.Dst); r.Dst != nil && ok && dst.Bits() >= 31 {
				return fmt.Errorf("a route to %s is still there", dst)
			}
		}
	}
	return nil
}

// removeLink deletes the veth pair, and with it the addresses and routes on
// the host. Most of a Close is the kernel's waiting here until no CPU can see
// the link any more; the wait holds no lock, so closes run side by side.
// (Moving the link into its dying namespace looks quicker and is not: the
// kernel waits just as long, with its global lock held.)
func removeLink(host *netlink.Handle, a Addrs) error {
	link, err := host.LinkByName(a.Veth)
	if err == nil {
		err = host.LinkDel(link)
	}
	if errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// step ends a step of Open: it is where a cancelled context is noticed.
func (n *Network) step(ctx context.Context, s Slot, name string) error {
	if n.hook != nil {
		if err := n.hook(s, name); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// disableIPv6 does so for a link of the calling thread's namespace. A kernel
// without IPv6 has nothing to disable.
func disableIPv6(link string) error {
	err := writeSysctl("net/ipv6/conf/"+link+"/disable_ipv6", "1")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func setMAC(h *netlink.Handle, name, text string) error {
	mac, err := net.ParseMAC(text)
	if err != nil {
		return fmt.Errorf("parse MAC of %s: %w", name, err)
	}
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetHardwareAddr(l, mac); err != nil {
		return fmt.Errorf("set MAC of %s: %w", name, err)
	}
	return nil
}
