package network

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// The internet of the tests with names: two owners and a resolver, which also
// has names that lead to where no sandbox may go.
var (
	goodAddr = netip.MustParseAddr("198.51.100.10")
	evilAddr = netip.MustParseAddr("198.51.100.66")
)

type namesWorld struct {
	*Network
	mu    sync.Mutex
	asked []string // by the resolver
	hits  map[string]int
}

// hit notes that a connection got through to a server.
func (w *namesWorld) hit(server string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hits[server]++
}

// reached returns the servers that connections got through to, and forgets them.
func (w *namesWorld) reached() (servers []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for s := range w.hits {
		servers = append(servers, s)
	}
	clear(w.hits)
	slices.Sort(servers)
	return servers
}

func worldWithNames(t *testing.T, zone map[string]netip.Addr) *namesWorld {
	t.Helper()
	w := &namesWorld{Network: world(t, Options{Resolvers: []netip.Addr{privateAddr}}), hits: map[string]int{}}
	in(t, internet, func() { up(t, "lo", netip.PrefixFrom(goodAddr, 32), netip.PrefixFrom(evilAddr, 32)) })
	t.Cleanup(func() {
		in(t, internet, func() {
			l, _ := netlink.LinkByName("lo")
			for _, a := range []netip.Addr{goodAddr, evilAddr} {
				must(t, netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, 32))}))
			}
		})
	})
	w.serveNames(t, zone)
	for name, a := range map[string]netip.Addr{"good": goodAddr, "evil": evilAddr, "private": privateAddr, "metadata": metadataAddr} {
		w.serveWeb(t, internet, name, a)
	}
	w.serveWeb(t, here, "host", uplinkAddr)
	return w
}

// serveWeb answers HTTP on ports 80 and 8080, TLS on 443 and 8443, with the
// server's name and the name that was asked for; and whatever comes by UDP, or
// by TCP to ports 53 and 7000.
func (w *namesWorld) serveWeb(t *testing.T, ns netns.NsHandle, name string, a netip.Addr) {
	t.Helper()
	cert := testCertificate(t)
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.hit(name)
		host := r.Host
		if r.TLS != nil {
			host = r.TLS.ServerName
		}
		fmt.Fprintf(rw, "%s as %s", name, host)
	})}
	var wg sync.WaitGroup
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	listen := func(port uint16) (l net.Listener) {
		open := func() {
			var err error
			l, err = net.Listen("tcp4", netip.AddrPortFrom(a, port).String())
			must(t, err)
		}
		if ns.IsOpen() {
			in(t, ns, open)
		} else {
			open()
		}
		return l
	}
	for _, port := range []uint16{80, 8080} {
		l := listen(port)
		wg.Go(func() { srv.Serve(l) })
	}
	for _, port := range []uint16{443, 8443} {
		l := tls.NewListener(listen(port), &tls.Config{Certificates: []tls.Certificate{cert}})
		wg.Go(func() { srv.Serve(l) })
	}
	if a == privateAddr {
		return // where the resolver is
	}
	for _, port := range []uint16{53, 443, 7000} {
		if port == 443 {
			w.serveDatagrams(t, ns, name, netip.AddrPortFrom(a, port))
			continue
		}
		e := serve(t, ns, a, port)
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				select {
				case <-e.got:
					w.hit(name)
				case <-stop:
					return
				}
			}
		})
		t.Cleanup(func() { close(stop) })
	}
}

func (w *namesWorld) serveDatagrams(t *testing.T, ns netns.NsHandle, name string, at netip.AddrPort) {
	t.Helper()
	var u *net.UDPConn
	open := func() {
		var err error
		u, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		must(t, err)
	}
	if ns.IsOpen() {
		in(t, ns, open)
	} else {
		open()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			if _, _, err := u.ReadFromUDPAddrPort(buf); err != nil {
				return
			}
			w.hit(name)
		}
	})
	t.Cleanup(func() { u.Close(); wg.Wait() })
}

// serveNames is the resolver.
func (w *namesWorld) serveNames(t *testing.T, zone map[string]netip.Addr) {
	t.Helper()
	var u *net.UDPConn
	in(t, internet, func() {
		var err error
		u, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(privateAddr, 53)))
		must(t, err)
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			name := strings.TrimSuffix(q.Name.String(), ".")
			w.mu.Lock()
			w.asked = append(w.asked, name)
			w.mu.Unlock()
			m.Response = true
			if a, ok := zone[name]; !ok {
				m.RCode = dnsmessage.RCodeNameError
			} else if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60},
					Body:   &dnsmessage.AResource{A: a.As4()},
				}}
			}
			b, err := m.Pack()
			if err != nil {
				continue
			}
			u.WriteToUDPAddrPort(b, from)
		}
	})
	t.Cleanup(func() { u.Close(); wg.Wait() })
}

func testCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// dialFrom connects from a namespace.
func dialFrom(t testing.TB, ns netns.NsHandle, to netip.AddrPort, wait time.Duration) (c net.Conn, err error) {
	t.Helper()
	in(t, ns, func() { c, err = net.DialTimeout("tcp4", to.String(), wait) })
	return c, err
}

// browse makes an HTTP request to a port of an address, over TLS if the port
// is one for it, and returns what the server says, or "".
func browse(t testing.TB, ns netns.NsHandle, to netip.Addr, port uint16, name string) string {
	t.Helper()
	c, err := dialFrom(t, ns, netip.AddrPortFrom(to, port), timeout)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	return ask1(c, port, name, name)
}

// ask1 makes one request on a connection, with the name in TLS and the host
// in HTTP.
func ask1(c net.Conn, port uint16, name, host string) string {
	if port%1000 == 443 {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: name})
	}
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
	return heard(http.ReadResponse(bufio.NewReader(c), nil))
}

// heard is what a server answered; the agent's own refusals are nothing.
func heard(resp *http.Response, err error) string {
	if err != nil || resp.StatusCode == http.StatusForbidden {
		return ""
	}
	b, _ := io.ReadAll(resp.Body)
	return string(b)
}

