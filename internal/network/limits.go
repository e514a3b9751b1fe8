package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
)

// Limits are how much of the network a sandbox may use, seen from the sandbox:
// "in" is towards it. Zero is no limit; in the limits of a sandbox, the host's.
//
// Bytes are held back in a queue (Ethernet headers included) so that TCP finds
// the rate; what does not fit the queue is dropped. Packets above their rate
// are dropped; a segment that the guest lets the host cut up counts once.
// Connections above their number are refused with an ICMP error. What begins
// more of them in a second than an eighth of the number is dropped. A connection
// is what the kernel tracks as one: a DNS query is one until it is forgotten,
// half a minute after its answer. Their number is never unlimited: see
// tableShare.
type Limits struct {
	InBytes, OutBytes     int64 // per second
	InPackets, OutPackets int64 // per second
	Connections           int   // begun by the sandbox, at a time
}

const (
	// minByteRate leaves a full segment a second or so.
	minByteRate = 8 << 10
	maxByteRate = 1 << 40
	maxPackets  = 100_000_000
)

// Validate reports every problem at once, as InvalidArgument.
func (l Limits) Validate() error {
	var errs []error
	check := func(what string, n, least, most int64) {
		if n != 0 && (n < least || n > most) {
			errs = append(errs, errdefs.InvalidArgument.Errorf("limit of %s: %d is not in %d..%d, nor 0 for none", what, n, least, most))
		}
	}
	check("bytes per second in", l.InBytes, minByteRate, maxByteRate)
	check("bytes per second out", l.OutBytes, minByteRate, maxByteRate)
	check("packets per second in", l.InPackets, 1, maxPackets)
	check("packets per second out", l.OutPackets, 1, maxPackets)
	check("connections", int64(l.Connections), 1, math.MaxInt32)
	return errors.Join(errs...)
}

// or fills in the host's limits where l has none.
func (l Limits) or(host Limits) Limits {
	fill(&l.InBytes, host.InBytes)
	fill(&l.OutBytes, host.OutBytes)
	fill(&l.InPackets, host.InPackets)
	fill(&l.OutPackets, host.OutPackets)
	fill(&l.Connections, host.Connections)
	return l
}

func fill[T comparable](to *T, from T) {
	var zero T
	if *to == zero {
		*to = from
	}
}

// SetLimits replaces the limits of an open slot, the host's filled in. It is
// idempotent, and on an error the old ones stand. Connections that exist are
// counted again with their next packet, and those above a lower number end
// then. The limits live in the sandbox's namespace: they go with it, survive
// the agent, and SetPolicy does not touch them. NotFound if the slot is not
// open.
func (n *Network) SetLimits(ctx context.Context, s Slot, l Limits) error {
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if err := errors.Join(l.Validate(), ctx.Err()); err != nil {
		return err
	}
	err := inNS(n.plan.Addrs(s).NetNSPath, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		l := l.or(n.opts.Limits)
		l.Connections = n.share.clamp(l.Connections)
		return changeLimits(h, l)
	})
	if errors.Is(err, os.ErrNotExist) {
		return errdefs.NotFound.Errorf("network slot %d is not open", s)
	}
	if err != nil {
		return fmt.Errorf("set limits of network slot %d: %w", s, err)
	}
	return nil
}

// changeLimits makes l the limits of the calling thread's namespace, to which
// h speaks, or leaves those that are there.
func changeLimits(h *netlink.Handle, l Limits) error {
	now, err := readLimits(h)
	if err != nil {
		return err
	}
	if err := applyLimits(h, now, l); err != nil {
		half, undo := readLimits(h)
		if undo == nil {
			undo = applyLimits(h, half, now)
		}
		if undo != nil {
			err = errors.Join(err, fmt.Errorf("go back to the old limits: %w", undo))
		}
		return err
	}
	return nil
}

// applyLimits does what differs between now and l.
func applyLimits(h *netlink.Handle, now, l Limits) error {
	if err := limitBytes(h, Tap, now.InBytes, l.InBytes); err != nil {
		return err
	}
	if err := limitBytes(h, peerName, now.OutBytes, l.OutBytes); err != nil {
		return err
	}
	if now.InPackets == l.InPackets && now.OutPackets == l.OutPackets && now.Connections == l.Connections {
		return nil
	}
	if err := transact(func(c *nftables.Conn) error {
		r := limitRules(l)
		if l.InPackets == 0 && l.OutPackets == 0 && l.Connections == 0 {
			queueRemoval(c, r)
			return nil
		}
		// A rule that counts connections forgets them when it is replaced, so
		// it stays if it can.
		if now.Connections == l.Connections {
			r.chains = r.chains[:1]
		}
		t := c.AddTable(r.nftTable())
		for _, ch := range r.chains {
			// A chain has to be there to be flushed.
			empty := ruleset{family: r.family, name: r.name, chains: []chain{ch}}
			empty.chains[0].rules = nil
			if err := empty.add(c); err != nil {
				return err
			}
			c.FlushChain(&nftables.Chain{Name: ch.name, Table: t})
		}
		return r.add(c)
	}); err != nil {
		return fmt.Errorf("set packet and connection limits: %w", err)
	}
	if now.Connections != l.Connections && l.Connections > 0 {
		return forgetBeside(turned)
	}
	return nil
}

// The names of what limits packets and connections in a slot's namespace. The
// table is there only if something is limited.
const (
	limitTable      = "caps"
	packetChain     = "packets"
	connectionChain = "connections"
)

