package e2e_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// viaHeaders and viaHost are the two ways to name a sandbox and a port.
func viaHeaders(t testing.TB, b *sandbox, port int, method, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, b.a.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(guestapi.HeaderSandboxID, b.id)
	if port != 0 {
		req.Header.Set(guestapi.HeaderSandboxPort, fmt.Sprint(port))
	}
	if port == 0 || port == guestapi.Port {
		b.address(req.Header)
	}
	return req
}

func viaHost(t testing.TB, b *sandbox, port int, method, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, b.a.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = fmt.Sprintf("%d-%s.sandboxes.example", port, b.id)
	if port == guestapi.Port {
		b.address(req.Header)
	}
	return req
}

// answer is what a request got.
func answer(t testing.TB, req *http.Request) (status int, body string, header http.Header) {
	t.Helper()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text), resp.Header
}

// wantRefusal checks an answer of the proxy's own.
func wantRefusal(t testing.TB, req *http.Request, status int, words ...string) {
	t.Helper()
	began := time.Now()
	got, body, header := answer(t, req)
	if got != status || !strings.HasPrefix(header.Get("Content-Type"), "application/json") {
		t.Errorf("%s %s: HTTP %d %s, want %d and JSON", req.Host, req.URL.Path, got, body, status)
		return
	}
	var refusal struct {
		Code      int
		Message   string
		SandboxID string
	}
	if err := json.Unmarshal([]byte(body), &refusal); err != nil || refusal.Code != status || refusal.Message == "" ||
		refusal.SandboxID == "" && status != 404 {
		t.Errorf("refused with %q (%v)", body, err)
	}
	for _, w := range words {
		if !strings.Contains(refusal.Message, w) {
			t.Errorf("%q does not say %q", refusal.Message, w)
		}
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("refused after %s", took)
	}
}

func TestDataPlane(t *testing.T) {
	b := sharedBox(t)
	const port = 8123
	b.sh(`mkdir -p /srv/web && cd /srv/web && echo "hello from $(hostname)" >hello.txt &&
		head -c 3000000 /dev/urandom >big && sha256sum big >big.sha256
nohup python3 -m http.server 8123 >/dev/null 2>&1 & echo $! >/srv/pid`)
	defer b.sh("kill $(cat /srv/pid); rm -r /srv/web /srv/pid")
	waitFor(t, "the guest's web server", func() bool {
		status, _, _ := answer(t, viaHeaders(t, b, port, "GET", "/hello.txt"))
		return status == 200
	})
	for name, via := range map[string]func(testing.TB, *sandbox, int, string, string) *http.Request{"headers": viaHeaders, "host": viaHost} {
		t.Run(name, func(t *testing.T) {
			if status, body, _ := answer(t, via(t, b, port, "GET", "/hello.txt?x=1")); status != 200 || body != "hello from "+b.id+"\n" {
				t.Errorf("HTTP %d %q", status, body)
			}
			if status, _, _ := answer(t, via(t, b, port, "GET", "/missing")); status != 404 {
				t.Errorf("a missing page: HTTP %d", status)
			}
			if status, body, header := answer(t, via(t, b, port, "HEAD", "/big")); status != 200 || body != "" ||
				header.Get("Content-Length") != "3000000" {
				t.Errorf("HEAD: HTTP %d, %v", status, header)
			}
			if _, body, _ := answer(t, via(t, b, port, "GET", "/big")); len(body) != 3000000 ||
				!strings.HasPrefix(b.sh("cat /srv/web/big.sha256"), sum(body)) {
				t.Errorf("%d bytes, or others than were sent", len(body))
			}
			wantRefusal(t, via(t, b, 8124, "GET", "/"), 502, "The sandbox is running but port is not open")
			gone := &sandbox{t, b.a, "sb-0123456789abcdef"}
			wantRefusal(t, via(t, gone, port, "GET", "/"), 502, "The sandbox was not found")
			// However they are spelled.
			for _, path := range []string{
				"/init", "/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade",
				"//init", "/./init", "/x/../init", "/%69nit", "/%2finit", "/%2e/init", "/init/", "/init//", "/init?x=y", "/../init",
			} {
				wantRefusal(t, via(t, b, guestapi.Port, "POST", path), 404, "reserved")
			}
			if status, body, _ := answer(t, via(t, b, guestapi.Port, "GET", "/health")); status != 204 {
				t.Errorf("envd's health: HTTP %d %s", status, body)
			}
			if err := b.pause(); err != nil {
				t.Fatal(err)
			}
			wantRefusal(t, via(t, b, port, "GET", "/"), 502, "The sandbox was not found")
			wantRefusal(t, via(t, b, guestapi.Port, "GET", "/envs"), 502, "The sandbox was not found")
			wantRefusal(t, via(t, b, guestapi.Port, "GET", "/health"), 502, "The sandbox was not found")
			if err := b.resume(); err != nil {
				t.Fatal(err)
			}
			if status, _, _ := answer(t, via(t, b, port, "GET", "/hello.txt")); status != 200 {
				t.Errorf("after the pause: HTTP %d", status)
			}
		})
	}

	// envd is the default port; bad names get an answer, too.
	if status, body, _ := answer(t, viaHeaders(t, b, 0, "GET", "/health")); status != 204 {
		t.Errorf("without a port: HTTP %d %s", status, body)
	}
	for _, bad := range []string{"0", "-1", "65536", "http", "99999999999999999999"} {
		req := viaHeaders(t, b, 0, "GET", "/")
		req.Header.Set(guestapi.HeaderSandboxPort, bad)
		wantRefusal(t, req, 400, "port")
	}
	wantRefusal(t, viaHeaders(t, &sandbox{t, b.a, "../../etc/passwd"}, 80, "GET", "/"), 502, "The sandbox was not found")
	// The caller's token is what counts; the gateway adds none.
	for token, want := range map[string]int{b.token(): 200, "wrong": 401, "": 401} {
		for name, req := range map[string]*http.Request{"headers": viaHeaders(t, b, guestapi.Port, "GET", "/envs"),
			"host": viaHost(t, b, guestapi.Port, "GET", "/envs")} {
			if req.Header.Set(guestapi.HeaderToken, token); token == "" {
				req.Header.Del(guestapi.HeaderToken)
			}
			if status, body, _ := answer(t, req); status != want {
				t.Errorf("%s, the token %q: HTTP %d %s, want %d", name, token, status, body, want)
			}
		}
	}
}

