package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The addresses of these tests.
const (
	goodAddr  = "198.51.100.1"
	good2Addr = "198.51.100.2"
	evilAddr  = "203.0.113.66"
)

// twoServers is a world with good.example and evil.example on ports 80, 443.
func twoServers(t testing.TB, p Policy) *world {
	w := newWorld(t)
	w.dns.set("good.example", goodAddr)
	w.dns.set("evil.example", evilAddr)
	w.dns.set("other.example", "198.51.100.9")
	w.dns.set("inside.example", "10.1.2.3")
	w.dns.set("alias.example", evilAddr)
	w.dns.set("a.bad.example", goodAddr)
	w.dns.set("b.bad.example", goodAddr)
	for name, addr := range map[string]string{"good": goodAddr, "evil": evilAddr, "other": "198.51.100.9", "inside": "10.1.2.3"} {
		w.serveHTTP(addr+":80", name)
		w.serveTLS(addr+":443", name)
	}
	w.start(p)
	return w
}

func (w *world) settle(p Policy) {
	w.proxy.Restrict(w.t.Context(), reaching(p))
	w.proxy.Settle()
}

func TestTLSGoesToTheOwnerOfTheName(t *testing.T) {
	closed := Policy{Allow: []string{"good.example", "*.wild.example", "inside.example"}}
	open := Policy{Open: true, Deny: []string{"evil.example", "*.bad.example"}}
	// Allow wins, over names and over the addresses of denied names.
	both := Policy{Open: true, Allow: []string{"a.bad.example", "alias.example"}, Deny: []string{"evil.example", "*.bad.example"}}
	denied := netip.MustParseAddr(evilAddr)
	ranged := Policy{Open: true, Allow: []string{"evil.example"}, MayDial: func(a netip.Addr, allowed bool) bool {
		return !never.Contains(a) && (allowed || a != denied)
	}}
	for _, c := range []struct {
		policy   Policy
		to, name string
		want     string // the server that answers, "" if refused
	}{
		{closed, goodAddr, "good.example", "good"},
		{closed, goodAddr, "GOOD.example", "good"},
		{closed, evilAddr, "good.example", "good"}, // a false name
		{closed, evilAddr, "evil.example", ""},
		{closed, goodAddr, "evil.example", ""},
		{closed, goodAddr, "", ""}, // no name
		{closed, goodAddr, "other.example", ""},
		{closed, goodAddr, "a.good.example", ""},
		{closed, evilAddr, "wild.example", ""},
		{closed, evilAddr, "inside.example", ""}, // leads to an address that no policy permits
		{open, evilAddr, "good.example", "good"},
		{open, goodAddr, "other.example", "other"},
		{open, evilAddr, "evil.example", ""},
		{open, evilAddr, "", ""},
		{open, evilAddr, "alias.example", ""}, // an address of a denied name
		{both, goodAddr, "a.bad.example", "good"},
		{both, goodAddr, "b.bad.example", ""},
		{both, goodAddr, "alias.example", "evil"},
		{both, evilAddr, "evil.example", ""},
		{ranged, goodAddr, "good.example", "good"},
		{ranged, goodAddr, "evil.example", "evil"},
		{ranged, evilAddr, "alias.example", ""}, // an address that is denied, for all names but one
		{ranged, goodAddr, "", ""},
	} {
		w := twoServers(t, c.policy)
		got, err := askTLS(w.dial(c.to+":443"), c.name)
		if got != c.want {
			t.Errorf("allow %v deny %v: %q at %s led to %q, %v; want %q", c.policy.Allow, c.policy.Deny, c.name, c.to, got, err, c.want)
		}
		if n := w.proxy.cfg.Shared.Counts(); (n.Refused > 0) != (c.want == "") {
			t.Errorf("allow %v deny %v: %q at %s: counts %+v", c.policy.Allow, c.policy.Deny, c.name, c.to, n)
		}
		if c.want == "" && len(w.dialed) > 0 {
			t.Errorf("allow %v deny %v: %q at %s: dialed %v", c.policy.Allow, c.policy.Deny, c.name, c.to, w.dialed)
		}
		w.proxy.Close()
	}
}

