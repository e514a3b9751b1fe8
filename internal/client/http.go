package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

const (
	// maxAgentMessage bounds an answer of the agent's own, in bytes.
	maxAgentMessage = 64 << 20
	// maxAnswerHeader bounds the headers of an answer, which may be a guest's.
	maxAnswerHeader = 512 << 10
	// guestPatience bounds a call to a guest that has one short answer, and the
	// wait for a guest's answer to begin once a request is sent. The sandbox may
	// have to be resumed first.
	guestPatience = 5 * time.Minute
	dialTimeout   = 10 * time.Second
)

// transport makes a transport that reaches the agent and nothing else,
// whatever an answer or the environment says. A patience of 0 is without end.
func (h *Host) transport(patience time.Duration) *http.Transport {
	return &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return h.dial(ctx) },
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    dialTimeout,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxAnswerHeader,
		ResponseHeaderTimeout:  patience,
	}
}

// dial connects to the agent. Every connection of a Host is made here.
func (h *Host) dial(ctx context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: dialTimeout}
	if h.path != "" {
		return d.DialContext(ctx, "unix", h.path)
	}
	port := cmp.Or(h.base.Port(), map[string]string{"http": "80", "https": "443"}[h.base.Scheme])
	return d.DialContext(ctx, "tcp", net.JoinHostPort(h.base.Hostname(), port))
}

// dialHTTP1 connects to the agent for requests of HTTP/1.1 that are written by hand.
func (h *Host) dialHTTP1(ctx context.Context) (net.Conn, error) {
	conn, err := h.dial(ctx)
	if err != nil || h.base.Scheme != "https" {
		return conn, err
	}
	secure := tls.Client(conn, &tls.Config{ServerName: h.base.Hostname(), NextProtos: []string{"http/1.1"}})
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secure, nil
}

// withKey shows the API key of the caller.
type withKey struct {
	key  string
	next http.RoundTripper
}

func (k withKey) RoundTrip(req *http.Request) (*http.Response, error) {
	if k.key != "" {
		req = req.Clone(req.Context())
		req.Header.Set("X-API-KEY", k.key)
	}
	return k.next.RoundTrip(req)
}

// onlyTo is a client that takes a redirect for an answer like any other.
func onlyTo(next http.RoundTripper) *http.Client {
	return &http.Client{Transport: next, CheckRedirect: guest.NoRedirect}
}

// agentOptions are those of a Connect client of the agent.
func agentOptions() connect.ClientOption {
	return connect.WithClientOptions(
		connect.WithAcceptCompression("gzip", nil, nil),
		connect.WithReadMaxBytes(maxAgentMessage),
	)
}