// lookUp asks a name server from a namespace.
func lookUp(t testing.TB, ns netns.NsHandle, network string, at netip.Addr, name string, typ dnsmessage.Type) (m dnsmessage.Message,
	err error) {
	t.Helper()
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: typ, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	must(t, err)
	var c net.Conn
	in(t, ns, func() { c, err = net.DialTimeout(network+"4", netip.AddrPortFrom(at, 53).String(), timeout) })
	if err != nil {
		return m, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	if network == "tcp" {
		b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
	}
	if _, err := c.Write(b); err != nil {
		return m, err
	}
	buf := make([]byte, 2048)
	k, err := c.Read(buf)
	if err != nil {
		return m, err
	}
	if buf = buf[:k]; network == "tcp" {
		buf = buf[2:]
	}
	return m, m.Unpack(buf)
}

// Every way around the names that we know of.
func TestNamesCannotBeBypassed(t *testing.T) {
	zone := map[string]netip.Addr{
		"good.example": goodAddr, "a.wild.example": goodAddr, "evil.example": evilAddr,
		"private.example": privateAddr, "metadata.example": metadataAddr, "host.example": uplinkAddr,
		"gateway.example": GuestGateway, "self.example": netip.MustParseAddr("127.0.0.1"),
		"secret.evil.example": evilAddr,
	}
	w := worldWithNames(t, zone)
	s, a, g := open(t, w.Network)
	_, b, gb := open(t, w.Network)
	zone["sandbox.example"], zone["link.example"], zone["hostlink.example"] = b.HostIP, b.NSVeth.Addr(), a.HostVeth.Addr()
	w.serveWeb(t, gb.ns, "sandbox", GuestAddr.Addr())
	inside := []string{"private.example", "metadata.example", "host.example", "sandbox.example", "link.example", "hostlink.example",
		"gateway.example", "self.example"}
	must(t, w.SetPolicy(t.Context(), s, Policy{Mode: None, AllowNames: append([]string{"good.example", "*.wild.example"}, inside...)}))

	type attempt struct {
		what string
		do   func() string
		want string // what the client hears; "" also means that no server was reached
	}
	at := func(to netip.Addr, port uint16, name string) func() string {
		return func() string { return browse(t, g.ns, to, port, name) }
	}
	attempts := []attempt{
		{"allowed name, TLS", at(goodAddr, 443, "good.example"), "good as good.example"},
		{"allowed name, HTTP", at(goodAddr, 80, "good.example"), "good as good.example"},
		{"wildcard", at(goodAddr, 443, "a.wild.example"), "good as a.wild.example"},
		{"allowed name, other port, TLS", at(goodAddr, 8443, "good.example"), "good as good.example"},
		{"allowed name, other port, HTTP", at(goodAddr, 8080, "good.example"), "good as good.example"},
		{"false SNI", at(evilAddr, 443, "good.example"), "good as good.example"},
		{"false Host", at(evilAddr, 80, "good.example"), "good as good.example"},
		{"false SNI at a private address", at(privateAddr, 443, "good.example"), "good as good.example"},
		{"false SNI at the metadata address", at(metadataAddr, 443, "good.example"), ""},
		{"name that is not allowed, TLS", at(evilAddr, 443, "evil.example"), ""},
		{"name that is not allowed, HTTP", at(evilAddr, 80, "evil.example"), ""},
		{"name that is not allowed, at an allowed name's address", at(goodAddr, 443, "evil.example"), ""},
		{"apex of a wildcard", at(goodAddr, 443, "wild.example"), ""},
		{"no SNI", at(goodAddr, 443, ""), ""},
		{"address as Host", at(goodAddr, 80, goodAddr.String()), ""},
		{"address as Host of an evil server", at(evilAddr, 8080, evilAddr.String()), ""},
		{"Host switched on a kept connection", func() string {
			c, err := dialFrom(t, g.ns, netip.AddrPortFrom(goodAddr, 80), timeout)
			must(t, err)
			defer c.Close()
			c.SetDeadline(time.Now().Add(timeout))
			if got := ask1(c, 80, "", "good.example"); got != "good as good.example" {
				t.Errorf("first request on a kept connection: %q", got)
			}
			w.reached()
			return ask1(c, 80, "", "evil.example")
		}, ""},
		{"CONNECT", func() string {
			c, err := dialFrom(t, g.ns, netip.AddrPortFrom(goodAddr, 80), timeout)
			must(t, err)
			defer c.Close()
			c.SetDeadline(time.Now().Add(timeout))
			fmt.Fprint(c, "CONNECT evil.example:80 HTTP/1.1\r\nHost: good.example\r\n\r\n")
			return heard(http.ReadResponse(bufio.NewReader(c), nil))
		}, ""},
		{"no name, TCP", func() string { return ask(t, g.ns, "tcp", evilAddr, 7000, silence) }, ""},
		{"no name, UDP", func() string { return ask(t, g.ns, "udp", evilAddr, 7000, silence) }, ""},
		{"no name, UDP to an allowed name's address", func() string { return ask(t, g.ns, "udp", goodAddr, 7000, silence) }, ""},
		{"QUIC", func() string { return ask(t, g.ns, "udp", goodAddr, 443, silence) }, ""},
		{"another resolver, UDP", func() string { return ask(t, g.ns, "udp", evilAddr, 53, silence) }, ""},
		{"another resolver, TCP", func() string { return ask(t, g.ns, "tcp", evilAddr, 53, silence) }, ""},
		{"anything to port 53 of the host", func() string { return ask(t, g.ns, "tcp", uplinkAddr, 53, silence) }, ""},
		{"ping", func() string { return ping(t, g.ns, goodAddr, silence) }, ""},
		{"metadata", at(metadataAddr, 80, "metadata.example"), ""},
		{"the proxy itself", func() string {
			gate := w.gates.of(s)
			for _, port := range []uint16{gate.ports.conns, gate.ports.dnsConns} {
				if c, err := dialFrom(t, g.ns, netip.AddrPortFrom(GuestGateway, port), silence); err == nil {
					c.Close()
					return "connected"
				}
			}
			return ""
		}, ""},
	}
	for _, name := range inside {
		attempts = append(attempts, attempt{"allowed name that leads inside: " + name, at(goodAddr, 80, name), ""})
	}
	for _, c := range attempts {
		w.reached()
		if got := c.do(); got != c.want {
			t.Errorf("%s: heard %q, want %q", c.what, got, c.want)
		}
		if got := w.reached(); c.want == "" && len(got) > 0 {
			t.Errorf("%s: got through to %v", c.what, got)
		}
	}

	// The same questions to every server.
	for _, network := range []string{"udp", "tcp"} {
		for _, server := range []netip.Addr{privateAddr, evilAddr, GuestGateway, metadataAddr} {
			for _, q := range []struct {
				name    string
				typ     dnsmessage.Type
				rcode   dnsmessage.RCode
				answers int
			}{
				{"good.example", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1},
				{"good.example", dnsmessage.TypeHTTPS, dnsmessage.RCodeSuccess, 0},
				{"evil.example", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1},
				{"secret.evil.example", dnsmessage.TypeTXT, dnsmessage.RCodeSuccess, 0},
			} {
				m, err := lookUp(t, g.ns, network, server, q.name, q.typ)
				if err != nil || m.RCode != q.rcode || len(m.Answers) != q.answers {
					t.Errorf("%s %s of %s over %s = %+v, %v", q.name, q.typ, server, network, m, err)
				}
			}
		}
	}
	w.mu.Lock()
	for _, name := range w.asked {
		if strings.Contains(name, "evil") {
			t.Errorf("%s was asked for", name)
		}
	}
	w.mu.Unlock()
	if got := w.reached(); len(got) > 0 {
		t.Errorf("questions got through to %v", got)
	}
	if n := w.NameCounts(); n.Refused == 0 || n.Accepted == 0 {
		t.Errorf("counts %+v", n)
	}
}

// ping sends an echo request and returns "pong" if it is answered.
func ping(t testing.TB, ns netns.NsHandle, to netip.Addr, wait time.Duration) (answer string) {
	t.Helper()
	var c *net.IPConn
	in(t, ns, func() {
		var err error
		c, err = net.DialIP("ip4:icmp", nil, &net.IPAddr{IP: to.AsSlice()})
		must(t, err)
	})
	defer c.Close()
	c.Write([]byte{8, 0, 0xf7, 0xfe, 0, 0, 0, 1})
	c.SetDeadline(time.Now().Add(wait))
	buf := make([]byte, 128)
	for {
		n, _, err := c.ReadFrom(buf) // which leaves out the header
		if err != nil {
			return ""
		}
		if n > 0 && buf[0] == 0 {
			return "pong"
		}
	}
}

// Where the internet is open, names are denied.
func TestDeniedNames(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{
		"good.example": goodAddr, "evil.example": evilAddr, "alias.example": evilAddr, "a.bad.example": goodAddr, "private.example": privateAddr,
	})
	s, _, g := open(t, w.Network)
	if ping(t, g.ns, goodAddr, timeout) == "" {
		t.Error("no answer to a ping before")
	}
	for _, c := range []struct {
		policy Policy
		want   map[string]string
	}{
		{Policy{DenyNames: []string{"evil.example", "*.bad.example"}}, map[string]string{
			"good": "good as good.example", "false": "good as good.example", "evil": "", "alias": "", "bad": "", "private": "", "none": "",
			"raw": "", "udp": "",
		}},
		// What is allowed as a range is reached beside the proxy, whatever name is shown.
		{Policy{DenyNames: []string{"evil.example"}, Allow: prefixes("198.51.100.0/24", "10.99.0.0/16")}, map[string]string{
			"good": "good as good.example", "false": "evil as good.example", "evil": "evil as evil.example", "alias": "evil as alias.example",
			"bad": "good as a.bad.example", "private": "private as private.example", "none": "good as ", "raw": "203.0.113.1", "udp": "203.0.113.1",
		}},
		{Policy{Mode: All, DenyNames: []string{"evil.example"}}, map[string]string{
			"good": "good as good.example", "false": "good as good.example", "evil": "", "alias": "", "bad": "good as a.bad.example",
			"private": "private as private.example", "none": "", "raw": "", "udp": "",
		}},
		// A denied range ends all ways there, and no name leads to it.
		{Policy{DenyNames: []string{"evil.example"}, Deny: prefixes("198.51.100.10/32")}, map[string]string{
			"good": "", "false": "", "evil": "", "alias": "", "bad": "", "private": "", "none": "", "raw": "", "udp": "",
		}},
		{Policy{Mode: None, Allow: prefixes("198.51.100.10/32"), AllowNames: []string{"evil.example"}}, map[string]string{
			"good": "good as good.example", "false": "", "evil": "evil as evil.example", "alias": "", "bad": "good as a.bad.example",
			"private": "", "none": "good as ", "raw": "203.0.113.1", "udp": "203.0.113.1",
		}},
		// An allowed name leads to what is denied as a range, another one does not, nor does
		// it lead to a private address.
		{Policy{Mode: None, Deny: prefixes("198.51.100.0/24"), AllowNames: []string{"evil.example", "private.example"}}, map[string]string{
			"good": "", "false": "", "evil": "evil as evil.example", "alias": "", "bad": "", "private": "", "none": "", "raw": "", "udp": "",
		}},
		// Names win over names, the longer and the shorter.
		{Policy{AllowNames: []string{"evil.example", "a.bad.example"}, DenyNames: []string{"evil.example", "*.bad.example", "good.example"}},
			map[string]string{
				"good": "", "false": "", "evil": "evil as evil.example", "alias": "", "bad": "good as a.bad.example",
				"private": "", "none": "", "raw": "", "udp": "",
			}},
		{Policy{Mode: None, DenyNames: []string{"good.example"}}, map[string]string{
			"good": "", "false": "", "evil": "", "alias": "", "bad": "", "private": "", "none": "", "raw": "", "udp": "",
		}},
		{Policy{AllowNames: []string{"good.example"}}, map[string]string{ // nothing new
			"good": "good as good.example", "false": "evil as good.example", "evil": "evil as evil.example", "alias": "evil as alias.example",
			"bad": "good as a.bad.example", "private": "", "none": "good as ", "raw": "203.0.113.1", "udp": "203.0.113.1",
		}},
	} {
		must(t, w.SetPolicy(t.Context(), s, c.policy))
		for what, got := range map[string]string{
			"good":    browse(t, g.ns, goodAddr, 443, "good.example"),
			"false":   browse(t, g.ns, evilAddr, 443, "good.example"),
			"evil":    browse(t, g.ns, evilAddr, 80, "evil.example"),
			"alias":   browse(t, g.ns, evilAddr, 443, "alias.example"),
			"bad":     browse(t, g.ns, goodAddr, 443, "a.bad.example"),
			"private": browse(t, g.ns, privateAddr, 443, "private.example"),
			"none":    browse(t, g.ns, goodAddr, 443, ""),
			"raw":     ask(t, g.ns, "tcp", goodAddr, 7000, timeout),
			"udp":     ask(t, g.ns, "udp", goodAddr, 7000, silence),
		} {
			if got != c.want[what] {
				t.Errorf("%+v: %s: heard %q, want %q", c.policy, what, got, c.want[what])
			}
		}
	}
}