// What a name leads to decides, not who owns it: rebinding changes nothing.
func TestNameLeadsInside(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"rebind.example"}})
	w.dns.set("rebind.example", "10.1.2.3", goodAddr)
	got, err := askTLS(w.dial("10.1.2.3:443"), "rebind.example")
	if got != "good" {
		t.Errorf("got to %q, %v; want the one address that may be dialled", got, err)
	}
	if slices.Contains(w.dialed, netip.MustParseAddrPort("10.1.2.3:443")) {
		t.Error("dialed the address inside")
	}
}

// The address that the guest chose is used if it is the name's own.
func TestGuestChoosesAmongTheNamesAddresses(t *testing.T) {
	w := newWorld(t)
	w.dns.set("good.example", goodAddr, good2Addr)
	w.serveTLS(goodAddr+":443", "one")
	w.serveTLS(good2Addr+":443", "two")
	w.start(Policy{Allow: []string{"good.example"}})
	for to, want := range map[string]string{goodAddr: "one", good2Addr: "two", evilAddr: "one"} {
		if got, err := askTLS(w.dial(to+":443"), "good.example"); got != want {
			t.Errorf("%s led to %q, %v", to, got, err)
		}
	}
}

// pieces writes each byte in a packet of its own.
type pieces struct{ net.Conn }

func (p pieces) Write(b []byte) (int, error) {
	for i := range b {
		if _, err := p.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// records cuts the handshake into TLS records of 20 bytes.
type records struct {
	net.Conn
	once sync.Once
}

func (r *records) Write(b []byte) (n int, err error) {
	n = len(b)
	r.once.Do(func() {
		var out []byte
		for hello := b[5:]; len(hello) > 0; {
			k := min(20, len(hello))
			out = append(out, 0x16, 3, 1, 0, byte(k))
			out = append(out, hello[:k]...)
			hello = hello[k:]
		}
		_, err = r.Conn.Write(out)
		b = nil
	})
	if b != nil {
		return r.Conn.Write(b)
	}
	return n, err
}

func TestClientHelloInPieces(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"good.example"}})
	for what, wrap := range map[string]func(net.Conn) net.Conn{
		"bytes":   func(c net.Conn) net.Conn { return pieces{c} },
		"records": func(c net.Conn) net.Conn { return &records{Conn: c} },
	} {
		for name, want := range map[string]string{"good.example": "good", "evil.example": ""} {
			if got, err := askTLS(wrap(w.dial(evilAddr+":443")), name); got != want {
				t.Errorf("%s in %s led to %q, %v", name, what, got, err)
			}
		}
	}
}

// request sends raw bytes and returns the bodies of the answers.
func (w *world) request(c net.Conn, raw string) (bodies []string, err error) {
	go func() { io.WriteString(c, raw) }()
	r := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return bodies, err
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return bodies, err
		}
		if resp.StatusCode == http.StatusOK {
			bodies = append(bodies, string(b))
		}
	}
}

