package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Counters are what has passed between a sandbox and the host since the slot
// was opened, Ethernet headers included.
type Counters struct {
	InBytes, InPackets   uint64 // into the sandbox
	OutBytes, OutPackets uint64 // out of it, after its policy
}

// Counters returns an open slot's counters; NotFound if it is not open.
func (n *Network) Counters(ctx context.Context, s Slot) (Counters, error) {
	if !s.Valid() {
		return Counters{}, errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if err := ctx.Err(); err != nil {
		return Counters{}, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return Counters{}, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	l, err := h.LinkByName(n.plan.Addrs(s).Veth)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return Counters{}, errdefs.NotFound.Errorf("network slot %d is not open", s)
	}
	if err != nil {
		return Counters{}, fmt.Errorf("find link of network slot %d: %w", s, err)
	}
	st := l.Attrs().Statistics
	if st == nil {
		return Counters{}, errdefs.Unsupported.Errorf("the host's kernel does not count packets")
	}
	return Counters{InBytes: st.TxBytes, InPackets: st.TxPackets, OutBytes: st.RxBytes, OutPackets: st.RxPackets}, nil
}

// CountersAll returns the counters of all open slots, those of the pool among
// them, for the price of one short list: 0.2 KB a link. Who the links are is
// asked only when there is a new one.
func (n *Network) CountersAll(ctx context.Context) (map[Slot]Counters, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	counts, err := listed(linkCounters)
	if err != nil {
		return nil, fmt.Errorf("list counters: %w", err)
	}
	n.links.Lock()
	defer n.links.Unlock()
	for _, c := range counts {
		if _, known := n.links.slots[c.link]; !known {
			if n.links.slots, err = n.slotsByLink(); err != nil {
				return nil, err
			}
			break
		}
	}
	all := make(map[Slot]Counters, len(counts))
	for _, c := range counts {
		if s := n.links.slots[c.link]; s != 0 {
			all[s] = c.Counters
		}
	}
	return all, nil
}

// linkNames remembers which link is which slot's, by the link's index, which
// no other link gets. Links of others are slot 0.
type linkNames struct {
	sync.Mutex
	slots map[uint32]Slot
}

func (n *Network) slotsByLink() (map[uint32]Slot, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := listed(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	slots := make(map[uint32]Slot, len(links))
	for _, l := range links {
		slots[uint32(l.Attrs().Index)], _ = n.plan.slotOf(l.Attrs().Name)
	}
	return slots, nil
}

type linkCount struct {
	link uint32
	Counters
}

// linkCounters lists the counters of all links of the host. The library knows
// only how to list links with all that belongs to them.
func linkCounters() ([]linkCount, error) {
	const (
		header = 12     // struct if_stats_msg: family, padding, index, mask
		link64 = 1      // IFLA_STATS_LINK_64
		mask   = 1 << 0 // that alone
	)
	req := nl.NewNetlinkRequest(unix.RTM_GETSTATS, unix.NLM_F_DUMP)
	req.AddRawData(binary.NativeEndian.AppendUint32(make([]byte, 8), mask))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWSTATS)
	var all []linkCount
	for _, m := range msgs {
		if len(m) < header {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[header:])
		if err != nil {
			return nil, fmt.Errorf("parse counters: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type != link64 || len(a.Value) < 32 {
				continue
			}
			// struct rtnl_link_stats64, as the host sees it: what it received
			// is what the sandbox sent.
			u64 := func(i int) uint64 { return binary.NativeEndian.Uint64(a.Value[8*i:]) }
			all = append(all, linkCount{binary.NativeEndian.Uint32(m[4:]), Counters{
				OutPackets: u64(0), InPackets: u64(1), OutBytes: u64(2), InBytes: u64(3),
			}})
		}
	}
	return all, err
}
