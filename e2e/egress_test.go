package e2e_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// The internet of these tests is a namespace behind a link of the host's. It
// has a resolver and three servers, each of which answers with its own name.
const (
	internetHost = "198.51.100.1/24" // the host's address there
	resolverAddr = "198.51.100.53"
)

var internetServers = map[string]string{
	"good":    "198.51.100.10",
	"evil":    "198.51.100.20",
	"private": "10.254.254.10", // nothing that calls itself public has this
}

// internetNames is what the resolver knows.
var internetNames = map[string]string{
	"good.example.":       internetServers["good"],
	"www.good.example.":   internetServers["good"],
	"evil.example.":       internetServers["evil"],
	"rebinding.example.":  internetServers["private"],
	"metadata.example.":   "169.254.169.254",
	"bad.under.example.":  internetServers["evil"],
	"fine.under.example.": internetServers["good"],
}

// internet is what was asked of it.
type internet struct {
	mu    sync.Mutex
	asked []string // names, of the resolver
}

func (i *internet) questions() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return strings.Join(i.asked, " ")
}

// theInternet sets it up for one test.
func theInternet(t *testing.T) *internet {
	t.Helper()
	i := &internet{}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ns := func() (ns netns.NsHandle) {
		check(onOwnThread(func() (err error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			ns, err = netns.Get()
			return err
		}))
		return ns
	}()
	t.Cleanup(func() { ns.Close() })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "e2einet0"
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "inet0", netlink.NsFd(ns)
	check(netlink.LinkAdd(veth))
	t.Cleanup(func() { netlink.LinkDel(veth) })
	address := func(h *netlink.Handle, link string, addrs ...string) {
		t.Helper()
		l, err := h.LinkByName(link)
		check(err)
		for _, addr := range addrs {
			a, err := netlink.ParseAddr(addr)
			check(err)
			check(h.AddrAdd(l, a))
		}
		check(h.LinkSetUp(l))
	}
	here, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	check(err)
	defer here.Close()
	address(here, "e2einet0", internetHost)
	// The host has a way to the private address, too.
	l, err := here.LinkByName("e2einet0")
	check(err)
	check(here.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(t, internetServers["private"]+"/32"),
		Gw: net.ParseIP(resolverAddr)}))

	cert := selfSigned(t)
	var servers []io.Closer
	check(onOwnThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		address(h, "lo", internetServers["private"]+"/32", "169.254.169.254/32")
		address(h, "inet0", resolverAddr+"/24", internetServers["good"]+"/24", internetServers["evil"]+"/24")
		for name, addr := range internetServers {
			for port, config := range map[string]*tls.Config{"80": nil, "443": {Certificates: []tls.Certificate{cert}},
				"8443": {Certificates: []tls.Certificate{cert}}} {
				l, err := net.Listen("tcp", net.JoinHostPort(addr, port))
				if err != nil {
					return err
				}
				if config != nil {
					l = tls.NewListener(l, config)
				}
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) })}
				servers = append(servers, srv)
				go srv.Serve(l)
			}
			// What speaks first, as ssh does, and on UDP.
			l, err := net.Listen("tcp", net.JoinHostPort(addr, "22"))
			if err != nil {
				return err
			}
			servers = append(servers, l)
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					io.WriteString(conn, name)
					conn.Close()
				}
			}()
			u, err := net.ListenPacket("udp", net.JoinHostPort(addr, "443"))
			if err != nil {
				return err
			}
			servers = append(servers, u)
			go answerEach(u, func([]byte) []byte { return []byte(name) })
		}
		for _, addr := range []string{resolverAddr, internetServers["evil"]} {
			u, err := net.ListenPacket("udp", net.JoinHostPort(addr, "53"))
			if err != nil {
				return err
			}
			servers = append(servers, u)
			go answerEach(u, i.resolve)
		}
		return nil
	}))
	t.Cleanup(func() {
		for _, s := range servers {
			s.Close()
		}
	})
	return i
}

// answerEach answers datagrams until the socket is closed.
func answerEach(u net.PacketConn, with func([]byte) []byte) {
	buf := make([]byte, 2048)
	for {
		n, from, err := u.ReadFrom(buf)
		if err != nil {
			return
		}
		if reply := with(buf[:n]); reply != nil {
			u.WriteTo(reply, from)
		}
	}
}

