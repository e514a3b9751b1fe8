// Package network gives every sandbox a network of its own: address plan,
// namespace, links, rules, and what they may reach.
//
// A slot is an index into the address plan. All names and addresses of a
// sandbox's network are computed from its slot, so that nothing but the index
// has to be remembered to find and free them.
//
// The guest's side is the same in every slot; what differs is the address by
// which the host sees it:
//
//	guest 169.254.0.21 ── tap0 │ namespace │ veth0 ── <instance>-<slot> │ host
//	                           │ DNAT, SNAT│  10.12.x.y/31              │ masquerade
//	                           │ 10.11.x.y │                            │
//
// The namespace holds what concerns one sandbox (translation, spoof guard,
// egress); the host's one table holds what concerns all, in a fixed number of
// rules.
package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Options are a Network's settings beside its plan.
type Options struct {
	// BaseUID and a slot add up to the user that its tap belongs to: a process
	// of that user may attach to it by name without privilege, given that it may
	// open /dev/net/tun. With 0 the taps are root's.
	BaseUID int
	// Kind is the kind of link of the slots that Run builds ahead until another one is
	// asked for; a tap if empty.
	Kind vmm.LinkKind
	// Egress is the mode of sandboxes that set none; Public if empty.
	Egress Mode
	// Limits hold for every sandbox where its own say nothing.
	Limits Limits
	// Resolvers are the name servers that the guests are told to use.
	Resolvers []netip.Addr
	// Pool is how many slots Run keeps built ahead of use, of each kind of link that was
	// asked for.
	Pool int
	// RangesFile, if not empty, is where Setup records the plan's ranges, and
	// finds those that the plan does not name.
	RangesFile string
	// Log receives what no call can return as an error. Nil discards it.
	Log *slog.Logger
}

// Network makes and removes the networks of one agent's sandboxes. Safe for
// concurrent use, with calls for one slot made one after the other, as the
// sandbox's own lock ensures.
//
// It works in the network namespace of the process and needs CAP_NET_ADMIN
// and CAP_SYS_ADMIN.
type Network struct {
	plan  Plan
	opts  Options
	slots allocator
	gates gates
	// denials are those of the open slots.
	denials denials
	// taken tells Run that a slot left the pool.
	taken chan struct{}
	// links and whole spare CountersAll and CheckAll what has not changed.
	links linkNames
	whole generations
	// strays holds those that RemoveStrays could not free.
	strays struct {
		sync.Mutex
		left []Slot
	}
	// share is what the sandboxes may take of the host's connection table.
	share tableShare
	// madeDir: Setup made netnsDir a mount, for Teardown to take back.
	madeDir atomic.Bool

	// hook is called after each step of Open; tests let it fail.
	hook func(s Slot, step string) error
}

// New returns the network of a valid plan. It changes nothing on the host.
func New(plan Plan, opts Options) *Network {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	opts.Kind = cmp.Or(opts.Kind, vmm.Tap)
	share := shareOf(connectionTable())
	opts.Limits.Connections = share.clamp(opts.Limits.Connections)
	return &Network{plan: plan, opts: opts, slots: newAllocator(opts.Kind), gates: newGates(), share: share, taken: make(chan struct{}, 1)}
}

func (n *Network) hostRules() ruleset { return hostRules(n.plan, n.opts.Resolvers, n.share) }

// Plan returns the address plan. What it leaves open, Setup fills in, once.
func (n *Network) Plan() Plan { return n.plan }

// Setup prepares the host: it chooses the ranges that the plan leaves open,
// refuses those that collide with a route of the host (InvalidArgument, naming
// the link), turns on IPv4 forwarding, and refills our table atomically. It makes
// the plan's ranges unreachable except for the slots in use, so that packets to a
// sandbox that is gone do not leave by the default route. It is idempotent and leaves open slots working.
func (n *Network) Setup(ctx context.Context) error {
	valid := n.plan.Validate
	if n.opts.RangesFile != "" {
		valid = n.plan.ValidateGiven
	}
	if err := errors.Join(valid(), Policy{Mode: n.opts.Egress}.Validate(), n.opts.Limits.Validate()); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if n.opts.Limits.InBytes > 0 || n.opts.Limits.OutBytes > 0 {
		if err := tryShaping(); err != nil {
			return err
		}
	}
	if err := n.reserve(ctx, h); err != nil {
		return err
	}
	made, err := shareDir(netnsDir)
	if made {
		n.madeDir.Store(true)
	}
	if err != nil {
		return err
	}
	// Not written if it is right already: /proc/sys may be read-only.
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err != nil || strings.TrimSpace(string(b)) != "1" {
		if err := writeSysctl("net/ipv4/ip_forward", "1"); err != nil {
			return err
		}
	}
	if err := refillTable(n.hostRules()); err != nil {
		return fmt.Errorf("set host rules: %w", err)
	}
	obstacles, err := n.plan.Obstacles(n.opts.Resolvers)
	if err != nil {
		n.opts.Log.Warn("other firewalls of the host not looked at", "err", err)
	}
	for _, o := range obstacles {
		n.opts.Log.Warn("another firewall of this host drops what sandboxes send", "chain", o.Chain, "mend", o.String())
	}
	return nil
}

// Teardown takes back what Setup made: our table and our routes. Forwarding
// stays as it is, since others may rely on it by now. Slots are not touched;
// close them first. Not there is done. It finishes even if ctx is cancelled.
func (n *Network) Teardown(context.Context) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	var errs []error
	for _, r := range n.rangeRoutes() {
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove unreachable route %s: %w", r.Dst, err))
		}
	}
	if err := removeTable(n.hostRules()); err != nil {
		errs = append(errs, fmt.Errorf("remove host rules: %w", err))
	}
	if n.madeDir.CompareAndSwap(true, false) {
		errs = append(errs, unshareDir(netnsDir))
	}
	return errors.Join(errs...)
}

