package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/emptypb"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const (
	idA, idB = "sb-000000000000000a", "sb-000000000000000b"
	tokenA   = "token of a"
	patience = 10 * time.Second
)

// logged is a log that a test may read.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// edge is a gateway that serves.
type edge struct {
	*Gateway
	addr   string
	log    *logged
	panics *atomic.Int64
}

// serve runs a gateway; what reaches the control plane is answered with 200 and
// "control", and the body that came. change may be nil.
func serve(t *testing.T, change func(*Config)) *edge {
	t.Helper()
	e := &edge{log: &logged{}, panics: new(atomic.Int64)}
	c := Config{
		Sandboxes: newManager(t.Context()), Panics: e.panics, MaxConns: 4096, MaxConnsEach: 4096,
		Control: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				http.Error(w, err.Error(), http.StatusRequestTimeout)
				return
			}
			fmt.Fprint(w, "control")
		}),
		Log: slog.New(slog.NewTextHandler(e.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&c)
	}
	e.Gateway = New(c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- e.Serve(l) }()
	t.Cleanup(func() { e.Close(); <-served })
	return e
}

// guest serves h on the loopback, as a user's server in a sandbox does.
func guest(t *testing.T, h http.HandlerFunc) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-served })
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// closedPort is a port of the loopback on which nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (e *edge) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", e.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// ask sends a request as it stands and returns the answer.
func (e *edge) ask(t *testing.T, text string) (status int, body string) {
	t.Helper()
	c := e.dial(t)
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return resp.StatusCode, string(all)
}

func (e *edge) quiet(t *testing.T) {
	t.Helper()
	if n := e.panics.Load(); n != 0 || strings.Contains(e.log.String(), "panic") {
		t.Errorf("%d panics: %.2000s", n, e.log)
	}
}

// A request names one place or none, however it spells it.
func TestPlaceOf(t *testing.T) {
	const a, b, short = idA, idB, "sb000000000000000a"
	at := "localhost:50051"
	for _, c := range []struct {
		host    string
		ids     []string
		ports   []string
		id      sandbox.ID // "" if no sandbox can be called so
		written string
		port    uint16
		refused string
	}{
		{host: at}, {host: at, ids: []string{""}}, {host: at, ids: []string{""}, ports: []string{""}},
		{host: at, ids: []string{a}, id: a, written: a, port: 49983},
		{host: at, ids: []string{"", a}, ports: []string{"", "80"}, id: a, written: a, port: 80},
		{host: at, ids: []string{short}, ports: []string{"80"}, id: a, written: short, port: 80},
		{host: at, ids: []string{short + "-wrenn"}, id: a, written: short + "-wrenn", port: 49983},
		{host: at, ids: []string{a, short, short + "-x"}, ports: []string{"80", "080"}, id: a, written: a, port: 80},
		{host: at, ids: []string{"nonsense"}, written: "nonsense", port: 49983},
		{host: at, ids: []string{"nonsense", "nonsense"}, written: "nonsense", port: 49983},
		{host: at, ids: []string{a, b}, refused: "two sandboxes"},
		{host: at, ids: []string{a, "nonsense"}, refused: "two sandboxes"},
		{host: at, ids: []string{"nonsense", a}, refused: "two sandboxes"},
		{host: at, ids: []string{"nonsense", "other"}, refused: "two sandboxes"},
		{host: at, ids: []string{a + ", " + b}, written: a + ", " + b, port: 49983},
		{host: at, ids: []string{a}, ports: []string{"80", "81"}, refused: "two ports"},
		{host: at, ids: []string{a}, ports: []string{"80", "x"}, refused: "two ports"},
		{host: at, ports: []string{"80"}, refused: "no sandbox"},
		{host: "80-" + a + ".localhost:50051", id: a, written: a, port: 80},
		{host: "80-" + short + ".localhost:50051", id: a, written: short, port: 80},
		{host: "80-" + short + "-wrenn.localhost", id: a, written: short + "-wrenn", port: 80},
		{host: "80-SB-000000000000000A.LOCALHOST", id: a, written: a, port: 80},
		{host: "00080-" + a + ".x", id: a, written: a, port: 80},
		{host: "80-nonsense.x", written: "nonsense", port: 80},
		{host: "80-" + a + "..", id: a, written: a, port: 80},
		{host: "80-" + a + ".x", ids: []string{short}, ports: []string{"80"}, id: a, written: a, port: 80},
		{host: "80-" + a + ".x", ids: []string{b}, refused: "two sandboxes"},
		{host: "80-" + a + ".x", ids: []string{a, b}, refused: "two sandboxes"},
		{host: "80-" + a + ".x", ids: []string{a}, ports: []string{"49983"}, refused: "two ports"},
		{host: "80-" + a + ".x", ports: []string{"49983"}, refused: "two ports"},
		{host: "0-" + a + ".x", refused: "65535"}, {host: "99999-" + a + ".x", refused: "65535"},
		// No names of sandboxes.
		{host: "80-" + a}, {host: "x.80-" + a + ".x"}, {host: "123456-" + a + ".x"}, {host: "80_" + a + ".x"}, {host: "80-.x"},
		{host: "80-\u017fb-000000000000000a.x"},
		// A name of the agent that looks like one; and one that is one all the same.
		{host: "10-server.example"}, {host: "10-SERVER.example.:1"},
		{host: "80-" + b + ".example", id: b, written: b, port: 80},
	} {
		d := door{names: []string{"10-server.example", "80-" + idB + ".example"}}
		p, err := d.placeOf(&http.Request{Host: c.host, URL: &url.URL{Path: "/"},
			Header: http.Header{guestapi.HeaderSandboxID: c.ids, guestapi.HeaderSandboxPort: c.ports}})
		switch {
		case c.refused != "":
			if errdefs.ClassOf(err) != errdefs.InvalidArgument || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%+v: got %+v, %v", c, p, err)
			}
		case err != nil:
			t.Errorf("%+v: %v", c, err)
		case c.written == "" && p != nil || c.written != "" && (p == nil || p.id != c.id || p.written != c.written || p.port != c.port):
			t.Errorf("%+v: got %+v", c, p)
		}
	}
}