func TestHTTPIsJudgedByRequest(t *testing.T) {
	policy := Policy{Allow: []string{"good.example", "other.example", "inside.example"}}
	get := func(host string) string { return "GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }
	last := func(host string) string { return "GET / HTTP/1.1\r\nConnection: close\r\nHost: " + host + "\r\n\r\n" }
	for what, c := range map[string]struct {
		raw  string
		want []string
	}{
		"one": {last("good.example"), []string{"good: GET / host=good.example"}},
		"path and query": {"GET //a;b?x=1;y=%zz&z HTTP/1.1\r\nConnection: close\r\nX-Forwarded-For: me\r\nHost: good.example\r\n\r\n",
			[]string{"good: GET //a;b?x=1;y=%zz&z host=good.example"}},
		"with a port":           {last("good.example:80"), []string{"good: GET / host=good.example:80"}},
		"upper case, dot":       {last("Good.Example."), []string{"good: GET / host=Good.Example."}},
		"false host":            {last("evil.example"), nil},
		"other host, pipelined": {get("good.example") + last("other.example"), []string{"good: GET / host=good", "other: GET / host=other"}},
		"host switch":           {get("good.example") + get("evil.example"), []string{"good: GET / host=good"}},
		"switch and back":       {get("good.example") + get("evil.example") + last("good.example"), []string{"good: GET / host=good"}},
		"absolute form": {"GET http://good.example/x HTTP/1.1\r\nConnection: close\r\nHost: evil.example\r\n\r\n",
			[]string{"good: GET /x host=good.example"}},
		"absolute form, denied": {"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", nil},
		"CONNECT":               {"CONNECT good.example:80 HTTP/1.1\r\nHost: good.example\r\n\r\n", nil},
		"no host":               {"GET / HTTP/1.1\r\n\r\n", nil},
		"HTTP/1.0 without host": {"GET / HTTP/1.0\r\n\r\n", nil},
		"HTTP/1.0":              {"GET / HTTP/1.0\r\nHost: good.example\r\n\r\n", []string{"good: GET / host=good.example"}},
		"two hosts":             {"GET / HTTP/1.1\r\nHost: good.example\r\nHost: evil.example\r\n\r\n", nil},
		"folded host":           {"GET / HTTP/1.1\r\nHost: good.example\r\n evil.example\r\n\r\n", nil},
		"address":               {last(goodAddr), nil},
		"address and port":      {last(goodAddr + ":80"), nil},
		"IPv6 address":          {last("[::1]:80"), nil},
		"decimal address":       {last("2130706433"), nil},
		"inside":                {last("inside.example"), nil},
		"h2c preface":           {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", nil},
		"empty line first":      {"\r\n" + last("good.example"), nil},
		"length twice":          {"POST / HTTP/1.1\r\nHost: good.example\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", nil},
		"smuggled request": {"POST / HTTP/1.1\r\nHost: good.example\r\nConnection: close\r\nContent-Length: 4\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get("evil.example"),
			[]string{`good: POST / host=good.example upgrade="" body=""`}},
		"h2c upgrade": {"GET / HTTP/1.1\r\nHost: good.example\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n" +
			"Connection: Upgrade, HTTP2-Settings\r\n\r\n" + last("good.example"),
			[]string{`good: GET / host=good.example upgrade=""`, "good: "}},
		"body": {"POST / HTTP/1.1\r\nConnection: close\r\nHost: good.example\r\nContent-Length: 5\r\n\r\nhello",
			[]string{`good: POST / host=good.example upgrade="" body="hello"`}},
		"not HTTP":     {"SSH-2.0-x\r\n", nil},
		"binary":       {"\x00\x01\x02", nil},
		"SOCKS":        {"\x05\x01\x00", nil},
		"not TLS":      {"\x16\x03\x01\x00\x04zzzz", nil},
		"lone newline": {"\n", nil},
	} {
		w := twoServers(t, policy)
		got, err := w.request(w.dial(evilAddr+":80"), c.raw)
		ok := len(got) == len(c.want)
		for i := range c.want {
			ok = ok && strings.HasPrefix(got[i], c.want[i])
		}
		if !ok {
			t.Errorf("%s: answers %q, %v; want %q", what, got, err, c.want)
		}
		w.proxy.Close() // which waits for what is counted
		refusals := c.want == nil || strings.Contains(what, "switch")
		if n := w.proxy.cfg.Shared.Counts(); (n.Refused > 0) != refusals {
			t.Errorf("%s: counts %+v", what, n)
		}
		for _, d := range w.dialed {
			if d.Addr().String() == evilAddr || never.Contains(d.Addr()) {
				t.Errorf("%s: dialed %s", what, d)
			}
		}
	}
}

func TestWebSocketPasses(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"good.example"}})
	c := w.dial(goodAddr + ":80")
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: good.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	must(t, err)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status %s", resp.Status)
	}
	for range 3 {
		fmt.Fprint(c, "ping")
		buf := make([]byte, 4)
		if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "ping" {
			t.Fatalf("echoed %q, %v", buf, err)
		}
	}
	// The new policy ends what it refuses, WebSockets among it.
	w.settle(Policy{Allow: []string{"other.example"}})
	if _, err := r.ReadByte(); err == nil || errors.Is(err, errTimeout(err)) {
		t.Errorf("read after the policy refused it: %v", err)
	}
}

