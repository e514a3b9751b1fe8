package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errClosed is the error of a closed client.
var errClosed = errors.New("the connection to the guest is closed")

// conns dials a guest's address and keeps the open connections, so that they end no
// later than the guest's incarnation. Safe for concurrent use.
type conns struct {
	addr   string
	dialer net.Dialer

	mu     sync.Mutex
	open   map[*conn]struct{}
	closed bool
}

type conn struct {
	net.Conn
	owner *conns
}

func (c *conns) dial(ctx context.Context) (net.Conn, error) {
	raw, err := c.dialer.DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		raw.Close()
		return nil, errClosed
	}
	if c.open == nil {
		c.open = make(map[*conn]struct{})
	}
	tracked := &conn{raw, c}
	c.open[tracked] = struct{}{}
	return tracked, nil
}

// closeAll closes the open connections and makes later dials fail.
func (c *conns) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for conn := range c.open {
		conn.Conn.Close()
	}
	clear(c.open)
}

// ReadFrom lets the kernel move a body from one socket to the other.
func (c *conn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

func (c *conn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

const (
	// partTimeout bounds the wait for a connection's end, partPoll is the time
	// between two looks at it.
	partTimeout = time.Second
	partPoll    = time.Millisecond
)

// kept is a connection that its transport does not close.
type kept struct{ net.Conn }

func (k *kept) Close() error { return nil }

// part ends the connection and returns when the guest has acknowledged the end. A
// guest that is snapshotted before that would repeat its last packets when it is
// restored.
func (k *kept) part(ctx context.Context) {
	defer k.Conn.Close()
	tracked, ok := k.Conn.(*conn)
	if !ok {
		return
	}
	tcp, ok := tracked.Conn.(*net.TCPConn)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = tcp.SetDeadline(time.Time{})
	if tcp.CloseWrite() != nil {
		return
	}
	if _, err := io.Copy(io.Discard, tcp); err != nil {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	tick := time.NewTicker(partPoll)
	defer tick.Stop()
	for {
		over := true
		_ = raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
			over = err != nil || info.State == unix.BPF_TCP_CLOSE
		})
		if over {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
