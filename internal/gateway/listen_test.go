package gateway

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// way is one way to the agent other than plain TCP.
type way struct {
	*edge
	dial func() net.Conn // speaks HTTP/1.1
}

// ways are TLS and the Unix socket, to one gateway each; roots is what TLS is checked
// with.
func ways(t *testing.T, change func(*Config)) (all map[string]way, roots *x509.CertPool) {
	t.Helper()
	issuer := httptest.NewTLSServer(nil)
	issuer.Close()
	roots = x509.NewCertPool()
	roots.AddCert(issuer.Certificate())
	withTLS := func(c *Config) {
		c.TLS = &tls.Config{Certificates: issuer.TLS.Certificates}
		if change != nil {
			change(c)
		}
	}
	secure := serve(t, withTLS)
	local := serve(t, withTLS)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- local.Serve(l) }()
	t.Cleanup(func() { local.Close(); <-served })
	open := func(c net.Conn, err error) net.Conn {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	return map[string]way{
		"TLS": {secure, func() net.Conn {
			c := open(net.Dial("tcp", secure.addr))
			return tls.Client(c, &tls.Config{RootCAs: roots, ServerName: "example.com", NextProtos: []string{"http/1.1"}})
		}},
		"Unix socket": {local, func() net.Conn { return open(net.Dial("unix", path)) }},
	}, roots
}

// send sends a request and returns the answer's head, and what comes after it.
func send(t *testing.T, c net.Conn, request string) (*http.Response, *bufio.Reader) {
	t.Helper()
	fmt.Fprint(c, request)
	r := bufio.NewReader(c)
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	return resp, r
}

// echo is a guest that answers POST at once, and speaks another protocol when asked.
func echo(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		fmt.Fprint(w, "guest")
		return
	}
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	_, _ = io.Copy(c, rw)
}

// What holds for plain TCP holds for TLS and the Unix socket.
func TestWaysIn(t *testing.T) {
	port := guest(t, echo)
	all, _ := ways(t, nil)
	for name, way := range all {
		t.Run(name, func(t *testing.T) {
			resp, _ := send(t, way.dial(), "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
			if body, err := io.ReadAll(resp.Body); string(body) != "control" {
				t.Errorf("control plane: %q, %v", body, err)
			}
			resp, _ = send(t, way.dial(), "GET / HTTP/1.1\r\nHost: localhost\r\nX: "+strings.Repeat("x", 2*maxHeaderBytes)+"\r\n\r\n")
			if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("a long header: HTTP %d", resp.StatusCode)
			}
			here := "Host: " + port + "-" + idA + ".x\r\n"
			c := way.dial()
			resp, r := send(t, c, "GET / HTTP/1.1\r\n"+here+"Connection: Upgrade\r\nUpgrade: x\r\n\r\n")
			said := make([]byte, 5)
			fmt.Fprint(c, "hello")
			if _, err := io.ReadFull(r, said); resp.StatusCode != http.StatusSwitchingProtocols || err != nil || string(said) != "hello" {
				t.Errorf("upgrade: HTTP %d, %q, %v", resp.StatusCode, said, err)
			}
			c = way.dial()
			resp, r = send(t, c, "CONNECT "+port+"-"+idA+".x:80 HTTP/1.1\r\n"+here+"\r\n")
			fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if all, err := io.ReadAll(r); resp.StatusCode != http.StatusOK || err != nil || !strings.HasSuffix(string(all), "guest") {
				t.Errorf("tunnel: HTTP %d, %q, %v", resp.StatusCode, all, err)
			}
			// The guest answers before the body has come; then the connection ends.
			resp, r = send(t, way.dial(), "POST / HTTP/1.1\r\n"+here+"Content-Length: 100\r\n\r\nhalf")
			if body, err := io.ReadAll(resp.Body); string(body) != "guest" {
				t.Errorf("half a body: %q, %v", body, err)
			}
			if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
				t.Errorf("after half a body: %q, %v", rest, err)
			}
			way.quiet(t)
		})
	}
}

// Connections over TLS count as those over TCP; those of the socket have a count of
// their own, so that a flood over TCP does not lock it.
func TestWaysInAreBounded(t *testing.T) {
	all, _ := ways(t, func(c *Config) { c.MaxConns, c.MaxConnsEach = 2, 2 })
	answered := func(c net.Conn) bool {
		fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		return err == nil && resp.StatusCode == http.StatusOK
	}
	for name, want := range map[string]int{"TLS": 2, "Unix socket": 4} {
		n := 0
		for range 4 {
			if answered(all[name].dial()) {
				n++
			}
		}
		if n != want {
			t.Errorf("%s: %d connections, want %d", name, n, want)
		}
	}
}

func TestHTTP2OverTLS(t *testing.T) {
	all, roots := ways(t, nil)
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "example.com"}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("https://" + all["TLS"].addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); resp.ProtoMajor != 2 || string(body) != "control" {
		t.Errorf("%s, %q, %v", resp.Proto, body, err)
	}
	// A client that speaks no TLS is told so.
	c := all["TLS"].edge.dial(t)
	fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("without TLS: %v, %v", resp, err)
	}
}
