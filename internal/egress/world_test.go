package egress

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const timeout = 10 * time.Second

var discard = slog.New(slog.DiscardHandler)

// world is an internet in which every address is a socket on loopback: what a
// proxy dials is where its server listens, and there are no others.
type world struct {
	t       testing.TB
	proxy   *Proxy
	shared  *Shared
	log     *slog.Logger
	max     int // connections; 0 is 32
	servers map[netip.AddrPort]net.Addr
	dns     *fakeResolver
	sink    netip.Addr
	denials Denials

	mu     sync.Mutex
	meant  map[string]netip.AddrPort // by the client's address
	dialed []netip.AddrPort
}

// never is what no policy of these tests reaches.
var never = netip.MustParsePrefix("10.0.0.0/8")

// newWorld returns a world whose proxy is still to be started.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, servers: map[netip.AddrPort]net.Addr{}, meant: map[string]netip.AddrPort{}}
	w.dns = newFakeResolver(t)
	return w
}

func (w *world) start(policy Policy) {
	w.t.Helper()
	listen := func() *net.TCPListener {
		l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		must(w.t, err)
		return l
	}
	packet, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(w.t, err)
	w.proxy = New(w.t.Context(), Config{
		Conns: listen(), DNSConns: listen(), DNSPacket: packet,
		Original: func(c *net.TCPConn) (netip.AddrPort, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			to, ok := w.meant[c.RemoteAddr().String()]
			if !ok {
				return to, errors.New("no such connection")
			}
			return to, nil
		},
		Dial: func(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
			w.mu.Lock()
			w.dialed = append(w.dialed, to)
			at, ok := w.servers[to]
			w.mu.Unlock()
			if !ok {
				return nil, errors.New("no server is there")
			}
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp4", at.String())
			if err != nil {
				return nil, err
			}
			return c.(*net.TCPConn), nil
		},
		Resolvers: []netip.AddrPort{w.dns.addr},
		MaxConns:  cmp.Or(w.max, 32),
		Shared:    w.shared,
		Log:       w.log,
		Sink:      w.sink,
		Denials:   &w.denials,
	}, reaching(policy))
	w.t.Cleanup(w.proxy.Close)
}

func reaching(p Policy) Policy {
	if p.MayDial == nil {
		p.MayDial = func(a netip.Addr, _ bool) bool { return !never.Contains(a) }
	}
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dial opens a connection as the guest does to an address.
func (w *world) dial(to string) *net.TCPConn {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	at := w.proxy.cfg.Conns.Addr().(*net.TCPAddr)
	c, err := net.DialTCP("tcp4", nil, at)
	for errors.Is(err, syscall.ECONNRESET) { // one too many, for a moment
		c, err = net.DialTCP("tcp4", nil, at)
	}
	must(w.t, err)
	w.meant[c.LocalAddr().String()] = netip.MustParseAddrPort(to)
	c.SetDeadline(time.Now().Add(timeout))
	w.t.Cleanup(func() { c.Close() })
	return c
}

// serve calls fn for each connection to an address.
func (w *world) serve(at string, fn func(net.Conn)) {
	w.t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(w.t, err)
	var wg sync.WaitGroup
	var conns sync.Map
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Store(c, nil)
			wg.Go(func() { defer c.Close(); fn(c) })
		}
	})
	w.t.Cleanup(func() {
		l.Close()
		conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		wg.Wait()
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.servers[netip.MustParseAddrPort(at)] = l.Addr()
}

// serveHTTP answers each request with the server's name and what it got.
func (w *world) serveHTTP(at, name string) {
	w.serve(at, func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			body, _ := io.ReadAll(req.Body)
			if req.Header.Get("Upgrade") == "websocket" {
				fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
				io.Copy(c, r)
				return
			}
			answer := fmt.Sprintf("%s: %s %s host=%s upgrade=%q body=%q", name, req.Method, req.RequestURI, req.Host,
				req.Header.Get("Upgrade"), body)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(answer), answer)
		}
	})
}

// serveTLS says its name to every client after the handshake, whatever name the
// client asked for.
func (w *world) serveTLS(at, name string) {
	cert := certificate(w.t)
	w.serve(at, func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		fmt.Fprintf(s, "%s\n", name)
		io.Copy(s, s)
		s.CloseWrite()
	})
}

