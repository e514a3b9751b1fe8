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
	"sync"
	"testing"

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

// stockTemplate is a directory with a template that `wrenn setup --template` has built.
// It is built once, and kept beside the prepared state directory.
func stockTemplate(t testing.TB, name string) string {
	t.Helper()
	prepared := testenv.StateDir(t)
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
	dir := filepath.Join(filepath.Dir(prepared), fmt.Sprintf("wrenn-test-template-%s-%x", name, sum.Sum(nil)[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	a, err := newAgent(prepared, binDir(t))
	if err == nil {
		err = a.prepare(prepared)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(a.stateDir)
	had := a.templateDirs(t)
	setup := exec.CommandContext(t.Context(), filepath.Join(a.bin, "wrenn"), append([]string{"setup", "--state-dir", a.stateDir,
		"--host-range", a.hostRange(), "--link-range", a.linkRange(), "--template", name}, guestCA(t)...)...)
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	} else {
		t.Logf("%s", out)
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

// E2B's code interpreter clients run code in the template that setup builds, with
// results, charts, errors, contexts and JavaScript.
func TestCodeInterpreter(t *testing.T) {
	c := installClients(t)
	dir := stockTemplate(t, "code-interpreter-v1")
	h := &e2bHost{agent: startAgentWith(t, []string{dir})}
	h.key = h.newKey(t)
	h.setKey(h.key)

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