// With name servers of its own a guest asks those and no others; without any, none.
// Names are let through all the same.
func TestOwnDNS(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr, "evil.example": evilAddr})
	s, _, g := open(t, w.Network)
	names := []string{"good.example"}
	kept := func(network string) (c net.Conn) {
		in(t, g.ns, func() {
			var err error
			c, err = net.DialTimeout(network, netip.AddrPortFrom(evilAddr, 53).String(), timeout)
			must(t, err)
		})
		t.Cleanup(func() { c.Close() })
		return c
	}
	// Who answers: the agent says that the name leads to its sink.
	const agents, own = "agent", "its own"
	check := func(what string, answered map[netip.Addr]string) {
		t.Helper()
		for _, server := range []netip.Addr{privateAddr, evilAddr, metadataAddr} {
			for _, network := range []string{"udp", "tcp"} {
				want, ok := answered[server]
				if want == own && network == "tcp" {
					continue // the test's own server speaks UDP alone
				}
				m, err := lookUp(t, g.ns, network, server, "evil.example", dnsmessage.TypeA)
				by := own
				if err == nil && len(m.Answers) == 1 && m.Answers[0].Body.GoString() == (&dnsmessage.AResource{A: sinkAddr.As4()}).GoString() {
					by = agents
				}
				if ok != (err == nil) || ok && by != want {
					t.Errorf("%s: asked %s over %s: %+v, %v", what, server, network, m.Header, err)
				}
			}
		}
		if got := browse(t, g.ns, evilAddr, 443, "good.example"); got != "good as good.example" {
			t.Errorf("%s: heard %q", what, got)
		}
		if got := browse(t, g.ns, evilAddr, 443, "evil.example"); got != "" {
			t.Errorf("%s: heard %q", what, got)
		}
	}
	agent := map[netip.Addr]string{privateAddr: agents, evilAddr: agents, metadataAddr: agents}
	must(t, w.SetPolicy(t.Context(), s, Policy{Mode: None, AllowNames: names}))
	check("by the agent", agent)
	udp, tcp := kept("udp4"), kept("tcp4")
	if !asks(udp, false, timeout) || !asks(tcp, true, timeout) {
		t.Fatal("the agent does not answer")
	}
	must(t, w.SetPolicy(t.Context(), s, Policy{Mode: None, AllowNames: names, OwnDNS: true}))
	if asks(udp, false, silence) || asks(tcp, true, silence) {
		t.Error("a connection to the agent's name server goes on")
	}
	check("by none", nil)
	policy := Policy{Mode: None, AllowNames: names, OwnDNS: true, Allow: prefixes(privateAddr.String() + "/32")}
	must(t, w.SetPolicy(t.Context(), s, policy))
	check("by its own", map[netip.Addr]string{privateAddr: own})
	must(t, w.SetPolicy(t.Context(), s, Policy{Mode: None, AllowNames: names}))
	check("by the agent again", agent)
	// An allowed address is reached directly, its name server, too.
	policy.OwnDNS, agent[privateAddr] = false, own
	must(t, w.SetPolicy(t.Context(), s, policy))
	check("by the agent and an allowed one", agent)
}

