package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// tapped is a look at all frames that pass a link, in both directions.
type tapped struct{ fd int }

// listenTo begins to look at a link of a namespace.
func listenTo(t testing.TB, ns netns.NsHandle, link string) *tapped {
	t.Helper()
	var fd int
	listen := func() {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		l, err := netlink.LinkByName(link)
		must(t, err)
		must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}), Ifindex: l.Attrs().Index}))
		must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}))
	}
	if ns.IsOpen() {
		in(t, ns, listen)
	} else {
		listen()
	}
	t.Cleanup(func() { unix.Close(fd) })
	// The socket heard all links between its making and its binding.
	return &tapped{fd}
}

// until returns the frames before the one that contains mark.
func (l *tapped) until(t testing.TB, mark string) (frames [][]byte) {
	t.Helper()
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); {
		buf := make([]byte, 65536)
		k, _, err := unix.Recvfrom(l.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("waiting for %q: %v", mark, err)
		}
		if bytes.Contains(buf[:k], []byte(mark)) {
			return frames
		}
		frames = append(frames, buf[:k])
	}
	t.Fatalf("no frame with %q came", mark)
	return nil
}

// frame is an Ethernet frame of any type.
func frame(dst, src net.HardwareAddr, etherType uint16, payload ...byte) []byte {
	b := append(append([]byte{}, dst...), src...)
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

func arp(op uint16, senderMAC net.HardwareAddr, sender netip.Addr, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, byte(op)}
	b = append(append(b, senderMAC...), sender.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}

// ipv6 is a packet with a UDP or other payload.
func ipv6(src, dst netip.Addr, next byte, payload ...byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, byte(len(payload)), next, 255}
	return append(append(append(b, src.AsSlice()...), dst.AsSlice()...), payload...)
}

// fragments cuts the IPv4 packet of a frame in two behind its first n bytes of
// payload, a multiple of 8.
func fragments(whole []byte, n int) (first, second []byte) {
	cut := func(from, to int, more bool) []byte {
		b := append(bytes.Clone(whole[:34]), whole[34+from:34+to]...)
		ip := b[14:34]
		binary.BigEndian.PutUint16(ip[2:], uint16(20+to-from))
		off := uint16(from / 8)
		if more {
			off |= 0x2000
		}
		binary.BigEndian.PutUint16(ip[4:], 0x77) // the id that they share
		binary.BigEndian.PutUint16(ip[6:], off)
		checksum(ip)
		return b
	}
	return cut(0, n, true), cut(n, len(whole)-34, false)
}

// checksum sets that of an IPv4 header.
func checksum(ip []byte) {
	ip[10], ip[11] = 0, 0
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
}

// What a guest must not say does not come out of its namespace, whatever frame
// it is in: the host's link carries honest packets only.
func TestFramesThatStayInside(t *testing.T) {
	n := world(t, Options{})
	_, a, g := open(t, n)
	_, b, gb := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	onLink := listenTo(t, here, a.Veth)
	atOther := listenTo(t, gb.ns, "eth0")
	atTap := listenTo(t, ns, Tap)
	// Who gets the honest frames says nothing back.
	in(t, internet, func() {
		sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(internetAddr, 7070)))
		must(t, err)
		t.Cleanup(func() { sink.Close() })
	})
	far := serve(t, internet, internetAddr, 7072)
	loopback := serve(t, here, netip.MustParseAddr("127.0.0.1"), 7071)
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	me := GuestAddr.Addr()
	frames := framesThatStayInside(a, b)
	defer onOneCPU(t)()
	mark := func(i int) string { return fmt.Sprintf("honest frame %d.", i) }
	_, err = g.tap.Write(udpFrame(gw, mac, me, internetAddr, 7070, mark(-1)))
	must(t, err)
	onLink.until(t, mark(-1))
	atTap.until(t, mark(-1))
	for i, f := range frames {
		_, err := g.tap.Write(f.frame)
		if err != nil && !errors.Is(err, unix.EINVAL) { // too short for the tap itself
			t.Errorf("%s: %v", f.what, err)
		}
		_, err = g.tap.Write(udpFrame(gw, mac, me, internetAddr, 7070, mark(i)))
		must(t, err)
		for _, out := range onLink.until(t, mark(i)) {
			// The pair's ends ask each other for their MACs now and then.
			if binary.BigEndian.Uint16(out[12:]) != 0x0806 {
				t.Errorf("%s: came out as % x", f.what, out)
			}
		}
		// Nor is an ARP for others answered, as the guest's own for its
		// gateway is.
		for _, back := range atTap.until(t, mark(i)) {
			if len(back) >= 42 && binary.BigEndian.Uint16(back[12:]) == 0x0806 && back[21] == 2 &&
				bytes.Equal(back[6:12], gw) && !bytes.Equal(back[28:32], GuestGateway.AsSlice()) {
				t.Errorf("%s: answered by % x", f.what, back)
			}
		}
	}
	loopback.nothing(t, "frames that must stay inside")
	if got := ask(t, gb.ns, "udp", internetAddr, 7072, timeout); got == "" {
		t.Error("the other sandbox does not reach the internet")
	}
	for _, f := range atOther.until(t, "203.0.113.1") {
		if bytes.Contains(f, []byte("honest frame")) {
			t.Errorf("the other sandbox saw % x", f)
		}
	}
	// No frame moved the guest: its neighbour entry is what it was.
	in(t, ns, func() {
		l, err := netlink.LinkByName(Tap)
		must(t, err)
		list, err := listed(func() ([]netlink.Neigh, error) { return netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V4) })
		must(t, err)
		for _, e := range list {
			if e.IP.Equal(me.AsSlice()) && e.HardwareAddr.String() != mac.String() {
				t.Errorf("the guest is now at %s", e.HardwareAddr)
			}
		}
	})
	// Fragments of what is allowed arrive as a whole.
	far.drain()
	first, second := fragments(udpFrame(gw, mac, me, internetAddr, 7072, "in two fragments"), 16)
	for _, f := range [][]byte{second, first} {
		_, err := g.tap.Write(f)
		must(t, err)
	}
	far.gets(t, "fragments", "udp in two fragments from 203.0.113.1")
}

