package server

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
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
)

func TestEveryClassHasACode(t *testing.T) {
	seen := map[connect.Code]*errdefs.Class{}
	for _, class := range errdefs.Classes() {
		code := errhttp.OfClass(class).Code
		if other := seen[code]; other != nil {
			t.Errorf("classes %v and %v share code %v", class, other, code)
		}
		seen[code] = class

		err := connectError(slog.New(slog.DiscardHandler), "p", fmt.Errorf("outer: %w", class.Errorf("inner")))
		if got := connect.CodeOf(err); got != code {
			t.Errorf("class %v became %v, want %v", class, got, code)
		}
		if !strings.Contains(err.Error(), "outer: inner") {
			t.Errorf("the text of a classed error is lost: %v", err)
		}
	}
}

func TestUnclassedTextStaysInTheLog(t *testing.T) {
	var log strings.Builder
	err := connectError(slog.New(slog.NewTextHandler(&log, nil)), "p", errors.New("open /var/lib/secret: no"))
	if got := connect.CodeOf(err); got != connect.CodeInternal {
		t.Errorf("code %v, want internal", got)
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the answer tells too much: %v", err)
	}
	if !strings.Contains(log.String(), "/var/lib/secret") {
		t.Errorf("the log does not have the text: %s", log.String())
	}
	ref := err.Error()[strings.LastIndex(err.Error(), " ")+1:]
	if !strings.Contains(log.String(), ref) {
		t.Errorf("the log does not have the reference %s: %s", ref, log.String())
	}
}

func TestFullDiskIsTold(t *testing.T) {
	var log strings.Builder
	full := &os.PathError{Op: "write", Path: "/var/lib/secret", Err: syscall.ENOSPC}
	err := connectError(slog.New(slog.NewTextHandler(&log, nil)), "p", full)
	if got := connect.CodeOf(err); got != connect.CodeResourceExhausted || strings.Contains(err.Error(), "secret") {
		t.Errorf("the answer is %v", err)
	}
	if !strings.Contains(log.String(), "/var/lib/secret") {
		t.Errorf("the log does not have the text: %s", log.String())
	}
}

func TestContextErrors(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if got := connect.CodeOf(connectError(log, "p", fmt.Errorf("x: %w", context.Canceled))); got != connect.CodeCanceled {
		t.Errorf("cancelled became %v", got)
	}
	if got := connect.CodeOf(connectError(log, "p", fmt.Errorf("x: %w", context.DeadlineExceeded))); got != connect.CodeDeadlineExceeded {
		t.Errorf("deadline became %v", got)
	}
}