// Two spellings of a host never lead to two sandboxes, and what is no ID leads to none.
func FuzzPlaceOf(f *testing.F) {
	f.Add("80-sb-000000000000000a.x", "sb000000000000000a-x", "80")
	f.Add("localhost", "sb000000000000000a", "")
	f.Add("80-sb-000000000000000a.x:80", "", "0")
	f.Fuzz(func(t *testing.T, host, id, port string) {
		r := &http.Request{Host: host, URL: &url.URL{Path: "/"}, Header: http.Header{}}
		r.Header.Set(guestapi.HeaderSandboxID, id)
		r.Header.Set(guestapi.HeaderSandboxPort, port)
		p, err := door{}.placeOf(r)
		if err != nil || p == nil {
			return
		}
		if p.port == 0 || p.written == "" {
			t.Errorf("%+v", p)
		}
		for _, text := range []string{p.written, id} {
			if got, ok := sandbox.ParseLooseID(text); text != "" && (got != p.id || ok != (p.id != "")) {
				t.Errorf("%q is %q, and the request is for %q", text, got, p.id)
			}
		}
	})
}

func TestIsReserved(t *testing.T) {
	for path, want := range map[string]bool{
		"/init": true, "init": true, "//init": true, "/init/": true, "/./init": true, "/a/../init": true, "/../init": true, "/init/.": true,
		"/freeze": true, "/upgrade": true, "/": false, "": false, "/initial": false, "/health": false, "/files": false, "/init/x": false,
	} {
		if got := isReserved(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

// What counts against one kind of request leaves the others alone.
func TestRequestsAreCountedByKind(t *testing.T) {
	g := New(Config{Log: slog.New(slog.DiscardHandler)})
	loads := []load{{"a", ofOwner}, {"a", ofOthers}, {"a", toPort}, {"b", toPort}, {"", toAgent}}
	for _, l := range loads {
		for range l.kind.most() {
			if !g.enter(l) {
				t.Fatalf("%v: refused too early", l)
			}
		}
		if g.enter(l) {
			t.Errorf("%v: one too many", l)
		}
		g.leave(l)
		if !g.enter(l) {
			t.Errorf("%v: a place was not given back", l)
		}
	}
	for _, l := range loads {
		for range l.kind.most() {
			g.leave(l)
		}
	}
	if len(g.count) != 0 {
		t.Errorf("still counted: %v", g.count)
	}
}

// The owner's requests to envd go through while others' fill what they may.
func TestPublicTrafficLeavesTheOwnerAlone(t *testing.T) {
	port := guest(t, func(http.ResponseWriter, *http.Request) {})
	e := serve(t, nil)
	for range maxPerSandbox {
		c := e.dial(t)
		fmt.Fprintf(c, "CONNECT %s-%s.x:80 HTTP/1.1\r\n\r\n", port, idA)
		if resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"}); err != nil || resp.StatusCode != 200 {
			t.Fatalf("tunnel: %v, %v", resp, err)
		}
	}
	for range maxPerSandbox {
		if !e.enter(load{idA, ofOthers}) {
			t.Fatal("refused")
		}
	}
	get := func(port, token string) int {
		status, _ := e.ask(t, "GET /envs HTTP/1.1\r\nHost: "+port+"-"+idA+".x\r\nX-Access-Token: "+token+"\r\n\r\n")
		return status
	}
	for _, c := range []struct {
		port, token string
		want        int
	}{{port, "", 429}, {port, tokenA, 429}, {"49983", "", 429}, {"49983", "wrong", 429}, {"49983", tokenA, 502}} {
		if got := get(c.port, c.token); got != c.want {
			t.Errorf("port %s with the token %q: HTTP %d, want %d", c.port, c.token, got, c.want)
		}
	}
}

// doorCase is a request and what becomes of it.
type doorCase struct {
	line, host, headers string
	want                int
	body                string
}

// doorCases are a browser and what it can be made to send, against what is let
// through; the agent serves on port at, a user's server on port.
func doorCases(at, port string) []doorCase {
	const rpc = "POST /hostagent.v1.HostAgentService/CreateSandbox"
	pageOfA := "Origin: http://" + port + "-" + idA + ".localhost:" + at + "\r\n"
	json := "Content-Type: application/json\r\n"
	headers := func(id string) string { return "E2b-Sandbox-Id: " + id + "\r\nE2b-Sandbox-Port: " + port + "\r\n" }
	return []doorCase{
		// Names of ours.
		{rpc, "localhost:" + at, json, 200, "control"},
		{rpc, "LocalHost.:1", json, 200, "control"},
		{rpc, "127.0.0.1:" + at, json, 200, "control"},
		{rpc, "127.8.8.8", json, 200, "control"},
		{rpc, "[::1]:" + at, json, 200, "control"},
		{rpc, "[::1]", json, 200, "control"},
		{rpc, "wrenn.example", json, 200, "control"},
		{rpc, "192.0.2.7:80", json, 200, "control"},
		{"GET /metrics", "localhost", "", 200, "control"},
		{"GET /healthz", "127.0.0.1", "", 200, "control"},
		// DNS rebinding, and what looks like us.
		{rpc, "evil.example:" + at, json, 403, "permission_denied"},
		{rpc, "localhost.evil.example", json, 403, "permission_denied"},
		{rpc, "x.localhost", json, 403, "permission_denied"},
		{rpc, "0.0.0.0:" + at, json, 403, "permission_denied"},
		{rpc, "192.0.2.8", json, 403, "permission_denied"},
		{rpc, "[::]", json, 403, "permission_denied"},
		{rpc, "x." + port + "-" + idA + ".localhost", json, 403, "permission_denied"},
		{rpc, "", json, 403, "permission_denied"},
		{"GET /metrics", "evil.example", "", 403, "permission_denied"},
		{"GET /healthz", "evil.example", "", 403, "permission_denied"},
		{"GET /readyz", "evil.example", "", 403, "permission_denied"},
		// Pages of others.
		{rpc, "localhost:" + at, json + pageOfA, 403, "web page"},
		{rpc, "localhost:" + at, json + "Origin: null\r\n", 403, "web page"},
		{rpc, "localhost:" + at, json + "Origin: http://localhost:3000\r\n", 403, "web page"},
		{rpc, "localhost:" + at, json + "Origin: https://localhost:" + at + "\r\n", 403, "web page"},
		{rpc, "localhost:" + at, json + "Origin: http://localhost:" + at + "\r\nOrigin: http://evil.example\r\n", 403, "web page"},
		{rpc, "localhost:" + at, json + "Origin: http://localhost:" + at + "\r\n", 200, "control"},
		{"OPTIONS /hostagent.v1.HostAgentService/CreateSandbox", "localhost:" + at,
			pageOfA + "Access-Control-Request-Method: POST\r\n", 403, "web page"},
		{"GET /metrics", "localhost:" + at, "Sec-Fetch-Site: cross-site\r\n", 403, "another site"},
		{"GET /metrics", "localhost:" + at, "Sec-Fetch-Site: same-site\r\n", 403, "another site"},
		{"GET /metrics", "localhost:" + at, "Sec-Fetch-Site: none\r\n", 200, "control"},
		{"GET /metrics", "localhost:" + at, "Sec-Fetch-Site: same-origin\r\n", 200, "control"},
		// What a browser sends without asking.
		{rpc, "localhost:" + at, "Content-Type: text/plain\r\n", 403, "content type"},
		{rpc, "localhost:" + at, "Content-Type: text/plain; charset=application/json\r\n", 403, "content type"},
		{rpc, "localhost:" + at, "Content-Type: multipart/form-data; boundary=x\r\n", 403, "content type"},
		{rpc, "localhost:" + at, "Content-Type: application/x-www-form-urlencoded\r\n", 403, "content type"},
		{rpc, "localhost:" + at, "Content-Type: Application/X-WWW-Form-UrlEncoded; x=y\r\n", 403, "content type"},
		{rpc, "localhost:" + at, "", 403, "content type"},
		// The data plane by headers: from our names alone, and from no page.
		{"POST /x", "localhost:" + at, headers(idA), 200, "guest"},
		{"POST /x", "localhost:" + at, headers(idA) + "Content-Type: multipart/form-data; boundary=x\r\n", 200, "guest"},
		{"POST /x", "evil.example:" + at, headers(idA), 403, "no name"},
		{"POST /x", "localhost:" + at, headers(idB) + pageOfA, 403, "web page"},
		{"POST /x", "localhost:" + at, headers(idB) + "Sec-Fetch-Site: same-site\r\n", 403, "another site"},
		// By host name: that sandbox and no other, for every page.
		{"POST /x", port + "-" + idA + ".localhost:" + at, pageOfA, 200, "guest"},
		{"POST /x", port + "-" + idA + ".any.example", "Origin: http://else.example\r\nSec-Fetch-Site: cross-site\r\n", 200, "guest"},
		{"POST /x", port + "-" + idA + ".localhost:" + at, headers(idA) + pageOfA, 200, "guest"},
		{"POST /x", port + "-" + idA + ".localhost:" + at, headers(idB) + pageOfA, 400, "two sandboxes"},
		{"POST /x", port + "-" + idA + ".localhost:" + at, "E2b-Sandbox-Id: " + idB + "\r\n", 400, "two sandboxes"},
		{"POST /x", port + "-" + idA + ".localhost:" + at, "E2b-Sandbox-Port: 49983\r\n", 400, "two ports"},
		{rpc, port + "-" + idA + ".localhost:" + at, json + pageOfA, 200, "guest"},
	}
}

func TestDoor(t *testing.T) {
	var reached atomic.Value
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		reached.Store(r.Header.Clone())
		fmt.Fprint(w, "guest")
	})
	e := serve(t, func(c *Config) { c.Names = []string{"Wrenn.Example", "192.0.2.7"} })
	_, at, _ := net.SplitHostPort(e.addr)
	for _, c := range doorCases(at, port) {
		text := c.line + " HTTP/1.1\r\nHost: " + c.host + "\r\n" + c.headers
		if strings.HasPrefix(c.line, "POST") {
			text += "Content-Length: 2\r\n\r\n{}"
		} else {
			text += "\r\n"
		}
		if status, body := e.ask(t, text); status != c.want || !strings.Contains(body, c.body) {
			t.Errorf("%q:\nHTTP %d %s, want %d and %q", text, status, body, c.want, c.body)
		}
		if h, ok := reached.Swap(http.Header(nil)).(http.Header); ok && h.Get(guestapi.HeaderToken) != "" {
			t.Errorf("%q: the guest got a token that was not sent", text)
		}
	}
	e.quiet(t)
}

