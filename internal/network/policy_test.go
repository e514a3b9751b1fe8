package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestEgress(t *testing.T) {
	n := world(t, Options{
		Resolvers: []netip.Addr{privateAddr, uplinkAddr},
	})
	s, _, g := open(t, n)
	_, b, gb := open(t, n)
	serve(t, gb.ns, netip.IPv4Unspecified(), 7000)
	second, banned := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("198.51.100.7")
	cgnat := netip.MustParseAddr("100.64.3.4")
	internetHas(t, second, banned, cgnat)

	for _, port := range []uint16{53, 7000} {
		serve(t, here, uplinkAddr, port)
		for _, a := range []netip.Addr{internetAddr, second, banned, cgnat, privateAddr, metadataAddr} {
			serve(t, internet, a, port)
		}
	}

	type dest struct {
		addr netip.Addr
		port uint16
	}
	dests := map[string]dest{
		"internet":       {internetAddr, 7000},
		"second":         {second, 7000},
		"banned":         {banned, 7000},
		"private":        {privateAddr, 7000},
		"cgnat":          {cgnat, 7000},
		"resolver":       {privateAddr, 53},
		"host resolver":  {uplinkAddr, 53},
		"other resolver": {second, 53},
		"metadata":       {metadataAddr, 7000},
		"metadata dns":   {metadataAddr, 53},
		"host":           {uplinkAddr, 7000},
		"other sandbox":  {b.HostIP, 7000},
	}
	for _, c := range []struct {
		policy  *Policy // nil: as opened
		reaches []string
	}{
		{nil, []string{"internet", "second", "banned", "resolver", "host resolver", "other resolver"}},
		{&Policy{Mode: None}, nil},
		{&Policy{Mode: All}, []string{"internet", "second", "banned", "private", "cgnat", "resolver", "host resolver", "other resolver"}},
		{&Policy{Mode: None, Allow: prefixes("203.0.113.0/24")}, []string{"internet", "host resolver"}},
		{&Policy{Mode: None, Allow: prefixes("0.0.0.0/0"), Deny: prefixes("0.0.0.0/0")},
			[]string{"internet", "second", "banned", "private", "cgnat", "resolver", "host resolver", "other resolver"}},
		{&Policy{Allow: prefixes("10.99.0.0/16"), Deny: prefixes("203.0.113.0/24")},
			[]string{"second", "banned", "private", "resolver", "other resolver"}},
		// What is allowed wins, whichever range is the larger. It does not pass the walls.
		{&Policy{Mode: All, Allow: prefixes("203.0.113.2/32", "10.99.0.1/32"), Deny: prefixes("203.0.113.0/24", "10.0.0.0/8")},
			[]string{"internet", "second", "banned", "private", "cgnat", "resolver", "other resolver"}},
		{&Policy{Allow: prefixes("198.51.100.0/24"), Deny: prefixes("198.51.100.7/32", "203.0.113.2/32", "10.99.0.1/32")},
			[]string{"second", "banned", "host resolver", "other resolver"}},
		{&Policy{Mode: None, Allow: prefixes("169.254.0.0/16", "203.0.113.1/32", b.HostIP.String()+"/32")}, []string{"host resolver"}},
		{&Policy{}, []string{"internet", "second", "banned", "resolver", "host resolver", "other resolver"}},
	} {
		if c.policy != nil {
			must(t, n.SetPolicy(t.Context(), s, *c.policy))
		}
		want := map[string]bool{}
		for _, name := range c.reaches {
			want[name] = true
		}
		var wg sync.WaitGroup
		for name, d := range dests {
			for _, network := range []string{"udp", "tcp"} {
				wait := silence
				if want[name] {
					wait = timeout
				}
				wg.Go(func() {
					if got := ask(t, g.ns, network, d.addr, d.port, wait) != ""; got != want[name] {
						t.Errorf("%+v: reaches %s over %s: %v, want %v", c.policy, name, network, got, want[name])
					}
				})
			}
		}
		wg.Wait()
	}
}

