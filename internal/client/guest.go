package client

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// maxRefusal bounds what is read of an answer that says what is wrong, in bytes.
const maxRefusal = 64 << 10

// toGuest is the client of what the agent passes on to a guest, and back. It
// shows the sandbox's token, and bounds no body: a file has any length.
func (h *Host) toGuest() *http.Client { return onlyTo(withToken{h, h.guest}) }

// dataPlane is toGuest for Connect.
func (h *Host) dataPlane() *http.Client {
	return onlyTo(guest.Bounded{Next: refusals{h, withToken{h, h.guest}}})
}

// processes and filesystem are clients of the sandbox's daemon, which act as
// user.
func (s *Sandbox) processes(user string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(s.host.dataPlane(), s.host.base.String(),
		guest.ClientOptions(), connect.WithInterceptors(guestHeaders{s.ID, user}))
}

func (s *Sandbox) filesystem(user string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(s.host.dataPlane(), s.host.base.String(),
		guest.ClientOptions(), connect.WithInterceptors(guestHeaders{s.ID, user}))
}

// request sends a plain HTTP request to the sandbox's daemon. Any answer but
// success is an error.
func (s *Sandbox) request(req *http.Request) (*http.Response, error) {
	guestHeaders{id: s.ID}.set(req.Header)
	resp, err := s.host.toGuest().Do(req)
	if err != nil {
		if cause := context.Cause(req.Context()); cause != nil {
			return nil, cause
		}
		if coded := new(connect.Error); errors.As(err, &coded) {
			return nil, coded // the agent's own, which had no token
		}
		return nil, connect.NewError(connect.CodeUnavailable, foreign(err))
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, s.refusal(req.Context(), resp)
}

// refusal makes an error of a plain HTTP answer.
func (s *Sandbox) refusal(ctx context.Context, resp *http.Response) error {
	var refusal struct{ Message string }
	if json.NewDecoder(io.LimitReader(resp.Body, maxRefusal)).Decode(&refusal) != nil || refusal.Message == "" {
		return fmt.Errorf("the host answered %s", errdefs.Foreign(resp.Status))
	}
	if resp.StatusCode == http.StatusBadGateway && refusal.Message == guestapi.SandboxNotFound {
		return s.absence(ctx, resp.Request)
	}
	return errors.New(errdefs.Foreign(refusal.Message))
}

// callOf names in messages what a request to the sandbox's daemon is for; one without a
// path is to a port.
func callOf(req *http.Request) string {
	if req.URL == nil {
		return "a request to a port"
	}
	path := req.URL.Path
	switch {
	case strings.HasPrefix(path, "/"+processconnect.ProcessName+"/"):
		return "exec"
	case path == guestapi.PathMetrics:
		return "top"
	}
	return "a copy" // /files, archives, and what filesystem.Filesystem says of files
}

// absence says why the data plane did not find the sandbox for a request: it says the
// same of all that do not run, because it does not know who asks.
func (s *Sandbox) absence(ctx context.Context, req *http.Request) error {
	info, err := s.Info(ctx)
	// A VM that has just ended is found no more a moment before its sandbox has.
	for began := time.Now(); err == nil && info.GetStatus() == "running" && time.Since(began) < endsWithin; {
		select {
		case <-time.After(endLook):
			info, err = s.Info(ctx)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	switch {
	case err != nil:
		return notFromTheWire(err)
	case info.GetStatus() == "running":
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("sandbox %s did not run a moment ago, and does now", s.ID))
	}
	return connect.NewError(connect.CodeFailedPrecondition,
		fmt.Errorf("sandbox %s is %s; %s needs it running", s.ID, StatusText(info), callOf(req)))
}

// notFromTheWire is an error of the agent's that is not taken for a guest's own word.
func notFromTheWire(err error) error {
	if coded := new(connect.Error); errors.As(err, &coded) && connect.IsWireError(err) {
		return connect.NewError(coded.Code(), errors.New(coded.Message()))
	}
	return err
}

// withToken shows the token of the sandbox that a request names.
type withToken struct {
	host *Host
	next http.RoundTripper
}

func (t withToken) RoundTrip(req *http.Request) (*http.Response, error) {
	token, err := t.host.Sandbox(req.Header.Get(guestapi.HeaderSandboxID)).Token(req.Context())
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, notFromTheWire(err)
	}
	req = req.Clone(req.Context())
	req.Header.Set(guestapi.HeaderToken, token)
	return t.next.RoundTrip(req)
}

// guestHeaders names a sandbox and a user in it to the data plane.
type guestHeaders struct{ id, user string }

func (h guestHeaders) set(header http.Header) {
	header.Set(guestapi.HeaderSandboxID, h.id)
	header.Set(guestapi.HeaderKeepalive, "50")
	if h.user != "" {
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(h.user+":")))
	}
}

func (h guestHeaders) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, guestPatience)
		defer cancel()
		h.set(req.Header())
		resp, err := next(ctx, req)
		return resp, foreign(err)
	}
}

func (h guestHeaders) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		h.set(conn.RequestHeader())
		return guestStream{conn}
	}
}

// guestStream is a stream whose errors may be a guest's words.
type guestStream struct{ connect.StreamingClientConn }

func (s guestStream) Receive(m any) error { return foreign(s.StreamingClientConn.Receive(m)) }

func (h guestHeaders) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

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

// refusals makes errors of the answers that the agent gives itself in place of
// a guest. They are plain HTTP, and Connect would read no more than the status.
type refusals struct {
	host *Host
	next http.RoundTripper
}

func (r refusals) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err != nil || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return resp, err
	}
	row, ok := errhttp.OfStatus(resp.StatusCode)
	if !ok {
		return resp, nil
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	resp.Body.Close()
	var refusal struct {
		Code    json.RawMessage
		Message string
	}
	if err == nil {
		err = json.Unmarshal(data, &refusal)
	}
	if err != nil || refusal.Message == "" {
		return nil, connect.NewError(row.Code, fmt.Errorf("the host answered %s", errdefs.Foreign(resp.Status)))
	}
	if bytes.HasPrefix(refusal.Code, []byte(`"`)) {
		// A code with a name is the guest's own error in Connect's form.
		resp.Body = io.NopCloser(bytes.NewReader(data))
		return resp, nil
	}
	if resp.StatusCode == http.StatusBadGateway && refusal.Message == guestapi.SandboxNotFound {
		return nil, r.host.Sandbox(req.Header.Get(guestapi.HeaderSandboxID)).absence(req.Context(), req)
	}
	return nil, connect.NewError(row.Code, errors.New(errdefs.Foreign(refusal.Message)))
}
