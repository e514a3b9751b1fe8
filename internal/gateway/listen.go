package gateway

import (
	"context"
	"crypto/tls"
	"io"
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
	maxLocal         = 1024 // connections to the Unix socket
	clientPrefixBits = 64   // of an IPv6 address: one client has all below it
)

// bounds count connections, in all and of one client.
type bounds struct {
	most, mostEach int

	refused atomic.Int64
	mu      sync.Mutex // over the fields below
	open    int
	each    map[netip.Prefix]int
}

func newBounds(most, mostEach int) *bounds {
	return &bounds{most: most, mostEach: mostEach, each: make(map[netip.Prefix]int)}
}

// listener accepts connections within bounds. It closes those above.
type listener struct {
	net.Listener
	*bounds
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		client := clientOf(c.RemoteAddr())
		if l.enter(client) {
			return &conn{Conn: c, leave: sync.OnceFunc(func() { l.leave(client) })}, nil
		}
		l.refused.Add(1)
		c.Close()
	}
}

// clientOf returns the client that a connection from an address counts for. All of a
// Unix socket are one.
func clientOf(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap()
	bits := ip.BitLen()
	if ip.Is6() && !ip.IsLoopback() {
		bits = clientPrefixBits
	}
	client, _ := ip.WithZone("").Prefix(bits) // no error: an address has so many
	return client
}

func (l *bounds) enter(client netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.most || l.each[client] >= l.mostEach {
		return false
	}
	l.open++
	l.each[client]++
	return true
}

func (l *bounds) leave(client netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.each[client]--; l.each[client] == 0 {
		delete(l.each, client)
	}
}

// conn is a client's connection. It counts until it is closed, also as a tunnel.
type conn struct {
	net.Conn // a *net.TCPConn or *net.UnixConn
	leave    func()

	mu      sync.Mutex
	stopped bool
}

type connKey struct{}

// withConn returns a context that knows the client's connection, also below TLS.
func withConn(ctx context.Context, c net.Conn) context.Context {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// ReadFrom lets the kernel copy where it can.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		return tcp.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{c.Conn}, r)
}

// CloseWrite ends the direction to the client.
func (c *conn) CloseWrite() error { return c.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// stopReading makes the read that is under way fail, and all later ones,
// whatever deadline is set; writes go on.
func (c *conn) stopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// Serve answers requests on a listener, which it closes, until Shutdown or Close. On
// TCP it speaks TLS if Config.TLS is set, on a Unix socket it never does; connections
// of the two are counted apart. It is called once for each listener.
func (g *Gateway) Serve(l net.Listener) error {
	if _, ok := l.Addr().(*net.UnixAddr); ok {
		return g.server.Serve(&listener{l, g.local})
	}
	if !g.secure {
		return g.server.Serve(&listener{l, g.tcp})
	}
	return g.server.ServeTLS(&listener{l, g.tcp}, "", "")
}

// Shutdown refuses new requests and waits, within ctx, for those under way.
func (g *Gateway) Shutdown(ctx context.Context) error { return g.server.Shutdown(ctx) }

// Close ends all connections except tunnels, which end with their guests.
func (g *Gateway) Close() error { return g.server.Close() }

func (g *Gateway) newServer(log *slog.Logger, secure *tls.Config) *http.Server {
	s := &http.Server{
		Handler:           g,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       betweenRequests,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		ConnContext:       withConn,
		TLSConfig:         secure,
	}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetHTTP2(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	return s
}