// A refusal is an answer, not a silence, however many there are.
func TestRefusedConnectionsFailAtOnce(t *testing.T) {
	n := world(t, Options{})
	_, _, g := open(t, n)
	in(t, g.ns, func() {
		for range 100 {
			_, err := net.DialTimeout("tcp4", netip.AddrPortFrom(privateAddr, 80).String(), timeout)
			if !errors.Is(err, unix.EHOSTUNREACH) {
				t.Fatalf("dial of a refused address = %v, want no route to host", err)
			}
		}
	})
}

// Tightening ends what exists, in both directions, and only that.
func TestPolicyEndsConnections(t *testing.T) {
	n := world(t, Options{})
	s, a, g := open(t, n)
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)

	listen := func(port int) *net.UDPConn {
		var c *net.UDPConn
		in(t, internet, func() {
			var err error
			c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: internetAddr.AsSlice(), Port: port})
			must(t, err)
		})
		t.Cleanup(func() { c.Close() })
		return c
	}
	server := listen(7010)
	var conn *net.UDPConn
	in(t, g.ns, func() {
		var err error
		conn, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: internetAddr.AsSlice(), Port: 7010})
		must(t, err)
	})
	defer conn.Close()
	buf := make([]byte, 64)
	receive := func(c *net.UDPConn, wait time.Duration) (string, *net.UDPAddr) {
		c.SetReadDeadline(time.Now().Add(wait))
		k, from, err := c.ReadFromUDP(buf)
		if err != nil {
			return "", nil
		}
		return string(buf[:k]), from
	}
	exchange := func(wait time.Duration) (out, back string) {
		for { // a refusal before is the first write's error
			if _, err := fmt.Fprint(conn, "out"); err == nil {
				break
			}
		}
		out, from := receive(server, wait)
		if from == nil {
			return out, ""
		}
		server.WriteToUDP([]byte("back"), from)
		back, _ = receive(conn, wait)
		return out, back
	}
	if out, back := exchange(timeout); out != "out" || back != "back" {
		t.Fatalf("before: %q, %q", out, back)
	}
	// The new rules alone refuse what exists; the old ones let it go on.
	for _, p := range []Policy{{Deny: prefixes("203.0.113.2/32")}, {}} {
		must(t, inNS(a.NetNSPath, func() error { return swapPolicy(policyChainsOf(rangePolicyOf(n.plan, n.opts, p), p, nil)) }))
		out, _ := exchange(timeout / 4)
		if want := p.Deny == nil; (out != "") != want {
			t.Errorf("with deny %v: %q got out", p.Deny, out)
		}
	}
	// The far end goes on sending, which must not keep the connection alive.
	fmt.Fprint(conn, "out")
	_, peer := receive(server, timeout)
	must(t, n.SetPolicy(t.Context(), s, Policy{Deny: prefixes("203.0.113.2/32")}))
	server.WriteToUDP([]byte("late"), peer)
	if got, _ := receive(conn, silence); got != "" {
		t.Errorf("%q came in after the policy refused its sender", got)
	}
	if out, _ := exchange(silence); out != "" {
		t.Errorf("%q got out after the policy refused it", out)
	}
	if got := ask(t, here, "tcp", a.HostIP, 49983, timeout); got == "" {
		t.Error("the host does not reach the guest any more")
	}
	must(t, n.SetPolicy(t.Context(), s, Policy{}))
	if out, back := exchange(timeout); out != "out" || back != "back" {
		t.Errorf("after loosening: %q, %q", out, back)
	}
}

// No packet slips through between two policies that both refuse it.
func TestPolicyChangesAtomically(t *testing.T) {
	n := world(t, Options{})
	s, _, g := open(t, n)
	far := serve(t, internet, internetAddr, 7011)
	deny := prefixes("203.0.113.2/32")
	must(t, n.SetPolicy(t.Context(), s, Policy{Mode: All, Deny: deny}))
	stop, done := make(chan struct{}), make(chan int)
	var conn *net.UDPConn
	in(t, g.ns, func() {
		var err error
		conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(far.addr))
		must(t, err)
	})
	defer conn.Close()
	go func() {
		sent := 0
		for {
			select {
			case <-stop:
				done <- sent
				return
			default:
				fmt.Fprint(conn, "x")
				sent++
			}
		}
	}()
	for i := range 40 {
		p := Policy{Mode: []Mode{All, Public, None}[i%3], Deny: deny}
		if i%2 == 0 {
			p.Allow = prefixes("198.51.100.0/24", "203.0.113.128/25")
		}
		must(t, n.SetPolicy(t.Context(), s, p))
	}
	close(stop)
	if sent := <-done; sent < 300 {
		t.Errorf("only %d packets were sent", sent)
	}
	far.nothing(t, "while the policy changed")
}

