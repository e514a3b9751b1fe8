package tool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestCommand(t *testing.T) {
	ctx := context.Background()
	var lines []string
	out, err := Command{Name: "sh", Args: []string{"-c", "echo one; echo two >&2; echo three >&3"},
		OnLine: func(string) {}, OnStatus: func(l string) { lines = append(lines, l) }}.Output(ctx)
	if err != nil || out != "one\n" || len(lines) != 1 || lines[0] != "three" {
		t.Errorf("output = %q, %v, status %q", out, err, lines)
	}
	err = Command{Name: "sh", Args: []string{"-c", "echo reason >&2; exit 3"}}.Run(ctx)
	if err == nil || !strings.Contains(err.Error(), "reason") {
		t.Errorf("a failing command says %v", err)
	}
	err = Command{Name: "sh", Args: []string{"-c", "echo 'x: No space left on device' >&2; exit 1"}}.Run(ctx)
	if !errors.Is(err, errdefs.Exhausted) {
		t.Errorf("a full disk is %v", err)
	}
	if err = (Command{Name: "wrenn-no-such-tool"}).Run(ctx); !errors.Is(err, errdefs.Unavailable) {
		t.Errorf("a missing tool is %v", err)
	}
}

// A cancelled command takes its children with it, also those that left its
// session.
func TestCommandDiesWithItsChildren(t *testing.T) {
	testenv.Root(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// The child holds a FIFO open: it reads as ended when all are gone.
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() { _, err := os.ReadFile(fifo); read <- err }()
	err := Command{
		Name:   "sh",
		Args:   []string{"-c", `exec 5>"$0"; setsid sleep 1000 & echo up; wait`, fifo},
		OnLine: func(string) { cancel() },
	}.Run(ctx)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("run = %v", err)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
}