// Answers of the control plane's door are in the form that its clients read.
func TestDoorAnswersInConnectsForm(t *testing.T) {
	e := serve(t, nil)
	_, body := e.ask(t, "POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	var got struct{ Code, Message string }
	err := json.Unmarshal([]byte(body), &got)
	if err != nil || got.Code != "permission_denied" || !strings.Contains(got.Message, "--allow-host") {
		t.Errorf("%s (%v)", body, err)
	}
}

// The same in every dialect: a client by a foreign name learns what is wrong.
func TestDoorInEveryDialect(t *testing.T) {
	e := serve(t, nil)
	for name, opts := range map[string][]connect.ClientOption{
		"Connect": nil, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()},
	} {
		client := h2c(t)
		client.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", e.addr)
		}
		c := connect.NewClient[emptypb.Empty, emptypb.Empty](client, "http://evil.example/x.Y/Z", opts...)
		_, err := c.CallUnary(t.Context(), connect.NewRequest(&emptypb.Empty{}))
		if connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "evil.example") {
			t.Errorf("%s: %v", name, err)
		}
		stream, err := c.CallServerStream(t.Context(), connect.NewRequest(&emptypb.Empty{}))
		if err == nil {
			stream.Receive()
			err = stream.Err()
			stream.Close()
		}
		if connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "evil.example") {
			t.Errorf("%s, a stream: %v", name, err)
		}
	}
}

