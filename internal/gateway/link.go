package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"strconv"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/splice"
)

const (
	// dialTimeout bounds the wait for a guest that drops packets.
	dialTimeout = 5 * time.Second
	// idleTimeout is less than envd's, so that it never closes a connection
	// that is just being reused.
	idleTimeout = 5 * time.Minute
	idleConns   = 32
	// maxAnswerHeader bounds the headers of a guest's answer, in bytes.
	maxAnswerHeader = 256 << 10
	// maxInformational bounds the answers of 1xx before the one that counts.
	maxInformational = 16
	// maxUnread bounds what is kept of an HTTP/2 answer that its client does not
	// take, in bytes.
	maxUnread = 128 << 10
)

var (
	// errNotOpen: nothing listens on a port of a guest.
	errNotOpen = errors.New("the port is not open")

	errInformational = errors.New("the guest answers with 1xx again and again")
	errLongHeader    = errors.New("the headers of the guest's answer are too long")
)

// links has the link to each guest that runs. The zero value is ready; safe for
// concurrent use.
type links struct {
	mu   sync.Mutex
	open map[context.Context]*link
}

// link holds the connections to one run of one guest; no other guest gets them. A
// connection to envd is kept for later requests. A connection to a user's server
// is not: it would block a server that answers one client at a time, and a server
// that closes idle connections would now and then lose a request.
type link struct {
	lease *sandbox.Lease
	// By HTTP version; the kept are for envd.
	once1, once2, kept1, kept2 transport
}

// transport passes on every answer of a guest. The client decides whether it
// follows a redirect.
type transport struct{ *http.Transport }

// RoundTrip implements http.RoundTripper. The headers of each answer of 1xx are
// bounded, but not their number, where they are passed on.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	n := 0
	resp, err := t.Transport.RoundTrip(r.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(int, textproto.MIMEHeader) error {
			if n++; n > maxInformational {
				cancel(errInformational)
			}
			return nil
		},
	})))
	if err != nil {
		cancel(err)
		return nil, err
	}
	// The answer's body needs ctx for as long as the request's own lasts.
	context.AfterFunc(r.Context(), func() { cancel(nil) })
	return resp, nil
}

// of returns the link to the guest that the lease is on.
func (l *links) of(lease *sandbox.Lease) *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	if got := l.open[lease.Alive]; got != nil {
		return got
	}
	if l.open == nil {
		l.open = make(map[context.Context]*link)
	}
	made := &link{lease: lease}
	made.once1, made.kept1 = made.newTransport(false, false), made.newTransport(false, true)
	made.once2, made.kept2 = made.newTransport(true, false), made.newTransport(true, true)
	l.open[lease.Alive] = made
	context.AfterFunc(lease.Alive, func() {
		l.mu.Lock()
		delete(l.open, lease.Alive)
		l.mu.Unlock()
		made.close()
	})
	return made
}

func (l *link) newTransport(http2, keep bool) transport {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			conn, err := l.dial(ctx, addr)
			if b, ok := ctx.Value(bodyKey{}).(*body); ok && err == nil && !keep {
				return &answering{Conn: conn, body: b}, nil
			}
			return conn, err
		},
		DisableCompression:     true,
		DisableKeepAlives:      !keep,
		IdleConnTimeout:        idleTimeout,
		MaxIdleConnsPerHost:    idleConns,
		MaxResponseHeaderBytes: maxAnswerHeader,
		Protocols:              new(http.Protocols),
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerStream: maxUnread},
	}
	t.Protocols.SetHTTP1(!http2)
	t.Protocols.SetUnencryptedHTTP2(http2)
	return transport{t}
}

func (l *link) transport(r *http.Request, keep bool) http.RoundTripper {
	switch {
	case isGRPC(r) && keep:
		return l.kept2
	case isGRPC(r):
		return l.once2
	case keep:
		return l.kept1
	default:
		return l.once1
	}
}

func (l *link) close() {
	for _, t := range []transport{l.once1, l.once2, l.kept1, l.kept2} {
		t.CloseIdleConnections()
	}
}

// dial connects to a port of the guest: from outside or, where nothing listens
// there, to the guest's loopback, through envd.
func (l *link) dial(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := l.dialTCP(ctx, addr)
	if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
		return conn, err
	}
	inside, ierr := l.dialInside(ctx, netip.MustParseAddrPort(addr).Port())
	if ierr != nil {
		return nil, fmt.Errorf("%w: %w", errNotOpen, ierr)
	}
	return inside, nil
}

func (l *link) dialTCP(ctx context.Context, addr string) (net.Conn, error) {
	// A connection that was being made when the guest ended is not for the
	// next one at this address.
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if l.lease.Alive.Err() != nil {
		conn.Close()
		return nil, context.Cause(l.lease.Alive)
	}
	return conn, nil
}

// dialInside asks envd to connect to a port of the guest's loopback.
func (l *link) dialInside(ctx context.Context, port uint16) (_ net.Conn, err error) {
	if port == guestapi.Port {
		return nil, errNotOpen
	}
	conn, err := l.dialTCP(ctx, netip.AddrPortFrom(l.lease.Addr, guestapi.Port).String())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	target := net.JoinHostPort("localhost", strconv.Itoa(int(port)))
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n\r\n",
		target, target, guestapi.HeaderToken, l.lease.Token); err != nil {
		return nil, err
	}
	// The header is bounded, so that one without an end does not fill memory. The
	// stream that follows is not.
	header := &io.LimitedReader{R: conn, N: maxAnswerHeader}
	r := bufio.NewReader(header)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	switch {
	case err != nil && header.N <= 0:
		return nil, errLongHeader
	case err != nil:
		return nil, errors.New(errdefs.Foreign(err.Error()))
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("envd answered %s", errdefs.Foreign(resp.Status))
	}
	header.N = math.MaxInt64
	return &buffered{conn.(*net.TCPConn), r}, conn.SetDeadline(time.Time{})
}

// buffered is a connection of which some was read already.
type buffered struct {
	*net.TCPConn
	r *bufio.Reader
}

func (b *buffered) Read(p []byte) (int, error)         { return b.r.Read(p) }
func (b *buffered) WriteTo(w io.Writer) (int64, error) { return b.r.WriteTo(w) }

// tunnel makes the client's connection one to the guest's port, byte for byte,
// until one of them has ended.
func (g *Gateway) tunnel(w http.ResponseWriter, r *http.Request, link *link, addr string, fail func(http.ResponseWriter, error)) {
	guest, err := link.dial(r.Context(), addr)
	if err != nil {
		fail(w, err)
		return
	}
	defer guest.Close()
	client, rest, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "CONNECT needs HTTP/1.1", http.StatusNotImplemented)
		return
	}
	defer client.Close()
	// r's own context ends when this handler does; the guest's end ends both.
	defer context.AfterFunc(link.lease.Alive, func() { client.Close(); guest.Close() })()
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	splice.Run(client, guest, rest, guest)
}
