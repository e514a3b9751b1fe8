// Package guest is the host's client of a guest's envd.
package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// maxClockError is by how much a restored guest's clock may be off, including
	// the time that its answer travels.
	maxClockError = 20 * time.Millisecond
	// maxCorrections bounds how often the guest is told the time again: on a busy
	// host several requests in a row may travel too long.
	maxCorrections = 10

	// A booting guest does not answer at all. Short attempts notice its first
	// answer sooner than the kernel's repetition of lost packets.
	probeDial    = 40 * time.Millisecond
	probeTimeout = 500 * time.Millisecond
	probeEvery   = 4 * time.Millisecond

	dialTimeout = 5 * time.Second
	initTimeout = 10 * time.Second
)

// Client speaks to one incarnation of one guest. Its connections are its own, so
// that none reaches the next guest at the same address. Close it when the
// incarnation ends. Safe for concurrent use.
type Client struct {
	base      string
	token     string
	conns     *conns
	transport *http.Transport
	http      *http.Client
	process   processconnect.ProcessClient
}

// New returns a client of the guest whose envd serves at addr. It does no I/O.
// token is sent with every request; empty for none.
func New(addr netip.AddrPort, token string) *Client {
	conns := &conns{addr: addr.String(), dialer: net.Dialer{Timeout: dialTimeout}}
	transport := newTransport(conns.dial)
	c := &Client{
		base: "http://" + addr.String(), token: token,
		conns: conns, transport: transport,
		http: &http.Client{Transport: withToken{Bounded{transport}, token}, CheckRedirect: NoRedirect},
	}
	c.process = processconnect.NewProcessClient(c.http, c.base, ClientOptions())
	return c
}

// Close drops all connections; requests that are under way fail, and so do later
// ones. Closing again does nothing.
func (c *Client) Close() {
	c.conns.closeAll()
	c.transport.CloseIdleConnections()
}

// HTTPClient speaks to the guest over the client's connections, with its
// token; for requests that this package has no method for. It follows no
// redirect, waits a minute at most for an answer's headers, and bounds no body.
func (c *Client) HTTPClient() *http.Client { return c.http }

// URL is the base URL of the guest's envd, without a slash at its end.
func (c *Client) URL() string { return c.base }

type withToken struct {
	next  http.RoundTripper
	token string
}

func (t withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set(guestapi.HeaderToken, t.token)
	}
	return t.next.RoundTrip(r)
}

// WaitReady returns when the guest's envd serves. Only ctx bounds the wait; its end
// is errdefs.Unavailable with the last attempt's error in the text.
func (c *Client) WaitReady(ctx context.Context) error {
	dialer := net.Dialer{Timeout: probeDial}
	transport := newTransport(func(ctx context.Context) (net.Conn, error) {
		return dialer.DialContext(ctx, "tcp", c.conns.addr)
	})
	transport.DisableKeepAlives = true
	probe := &http.Client{Timeout: probeTimeout, Transport: transport, CheckRedirect: NoRedirect}
	ticker := time.NewTicker(probeEvery)
	defer ticker.Stop()
	for {
		err := c.health(ctx, probe)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errdefs.Unavailable.Errorf("wait for the guest: %w (last attempt: %s)", context.Cause(ctx), plain(err))
		case <-ticker.C:
		}
	}
}

func (c *Client) health(ctx context.Context, client *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+guestapi.PathHealth, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("health answered %s", errdefs.Foreign(resp.Status))
	}
	return nil
}

// Init is what the host tells a guest after every boot and restore.
type Init struct {
	// AccessToken is what every later request must show; empty for none.
	AccessToken string
	// Time is the wall clock; zero means now.
	Time time.Time
	// Env are variables for every process; nil keeps the previous ones.
	Env map[string]string
	// DefaultUser and DefaultWorkdir are for requests that name none; empty
	// keeps the previous ones.
	DefaultUser    string
	DefaultWorkdir string
	Hostname       string
	SandboxID      string
	// Entropy is credited to the guest's random generator; at most 4096
	// bytes.
	Entropy []byte
	// Restored says that the guest was restored from a snapshot: it drops the
	// connections of before, and sets its clock however little it is off.
	Restored bool
	// NewBootID gives the guest another boot id, because another machine may
	// have read the one in the snapshot.
	NewBootID bool
	// CABundle holds certificates in PEM that the guest trusts from then on; empty changes
	// nothing.
	CABundle string
	// CloneKey opens, in the token's place, the first Init of a guest that is
	// restored from a snapshot of this one. This guest gets its digest only;
	// empty keeps the previous one.
	CloneKey string
	// again counts the corrections of the clock.
	again int
}