func TestSetPolicyRefuses(t *testing.T) {
	n := world(t, Options{})
	s, _, g := open(t, n)
	far := serve(t, internet, internetAddr, 7012)
	must(t, n.SetPolicy(t.Context(), s, Policy{Mode: None}))
	many := make([]netip.Prefix, maxPolicyRanges+1)
	for i := range many {
		many[i] = netip.PrefixFrom(addr4(0x08000000+uint32(i)*512), 24)
	}
	for _, p := range []Policy{
		{Mode: "most"},
		{Allow: prefixes("2001:db8::/32")},
		{Allow: []netip.Prefix{{}}},
		{Deny: many},
	} {
		if err := n.SetPolicy(t.Context(), s, p); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("SetPolicy = %v, want it refused", err)
		}
	}
	// As many as can be, in both lists, fit in one transaction.
	must(t, n.SetPolicy(t.Context(), s, Policy{Mode: None, Allow: many[:maxPolicyRanges], Deny: many[1:]}))
	for _, s := range []Slot{0, s + 100} {
		want := errdefs.NotFound
		if s == 0 {
			want = errdefs.InvalidArgument
		}
		if err := n.SetPolicy(t.Context(), s, Policy{}); !errors.Is(err, want) {
			t.Errorf("SetPolicy of slot %d = %v", s, err)
		}
		if _, err := n.Counters(t.Context(), s); !errors.Is(err, want) {
			t.Errorf("Counters of slot %d = %v", s, err)
		}
	}
	if got := ask(t, g.ns, "udp", internetAddr, 7012, silence); got != "" {
		t.Errorf("answered %q after refused changes", got)
	}
	far.nothing(t, "after refused changes")
}

func TestCounters(t *testing.T) {
	n := world(t, Options{})
	s, _, g := open(t, n)
	serve(t, internet, internetAddr, 7013)
	before, err := n.Counters(t.Context(), s)
	must(t, err)
	for range 10 {
		if ask(t, g.ns, "udp", internetAddr, 7013, timeout) == "" {
			t.Fatal("no answer")
		}
	}
	after, err := n.Counters(t.Context(), s)
	must(t, err)
	// "hello" out and "203.0.113.1" back, with 42 bytes of headers; a few ARP
	// frames may come with them.
	if d := after.OutPackets - before.OutPackets; d < 10 || d > 14 {
		t.Errorf("%d packets out, want 10", d)
	}
	if d := after.InPackets - before.InPackets; d < 10 || d > 14 {
		t.Errorf("%d packets in, want 10", d)
	}
	if d := after.OutBytes - before.OutBytes; d < 470 || d > 470+4*60 {
		t.Errorf("%d bytes out, want 470", d)
	}
	if d := after.InBytes - before.InBytes; d < 530 || d > 530+4*60 {
		t.Errorf("%d bytes in, want 530", d)
	}
	// All at once, and after one more slot: the same numbers.
	for range 2 {
		one, err := n.Counters(t.Context(), s)
		must(t, err)
		all, err := n.CountersAll(t.Context())
		must(t, err)
		if all[s] != one {
			t.Errorf("counters of all: %+v, of the slot alone %+v", all[s], one)
		}
		if len(all) != n.Stats().Open {
			t.Errorf("counters of %d slots, %d are open", len(all), n.Stats().Open)
		}
		open(t, n)
	}
	// What the policy refuses does not leave the namespace.
	must(t, n.SetPolicy(t.Context(), s, Policy{Mode: None}))
	ask(t, g.ns, "udp", internetAddr, 7013, silence)
	if again, err := n.Counters(t.Context(), s); err != nil || again.OutBytes-after.OutBytes > 2*60 {
		t.Errorf("counters after a refusal = %+v, %v; before %+v", again, err, after)
	}
}
