package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Mode is what a sandbox reaches when no list says otherwise.
type Mode string

const (
	// Public: the internet, and the resolvers. Not private networks.
	Public Mode = "public"
	// None: nothing, and no resolver either unless it is in Allow.
	None Mode = "none"
	// All: private networks too.
	All Mode = "all"
)

// ParseMode reads a mode; InvalidArgument if it is none.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Public, None, All:
		return m, nil
	}
	return "", errdefs.InvalidArgument.Errorf("egress mode %q: want public, none or all", s)
}

// MaxPolicyRanges bounds each list of a Policy.
const MaxPolicyRanges = 512

// Policy is what a sandbox may reach. What it is asked is decided in this
// order, the first answer counting:
//
//  1. Never: the host and other sandboxes, whatever their addresses; the
//     plan's ranges, link-local addresses (cloud metadata among them),
//     loopback, multicast.
//  2. Deny, the host's and the sandbox's: no.
//  3. The resolvers, port 53: yes, unless the mode is None.
//  4. Allow, the host's and the sandbox's: yes.
//  5. The mode.
//
// Refusals are answered with an ICMP error, so that programs fail at once.
type Policy struct {
	// Mode is the host's default if empty.
	Mode Mode
	// Allow and Deny are ranges; Deny wins. IPv6 ranges may be denied, which
	// they are anyway, but not allowed.
	Allow, Deny           []netip.Prefix
	AllowNames, DenyNames []string // tmp
}

// Validate reports every problem at once, as InvalidArgument.
func (p Policy) Validate() error {
	var errs []error
	if p.Mode != "" {
		_, err := ParseMode(string(p.Mode))
		errs = append(errs, err)
	}
	for what, list := range map[string][]netip.Prefix{"allow": p.Allow, "deny": p.Deny} {
		if len(list) > MaxPolicyRanges {
			errs = append(errs, errdefs.InvalidArgument.Errorf("%s list has %d ranges, at most %d are possible", what, len(list), MaxPolicyRanges))
			continue
		}
		for _, r := range list {
			switch {
			case !r.IsValid():
				errs = append(errs, errdefs.InvalidArgument.Errorf("%s list: a range is not valid", what))
			case what == "allow" && !r.Addr().Is4():
				errs = append(errs, errdefs.InvalidArgument.Errorf("%s list: %s: sandboxes speak IPv4 only", what, r))
			}
		}
	}
	return errors.Join(errs...)
}

// The ranges that mean the near side of the internet.
var (
	neverRanges = []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("127.0.0.0/8"),
		netip.MustParsePrefix("169.254.0.0/16"),
		netip.MustParsePrefix("224.0.0.0/3"), // multicast, reserved, broadcast
	}
	privateRanges = []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("100.64.0.0/10"), // carrier-grade NAT
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.0.0.0/24"), // protocol assignments
		netip.MustParsePrefix("192.168.0.0/16"),
		netip.MustParsePrefix("198.18.0.0/15"), // benchmarking
	}
)

// egressRules are the rules of the egress chain.
func egressRules(plan Plan, opts Options, p Policy) []rule {
	mode := p.Mode
	if mode == "" {
		mode = opts.Egress.Mode
	}
	never := append(slices.Clone(neverRanges), plan.Hosts, plan.Veths)
	deny := append(slices.Clone(opts.Egress.Deny), p.Deny...)
	rules := []rule{{ipv4.daddrIn(rangesOf(never)), reject()}}
	add := func(list []addrRange, terms ...term) {
		switch {
		case len(list) == 0:
		case list[0] == everything:
			rules = append(rules, terms)
		default:
			rules = append(rules, append(rule{ipv4.daddrIn(list)}, terms...))
		}
	}
	add(rangesOf(deny), reject())
	if mode != None {
		resolvers := rangesOf(singles(opts.Resolvers))
		add(resolvers, dport(unix.IPPROTO_UDP, 53), accept())
		add(resolvers, dport(unix.IPPROTO_TCP, 53), accept())
	}
	add(rangesOf(append(slices.Clone(opts.Egress.Allow), p.Allow...)), accept())
	switch mode {
	case All:
		return append(rules, rule{accept()})
	case None:
		return append(rules, rule{reject()})
	default:
		add(rangesOf(privateRanges), reject())
		return append(rules, rule{accept()})
	}
}

// SetPolicy replaces what an open slot may reach. The change is one rule in one
// transaction: there is no moment without a policy, and on an error the old
// one stands. Connections that the new policy refuses end, since it is asked
// about every packet of what the guest began; what the kernel remembers of the
// others is renewed with their next packet.
//
// The policy lives in the sandbox's namespace, not in the host's table: it
// needs no entry on the host that could outlive the sandbox, it goes with the
// namespace and survives the agent, and long lists cost nobody else. NotFound
// if the slot is not open.
func (n *Network) SetPolicy(ctx context.Context, s Slot, p Policy) error {
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if err := errors.Join(p.Validate(), ctx.Err()); err != nil {
		return err
	}
	err := inNS(n.plan.Addrs(s).NetNSPath, func() error {
		if err := swapPolicy(egressRules(n.plan, n.opts, p)); err != nil {
			return err
		}
		return forgetGuest()
	})
	if errors.Is(err, os.ErrNotExist) {
		return errdefs.NotFound.Errorf("network slot %d is not open", s)
	}
	if err != nil {
		return fmt.Errorf("set policy of network slot %d: %w", s, err)
	}
	return nil
}