// half is a request of which the body has not come in full, rest what is
// missing of it.
var half = map[string]struct{ head, rest string }{
	"length":  {"Content-Length: 8\r\n\r\nhalf", "rest"},
	"chunked": {"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "4\r\nrest\r\n0\r\n\r\n"},
}

// guestsThatGo are the ways in which a guest leaves a request with its body
// under way.
func guestsThatGo(t *testing.T) map[string]string {
	ways := map[string]string{"refuses": closedPort(t)}
	for name, answer := range map[string]string{
		"answers and closes":   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"closes":               "",
		"closes in its answer": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, answer)
				c.Close()
			}
		}()
		_, ways[name], _ = net.SplitHostPort(l.Addr().String())
	}
	return ways
}

// A guest that goes while a client still sends ends in an answer or in the
// connection's end, not in a panic, and what was the rest of the body is never
// taken for a request.
func TestGuestGoesWhileTheBodyComes(t *testing.T) {
	for way, port := range guestsThatGo(t) {
		for framing, h := range half {
			for _, slow := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%v", way, framing, slow), func(t *testing.T) {
					e := serve(t, nil)
					c := e.dial(t)
					fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s-%s.x\r\n%s", port, idA, h.head)
					r := bufio.NewReader(c)
					if slow {
						// Until there is an answer.
						_, _ = r.Peek(1)
					}
					_, _ = io.WriteString(c, h.rest+"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
					for {
						resp, err := http.ReadResponse(r, nil)
						if err != nil {
							break
						}
						if resp.StatusCode == http.StatusBadRequest {
							t.Error("the rest of the body was taken for a request")
						}
						_, _ = io.Copy(io.Discard, resp.Body)
						if resp.Request == nil && resp.ContentLength == int64(len("control")) {
							break
						}
					}
					e.quiet(t)
				})
			}
		}
	}
}

