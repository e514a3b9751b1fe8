package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
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

// transports are what every request of this program goes through: to the agent
// and nowhere else, whatever an answer or the environment says.
type transports struct {
	once          sync.Once
	agent, guests *http.Transport
}

func (c *client) transports() (agent, guests http.RoundTripper) {
	t := &c.http
	t.once.Do(func() {
		t.agent = c.newTransport()
		t.guests = c.newTransport()
		t.guests.ResponseHeaderTimeout = guestPatience
	})
	return t.agent, t.guests
}

func (c *client) newTransport() *http.Transport {
	return &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    dialTimeout,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxAnswerHeader,
	}
}

// dial connects to the agent.
func (c *client) dial(ctx context.Context) (net.Conn, error) {
	base, err := url.Parse(c.host)
	if err != nil {
		return nil, fmt.Errorf("--host: %w", err)
	}
	port := base.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[base.Scheme]
	}
	return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", net.JoinHostPort(base.Hostname(), port))
}

// toAgent is the client of the agent's own calls.
func (c *client) toAgent() *http.Client {
	agent, _ := c.transports()
	return &http.Client{Transport: agent, CheckRedirect: guest.NoRedirect}
}

// toGuest is the client of what the agent passes on to a guest, and back. It shows
// the sandbox's token and bounds no body: a file has any length.
func (c *client) toGuest() *http.Client {
	_, guests := c.transports()
	return &http.Client{Transport: withToken{c, guests}, CheckRedirect: guest.NoRedirect}
}

// dataPlane is toGuest for Connect.
func (c *client) dataPlane() *http.Client {
	guests := c.toGuest()
	guests.Transport = guest.Bounded{Next: refusals{guests.Transport}}
	return guests
}

// exitStatus is a process's end as shells count it.
var exitStatus = guest.ExitCode

// foreign is an error whose text may be a guest's, with no more of that than
// errors may quote.
func foreign(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	var coded *connect.Error
	switch {
	case !errors.As(err, &coded):
		return foreignError{err}
	case connect.IsWireError(coded):
		return connect.NewWireError(coded.Code(), errors.New(errdefs.Foreign(coded.Message())))
	default:
		return connect.NewError(coded.Code(), foreignError{coded.Unwrap()})
	}
}

type foreignError struct{ error }

func (e foreignError) Error() string { return errdefs.Foreign(e.error.Error()) }
func (e foreignError) Unwrap() error { return e.error }

// agentOptions are those of a Connect client of the agent.
func agentOptions() connect.ClientOption {
	return connect.WithClientOptions(
		connect.WithAcceptCompression("gzip", nil, nil),
		connect.WithReadMaxBytes(maxAgentMessage),
	)
}