// asks says whether a question on a connection is answered.
func asks(c net.Conn, prefixed bool, wait time.Duration) bool {
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName("good.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	if err != nil {
		return false
	}
	if prefixed {
		b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
	}
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write(b); err != nil {
		return false
	}
	_, err = c.Read(make([]byte, 2048))
	return err == nil
}

// The proxy is one guest's, and its way out is the agent's alone.
func TestGateServesItsGuestAlone(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr})
	s, a, g := open(t, w.Network)
	_, b, gb := open(t, w.Network)
	must(t, w.SetPolicy(t.Context(), s, Policy{Mode: None, AllowNames: []string{"good.example"}}))
	ports := w.gates.of(s).ports
	for _, from := range []struct {
		what string
		ns   netns.NsHandle
		to   []netip.Addr
	}{
		{"the host", here, []netip.Addr{a.NSVeth.Addr(), a.HostIP, GuestGateway}},
		{"another sandbox", gb.ns, []netip.Addr{a.NSVeth.Addr(), a.HostIP, GuestGateway, b.NSVeth.Addr()}},
		{"the internet", internet, []netip.Addr{a.NSVeth.Addr(), a.HostIP, GuestGateway}},
	} {
		for _, to := range from.to {
			for _, port := range []uint16{ports.conns, ports.dnsConns, ports.dnsPacket} {
				dial := func() {
					if c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(to, port).String(), silence); err == nil {
						c.Close()
						t.Errorf("%s connects to %s port %d", from.what, to, port)
					}
				}
				if from.ns.IsOpen() {
					in(t, from.ns, dial)
				} else {
					dial()
				}
			}
			if got := ask(t, from.ns, "udp", to, ports.dnsPacket, silence/3); got != "" {
				t.Errorf("%s is answered by %s", from.what, to)
			}
		}
	}
	if got := browse(t, g.ns, goodAddr, 443, "good.example"); got != "good as good.example" {
		t.Errorf("heard %q", got)
	}

	// A VMM may do in its namespace what its user may.
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	must(t, osthread.Do(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65533, 0); errno != 0 {
			return errno
		}
		defer unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0)
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, proxyMark); !errors.Is(err, unix.EPERM) {
			t.Errorf("set mark without privilege: %v, want it refused", err)
		}
		to := &unix.SockaddrInet4{Port: 7000, Addr: goodAddr.As4()}
		if err := unix.Sendto(fd, []byte("astray"), 0, to); !errors.Is(err, unix.EPERM) {
			t.Errorf("send without the mark: %v, want it refused", err)
		}
		return nil
	}))
	if got := w.reached(); !slices.Equal(got, []string{"good"}) { // by browse above
		t.Errorf("got through to %v", got)
	}

	// The mark opens what the policy's ranges leave open, and only that.
	dial := func(to netip.Addr) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*silence)
		defer cancel()
		c, err := dialMarked(ctx, a.NetNSPath, netip.AddrPortFrom(to, 80))
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := dial(evilAddr); err != nil {
		t.Errorf("marked, to the internet: %v", err)
	}
	for _, to := range []netip.Addr{privateAddr, metadataAddr, uplinkAddr, b.HostIP, a.HostVeth.Addr()} {
		if dial(to) == nil {
			t.Errorf("marked, to %s: connected", to)
		}
	}
	must(t, w.SetPolicy(t.Context(), s, Policy{DenyNames: []string{"good.example"}, Deny: prefixes("198.51.100.66/32")}))
	if dial(evilAddr) == nil {
		t.Error("marked, to a denied range: connected")
	}
	must(t, w.SetPolicy(t.Context(), s, Policy{}))
	if dial(goodAddr) == nil {
		t.Error("marked, without names in the policy: connected")
	}
}