// sent is a frame that a guest sends.
type sent struct {
	what  string
	frame []byte
}

// framesThatStayInside are frames of the guest in slot a that must not leave its
// namespace. b is another slot.
func framesThatStayInside(a, b Addrs) []sent {
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	other, _ := net.ParseMAC("02:FC:00:00:00:99")
	all := net.HardwareAddr{255, 255, 255, 255, 255, 255}
	me := GuestAddr.Addr()
	udp := func(dst netip.Addr, what string) []byte { return udpFrame(gw, mac, me, dst, 7071, what) }
	v6 := func(dst string) []byte {
		to := netip.MustParseAddr(dst)
		return ipv6(netip.MustParseAddr("fe80::fc:ff:fe00:5"), to, unix.IPPROTO_UDP, 0x11, 0x11, 0x1b, 0x9f, 0, 9, 0, 0, 'x')
	}
	routed := udpFrame(gw, mac, me, internetAddr, 7071, "source route")
	ip := append(bytes.Clone(routed[14:34]), 131, 7, 4) // loose source route by way of the other sandbox
	ip = append(append(ip, b.HostIP.AsSlice()...), 0)
	ip[0] = 0x47
	binary.BigEndian.PutUint16(ip[2:], uint16(len(routed)-14+8))
	checksum(ip)
	routed = slices.Concat(routed[:14], ip, routed[34:])

	frames := []sent{
		{"IPv6 to all nodes", frame(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, mac, 0x86dd, v6("ff02::1")...)},
		{"IPv6 to the gateway's link-local", frame(gw, mac, 0x86dd, v6("fe80::fc:ff:fe00:6")...)},
		{"IPv6 to a ULA", frame(gw, mac, 0x86dd, v6("fd00::1")...)},
		{"IPv6 to the internet", frame(gw, mac, 0x86dd, v6("2001:db8::1")...)},
		{"IPv6 router advertisement", frame(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, mac, 0x86dd,
			ipv6(netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::1"), unix.IPPROTO_ICMPV6, 134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0,
				0, 0, 0, 0)...)},
		{"IPv6 neighbour solicitation", frame(net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 6}, mac, 0x86dd,
			ipv6(netip.MustParseAddr("fe80::2"), netip.MustParseAddr("ff02::1:ff00:6"), unix.IPPROTO_ICMPV6, 135, 0, 0, 0, 0, 0, 0, 0,
				0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0xfc, 0, 0xff, 0xfe, 0, 0, 6)...)},
		{"VLAN tag", slices.Concat(udp(internetAddr, "x")[:12], []byte{0x81, 0, 0, 1}, udp(internetAddr, "x")[12:])},
		{"priority tag", slices.Concat(udp(internetAddr, "x")[:12], []byte{0x81, 0, 0x20, 0}, udp(b.HostIP, "x")[12:])},
		{"two VLAN tags", slices.Concat(udp(internetAddr, "x")[:12], []byte{0x88, 0xa8, 0, 1, 0x81, 0, 0, 2}, udp(internetAddr, "x")[12:])},
		{"DHCP", udpFrame(all, mac, netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), 67, "discover")},
		{"spanning tree", frame(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0}, mac, 38, 0x42, 0x42, 3, 0, 0, 0, 0, 0)},
		{"LLDP", frame(net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 14}, mac, 0x88cc, 2, 7, 4, 1, 2, 3, 4, 5, 6)},
		{"PPPoE discovery", frame(all, mac, 0x8863, 0x11, 9, 0, 0, 0, 0)},
		{"EAPOL", frame(gw, mac, 0x888e, 1, 1, 0, 0)},
		{"MPLS", frame(gw, mac, 0x8847, append([]byte{0, 1, 1, 64}, udp(internetAddr, "x")[14:]...)...)},
		{"ARP in the gateway's name", frame(all, mac, 0x0806, arp(1, mac, GuestGateway, GuestGateway)...)},
		{"ARP in the other's name", frame(all, mac, 0x0806, arp(2, mac, b.HostIP, b.HostIP)...)},
		{"ARP in the host's name", frame(gw, mac, 0x0806, arp(2, mac, a.HostVeth.Addr(), GuestGateway)...)},
		{"own address at another MAC", frame(gw, mac, 0x0806, arp(2, other, me, GuestGateway)...)},
		{"ARP for the other sandbox", frame(all, mac, 0x0806, arp(1, mac, me, b.HostIP)...)},
		{"ARP for the host", frame(all, mac, 0x0806, arp(1, mac, me, a.HostVeth.Addr())...)},
		{"ARP for the internet", frame(all, mac, 0x0806, arp(1, mac, me, internetAddr)...)},
		{"another MAC", udpFrame(gw, other, me, internetAddr, 7070, "x")},
		{"another address", udpFrame(gw, mac, netip.MustParseAddr("198.51.100.1"), internetAddr, 7070, "x")},
		{"source route", routed},
		{"not even a header", frame(gw, mac, 0x0800, 0x45)},
		{"short ARP", frame(all, mac, 0x0806, 0, 1)},
		{"IPv4 multicast", udpFrame(net.HardwareAddr{1, 0, 0x5e, 0, 0, 0xfb}, mac, me, netip.MustParseAddr("224.0.0.251"), 5353, "x")},
		{"broadcast", udpFrame(all, mac, me, netip.MustParseAddr("255.255.255.255"), 7071, "x")},
		{"subnet broadcast", udpFrame(all, mac, me, netip.MustParseAddr("169.254.0.23"), 7071, "x")},
	}
	// Honest in form, but nothing that the policy lets out.
	for _, dst := range []string{
		"10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "100.64.0.1", "100.127.255.254", "192.0.0.1",
		"198.18.0.1", "198.19.255.255", "169.254.169.254", "169.254.0.1", "127.0.0.1", "127.8.9.10", "0.0.0.0", "0.1.2.3",
		"224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.254",
		a.HostIP.String(), a.NSVeth.Addr().String(), a.HostVeth.Addr().String(), GuestGateway.String(),
		b.HostIP.String(), b.NSVeth.Addr().String(), b.HostVeth.Addr().String(),
	} {
		to := netip.MustParseAddr(dst)
		whole := udp(to, "in two fragments, the second of which has no ports")
		first, second := fragments(whole, 16)
		tiny, rest := fragments(whole, 8)
		frames = append(frames, sent{"to " + dst, udp(to, "x")},
			sent{"first fragment to " + dst, first}, sent{"second fragment to " + dst, second},
			sent{"rest of a tiny fragment to " + dst, rest}, sent{"tiny fragment to " + dst, tiny})
	}
	return frames
}

