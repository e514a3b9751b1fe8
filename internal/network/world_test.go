package network

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The tests run in a world of their own: this binary starts itself again in a
// new network and mount namespace, which plays the host. So they disturb
// nothing on the machine, and any rule or route seen is theirs.
const worldEnv = "WRENN_NETWORK_TEST_WORLD"

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(worldEnv) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), worldEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET,
		Unshareflags: syscall.CLONE_NEWNS, // also makes mounts private
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "start the test's own world:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

const timeout = 2 * time.Second

// silence is how long a test waits for what must not come.
const silence = 150 * time.Millisecond

var (
	worldOnce sync.Once
	// internet is the namespace behind the host's uplink. It knows the host's
	// address there and no other, so what it answers was masqueraded.
	internet netns.NsHandle
)

var (
	uplinkAddr   = netip.MustParseAddr("203.0.113.1")
	internetAddr = netip.MustParseAddr("203.0.113.2")
	// More addresses of the internet's side.
	privateAddr  = netip.MustParseAddr("10.99.0.1")
	metadataAddr = netip.MustParseAddr("169.254.169.254")
)

func testPlan() Plan {
	p := DefaultPlan()
	p.Instance = "tnet"
	return p
}

// kind is that of the links of all tests that do not name one.
var kind = vmm.LinkKind(cmp.Or(os.Getenv("WRENN_TEST_LINK"), string(vmm.Tap)))

// world returns a network set up on a host with an uplink; it is torn down,
// and found to have left nothing, when the test ends.
func world(t testing.TB, opts Options) *Network {
	t.Helper()
	testenv.Root(t)
	opts.Kind = cmp.Or(opts.Kind, kind)
	worldOnce.Do(func() {
		must(t, unix.Mount("tmpfs", "/run", "tmpfs", 0, ""))
		internet = newNS(t)
		up(t, "lo")
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "up0", 1400
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace, veth.PeerMTU = "inet0", netlink.NsFd(internet), 1500
		must(t, netlink.LinkAdd(veth))
		up(t, "up0", netip.PrefixFrom(uplinkAddr, 24))
		in(t, internet, func() {
			up(t, "lo", netip.PrefixFrom(privateAddr, 32), netip.PrefixFrom(metadataAddr, 32))
			up(t, "inet0", netip.PrefixFrom(internetAddr, 24))
		})
		must(t, netlink.RouteAdd(&netlink.Route{Gw: internetAddr.AsSlice()}))
	})
	testenv.NoLeaks(t, "tnet")
	before := rangeRouteCount(t)
	n := New(testPlan(), opts)
	must(t, n.Setup(t.Context()))
	t.Cleanup(func() {
		must(t, n.Teardown(t.Context()))
		if after := rangeRouteCount(t); after != before {
			t.Errorf("%d routes of ours before, %d after", before, after)
		}
	})
	return n
}

// internetHas gives the internet more addresses until the test ends.
func internetHas(t *testing.T, addrs ...netip.Addr) {
	t.Helper()
	for _, a := range addrs {
		in(t, internet, func() { up(t, "lo", netip.PrefixFrom(a, 32)) })
		t.Cleanup(func() {
			in(t, internet, func() {
				l, err := netlink.LinkByName("lo")
				must(t, err)
				must(t, netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, 32))}))
			})
		})
	}
}

func rangeRouteCount(t testing.TB) int {
	t.Helper()
	rs, err := listed(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	})
	must(t, err)
	return len(rs)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newNS makes a namespace without a name, for as long as the process lives.
func newNS(t testing.TB) (ns netns.NsHandle) {
	t.Helper()
	must(t, osthread.Do(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		ns, err = netns.Get()
		return err
	}))
	return ns
}

// in runs fn in a namespace. fn must not start goroutines that open sockets.
func in(t testing.TB, ns netns.NsHandle, fn func()) {
	t.Helper()
	must(t, osthread.Do(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		fn()
		return nil
	}))
}

func up(t testing.TB, link string, addrs ...netip.Prefix) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	must(t, err)
	for _, a := range addrs {
		must(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a)}))
	}
	must(t, netlink.LinkSetUp(l))
}

// guest is a Linux network stack behind a slot's tap: frames are carried
// between the tap and an eth0 in a namespace of the guest's own, as a VMM
// carries them between the tap and a virtio device.
type guest struct {
	ns  netns.NsHandle
	tap *os.File // the VMM's end of the slot's tap; writing injects frames
}

// open opens a slot with a guest; both go when the test ends.
func open(t testing.TB, n *Network) (Slot, Addrs, *guest) {
	t.Helper()
	s, err := n.Acquire(t.Context(), kind)
	must(t, err)
	must(t, n.Open(t.Context(), s))
	t.Cleanup(func() {
		must(t, n.Close(t.Context(), s))
		must(t, n.Release(s))
	})
	a := n.Plan().Addrs(s)
	return s, a, startGuest(t, a)
}