// stream is a connection whose server repeats what it is told.
func (w *namesWorld) stream(t *testing.T, g *guest, to netip.Addr, name string) *tls.Conn {
	t.Helper()
	c, err := dialFrom(t, g.ns, netip.AddrPortFrom(to, 9443), timeout)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	s := tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: name})
	if !alive(s, timeout) {
		t.Fatalf("no stream to %s", name)
	}
	return s
}

func alive(c net.Conn, wait time.Duration) bool {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	_, err := c.Read(make([]byte, 1))
	return err == nil
}

// repeat serves what stream connects to; the server's ends come from the channel.
func (w *namesWorld) repeat(t *testing.T) <-chan *tls.Conn {
	t.Helper()
	cert := testCertificate(t)
	served := make(chan *tls.Conn, 16)
	for _, a := range []netip.Addr{goodAddr, evilAddr} {
		var l net.Listener
		in(t, internet, func() {
			var err error
			l, err = net.Listen("tcp4", netip.AddrPortFrom(a, 9443).String())
			must(t, err)
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(3 * timeout))
					tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
					served <- tc
					io.Copy(tc, tc)
				})
			}
		})
		t.Cleanup(func() { l.Close() })
	}
	return served
}

func TestNamesChangeAtRuntime(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr, "evil.example": evilAddr})
	s, _, g := open(t, w.Network)
	served := w.repeat(t)
	fds, goroutines := descriptorCount(t), runtime.NumGoroutine()

	set := func(p Policy) {
		t.Helper()
		must(t, w.SetPolicy(t.Context(), s, p))
	}
	both := Policy{Mode: None, AllowNames: []string{"good.example", "evil.example"}}
	direct := w.stream(t, g, goodAddr, "good.example")
	<-served
	set(both)
	if alive(direct, silence) {
		t.Error("a direct connection that must go through the proxy goes on")
	}
	good := w.stream(t, g, goodAddr, "good.example")
	far := <-served
	evil := w.stream(t, g, evilAddr, "evil.example")
	set(Policy{Mode: None, AllowNames: []string{"good.example"}})
	if alive(evil, silence) {
		t.Error("a connection to a name that is refused by now goes on")
	}
	evil.Close()
	if !alive(good, timeout) {
		t.Error("a connection that both policies let through ended")
	}
	// The other side speaks first after the change: the kernel must still know
	// the connection.
	set(both)
	_, err := far.Write([]byte("y"))
	must(t, err)
	good.SetDeadline(time.Now().Add(timeout))
	said := make([]byte, 1)
	if _, err := good.Read(said); err != nil || said[0] != 'y' {
		t.Errorf("what the server says after a change: %q, %v", said, err)
	}
	// The address that a name has is denied as a range.
	for _, p := range []Policy{{Mode: None, AllowNames: both.AllowNames}, {DenyNames: []string{"evil.example"}}} {
		p.Deny = prefixes("198.51.100.10/32")
		set(p)
		wait, want := timeout, p.Mode == None
		if !want {
			wait = silence
		}
		if got := alive(good, wait); got != want {
			t.Errorf("%+v: a connection to a denied range goes on: %v", p, got)
		}
	}
	set(both)
	if got := browse(t, g.ns, evilAddr, 443, "evil.example"); got != "evil as evil.example" {
		t.Errorf("heard %q", got)
	}

	// A change that fails leaves the stricter of both, and can be made again.
	set(both)
	injected := errors.New("injected")
	w.hook = func(_ Slot, step string) error {
		if step == "policy" {
			return injected
		}
		return nil
	}
	if err := w.SetPolicy(t.Context(), s, Policy{DenyNames: []string{"evil.example"}}); !errors.Is(err, injected) {
		t.Errorf("SetPolicy = %v", err)
	}
	for name, want := range map[string]string{"good.example": "good as good.example", "evil.example": "", "other.example": ""} {
		if got := browse(t, g.ns, evilAddr, 443, name); got != want {
			t.Errorf("after a failed change %s: heard %q", name, got)
		}
	}
	w.hook = nil
	set(Policy{Mode: None, AllowNames: []string{"evil.example"}})
	if got := browse(t, g.ns, goodAddr, 443, "evil.example"); got != "evil as evil.example" {
		t.Errorf("heard %q", got)
	}

	// Without names there is no proxy, and nothing is left of it.
	evil = w.stream(t, g, evilAddr, "evil.example")
	set(Policy{})
	if alive(evil, silence) {
		t.Error("a connection through the proxy outlives it")
	}
	if got := browse(t, g.ns, evilAddr, 443, "good.example"); got != "evil as good.example" {
		t.Errorf("heard %q", got)
	}
	for _, c := range []net.Conn{direct, good, evil} {
		c.Close()
	}
	nothingLeft(t, fds, goroutines)
}

