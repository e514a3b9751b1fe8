package network

import (
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// TestPacketEnd: the end of a slot's link for a packet socket carries the guest's frames,
// has no address and answers for none. That it is down is found, and so is its loss:
// neither can be mended under a running guest.
func TestPacketEnd(t *testing.T) {
	was := packet
	packet = true
	defer func() { packet = was }()
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