// errTimeout returns err itself if it is a timeout.
func errTimeout(err error) error {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return err
	}
	return nil
}

func TestHalfCloseAndBulk(t *testing.T) {
	w := newWorld(t)
	w.dns.set("good.example", goodAddr)
	cert := certificate(t)
	w.serve(goodAddr+":443", func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		b, _ := io.ReadAll(s) // to the client's end
		s.Write(b)
		s.CloseWrite()
	})
	w.start(Policy{Allow: []string{"good.example"}})
	data := bytes.Repeat([]byte("0123456789abcdef"), 300_000)
	s := tls.Client(w.dial(goodAddr+":443"), &tls.Config{InsecureSkipVerify: true, ServerName: "good.example"})
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(data)
		sent <- errors.Join(err, s.CloseWrite(), s.NetConn().(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(s)
	must(t, err)
	must(t, <-sent)
	if !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back of %d", len(got), len(data))
	}
	waitOpen(t, w.proxy, 0)
}

func waitOpen(t *testing.T, p *Proxy, want int) {
	t.Helper()
	for end := time.Now().Add(timeout); p.cfg.Shared.Counts().Open != want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections are open, want %d", p.cfg.Shared.Counts().Open, want)
		}
	}
}

func TestPolicyChangeEndsConnections(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"good.example", "other.example"}})
	open := func(to, name string) *tls.Conn {
		s := tls.Client(w.dial(to+":443"), &tls.Config{InsecureSkipVerify: true, ServerName: name})
		if _, err := bufio.NewReaderSize(s, 16).ReadString('\n'); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return s
	}
	alive := func(s *tls.Conn) bool {
		if _, err := s.Write([]byte("x")); err != nil {
			return false
		}
		_, err := s.Read(make([]byte, 1))
		return err == nil
	}
	good, other := open(goodAddr, "good.example"), open("198.51.100.9", "other.example")
	keep := w.dial(goodAddr + ":80") // idle between requests
	r := bufio.NewReader(keep)
	fmt.Fprint(keep, "GET / HTTP/1.1\r\nHost: good.example\r\n\r\n")
	resp, err := http.ReadResponse(r, nil)
	must(t, err)
	io.Copy(io.Discard, resp.Body)

	// While the change is under way, both policies hold.
	w.proxy.Restrict(t.Context(), reaching(Policy{Allow: []string{"other.example", "evil.example"}}))
	for name, want := range map[string]string{"good.example": "", "evil.example": "", "other.example": "other"} {
		if got, err := askTLS(w.dial(goodAddr+":443"), name); got != want {
			t.Errorf("during the change %s led to %q, %v", name, got, err)
		}
	}
	if alive(good) || !alive(other) {
		t.Error("the change ended the wrong connections")
	}
	if _, err := r.ReadByte(); err == nil || errTimeout(err) != nil {
		t.Errorf("an idle connection that was used for a name refused by now: %v", err)
	}
	w.proxy.Settle()
	for name, want := range map[string]string{"good.example": "", "evil.example": "evil", "other.example": "other"} {
		if got, err := askTLS(w.dial(goodAddr+":443"), name); got != want {
			t.Errorf("after the change %s led to %q, %v", name, got, err)
		}
	}
	// A change that is given up leaves the stricter of both; the next one
	// does not have to obey it.
	w.proxy.Restrict(t.Context(), reaching(Policy{Allow: []string{"other.example", "good.example"}}))
	if got, err := askTLS(w.dial(goodAddr+":443"), "evil.example"); got != "" {
		t.Errorf("during a change evil.example led to %q, %v", got, err)
	}
	w.proxy.Restrict(t.Context(), reaching(Policy{Open: true, Deny: []string{"alias.example"}}))
	w.proxy.Settle()
	if !alive(other) {
		t.Error("what all policies let through was ended")
	}
	// Denying a name ends connections to its addresses under other names.
	w.dns.set("alias2.example", "198.51.100.9")
	w.settle(Policy{Open: true, Deny: []string{"alias2.example"}})
	if alive(other) {
		t.Error("a connection to an address of a denied name goes on")
	}
	w.settle(Policy{Open: true})
	if got, err := askTLS(w.dial("198.51.100.9:443"), "other.example"); got != "other" {
		t.Errorf("an address of a name that is no longer denied led to %q, %v", got, err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	for what, turns := range map[string]int{"its own": 0, "all proxies'": 8} {
		w := newWorld(t)
		w.dns.set("good.example", goodAddr)
		w.serveTLS(goodAddr+":443", "good")
		most := 32
		if turns > 0 {
			w.shared, most = NewShared(turns), turns
		}
		w.start(Policy{Allow: []string{"good.example"}})
		var conns []*net.TCPConn
		for range most {
			conns = append(conns, w.dial(goodAddr+":443"))
		}
		waitOpen(t, w.proxy, most)
		if over, err := net.Dial("tcp4", w.proxy.cfg.Conns.Addr().String()); err == nil {
			over.SetDeadline(time.Now().Add(timeout))
			if _, err := over.Read(make([]byte, 1)); err == nil || errTimeout(err) != nil {
				t.Errorf("one more than %s limit: %v, want it closed", what, err)
			}
			over.Close()
		}
		conns[0].Close()
		waitOpen(t, w.proxy, most-1)
		// Its turn is given back right after.
		for end := time.Now().Add(timeout); ; {
			if got, _ := askTLS(w.dial(goodAddr+":443"), "good.example"); got == "good" {
				break
			}
			if time.Now().After(end) {
				t.Fatal("no connection after one has ended")
			}
		}
		w.proxy.Close()
		if w.shared != nil && len(w.shared.conns) > 0 {
			t.Errorf("%d turns are not given back", len(w.shared.conns))
		}
	}
}

func TestCloseEndsEverything(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"good.example"}})
	s := w.dial(goodAddr + ":443")
	if got, err := askTLS(s, "good.example"); got != "good" {
		t.Fatal(err)
	}
	quiet := w.dial(goodAddr + ":443")
	waitOpen(t, w.proxy, 2)
	w.proxy.Close()
	w.proxy.Close()
	for _, c := range []*net.TCPConn{s, quiet} {
		for {
			_, err := c.Read(make([]byte, 64))
			if errTimeout(err) != nil {
				t.Error("a connection outlives the proxy")
			}
			if err != nil {
				break
			}
		}
	}
	if n := w.proxy.cfg.Shared.Counts(); n.Open != 0 || n.Accepted != 2 {
		t.Errorf("counts %+v", n)
	}
}

