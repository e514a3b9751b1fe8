package client

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// askWithin bounds the question why a call broke off; endsWithin is how long the agent
	// may take to see that a sandbox has ended, endLook how often it is asked.
	askWithin  = 5 * time.Second
	endsWithin = 2 * time.Second
	endLook    = 100 * time.Millisecond
)

// broken returns, in place of the error of a call to the sandbox that broke off, why: the
// sandbox has ended, or the agent does not answer any more. The connection alone tells
// nothing of it. Other errors come back unchanged, and those of a call whose sandbox runs.
func (s *Sandbox) broken(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || !brokeOff(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	for began := time.Now(); ; {
		info, infoErr := s.Info(ctx)
		switch status := info.GetStatus(); {
		case connect.CodeOf(infoErr) == connect.CodeNotFound:
			return errdefs.Unavailable.Errorf("sandbox %s has ended: it was destroyed", s.ID)
		case infoErr != nil:
			return errdefs.Unavailable.Errorf("the agent went away: %w", notFromTheWire(infoErr))
		case status == "stopped" || status == "stopping":
			why := info.GetReason()
			if detail := info.GetDetail(); detail != "" {
				why += ", " + detail
			}
			return errdefs.Unavailable.Errorf("sandbox %s has ended: %s; see wrenn logs %s", s.ID, why, s.ID)
		case status != "running":
			return errdefs.Unavailable.Errorf("sandbox %s is %s; the connection to it has ended", s.ID, StatusText(info))
		case time.Since(began) > endsWithin:
			return errdefs.Unavailable.Errorf("the connection to sandbox %s broke off, and it runs on: %v", s.ID, err)
		}
		select {
		case <-time.After(endLook):
		case <-ctx.Done():
			return err
		}
	}
}

// brokeOff says whether an error is of a connection that was open, and no one's word.
func brokeOff(err error) bool {
	if coded := new(connect.Error); errors.As(err, &coded) && connect.IsWireError(coded) {
		return false
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return false
	}
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE)
}