// Init initialises the guest. It may be repeated; an older Time than that of
// the last call changes nothing. version is that of E2B's daemon which the guest says it
// is, as in "0.6.4"; empty for a guest that says nothing of that form. Errors: a guest
// that knows another token is errdefs.Unauthenticated, one without the default user
// errdefs.NotFound, one that does not answer errdefs.Unavailable, and one of another
// protocol version errdefs.Unsupported.
func (c *Client) Init(ctx context.Context, in Init) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, initTimeout)
	defer cancel()
	stamp := in.Time.UTC()
	if in.Time.IsZero() {
		stamp = placeholder
	}
	body, err := json.Marshal(guestapi.InitRequest{
		Timestamp: &stamp, EnvVars: in.Env, AccessToken: in.AccessToken,
		DefaultUser: in.DefaultUser, DefaultWorkdir: in.DefaultWorkdir,
		Hostname: in.Hostname, SandboxID: in.SandboxID, Entropy: in.Entropy,
		Restored: in.Restored, NewBootID: in.NewBootID, CloneKey: digest(in.CloneKey), CABundle: in.CABundle,
	})
	if err != nil {
		return "", fmt.Errorf("initialise the guest: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+guestapi.PathInit, bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("initialise the guest: %w", err)
	}
	if in.Time.IsZero() {
		// A time that is taken before the connection is open would be too old.
		fresh := func() (io.ReadCloser, error) { return &stamped{body: body}, nil }
		req.Body, _ = fresh()
		req.GetBody = fresh
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return "", errdefs.Unavailable.Errorf("initialise the guest: %s", plain(err))
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxReason))
	if resp.StatusCode == http.StatusBadRequest && resp.Header.Get(guestapi.HeaderMissing) == guestapi.MissingUser {
		return "", errdefs.NotFound.Errorf("initialise the guest: it has no user %q", in.DefaultUser)
	}
	switch reason := errdefs.Foreign(string(text)); resp.StatusCode {
	case http.StatusNoContent:
		if version := resp.Header.Get(guestapi.HeaderProtocol); version != guestapi.Protocol {
			return "", errdefs.Unsupported.Errorf("initialise the guest: it speaks version %q of the guest protocol, this host %q",
				errdefs.Foreign(version), guestapi.Protocol)
		}
		return envdVersion(resp.Header.Get(guestapi.HeaderE2BVersion)), c.adjust(ctx, in, resp.Header.Get(guestapi.HeaderClock))
	case http.StatusUnauthorized:
		return "", errdefs.Unauthenticated.Errorf("initialise the guest: %s", reason)
	case http.StatusBadRequest:
		return "", errdefs.InvalidArgument.Errorf("initialise the guest: %s", reason)
	default:
		return "", errdefs.Unavailable.Errorf("initialise the guest: %s: %s", errdefs.Foreign(resp.Status), reason)
	}
}

// plainVersion is a version that every client of E2B can parse.
var plainVersion = regexp.MustCompile(`^[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}$`)

// envdVersion is what a guest says of its version, if that can be one.
func envdVersion(said string) string {
	if !plainVersion.MatchString(said) {
		return ""
	}
	return said
}

// digest is a secret's SHA-256, nil for none.
func digest(secret string) []byte {
	if secret == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

// adjust tells the guest the time again if the guest took too long to set it: a
// restored guest runs its first code slowly. clock is the guest's time when it
// answered.
func (c *Client) adjust(ctx context.Context, in Init, clock string) error {
	ns, err := strconv.ParseInt(clock, 10, 64)
	if err != nil || !in.Time.IsZero() || !in.Restored || in.again >= maxCorrections || time.Since(time.Unix(0, ns)).Abs() < maxClockError {
		return nil
	}
	_, err = c.Init(ctx, Init{AccessToken: in.AccessToken, Restored: true, again: in.again + 1})
	return err
}

// stampFormat is RFC 3339 in UTC with a fraction of fixed length.
const stampFormat = "2006-01-02T15:04:05.000000000Z"

// placeholder stands in a body for the present time, and is as long in JSON.
var placeholder = time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC)