// A client that never sends the rest holds neither a handler nor a connection
// once there is an answer.
func TestHalfABodyAfterTheAnswer(t *testing.T) {
	for way, port := range guestsThatGo(t) {
		for framing, h := range half {
			t.Run(way+"/"+framing, func(t *testing.T) {
				t.Parallel()
				e := serve(t, nil)
				c := e.dial(t)
				fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s-%s.x\r\n%s", port, idA, h.head)
				if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
					t.Errorf("the connection stays: %v", err)
				}
			})
		}
	}
	for name, head := range map[string]string{
		"refused by the door": "POST / HTTP/1.1\r\nHost: evil.example\r\n",
		"refused by name":     "POST / HTTP/1.1\r\nHost: 0-" + idA + ".x\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := serve(t, nil)
			c := e.dial(t)
			fmt.Fprintf(c, "%s%s", head, half["length"].head)
			if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("the connection stays: %v", err)
			}
		})
	}
}

// withBody serves a handler that gets a body taken over with that idle time,
// and returns what it got of it.
func withBody(t *testing.T, idle time.Duration) (e *edge, got chan error) {
	got = make(chan error, 1)
	e = serve(t, nil)
	e.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b := newBody(w, r, idle, e.panicked)
		_, err := io.Copy(io.Discard, b)
		b.end(w, r, true)
		got <- err
	})
	return e, got
}

