package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
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

// maxPolicyRanges bounds each list of ranges of a Policy, maxPolicyNames each
// list of names.
const (
	maxPolicyRanges = 512
	maxPolicyNames  = 512
)

// maxDNS bounds the name servers of an Egress.
const maxDNS = 10

// Egress is what a sandbox may reach, as its user said it. A nil field was not said,
// an empty list was.
type Egress struct {
	// AllowInternet says whether it reaches what no list names, as far as the host lets
	// it. False is the same as 0.0.0.0/0 in Deny.
	AllowInternet *bool `json:"allowInternet,omitzero"`
	// Allow and Deny are IPv4 addresses, ranges and domain names. Allow wins.
	Allow []string `json:"allow,omitzero"`
	Deny  []string `json:"deny,omitzero"`
	// DNS are the IPv4 addresses of name servers. They count only with a name in Allow:
	// all traffic to them passes then, and the agent answers no questions. Without them
	// (nil) the agent does, wherever they are sent.
	DNS []string `json:"dns,omitzero"`
}

// Clone returns a copy that shares nothing.
func (e Egress) Clone() Egress {
	if e.AllowInternet != nil {
		allow := *e.AllowInternet
		e.AllowInternet = &allow
	}
	e.Allow, e.Deny, e.DNS = slices.Clone(e.Allow), slices.Clone(e.Deny), slices.Clone(e.DNS)
	return e
}

// IsZero says whether nothing was said.
func (e Egress) IsZero() bool {
	return e.AllowInternet == nil && e.Allow == nil && e.Deny == nil && e.DNS == nil
}

// Policy is what a sandbox may reach. What it is asked is decided in this
// order, the first answer counting:
//
//  1. Never: the host and other sandboxes, whatever their addresses; the
//     plan's ranges, link-local addresses (cloud metadata among them),
//     loopback, multicast.
//  2. Allow: yes.
//  3. Deny: no.
//  4. The resolvers, port 53: yes, unless the mode is None.
//  5. The mode.
//
// Refusals are answered with an ICMP error, so that programs fail at once.
//
// Names change that, if there are any to deny, or any to allow where the mode
// is None (elsewhere a name that is allowed is nothing new). Then:
//
//   - Addresses in Allow are reached directly.
//   - TCP connections to all others go to a proxy, which lets through what shows the
//     name of a host, in TLS or in HTTP, and connects to the addresses that it finds
//     for that name itself; never to those that the guest claims it has. A name in
//     AllowNames is let through, then one in DenyNames is refused, then the mode
//     decides. No name leads to what 1 refuses, and to private addresses only with 2
//     or the mode All. To what 3 refuses lead only names in AllowNames. A refused
//     request is answered with 403, TLS with an alert; other connections are reset.
//   - Questions to port 53 of all others, wherever they are sent, are answered by the
//     agent: names that are not let through lead to the proxy, for it to say so. With
//     OwnDNS the agent answers none.
//   - Everything else is refused: QUIC, and HTTP/2 that begins without TLS.
//
// A denied name without a * also denies the addresses that it has, except to names
// in AllowNames. What a server that is let through does inside of its TLS connections
// cannot be seen; where a policy denies names and opens the rest of the internet, any
// relay leads around the denied names.
//
// The proxy is the agent's: without an agent nothing passes by name.
type Policy struct {
	// Mode is the host's default if empty.
	Mode Mode
	// Allow and Deny are ranges; Allow wins. IPv6 ranges may be denied, which
	// they are anyway, but not allowed.
	Allow, Deny []netip.Prefix
	// AllowNames and DenyNames are names in lower case: "example.com",
	// "*.example.com" for all below it, or "*". AllowNames win.
	AllowNames, DenyNames []string
	// OwnDNS says that name servers in Allow, if any, answer the guest's questions.
	OwnDNS bool
}

// IsZero says whether the policy is the host's.
func (p Policy) IsZero() bool {
	return p.Mode == "" && len(p.Allow)+len(p.Deny)+len(p.AllowNames)+len(p.DenyNames) == 0
}

