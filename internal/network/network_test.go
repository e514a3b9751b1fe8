package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

var here = netns.None() // the host's namespace, for serve and ask

func TestTrafficInAndOut(t *testing.T) {
	n := world(t, Options{})
	_, a, ga := open(t, n)
	_, b, gb := open(t, n)

	// Both guests have the same address, and each is itself.
	serve(t, ga.ns, netip.IPv4Unspecified(), 49983)
	inB := serve(t, gb.ns, netip.IPv4Unspecified(), 49983)
	for _, network := range []string{"tcp", "udp"} {
		if got, want := ask(t, here, network, a.HostIP, 49983, timeout), a.HostVeth.Addr().String(); got != want {
			t.Errorf("%s to slot a: guest saw %q, want %q", network, got, want)
		}
		inB.nothing(t, "what was for slot a")
		if got, want := ask(t, here, network, b.HostIP, 49983, timeout), b.HostVeth.Addr().String(); got != want {
			t.Errorf("%s to slot b: guest saw %q, want %q", network, got, want)
		}
		inB.drain()
	}

	serve(t, internet, internetAddr, 7000)
	for name, g := range map[string]*guest{"a": ga, "b": gb} {
		for _, network := range []string{"tcp", "udp"} {
			if got := ask(t, g.ns, network, internetAddr, 7000, timeout); got != uplinkAddr.String() {
				t.Errorf("%s from guest %s: internet saw %q, want %q", network, name, got, uplinkAddr)
			}
		}
	}
}

func TestIsolation(t *testing.T) {
	n := world(t, Options{})
	_, a, ga := open(t, n)
	sb, b, gb := open(t, n)
	free, err := n.Acquire(t.Context(), kind)
	must(t, err)
	defer n.Release(free)

	inB := serve(t, gb.ns, netip.IPv4Unspecified(), 49983)
	onHost := serve(t, here, netip.IPv4Unspecified(), 7001)
	far := serve(t, internet, netip.IPv4Unspecified(), 7002)

	for _, c := range []struct {
		what string
		to   netip.Addr
		port uint16
		e    *echo
	}{
		{"sandbox to sandbox", b.HostIP, 49983, inB},
		{"sandbox to another's namespace", b.NSVeth.Addr(), 49983, inB},
		{"sandbox to the host's end of its link", a.HostVeth.Addr(), 7001, onHost},
		{"sandbox to the host's end of another's link", b.HostVeth.Addr(), 7001, onHost},
		{"sandbox to the host's uplink address", uplinkAddr, 7001, onHost},
		{"sandbox to metadata", metadataAddr, 7002, far},
		{"sandbox to a slot that is not open", n.Plan().Addrs(free).HostIP, 7002, far},
	} {
		for _, network := range []string{"tcp", "udp"} {
			if got := ask(t, ga.ns, network, c.to, c.port, silence); got != "" {
				t.Errorf("%s over %s: answered %q", c.what, network, got)
			}
		}
		c.e.nothing(t, c.what)
	}

	// From outside, even with a route to us, and from the host's other links.
	in(t, internet, func() {
		must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet(n.Plan().Hosts), Gw: uplinkAddr.AsSlice()}))
	})
	defer in(t, internet, func() {
		must(t, netlink.RouteDel(&netlink.Route{Dst: ipNet(n.Plan().Hosts), Gw: uplinkAddr.AsSlice()}))
	})
	before, err := n.Counters(t.Context(), sb)
	must(t, err)
	for range 5 {
		for _, network := range []string{"tcp", "udp"} {
			if got := ask(t, internet, network, b.HostIP, 49983, silence/5); got != "" {
				t.Errorf("outside to sandbox over %s: answered %q", network, got)
			}
		}
	}
	inB.nothing(t, "outside to sandbox")
	if after, err := n.Counters(t.Context(), sb); err != nil || after.InPackets > before.InPackets+4 {
		t.Errorf("packets from outside came up to the sandbox's link: %+v, before %+v, %v", after, before, err)
	}

	sendsNothing(t, a, onHost.addr, netip.AddrPortFrom(internetAddr, 7002), netip.AddrPortFrom(b.HostIP, 49983))
	onHost.nothing(t, "namespace itself")
	far.nothing(t, "namespace itself")

	// The host knows at once that no slot has the address.
	if _, err := net.DialTimeout("tcp4", netip.AddrPortFrom(n.Plan().Addrs(free).HostIP, 1).String(), timeout); !errors.Is(err,
		unix.EHOSTUNREACH) {
		t.Errorf("host to a slot that is not open: %v, want no route to host", err)
	}

	// And no IPv6 on either end.
	l, err := netlink.LinkByName(a.Veth)
	must(t, err)
	addrs, err := listed(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V6) })
	must(t, err)
	if len(addrs) > 0 {
		t.Errorf("the host's link has IPv6 addresses: %v", addrs)
	}
}