func h2c(t *testing.T) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// A body that stops coming ends; one that keeps moving does not, however long
// it takes, and one without a bound may pause.
func TestStalledBody(t *testing.T) {
	for framing, h := range half {
		t.Run(framing, func(t *testing.T) {
			e, got := withBody(t, 50*time.Millisecond)
			fmt.Fprintf(e.dial(t), "POST / HTTP/1.1\r\nHost: x\r\n%s", h.head)
			if err := <-got; err != errStalled {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("HTTP/2", func(t *testing.T) {
		e, got := withBody(t, 50*time.Millisecond)
		r, w := io.Pipe()
		defer w.Close()
		go func() { _, _ = w.Write([]byte("half")) }()
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+e.addr+"/", r)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h2c(t).Do(req)
		if err == nil {
			resp.Body.Close()
		}
		if err := <-got; err != errStalled {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no bound", func(t *testing.T) {
		e, got := withBody(t, 0)
		c := e.dial(t)
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\n%s", half["length"].head)
		select {
		case err := <-got:
			t.Fatalf("ended with %v", err)
		case <-time.After(150 * time.Millisecond):
		}
		_, _ = io.WriteString(c, half["length"].rest)
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
	t.Run("moving", func(t *testing.T) {
		const idle = time.Second
		e, got := withBody(t, idle)
		c := e.dial(t)
		const pieces = 30
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", pieces)
		tick := time.NewTicker(idle / 20)
		defer tick.Stop()
		for range pieces {
			<-tick.C
			_, _ = io.WriteString(c, "x")
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

// Calls that are streams may be silent; what uploads may not.
func TestIdleFor(t *testing.T) {
	for kind, want := range map[string]time.Duration{
		"application/connect+proto": 0, "application/connect+json": 0, "application/grpc": 0,
		"application/grpc+proto": 0, "Application/gRPC-Web": 0,
		"": dataIdle, "application/json": dataIdle, "application/octet-stream": dataIdle, "multipart/form-data; boundary=x": dataIdle,
	} {
		if got := idleFor(&http.Request{Header: http.Header{"Content-Type": {kind}}}); got != want {
			t.Errorf("%q: %s", kind, got)
		}
	}
}

// A panic ends its request, is counted, and nothing else.
func TestPanics(t *testing.T) {
	e := serve(t, func(c *Config) {
		c.Control = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/panic":
				panic("at the disco")
			case "/abort":
				panic(http.ErrAbortHandler)
			}
		})
	})
	get := func(path string) error {
		resp, err := http.Get("http://" + e.addr + path)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for _, path := range []string{"/panic", "/abort"} {
		if err := get(path); err == nil {
			t.Errorf("%s was answered", path)
		}
	}
	resp, err := h2c(t).Post("http://"+e.addr+"/panic", "application/json", strings.NewReader("{}"))
	if err == nil {
		resp.Body.Close()
		t.Error("was answered over HTTP/2")
	}
	if err := get("/"); err != nil {
		t.Error(err)
	}
	if n := e.panics.Load(); n != 2 {
		t.Errorf("%d panics were counted, want 2", n)
	}
	if text := e.log.String(); !strings.Contains(text, "at the disco") || !strings.Contains(text, "gateway_test.go") {
		t.Errorf("the log says neither what nor where: %s", text)
	}
}

// badBody panics when it is read.
type badBody struct{ io.ReadCloser }

func (badBody) Read([]byte) (int, error) { panic("bad body") }

// Nothing recovers a panic of the transport's goroutine that reads a body.
func TestBodyPanicsInAnotherGoroutine(t *testing.T) {
	read := make(chan error, 1)
	e := serve(t, nil)
	e.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = badBody{r.Body}
		b := newBody(w, r, time.Minute, e.panicked)
		go func() {
			_, err := b.Read(make([]byte, 1))
			read <- err
		}()
		<-r.Context().Done()
	})
	fmt.Fprint(e.dial(t), "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
	if err := <-read; err == nil || e.panics.Load() != 1 {
		t.Errorf("%v, %d panics", err, e.panics.Load())
	}
	e.Close()
}

// Connections above what there may be are closed, and those that end make room.
func TestConnectionsAreBounded(t *testing.T) {
	for name, most := range map[string]struct{ all, each int }{"in all": {3, 10}, "of one client": {10, 3}} {
		t.Run(name, func(t *testing.T) {
			e := serve(t, func(c *Config) { c.MaxConns, c.MaxConnsEach = most.all, most.each })
			answered := func(c net.Conn) bool {
				fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				return err == nil && resp.StatusCode == 200
			}
			var open []net.Conn
			for i := range 5 {
				c := e.dial(t)
				if got, want := answered(c), i < 3; got != want {
					t.Errorf("connection %d: answered %v", i, got)
				}
				open = append(open, c)
			}
			if n := e.Refused(); n != 2 {
				t.Errorf("%d were refused", n)
			}
			open[0].Close()
			for deadline := time.Now().Add(patience); !answered(e.dial(t)); {
				if time.Now().After(deadline) {
					t.Fatal("a place was not given back")
				}
			}
		})
	}
}

func TestClientOf(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:1": "127.0.0.1/32", "[::ffff:192.0.2.1]:1": "192.0.2.1/32", "[::1]:1": "::1/128", "[2001:db8:1:2:3::4]:1": "2001:db8:1:2::/64",
	} {
		if got := clientOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr))); got.String() != want {
			t.Errorf("%s: %s", addr, got)
		}
	}
}

// A tunnel counts as a connection until it ends, and its guest's end ends it.
func TestTunnel(t *testing.T) {
	port := guest(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") })
	alive, end := context.WithCancel(t.Context())
	e := serve(t, func(c *Config) { c.Sandboxes = newManager(alive) })
	c := e.dial(t)
	fmt.Fprintf(c, "CONNECT %s-%s.x:80 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", port, idA)
	r := bufio.NewReader(c)
	for _, want := range []string{"", "guest"} {
		resp, err := http.ReadResponse(r, &http.Request{Method: map[bool]string{true: "CONNECT", false: "GET"}[want == ""]})
		if err != nil {
			t.Fatal(err)
		}
		if want != "" {
			if body, err := io.ReadAll(resp.Body); string(body) != want {
				t.Errorf("%q, %v", body, err)
			}
		}
	}
	open := func() int {
		e.tcp.mu.Lock()
		defer e.tcp.mu.Unlock()
		return e.tcp.open
	}
	if n := open(); n != 1 {
		t.Errorf("%d connections are counted", n)
	}
	end()
	if _, err := io.Copy(io.Discard, r); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Error(err)
	}
	for deadline := time.Now().Add(patience); open() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still counted")
		}
	}
}

// A CONNECT that claims a body is a tunnel all the same.
func TestTunnelWithABody(t *testing.T) {
	port := guest(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") })
	e := serve(t, nil)
	c := e.dial(t)
	fmt.Fprintf(c, "CONNECT %s-%s.x:80 HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"+
		"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", port, idA)
	if all, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(all), "guest") {
		t.Errorf("%q, %v", all, err)
	}
	if err := e.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	e.quiet(t)
}

// An upgrade of a request with a body would mix the body's bytes with the other
// protocol's: it is not asked for, and not had.
func TestUpgradeWithABody(t *testing.T) {
	var asked atomic.Value
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Header.Get("Upgrade"))
		if r.URL.Path == "/" {
			return
		}
		w.Header().Set("Connection", "Upgrade")
		if r.URL.Path == "/named" {
			w.Header().Set("Upgrade", "x")
		}
		w.WriteHeader(http.StatusSwitchingProtocols)
	})
	e := serve(t, nil)
	for path, want := range map[string]int{"/": 200, "/named": 502, "/unnamed": 502} {
		status, body := e.ask(t, "POST "+path+" HTTP/1.1\r\nHost: "+port+"-"+idA+".x\r\n"+
			"Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\n{}")
		if status != want || asked.Load() != "" {
			t.Errorf("%s: HTTP %d %s, want %d; the guest was asked for %q", path, status, body, want, asked.Load())
		}
	}
	e.quiet(t)
}