// stamped is a body in which the present time replaces placeholder when the
// body is first read. The time is the first field of a body, so that no text of
// a user's that looks like placeholder is replaced in its stead.
type stamped struct {
	body   []byte
	reader *bytes.Reader
}

func (s *stamped) Read(p []byte) (int, error) {
	if s.reader == nil {
		now := time.Now().UTC().Format(stampFormat)
		s.reader = bytes.NewReader(bytes.Replace(s.body, []byte(placeholder.Format(stampFormat)), []byte(now), 1))
	}
	return s.reader.Read(p)
}

func (s *stamped) Close() error { return nil }

// Quiesce makes the guest write unsaved data to its disk. With quiet it also waits,
// for a few seconds at most, until the guest's CPUs are idle. Afterwards no
// connection is open, at the guest's end either.
func (c *Client) Quiesce(ctx context.Context, quiet bool) error {
	path := guestapi.PathQuiesce
	if quiet {
		path += "?" + guestapi.QueryQuiet + "=1"
	}
	_, err := c.still(ctx, path)
	return err
}

// Freeze stops the users' programs in the guest until the guest's next Init, which
// must follow, and makes the guest write unsaved data to its disk. So in a guest
// that is restored from a snapshot, no user's program runs before Init has set the
// identity. Afterwards no connection is open. After an error the programs may be
// stopped or not. A guest whose envd is too old is errdefs.Unsupported. The guest
// writes most of the data before it stops programs; ctx bounds all of it. since is when
// the guest began to stop programs, by its own word, and within the call.
func (c *Client) Freeze(ctx context.Context) (since time.Time, err error) {
	began := time.Now()
	header, err := c.still(ctx, guestapi.PathFreeze)
	if err != nil {
		return since, err
	}
	ms, err := strconv.ParseUint(header.Get(guestapi.HeaderStill), 10, 31)
	if err != nil { // an older envd
		return began, nil
	}
	if since = time.Now().Add(-time.Duration(ms) * time.Millisecond); since.Before(began) {
		since = began
	}
	return since, nil
}

// still sends a request over a connection of its own and returns when that
// connection has ended at both ends. header is that of the answer.
func (c *Client) still(ctx context.Context, path string) (header http.Header, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("quiesce the guest: %w", err)
	}
	req.Close = true
	raw, err := c.conns.dial(ctx)
	if err != nil {
		return nil, errdefs.Unavailable.Errorf("quiesce the guest: %s", plain(err))
	}
	last := &kept{raw}
	transport := newTransport(func(context.Context) (net.Conn, error) { return last, nil })
	resp, err := withToken{transport, c.token}.RoundTrip(req)
	if err != nil {
		raw.Close()
		return nil, errdefs.Unavailable.Errorf("quiesce the guest: %s", plain(err))
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNoContent:
	case http.StatusConflict:
		raw.Close()
		return nil, errdefs.Unavailable.Errorf(
			"quiesce the guest: one of its programs cannot be stopped now, it waits for a device or a file system")
	case http.StatusNotFound:
		raw.Close()
		return nil, errdefs.Unsupported.Errorf("quiesce the guest: it was made by an older agent, and does not know how to stop its programs")
	default:
		raw.Close()
		return nil, errdefs.Unavailable.Errorf("quiesce the guest: it answered %s", errdefs.Foreign(resp.Status))
	}
	last.part(ctx)
	c.transport.CloseIdleConnections()
	return resp.Header, nil
}

// plain is an error's text without the URL of the request: clients must not see
// addresses inside the host. The text of a guest is bounded.
func plain(err error) string { return errdefs.Foreign(bare(err)) }

func bare(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op + ": " + op.Err.Error()
	}
	var coded *connect.Error
	if errors.As(err, &coded) {
		return coded.Message()
	}
	if inner := errors.Unwrap(err); inner != nil {
		return inner.Error()
	}
	return err.Error()
}