// onOneCPU keeps the calling goroutine on one CPU until the function that it
// returns is called, so that a frame is never overtaken by the next.
func onOneCPU(t *testing.T) (undo func()) {
	t.Helper()
	runtime.LockOSThread()
	var before, one unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &before))
	one.Set(0)
	for cpu := range 1024 {
		if before.IsSet(cpu) {
			one.Zero()
			one.Set(cpu)
			break
		}
	}
	must(t, unix.SchedSetaffinity(0, &one))
	return func() {
		unix.SchedSetaffinity(0, &before)
		runtime.UnlockOSThread()
	}
}

// Every address of the host, on any link, refuses a sandbox, whether a server
// listens on all addresses or on that one alone.
func TestHostAddressesRefuse(t *testing.T) {
	n := world(t, Options{})
	_, a, g := open(t, n)
	_, b, _ := open(t, n)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "side0"
	side := netlink.NewVeth(attrs)
	side.PeerName = "side1"
	must(t, netlink.LinkAdd(side))
	t.Cleanup(func() { must(t, netlink.LinkDel(side)) })
	public, docker, onLo := netip.MustParseAddr("198.51.100.129"), netip.MustParseAddr("172.17.0.1"), netip.MustParseAddr("198.51.100.201")
	up(t, "side1")
	up(t, "side0", netip.PrefixFrom(public, 25), netip.PrefixFrom(docker, 16))
	l, err := netlink.LinkByName("lo")
	must(t, err)
	lo := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(onLo, 32))}
	must(t, netlink.AddrAdd(l, lo))
	t.Cleanup(func() { must(t, netlink.AddrDel(l, lo)) })

	addrs := map[netip.Addr]*echo{}
	wildcard := serve(t, here, netip.IPv4Unspecified(), 50051)
	for _, ip := range []netip.Addr{uplinkAddr, public, docker, onLo, a.HostVeth.Addr(), b.HostVeth.Addr(), netip.MustParseAddr("127.0.0.1")} {
		addrs[ip] = serve(t, here, ip, 7080)
	}
	for _, mode := range []Mode{Public, All} {
		for s := Slot(1); s <= MaxSlot; s++ {
			if n.plan.Addrs(s).HostIP == a.HostIP {
				must(t, n.SetPolicy(t.Context(), s, Policy{Mode: mode, Allow: prefixes("0.0.0.0/0")}))
				break
			}
		}
		for ip, one := range addrs {
			what := fmt.Sprintf("%s to %s", mode, ip)
			for _, network := range []string{"tcp", "udp"} {
				if ask(t, g.ns, network, ip, 50051, silence/5) != "" || ask(t, g.ns, network, ip, 7080, silence/5) != "" {
					t.Errorf("%s over %s: answered", what, network)
				}
			}
			one.nothing(t, what)
		}
		wildcard.nothing(t, string(mode))
	}
	// The same servers answer the host.
	for ip := range addrs {
		if ask(t, here, "tcp", ip, 7080, timeout) == "" {
			t.Errorf("%s does not answer the host: this showed nothing", ip)
		}
	}
}