// What the guest sends arrives when it is sent, and bytes go both ways over a
// connection that is no longer HTTP.
func TestDataPlaneStreams(t *testing.T) {
	b := sharedBox(t)
	b.sh(`cat >/tmp/server.py <<'END'
import socket, threading
def serve(c):
    head = b""
    while b"\r\n\r\n" not in head:
        head += c.recv(4096)
    if b"Upgrade: echo" in head:
        c.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := c.recv(4096):
            c.sendall(data.upper())
    else:
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        c.sendall(b"6\r\nfirst\n\r\n")
        c.recv(1)
    c.close()
l = socket.socket(); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
l.bind(("0.0.0.0", 8125)); l.listen()
while True:
    c, _ = l.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()
END
nohup python3 /tmp/server.py >/dev/null 2>&1 & echo $! >/tmp/server.pid`)
	defer b.sh("kill $(cat /tmp/server.pid); rm /tmp/server.*")
	var resp *http.Response
	waitFor(t, "the guest's server", func() bool {
		var err error
		if resp, err = http.DefaultClient.Do(viaHeaders(t, b, 8125, "GET", "/events")); err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 200 {
			resp.Body.Close()
		}
		return resp.StatusCode == 200
	})
	defer resp.Body.Close()
	arrived := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(resp.Body).ReadString('\n')
		arrived <- line
	}()
	select {
	case line := <-arrived:
		if line != "first\n" {
			t.Errorf("got %q", line)
		}
	case <-time.After(5 * time.Second):
		t.Error("the first event waits for the second")
	}

	conn, err := net.Dial("tcp", b.a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: 8125-%s.x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", b.id)
	r := bufio.NewReader(conn)
	upgraded, err := http.ReadResponse(r, nil)
	if err != nil || upgraded.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", upgraded, err)
	}
	for _, word := range []string{"both", "ways"} {
		fmt.Fprintln(conn, word)
		if line, err := r.ReadString('\n'); err != nil || line != strings.ToUpper(word)+"\n" {
			t.Errorf("sent %s, got %q, %v", word, line, err)
		}
	}
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

// echoServer runs testdata/echo at an address in the sandbox until stopped.
func (b *sandbox) echoServer(addr string) (stop func()) {
	b.t.Helper()
	bin := filepath.Join(b.t.TempDir(), "echo")
	build := exec.Command("go", "build", "-o", bin, "./testdata/echo")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.t.Fatalf("build echo: %v\n%s", err, out)
	}
	f, err := os.Open(bin)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	req := viaHeaders(b.t, b, 0, "POST", "/files?path=/tmp/echo")
	req.Body = f
	if status, body, _ := answer(b.t, req); status != 200 {
		b.t.Fatalf("upload echo: HTTP %d %s", status, body)
	}
	pid := b.sh("chmod 755 /tmp/echo && (nohup /tmp/echo '" + addr + "' >/dev/null 2>&1 & echo $!)")
	_, text, _ := net.SplitHostPort(addr)
	port, err := strconv.Atoi(text)
	if err != nil {
		b.t.Fatal(err)
	}
	waitFor(b.t, "the echo server", func() bool {
		status, _, _ := answer(b.t, viaHeaders(b.t, b, port, "GET", "/"))
		return status == 200
	})
	return func() { b.sh("kill " + pid + "; rm -f /tmp/echo") }
}

