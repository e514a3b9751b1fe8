package client

import (
	"cmp"
	"context"
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
	port := cmp.Or(h.base.Port(), map[string]string{"http": "80", "https": "443"}[h.base.Scheme])
	return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", net.JoinHostPort(h.base.Hostname(), port))
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