// ParsePolicy reads what the user of a sandbox said. The range 0.0.0.0/0 is the
// internet: denied, it means the same as AllowInternet false; allowed, it wins over
// all that is denied.
//
// A sandbox may not be more open than the host lets it, whose mode is the
// first argument: Denied for anything in Allow on a host with None, and for private
// ranges on one with Public. Everything else that is wrong is InvalidArgument. Problems
// are reported at once, not one by one. AllowInternet is never refused: some clients
// say it without being asked.
func ParsePolicy(host Mode, e Egress) (Policy, error) {
	if host == "" {
		host = Public
	}
	var p Policy
	allowed, allowErr := readList("allow", e.Allow, &p.Allow, &p.AllowNames)
	denied, denyErr := readList("deny", e.Deny, &p.Deny, &p.DenyNames)
	dns, dnsErr := readDNS(e.DNS)
	if host == Public {
		allowErr = errors.Join(allowErr, refusePrivate("allow list", p.Allow))
		dnsErr = errors.Join(dnsErr, refusePrivate("DNS servers", dns))
	}
	switch open := e.AllowInternet == nil || *e.AllowInternet; {
	case allowed:
		p.Deny, p.DenyNames, p.AllowNames = nil, nil, nil
	case denied || !open:
		p.Mode = None
	}
	if p.OwnDNS = p.Mode == None && len(p.AllowNames) > 0 && e.DNS != nil; p.OwnDNS {
		p.Allow = append(p.Allow, dns...)
	}
	errs := []error{allowErr, denyErr, dnsErr, p.Validate()}
	if host == None && len(e.Allow) > 0 {
		errs = append(errs, errdefs.Denied.Errorf("this host lets its sandboxes reach nothing (--egress none): "+
			"a sandbox's policy cannot allow anything"))
	}
	if err := errors.Join(errs...); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// readDNS reads the addresses of name servers.
func readDNS(list []string) ([]netip.Prefix, error) {
	if len(list) > maxDNS {
		return nil, errdefs.InvalidArgument.Errorf("%d DNS servers are given, at most %d are possible", len(list), maxDNS)
	}
	var addrs []netip.Addr
	var errs []error
	for _, text := range list {
		a, err := netip.ParseAddr(text)
		if err != nil || !a.Is4() {
			errs = append(errs, errdefs.InvalidArgument.Errorf("invalid DNS server %.70q: want an IPv4 address", text))
			continue
		}
		addrs = append(addrs, a)
	}
	return singles(addrs), errors.Join(errs...)
}

// readList sorts the entries of a list into ranges and names, and says whether
// the internet is one of them.
func readList(what string, list []string, ranges *[]netip.Prefix, names *[]string) (internet bool, err error) {
	if most := maxPolicyRanges + maxPolicyNames; len(list) > most {
		return false, errdefs.InvalidArgument.Errorf("%s list has %d entries, at most %d are possible", what, len(list), most)
	}
	var errs []error
	bad := 0
	for _, text := range list {
		if r, ok := parseRange(text); ok {
			internet = internet || r == theInternet
			if r != theInternet && !slices.Contains(*ranges, r) {
				*ranges = append(*ranges, r)
			}
			continue
		}
		name, err := egress.ParseName(text)
		if err != nil {
			if bad++; bad <= maxReported {
				errs = append(errs, fmt.Errorf("%s list: %w", what, err))
			}
		} else if !slices.Contains(*names, name) {
			*names = append(*names, name)
		}
	}
	if bad > maxReported {
		errs = append(errs, errdefs.InvalidArgument.Errorf("%s list: %d more entries are wrong", what, bad-maxReported))
	}
	return internet, errors.Join(errs...)
}

// parseRange reads an address or a range. IPv4 written as IPv6 is IPv4.
func parseRange(text string) (r netip.Prefix, ok bool) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	r, err := netip.ParsePrefix(text)
	if mapped := r.Bits() - 96; err == nil && r.Addr().Is4In6() && mapped >= 0 {
		r = netip.PrefixFrom(r.Addr().Unmap(), mapped)
	}
	return r.Masked(), err == nil
}

