// Package errhttp says what an error is to a caller: one table from the classes
// of errdefs to Connect codes, HTTP statuses and exit statuses, for everything
// that answers requests and everything that reads the answers.
package errhttp

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Row is what an error is to a caller.
type Row struct {
	Code connect.Code
	// Status is the HTTP status of an answer in JSON. Connect has statuses of its
	// own for its codes.
	Status int
	// NotStarted is the exit status of a program that was to run a command in a
	// sandbox and could not start it, as shells and docker have it.
	NotStarted int
}

// NotTheCommand is the exit status of a program that was to run a command in a
// sandbox and ends with an error that is not about the command.
const NotTheCommand = 125

// table has a row for every class. Of classes that share a status, the first one
// is what OfStatus makes of that status.
var table = []struct {
	class *errdefs.Class
	Row
}{
	{errdefs.InvalidArgument, Row{connect.CodeInvalidArgument, http.StatusBadRequest, NotTheCommand}},
	{errdefs.Unauthenticated, Row{connect.CodeUnauthenticated, http.StatusUnauthorized, NotTheCommand}},
	{errdefs.Denied, Row{connect.CodePermissionDenied, http.StatusForbidden, 126}},
	{errdefs.NotFound, Row{connect.CodeNotFound, http.StatusNotFound, 127}},
	{errdefs.WrongState, Row{connect.CodeFailedPrecondition, http.StatusConflict, NotTheCommand}},
	{errdefs.AlreadyExists, Row{connect.CodeAlreadyExists, http.StatusConflict, NotTheCommand}},
	{errdefs.Busy, Row{connect.CodeAborted, http.StatusConflict, NotTheCommand}},
	{errdefs.Exhausted, Row{connect.CodeResourceExhausted, http.StatusTooManyRequests, NotTheCommand}},
	{errdefs.Unsupported, Row{connect.CodeUnimplemented, http.StatusNotImplemented, NotTheCommand}},
	{errdefs.Unavailable, Row{connect.CodeUnavailable, http.StatusServiceUnavailable, NotTheCommand}},
	{errdefs.TimedOut, Row{connect.CodeDeadlineExceeded, http.StatusGatewayTimeout, NotTheCommand}},
	{errdefs.Corrupt, Row{connect.CodeDataLoss, http.StatusInternalServerError, NotTheCommand}},
}

// Rows of errors without a class.
var (
	internal = Row{connect.CodeInternal, http.StatusInternalServerError, NotTheCommand}
	// A client that has cancelled its request reads no answer; 499 is for logs.
	cancelled = Row{connect.CodeCanceled, 499, NotTheCommand}
)

// OfClass returns the row of a class; that of an internal error for nil.
func OfClass(class *errdefs.Class) Row {
	for _, r := range table {
		if r.class == class {
			return r.Row
		}
	}
	return internal
}

// OfCode returns the row of a Connect code that an answer had.
func OfCode(code connect.Code) Row {
	for _, r := range table {
		if r.Code == code {
			return r.Row
		}
	}
	if code == connect.CodeCanceled {
		return cancelled
	}
	return internal
}

// OfStatus returns the row of an HTTP status with which a sandbox's request was
// refused; ok is false if the status does not say why.
func OfStatus(status int) (row Row, ok bool) {
	switch status {
	case http.StatusInternalServerError:
		return internal, false
	case http.StatusBadGateway: // nothing listens on the port, or nothing runs
		return OfClass(errdefs.Unavailable), true
	case http.StatusRequestTimeout:
		return OfClass(errdefs.TimedOut), true
	}
	for _, r := range table {
		if r.Status == status {
			return r.Row, true
		}
	}
	return internal, false
}

// Tell returns what a caller is told of an error: its row and a text. A classed
// error keeps its text. Any other is logged as an error of what was asked, and the
// caller gets a reference to that line of the log.
func Tell(log *slog.Logger, asked string, err error) (Row, error) {
	if class := errdefs.ClassOf(err); class != nil {
		return OfClass(class), err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return cancelled, errors.New("the caller cancelled the request")
	case errors.Is(err, context.DeadlineExceeded):
		return OfClass(errdefs.TimedOut), errors.New("the caller's deadline has passed")
	case errdefs.IsDiskFull(err):
		log.Error("the host's disk is full", "procedure", asked, "err", err)
		return OfClass(errdefs.Exhausted), errors.New("the host's disk is full")
	}
	ref := rand.Text()[:8]
	log.Error("internal error", "procedure", asked, "ref", ref, "err", err)
	return internal, errors.New("internal error; the host's log has it under " + ref)
}