func TestDNS(t *testing.T) {
	const https, svcb, null = dnsmessage.TypeHTTPS, dnsmessage.TypeSVCB, dnsmessage.Type(10)
	w := twoServers(t, Policy{Allow: []string{"good.example", "*.wild.example"}})
	w.dns.set("a.wild.example", "c.elsewhere.example")
	w.dns.set("c.elsewhere.example", goodAddr, good2Addr)
	for _, c := range []struct {
		name    string
		typ     dnsmessage.Type
		rcode   dnsmessage.RCode
		answers int
		asked   bool
	}{
		{"good.example.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1, true},
		{"GooD.eXample.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1, true},
		{"good.example.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, 0, true},
		{"good.example.", https, dnsmessage.RCodeSuccess, 0, false},
		{"good.example.", svcb, dnsmessage.RCodeSuccess, 0, false},
		{"good.example.", null, dnsmessage.RCodeSuccess, 0, false},
		{"good.example.", dnsmessage.TypeALL, dnsmessage.RCodeSuccess, 0, false},
		{"a.wild.example.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 3, true},
		{"wild.example.", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0, false},
		{"evil.example.", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0, false},
		{"secret.good.example.", dnsmessage.TypeTXT, dnsmessage.RCodeNameError, 0, false},
		{".", dnsmessage.TypeNS, dnsmessage.RCodeNameError, 0, false},
	} {
		for _, network := range []string{"udp", "tcp"} {
			before := len(w.dns.questions())
			m, err := w.askDNS(network, question(c.name, c.typ, 4711))
			if err != nil {
				t.Errorf("%s %s over %s: %v", c.name, c.typ, network, err)
				continue
			}
			if m.RCode != c.rcode || len(m.Answers) != c.answers || !m.Response || len(m.Questions) != 1 || m.Questions[0].Name.String() != c.name {
				t.Errorf("%s %s over %s = %+v", c.name, c.typ, network, m)
			}
			if asked := len(w.dns.questions()) > before; asked != c.asked {
				t.Errorf("%s %s over %s: went to the resolver: %v", c.name, c.typ, network, asked)
			}
		}
	}
	w.dns.mu.Lock()
	w.dns.big = true
	w.dns.mu.Unlock()
	if m, err := w.askDNS("udp", question("good.example.", dnsmessage.TypeA, 1)); err != nil || len(m.Answers) != 1 {
		t.Errorf("an answer that the resolver gives over TCP = %+v, %v", m, err)
	}
	many := make([]string, 200)
	for i := range many {
		many[i] = fmt.Sprintf("198.51.100.%d", i)
	}
	w.dns.set("good.example", many...)
	if m, err := w.askDNS("udp", question("good.example.", dnsmessage.TypeA, 1)); err != nil || !m.Truncated || len(m.Answers) > 0 {
		t.Errorf("an answer too long for a datagram = %+v, %v", m, err)
	}
	if m, err := w.askDNS("tcp", question("good.example.", dnsmessage.TypeA, 1)); err != nil || len(m.Answers) != 200 {
		t.Errorf("an answer too long for a datagram, over TCP = %d answers, %v", len(m.Answers), err)
	}
}

// Of what a guest puts into its message, the name and the kind go on.
func TestDNSForwardsNothingElse(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"good.example"}})
	var m dnsmessage.Message
	must(t, m.Unpack(question("good.example.", dnsmessage.TypeA, 7)))
	var opt dnsmessage.ResourceHeader
	must(t, opt.SetEDNS0(4096, 0, true))
	txt := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("secret."), Class: dnsmessage.ClassINET},
		Body: &dnsmessage.TXTResource{TXT: []string{"secret"}}}
	m.Additionals = []dnsmessage.Resource{txt, {Header: opt,
		Body: &dnsmessage.OPTResource{Options: []dnsmessage.Option{{Code: 65001, Data: []byte("secret")}}}}}
	m.Authorities = []dnsmessage.Resource{txt}
	query, err := m.Pack()
	must(t, err)
	var parser dnsmessage.Parser
	_, err = parser.Start(query)
	must(t, err)
	must(t, parser.SkipAllQuestions())
	edns, err := ednsOf(&parser)
	must(t, err)
	onward, err := questionFor(8, m.Questions[0], edns)
	must(t, err)
	if bytes.Contains(onward, []byte("secret")) {
		t.Errorf("goes on: %q", onward)
	}
	if a, err := w.askDNS("udp", query); err != nil || len(a.Answers) != 1 {
		t.Errorf("answer = %+v, %v", a, err)
	}
	for what, change := range map[string]func(*dnsmessage.Message){
		"two questions": func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions[0]) },
		"no question":   func(m *dnsmessage.Message) { m.Questions = nil },
		"an update":     func(m *dnsmessage.Message) { m.OpCode = 5 },
		"class CHAOS":   func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS },
	} {
		m := dnsmessage.Message{Header: m.Header, Questions: slices.Clone(m.Questions)}
		change(&m)
		b, err := m.Pack()
		must(t, err)
		before := len(w.dns.questions())
		a, err := w.askDNS("udp", b)
		if err != nil || a.RCode == dnsmessage.RCodeSuccess || len(a.Answers) > 0 {
			t.Errorf("%s = %+v, %v", what, a, err)
		}
		if len(w.dns.questions()) > before {
			t.Errorf("%s went on", what)
		}
	}
	m.Response = true
	b, err := m.Pack()
	must(t, err)
	if a := w.proxy.answer(t.Context(), b, true); a != nil {
		t.Errorf("an answer is answered: %q", a)
	}
}

