package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A sandbox that was made with --wake is resumed by each call that needs it running; of
// another one the message says which call that was.
func TestWakeOnUse(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	b, other := a.create(t, &hostagentv1.CreateSandboxRequest{AutoResume: true}), a.create(t, nil)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("brought\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := other.pause(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		toDisk bool
		args   []string // ID is the sandbox
		says   string   // what is said of a sandbox that is not to be resumed
	}{
		{false, []string{"exec", "ID", "--", "echo", "awake"}, "exec needs it running"},
		{false, []string{"cp", file, "ID:/root/file"}, "a copy needs it running"},
		{true, []string{"cp", "ID:/root/file", file + ".back"}, "a copy needs it running"},
		{true, []string{"exec", "ID", "--", "echo", "awake"}, "exec needs it running"},
	} {
		with := func(id string) []string {
			var args []string
			for _, arg := range c.args {
				args = append(args, strings.Replace(arg, "ID", id, 1))
			}
			return args
		}
		req := &hostagentv1.PauseSandboxRequest{SandboxId: b.id, ToDisk: c.toDisk}
		if _, err := a.PauseSandbox(t.Context(), connect.NewRequest(req)); err != nil {
			t.Fatal(err)
		}
		if out, err := a.cli(t, with(b.id)...); err != nil {
			t.Errorf("%q of a paused sandbox (on disk: %v): %v: %s", c.args, c.toDisk, err, out)
		}
		if info := b.info(); info.Status != "running" || !info.AutoResume || info.ExpiresAtUnix != 0 {
			t.Errorf("after %q: %v", c.args, info)
		}
		if out, err := a.cli(t, with(other.id)...); err == nil || !strings.Contains(out, c.says) {
			t.Errorf("%q of another paused sandbox: %v, %q", c.args, err, out)
		}
	}
	if got, err := os.ReadFile(file + ".back"); err != nil || string(got) != "brought\n" {
		t.Errorf("copied %q, %v", got, err)
	}
}