var certOnce = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)},
		&x509.Certificate{SerialNumber: big.NewInt(1)}, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
})

func certificate(t testing.TB) tls.Certificate {
	c, err := certOnce()
	must(t, err)
	return c
}

// askTLS shakes hands with the name, "" for none, and returns the server's.
func askTLS(c net.Conn, name string) (string, error) {
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: name}
	s := tls.Client(c, cfg)
	line, err := bufio.NewReader(s).ReadString('\n')
	if err != nil {
		return "", err
	}
	return line[:len(line)-1], nil
}

// fakeResolver answers from a table of A records, and counts what it is asked.
type fakeResolver struct {
	addr netip.AddrPort

	mu    sync.Mutex
	zone  map[string][]string // addresses, or one alias
	asked []string
	big   bool // answers over TCP only
}

func newFakeResolver(t testing.TB) *fakeResolver {
	t.Helper()
	f := &fakeResolver{zone: map[string][]string{}}
	var u *net.UDPConn
	var l *net.TCPListener
	for l == nil { // until a port is free for both
		var err error
		u, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		must(t, err)
		f.addr = u.LocalAddr().(*net.UDPAddr).AddrPort()
		if l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(f.addr)); err != nil {
			u.Close()
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			// Forged answers come first.
			forged := slices.Clone(f.reply(buf[:n], false))
			forged[0] ^= 0xff
			forged[3] |= byte(dnsmessage.RCodeServerFailure)
			u.WriteToUDPAddrPort(forged, from)
			u.WriteToUDPAddrPort(f.reply(buf[:n], true), from)
		}
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(timeout))
				if q, err := readMessage(c); err == nil {
					writeMessage(c, f.reply(q, false))
				}
			})
		}
	})
	t.Cleanup(func() { u.Close(); l.Close(); wg.Wait() })
	return f
}

func (f *fakeResolver) set(name string, values ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.zone[name] = values
}

func (f *fakeResolver) questions() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *fakeResolver) reply(query []byte, datagram bool) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		panic(err)
	}
	q := m.Questions[0]
	name := textOf(q.Name)
	if datagram {
		f.asked = append(f.asked, name+" "+q.Type.String())
	}
	m.Response, m.Additionals = true, nil
	if f.big && datagram {
		m.Truncated = true
	} else if _, ok := f.zone[name]; !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	owner := q.Name
	for range 10 {
		values := f.zone[textOf(owner)]
		if len(values) == 0 || m.Truncated || q.Type != dnsmessage.TypeA {
			break
		}
		h := dnsmessage.ResourceHeader{Name: owner, Class: dnsmessage.ClassINET, TTL: 1}
		if _, err := netip.ParseAddr(values[0]); err != nil {
			owner = dnsmessage.MustNewName(values[0] + ".")
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.CNAMEResource{CNAME: owner}})
			continue
		}
		for _, v := range values {
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: netip.MustParseAddr(v).As4()}})
		}
		break
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// question returns a DNS query.
func question(name string, typ dnsmessage.Type, id uint16) []byte {
	b, err := questionFor(id, dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}, nil)
	if err != nil {
		panic(err)
	}
	return b
}

// askDNS asks the proxy as the guest does.
func (w *world) askDNS(network string, query []byte) (m dnsmessage.Message, err error) {
	w.t.Helper()
	at := w.proxy.cfg.DNSPacket.LocalAddr().String()
	if network == "tcp" {
		at = w.proxy.cfg.DNSConns.Addr().String()
	}
	c, err := net.Dial(network, at)
	must(w.t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	var b []byte
	if network == "tcp" {
		if err := writeMessage(c, query); err != nil {
			return m, err
		}
		b, err = readMessage(c)
	} else {
		c.Write(query)
		b = make([]byte, 65535)
		var n int
		n, err = c.Read(b)
		b = b[:n]
	}
	if err != nil {
		return m, err
	}
	if binary.BigEndian.Uint16(b) != binary.BigEndian.Uint16(query) {
		return m, errors.New("the answer has another number")
	}
	return m, m.Unpack(b)
}
