package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// forwarding runs `wrenn port` in this process until ctx ends, and returns the
// address that it prints, if it gets that far, and its error.
func forwarding(ctx context.Context, host string, args ...string) (addr string, ended chan error) {
	r, w := io.Pipe()
	ended = make(chan error, 1)
	go func() {
		root := newRoot()
		root.SetOut(w)
		root.SetArgs(append([]string{"--host", host, "port"}, args...))
		err := root.ExecuteContext(ctx)
		w.Close()
		ended <- err
	}()
	addr, _ = bufio.NewReader(r).ReadString('\n')
	go func() { _, _ = io.Copy(io.Discard, r) }()
	return strings.TrimSpace(addr), ended
}

// A port that cannot be reached is told before anything listens.
func TestPortThatCannotBeReached(t *testing.T) {
	for name, c := range map[string]struct {
		status, port, want string
	}{
		"the daemon's":     {"running", "49983", "not forwarded; without --listen its URL is printed"},
		"none":             {"running", "0", "not a number"},
		"too high":         {"running", "65536", "not a number"},
		"negative":         {"running", "-1", ""},
		"paused":           {"paused", "80", "is paused; its ports need it running"},
		"hibernated":       {"hibernated", "80", "is hibernated"},
		"creating":         {"creating", "80", "is creating"},
		"not understood":   {"unknown", "80", "is unknown"},
		"ended":            {"stopped", "80", "is stopped; its ports are gone"},
		"gone":             {"gone", "80", "does not exist"},
		"paused, a daemon": {"paused", "49983", "not forwarded"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			addr, ended := forwarding(ctx, (&clienttest.Agent{Status: c.status}).Serve(t), clienttest.ID, c.port, "--listen", "127.0.0.1:0")
			if addr != "" {
				t.Errorf("it listens on %s", addr)
				cancel()
			}
			if err := <-ended; err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A forward ends with its sandbox, and not with a server in it that is not
// there yet, or a pause.
func TestForwardEndsWithItsSandbox(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	h := &clienttest.Agent{Refusal: "no"}
	addr, ended := forwarding(ctx, h.Serve(t), clienttest.ID, "80", "--listen", "127.0.0.1:0")
	connection := func() {
		t.Helper()
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("read %d, %v", n, err)
		}
	}
	for _, status := range []string{"running", "paused", "running"} {
		h.SetStatus(status)
		connection()
		select {
		case err := <-ended:
			t.Fatalf("%s: ended with %v", status, err)
		default:
		}
	}
	h.SetStatus("stopped")
	connection()
	if err := <-ended; !errors.Is(err, client.ErrEnded) {
		t.Errorf("ended with %v", err)
	}
}
