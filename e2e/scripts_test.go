package e2e_test

import (
	"os/exec"
	"strings"
	"testing"
)

func TestHostScript(t *testing.T) {
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
	out, err := exec.Command("../scripts/test-host.sh", "http://127.0.0.1:1").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "FAIL") {
		t.Errorf("against nobody: %v\n%s", err, out)
	}
}