// limitRules drop packets before anything is spent on them, and count
// connections, new ones only, whatever becomes of them: routed or redirected.
func limitRules(l Limits) ruleset {
	var packets, connections []rule
	if l.InPackets > 0 {
		packets = append(packets, rule{iif(peerName), packetsOver(l.InPackets), drop()})
	}
	if l.OutPackets > 0 {
		packets = append(packets, rule{iif(Tap), packetsOver(l.OutPackets), drop()})
	}
	if l.Connections > 0 {
		connections = append(connections,
			rule{iif(Tap), unconfirmed(), connectionsOver(l.Connections), rejectOver()},
			// What comes too fast is only dropped: it is tried again.
			rule{iif(Tap), unconfirmed(), beginningOver(int64(max(l.Connections/8, minBegin))), drop()})
	}
	return ruleset{family: ipv4, name: limitTable, chains: []chain{
		{name: packetChain, typ: nftables.ChainTypeFilter, hook: "prerouting", priority: "raw", rules: packets},
		{name: connectionChain, typ: nftables.ChainTypeFilter, hook: "prerouting", priority: "dstnat + 10", rules: connections},
	}}
}

// packetsOver matches what exceeds a rate, a tenth of a second's packets
// passing at once.
func packetsOver(perSecond int64) term {
	return rateOver(perSecond, uint32(max(perSecond/10, 16)))
}

// beginningOver is for the first packets of connections, of which programs send
// many at once: those of two seconds pass.
func beginningOver(perSecond int64) term {
	return rateOver(perSecond, uint32(min(2*perSecond, math.MaxUint32)))
}

func rateOver(perSecond int64, burst uint32) term {
	return stmt(fmt.Sprintf("limit rate over %d/second burst %d packets", perSecond, burst),
		&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: burst, Over: true})
}

func connectionsOver(n int) term {
	return stmt(fmt.Sprintf("ct count over %d", n),
		&expr.Connlimit{Count: uint32(n), Flags: expr.NFT_CONNLIMIT_F_INV})
}

// rejectOver is an error that programs show as "network is unreachable", and
// so not that of a policy's refusal.
func rejectOver() term {
	return stmt("reject with icmp net-prohibited",
		&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 9})
}

// limitBytes shapes what leaves by a link.
func limitBytes(h *netlink.Handle, name string, now, rate int64) error {
	if now == rate {
		return nil
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	q := shaper(rate)
	q.QdiscAttrs = netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if rate == 0 {
		err = h.QdiscDel(q)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // there is none
			err = nil
		}
	} else {
		err = h.QdiscReplace(q)
	}
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP):
		return errdefs.Unsupported.Errorf("the host's kernel cannot limit bandwidth: it lacks the queue discipline tbf (module sch_tbf)")
	case err != nil:
		return fmt.Errorf("shape %s: %w", name, err)
	}
	return nil
}

// tryShaping says whether the kernel can limit bytes, in a namespace that goes
// at once: an agent that promises to should not find out with each sandbox.
func tryShaping() error {
	return osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		return limitBytes(h, "lo", 0, minByteRate)
	})
}

// shaper is a token bucket. What passes at once is 20 ms of the rate, and never
// less than half of the largest segment; larger ones the kernel cuts up. What
// waits is 100 ms of it, so that the queue of a slow link is no slower than
// that.
func shaper(rate int64) *netlink.Tbf {
	if rate == 0 {
		return &netlink.Tbf{}
	}
	burst := max(rate/50, 32<<10)
	queue := max(rate/10, 64<<10)
	// The bucket's size is told as the time that it takes to fill, in the
	// kernel's ticks of 64 ns.
	ticks := math.Ceil(float64(burst) * 1e9 / float64(rate) / 64)
	return &netlink.Tbf{Rate: uint64(rate), Limit: uint32(min(burst+queue, math.MaxUint32)), Buffer: uint32(ticks)}
}

// readLimits finds the limits of the calling thread's namespace, to which h
// speaks.
func readLimits(h *netlink.Handle) (l Limits, err error) {
	for name, rate := range map[string]*int64{Tap: &l.InBytes, peerName: &l.OutBytes} {
		link, err := h.LinkByName(name)
		if err != nil {
			return Limits{}, fmt.Errorf("find %s: %w", name, err)
		}
		qs, err := listed(func() ([]netlink.Qdisc, error) { return h.QdiscList(link) })
		if err != nil {
			return Limits{}, fmt.Errorf("list queues of %s: %w", name, err)
		}
		for _, q := range qs {
			if t, ok := q.(*netlink.Tbf); ok {
				*rate = int64(t.Rate)
			}
		}
	}
	err = look(func(c *nftables.Conn) error {
		l.InPackets, l.OutPackets, l.Connections = 0, 0, 0
		tables, err := c.ListTablesOfFamily(nftables.TableFamilyIPv4)
		if err != nil {
			return fmt.Errorf("list tables: %w", err)
		}
		for _, t := range tables {
			if t.Name != limitTable {
				continue
			}
			for _, name := range []string{packetChain, connectionChain} {
				rules, err := c.GetRules(t, &nftables.Chain{Name: name, Table: t})
				if err != nil {
					return fmt.Errorf("read limits: %w", err)
				}
				for _, r := range rules {
					l.read(name, r)
				}
			}
		}
		return nil
	})
	return l, err
}

// read takes up what one rule of limitRules says.
func (l *Limits) read(chain string, r *nftables.Rule) {
	packets := &l.InPackets
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Cmp:
			if bytes.Equal(bytes.TrimRight(e.Data, "\x00"), []byte(Tap)) {
				packets = &l.OutPackets
			}
		case *expr.Limit:
			if chain == packetChain { // the other's follows from the number
				*packets = int64(e.Rate)
			}
		case *expr.Connlimit:
			l.Connections = int(e.Count)
		}
	}
}
