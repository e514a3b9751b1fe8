package network

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestLimitsValidate(t *testing.T) {
	for _, l := range []Limits{
		{},
		{minByteRate, maxByteRate, 1, maxPackets, 1},
		{InBytes: 1 << 20},
	} {
		if err := l.Validate(); err != nil {
			t.Errorf("%+v: %v", l, err)
		}
	}
	err := Limits{1, -1, -1, maxPackets + 1, -1}.Validate()
	if !errors.Is(err, errdefs.InvalidArgument) || strings.Count(err.Error(), "\n") != 4 {
		t.Errorf("five bad limits: %v", err)
	}
}

// A bucket that the kernel can hold, whatever the rate.
func TestShaper(t *testing.T) {
	for rate := int64(minByteRate); rate <= maxByteRate; rate = rate*3 + 1 {
		q := shaper(rate)
		burst := float64(q.Buffer) * 64 / 1e9 * float64(rate)
		if q.Rate != uint64(rate) || burst < 32<<10 || burst < float64(rate)/51 || q.Limit < 64<<10 {
			t.Errorf("%d bytes/s: %+v, burst %.0f", rate, q, burst)
		}
	}
}

// limitsOf are the limits that the kernel enforces for a slot.
func limitsOf(t testing.TB, a Addrs) (l Limits) {
	t.Helper()
	must(t, inNS(a.NetNSPath, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		l, err = readLimits(h)
		return err
	}))
	return l
}

func TestSetLimits(t *testing.T) {
	host := Limits{InBytes: 50_000_000, OutPackets: 9000, Connections: 1000}
	n := world(t, Options{Limits: host, Pool: 1})
	ctx := t.Context()
	fresh, err := n.Acquire(ctx, kind)
	must(t, err)
	must(t, n.Open(ctx, fresh))
	stop := run(t, n)
	full(t, n)
	pooled, err := n.Acquire(ctx, kind)
	must(t, err)
	must(t, n.Open(ctx, pooled))
	stop()
	for what, s := range map[string]Slot{"fresh": fresh, "pooled": pooled} {
		a := n.plan.Addrs(s)
		expect := func(when string, want Limits) {
			t.Helper()
			if d := cmp.Diff(want, limitsOf(t, a)); d != "" {
				t.Errorf("%s slot, %s (-want +kernel):\n%s", what, when, d)
			}
		}
		expect("as opened", host)
		all := Limits{1 << 20, 5 << 30, 100, 200, 7}
		for range 2 {
			must(t, n.SetLimits(ctx, s, all))
			expect("all set", all)
		}
		must(t, n.SetPolicy(ctx, s, Policy{Mode: None}))
		must(t, n.SetPolicy(ctx, s, Policy{}))
		must(t, n.Setup(ctx))
		expect("after a change of policy", all)
		must(t, n.SetLimits(ctx, s, Limits{Connections: 9}))
		expect("some set", Limits{InBytes: host.InBytes, OutPackets: host.OutPackets, Connections: 9})
		must(t, n.SetLimits(ctx, s, Limits{}))
		expect("none set", host)

		// A change that fails half way is taken back. It fails because a chain of
		// another type has the name.
		must(t, n.SetLimits(ctx, s, Limits{OutBytes: 1 << 20}))
		must(t, inNS(a.NetNSPath, func() error {
			return transact(func(c *nftables.Conn) error {
				tb := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: limitTable})
				c.DelTable(tb)
				tb = c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: limitTable})
				c.AddChain(&nftables.Chain{Name: packetChain, Table: tb, Type: nftables.ChainTypeFilter,
					Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
				c.AddChain(&nftables.Chain{Name: connectionChain, Table: tb})
				return nil
			})
		}))
		if err := n.SetLimits(ctx, s, all); err == nil {
			t.Error("a change that cannot be made succeeded")
		}
		expect("after a failed change", Limits{InBytes: host.InBytes, OutBytes: 1 << 20})
	}

	if err := n.SetLimits(ctx, fresh, Limits{InBytes: -1}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("negative limit = %v", err)
	}
	for _, s := range []Slot{fresh, pooled} {
		must(t, n.Close(ctx, s))
		must(t, n.Release(s))
	}
	if err := n.SetLimits(ctx, fresh, Limits{}); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("limits of a closed slot = %v", err)
	}
	if err := n.SetLimits(ctx, 0, Limits{}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("limits of slot 0 = %v", err)
	}
	if err := New(testPlan(), Options{Limits: Limits{InBytes: 1}}).Setup(ctx); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("setup with a bad limit = %v", err)
	}
}

