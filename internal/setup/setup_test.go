package setup

import (
	"errors"
	"math"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestNeedSpace(t *testing.T) {
	if err := needSpace(t.TempDir(), 0, "the template"); err != nil {
		t.Error(err)
	}
	err := needSpace(t.TempDir(), math.MaxInt64, "the template")
	if !errors.Is(err, errdefs.Exhausted) || !strings.HasPrefix(err.Error(), "the template needs ") {
		t.Errorf("got %v", err)
	}
	if err := needSpace("/no/such", 1, "it"); err == nil || errors.Is(err, errdefs.Exhausted) {
		t.Errorf("a missing directory: %v", err)
	}
}