// What a guest's server and its client send passes both ways at once, in the
// protocol that they need, with trailers; one on the guest's loopback is
// reached as well.
func TestDataPlaneBothWays(t *testing.T) {
	b := sharedBox(t)
	defer b.echoServer("127.0.0.1:8126")()
	h2c := new(http.Protocols)
	h2c.SetUnencryptedHTTP2(true)
	for name, c := range map[string]struct {
		client      *http.Client
		contentType string
		want        string
	}{
		"HTTP/1.1":           {&http.Client{Transport: &http.Transport{}}, "text/plain", "HTTP/1.1"},
		"h2c":                {&http.Client{Transport: &http.Transport{Protocols: h2c}}, "text/plain", "HTTP/1.1"},
		"gRPC's way of HTTP": {&http.Client{Transport: &http.Transport{Protocols: h2c}}, "application/grpc", "HTTP/2.0"},
	} {
		t.Run(name, func(t *testing.T) {
			defer c.client.CloseIdleConnections()
			body, lines := io.Pipe()
			defer lines.Close()
			req := viaHeaders(t, b, 8126, "POST", "/")
			req.Body = body
			req.Header.Set("Content-Type", c.contentType)
			resp, err := c.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got := resp.Header.Get("X-Protocol"); got != c.want {
				t.Errorf("the guest was spoken to in %s, want %s", got, c.want)
			}
			if got := resp.Header.Get("X-Headers"); strings.Contains(got, "Sandbox") || strings.Contains(got, "Token") ||
				!strings.Contains(got, "X-Forwarded-For") {
				t.Errorf("the guest got the headers %s", got)
			}
			r := bufio.NewReader(resp.Body)
			for _, word := range []string{"both", "ways", "at once"} {
				fmt.Fprintln(lines, word)
				if line, err := r.ReadString('\n'); err != nil || line != strings.ToUpper(word)+"\n" {
					t.Fatalf("sent %s, got %q, %v", word, line, err)
				}
			}
			lines.Close()
			if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 || resp.Trailer.Get("X-Lines") != "3" {
				t.Errorf("at the end: %q, %v, trailers %v", rest, err, resp.Trailer)
			}
		})
	}
	t.Run("no connection is used twice", func(t *testing.T) {
		_, _, first := answer(t, viaHeaders(t, b, 8126, "GET", "/"))
		_, _, second := answer(t, viaHeaders(t, b, 8126, "GET", "/"))
		if first.Get("X-Client") == second.Get("X-Client") {
			t.Errorf("both came from %s", first.Get("X-Client"))
		}
	})
	t.Run("a long header", func(t *testing.T) {
		req := viaHeaders(t, b, 8126, "GET", "/")
		req.Header.Set("X-Long", strings.Repeat("x", 100<<10))
		if status, _, _ := answer(t, req); status != 431 {
			t.Errorf("HTTP %d", status)
		}
	})
}

// gRPC reaches envd.
func TestDataPlaneGRPC(t *testing.T) {
	b := sharedBox(t)
	h2c := new(http.Protocols)
	h2c.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: h2c}
	defer transport.CloseIdleConnections()
	guest := processconnect.NewProcessClient(&http.Client{Transport: transport}, b.a.url, connect.WithGRPC())
	req := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "sh", Args: []string{"-c", "echo by gRPC; exit 3"}}})
	b.address(req.Header())
	stream, err := guest.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var out []byte
	code := int32(-1)
	for stream.Receive() {
		out = append(out, stream.Msg().GetEvent().GetData().GetStdout()...)
		if end := stream.Msg().GetEvent().GetEnd(); end != nil {
			code = end.ExitCode
		}
	}
	if stream.Err() != nil || string(out) != "by gRPC\n" || code != 3 {
		t.Errorf("got %q, %d, %v", out, code, stream.Err())
	}
	none := &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: 1 << 30}}
	missing := connect.NewRequest(&process.ConnectRequest{Process: none})
	b.address(missing.Header())
	gone, err := guest.Connect(t.Context(), missing)
	if err == nil {
		for gone.Receive() {
		}
		err = gone.Err()
	}
	wantCode(t, err, connect.CodeNotFound, "not found")
}