// sendsNothing checks that a process in a slot's namespace, such as a VMM that was
// taken over, cannot send to any of the targets.
func sendsNothing(t *testing.T, a Addrs, targets ...netip.AddrPort) {
	t.Helper()
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	for _, to := range targets {
		addr := to.Addr()
		if addr.IsUnspecified() {
			addr = a.HostVeth.Addr()
		}
		in(t, ns, func() {
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, to.Port())))
			must(t, err)
			defer c.Close()
			if _, err := c.Write([]byte("astray")); !errors.Is(err, unix.EPERM) {
				t.Errorf("namespace itself to %s: %v, want it refused", addr, err)
			}
		})
	}
}

func TestSpoofedFramesAreDropped(t *testing.T) {
	n := world(t, Options{})
	_, a, g := open(t, n)
	_, b, _ := open(t, n)
	far := serve(t, internet, internetAddr, 7003)

	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	var gw net.HardwareAddr
	in(t, ns, func() {
		l, err := netlink.LinkByName(Tap)
		must(t, err)
		gw = l.Attrs().HardwareAddr
	})
	mac, _ := net.ParseMAC(GuestMAC)
	other, _ := net.ParseMAC("02:FC:00:00:00:06")
	me := GuestAddr.Addr()
	send := func(mac net.HardwareAddr, src netip.Addr, what string) {
		t.Helper()
		_, err := g.tap.Write(udpFrame(gw, mac, src, internetAddr, 7003, what))
		must(t, err)
	}
	send(mac, me, "honest")
	far.gets(t, "honest frame", "udp honest from 203.0.113.1")
	for what, src := range map[string]netip.Addr{
		"neighbour's address": netip.MustParseAddr("169.254.0.23"),
		"gateway's address":   GuestGateway,
		"own host address":    a.HostIP,
		"other's address":     b.HostIP,
		"own link address":    a.NSVeth.Addr(),
		"internet address":    netip.MustParseAddr("198.51.100.1"),
		"loopback":            netip.MustParseAddr("127.0.0.1"),
		"no address":          netip.IPv4Unspecified(),
	} {
		send(mac, src, what)
	}
	send(other, me, "other MAC")
	tagged := udpFrame(gw, mac, netip.MustParseAddr("198.51.100.1"), internetAddr, 7003, "tagged")
	tagged = append(tagged[:12:12], append([]byte{0x81, 0, 0, 1}, tagged[12:]...)...)
	_, err = g.tap.Write(tagged)
	must(t, err)
	far.nothing(t, "spoofed frames")
	send(mac, me, "still honest")
	far.gets(t, "honest frame after spoofed ones", "udp still honest from 203.0.113.1")
}

