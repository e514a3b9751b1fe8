package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
)

// errClosed is what a closed client answers with.
var errClosed = errors.New("the connection to the guest is closed")

// conns dials and knows the connections that are open, so that they end with
// the incarnation of the guest that they lead to, and no later. Safe for
// concurrent use.
type conns struct {
	dialer net.Dialer

	mu     sync.Mutex
	open   map[*conn]struct{}
	closed bool
}

type conn struct {
	net.Conn
	owner *conns
}

func (c *conns) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	raw, err := c.dialer.DialContext(ctx, network, addr)
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

// closeAll closes what is open and lets nothing be opened any more.
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