// nothingLeft waits for what the far servers hold of closed connections, and
// fails if more is there than before then.
func nothingLeft(t *testing.T, fds, goroutines int) {
	t.Helper()
	for end := time.Now().Add(5 * timeout); ; time.Sleep(5 * time.Millisecond) {
		f, k := descriptorCount(t), runtime.NumGoroutine()
		if f <= fds && k <= goroutines {
			return
		}
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d descriptors and %d goroutines before, %d and %d after:\n%s", fds, goroutines, f, k, buf[:runtime.Stack(buf, true)])
		}
	}
}

func descriptorCount(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(fds)
}

// A failed first change leaves neither proxy nor rules, and a slot's end ends
// its proxy.
func TestGateGoesWithItsSlot(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr})
	before := inventory(t)
	fds, goroutines := descriptorCount(t), runtime.NumGoroutine()
	s, err := w.Acquire(t.Context(), kind)
	must(t, err)
	must(t, w.Open(t.Context(), s))
	injected := errors.New("injected")
	w.hook = func(_ Slot, step string) error { return injected }
	p := Policy{Mode: None, AllowNames: []string{"good.example"}}
	if err := w.SetPolicy(t.Context(), s, p); !errors.Is(err, injected) {
		t.Errorf("SetPolicy = %v", err)
	}
	if w.gates.of(s) != nil {
		t.Error("a failed first change left a proxy")
	}
	w.hook = nil
	must(t, w.SetPolicy(t.Context(), s, p))
	must(t, w.Close(t.Context(), s))
	if err := w.SetPolicy(t.Context(), s, p); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("SetPolicy of a closed slot = %v", err)
	}
	must(t, w.Release(s))
	// The last line counts descriptors; others of before may be gone by now.
	after := inventory(t)
	last := len(before) - 1
	if d := cmp.Diff(before[:last], after[:len(after)-1]); d != "" {
		t.Errorf("left (-before +after):\n%s", d)
	}
	nothingLeft(t, fds, goroutines)
}

// Without the agent nothing passes by name; the next agent takes over.
func TestNamesAfterTheAgentsRestart(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr})
	s, _, g := open(t, w.Network)
	p := Policy{Mode: None, AllowNames: []string{"good.example"}}
	must(t, w.SetPolicy(t.Context(), s, p))
	// A resolver of the guest's that keeps its port.
	if _, err := lookUp(t, g.ns, "udp", privateAddr, "good.example", dnsmessage.TypeA); err != nil {
		t.Errorf("look up: %v", err)
	}
	w.Detach()
	w.reached()
	if got := browse(t, g.ns, goodAddr, 443, "good.example"); got != "" {
		t.Errorf("without an agent: heard %q", got)
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, port := range []uint16{53, 443, 7000} {
			if got := ask(t, g.ns, network, goodAddr, port, silence); got != "" {
				t.Errorf("without an agent: port %d over %s answered %q", port, network, got)
			}
		}
	}
	if got := w.reached(); len(got) > 0 {
		t.Errorf("without an agent: got through to %v", got)
	}
	next := New(testPlan(), w.opts)
	defer next.Detach()
	must(t, next.SetPolicy(t.Context(), s, p))
	if got := browse(t, g.ns, evilAddr, 443, "good.example"); got != "good as good.example" {
		t.Errorf("with the next agent: heard %q", got)
	}
	if m, err := lookUp(t, g.ns, "udp", evilAddr, "good.example", dnsmessage.TypeA); err != nil || len(m.Answers) != 1 {
		t.Errorf("with the next agent: %+v, %v", m, err)
	}
}

// The kernel holds what the golden file shows.
func TestNamesRulesAreWhatTheKernelHolds(t *testing.T) {
	testenv.Program(t, "nft")
	n := world(t, Options{Resolvers: []netip.Addr{privateAddr}})
	s, a, _ := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	for i, p := range append(namedPolicies, Policy{}) {
		must(t, n.SetPolicy(t.Context(), s, p))
		in(t, ns, func() {
			v := rangePolicyOf(n.plan, n.opts, p)
			for _, c := range policyChainsOf(v, p, n.gates.of(s)) {
				var want []string
				if len(c.rules) > 0 {
					want = []string{jump(variantOf(c.name, (i+1)%2)).text}
					if d := cmp.Diff(ruleTexts(c.rules), kernelChain(t, variantOf(c.name, (i+1)%2))); d != "" {
						t.Errorf("%+v: %s (-sent +kernel):\n%s", p, c.name, d)
					}
				}
				if d := cmp.Diff(want, kernelChain(t, c.name)); d != "" {
					t.Errorf("%+v: %s (-sent +kernel):\n%s", p, c.name, d)
				}
			}
		})
	}
}

func ruleTexts(rules []rule) (texts []string) {
	for _, r := range rules {
		texts = append(texts, r.String())
	}
	return texts
}