func TestResolverFailures(t *testing.T) {
	w := twoServers(t, Policy{Allow: []string{"*"}})
	w.dns.set("loop.example", "loop.example")
	for _, name := range []string{"loop.example", "nowhere.example"} {
		if got, err := askTLS(w.dial(goodAddr+":443"), name); got != "" {
			t.Errorf("%s led to %q, %v", name, got, err)
		}
	}
	none := &resolver{}
	if _, err := none.lookup(t.Context(), "good.example"); err == nil {
		t.Error("no resolver has an answer")
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(question("good.example.", dnsmessage.TypeA, 1))
	f.Add(question("evil.example.", dnsmessage.TypeTXT, 1))
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0xc0, 12, 0, 1, 0, 1})
	// Without resolvers, so that only refusals and errors can come.
	p := &Proxy{cfg: Config{Log: discard, Shared: NewShared(1)}, logged: newRate(logRate),
		policies: []parsedPolicy{parse(Policy{Allow: []string{"good.example"}})}}
	f.Fuzz(func(t *testing.T, query []byte) {
		msg := p.answer(t.Context(), query, true)
		if msg == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(msg); err != nil || !m.Response || len(m.Answers) > 0 || m.ID != uint16(query[0])<<8|uint16(query[1]) {
			t.Errorf("answer(%q) = %q, %v", query, msg, err)
		}
		addrsOf(query, "good.example")
	})
}