// transfer sends size bytes over TCP, out of the guest or into it, and returns
// how long they took to arrive.
func transfer(t testing.TB, g *guest, host netip.Addr, out bool, size int64) time.Duration {
	t.Helper()
	var l net.Listener
	var conn net.Conn
	var err error
	if out {
		in(t, internet, func() { l, err = net.Listen("tcp4", netip.AddrPortFrom(internetAddr, 0).String()) })
	} else {
		in(t, g.ns, func() { l, err = net.Listen("tcp4", "0.0.0.0:0") })
	}
	must(t, err)
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	if out {
		in(t, g.ns, func() { conn, err = net.Dial("tcp4", netip.AddrPortFrom(internetAddr, port).String()) })
	} else {
		conn, err = net.Dial("tcp4", netip.AddrPortFrom(host, port).String())
	}
	must(t, err)
	defer conn.Close()
	at, err := l.Accept()
	must(t, err)
	defer at.Close()
	sent := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		var err error
		for left := size; left > 0 && err == nil; {
			var k int
			k, err = conn.Write(buf[:min(left, int64(len(buf)))])
			left -= int64(k)
		}
		sent <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	begin := time.Now()
	got, err := io.Copy(io.Discard, at)
	took := time.Since(begin)
	if err := errors.Join(err, <-sent); err != nil || got != size {
		t.Fatalf("%d of %d bytes arrived, %v", got, size, err)
	}
	return took
}

func TestByteLimits(t *testing.T) {
	n := world(t, Options{})
	s, a, g := open(t, n)
	const rate = 1_000_000
	for _, out := range []bool{true, false} {
		l := Limits{InBytes: rate}
		if out {
			l = Limits{OutBytes: rate}
		}
		must(t, n.SetLimits(t.Context(), s, l))
		const size = 1_000_000
		took := transfer(t, g, a.HostIP, out, size)
		t.Logf("limited, out %v: %.2f MB/s", out, size/1e6/took.Seconds())
		// What passed at once, in the bucket, is 32 KiB.
		if least := time.Duration(float64(size-(64<<10)) / rate * 1e9); took < least {
			t.Errorf("out %v: %d bytes took %v, at the limit no less than %v", out, size, took, least)
		}
		took = transfer(t, g, a.HostIP, !out, size)
		t.Logf("other direction, out %v: %.2f MB/s", !out, size/1e6/took.Seconds())
	}
	must(t, n.SetLimits(t.Context(), s, Limits{}))
	for _, out := range []bool{true, false} {
		took := transfer(t, g, a.HostIP, out, 20_000_000)
		t.Logf("no limit, out %v: %.0f MB/s", out, 20/took.Seconds())
	}
}

func TestPacketLimits(t *testing.T) {
	n := world(t, Options{})
	s, a, g := open(t, n)
	ctx := t.Context()
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	inGuest := serve(t, g.ns, netip.IPv4Unspecified(), 7030)
	far := serve(t, internet, internetAddr, 7031)

	// Into the sandbox: how many of 300 arrive follows from the time they took.
	must(t, n.SetLimits(ctx, s, Limits{InPackets: 100}))
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.HostIP, 7030)))
	must(t, err)
	defer c.Close()
	count := func(e *echo, send func()) (got int, took time.Duration) {
		e.drain()
		begin := time.Now()
		for range 300 {
			send()
		}
		took = time.Since(begin)
		for {
			select {
			case <-e.got:
				got++
			case <-time.After(silence):
				return got, took
			}
		}
	}
	check := func(what string, got int, took time.Duration) {
		t.Helper()
		if most := 16 + 2 + int(took.Seconds()*100); got > most || got == 0 {
			t.Errorf("%s: %d of 300 packets in %v at 100 a second, want 1 to %d", what, got, took, most)
		}
	}
	got, took := count(inGuest, func() { fmt.Fprint(c, "x") })
	check("in", got, took)
	must(t, n.SetLimits(ctx, s, Limits{OutPackets: 100}))
	send := func() {
		_, err := g.tap.Write(udpFrame(gw, mac, GuestAddr.Addr(), internetAddr, 7031, "x"))
		must(t, err)
	}
	got, took = count(far, send)
	check("out", got, took)
	// The other direction is free, and this one too without the limit.
	if got, _ := count(inGuest, func() { fmt.Fprint(c, "x") }); got < 200 {
		t.Errorf("in, limited out: %d of 300 packets", got)
	}
	must(t, n.SetLimits(ctx, s, Limits{}))
	if got, _ := count(far, send); got < 200 {
		t.Errorf("out, not limited: %d of 300 packets", got)
	}
}