// A request to envd by host name gets envd's answer, a browser's question too. The
// token goes through as it came.
func TestHeadersPassThrough(t *testing.T) {
	var mu sync.Mutex
	var got http.Header
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		got = r.Header.Clone()
		mu.Unlock()
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.WriteHeader(http.StatusNoContent)
	})
	e := serve(t, nil)
	status, _ := e.ask(t, "OPTIONS /process.Process/Start HTTP/1.1\r\nHost: "+port+"-"+idA+".localhost\r\nOrigin: http://app.example\r\n"+
		"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-access-token\r\nX-Access-Token: mine\r\n\r\n")
	mu.Lock()
	defer mu.Unlock()
	if status != http.StatusNoContent || got.Get("Origin") != "http://app.example" ||
		got.Get("Access-Control-Request-Headers") != "x-access-token" || got.Get(guestapi.HeaderToken) != "mine" {
		t.Errorf("HTTP %d, the guest got %v", status, got)
	}
}

// A client that sends much more than the answer waits for still reads it.
func TestAnswerBeforeTheBodyHasCome(t *testing.T) {
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		// It reads on: a close would take the answer with it where the
		// gateway is slow to read that.
		control := http.NewResponseController(w)
		_ = control.EnableFullDuplex()
		w.Header().Set("Content-Length", "4")
		w.WriteHeader(http.StatusInsufficientStorage)
		fmt.Fprint(w, "full")
		_ = control.Flush()
		_, _ = io.Copy(io.Discard, r.Body)
	})
	e := serve(t, nil)
	for _, to := range []struct {
		host, kind string
		want       int
	}{
		{"evil.example", "application/json", 403},
		{port + "-" + idA + ".x", "application/octet-stream", 507},
		{closedPort(t) + "-" + idA + ".x", "application/octet-stream", 502},
	} {
		for name, client := range map[string]*http.Client{"HTTP/1": {Transport: &http.Transport{DisableKeepAlives: true}}, "HTTP/2": h2c(t)} {
			for _, length := range []int64{64 << 20, -1} {
				req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+e.addr+"/", io.LimitReader(zeros{}, 64<<20))
				if err != nil {
					t.Fatal(err)
				}
				req.Host, req.ContentLength = to.host, length
				req.Header.Set("Content-Type", to.kind)
				resp, err := client.Do(req)
				if err != nil {
					t.Errorf("%s to %s, length %d: %v", name, to.host, length, err)
					continue
				}
				if _, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != to.want {
					t.Errorf("%s to %s, length %d: HTTP %d, %v", name, to.host, length, resp.StatusCode, err)
				}
				resp.Body.Close()
			}
		}
	}
	e.quiet(t)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A small body that the guest does not read does not cost the connection.
func TestConnectionOutlivesAnUnreadBody(t *testing.T) {
	e := serve(t, nil)
	c := e.dial(t)
	r := bufio.NewReader(c)
	for range 3 {
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s-%s.x\r\nContent-Length: 4\r\n\r\nbody", closedPort(t), idA)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 502 {
			t.Errorf("HTTP %d, %v", resp.StatusCode, err)
		}
	}
	e.quiet(t)
}
