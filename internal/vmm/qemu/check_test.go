package qemu

import (
	"errors"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestCheckWithoutQEMU(t *testing.T) {
	d := New(Config{Binary: "/nonexistent/qemu"})
	if _, err := d.Check(t.Context()); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("check: %v, want unavailable", err)
	}
	if _, err := d.Start(t.Context(), vmm.Spec{}); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("start: %v, want unavailable", err)
	}
}
