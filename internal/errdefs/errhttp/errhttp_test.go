package errhttp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestEveryClassHasOneRow(t *testing.T) {
	rows := map[*errdefs.Class]int{}
	codes := map[connect.Code]*errdefs.Class{}
	for _, r := range table {
		rows[r.class]++
		if other := codes[r.Code]; other != nil {
			t.Errorf("classes %v and %v share code %v", r.class, other, r.Code)
		}
		codes[r.Code] = r.class
	}
	for _, class := range errdefs.Classes() {
		if rows[class] != 1 {
			t.Errorf("class %v has %d rows", class, rows[class])
		}
		delete(rows, class)
		row := OfClass(class)
		if row.Code == 0 || row.Code == connect.CodeInternal || row.Status < 400 || row.Status > 599 || row.NotStarted < 125 {
			t.Errorf("class %v: %+v", class, row)
		}
		if got := OfCode(row.Code); got != row {
			t.Errorf("code %v is %+v, want %+v", row.Code, got, row)
		}
	}
	if len(rows) > 0 {
		t.Errorf("rows of what is no class: %v", rows)
	}
	if OfClass(nil) != internal || OfCode(connect.CodeInternal) != internal || OfCode(connect.CodeUnknown) != internal {
		t.Error("what has no class is not internal")
	}
}

func TestClassedTextIsTold(t *testing.T) {
	for _, class := range errdefs.Classes() {
		row, told := Tell(slog.New(slog.DiscardHandler), "p", fmt.Errorf("outer: %w", class.Errorf("inner")))
		if row != OfClass(class) || !strings.Contains(told.Error(), "outer: inner") || !errors.Is(told, class) {
			t.Errorf("class %v became %+v, %v", class, row, told)
		}
	}
}

// A status means the same to the client as to the gateway that sent it.
func TestOfStatus(t *testing.T) {
	for status, want := range map[int]connect.Code{
		400: connect.CodeInvalidArgument, 401: connect.CodeUnauthenticated, 403: connect.CodePermissionDenied,
		404: connect.CodeNotFound, 408: connect.CodeDeadlineExceeded, 409: connect.CodeFailedPrecondition,
		429: connect.CodeResourceExhausted, 501: connect.CodeUnimplemented, 502: connect.CodeUnavailable,
		503: connect.CodeUnavailable, 504: connect.CodeDeadlineExceeded,
	} {
		if row, ok := OfStatus(status); !ok || row.Code != want {
			t.Errorf("%d is %v, %v; want %v", status, row.Code, ok, want)
		}
	}
	for _, status := range []int{200, 302, 418, 500} {
		if row, ok := OfStatus(status); ok {
			t.Errorf("%d is %v", status, row.Code)
		}
	}
}

func TestNotStarted(t *testing.T) {
	for code, want := range map[connect.Code]int{
		connect.CodeNotFound: 127, connect.CodePermissionDenied: 126,
		connect.CodeInvalidArgument: 125, connect.CodeUnavailable: 125, connect.CodeInternal: 125, connect.CodeCanceled: 125,
	} {
		if got := OfCode(code).NotStarted; got != want {
			t.Errorf("%v: exit status %d, want %d", code, got, want)
		}
	}
}

func TestUnclassedTextStaysInTheLog(t *testing.T) {
	for _, c := range []struct {
		err  error
		code connect.Code
		log  bool
	}{
		{errors.New("open /var/lib/secret: no"), connect.CodeInternal, true},
		{&os.PathError{Op: "write", Path: "/var/lib/secret", Err: syscall.ENOSPC}, connect.CodeResourceExhausted, true},
		{&os.PathError{Op: "write", Path: "/var/lib/secret", Err: syscall.EDQUOT}, connect.CodeResourceExhausted, true},
		{fmt.Errorf("/var/lib/secret: %w", context.Canceled), connect.CodeCanceled, false},
		{fmt.Errorf("/var/lib/secret: %w", context.DeadlineExceeded), connect.CodeDeadlineExceeded, false},
	} {
		var log strings.Builder
		row, told := Tell(slog.New(slog.NewTextHandler(&log, nil)), "p", c.err)
		if row.Code != c.code || strings.Contains(told.Error(), "secret") {
			t.Errorf("%v: told %v, %v", c.err, row.Code, told)
		}
		if strings.Contains(log.String(), "/var/lib/secret") != c.log {
			t.Errorf("%v: the log is %q", c.err, log.String())
		}
		ref := told.Error()[strings.LastIndex(told.Error(), " ")+1:]
		if row.Code == connect.CodeInternal && !strings.Contains(log.String(), ref) {
			t.Errorf("the log does not have the reference %s: %s", ref, log.String())
		}
	}
}