// kernelChain returns the rules of a chain of the calling thread's namespace.
func kernelChain(t testing.TB, name string) (rules []string) {
	t.Helper()
	out, err := exec.Command("nft", "-s", "list", "chain", "ip", slotTable, name).CombinedOutput()
	if err != nil {
		t.Errorf("nft: %v: %s", err, out)
	}
	// Where /etc/protocols is missing, nft knows no names.
	for line := range strings.Lines(strings.ReplaceAll(string(out), "l4proto 6 ", "l4proto tcp ")) {
		if rule, ok := strings.CutPrefix(line, "\t\t"); ok {
			rules = append(rules, strings.TrimSuffix(rule, "\n"))
		}
	}
	return rules
}

// What the proxy thinks of an address is what the rules say of it.
func TestPolicyAgreesWithRules(t *testing.T) {
	opts := Options{Resolvers: []netip.Addr{privateAddr}}
	policies := append(testPolicies, namedPolicies...)
	ranges := append(slices.Concat(neverRanges, privateRanges), DefaultPlan().Hosts, DefaultPlan().Veths)
	for _, p := range policies {
		ranges = slices.Concat(ranges, p.Allow, p.Deny)
	}
	var interesting []netip.Addr
	for _, p := range ranges {
		if !p.Addr().Is4() {
			continue
		}
		r := rangesOf([]netip.Prefix{p})[0]
		for _, n := range []uint32{r.first - 1, r.first, r.last, r.last + 1} {
			interesting = append(interesting, addr4(n))
		}
	}
	for range 200 {
		interesting = append(interesting, addr4(mathrand.Uint32()))
	}
	for _, p := range policies {
		for _, allowed := range []bool{false, true} {
			v := rangePolicyOf(DefaultPlan(), opts, p).dialled(allowed)
			for _, a := range interesting {
				if got, want := v.permits(a), evaluate(v.rules(reject()), a); got != want {
					t.Errorf("%+v: %s permitted: %v, the rules say %v", p, a, got, want)
				}
			}
		}
	}
}

// evaluate walks rules for an address as the kernel does.
func evaluate(rules []rule, a netip.Addr) bool {
	for _, r := range rules {
		if r[0].in == nil || contains(r[0].in, a) {
			return r[len(r)-1].text == "accept"
		}
	}
	return true
}

func TestParsePolicy(t *testing.T) {
	yes, no := true, false
	all := []string{"0.0.0.0/0"}
	for i, c := range []struct {
		host  Mode
		e     Egress
		want  Policy
		class *errdefs.Class
		text  string // in the error
	}{
		{host: Public},
		{host: "", e: Egress{AllowInternet: &yes}},
		{host: All, e: Egress{AllowInternet: &yes}},
		{host: None},
		{host: None, e: Egress{AllowInternet: &no}, want: Policy{Mode: None}},
		{host: None, e: Egress{Deny: []string{"1.2.3.4"}}, want: Policy{Deny: prefixes("1.2.3.4/32")}},
		{host: Public, e: Egress{AllowInternet: &no}, want: Policy{Mode: None}},
		{host: Public, e: Egress{Deny: all}, want: Policy{Mode: None}},
		{host: Public, e: Egress{Deny: all, Allow: []string{"1.1.1.1", "Example.com.", "*.example.com", "example.com"}},
			want: Policy{Mode: None, Allow: prefixes("1.1.1.1/32"), AllowNames: []string{"example.com", "*.example.com"}}},
		{host: Public, e: Egress{AllowInternet: &yes, Deny: all}, want: Policy{Mode: None}},
		// What is allowed wins.
		{host: Public, e: Egress{AllowInternet: &no, Allow: all}},
		{host: Public, e: Egress{Allow: append([]string{"good.com"}, all...), Deny: append([]string{"1.2.3.4", "evil.com"}, all...)}},
		{host: Public, e: Egress{Allow: []string{"8.8.8.8/24"}, Deny: []string{"evil.com", "10.0.0.0/8", "2001:db8::/32"}},
			want: Policy{Allow: prefixes("8.8.8.0/24"), Deny: prefixes("10.0.0.0/8", "2001:db8::/32"), DenyNames: []string{"evil.com"}}},
		{host: Public, e: Egress{Allow: []string{"::ffff:8.8.8.8"}, Deny: []string{"::ffff:9.9.9.9/112", "::/0", "::ffff:0:0/96"}},
			want: Policy{Mode: None, Allow: prefixes("8.8.8.8/32"), Deny: prefixes("9.9.0.0/16", "::/0")}},
		{host: All, e: Egress{Allow: []string{"10.0.0.0/8"}}, want: Policy{Allow: prefixes("10.0.0.0/8")}},
		// Name servers count with a name that is allowed.
		{host: Public, e: Egress{DNS: []string{"1.1.1.1"}}},
		{host: Public, e: Egress{Deny: all, DNS: []string{"1.1.1.1"}}, want: Policy{Mode: None}},
		{host: Public, e: Egress{Deny: all, Allow: []string{"a.com"}, DNS: []string{}},
			want: Policy{Mode: None, AllowNames: []string{"a.com"}, OwnDNS: true}},
		{host: Public, e: Egress{AllowInternet: &no, Allow: []string{"a.com", "2.2.2.2"}, DNS: []string{"1.1.1.1", "9.9.9.9"}},
			want: Policy{Mode: None, Allow: prefixes("2.2.2.2/32", "1.1.1.1/32", "9.9.9.9/32"), AllowNames: []string{"a.com"}, OwnDNS: true}},
		{host: All, e: Egress{Deny: all, Allow: []string{"a.com"}, DNS: []string{"10.0.0.2"}},
			want: Policy{Mode: None, Allow: prefixes("10.0.0.2/32"), AllowNames: []string{"a.com"}, OwnDNS: true}},
		{host: Public, e: Egress{DNS: []string{"10.0.0.2"}}, class: errdefs.Denied, text: "DNS servers: 10.0.0.2"},
		{host: Public, e: Egress{DNS: []string{"2606:4700:4700::1111"}}, class: errdefs.InvalidArgument, text: "IPv4"},
		{host: Public, e: Egress{DNS: []string{"1.1.1.1/32"}}, class: errdefs.InvalidArgument, text: "1.1.1.1/32"},
		{host: Public, e: Egress{DNS: slices.Repeat([]string{"1.1.1.1"}, 11)}, class: errdefs.InvalidArgument, text: "at most 10"},
		{host: Public, e: Egress{Deny: all, Allow: append(manyRanges(maxPolicyRanges), "a.com"), DNS: []string{"1.1.1.1"}},
			class: errdefs.InvalidArgument, text: "513 ranges"},
		{host: Public, e: Egress{Allow: []string{"10.1.0.0/16"}}, class: errdefs.Denied, text: "10.1.0.0/16"},
		{host: Public, e: Egress{Allow: []string{"8.0.0.0/5"}}, class: errdefs.Denied, text: "private"},
		{host: None, e: Egress{AllowInternet: &yes}},
		{host: None, e: Egress{Allow: []string{"example.com"}}, class: errdefs.Denied, text: "--egress none"},
		{host: Public, e: Egress{Allow: []string{"::1"}}, class: errdefs.InvalidArgument, text: "IPv4 only"},
		{host: Public, e: Egress{Allow: []string{"2001:db8::/32"}}, class: errdefs.InvalidArgument, text: "IPv4 only"},
		{host: Public, e: Egress{Allow: []string{"http://x.com"}, Deny: []string{"bücher.de"}}, class: errdefs.InvalidArgument,
			text: "http://x.com"},
		{host: Public, e: Egress{Allow: []string{"http://x.com"}, Deny: []string{"bücher.de"}}, class: errdefs.InvalidArgument, text: "xn--"},
		{host: Public, e: Egress{Allow: []string{""}}, class: errdefs.InvalidArgument, text: `""`},
		{host: Public, e: Egress{Allow: slices.Repeat([]string{"a b"}, 500)}, class: errdefs.InvalidArgument, text: "484 more"},
		{host: Public, e: Egress{Deny: []string{"1.2.3.4/33"}}, class: errdefs.InvalidArgument, text: "1.2.3.4/33"},
		{host: Public, e: Egress{Deny: manyNames(maxPolicyNames + 1)}, class: errdefs.InvalidArgument, text: "513 names"},
		{host: Public, e: Egress{Deny: manyNames(5000)}, class: errdefs.InvalidArgument, text: "5000 entries"},
		{host: Public, e: Egress{Deny: manyNames(maxPolicyNames)}, want: Policy{DenyNames: manyNames(maxPolicyNames)}},
	} {
		got, err := ParsePolicy(c.host, c.e)
		if c.class != nil {
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("row %d: ParsePolicy = %v, want %v with %q", i, err, c.class, c.text)
			}
			continue
		}
		if d := cmp.Diff(c.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); err != nil || d != "" {
			t.Errorf("row %d: ParsePolicy: %v (-want +got):\n%s", i, err, d)
		}
	}
	for _, p := range []Policy{{AllowNames: []string{"Example.com"}}, {DenyNames: []string{"a b"}}, {DenyNames: []string{"a.example."}}} {
		if err := p.Validate(); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%+v is valid: %v", p, err)
		}
	}
	if err := New(testPlan(), Options{Egress: "most"}).Setup(t.Context()); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a host with an unknown mode = %v", err)
	}
}

