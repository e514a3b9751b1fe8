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
	"strings"
	"testing"
	"time"
)

// viaHeaders and viaHost are the two ways to name a sandbox and a port.
func viaHeaders(t testing.TB, b *sandbox, port int, method, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, b.a.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("E2b-Sandbox-Id", b.id)
	if port != 0 {
		req.Header.Set("E2b-Sandbox-Port", fmt.Sprint(port))
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
	if err := json.Unmarshal([]byte(body), &refusal); err != nil || refusal.Code != status || refusal.Message == "" || refusal.SandboxID == "" {
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
	b.sh(`mkdir -p /srv/web && cd /srv/web && echo "hello from $(hostname)" >hello.txt && head -c 3000000 /dev/urandom >big && sha256sum big >big.sha256
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
			if status, body, header := answer(t, via(t, b, port, "HEAD", "/big")); status != 200 || body != "" || header.Get("Content-Length") != "3000000" {
				t.Errorf("HEAD: HTTP %d, %v", status, header)
			}
			if _, body, _ := answer(t, via(t, b, port, "GET", "/big")); len(body) != 3000000 || !strings.HasPrefix(b.sh("cat /srv/web/big.sha256"), sum(body)) {
				t.Errorf("%d bytes, or others than were sent", len(body))
			}
			wantRefusal(t, via(t, b, 8124, "GET", "/"), 502, "8124", b.id)
			gone := &sandbox{t, b.a, "sb-0123456789abcdef"}
			wantRefusal(t, via(t, gone, port, "GET", "/"), 404, gone.id)
			for _, path := range []string{"/init", "/freeze", "/upgrade"} {
				wantRefusal(t, via(t, b, 49983, "POST", path), 404, "reserved")
			}
			// Nor by another spelling of the same path.
			for _, path := range []string{"//init", "/./init", "/x/../init", "/%69nit", "/init/", "/init?x=y"} {
				if status, body, _ := answer(t, via(t, b, 49983, "POST", path)); status < 300 {
					t.Errorf("%s: HTTP %d %s", path, status, body)
				}
			}
			if status, body, _ := answer(t, via(t, b, 49983, "GET", "/health")); status != 204 {
				t.Errorf("envd's health: HTTP %d %s", status, body)
			}
			if err := b.pause(); err != nil {
				t.Fatal(err)
			}
			wantRefusal(t, via(t, b, port, "GET", "/"), 409, "paused")
			wantRefusal(t, via(t, b, 49983, "GET", "/health"), 409, "paused")
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
		req.Header.Set("E2b-Sandbox-Port", bad)
		wantRefusal(t, req, 400, "port")
	}
	wantRefusal(t, viaHeaders(t, &sandbox{t, b.a, "../../etc/passwd"}, 80, "GET", "/"), 404)
	// A token that the caller brings is checked.
	req := viaHeaders(t, b, 49983, "GET", "/envs")
	req.Header.Set("X-Access-Token", "wrong")
	if status, body, _ := answer(t, req); status != 401 {
		t.Errorf("a wrong token: HTTP %d %s", status, body)
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