// resolve is the resolver.
func (i *internet) resolve(query []byte) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	i.mu.Lock()
	i.asked = append(i.asked, q.Name.String())
	i.mu.Unlock()
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	addr, ok := internetNames[strings.ToLower(q.Name.String())]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	} else if q.Type == dnsmessage.TypeA {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
			Body:   &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()},
		}}
	}
	reply, err := m.Pack()
	if err != nil {
		return nil
	}
	return reply
}

// onOwnThread runs f on a thread that ends with it.
func onOwnThread(f func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread()
		errc <- f()
	}()
	return <-errc
}

func ipNet(t *testing.T, s string) *net.IPNet {
	t.Helper()
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"good.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// attempt is what a guest tries.
type attempt struct {
	// How is http, https, ssh (the server speaks first), udp, or dns (of a
	// resolver at Addr).
	How string `json:"how"`
	// Addr is an address, or a name for the guest to look up.
	Addr string `json:"addr"`
	Port int    `json:"port"`
	// Name is what the guest says it wants: the Host, the server name, the
	// question.
	Name string `json:"name"`
}

// attempts runs them in the guest, side by side, and returns for each the name
// of the server that answered, or why none did.
func (b *sandbox) attempts(list ...attempt) []string {
	b.t.Helper()
	data, err := json.Marshal(list)
	if err != nil {
		b.t.Fatal(err)
	}
	out := b.sh("python3 - <<'END'\nimport json, socket, ssl, struct, threading\n" +
		"todo = json.loads('''" + string(data) + "''')\n" + `
def one(a):
    how, addr, port, name = a["how"], a["addr"], a["port"], a["name"]
    if how in ("udp", "dns"):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(4)
        s.connect((addr, port))
        q = b"x"
        if how == "dns":
            q = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0)
            for label in name.split("."):
                q += bytes([len(label)]) + label.encode()
            q += b"\0" + struct.pack(">HH", 1, 1)
        s.send(q)
        got = s.recv(2048)
        if how != "dns": return got.decode()
        return "refused: sink" if got.endswith(bytes([192, 0, 0, 8])) else "rcode %d" % (got[3] & 15)
    s = socket.create_connection((addr, port), 8)
    s.settimeout(8)
    if how == "ssh":
        return s.recv(100).decode() or "closed"
    if how == "https":
        c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        c.check_hostname, c.verify_mode = False, ssl.CERT_NONE
        s = c.wrap_socket(s, server_hostname=name or None)
    s.sendall(("GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % name).encode())
    got = b""
    while True:
        part = s.recv(4096)
        if not part: break
        got += part
    head, _, body = got.decode().partition("\r\n\r\n")
    return body.strip() if " 200 " in head.split("\r\n")[0] else "refused: " + head[:40]
results = [None] * len(todo)
def attempt(i):
    try: results[i] = one(todo[i])
    except Exception as e: results[i] = "refused: %s" % type(e).__name__
threads = [threading.Thread(target=attempt, args=(i,)) for i in range(len(todo))]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(results))
END`)
	var results []string
	if err := json.Unmarshal([]byte(out), &results); err != nil || len(results) != len(list) {
		b.t.Fatalf("attempts printed %q: %v", out, err)
	}
	return results
}

// expect runs attempts, of which each has its wanted result: a server's name,
// or "no" for one that no server answered.
func (b *sandbox) expect(when string, wanted map[attempt]string) {
	b.t.Helper()
	var list []attempt
	for a := range wanted {
		list = append(list, a)
	}
	for i, got := range b.attempts(list...) {
		want := wanted[list[i]]
		if want == "no" && (strings.HasPrefix(got, "refused") || got == "closed" || got == "rcode 3" || got == "rcode 5") || got == want {
			continue
		}
		b.t.Errorf("%s: %+v: got %q, want %q", when, list[i], got, want)
	}
}

func (b *sandbox) setNetwork(p *hostagentv1.NetworkPolicy) error {
	_, err := b.a.UpdateNetwork(b.t.Context(), connect.NewRequest(&hostagentv1.UpdateNetworkRequest{SandboxId: b.id, Network: p}))
	return err
}

func off() *bool { no := false; return &no }

// What is reached from a default sandbox, and what from one without internet.
// These attempts reach their servers where they may, which gives all the
// refusals their meaning.
func TestEgress(t *testing.T) {
	i := theInternet(t)
	a := startAgent(t, "--dns="+resolverAddr)
	b := a.create(t, nil)
	good, evil := internetServers["good"], internetServers["evil"]
	open := map[attempt]string{
		{"http", good, 80, "good.example"}:                     "good",
		{"http", "good.example", 80, "good.example"}:           "good",
		{"https", good, 443, "good.example"}:                   "good",
		{"ssh", evil, 22, ""}:                                  "evil",
		{"udp", evil, 443, ""}:                                 "evil",
		{"dns", resolverAddr, 53, "good.example"}:              "rcode 0",
		{"http", internetServers["private"], 80, "x"}:          "no",
		{"http", "169.254.169.254", 80, "x"}:                   "no",
		{"http", "rebinding.example", 80, "x"}:                 "no",
		{"udp", internetServers["private"], 443, "x"}:          "no",
		{"http", strings.Split(internetHost, "/")[0], 80, "x"}: "no",
	}
	b.expect("by default", open)
	if !strings.Contains(i.questions(), "good.example.") {
		t.Errorf("the resolver was asked %q", i.questions())
	}

	if err := b.setNetwork(&hostagentv1.NetworkPolicy{DenyOut: []string{evil + "/32"}}); err != nil {
		t.Fatal(err)
	}
	b.expect("with a range denied", map[attempt]string{
		{"ssh", evil, 22, ""}: "no", {"udp", evil, 443, ""}: "no", {"http", good, 80, "x"}: "good",
	})
	// What is allowed wins over what is denied, but not over the walls.
	closed := &hostagentv1.NetworkPolicy{
		AllowInternet: off(), AllowOut: []string{"198.51.100.10", "169.254.169.254"}, DenyOut: []string{"198.51.100.0/24"},
	}
	if err := b.setNetwork(closed); err != nil {
		t.Fatal(err)
	}
	inForce := func(when string) {
		t.Helper()
		b.expect(when, map[attempt]string{
			{"ssh", evil, 22, ""}: "no", {"udp", evil, 443, ""}: "no", {"ssh", good, 22, ""}: "good",
			{"dns", resolverAddr, 53, "good.example"}: "no", {"http", "169.254.169.254", 80, "x"}: "no",
		})
	}
	inForce("without internet, except one address")

	// It stays so, whatever happens to sandbox and agent.
	if err := errors.Join(b.pause(), b.resume()); err != nil {
		t.Fatal(err)
	}
	inForce("after a pause")
	if _, err := a.PauseSandbox(t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id, ToDisk: true})); err != nil {
		t.Fatal(err)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	inForce("after a hibernation")
	forked, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: b.id}))
	if err != nil {
		t.Fatal(err)
	}
	fork := &sandbox{t, a, forked.Msg.Sandboxes[0].SandboxId}
	fork.expect("in a fork", map[attempt]string{{"ssh", evil, 22, ""}: "no", {"ssh", good, 22, ""}: "good"})

	for _, bad := range [][]string{{"300.1.1.1"}, {"fe80::/10"}, {"a b"}, {"*."}, {"exa_mple!"}, {strings.Repeat("a", 300)}} {
		if err := b.setNetwork(&hostagentv1.NetworkPolicy{AllowOut: bad}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("allow %q: %v, want invalid argument", bad, err)
		}
	}
	inForce("after bad updates")

	resp, err := a.GetSandbox(t.Context(), connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: b.id}))
	if err != nil {
		t.Fatal(err)
	}
	if info := resp.Msg.Sandbox; info.Network.GetAllowInternet() || len(info.Network.GetAllowOut()) != 2 ||
		info.Traffic.GetInBytes() == 0 || info.Traffic.GetOutPackets() == 0 {
		t.Errorf("the sandbox is listed with %v, %v", info.Network, info.Traffic)
	}
}

