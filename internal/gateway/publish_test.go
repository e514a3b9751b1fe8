package gateway

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// What comes to a published port reaches the sandbox's, until the listener or ctx ends; a
// connection to a port that is not open ends at once.
func TestServePort(t *testing.T) {
	e := serve(t, nil)
	publish := func(port string) (addr string, end func()) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); e.ServePort(ctx, l, sandbox.ID(idA), uint16(n)) }()
		return l.Addr().String(), func() { cancel(); l.Close(); <-done }
	}
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.URL.Path, body)
	})
	addr, end := publish(port)
	resp, err := http.Get("http://" + addr + "/path")
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "/path " {
		t.Errorf("%q, %v", body, err)
	}
	resp.Body.Close()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	end() // with a connection open
	_ = conn.SetDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes of a connection that has ended", n)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("it still listens")
	}
	addr, end = publish(closedPort(t))
	defer end()
	shut, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer shut.Close()
	_ = shut.SetDeadline(time.Now().Add(patience))
	if _, err := shut.Read(make([]byte, 1)); err == nil {
		t.Error("a port that is not open sends something")
	}
}