// A sandbox does not expire under an open stream, but when that has ended.
func TestDataPlaneIsActivity(t *testing.T) {
	a := sharedAgent(t)
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256, TimeoutSec: 2})
	b.sh("(nohup python3 -m http.server 8127 >/dev/null 2>&1 &)")
	waitFor(t, "the guest's web server", func() bool {
		status, _, _ := answer(t, viaHeaders(t, b, 8127, "HEAD", "/"))
		return status == 200
	})
	conn, err := net.Dial("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT 8127-%s.x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b.id)
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: "CONNECT"})
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("connect: %v, %v", resp, err)
	}
	for began := time.Now(); time.Since(began) < 4*time.Second; time.Sleep(100 * time.Millisecond) {
		if s := b.info(); s == nil || s.Status != "running" {
			t.Fatalf("after %s of an open connection: %v", time.Since(began), s)
		}
	}
	conn.Close()
	took := b.waitStopped("expired")
	t.Logf("expired %s after the connection's end", took)
	if took < time.Second || took > 10*time.Second {
		t.Errorf("expired after %s", took)
	}
	wantRefusal(t, viaHeaders(t, b, 8127, "GET", "/"), 502, "The sandbox was not found")
}

// What a stranger's web page can make a browser send gets nowhere, and what
// E2B's clients do in a browser works with the token.
func TestWebPagesStayOutside(t *testing.T) {
	b := sharedBox(t)
	request := func(method, host, path, body string, headers ...string) *http.Request {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, b.a.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if host != "" {
			req.Host = host
		}
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		return req
	}
	const create, page = "/hostagent.v1.HostAgentService/CreateSandbox", "http://page.example"
	envd := fmt.Sprintf("%d-%s.localhost", guestapi.Port, b.id)
	form := "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nx\r\n--x--\r\n"
	multipart := "multipart/form-data; boundary=x"
	for name, c := range map[string]struct {
		req  *http.Request
		want int
	}{
		"rebinding":          {request("POST", "evil.example", create, "{}", "Content-Type", "application/json"), 403},
		"rebinding, metrics": {request("GET", "evil.example", "/metrics", ""), 403},
		"a page":             {request("POST", "", create, "{}", "Content-Type", "application/json", "Origin", page), 403},
		"a page of a sandbox": {request("POST", "", create, "{}", "Content-Type", "application/json", "Origin",
			"http://8000-"+b.id+".localhost"), 403},
		"a form":               {request("POST", "", create, "{}", "Content-Type", "text/plain"), 403},
		"an image":             {request("GET", "", "/metrics", "", "Sec-Fetch-Site", "cross-site"), 403},
		"an unknown field":     {request("POST", "", create, `{"colour":"blue"}`, "Content-Type", "application/json"), 400},
		"by header, rebinding": {request("GET", "evil.example", "/health", "", guestapi.HeaderSandboxID, b.id), 403},
		"another by header":    {request("GET", "8000-sb-0123456789abcdef.localhost", "/health", "", guestapi.HeaderSandboxID, b.id), 400},
		"files without token":  {request("POST", envd, "/files?path=/tmp/page", form, "Content-Type", multipart, "Origin", page), 401},
		"processes without":    {request("POST", envd, "/process.Process/List", "{}", "Content-Type", "application/json", "Origin", page), 401},
		"health without":       {request("GET", envd, "/health", "", "Origin", page), 204},
		"files with token": {request("POST", envd, "/files?path=/tmp/page", form, "Content-Type", multipart, "Origin", page,
			guestapi.HeaderToken, b.token()), 200},
		"a question of a browser's": {request("OPTIONS", envd, "/process.Process/Start", "", "Origin", page,
			"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-access-token,content-type"), 204},
	} {
		status, body, header := answer(t, c.req)
		if status != c.want {
			t.Errorf("%s: HTTP %d %s, want %d", name, status, body, c.want)
		}
		// What answers by a sandbox's own host name is for pages, too.
		if open := header.Get("Access-Control-Allow-Origin"); open != "" && !strings.Contains(c.req.Host, "-sb-") {
			t.Errorf("%s: pages of %s may read it", name, open)
		}
	}
	if _, metrics, _ := answer(t, request("GET", "localhost", "/metrics", "")); !strings.Contains(metrics,
		"\nwrenn_panics_total 0\n") || !strings.Contains(metrics, "\nwrenn_connections_refused_total 0\n") {
		t.Error("panics or refused connections, or they are not counted")
	}
}
