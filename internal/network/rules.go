package network

import (
	"net"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// The names in a slot's namespace that SetPolicy needs again. Each of the
// chains does nothing but jump to one of its two variants, or nothing at all.
const (
	slotTable   = "sandbox"
	egressChain = "egress" // what the guest sends out
	turnChain   = "turn"   // what of it the agent answers instead
	hearChain   = "hear"   // what the namespace itself takes in
	speakChain  = "speak"  // and sends
	refuseChain = "refuse" // notes and refuses
)

// refusedMeter has the last destinations that were refused to the guest. When it is
// full, others are refused without being noted: the agent empties it now and then.
var refusedMeter = meter{name: "refused", size: 64, timeout: 10 * time.Minute}

// refuse is how the guest's packets are refused.
func refuse() term { return leap(refuseChain) }

var policyChains = [2]string{"policy-a", "policy-b"}

// variantOf names a chain's first or second variant.
func variantOf(chain string, i int) string {
	if chain == egressChain {
		return policyChains[i]
	}
	return chain + "-" + string('a'+rune(i))
}

// hostRules are the host's: the same number whatever the number of sandboxes.
func hostRules(p Plan, resolvers []netip.Addr, share tableShare) ruleset {
	ours := p.Instance + "-*"
	input := []rule{{iif(ours), established(), accept()}}
	if rs := rangesOf(singles(resolvers)); len(rs) > 0 {
		input = append(input,
			rule{iif(ours), inet.addrIn("daddr", 16, rs), dport(unix.IPPROTO_UDP, 53), accept()},
			rule{iif(ours), inet.addrIn("daddr", 16, rs), dport(unix.IPPROTO_TCP, 53), accept()})
	}
	input = append(input, rule{iif(ours), drop()})
	chains := []chain{
		// What a sandbox may claim to be: IPv4, from its own address. The
		// route back to the source must be the link it came by.
		base("prerouting", nftables.ChainTypeFilter, "raw", false,
			rule{iif(ours), notIPv4(), drop()},
			rule{iif(ours), inet.saddr(ne, p.Hosts), drop()},
			rule{iif(ours), noReturnPath(), drop()},
		),
		// Nothing on the host is reachable but a resolver there, if it is the
		// configured one; the host may ask, and is answered.
		base("input", nftables.ChainTypeFilter, "filter", false, input...),
		// Sandboxes reach out, never each other, and nothing reaches in. What
		// is let out here is still subject to the host's other tables.
		base("forward", nftables.ChainTypeFilter, "filter", false,
			rule{iif(ours), oif(ours), drop()},
			rule{iif(ours), synMSSToMTU()},
			rule{oif(ours), synMSSToMTU()},
			rule{oif(ours), established(), accept()},
			rule{oif(ours), drop()},
		),
		base("postrouting", nftables.ChainTypeNAT, "srcnat", false,
			rule{inet.saddr(eq, p.Hosts), oifNot(ours), masquerade()},
		),
	}
	table := share.rules(ours)
	return ruleset{family: inet, name: p.Instance, chains: append(chains, table.chains...), closings: table.closings, meters: table.meters}
}

// slotRules are those of one namespace. Only the addresses differ from slot to
// slot, until a policy of its own replaces that in the egress chain.
func slotRules(a Addrs, egress []rule) []ruleset {
	guest := netip.PrefixFrom(GuestAddr.Addr(), 32)
	mac, _ := net.ParseMAC(GuestMAC)
	fromGuest := []term{iif(Tap), oif(peerName)}
	toGuest := []term{iif(peerName), oif(Tap)}
	return []ruleset{
		// What the guest may claim to be is decided before anything looks at
		// it: ARP and IPv4 from its one address; IPv6 and the rest do not pass.
		{family: netdev, name: "guard", chains: []chain{{
			name: "ingress", typ: nftables.ChainTypeFilter, hook: "ingress", device: Tap, priority: "filter", drop: true,
			rules: []rule{
				{etherSaddrNot(mac), drop()},
				{netdev.saddr(eq, guest), accept()},
				{arpSaddr(guest.Addr()), accept()},
			},
		}}},
		{family: ipv4, name: slotTable, meters: []meter{refusedMeter}, chains: []chain{
			base("prerouting", nftables.ChainTypeNAT, "dstnat", false,
				rule{iif(peerName), ipv4.daddr(eq, netip.PrefixFrom(a.HostIP, 32)), dnat(guest.Addr())},
				rule{iif(Tap), jump(turnChain)},
			),
			base("postrouting", nftables.ChainTypeNAT, "srcnat", false,
				rule{oif(peerName), ipv4.saddr(eq, guest), snat(a.HostIP)},
				rule{oif(peerName), marked(proxyMark), snat(a.HostIP)},
			),
			// The namespace itself takes in and sends nothing, so that a VMM that
			// was taken over cannot use it. Exceptions are the ICMP errors that the
			// guest's connections need, and the agent's proxy.
			base("input", nftables.ChainTypeFilter, "filter", true, rule{jump(hearChain)}, rule{iif(Tap), refuse()}),
			base("output", nftables.ChainTypeFilter, "filter", true,
				rule{oif(Tap), icmpType("destination-unreachable", 3), accept()},
				rule{oif(Tap), icmpType("time-exceeded", 11), accept()},
				rule{jump(speakChain)},
			),
			// In: the host, and answers. Out: answers, and what egress allows.
			// Egress sees every packet of what the guest began, so that a
			// tighter policy ends connections that exist.
			base("forward", nftables.ChainTypeFilter, "filter", true,
				rule{invalid(), drop()},
				append(rule(toGuest), established(), accept()),
				append(rule(toGuest), ipv4.saddr(eq, netip.PrefixFrom(a.HostVeth.Addr(), 32)), dnatted(), accept()),
				append(rule(fromGuest), replyDirection(), accept()),
				append(rule(fromGuest), jump(egressChain)),
			),
			{name: turnChain},
			{name: hearChain},
			{name: speakChain},
			{name: refuseChain, rules: []rule{
				{destinationNoted(refusedMeter, unix.IPPROTO_TCP), reject()},
				{destinationNoted(refusedMeter, unix.IPPROTO_UDP), reject()},
				{destinationNoted(refusedMeter, 0), reject()},
				{reject()},
			}},
			{name: egressChain, rules: []rule{{jump(policyChains[0])}}},
			{name: policyChains[0], rules: egress},
			{name: policyChains[1]},
		}},
	}
}
