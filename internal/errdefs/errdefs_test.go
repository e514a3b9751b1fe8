package errdefs_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestClassSurvivesWrapping(t *testing.T) {
	for _, class := range errdefs.Classes() {
		err := fmt.Errorf("create sandbox: %w", class.Errorf("read disk: %w", io.ErrUnexpectedEOF))
		if got := errdefs.ClassOf(err); got != class {
			t.Errorf("ClassOf = %v, want %v", got, class)
		}
		if !errors.Is(err, class) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v: class or cause is lost", class)
		}
		if want := "create sandbox: read disk: unexpected EOF"; err.Error() != want {
			t.Errorf("text = %q, want %q", err, want)
		}
	}
}

func TestOutermostClassWins(t *testing.T) {
	err := errdefs.Unavailable.Errorf("wait for guest: %w", errdefs.TimedOut.Errorf("dial"))
	if got := errdefs.ClassOf(err); got != errdefs.Unavailable {
		t.Errorf("ClassOf = %v, want unavailable", got)
	}
}

func TestUnclassed(t *testing.T) {
	if got := errdefs.ClassOf(io.EOF); got != nil {
		t.Errorf("ClassOf(io.EOF) = %v, want nil", got)
	}
}

func TestDiskFull(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		raw := fmt.Errorf("write record: %w", errors.Join(nil, &os.PathError{Op: "write", Path: "/secret/path", Err: errno}))
		err := fmt.Errorf("save: %w", errdefs.DiskFull(raw))
		if errdefs.ClassOf(err) != errdefs.Exhausted || !errors.Is(err, errno) {
			t.Errorf("%v: class %v", err, errdefs.ClassOf(err))
		}
		if !strings.Contains(err.Error(), "the host's disk is full") || strings.Contains(err.Error(), "/secret") {
			t.Errorf("text = %q", err)
		}
	}
	corrupt := errdefs.Corrupt.Errorf("read: %w", syscall.ENOSPC)
	for _, err := range []error{nil, io.EOF, corrupt} {
		if got := errdefs.DiskFull(err); got != err {
			t.Errorf("DiskFull(%v) = %v", err, got)
		}
	}
}
