package network

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
)

var update = flag.Bool("update", false, "write the golden files")

func prefixes(texts ...string) (ps []netip.Prefix) {
	for _, s := range texts {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

var testPolicies = []Policy{
	{Mode: None},
	{Mode: All},
	{Mode: None, Allow: prefixes("192.0.2.1/32", "198.18.0.0/15")},
	{Mode: Public, Allow: prefixes("10.5.0.0/16", "10.6.0.0/16", "10.5.7.0/24"),
		Deny: prefixes("8.8.8.8/32", "8.8.4.0/23", "255.0.0.0/8", "2001:db8::/32")},
	{Mode: Public, Allow: prefixes("0.0.0.0/0")},
	{Mode: All, Deny: prefixes("0.0.0.0/1", "128.0.0.0/1")},
	{Mode: All, Deny: prefixes("11.0.0.0/8", "12.0.0.0/8", "192.0.2.7/31", "1.1.1.1/32")},
}

var namedPolicies = []Policy{
	{Mode: None, AllowNames: []string{"example.com"}},
	{Mode: None, Allow: prefixes("10.5.0.0/16"), Deny: prefixes("8.8.8.8/32"), AllowNames: []string{"*.example.com"}},
	{Mode: None, Allow: prefixes("192.0.2.53/32"), AllowNames: []string{"example.com"}, OwnDNS: true},
	{Mode: Public, Allow: prefixes("10.5.0.0/16"), Deny: prefixes("8.8.8.8/32"), DenyNames: []string{"*.example.com"}},
	{Mode: All, DenyNames: []string{"example.com"}},
	{Mode: Public, AllowNames: []string{"example.com"}}, // which it is anyway
}

var testPorts = gatePorts{conns: 40001, dnsConns: 40002, dnsPacket: 40003}

// The rule sets as text; that the kernel holds the same is shown elsewhere.
func TestRulesGolden(t *testing.T) {
	p := DefaultPlan()
	opts := Options{
		Resolvers: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("10.0.0.2")},
	}
	var slot, policies strings.Builder
	for _, r := range slotRules(p.Addrs(7), egressRules(p, opts, Policy{})) {
		slot.WriteString(r.String())
	}
	for _, pol := range testPolicies {
		fmt.Fprintf(&policies, "# mode %s, allow %v, deny %v\n", pol.Mode, pol.Allow, pol.Deny)
		for _, r := range egressRules(p, opts, pol) {
			fmt.Fprintln(&policies, r)
		}
	}
	var named strings.Builder
	for _, pol := range namedPolicies {
		fmt.Fprintf(&named, "# mode %s, allow %v %v, deny %v %v, own DNS %v\n",
			pol.Mode, pol.Allow, pol.AllowNames, pol.Deny, pol.DenyNames, pol.OwnDNS)
		v := rangePolicyOf(p, opts, pol)
		var g *gate
		if v.named(pol) {
			g = &gate{ports: testPorts}
		}
		for _, c := range policyChainsOf(v, pol, g) {
			fmt.Fprintf(&named, "%s:\n", c.name)
			for _, r := range c.rules {
				fmt.Fprintf(&named, "\t%s\n", r)
			}
		}
	}
	for file, got := range map[string]string{
		"testdata/names.nft":    named.String(),
		"testdata/host.nft":     hostRules(p, opts.Resolvers, shareOf(262144)).String(),
		"testdata/slot-7.nft":   slot.String(),
		"testdata/policies.nft": policies.String(),
	} {
		if *update {
			must(t, os.WriteFile(file, []byte(got), 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if d := cmp.Diff(string(want), got); d != "" {
			t.Errorf("%s (-want +got):\n%s", file, d)
		}
	}
}

// Two slots' rules differ in the slots' own addresses and nothing else.
func TestSlotRulesDifferInAddressesOnly(t *testing.T) {
	p := DefaultPlan()
	text := func(s Slot) string {
		a := p.Addrs(s)
		var b strings.Builder
		for _, r := range slotRules(a, egressRules(p, Options{}, Policy{})) {
			b.WriteString(r.String())
		}
		return strings.NewReplacer(a.HostIP.String(), "HOST", a.HostVeth.Addr().String(), "LINK").Replace(b.String())
	}
	if d := cmp.Diff(text(1), text(MaxSlot)); d != "" {
		t.Errorf("slots 1 and %d differ (-1 +max):\n%s", MaxSlot, d)
	}
}

// The host's rules are as many for one sandbox as for all.
func TestHostRulesDoNotGrow(t *testing.T) {
	n := world(t, Options{})
	before := hostRuleCount(t)
	for range 3 {
		open(t, n)
	}
	if after := hostRuleCount(t); after != before {
		t.Errorf("%d rules and sets on the host without sandboxes, %d with three", before, after)
	}
}

func hostRuleCount(t *testing.T) (count int) {
	t.Helper()
	c, err := nftables.New()
	must(t, err)
	chains, err := c.ListChains()
	must(t, err)
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		must(t, err)
		count += len(rules)
	}
	tables, err := c.ListTables()
	must(t, err)
	for _, table := range tables {
		sets, err := c.GetSets(table)
		must(t, err)
		for _, s := range sets {
			elems, err := c.GetSetElements(s)
			must(t, err)
			count += 1 + len(elems)
		}
	}
	return count
}

func TestRangesOf(t *testing.T) {
	for range 200 {
		var ps []netip.Prefix
		for range rand.IntN(20) {
			bits := []int{0, 1, 4, 8, 12, 16, 24, 29, 31, 32}[rand.IntN(10)]
			if bits < 8 && rand.IntN(4) > 0 {
				bits = 24
			}
			ps = append(ps, netip.PrefixFrom(addr4(rand.Uint32()&0x03ff03ff), bits))
		}
		rs := rangesOf(ps)
		for i, r := range rs {
			if r.first > r.last || i > 0 && uint64(rs[i-1].last)+1 >= uint64(r.first) {
				t.Fatalf("rangesOf(%v) = %v: not disjoint and sorted", ps, rs)
			}
		}
		probe := func(a uint32) {
			want := slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(addr4(a)) })
			got := slices.ContainsFunc(rs, func(r addrRange) bool { return r.first <= a && a <= r.last })
			if got != want {
				t.Fatalf("rangesOf(%v) = %v: %s in it: %v, want %v", ps, rs, addr4(a), got, want)
			}
		}
		for _, r := range rs {
			for _, a := range []uint32{r.first - 1, r.first, r.last, r.last + 1} {
				probe(a)
			}
		}
		for range 50 {
			probe(rand.Uint32() & 0x03ff03ff)
		}
	}
}