// An uplink that carries less than the guest's link: what must not be cut up
// is refused with the size that fits, what may be is, both ways.
func TestUplinkSmallerThanGuest(t *testing.T) {
	n := world(t, Options{})
	_, _, g := open(t, n)
	setMTU := func(ours, theirs int) {
		for link, ns := range map[string]netns.NsHandle{"up0": here, "inet0": internet} {
			mtu := ours
			set := func() {
				l, err := netlink.LinkByName(link)
				must(t, err)
				must(t, netlink.LinkSetMTU(l, mtu))
			}
			if link == "inet0" {
				mtu = theirs
				in(t, ns, set)
			} else {
				set()
			}
		}
	}
	defer setMTU(1400, 1500)
	var err error
	for i, mtu := range []int{1420, 1280} {
		setMTU(mtu, mtu)
		dst := netip.AddrPortFrom(internetAddr, uint16(7090+i))
		var server, conn *net.UDPConn
		in(t, internet, func() {
			server, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(dst))
			must(t, err)
		})
		defer server.Close()
		in(t, g.ns, func() {
			conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(dst))
			must(t, err)
		})
		defer conn.Close()
		raw, err := conn.SyscallConn()
		must(t, err)
		opt := func(name, value int) {
			must(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, name, value) }))
			must(t, err)
		}
		// Must not be cut: the guest learns the uplink's size, and what fits
		// arrives.
		opt(unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		for deadline := time.Now().Add(timeout); ; {
			if _, err = conn.Write(make([]byte, mtu-27)); errors.Is(err, unix.EMSGSIZE) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("uplink of %d: the guest is not told that a byte more does not fit: %v", mtu, err)
			}
			time.Sleep(time.Millisecond)
		}
		var known int
		must(t, raw.Control(func(fd uintptr) { known, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU) }))
		must(t, err)
		if known != mtu {
			t.Errorf("uplink of %d: the guest was told %d", mtu, known)
		}
		buf := make([]byte, 65536)
		receive := func(c *net.UDPConn, want int, what string) *net.UDPAddr {
			t.Helper()
			c.SetReadDeadline(time.Now().Add(timeout))
			k, from, err := c.ReadFromUDP(buf)
			if err != nil || k != want {
				t.Fatalf("uplink of %d, %s: %d bytes, %v; want %d", mtu, what, k, err, want)
			}
			return from
		}
		send := func(size int) {
			t.Helper()
			// A refusal that came late is the next write's error.
			for range 10 {
				if _, err = conn.Write(make([]byte, size)); err == nil {
					return
				}
			}
			t.Fatalf("uplink of %d: %d bytes: %v", mtu, size, err)
		}
		send(mtu - 28)
		receive(server, mtu-28, "as large as fits")
		// May be cut, out and in.
		opt(unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
		for _, size := range []int{1450, 3000, 30000} {
			send(size)
			from := receive(server, size, "out")
			_, err = server.WriteToUDP(make([]byte, size), from)
			must(t, err)
			receive(conn, size, "in")
		}
		// TCP needs neither.
		serve(t, internet, internetAddr, uint16(7095+i))
		if ask(t, g.ns, "tcp", internetAddr, uint16(7095+i), timeout) == "" {
			t.Errorf("uplink of %d: no answer over TCP", mtu)
		}
	}
}
