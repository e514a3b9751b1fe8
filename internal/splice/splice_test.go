package splice

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// pair returns the two ends of a TCP connection.
func pair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	far = conn.(*net.TCPConn)
	for _, c := range []net.Conn{near, far} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return near, far
}

// start joins two connections and returns their far ends.
func start(t *testing.T) (client, server *net.TCPConn, ends []net.Conn, done chan struct{}) {
	t.Helper()
	a, client := pair(t)
	b, server := pair(t)
	done = make(chan struct{})
	go func() {
		defer close(done)
		// As after a request whose reader has read on.
		Run(a, b, bufio.NewReader(a), b)
	}()
	return client, server, []net.Conn{a, b}, done
}

func TestRun(t *testing.T) {
	client, server, _, done := start(t)
	big := strings.Repeat("0123456789", 1<<20)
	go func() {
		_, _ = io.WriteString(client, big)
		_ = client.CloseWrite()
	}()
	// The end of one direction passes through while the other goes on.
	if got, err := io.ReadAll(server); err != nil || string(got) != big {
		t.Errorf("the server got %d bytes, %v", len(got), err)
	}
	if _, err := io.WriteString(server, "answer"); err != nil {
		t.Error(err)
	}
	select {
	case <-done:
		t.Error("it returned while one direction is open")
	case <-time.After(10 * time.Millisecond):
	}
	_ = server.CloseWrite()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Errorf("the client got %q, %v", got, err)
	}
	<-done
}

// Closing both connections ends it at any time.
func TestRunEndsWithItsConnections(t *testing.T) {
	client, _, ends, done := start(t)
	for _, c := range ends {
		c.Close()
	}
	<-done
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the client read %v", err)
	}
}
