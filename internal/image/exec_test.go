package image

import (
	"os/exec"
	"testing"
)

func execOutput(t testing.TB, name string, args ...string) ([]byte, error) {
	t.Helper()
	return exec.CommandContext(t.Context(), name, args...).Output()
}
