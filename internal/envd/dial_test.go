package envd

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
)

// Servers on the guest's loopback are reached through CONNECT, with the token
// and nowhere else.
func TestConnectToLoopback(t *testing.T) {
	s := New(Config{Log: quiet()})
	t.Cleanup(s.Close)
	sum := sha256.Sum256([]byte("secret"))
	s.state.token = &sum
	front := httptest.NewServer(s)
	defer front.Close()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("no %s here: %v", address, err)
			continue
		}
		defer l.Close()
		go upper(l)
		_, port, _ := net.SplitHostPort(l.Addr().String())
		for _, c := range []struct {
			target, token string
			status        int
		}{
			{"localhost:" + port, "secret", 200},
			{"localhost:" + port, "", 401},
			{"localhost:" + port, "wrong", 401},
			{"169.254.0.22:" + port, "secret", 400},
			{"localhost:1", "secret", 502},
			{"localhost", "secret", 400},
		} {
			status, answer := tunnelTo(t, front.Listener.Addr().String(), c.target, c.token)
			if status != c.status || status == 200 && answer != "THROUGH" {
				t.Errorf("%s with token %q: HTTP %d %q, want %d", c.target, c.token, status, answer, c.status)
			}
		}
	}
}

// upper answers each connection with what it sent, in capitals.
func upper(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		text, _ := io.ReadAll(conn)
		_, _ = conn.Write(bytes.ToUpper(text))
		conn.Close()
	}
}

// tunnelTo sends a word through a tunnel and returns what comes back.
func tunnelTo(t *testing.T, addr, target, token string) (status int, answer string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nX-Access-Token: %s\r\n\r\n", target, target, token)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, ""
	}
	fmt.Fprint(conn, "through")
	_ = conn.(*net.TCPConn).CloseWrite()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}
