package network

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

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

// contains says whether an IPv4 address is in one of the ranges.
func contains(rs []addrRange, a netip.Addr) bool {
	b := a.As4()
	n := binary.BigEndian.Uint32(b[:])
	return slices.ContainsFunc(rs, func(r addrRange) bool { return r.first <= n && n <= r.last })
}

func joinRanges(rs []addrRange) string {
	texts := make([]string, len(rs))
	for i, r := range rs {
		texts[i] = r.String()
	}
	return strings.Join(texts, ", ")
}
