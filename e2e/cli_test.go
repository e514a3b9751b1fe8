package e2e_test

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// TestCLI runs the scenarios of testdata/cli, each against an agent of its
// own. Beside testscript's commands they have
//
//	status N COMMAND…   the command must end with status N
//	id FULL SHORT       name the id just printed, and its beginning
//	pid NAME            name the PID just printed
func TestCLI(t *testing.T) {
	testenv.StateDir(t)
	testenv.Program(t, "curl")
	testscript.Run(t, testscript.Params{
		Dir: "testdata/cli",
		Setup: func(e *testscript.Env) error {
			a := startAgent(e.T().(testing.TB))
			dir, err := filepath.Abs(a.bin)
			if err != nil {
				return err
			}
			e.Setenv("PATH", dir+":"+e.Getenv("PATH"))
			e.Setenv("WRENN_HOST", a.url)
			e.Setenv("WRENN_STATE_DIR", a.stateDir)
			e.Setenv("NO_HOST", "http://127.0.0.1:1")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status, "id": rememberID, "pid": rememberPID},
	})
}

// status: status N COMMAND [ARG...]
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND [ARG...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ProcessState.String()[len("exit status "):]
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != args[0] {
		ts.Fatalf("%s ended with status %s, want %s", args[1], got, args[0])
	}
}

// rememberID: id FULL SHORT, after a command that printed an id.
func rememberID(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: id FULL SHORT")
	}
	id := strings.TrimSpace(ts.ReadFile("stdout"))
	ts.Setenv(args[0], id)
	ts.Setenv(args[1], strings.TrimPrefix(id, "sb-")[:6])
}

// rememberPID: pid NAME, after a command that printed a PID.
func rememberPID(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: pid NAME")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}
