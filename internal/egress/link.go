package egress

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

const (
	// maxHello is some times what programs send.
	maxHello = 20 << 10
	// maxLine bounds the first line of what is not TLS.
	maxLine = 8 << 10
	// alertWait bounds how long a refused client may take to go.
	alertWait = time.Second
	// deadlineStep is how long a deadline stands before it is put off again.
	deadlineStep = time.Second
)

// hear reads and keeps the client's first bytes, until they show the name of a
// server. It returns the name that TLS shows, "" if the client speaks something else;
// isHTTP says that each request will show one. Errors are refusals: of a client that
// says nothing within patience, of what began and did not go on, and of what only looks like
// TLS.
func (l *link) hear(patience time.Duration) (isHTTP bool, name string, err error) {
	l.client.SetReadDeadline(time.Now().Add(patience))
	defer l.client.SetReadDeadline(time.Time{})
	for len(l.heard) == 0 {
		if err := l.more(maxLine); err != nil {
			return false, "", refused("", "the client says nothing: %v", err)
		}
	}
	l.client.SetReadDeadline(time.Now().Add(firstBytes))
	switch c := l.heard[0]; {
	case c == 0x16: // a handshake record
		name, err := l.hello()
		return false, name, err
	case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c == '\r', c == '\n':
	default:
		return false, "", nil
	}
	// HTTP, if its first line says so. Empty lines, which some servers pass
	// over, are left to the strict parser to refuse.
	for {
		line, _, whole := bytes.Cut(l.heard, []byte("\n"))
		if whole {
			return bytes.Contains(bytes.ToUpper(line), []byte("HTTP/")) || len(bytes.TrimSpace(line)) == 0, "", nil
		}
		if err := l.more(maxLine); err != nil {
			return false, "", refused("", "the client's first line has no end: %v", err)
		}
	}
}

// more reads once, up to limit in all.
func (l *link) more(limit int) error {
	if len(l.heard) >= limit {
		return errors.New("too long")
	}
	buf := make([]byte, min(4096, limit-len(l.heard)))
	n, err := l.client.Read(buf)
	l.heard = append(l.heard, buf[:n]...)
	if n > 0 {
		return nil
	}
	return err
}

var errHello = errors.New("heard enough")

// hello reads a ClientHello, in however many records, and returns the name
// that it shows. crypto/tls is as strict a reader as there is: a name twice,
// an address or a trailing dot are errors.
func (l *link) hello() (string, error) {
	var name string
	var complete bool
	err := tls.Server(&listener{Conn: l.client, link: l}, &tls.Config{
		MinVersion: tls.VersionTLS10,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, complete = h.ServerName, true
			return nil, errHello
		},
	}).HandshakeContext(l.ctx)
	if !complete {
		return "", refused("", "not a TLS ClientHello: %v", err)
	}
	l.tls = true
	if name == "" {
		return "", nil
	}
	host, ok := canonical(name)
	if !ok {
		return "", denied(ruleNoName, name, "the name in the ClientHello is none")
	}
	return host, nil
}

// alert tells a client that has begun TLS that access is denied, and ends the
// connection. It waits a moment for the client to end it too: what is unread at a close
// resets the connection, and the client may then not see the alert.
func (l *link) alert() {
	const accessDenied = 49
	l.client.SetDeadline(time.Now().Add(alertWait))
	if _, err := l.client.Write([]byte{21, 3, 3, 0, 2, 2, accessDenied}); err != nil {
		return
	}
	l.client.CloseWrite()
	io.CopyN(io.Discard, l.client, maxHello)
}

// listener is the client's connection as crypto/tls sees it: what it reads is
// kept in link.heard, and what it would say is not sent.
type listener struct {
	net.Conn
	link *link
	at   int // of heard, passed on
}

func (c *listener) Read(b []byte) (int, error) {
	if c.at == len(c.link.heard) {
		if err := c.link.more(maxHello); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.link.heard[c.at:])
	c.at += n
	return n, nil
}

func (c *listener) Write(b []byte) (int, error) { return len(b), nil }

// relay carries bytes both ways until both sides are done, or one breaks, or
// nothing moves for idleTimeout.
func (l *link) relay(up *net.TCPConn) {
	if !l.flush(up) {
		return
	}
	var moved atomic.Int64
	down := make(chan struct{})
	go func() {
		defer close(down)
		l.copy(l.client, up, &moved)
	}()
	l.copy(up, l.client, &moved)
	<-down
}

// flush passes on what was heard.
func (l *link) flush(up *net.TCPConn) bool {
	_, err := up.Write(l.heard)
	l.heard = nil
	return err == nil
}

// copy carries bytes one way, as fast as the receiver takes them. The end of one
// direction is passed on as such.
func (l *link) copy(to, from *net.TCPConn, moved *atomic.Int64) {
	last := moved.Load()
	buf := make([]byte, relayBuffer)
	var set time.Time
	for {
		if now := time.Now(); now.Sub(set) > deadlineStep {
			set = now
			from.SetReadDeadline(now.Add(idleTimeout))
		}
		n, err := from.Read(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil && err == nil {
				err = werr
			}
		}
		now := moved.Add(int64(n))
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			to.CloseWrite()
			return
		case errors.Is(err, net.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded) && now != last:
			// The other direction counts as well.
			set = time.Time{}
		default:
			l.cancel()
			return
		}
		last = now
	}
}

// linkKey finds the link of an HTTP request in its context.
type linkKey struct{}

func linkOf(ctx context.Context) *link {
	l, _ := ctx.Value(linkKey{}).(*link)
	return l
}
