package envd

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestHooks(t *testing.T) {
	testenv.Root(t)
	s, _ := serve(t, Config{})
	dir, told := t.TempDir(), filepath.Join(t.TempDir(), "told")
	say := "#!/bin/sh\necho $(basename $0) $WRENN_GENERATION $(id -u) >>" + told + "\n"
	hook := func(name, text string, mode os.FileMode) error {
		return os.WriteFile(filepath.Join(dir, name), []byte(text), mode)
	}
	if err := errors.Join(
		hook("20-second", say, 0o755), hook("10-first", say+"exit 1\n", 0o700), hook("15-no-program", say, 0o644),
		hook("17-not-runnable", "\x7fELF", 0o755), os.Mkdir(filepath.Join(dir, "18-dir"), 0o755),
		os.Symlink("none", filepath.Join(dir, "19-dangling")), os.Symlink("20-second", filepath.Join(dir, "30-link")),
	); err != nil {
		t.Fatal(err)
	}
	s.runHooks(dir, "g1")
	got, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	if want := "10-first g1 0\n20-second g1 0\n30-link g1 0\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if running := s.processes.list(); len(running) > 0 {
		t.Errorf("%d hooks run on", len(running))
	}
}