func manyRanges(n int) (ranges []string) {
	for i := range n {
		ranges = append(ranges, netip.PrefixFrom(addr4(0x14000000+uint32(i)*512), 24).String())
	}
	return ranges
}

// What the rules say of an address is what a policy's lists say in their order: the
// walls, what is allowed, what is denied, and last what the host lets its sandboxes
// reach.
func TestOrderOfRules(t *testing.T) {
	walls := append(slices.Clone(neverRanges), DefaultPlan().Hosts, DefaultPlan().Veths)
	has := func(list []string, a netip.Addr) bool {
		return slices.ContainsFunc(list, func(text string) bool { return netip.MustParsePrefix(text).Contains(a) })
	}
	in := func(list []netip.Prefix, a netip.Addr) bool {
		return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	// Few networks, so that the lists overlap.
	draw := func() netip.Addr {
		nets := []uint32{0x08080000, 0x0a0b0000, 0x0a200000, 0xc6336400, 0xa9fea900, 0x64400000, 0x7f000000}
		return addr4(nets[mathrand.IntN(len(nets))] + mathrand.Uint32N(64))
	}
	list := func() (texts []string) {
		for range mathrand.IntN(6) {
			bits := []int{0, 16, 26, 29, 32}[mathrand.IntN(5)]
			texts = append(texts, netip.PrefixFrom(draw(), bits).Masked().String())
		}
		return texts
	}
	for range 2000 {
		open := mathrand.IntN(2) == 0
		e := Egress{AllowInternet: &open, Allow: list(), Deny: list()}
		host := []Mode{All, Public}[mathrand.IntN(2)]
		p, err := ParsePolicy(host, e)
		if errors.Is(err, errdefs.Denied) && host == Public {
			continue // it allows a private range
		}
		must(t, err)
		rules := egressRules(DefaultPlan(), Options{Egress: host}, p)
		for range 20 {
			a := draw()
			want := false
			switch {
			case in(walls, a):
			case has(slices.DeleteFunc(slices.Clone(e.Allow), func(s string) bool { return s == "0.0.0.0/0" }), a):
				want = true
			case !has(e.Allow, a) && (!open || has(e.Deny, a)):
			default:
				want = host == All || !in(privateRanges, a)
			}
			if got := evaluate(rules, a); got != want {
				t.Fatalf("host %s, internet %v, allow %v, deny %v: %s passes: %v, want %v", host, open, e.Allow, e.Deny, a, got, want)
			}
		}
	}
}

func manyNames(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("host-%d.example", i))
	}
	return names
}
