package server

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// codes is the one table from error classes to Connect codes.
var codes = map[*errdefs.Class]connect.Code{
	errdefs.InvalidArgument: connect.CodeInvalidArgument,
	errdefs.Unauthenticated: connect.CodeUnauthenticated,
	errdefs.Denied:          connect.CodePermissionDenied,
	errdefs.NotFound:        connect.CodeNotFound,
	errdefs.AlreadyExists:   connect.CodeAlreadyExists,
	errdefs.WrongState:      connect.CodeFailedPrecondition,
	errdefs.Busy:            connect.CodeAborted,
	errdefs.Exhausted:       connect.CodeResourceExhausted,
	errdefs.Unsupported:     connect.CodeUnimplemented,
	errdefs.Unavailable:     connect.CodeUnavailable,
	errdefs.TimedOut:        connect.CodeDeadlineExceeded,
	errdefs.Corrupt:         connect.CodeDataLoss,
}

// mapErrors turns errors into what clients may see: the text of a classed one;
// of any other only a reference, under which the log has the text.
type mapErrors struct{ log *slog.Logger }

func (m mapErrors) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		if err != nil {
			return nil, connectError(m.log, req.Spec().Procedure, err)
		}
		return resp, nil
	}
}

func (m mapErrors) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := next(ctx, conn); err != nil {
			return connectError(m.log, conn.Spec().Procedure, err)
		}
		return nil
	}
}

func (m mapErrors) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func connectError(log *slog.Logger, procedure string, err error) error {
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	if code, ok := codes[errdefs.ClassOf(err)]; ok {
		return connect.NewError(code, err)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, errors.New("the caller cancelled the request"))
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the caller's deadline has passed"))
	}
	if errdefs.IsDiskFull(err) {
		log.Error("the host's disk is full", "procedure", procedure, "err", err)
		return connect.NewError(connect.CodeResourceExhausted, errors.New("the host's disk is full"))
	}
	ref := rand.Text()[:8]
	log.Error("internal error", "procedure", procedure, "ref", ref, "err", err)
	return connect.NewError(connect.CodeInternal, errors.New("internal error; the host's log has it under "+ref))
}
