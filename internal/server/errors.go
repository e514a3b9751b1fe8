package server

import (
	"context"
	"errors"
	"log/slog"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
)

// mapErrors turns errors into what clients may see.
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

// connectError gives an error the Connect code of its row in errhttp's table.
func connectError(log *slog.Logger, procedure string, err error) error {
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	row, told := errhttp.Tell(log, procedure, err)
	coded := connect.NewError(row.Code, told)
	var more *detailed
	if errors.As(err, &more) {
		if detail, err := connect.NewErrorDetail(more.detail); err == nil {
			coded.AddDetail(detail)
		}
	}
	return coded
}

// detailed is an error with a message for programs.
type detailed struct {
	error
	detail proto.Message
}

func (e *detailed) Unwrap() error { return e.error }
