package network

import (
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// tableShare is what sandboxes may take of the host's connection table, which
// is one for all that the host does. A sandbox's connections are in two tables:
// that of its namespace, and the host's, which masquerades. They can differ: a
// packet that ends a connection in the first may never come to the second. So
// the host counts for itself.
//
// A meter costs the kernel a look at each connection that it counts for every
// one that is new, so there is none for all sandboxes together. Sandboxes share
// one of shares meters by the last bits of their address, and none takes more
// than half of it.
type tableShare struct {
	sandbox int   // connections of one sandbox
	meter   int   // of those that share a meter
	begun   int64 // that all together may begin in a second
}

const (
	// shares is how many meters there are, a power of two. They add up to half
	// of the table.
	shares = 32
	// closedSecs is how long a connection that has ended is kept. The kernel
	// counts it no more, so it is bounded by how many begin in that time. It
	// may tidy up a minute later, but gives the room to others before.
	closedSecs = 5
	// minBegin is how many connections a second each sandbox may begin at least.
	minBegin = 64
)

// shareOf is the share of a table of so many connections.
func shareOf(table int) tableShare {
	s := tableShare{meter: max(table/2/shares, 128), begun: int64(max(table/64, minBegin))}
	s.sandbox = s.meter / 2
	return s
}

// clamp is a number of connections that a sandbox may have; 0 is all that one
// may.
func (s tableShare) clamp(n int) int {
	if n == 0 {
		return s.sandbox
	}
	return min(n, s.sandbox)
}

// connectionTable is how many connections the host's table holds. If it is not
// there before our rules are, the kernel will choose by the memory.
func connectionTable() int {
	if b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n > 0 {
			return n
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil && uint64(info.Totalram)*uint64(info.Unit) > 4<<30 {
		return 262144
	}
	return 65536
}

// rules are those of the host's table. They drop without an error, for what
// comes here has passed the sandbox's own limit.
func (s tableShare) rules(ours string) ruleset {
	const closed = "closing"
	one, some := "one-"+strconv.Itoa(s.sandbox), "some-"+strconv.Itoa(s.meter)
	begins := rule{iif(ours), unconfirmed()}
	with := func(terms ...term) rule { return append(begins[:len(begins):len(begins)], terms...) }
	return ruleset{
		closings: []closing{{closed, closedSecs}},
		meters:   []meter{{name: one, size: uint32(MaxSlot) + 1}, {name: some, size: shares}},
		chains: []chain{
			{name: connectionChain, typ: nftables.ChainTypeFilter, hook: "prerouting", priority: "dstnat + 10", rules: []rule{
				with(closes(closed)),
				with(sourceOver(one, math.MaxUint32, s.sandbox), drop()),
				with(sourceOver(some, shares-1, s.meter), drop()),
				with(beginningOver(s.begun), drop()),
			}},
			// Those that the host itself makes to sandboxes are kept no longer.
			base("output", nftables.ChainTypeFilter, "filter", false, rule{oif(ours), unconfirmed(), closes(closed)}),
		},
	}
}
