package errdefs_test

import (
	"errors"
	"fmt"
	"io"
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
