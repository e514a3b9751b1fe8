package e2e_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestHostScript(t *testing.T) {
	testenv.Program(t, "curl")
	a := startAgent(t)
	out, err := exec.Command("../scripts/test-host.sh", a.url).CombinedOutput()
	if err != nil {
		t.Fatalf("test-host.sh: %v\n%s", err, out)
	}
	if n := strings.Count(string(out), "PASS"); n < 13 || strings.Contains(string(out), "FAIL") {
		t.Errorf("%d steps passed, want 13:\n%s", n, out)
	}
	t.Logf("%s", out)
}

func TestHostScriptFailsWithoutHost(t *testing.T) {
	testenv.Program(t, "curl")
	out, err := exec.Command("../scripts/test-host.sh", "http://127.0.0.1:1").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "FAIL") {
		t.Errorf("without a host: %v\n%s", err, out)
	}
}

func TestDebugGuestScript(t *testing.T) {
	prepared := testenv.StateDir(t)
	testenv.NoLeaks(t, "debug-guest")
	tmp := t.TempDir()
	cmd := exec.Command("../scripts/debug-guest.sh")
	cmd.Env = append(os.Environ(), "WRENN_STATE_DIR="+prepared, "TMPDIR="+tmp)
	keys, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var console safeBuffer
	cmd.Stdout, cmd.Stderr = &console, &console
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	waitFor(t, "the guest on the console", func() bool { return strings.Contains(console.String(), "hostname=debug-guest") })
	keys.Write([]byte("\x01x"))
	if err := cmd.Wait(); err != nil {
		t.Errorf("after Ctrl-a x: %v\n%s", err, console.String())
	}
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for _, args := range [][]string{{"no-such"}, {"../minimal"}, {"-h"}, {"a", "b"}} {
		cmd := exec.Command("../scripts/debug-guest.sh", args...)
		cmd.Env = append(os.Environ(), "WRENN_STATE_DIR="+prepared)
		if out, err := cmd.CombinedOutput(); err == nil || len(out) == 0 {
			t.Errorf("%q: %v %s", args, err, out)
		}
	}
}
