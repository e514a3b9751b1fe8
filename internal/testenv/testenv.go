// Package testenv says what a test may need of its machine, and lists what
// exists there, to show whether a test left anything behind.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// StateDirEnv names the environment variable with a state directory in which
// `wrenn setup` has run; `make test` sets it.
const StateDirEnv = "WRENN_TEST_STATE_DIR"

// missing skips the test, naming the capability that is not there. In CI
// nothing may be missing, so there it fails.
func missing(t testing.TB, capability, next string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this machine lacks %s, which CI must have: %s", capability, next)
	}
	t.Skipf("this machine lacks %s: %s", capability, next)
}

// Root skips the test unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root", "run the tests as root")
	}
}

// StateDir returns a prepared state directory (kernel, initrd, the template
// "minimal"), to be read only, or skips the test. It implies Root.
func StateDir(t testing.TB) string {
	t.Helper()
	Root(t)
	dir := os.Getenv(StateDirEnv)
	if dir == "" {
		missing(t, "a prepared state directory", "run `make test`, or `wrenn setup --state-dir DIR` and set "+StateDirEnv+"=DIR")
	}
	if found, err := filepath.Glob(filepath.Join(dir, "templates", "*", "template.json")); err != nil || len(found) == 0 {
		t.Fatalf("%s is not prepared: there is no template, %v", StateDirEnv, err)
	}
	return dir
}

// Program skips the test unless all programs are installed.
func Program(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			missing(t, "the program "+name, "install it")
		}
	}
}