// refusePrivate reports, as Denied, the ranges that overlap private ones.
func refusePrivate(what string, allow []netip.Prefix) error {
	var errs []error
	for _, r := range allow {
		if i := slices.IndexFunc(privateRanges, r.Overlaps); i >= 0 {
			errs = append(errs, errdefs.Denied.Errorf("%s: %s: this host does not let its sandboxes reach private addresses "+
				"(--egress public), which %s are", what, r, privateRanges[i]))
		}
	}
	return errors.Join(errs...)
}

// ParsePolicy is ParsePolicy on this host.
func (n *Network) ParsePolicy(e Egress) (Policy, error) { return ParsePolicy(n.opts.Egress, e) }

// maxReported bounds the problems that ParsePolicy tells of one list.
const maxReported = 16

var theInternet = netip.MustParsePrefix("0.0.0.0/0")

// Validate reports every problem at once, as InvalidArgument.
func (p Policy) Validate() error {
	var errs []error
	if p.Mode != "" {
		_, err := ParseMode(string(p.Mode))
		errs = append(errs, err)
	}
	for what, list := range map[string][]netip.Prefix{"allow": p.Allow, "deny": p.Deny} {
		if len(list) > maxPolicyRanges {
			errs = append(errs, errdefs.InvalidArgument.Errorf("%s list has %d ranges, at most %d are possible", what, len(list), maxPolicyRanges))
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
	for what, list := range map[string][]string{"allow": p.AllowNames, "deny": p.DenyNames} {
		if len(list) > maxPolicyNames {
			errs = append(errs, errdefs.InvalidArgument.Errorf("%s list has %d names, at most %d are possible", what, len(list), maxPolicyNames))
			continue
		}
		for _, name := range list {
			if as, err := egress.ParseName(name); err != nil {
				errs = append(errs, fmt.Errorf("%s list: %w", what, err))
			} else if as != name {
				errs = append(errs, errdefs.InvalidArgument.Errorf("%s list: name %q: want it as %q", what, name, as))
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

// rangePolicy is a sandbox's policy with the host's mode, as ranges.
type rangePolicy struct {
	never, allow, deny, resolvers []addrRange
	mode                          Mode
}

func rangePolicyOf(plan Plan, opts Options, p Policy) rangePolicy {
	v := rangePolicy{
		never: rangesOf(append(slices.Clone(neverRanges), plan.Hosts, plan.Veths)),
		allow: rangesOf(p.Allow),
		deny:  rangesOf(p.Deny),
		mode:  p.Mode,
	}
	if v.mode == "" {
		v.mode = opts.Egress
	}
	if v.mode != None {
		v.resolvers = rangesOf(singles(opts.Resolvers))
	}
	return v
}

// rules are those of the egress chain, or of another one; no is how they refuse.
func (v rangePolicy) rules(no term) []rule {
	rules := []rule{{ipv4.daddrIn(v.never), no}}
	add := func(list []addrRange, terms ...term) {
		switch {
		case len(list) == 0:
		case list[0] == everything:
			rules = append(rules, terms)
		default:
			rules = append(rules, append(rule{ipv4.daddrIn(list)}, terms...))
		}
	}
	add(v.allow, accept())
	add(v.deny, no)
	add(v.resolvers, dport(unix.IPPROTO_UDP, 53), accept())
	add(v.resolvers, dport(unix.IPPROTO_TCP, 53), accept())
	switch v.mode {
	case All:
		return append(rules, rule{accept()})
	case None:
		return append(rules, rule{no})
	default:
		add(rangesOf(privateRanges), no)
		return append(rules, rule{accept()})
	}
}

// permits says whether the rules let an address through. It leaves the rules for
// resolvers out.
func (v rangePolicy) permits(a netip.Addr) bool {
	switch {
	case !a.Is4() || contains(v.never, a):
		return false
	case contains(v.allow, a):
		return true
	case contains(v.deny, a):
		return false
	}
	return v.mode == All || v.mode != None && !contains(rangesOf(privateRanges), a)
}

// egressRules are the rules of the egress chain.
func egressRules(plan Plan, opts Options, p Policy) []rule {
	v := rangePolicyOf(plan, opts, p)
	if v.named(p) {
		v = v.beside()
	}
	return v.rules(refuse())
}

// SetPolicy replaces what an open slot may reach. The change is one
// transaction: there is no moment without a policy, and on an error the old
// one stands. Connections that the new policy refuses end, since it is asked
// about every packet of what the guest began; what the kernel remembers of the
// others is renewed with their next packet.
//
// The policy lives in the sandbox's namespace, not in the host's table: it
// needs no entry on the host that could outlive the sandbox, it goes with the
// namespace and survives the agent, and long lists cost other sandboxes nothing. NotFound
// if the slot is not open.
//
// Names need the agent: a policy that has them must be set again after its
// restart, and until then refuses what it would have to look at. While names
// change, what the old and the new policy refuse is refused, and what both let
// through goes on; on an error it stays so, and trying again is safe. Without
// names in the new policy, connections through the proxy end.
func (n *Network) SetPolicy(ctx context.Context, s Slot, p Policy) error {
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if err := errors.Join(p.Validate(), ctx.Err()); err != nil {
		return err
	}
	err := n.setPolicy(ctx, s, p)
	if errors.Is(err, os.ErrNotExist) {
		return errdefs.NotFound.Errorf("network slot %d is not open", s)
	}
	if err != nil {
		return fmt.Errorf("set policy of network slot %d: %w", s, err)
	}
	return nil
}

func (n *Network) setPolicy(ctx context.Context, s Slot, p Policy) error {
	path := n.plan.Addrs(s).NetNSPath
	v := rangePolicyOf(n.plan, n.opts, p)
	if !v.named(p) {
		if g := n.gates.of(s); g != nil {
			g.proxy.Restrict(ctx, v.names(p))
		}
		if err := n.swap(ctx, s, policyChainsOf(v, p, nil)); err != nil {
			return err
		}
		n.gates.close(s)
		return inNS(path, func() error {
			return forgetGuest()
		})
	}
	// The sockets are open before a rule points to them.
	g := n.gates.of(s)
	fresh := g == nil
	if fresh {
		var err error
		if g, err = n.openGate(ctx, s, path, v.names(p)); err != nil {
			return err
		}
	} else {
		g.proxy.Restrict(ctx, v.names(p))
	}
	if err := n.swap(ctx, s, policyChainsOf(v, p, g)); err != nil {
		if fresh {
			g.proxy.Close()
		}
		return err
	}
	n.gates.put(s, g)
	g.proxy.Settle()
	return inNS(path, func() error { return forgetBeside(g.ports.answering(p).serve) })
}

func (n *Network) swap(ctx context.Context, s Slot, chains []policyChain) error {
	if err := n.step(ctx, s, "policy"); err != nil {
		return err
	}
	return inNS(n.plan.Addrs(s).NetNSPath, func() error { return swapPolicy(chains) })
}

// swapPolicy fills the variants of the policy's chains that are not in use, and
// then lets the fixed chains jump to them, in the calling thread's namespace.
// A chain without rules is not jumped to.
//
// Replacing the rules in place, in one transaction, is not enough: a packet
// that is among the old rules when the new ones come looks in sets that are
// gone, finds nothing, and passes the rule that refused it. So the old
// chains and their sets stay as they are until the next change.
func swapPolicy(chains []policyChain) error {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable}
	next := 0
	if err := transact(func(c *nftables.Conn) error {
		now, err := c.GetRules(t, &nftables.Chain{Name: egressChain, Table: t})
		if err != nil {
			return fmt.Errorf("read policy: %w", err)
		}
		for _, r := range now {
			for _, e := range r.Exprs {
				if v, ok := e.(*expr.Verdict); ok && v.Chain == variantOf(egressChain, next) {
					next = 1
				}
			}
		}
		for _, pc := range chains {
			if len(pc.rules) == 0 {
				continue
			}
			ch := c.AddChain(&nftables.Chain{Name: variantOf(pc.name, next), Table: t})
			c.FlushChain(ch)
			if err := addRules(c, t, ch, pc.rules); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return transact(func(c *nftables.Conn) error {
		for _, pc := range chains {
			// Added in case an earlier version made the slot.
			ch := c.AddChain(&nftables.Chain{Name: pc.name, Table: t})
			c.FlushChain(ch)
			if len(pc.rules) == 0 {
				continue
			}
			if err := addRules(c, t, ch, []rule{{jump(variantOf(pc.name, next))}}); err != nil {
				return err
			}
		}
		return nil
	})
}