// Domain names count for what is really connected to.
func TestEgressByName(t *testing.T) {
	i := theInternet(t)
	a := startAgent(t, "--dns="+resolverAddr, "--on-shutdown=leave")
	good, evil := internetServers["good"], internetServers["evil"]
	b := a.create(t, &hostagentv1.CreateSandboxRequest{Network: &hostagentv1.NetworkPolicy{
		AllowInternet: off(), AllowOut: []string{"good.example", "*.under.example", "rebinding.example", "metadata.example"},
		DenyOut: []string{"bad.under.example", "198.51.100.0/24"},
	}})
	byName := map[attempt]string{
		{"http", "good.example", 80, "good.example"}:             "good",
		{"https", "good.example", 443, "good.example"}:           "good",
		{"https", "good.example", 8443, "good.example"}:          "good",
		{"http", "fine.under.example", 80, "FINE.under.example"}: "good",
		// The name decides where the connection goes, not the address.
		{"http", evil, 80, "good.example"}:   "good",
		{"https", evil, 443, "good.example"}: "good",
		// Another name, or none, is refused.
		{"http", good, 80, "evil.example"}:              "no",
		{"https", good, 443, "evil.example"}:            "no",
		{"https", good, 443, ""}:                        "no",
		{"http", good, 80, good}:                        "no",
		{"http", evil, 80, evil}:                        "no",
		{"http", good, 80, "www.good.example"}:          "no",
		{"http", good, 80, "bad.under.example"}:         "evil", // allowed below *.under.example
		{"http", good, 80, "good.example.evil.example"}: "no",
		{"ssh", good, 22, ""}:                           "no",
		{"udp", good, 443, ""}:                          "no",
		// A name that is let through but leads inside.
		{"http", good, 80, "rebinding.example"}:  "no",
		{"https", good, 443, "metadata.example"}: "no",
		// Questions are a way out, too.
		{"dns", resolverAddr, 53, "good.example"}:        "rcode 0",
		{"dns", resolverAddr, 53, "secret.evil.example"}: "no",
		{"dns", evil, 53, "secret.evil.example"}:         "no",
	}
	b.expect("by name", byName)
	b.wantDenialsTold(t)
	if strings.Contains(i.questions(), "secret") {
		t.Errorf("the question got out: %s", i.questions())
	}

	if err := b.setNetwork(&hostagentv1.NetworkPolicy{DenyOut: []string{"evil.example"}}); err != nil {
		t.Fatal(err)
	}
	denied := map[attempt]string{
		{"http", "good.example", 80, "good.example"}: "good",
		{"http", good, 80, "www.good.example"}:       "good",
		{"https", evil, 443, "evil.example"}:         "no",
		{"http", evil, 80, "evil.example"}:           "no",
		{"http", evil, 80, evil}:                     "no",
		// It shares the denied one's address.
		{"http", evil, 80, "bad.under.example"}:   "no",
		{"dns", resolverAddr, 53, "evil.example"}: "no",
	}
	b.expect("with a name denied", denied)

	// The agent's part in it ends with the agent, and then nothing passes; the
	// next one takes it up.
	if err := a.signal(9); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--dns="+resolverAddr, "--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	b.expect("after the agent was killed", denied)
}

