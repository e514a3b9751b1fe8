package gateway

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of the agent's server that Config does not set.
const (
	headerTimeout    = 10 * time.Second
	betweenRequests  = 10 * time.Minute
	maxHeaderBytes   = 64 << 10
	maxStreams       = 250
	pingAfter        = 30 * time.Second
	pingTimeout      = 15 * time.Second
	clientPrefixBits = 64 // of an IPv6 address: one client has all below it
)

// listener accepts a bounded number of connections, in all and of one client. It
// closes those above.
type listener struct {
	net.Listener
	most, mostEach int

	refused atomic.Int64
	mu      sync.Mutex
	open    int
	each    map[netip.Prefix]int
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		client := clientOf(c.RemoteAddr())
		if l.enter(client) {
			return &conn{TCPConn: c.(*net.TCPConn), leave: sync.OnceFunc(func() { l.leave(client) })}, nil
		}
		l.refused.Add(1)
		c.Close()
	}
}

// clientOf returns the client that a connection from an address counts for.
func clientOf(addr net.Addr) netip.Prefix {
	ip := addr.(*net.TCPAddr).AddrPort().Addr().Unmap()
	bits := ip.BitLen()
	if ip.Is6() && !ip.IsLoopback() {
		bits = clientPrefixBits
	}
	client, _ := ip.WithZone("").Prefix(bits) // no error: an address has so many
	return client
}

func (l *listener) enter(client netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.most || l.each[client] >= l.mostEach {
		return false
	}
	l.open++
	l.each[client]++
	return true
}

func (l *listener) leave(client netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.each[client]--; l.each[client] == 0 {
		delete(l.each, client)
	}
}

// conn is a client's connection. It counts until it is closed, also as a tunnel.
type conn struct {
	*net.TCPConn
	leave func()

	mu      sync.Mutex
	stopped bool
}

type connKey struct{}

// stopReading makes the read that is under way fail, and all later ones,
// whatever deadline is set; writes go on.
func (c *conn) stopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	_ = c.TCPConn.SetReadDeadline(time.Unix(1, 0))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return nil
	}
	return c.TCPConn.SetReadDeadline(t)
}

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *conn) Close() error {
	defer c.leave()
	return c.TCPConn.Close()
}

// Serve answers requests on a TCP listener, which it closes, until Shutdown or
// Close. It is called once.
func (g *Gateway) Serve(l net.Listener) error {
	g.listener.Listener = l
	return g.server.Serve(&g.listener)
}

// Shutdown refuses new requests and waits, within ctx, for those under way.
func (g *Gateway) Shutdown(ctx context.Context) error { return g.server.Shutdown(ctx) }

// Close ends all connections except tunnels, which end with their guests.
func (g *Gateway) Close() error { return g.server.Close() }

func (g *Gateway) newServer(log *slog.Logger) *http.Server {
	s := &http.Server{
		Handler:           g,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       betweenRequests,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	return s
}