// The guard at the tap holds without what stands behind it.
func TestGuardAlone(t *testing.T) {
	n := world(t, Options{})
	s, a, g := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	var gw net.HardwareAddr
	in(t, ns, func() {
		must(t, removeTable(slotRules(a, nil)[1]))
		must(t, writeSysctl("net/ipv4/conf/all/rp_filter", "0"))
		l, err := netlink.LinkByName(Tap)
		must(t, err)
		gw = l.Attrs().HardwareAddr
	})
	mac, _ := net.ParseMAC(GuestMAC)
	other, _ := net.ParseMAC("02:FC:00:00:00:06")
	out := func(mac net.HardwareAddr, src netip.Addr) uint64 {
		t.Helper()
		before, err := n.Counters(t.Context(), s)
		must(t, err)
		for range 100 {
			_, err := g.tap.Write(udpFrame(gw, mac, src, internetAddr, 7003, "x"))
			must(t, err)
		}
		time.Sleep(silence) // for what is on its way
		after, err := n.Counters(t.Context(), s)
		must(t, err)
		return after.OutPackets - before.OutPackets
	}
	if k := out(mac, GuestAddr.Addr()); k < 100 {
		t.Errorf("%d of 100 honest packets came out", k)
	}
	if k := out(mac, netip.MustParseAddr("198.51.100.1")); k > 5 {
		t.Errorf("%d of 100 packets with a forged address came out", k)
	}
	if k := out(other, GuestAddr.Addr()); k > 5 {
		t.Errorf("%d of 100 packets with a forged MAC came out", k)
	}
}

// The host's own rules hold against a namespace whose rules are gone.
func TestHostDoesNotTrustNamespaces(t *testing.T) {
	n := world(t, Options{})
	_, a, ga := open(t, n)
	_, b, gb := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	inB := serve(t, gb.ns, netip.IPv4Unspecified(), 49983)
	onHost := serve(t, here, netip.IPv4Unspecified(), 7004)
	far := serve(t, internet, internetAddr, 7005)
	in(t, ns, func() {
		for _, r := range slotRules(a, nil) {
			must(t, removeTable(r))
		}
		must(t, writeSysctl("net/ipv4/conf/all/rp_filter", "0"))
	})
	for src, what := range map[netip.Addr]string{GuestAddr.Addr(): "guest's", b.HostIP: "other's", a.HostIP: "own"} {
		// The guest itself takes the address, and the namespace lets it pass.
		in(t, ga.ns, func() {
			l, err := netlink.LinkByName("eth0")
			must(t, err)
			if src != GuestAddr.Addr() {
				must(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(src, 32))}))
			}
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom(b.HostIP, 49983), netip.AddrPortFrom(uplinkAddr, 7004), netip.AddrPortFrom(internetAddr, 7005),
			} {
				c, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0)), net.UDPAddrFromAddrPort(to))
				must(t, err)
				fmt.Fprint(c, what)
				c.Close()
			}
		})
	}
	inB.nothing(t, "sandbox without rules to sandbox")
	onHost.nothing(t, "sandbox without rules to host")
	// Its own address is what it may use: that one packet shows the way open.
	far.gets(t, "sandbox's own address", "udp own from 203.0.113.1")
	far.nothing(t, "addresses that are not the sandbox's")
}

func TestSegmentSizeFitsUplink(t *testing.T) {
	n := world(t, Options{})
	_, _, g := open(t, n)
	var l net.Listener
	in(t, internet, func() {
		var err error
		l, err = net.Listen("tcp4", netip.AddrPortFrom(internetAddr, 7006).String())
		must(t, err)
	})
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { ask(t, g.ns, "tcp", internetAddr, 7006, timeout) })
	c, err := l.Accept()
	must(t, err)
	defer c.Close()
	fmt.Fprint(c, "so that the guest is done")
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		mss, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG)
		must(t, err)
		if mss > 1360 {
			t.Errorf("segments of %d bytes do not fit an uplink of MTU 1400", mss)
		}
	}))
}

func TestTapBelongsToItsUser(t *testing.T) {
	if kind == vmm.Packet {
		t.Skip("a veth pair belongs to no user")
	}
	const base = 65000
	n := world(t, Options{BaseUID: base})
	s, err := n.Acquire(t.Context(), kind)
	must(t, err)
	must(t, n.Open(t.Context(), s))
	defer func() { must(t, n.Close(t.Context(), s)); must(t, n.Release(s)) }()
	ns, err := netns.GetFromPath(n.Plan().Addrs(s).NetNSPath)
	must(t, err)
	defer ns.Close()
	attach := func(uid int) error {
		return osthread.Do(func() error {
			if err := netns.Set(ns); err != nil {
				return err
			}
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			req, err := unix.NewIfreq(Tap)
			if err != nil {
				return err
			}
			req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			// This thread alone loses its privilege, and gets it back.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), 0); errno != 0 {
				return errno
			}
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); errno != 0 {
				return errno
			}
			return err
		})
	}
	if err := attach(base + int(s)); err != nil {
		t.Errorf("attach as the tap's owner: %v", err)
	}
	if err := attach(base + int(s) + 1); !errors.Is(err, unix.EPERM) {
		t.Errorf("attach as another user: %v, want it refused", err)
	}
}

