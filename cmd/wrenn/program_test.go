package main

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestProgram is wrenn itself, where a test starts this binary as wrenn.
func TestProgram(t *testing.T) {
	if os.Getenv("WRENN_TEST_PROGRAM") == "" {
		return
	}
	os.Args = append([]string{"wrenn"}, flag.Args()...)
	main()
	os.Exit(0)
}

// program is wrenn as a program of its own, against an agent.
func program(t *testing.T, host string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-test.run=^TestProgram$", "--"}, args...)...)
	cmd.Env = append(os.Environ(), "WRENN_TEST_PROGRAM=1", "WRENN_HOST="+host, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// wrenn runs the program to its end.
func wrenn(t *testing.T, host string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := program(t, host, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