// routeProtocol marks our routes, beside the kernel's and the daemons' own.
const routeProtocol netlink.RouteProtocol = 'W'

// routeMetric tells the range routes of one instance from another's.
func (n *Network) routeMetric() int {
	f := fnv.New32a()
	f.Write([]byte(n.plan.Instance))
	return int(f.Sum32()&0xffffff) + 1
}

func (n *Network) rangeRoutes() []netlink.Route {
	var rs []netlink.Route
	for _, p := range []netip.Prefix{n.plan.Hosts, n.plan.Veths} {
		rs = append(rs, netlink.Route{
			Dst: ipNet(p), Type: unix.RTN_UNREACHABLE,
			Protocol: routeProtocol, Priority: n.routeMetric(),
		})
	}
	return rs
}

// listed calls list again if the kernel says that a change cut its answer short,
// which happens on a busy host.
func listed[T any](list func() ([]T, error)) (all []T, err error) {
	for range 20 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// checkRoutes finds a route of another program that overlaps our ranges. Default
// routes, also those cut in two halves as VPNs do, overlap everything and
// collide with nothing.
func (n *Network) checkRoutes(h *netlink.Handle, plan Plan) error {
	routes, err := listed(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	names := map[int]string{}
	links, err := listed(h.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		dst, ok := prefixOf(r.Dst)
		if !ok || dst.Bits() <= 1 {
			continue
		}
		for _, ours := range []netip.Prefix{plan.Hosts, plan.Veths} {
			if !dst.Overlaps(ours) {
				continue
			}
			name := names[r.LinkIndex]
			if _, ok := n.plan.slotOf(name); ok {
				continue
			}
			if r.Protocol == routeProtocol && r.Type == unix.RTN_UNREACHABLE {
				if r.Priority == n.routeMetric() && dst == ours {
					continue
				}
				return errdefs.InvalidArgument.Errorf("address range %s is used by another agent on this host (%s); choose another range", ours, dst)
			}
			where := "link " + name
			if name == "" {
				where = "no link"
			}
			return errdefs.InvalidArgument.Errorf("address range %s collides with the host's route %s on %s; choose another range", ours, dst, where)
		}
	}
	return nil
}

// Acquire reserves a free slot whose guest is reached by a link of a kind; Exhausted when
// there is none. With vmm.Tap the guest's end is the tap device Tap, with vmm.Packet it is
// PacketEnd, for a packet socket, and all else holds for it as for a tap. If Run keeps a
// pool, the slot is one built already, and its Open has nothing left to do.
func (n *Network) Acquire(ctx context.Context, kind vmm.LinkKind) (Slot, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if kind != vmm.Tap && kind != vmm.Packet {
		return 0, errdefs.InvalidArgument.Errorf("no network has links of kind %.20q", kind)
	}
	s, warm, news := n.slots.acquireWarm(kind)
	if news {
		select {
		case n.taken <- struct{}{}:
		default:
		}
	}
	if warm {
		return s, nil
	}
	return n.slots.acquire(kind)
}

// Claim reserves a slot that a record names, after a restart of the agent.
// AlreadyExists if it is reserved. What exists of it on the host is taken
// over, with the kind of link that it has: it must be closed before Release. Claim what
// the records name before Run builds slots ahead.
func (n *Network) Claim(s Slot) error { return n.slots.claim(s, n.kindOf(s)) }

// Release gives a slot back. It is WrongState for a slot that has been opened
// or claimed and not closed since, and NotFound for one that is not reserved:
// a slot whose removal failed is never handed out again. A slot from the pool
// that was not opened goes back to the pool.
func (n *Network) Release(s Slot) error { return n.slots.release(s) }

// Strays returns, in order, the slots that are not reserved though something of
// their name exists on the host. It may be called at any time: a slot that is
// being built or removed, or is in the pool, is reserved throughout. Another
// caller may reserve a stray after Strays returned, so Claim each before Close
// and Release, or call RemoveStrays, which does. Strays looks for no routes:
// the kernel removes a route with its link.
func (n *Network) Strays(ctx context.Context) ([]Slot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	found := map[Slot]bool{}
	add := func(name string) {
		if s, ok := n.plan.slotOf(name); ok && !n.slots.reserved(s) {
			found[s] = true
		}
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	for _, e := range entries {
		add(e.Name())
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := listed(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		add(l.Attrs().Name)
	}
	return sortedSlots(found), nil
}

// RemoveStrays frees the strays there are, and returns them. One that cannot be
// removed is fenced: it stays reserved, counts in Stats, and is tried again by
// the next call.
func (n *Network) RemoveStrays(ctx context.Context) (removed []Slot, err error) {
	strays, err := n.Strays(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	n.strays.Lock()
	defer n.strays.Unlock()
	for _, s := range strays {
		// A claim fails if the slot was reserved after Strays returned.
		if n.slots.claim(s, vmm.Tap) == nil {
			n.strays.left = append(n.strays.left, s)
		}
	}
	left := n.strays.left
	n.strays.left = nil
	for _, s := range left {
		err := n.Close(ctx, s)
		if err == nil {
			err = n.slots.release(s)
		}
		if err != nil {
			errs = append(errs, err)
			n.strays.left = append(n.strays.left, s)
			continue
		}
		removed = append(removed, s)
	}
	return removed, errors.Join(errs...)
}

// writeSysctl sets a value under /proc/sys in the calling thread's network
// namespace.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	_, err = f.WriteString(value)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok
}