func TestCloseRemovesEverythingTwice(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	if err := n.Close(ctx, s); err != nil {
		t.Errorf("close of a slot never opened: %v", err)
	}
	for range 2 {
		before := inventory(t)
		must(t, n.Open(ctx, s))
		if err := n.Open(ctx, s); !errors.Is(err, errdefs.WrongState) {
			t.Errorf("second open = %v", err)
		}
		if err := n.Release(s); !errors.Is(err, errdefs.WrongState) {
			t.Errorf("release of an open slot = %v", err)
		}
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		must(t, n.Close(cancelled, s))
		if d := cmp.Diff(before, inventory(t)); d != "" {
			t.Errorf("close left (-before +after):\n%s", d)
		}
		must(t, n.Close(ctx, s))
	}
	// Half of it is gone already, whichever half.
	a := n.Plan().Addrs(s)
	for what, remove := range map[string]func() error{
		"link": func() error {
			l, err := netlink.LinkByName(a.Veth)
			must(t, err)
			return netlink.LinkDel(l)
		},
		"namespace":                 func() error { return removeNS(a.NetNSPath) },
		"namespace's mount":         func() error { return unix.Unmount(a.NetNSPath, unix.MNT_DETACH) },
		"other agent's whole close": func() error { return New(testPlan(), Options{}).Close(ctx, s) },
	} {
		must(t, n.Open(ctx, s))
		must(t, remove())
		if err := n.Close(ctx, s); err != nil {
			t.Errorf("close without %s: %v", what, err)
		}
	}
	must(t, n.Release(s))
	for _, s := range []Slot{0, -1, MaxSlot + 1} {
		if err := n.Close(ctx, s); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("close of slot %d = %v", s, err)
		}
	}
}

func TestOpenFailsAtEachStep(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	var steps []string
	n.hook = func(_ Slot, step string) error { steps = append(steps, step); return nil }
	must(t, n.Open(ctx, s))
	must(t, n.Close(ctx, s))
	if len(steps) < 10 {
		t.Fatalf("steps = %v, too few", steps)
	}
	before := inventory(t)
	injected := errors.New("injected")
	for _, step := range steps {
		for _, how := range []string{"error", "cancel"} {
			cctx, cancel := context.WithCancel(ctx)
			n.hook = func(_ Slot, at string) error {
				if at != step {
					return nil
				}
				if how == "cancel" {
					cancel()
					return nil
				}
				return injected
			}
			err := n.Open(cctx, s)
			cancel()
			if want := map[string]error{"error": injected, "cancel": context.Canceled}[how]; !errors.Is(err, want) {
				t.Errorf("%s at %q: open = %v", how, step, err)
			}
			if d := cmp.Diff(before, inventory(t)); d != "" {
				t.Errorf("%s at %q left (-before +after):\n%s", how, step, d)
			}
		}
	}
	// The slot is as good as new.
	n.hook = nil
	must(t, n.Open(ctx, s))
	must(t, n.Close(ctx, s))
	must(t, n.Release(s))
}

func TestOpenDoesNotTouchWhatExists(t *testing.T) {
	n, other := world(t, Options{}), New(testPlan(), Options{})
	ctx := t.Context()
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	must(t, n.Open(ctx, s))
	must(t, other.slots.claim(s, kind))
	other.slots.closed(s)
	before := inventory(t)
	if err := other.Open(ctx, s); err == nil {
		t.Error("open of a slot that exists succeeded")
	}
	if err := other.Release(s); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release = %v", err)
	}
	if d := cmp.Diff(before, inventory(t)); d != "" {
		t.Errorf("failed open changed (-before +after):\n%s", d)
	}
	must(t, n.Close(ctx, s))
}