func TestConnectionLimit(t *testing.T) {
	n := world(t, Options{})
	s, a, g := open(t, n)
	ctx := t.Context()
	var l net.Listener
	in(t, internet, func() {
		var err error
		l, err = net.Listen("tcp4", netip.AddrPortFrom(internetAddr, 7040).String())
		must(t, err)
	})
	var wg sync.WaitGroup
	accepted := make(chan net.Conn, 100)
	wg.Go(func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
			wg.Go(func() {
				// Wrapped, or it would splice, and keep the pipes.
				io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
				c.Close()
			})
		}
	})
	// The far end of a connection that was cut off never hears of it.
	t.Cleanup(func() {
		l.Close()
		for c := range accepted {
			c.Close()
		}
		wg.Wait()
	})
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	dial := func() (c net.Conn, err error) {
		in(t, g.ns, func() { c, err = net.DialTimeout("tcp4", l.Addr().String(), timeout) })
		return c, err
	}
	works := func(c net.Conn, wait time.Duration) bool {
		c.SetDeadline(time.Now().Add(wait))
		_, err := c.Write([]byte("x"))
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		return err == nil
	}
	const most = 4
	must(t, n.SetLimits(ctx, s, Limits{Connections: most}))
	var conns []net.Conn
	for range most {
		c, err := dial()
		must(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	refused := func(when string) {
		t.Helper()
		c, err := dial()
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, unix.ENETUNREACH) {
			t.Errorf("%s: one connection more = %v, want it refused", when, err)
		}
	}
	refused("at the limit")
	must(t, n.SetLimits(ctx, s, Limits{Connections: most, InPackets: 100_000}))
	refused("after another limit changed")
	// Those that exist go on, and what the host begins does not count.
	for _, c := range conns {
		if !works(c, timeout) {
			t.Error("a connection within the limit does not work")
		}
	}
	if got := ask(t, here, "tcp", a.HostIP, 49983, timeout); got == "" {
		t.Error("the host does not reach a guest at its limit")
	}
	// A policy that forgets the connections does not raise the number.
	must(t, n.SetPolicy(ctx, s, Policy{Mode: All}))
	for _, c := range conns {
		if !works(c, timeout) {
			t.Error("a connection does not work after a change of policy")
		}
	}
	refused("after a change of policy")
	// One that ends makes room.
	conns[0].Close()
	deadline := time.Now().Add(timeout)
	for {
		c, err := dial()
		if err == nil {
			conns[0] = c
			defer c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after one ended: %v", err)
		}
	}
	// A lower number ends those above it; a higher one makes room.
	must(t, n.SetLimits(ctx, s, Limits{Connections: 1}))
	alive := 0
	for _, c := range conns {
		if works(c, silence) {
			alive++
		}
	}
	if alive != 1 {
		t.Errorf("%d connections work at a limit of 1", alive)
	}
	must(t, n.SetLimits(ctx, s, Limits{}))
	for range 2 * most {
		c, err := dial()
		must(t, err)
		defer c.Close()
	}
}

func TestLimitRulesAreWhatTheKernelHolds(t *testing.T) {
	testenv.Program(t, "nft")
	n := world(t, Options{})
	s, a, _ := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	for _, l := range []Limits{
		{0, 0, 100, 20000, 64},
		{0, 0, 0, 20000, 64},
		{0, 0, 0, 20000, 0},
		{0, 0, 3, 0, 65},
		{},
		{Connections: math.MaxInt32},
	} {
		must(t, n.SetLimits(t.Context(), s, l))
		// A number of connections there is in any case.
		if l.Connections == 0 || l.Connections > n.share.sandbox {
			l.Connections = n.share.sandbox
		}
		in(t, ns, func() { kernelHolds(t, limitRules(l)) })
	}
}