// wantDenialsTold tries names that the sandbox may not reach: the guest's programs and
// its owner learn of it.
func (b *sandbox) wantDenialsTold(t *testing.T) {
	t.Helper()
	if got := b.sh("curl -s -w ' %{http_code}' http://evil.example/"); !strings.Contains(got, "network policy") ||
		!strings.Contains(got, "evil.example") || !strings.HasSuffix(got, " 403") {
		t.Errorf("the guest's curl printed %q", got)
	}
	if got := b.sh("curl -sS https://evil.example/ 2>&1; true"); !strings.Contains(got, "alert") {
		t.Errorf("the guest's curl printed %q for TLS", got)
	}
	out, err := b.a.cli(t, "network", b.id, "--denied")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`http +evil\.example +80 `, `tls +evil\.example +443 `, `dns +secret\.evil\.example +- `, `udp +` + internetServers["good"] + ` +443 `,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("%q is not in what was refused:\n%s", want, out)
		}
	}
}

// A connection that a new policy refuses ends, and the cap counts.
func TestNetworkLimits(t *testing.T) {
	theInternet(t)
	a := startAgent(t, "--dns="+resolverAddr)
	b := a.create(t, &hostagentv1.CreateSandboxRequest{Network: &hostagentv1.NetworkPolicy{MaxConnections: 3}})
	hold := fmt.Sprintf(`python3 - <<'END'
import socket
held = []
for i in range(6):
    try: held.append(socket.create_connection(("%s", 80), 3))
    except OSError: pass
print(len(held))
END`, internetServers["good"])
	if got := b.sh(hold); got != "3" {
		t.Errorf("%s connections were possible, want 3", got)
	}
	if err := b.setNetwork(nil); err != nil {
		t.Fatal(err)
	}
	if got := b.sh(hold); got != "6" {
		t.Errorf("without the cap %s connections were possible, want 6", got)
	}
	if err := b.setNetwork(&hostagentv1.NetworkPolicy{InBytesPerSec: -1}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("negative rate: %v", err)
	}
}