func TestOpenConcurrently(t *testing.T) {
	n := world(t, Options{})
	before, away := inventory(t), astray(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2 {
				s, err := n.Acquire(t.Context(), kind)
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(n.Open(t.Context(), s), n.Close(t.Context(), s), n.Release(s)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if d := cmp.Diff(before, inventory(t)); d != "" {
		t.Errorf("left (-before +after):\n%s", d)
	}
	for _, task := range astray(t) {
		if !slices.Contains(away, task) {
			t.Errorf("%s is left in another namespace", task)
		}
	}
}

// astray returns the threads of this process that are in another network namespace than
// the caller's. Go keeps its first thread where a test left it that ended with it locked.
func astray(t *testing.T) (away []string) {
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	must(t, err)
	home, err := os.Readlink("/proc/thread-self/ns/net")
	must(t, err)
	for _, task := range tasks {
		if ns, err := os.Readlink(task); err == nil && ns != home {
			away = append(away, task)
		}
	}
	return away
}

// "ip netns add" mounts the directory of namespaces over itself the first time;
// what we pinned before must stay removable.
func TestCloseAfterOthersAddNamespaces(t *testing.T) {
	testenv.Program(t, "ip")
	n := world(t, Options{})
	s, err := n.Acquire(t.Context(), kind)
	must(t, err)
	must(t, n.Open(t.Context(), s))
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", append([]string{"netns"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ip netns %v: %v: %s", args, err, out)
		}
	}
	ip("add", "tnet-other")
	ip("exec", n.plan.Addrs(s).NetNS, "true")
	if err := n.Close(t.Context(), s); err != nil {
		t.Errorf("close after ip netns add: %v", err)
	}
	must(t, n.Teardown(t.Context())) // leaves the other's
	ip("exec", "tnet-other", "true")
	ip("del", "tnet-other")
	must(t, n.Release(s))
	must(t, n.Setup(t.Context()))
}

func TestStrays(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	var slots []Slot
	for range 4 {
		s, err := n.Acquire(ctx, kind)
		must(t, err)
		must(t, n.Open(ctx, s))
		slots = append(slots, s)
	}
	// One lost its link, one its namespace, one is in use, one is whole.
	l, err := netlink.LinkByName(n.Plan().Addrs(slots[0]).Veth)
	must(t, err)
	must(t, netlink.LinkDel(l))
	held, err := netns.GetFromPath(n.Plan().Addrs(slots[1]).NetNSPath)
	must(t, err)
	defer held.Close() // or its link would go with it
	must(t, removeNS(n.Plan().Addrs(slots[1]).NetNSPath))
	must(t, os.WriteFile(netnsDir+"/tnet-0", nil, 0o444))
	defer os.Remove(netnsDir + "/tnet-0")

	after := New(testPlan(), Options{}) // the agent after a restart
	must(t, after.Claim(slots[2]))
	if err := after.Claim(slots[2]); !errors.Is(err, errdefs.AlreadyExists) {
		t.Errorf("second claim = %v", err)
	}
	got, err := after.Strays(ctx)
	must(t, err)
	if d := cmp.Diff([]Slot{slots[0], slots[1], slots[3]}, got); d != "" {
		t.Errorf("strays (-want +got):\n%s", d)
	}
	for _, s := range got {
		must(t, after.Claim(s))
		must(t, after.Close(ctx, s))
		must(t, after.Release(s))
	}
	must(t, after.Close(ctx, slots[2]))
	must(t, after.Release(slots[2]))
	if got, err := after.Strays(ctx); err != nil || len(got) > 0 {
		t.Errorf("strays after their close = %v, %v", got, err)
	}
}

