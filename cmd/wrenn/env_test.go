package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// atSocket serves a fake agent on the socket of a state directory.
func atSocket(t *testing.T, a *clienttest.Agent, stateDir string) {
	t.Helper()
	testenv.Root(t) // /run is root's
	path := agent.SocketPath(stateDir)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(path)) })
	a.ServeUnix(t, path)
}

// A shell that evaluates what wrenn env prints has the variables, the same each time.
func TestEnv(t *testing.T) {
	dir := t.TempDir()
	atSocket(t, &clienttest.Agent{URL: "https://localhost:1", Domain: "localhost:1", CAFile: "/a b/ca.pem"}, dir)
	printed, err := inProcess(t, "env", "--state-dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := inProcess(t, "env", "--state-dir", dir); err != nil || again != printed {
		t.Errorf("again: %q, %v", again, err)
	}
	out, err := exec.Command("sh", "-c", `eval "$1"
		echo "$E2B_API_KEY|$E2B_API_URL|$E2B_SANDBOX_URL|$E2B_DOMAIN|$SSL_CERT_FILE|$NODE_EXTRA_CA_CERTS"`, "sh", printed).Output()
	key, rest, _ := strings.Cut(string(out), "|")
	if err != nil || len(key) != 44 ||
		rest != "https://localhost:1|https://localhost:1|localhost:1|/a b/ca-bundle.pem|/a b/ca.pem\n" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := inProcess(t, "env", "--state-dir", t.TempDir()); err == nil || !strings.Contains(err.Error(), "as root on the host") {
		t.Errorf("no agent: %v", err)
	}
}

// Without --host the agent's socket is used, and with a key TCP.
func TestNearby(t *testing.T) {
	dir := t.TempDir()
	if got, err := nearby(dir); err != nil || got != overTCP {
		t.Errorf("no agent: %s, %v", got, err)
	}
	a := &clienttest.Agent{}
	atSocket(t, a, dir)
	if printed, err := inProcess(t, "ps", "-q", "--state-dir", dir); err != nil || !strings.Contains(printed, clienttest.ID) {
		t.Errorf("ps: %q, %v", printed, err)
	}
	t.Setenv("WRENN_API_KEY", "e2b_0123")
	url := a.Serve(t)
	if _, err := inProcess(t, "ps", "-q", "--host", url); err != nil {
		t.Errorf("ps over TCP: %v", err)
	}
	all := a.Requests()
	if got := all[len(all)-1].Header.Get("X-Api-Key"); got != "e2b_0123" {
		t.Errorf("the key shown is %q", got)
	}
	c := &cli{stateDir: dir}
	if err := c.connect(nil, nil); err != nil || c.addr != overTCP {
		t.Errorf("with a key: %s, %v", c.addr, err)
	}
	if help, err := inProcess(t, "ps", "--help"); err != nil || strings.Contains(help, "e2b_0123") {
		t.Errorf("the help shows the key: %v", err)
	}
}
