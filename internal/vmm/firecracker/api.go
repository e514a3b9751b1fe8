package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// callTimeout bounds a call whose caller sets no limit. A sound Firecracker
	// answers in milliseconds.
	callTimeout = 10 * time.Second
	// perGiB is added for each GiB of memory to the limit of a call that moves
	// the guest's memory; a slow disk takes that long.
	perGiB = 60 * time.Second
	// maxAnswer bounds an answer, in bytes.
	maxAnswer = 64 << 10
)

// The states of a VM, as GET / names them.
const (
	stateNotStarted = "Not started"
	stateRunning    = "Running"
	statePaused     = "Paused"
)

// request is one call of the API, with its body.
type request struct {
	method, path string
	body         any
}

// fault is Firecracker's answer to a call that it refuses; the call had no effect.
type fault struct {
	Message string `json:"fault_message"`
}

func (e *fault) Error() string { return errdefs.Foreign(e.Message) }

// client calls the API behind a Unix socket. It makes a connection for each call,
// so that it has none that could break between two calls.
type client struct{ http http.Client }

func newClient(socket string) *client {
	redirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &client{http: http.Client{CheckRedirect: redirect, Transport: &http.Transport{
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswer,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// call makes one call, bounded by ctx and limit, and decodes an answer into result.
// After an error that is no *fault it is not known whether the call took effect. If
// Firecracker does not answer the error is errdefs.Unavailable.
func (c *client) call(ctx context.Context, limit time.Duration, r request, result any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		errdefs.Unavailable.Errorf("the VMM did not answer within %s", limit))
	defer cancel()
	if err := c.exchange(ctx, r, result); err != nil {
		return fmt.Errorf("%s %s: %w", r.method, r.path, vmm.Cancelled(ctx, err))
	}
	return nil
}

func (c *client) exchange(ctx context.Context, r request, result any) error {
	body, err := r.encode()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, r.method, "http://localhost"+r.path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return errdefs.Unavailable.Errorf("the VMM does not answer: %w", cause(err))
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return errdefs.Unavailable.Errorf("the VMM does not answer: %w", err)
	}
	switch {
	case resp.StatusCode == http.StatusNoContent:
		return nil
	case resp.StatusCode >= 400 && resp.StatusCode < 500:
		var f fault
		if json.Unmarshal(answer, &f) != nil || f.Message == "" {
			f.Message = fmt.Sprintf("refused with status %d and no reason", resp.StatusCode)
		}
		return &f
	case resp.StatusCode != http.StatusOK:
		// It is not known whether the call took effect.
		return fmt.Errorf("the VMM answers with status %d: %s", resp.StatusCode, errdefs.Foreign(string(answer)))
	case result != nil:
		return json.Unmarshal(answer, result)
	}
	return nil
}

// encode renders the body.
func (r request) encode() ([]byte, error) {
	if r.body == nil {
		return nil, nil
	}
	return json.Marshal(r.body)
}

// cause returns what an HTTP client's error wraps, without the URL.
func cause(err error) error {
	for _, errno := range []unix.Errno{unix.ENOENT, unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, errno) {
			return errno
		}
	}
	if inner := errors.Unwrap(err); inner != nil {
		err = inner
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return errors.New(errdefs.Foreign(err.Error()))
}

// instance is the answer to GET /.
type instance struct {
	ID      string `json:"id"`
	State   string `json:"state"`
	Version string `json:"vmm_version"`
}

// describe asks for the VM's state.
func (c *client) describe(ctx context.Context, limit time.Duration) (i instance, err error) {
	err = c.call(ctx, limit, request{method: http.MethodGet, path: "/"}, &i)
	i.State = errdefs.Foreign(i.State)
	return i, err
}