func TestSetup(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	_, a, g := open(t, n)
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	must(t, n.Setup(ctx)) // again, with a slot open
	if got := ask(t, here, "tcp", a.HostIP, 49983, timeout); got == "" {
		t.Error("a second setup broke an open slot")
	}
	if b, _ := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); strings.TrimSpace(string(b)) != "1" {
		t.Errorf("ip_forward = %s", b)
	}

	// Ranges of another agent, of a link, and of a wider route are refused.
	refused := func(p Plan, naming string) {
		t.Helper()
		err := New(p, Options{}).Setup(ctx)
		if !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), naming) {
			t.Errorf("setup of %+v = %v, want a refusal naming %q", p, err, naming)
		}
	}
	other := Plan{"tneu", n.plan.Hosts, netip.MustParsePrefix("10.22.0.0/16")}
	refused(other, "another agent")
	other.Hosts = netip.MustParsePrefix("203.0.0.0/16")
	refused(other, "up0")
	wide := &netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.16.0.0/12")), Gw: internetAddr.AsSlice()}
	must(t, netlink.RouteAdd(wide))
	defer netlink.RouteDel(wide)
	other.Hosts = netip.MustParsePrefix("10.21.0.0/16")
	refused(other, "up0")
	refused(Plan{"Bad", n.plan.Hosts, n.plan.Hosts}, "instance")

	// Two agents with their own ranges live side by side.
	two := New(Plan{"tneu", netip.MustParsePrefix("10.41.0.0/16"), netip.MustParsePrefix("10.42.0.0/16")}, Options{Kind: kind})
	must(t, two.Setup(ctx))
	must(t, n.Setup(ctx))
	_, b, gb := open(t, two)
	serve(t, gb.ns, netip.IPv4Unspecified(), 49983)
	if got := ask(t, here, "tcp", b.HostIP, 49983, timeout); got == "" {
		t.Error("the second agent's sandbox does not answer")
	}
	if got := ask(t, g.ns, "tcp", b.HostIP, 49983, silence); got != "" {
		t.Error("a sandbox reaches a sandbox of another agent")
	}
	must(t, two.Teardown(ctx))
	must(t, two.Teardown(ctx))
}

func TestRulesAreWhatTheKernelHolds(t *testing.T) {
	testenv.Program(t, "nft")
	n := world(t, Options{Resolvers: []netip.Addr{privateAddr}})
	s, a, _ := open(t, n)
	check := func(r ruleset) { t.Helper(); kernelHolds(t, r) }
	check(n.hostRules())
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	// The policy chains are filled in turn; the one not in use stays as it was.
	want := slotRules(a, egressRules(n.plan, n.opts, Policy{}))
	chains := want[1].chains
	egress := slices.IndexFunc(chains, func(c chain) bool { return c.name == egressChain })
	for i, p := range append(testPolicies, Policy{}) {
		in(t, ns, func() {
			for _, r := range want {
				check(r)
			}
		})
		must(t, n.SetPolicy(t.Context(), s, p))
		next := (i + 1) % 2
		chains[egress].rules = []rule{{jump(policyChains[next])}}
		chains[egress+1+next].rules = egressRules(n.plan, n.opts, p)
	}
	in(t, ns, func() { check(want[1]) })
	must(t, n.Setup(t.Context()))
	check(n.hostRules())
}

// kernelHolds compares a table with what the kernel has of it, in the calling
// thread's namespace.
func kernelHolds(t testing.TB, r ruleset) {
	t.Helper()
	cmd := exec.Command("nft", "-s", "list", "table", familyNames[r.family], r.name)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	if d := cmp.Diff(r.String(), string(out)); d != "" {
		t.Errorf("%s (-sent +kernel):\n%s", r.name, d)
	}
}

// inventory is everything in the host's network, a line each.
func inventory(t testing.TB) []string {
	t.Helper()
	var p []string
	links, err := listed(netlink.LinkList)
	must(t, err)
	for _, l := range links {
		p = append(p, "link "+l.Attrs().Name)
	}
	routes, err := listed(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	})
	must(t, err)
	for _, r := range routes {
		p = append(p, "route "+r.String())
	}
	names, err := filepath.Glob(netnsDir + "/*")
	must(t, err)
	for _, n := range names {
		p = append(p, "netns "+n)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		p = append(p, "mount "+strings.Fields(line)[4])
	}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return append(p, fmt.Sprintf("%d descriptors", len(fds)))
}
