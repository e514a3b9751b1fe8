package e2e_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/templates"
)

// guestCA is what guests have to trust to reach registries of packages from here: the
// certificates that this host's administrator has added. Empty for none.
func guestCA(t testing.TB) []string {
	t.Helper()
	added, err := filepath.Glob("/usr/local/share/ca-certificates/*.crt")
	if err != nil {
		t.Fatal(err)
	}
	var bundle []byte
	for _, path := range added {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(append(bundle, bytes.TrimSpace(text)...), '\n')
	}
	if bundle == nil {
		return nil
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--guest-ca", path}
}

// stockDir is where a stock template is kept once it is built of the source that is here.
func stockDir(t testing.TB, name string) string {
	t.Helper()
	sum := sha256.New()
	for _, s := range templates.All() {
		if s.Name != name {
			continue
		}
		if err := fs.WalkDir(s.Files, ".", func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			text, err := fs.ReadFile(s.Files, path)
			fmt.Fprintf(sum, "%s %d\n%s", path, len(text), text)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(filepath.Dir(testenv.StateDir(t)), fmt.Sprintf("wrenn-test-template-%s-%x", name, sum.Sum(nil)[:6]))
}

// stockTemplate is a directory with a template that `wrenn setup --template` has built:
// base by itself, others by an agent that serves the state directory. It is built once, and
// kept beside the prepared state directory.
func stockTemplate(t testing.TB, name string) string {
	t.Helper()
	dir := stockDir(t, name)
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	prepared := testenv.StateDir(t)
	a, err := newAgent(prepared, binDir(t))
	if err == nil {
		err = a.prepare(prepared)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(a.stateDir)
	had := a.templateDirs(t)
	trust := guestCA(t)
	if name != "base" {
		if err := a.start(trust...); err != nil {
			t.Fatal(err)
		}
	}
	text, err := a.setupTemplate(t, name, trust...)
	if name != "base" {
		err = errors.Join(err, a.signal(syscall.SIGTERM))
	}
	t.Logf("%s", text)
	if err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, a.log.String())
	}
	stage, err := os.MkdirTemp(filepath.Dir(prepared), ".wrenn-test-template-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(stage)
	for id := range a.templateDirs(t) {
		if !had[id] {
			err = errors.Join(err, os.Rename(filepath.Join(a.stateDir, "templates", id), filepath.Join(stage, id)))
		}
	}
	if err := errors.Join(err, os.Rename(stage, dir)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// slowTemplate is stockTemplate for those whose build takes many minutes where instructions
// are translated: it is made where WRENN_TEST_STOCK says so, and used everywhere.
func slowTemplate(t testing.TB, name string) string {
	t.Helper()
	if _, err := os.Stat(stockDir(t, name)); err != nil && os.Getenv("WRENN_TEST_STOCK") == "" {
		t.Skipf("the template %s is not built on this machine: run `make test-stock` once", name)
	}
	return stockTemplate(t, name)
}

// setupTemplate runs `wrenn setup --template` on the state directory.
func (a *agent) setupTemplate(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	setup := exec.CommandContext(t.Context(), filepath.Join(a.bin, "wrenn"), append([]string{"setup", "--state-dir", a.stateDir,
		"--host-range", a.hostRange(), "--link-range", a.linkRange(), "--template", name}, args...)...)
	out, err := setup.CombinedOutput()
	return string(out), err
}

// templateDirs are the ids of the templates in the state directory.
func (a *agent) templateDirs(t testing.TB) map[string]bool {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(a.stateDir, "templates", "*", "template.json"))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, path := range found {
		ids[filepath.Base(filepath.Dir(path))] = true
	}
	return ids
}

// The template base has what E2B's has: node, npm, pip and build tools, for the user too.
func TestBase(t *testing.T) {
	dir := slowTemplate(t, "base")
	a := startAgentWith(t, []string{dir})
	b := a.create(t, &hostagentv1.CreateSandboxRequest{Template: "base"})
	for _, c := range []struct{ script, want string }{
		{"node -p 'process.versions.node.split(`.`)[0]'", "24\n"},
		{"mkdir app && cd app && npm init -y >/dev/null && node -p 'require(`./package.json`).name'", "app\n"},
		{"printf '#include <cstdio>\\nint main() { puts(\"compiled\"); }\\n' >x.cc && " +
			"printf 'x: x.cc\\n\\tg++ -o x x.cc\\n' >Makefile && make -s && ./x", "compiled\n"},
		{"pip3 download --no-index nothing 2>&1 | grep -o 'No matching distribution'", "No matching distribution\n"},
		{"python3 -m venv --without-pip v && v/bin/python -c 'import sys; print(sys.prefix)'", "/home/user/v\n"},
		{"git init -q g && git -C g status --short && sudo -n id -un && curl --version | head -c 4", "root\ncurl"},
	} {
		r, err := a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
			SandboxId: b.id, Cmd: "sh", Args: []string{"-c", c.script}, User: "user", Cwd: "/home/user", TimeoutSec: 120,
		}))
		if err != nil {
			t.Fatalf("%s: %v", c.script, err)
		}
		if m := r.Msg; string(m.Stdout) != c.want || m.ExitCode != 0 {
			t.Errorf("%s: status %d, %q, %q; want %q", c.script, m.ExitCode, m.Stdout, m.Stderr, c.want)
		}
	}
}

// E2B's code interpreter clients run code in the template that setup builds, with
// results, charts, errors, contexts, JavaScript and TypeScript.
func TestCodeInterpreter(t *testing.T) {
	c := installClients(t)
	dir := stockTemplate(t, "code-interpreter-v1")
	h := &e2bHost{agent: startAgentWith(t, []string{dir})}
	h.key = h.newKey(t)
	h.setKey(h.key)
	text, err := h.setupTemplate(t, "code-interpreter-v1")
	if err != nil || !strings.Contains(text, "template code-interpreter-v1  already there") {
		t.Errorf("setup while an agent serves: %v\n%s", err, text)
	}

	var together sync.WaitGroup
	for by, cmd := range map[string]*exec.Cmd{
		"JavaScript": c.node(t, "testdata/interpreter/suite.mjs"),
		"Python":     c.python("testdata/interpreter/suite.py"),
	} {
		cmd.Env = append(cmd.Env, h.env()...)
		together.Go(func() {
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s: %v", by, err)
			}
			t.Logf("%s:\n%s", by, out)
		})
	}
	together.Wait()
}

// E2B's desktop clients work in the template that setup builds: screen, pointer, keyboard,
// and noVNC through the agent.
func TestDesktop(t *testing.T) {
	dir := slowTemplate(t, "desktop")
	c := installDesktopClients(t)
	h := &e2bHost{agent: startAgentWith(t, []string{dir})}
	h.key = h.newKey(t)
	h.setKey(h.key)
	for by, cmd := range map[string]*exec.Cmd{
		"JavaScript": c.node(t, "testdata/desktop/suite.mjs"),
		"Python":     c.python("testdata/desktop/suite.py"),
	} {
		cmd.Env = append(cmd.Env, h.env()...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v", by, err)
		}
		t.Logf("%s:\n%s", by, out)
	}
}