func startGuest(t testing.TB, a Addrs) *guest {
	t.Helper()
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	g := &guest{ns: newNS(t)}
	in(t, ns, func() { g.tap = attachTap(t, Tap) })
	var eth0 *os.File
	in(t, g.ns, func() {
		eth0 = attachTap(t, "eth0")
		l, err := netlink.LinkByName("eth0")
		must(t, err)
		mac, _ := net.ParseMAC(GuestMAC)
		must(t, netlink.LinkSetHardwareAddr(l, mac))
		up(t, "lo")
		up(t, "eth0", GuestAddr)
		must(t, netlink.RouteAdd(&netlink.Route{Gw: GuestGateway.AsSlice()}))
	})
	var wg sync.WaitGroup
	pump := func(from, to *os.File) {
		buf := make([]byte, 65536)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			to.Write(buf[:n])
		}
	}
	wg.Go(func() { pump(g.tap, eth0) })
	wg.Go(func() { pump(eth0, g.tap) })
	t.Cleanup(func() {
		g.tap.Close()
		eth0.Close()
		wg.Wait()
		g.ns.Close()
	})
	return g
}

// attachTap opens the guest's end of a link of the calling thread's namespace as a VMM
// does.
func attachTap(t testing.TB, name string) *os.File {
	t.Helper()
	if kind == vmm.Packet && name == Tap {
		return attachPacket(t, PacketEnd)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(t, err)
	req, err := unix.NewIfreq(name)
	must(t, err)
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	must(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	return os.NewFile(uintptr(fd), "tap")
}

// attachPacket opens a packet socket on a link of the calling thread's namespace.
func attachPacket(t testing.TB, name string) *os.File {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	must(t, err)
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	for _, end := range []string{Tap, name} {
		withChecksums(t, fd, end)
	}
	const all = unix.ETH_P_ALL << 8 // in the order of the network
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index}))
	return os.NewFile(uintptr(fd), "packet")
}

// withChecksums has a link send whole checksums: what only crosses memory has none.
func withChecksums(t testing.TB, socket int, name string) {
	t.Helper()
	value := struct{ command, on uint32 }{unix.ETHTOOL_STXCSUM, 0}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(socket), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		t.Fatal(errno)
	}
}

// echo is a UDP and TCP server that answers each message with the address of
// its sender, and counts what it gets.
type echo struct {
	addr netip.AddrPort
	got  chan string // messages received, with their sender
}

func serve(t testing.TB, ns netns.NsHandle, addr netip.Addr, port uint16) *echo {
	t.Helper()
	e := &echo{addr: netip.AddrPortFrom(addr, port), got: make(chan string, 1024)}
	var u *net.UDPConn
	var l *net.TCPListener
	listen := func() {
		var err error
		u, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(e.addr))
		must(t, err)
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(e.addr))
		must(t, err)
	}
	if ns.IsOpen() {
		in(t, ns, listen)
	} else {
		listen()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			e.got <- fmt.Sprintf("udp %s from %s", buf[:n], from.Addr().Unmap())
			u.WriteToUDPAddrPort([]byte(from.Addr().Unmap().String()), from)
		}
	})
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			e.got <- "tcp from " + from.String()
			fmt.Fprint(c, from)
			c.Close()
		}
	})
	t.Cleanup(func() { u.Close(); l.Close(); wg.Wait() })
	return e
}

// ask sends to an echo server from a namespace and returns its answer, or "".
func ask(t testing.TB, ns netns.NsHandle, network string, to netip.Addr, port uint16, wait time.Duration) (answer string) {
	t.Helper()
	try := func() {
		d := net.Dialer{Timeout: wait}
		c, err := d.Dial(network+"4", netip.AddrPortFrom(to, port).String())
		if err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		if network == "udp" {
			fmt.Fprint(c, "hello")
		}
		buf := make([]byte, 64)
		if k, err := c.Read(buf); err == nil {
			answer = string(buf[:k])
		}
	}
	if ns.IsOpen() {
		in(t, ns, try)
	} else {
		try()
	}
	return answer
}

// nothing fails the test if the server gets anything.
func (e *echo) nothing(t testing.TB, what string) {
	t.Helper()
	select {
	case m := <-e.got:
		t.Errorf("%s: %s got through to %s", what, m, e.addr)
	case <-time.After(silence):
	}
}

// gets fails the test unless the server gets the message.
func (e *echo) gets(t testing.TB, what, want string) {
	t.Helper()
	select {
	case m := <-e.got:
		if m != want {
			t.Errorf("%s: %s got %q, want %q", what, e.addr, m, want)
		}
	case <-time.After(timeout):
		t.Errorf("%s: nothing got through to %s", what, e.addr)
	}
}

func (e *echo) drain() {
	for {
		select {
		case <-e.got:
		default:
			return
		}
	}
}

// udpFrame is an Ethernet frame with a UDP datagram, whatever its addresses.
func udpFrame(dstMAC, srcMAC net.HardwareAddr, src, dst netip.Addr, port uint16, payload string) []byte {
	be := binary.BigEndian
	b := append(append([]byte{}, dstMAC...), srcMAC...)
	b = be.AppendUint16(b, 0x0800)
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	be.PutUint16(ip[2:], uint16(28+len(payload)))
	copy(ip[12:], src.AsSlice())
	copy(ip[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(be.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	be.PutUint16(ip[10:], ^uint16(sum))
	b = append(b, ip...)
	b = be.AppendUint16(b, 4444)
	b = be.AppendUint16(b, port)
	b = be.AppendUint16(b, uint16(8+len(payload)))
	b = be.AppendUint16(b, 0) // no checksum
	return append(b, payload...)
}
