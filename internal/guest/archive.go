package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Unpack puts the entries of a tar stream below a directory of the guest, which is made
// with its parents. A directory that is there keeps its owner, mode and links to it; a
// file takes the place of a file. owner, as in "user:group", names the owner of all of it;
// if it is empty each entry has its own ids. An entry that cannot be meant, with ".."
// in its name for one, is errdefs.InvalidArgument, a full disk errdefs.Exhausted; what
// was unpacked before that stays.
func (c *Client) Unpack(ctx context.Context, dir, owner string, stream io.Reader) error {
	q := url.Values{guestapi.QueryPath: {dir}}
	if owner != "" {
		q.Set(guestapi.QueryOwner, owner)
	}
	body := &read{Reader: stream}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+guestapi.PathUnpack+"?"+q.Encode(), io.NopCloser(body))
	if err != nil {
		return fmt.Errorf("unpack into the guest: %w", err)
	}
	resp, err := c.http.Do(req)
	if failed := body.err.Load(); failed != nil {
		return fmt.Errorf("unpack into the guest: read the archive: %w", *failed)
	}
	if err != nil {
		return archiveError(ctx, "unpack into the guest", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return refusal("unpack into the guest", resp)
	}
	return nil
}

// read remembers why reading failed, which is not the guest's fault. A transport may read
// on for a moment after its answer.
type read struct {
	io.Reader
	err atomic.Pointer[error]
}

func (r *read) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err.Store(&err)
	}
	return n, err
}

// Pack writes what is at an absolute path of the guest as a tar stream to w: of a
// directory "./" and what is below it on the same file system, of a file one entry with
// its name. A link is followed where the path itself is one. What is not there is
// errdefs.NotFound. The stream is as long as the guest makes it; w bounds it.
func (c *Client) Pack(ctx context.Context, path string, w io.Writer) error {
	q := url.Values{guestapi.QueryPath: {path}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+guestapi.PathPack+"?"+q.Encode(), nil)
	if err != nil {
		return fmt.Errorf("pack in the guest: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return archiveError(ctx, "pack in the guest", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refusal("pack in the guest", resp)
	}
	out := &written{Writer: w}
	if _, err := io.Copy(out, resp.Body); err != nil {
		if out.err != nil {
			return fmt.Errorf("pack in the guest: write the archive: %w", out.err)
		}
		return archiveError(ctx, "pack in the guest", err)
	}
	return nil
}

// written remembers why writing failed.
type written struct {
	io.Writer
	err error
}

func (w *written) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err != nil {
		w.err = err
	}
	return n, err
}

func archiveError(ctx context.Context, verb string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return fmt.Errorf("%s: %w", verb, cause)
	}
	return errdefs.Unavailable.Errorf("%s: %s", verb, plain(err))
}

// refusal is the error of an answer that says what is wrong.
func refusal(verb string, resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxReason))
	var said guestapi.Error
	if json.Unmarshal(text, &said) == nil && said.Message != "" {
		text = []byte(said.Message)
	}
	reason := errdefs.Foreign(string(text))
	switch resp.StatusCode {
	case http.StatusNotFound:
		return errdefs.NotFound.Errorf("%s: %s", verb, reason)
	case http.StatusBadRequest, http.StatusForbidden:
		return errdefs.InvalidArgument.Errorf("%s: %s", verb, reason)
	case http.StatusInsufficientStorage:
		return errdefs.Exhausted.Errorf("%s: the disk of the sandbox is full", verb)
	default:
		return errdefs.Unavailable.Errorf("%s: %s: %s", verb, errdefs.Foreign(resp.Status), reason)
	}
}
