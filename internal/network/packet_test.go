package network

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// TestPacketEnd: the end of a slot's link for a packet socket carries the guest's frames,
// has no address and answers for none. That it is down is found, and so is its loss:
// neither can be mended under a running guest.
func TestPacketEnd(t *testing.T) {
	was := kind
	kind = vmm.Packet
	defer func() { kind = was }()
	n := world(t, Options{})
	s, a, g := open(t, n)
	serve(t, g.ns, GuestAddr.Addr(), 49983)
	if got := ask(t, here, "tcp", a.HostIP, 49983, timeout); got == "" {
		t.Error("the guest does not answer")
	}
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	end := func() (l netlink.Link) {
		t.Helper()
		in(t, ns, func() { l, err = netlink.LinkByName(PacketEnd) })
		must(t, err)
		return l
	}
	l := end()
	if l.Attrs().Flags&net.FlagUp == 0 || l.Attrs().RawFlags&0x80 == 0 || l.Attrs().HardwareAddr.String() == GuestMAC { // IFF_NOARP
		t.Errorf("%s: %+v", PacketEnd, l.Attrs())
	}
	in(t, ns, func() {
		addrs, e := netlink.AddrList(l, netlink.FAMILY_ALL)
		if e != nil || len(addrs) != 0 {
			t.Errorf("its addresses: %v, %v", addrs, e)
		}
		must(t, netlink.LinkSetDown(l))
	})
	if err := n.Check(t.Context(), s); !errors.Is(err, errGivenUp) {
		t.Errorf("it is down: %v", err)
	}
	// Up again it would look right, and the guest would have no network.
	if err := n.Repair(t.Context(), s, Policy{}, Limits{}); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("repair: %v", err)
	}
	in(t, ns, func() { must(t, netlink.LinkDel(end())) })
	if err := n.Check(t.Context(), s); !errors.Is(err, errNoTap) {
		t.Errorf("without it: %v", err)
	}
}

// TestKindsSideBySide: slots of both kinds of link are in one network, also those that the
// pool has built and those that an agent finds after its restart.
func TestKindsSideBySide(t *testing.T) {
	n := world(t, Options{Pool: 1, Kind: vmm.Packet})
	stop := run(t, n)
	full(t, n)
	ctx := t.Context()
	if _, err := n.Acquire(ctx, "wire"); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a kind that is none: %v", err)
	}
	var slots []Slot
	for _, want := range []vmm.LinkKind{vmm.Packet, vmm.Tap, vmm.Packet, vmm.Tap} {
		s, err := n.Acquire(ctx, want)
		must(t, err)
		slots = append(slots, s)
		must(t, n.Open(ctx, s))
		must(t, n.Check(ctx, s))
		if got := n.kindOf(s); got != want {
			t.Errorf("slot %d: %s, want %s", s, got, want)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, short := n.slots.short(1); !short {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the pool of a kind does not fill")
			}
		}
	}
	stop()
	after := New(testPlan(), Options{}) // the agent after a restart
	for i, s := range slots {
		must(t, after.Claim(s))
		must(t, after.Check(ctx, s))
		if got, want := after.slots.kindOf(s), []vmm.LinkKind{vmm.Packet, vmm.Tap}[i%2]; got != want {
			t.Errorf("slot %d is claimed as %s, want %s", s, got, want)
		}
	}
	// A link of the other kind under the same name is not the guest's.
	must(t, inNS(n.plan.Addrs(slots[0]).NetNSPath, func() error {
		l, err := netlink.LinkByName(Tap)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkDel(l), makeTap(Tap, 0))
	}))
	if err := after.Check(ctx, slots[0]); !errors.Is(err, errNoTap) {
		t.Errorf("a tap in place of the pair: %v", err)
	}
	for _, s := range slots {
		must(t, after.Close(ctx, s))
		must(t, after.Release(s))
		must(t, n.Close(ctx, s))
		must(t, n.Release(s))
	}
}
