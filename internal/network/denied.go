package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Denial is what a policy refused a sandbox.
type Denial = egress.Denial

// denials are those of the open slots.
type denials struct {
	mu     sync.Mutex
	bySlot map[Slot]*denied
}

// denied is what one slot was refused. mu is held while its meter is emptied.
type denied struct {
	egress.Denials
	mu sync.Mutex
}

func (ds *denials) slot(s Slot) *denied {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if ds.bySlot == nil {
		ds.bySlot = map[Slot]*denied{}
	}
	d := ds.bySlot[s]
	if d == nil {
		d = &denied{}
		ds.bySlot[s] = d
	}
	return d
}

func (ds *denials) of(s Slot) *egress.Denials { return &ds.slot(s).Denials }

func (ds *denials) forget(s Slot) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	delete(ds.bySlot, s)
}

// Denied returns what was refused to an open slot of late, the newest first: the last 64
// different things that this agent saw, and packets of the 10 minutes before it. p is the
// slot's policy, which says by which rule a packet was refused. NotFound if the slot is
// not open. Times are those of the last refusal of each; packets beyond 64 destinations
// between two calls are not in it.
func (n *Network) Denied(ctx context.Context, s Slot, p Policy) ([]Denial, error) {
	if !s.Valid() {
		return nil, errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err := n.takeRefused(s, p)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errdefs.NotFound.Errorf("network slot %d is not open", s)
	}
	if err != nil {
		return nil, fmt.Errorf("read what network slot %d was refused: %w", s, err)
	}
	return n.denials.of(s).List(), nil
}

// takeRefused moves what the rules of a slot have refused from the kernel's memory to
// the slot's denials.
func (n *Network) takeRefused(s Slot, p Policy) error {
	d := n.denials.slot(s)
	d.mu.Lock()
	defer d.mu.Unlock()
	var refused []nftables.SetElement
	if err := inNS(n.plan.Addrs(s).NetNSPath, func() (err error) {
		refused, err = emptyRefused()
		return err
	}); err != nil {
		return err
	}
	now := time.Now()
	v := rangePolicyOf(n.plan, n.opts, p)
	for _, e := range refused {
		den, ok := denialOf(e, now)
		if !ok {
			continue
		}
		den.Rule = v.refusedBy(den.Addr.Addr(), v.named(p))
		n.gates.shared.CountDenied(den.Kind, den.Count)
		d.Add(den)
	}
	return nil
}

// emptyRefused takes the elements out of the meter of the calling thread's namespace.
// Slots of earlier versions have none.
func emptyRefused() (refused []nftables.SetElement, err error) {
	set := refusedMeter.set(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable})
	err = transact(func(c *nftables.Conn) error {
		if refused, err = c.GetSetElements(set); err != nil || len(refused) == 0 {
			return err
		}
		c.FlushSet(set)
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return refused, err
}

// denialOf reads an element of the meter; false if it is none.
func denialOf(e nftables.SetElement, now time.Time) (Denial, bool) {
	if len(e.Key) < 12 {
		return Denial{}, false
	}
	kind := egress.KindIP
	switch e.Key[4] {
	case unix.IPPROTO_TCP:
		kind = egress.KindTCP
	case unix.IPPROTO_UDP:
		kind = egress.KindUDP
	}
	d := Denial{
		Kind: kind, Count: 1, Time: now.Add(min(0, e.Expires-refusedMeter.timeout)).UTC(),
		Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte(e.Key[:4])), binary.BigEndian.Uint16(e.Key[8:])),
	}
	if e.Counter != nil {
		d.Count = max(e.Counter.Packets, 1)
	}
	return d, true
}

// refusedBy says which rule refuses an address; names says that names decide.
func (v rangePolicy) refusedBy(a netip.Addr, names bool) string {
	switch {
	case contains(v.never, a):
		return "never: the host, other sandboxes, link-local and multicast addresses"
	case contains(v.deny, a):
		i := slices.IndexFunc(v.deny, func(r addrRange) bool { return contains([]addrRange{r}, a) })
		return "deny list: " + joinRanges(v.deny[i:i+1])
	case names:
		return "not in the allow list, and shows no name that could be"
	case v.mode == None:
		return "no internet, and not in the allow list"
	case contains(rangesOf(privateRanges), a):
		return "private addresses"
	}
	return "an earlier policy"
}