// Whatever a client says first, it gets where a name of the policy's owner is
// or nowhere.
func FuzzFirstBytes(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n"))
	f.Add([]byte("GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	f.Add([]byte("\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"))
	var hello bytes.Buffer
	tls.Client(recorder{&hello}, &tls.Config{ServerName: "good.example"}).Handshake()
	f.Add(hello.Bytes())
	w := twoServers(f, Policy{Allow: []string{"good.example", "inside.example"}})
	f.Fuzz(func(t *testing.T, b []byte) {
		w.t = t
		c := w.dial(evilAddr + ":80")
		defer c.Close()
		c.Write(b)
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(timeout))
		if _, err := io.ReadAll(c); errTimeout(err) != nil {
			t.Errorf("%q: not closed", b)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, d := range w.dialed {
			if d.Addr().String() != goodAddr {
				t.Errorf("%q: dialed %s", b, d)
			}
		}
		w.dialed = nil
	})
}

// recorder keeps what is written, and has nothing to read.
type recorder struct{ *bytes.Buffer }

func (recorder) Read([]byte) (int, error)         { return 0, io.EOF }
func (recorder) Close() error                     { return nil }
func (recorder) LocalAddr() net.Addr              { return nil }
func (recorder) RemoteAddr() net.Addr             { return nil }
func (recorder) SetDeadline(time.Time) error      { return nil }
func (recorder) SetReadDeadline(time.Time) error  { return nil }
func (recorder) SetWriteDeadline(time.Time) error { return nil }