// swapPolicy fills the policy chain that is not in use, and then lets the
// egress chain jump to it, in the calling thread's namespace.
//
// Replacing the rules in place, in one transaction, is not enough: a packet
// that is among the old rules when the new ones come looks in sets that are
// gone by then, finds nothing, and walks past what refused it. So the old
// chain and its sets stay as they are until the next change.
func swapPolicy(rules []rule) error {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable}
	egress := &nftables.Chain{Name: egressChain, Table: t}
	next := &nftables.Chain{Name: policyChains[0], Table: t}
	if err := transact(func(c *nftables.Conn) error {
		now, err := c.GetRules(t, egress)
		if err != nil {
			return fmt.Errorf("read policy: %w", err)
		}
		for _, r := range now {
			for _, e := range r.Exprs {
				if v, ok := e.(*expr.Verdict); ok && v.Chain == next.Name {
					next.Name = policyChains[1]
				}
			}
		}
		c.FlushChain(next)
		return addRules(c, t, next, rules)
	}); err != nil {
		return err
	}
	return transact(func(c *nftables.Conn) error {
		c.FlushChain(egress)
		return addRules(c, t, egress, []rule{{jump(next.Name)}})
	})
}

// forgetGuest deletes what the guest began from the calling thread's namespace.
func forgetGuest() error {
	_, err := forget(func(f *netlink.ConntrackFilter) error {
		return f.AddIP(netlink.ConntrackOrigSrcIP, GuestAddr.Addr().AsSlice())
	})
	return err
}

// forgetAll forgets until a look at the whole table finds nothing.
func forgetAll(describe ...func(*netlink.ConntrackFilter) error) error {
	for range 5 {
		if found, err := forget(describe...); found == 0 || err != nil {
			return err
		}
	}
	return errors.New("forget connections: new ones keep coming")
}

// forget deletes the connections that any of the filters describes from the
// calling thread's namespace, and says how many there were.
func forget(describe ...func(*netlink.ConntrackFilter) error) (found uint, err error) {
	// Looking for them means walking the kernel's whole table.
	if b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count"); err == nil && strings.TrimSpace(string(b)) == "0" {
		return 0, nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("open conntrack: %w", err)
	}
	defer h.Close()
	var filters []netlink.CustomConntrackFilter
	for _, d := range describe {
		f := new(netlink.ConntrackFilter)
		if err := d(f); err != nil {
			return 0, fmt.Errorf("describe connections: %w", err)
		}
		filters = append(filters, f)
	}
	found, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filters...)
	if err != nil {
		return found, fmt.Errorf("forget connections: %w", err)
	}
	return found, nil
}

// inNS calls fn on a thread in the namespace at path.
func inNS(path string, fn func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer ns.Close()
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		return fn()
	})
}

// addrRange is an inclusive range of IPv4 addresses.
type addrRange struct{ first, last uint32 }

var everything = addrRange{0, 1<<32 - 1}

// rangesOf returns the IPv4 prefixes as sorted ranges that neither overlap nor
// touch, as the kernel's sets want them.
func rangesOf(prefixes []netip.Prefix) []addrRange {
	var rs []addrRange
	for _, p := range prefixes {
		if !p.IsValid() || !p.Addr().Is4() {
			continue
		}
		b := p.Masked().Addr().As4()
		first := binary.BigEndian.Uint32(b[:])
		rs = append(rs, addrRange{first, first | uint32(1<<(32-p.Bits())-1)})
	}
	slices.SortFunc(rs, func(a, b addrRange) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	var out []addrRange
	for _, r := range rs {
		// In 64 bits: the end of the last range has no successor.
		if k := len(out) - 1; k >= 0 && uint64(r.first) <= uint64(out[k].last)+1 {
			out[k].last = max(out[k].last, r.last)
			continue
		}
		out = append(out, r)
	}
	return out
}

func singles(addrs []netip.Addr) []netip.Prefix {
	var ps []netip.Prefix
	for _, a := range addrs {
		ps = append(ps, netip.PrefixFrom(a, a.BitLen()))
	}
	return ps
}

func addr4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}

// String renders a range as nft does: an address, a prefix, or both ends.
func (r addrRange) String() string {
	size := uint64(r.last-r.first) + 1
	switch {
	case size == 1:
		return addr4(r.first).String()
	case size&(size-1) == 0 && uint64(r.first)%size == 0:
		bits := 32
		for ; size > 1; size >>= 1 {
			bits--
		}
		return netip.PrefixFrom(addr4(r.first), bits).String()
	}
	return addr4(r.first).String() + "-" + addr4(r.last).String()
}

// daddrIn matches a destination in one of the ranges.
func (f family) daddrIn(rs []addrRange) term { return f.addrIn("daddr", 16, rs) }

func joinRanges(rs []addrRange) string {
	texts := make([]string, len(rs))
	for i, r := range rs {
		texts[i] = r.String()
	}
	return strings.Join(texts, ", ")
}

// ParsePolicy reads a sandbox's lists on this host; tmp
func (n *Network) ParsePolicy(allowInternet *bool, allow, deny []string) (Policy, error) {
	return Policy{}, nil
}
