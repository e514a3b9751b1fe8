package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	gocmp "github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/host"
)

// verbs are all commands that ask the agent, as far as arguments go.
func verbs() [][]string {
	id := clienttest.ID
	return [][]string{
		{"create"}, {"run", "true"}, {"exec", id, "true"}, {"shell", id}, {"exec", "-d", id, "true"}, {"attach", id, "7"}, {"kill", id, "7"},
		{"logs", id, "7"}, {"ps", id}, {"cp", id + ":/x", "-"}, {"cp", "/proc/self/comm", id + ":/x"},
		{"top", id}, {"port", id, "80"}, {"ps"}, {"exec", "012", "true"}, {"pause", id}, {"resume", id}, {"stop", id}, {"start", id},
		{"recover", id}, {"fork", id},
		{"snapshot", id}, {"snapshot", "rm", "x"}, {"snapshots"}, {"rm", id}, {"rm", "--all"}, {"timeout", id, "1m"}, {"deadline", id, "1m"},
		{"network", id}, {"network", id, "--reset"}, {"inspect", id}, {"inspect", "--token", id}, {"logs", id}, {"events"}, {"verify"},
		{"host"},
	}
}

// ends runs wrenn in this process against an agent, and returns what it prints,
// the message that it would end with, and its status.
func ends(t *testing.T, agent string, args ...string) (printed, message string, status int) {
	t.Helper()
	printed, cmd, err := executed(t, append([]string{"--host", agent}, args...)...)
	if err == nil {
		return printed, "", 0
	}
	status, quiet := exitStatus(t.Context(), cmd, err)
	if !quiet {
		message = explain(err)
	}
	return printed, message, status
}

// ownErrors is the exit status of a verb for an error that is not about a command
// in a sandbox.
func ownErrors(verb string) int {
	if verb == "exec" || verb == "run" || verb == "shell" || verb == "attach" {
		return 125
	}
	return 1
}

// What a person types wrongly is an error that is not about the command.
func TestStatusOfWrongArguments(t *testing.T) {
	for _, line := range []string{
		"exec", "exec " + clienttest.ID, "exec --nonsense x y", "exec -e =x x y", "run", "run -m much true", "run --vcpus", "shell", "shell a b",
		"exec --host :: x y", "ps x y", "attach x", "create --memory much", "cp a", "nonsense",
	} {
		args := strings.Fields(line)
		if _, said, status := ends(t, nowhere, args...); status != ownErrors(args[0]) || said == "" {
			t.Errorf("%q: status %d, %q", line, status, said)
		}
	}
}

// An error of the agent ends every command with 1, or 125 where 1 could be the
// status of a command in a sandbox, and a message that has the text and the code,
// whatever its class.
func TestErrorsOfTheAgent(t *testing.T) {
	codes := map[string]connect.Code{"internal": connect.CodeInternal}
	for _, class := range errdefs.Classes() {
		code := errhttp.OfClass(class).Code
		codes[code.String()] = code
	}
	for name, code := range codes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := (&clienttest.Agent{Err: connect.NewError(code, errors.New("no luck today"))}).Serve(t)
			for _, args := range verbs() {
				printed, said, status := ends(t, url, args...)
				if !strings.HasPrefix(said, "no luck today") || !strings.Contains(said, "("+name+")") || printed != "" ||
					status != ownErrors(args[0]) {
					t.Errorf("%q: %d, %q, %q", args, status, said, printed)
				}
			}
		})
	}
}

// A command that the guest cannot start ends as it would in a shell.
func TestCommandsThatDoNotStart(t *testing.T) {
	for _, class := range errdefs.Classes() {
		row := errhttp.OfClass(class)
		fail := connect.NewError(row.Code, errors.New("exec: no"))
		for _, args := range [][]string{{"exec", clienttest.ID, "x"}, {"run", "x"}, {"shell", clienttest.ID}} {
			_, said, status := ends(t, (&clienttest.Agent{Fail: fail}).Serve(t), args...)
			if want := "exec: no (" + row.Code.String() + ")"; said != want || status != row.NotStarted {
				t.Errorf("%v, %q: status %d, want %d; %q, want %q", class, args, status, row.NotStarted, said, want)
			}
		}
	}
}

// The status of a command is that of the program.
func TestStatusOfACommand(t *testing.T) {
	for _, want := range []int{0, 3, 255} {
		url := (&clienttest.Agent{Exit: int32(want), Archive: []byte("out"), Stderr: "err"}).Serve(t)
		for _, args := range [][]string{{"exec", clienttest.ID, "x"}, {"run", "--", "x"}, {"shell", clienttest.ID}} {
			if args[0] == "shell" {
				want = 0 // it reads commands from stdin until its end, and then ends well
				url = (&clienttest.Agent{Archive: []byte("out"), Stderr: "err"}).Serve(t)
			}
			stdout, stderr, status := wrenn(t, url, args...)
			if stdout != "out" || stderr != "err" || status != want {
				t.Errorf("%q: %q, %q, status %d, want %d", args, stdout, stderr, status, want)
			}
		}
	}
}

// A command that had no memory says so beside its status.
func TestOutOfMemory(t *testing.T) {
	for said, want := range map[string]string{
		"": "", "signal: killed": "", "out of memory: signal: killed": "wrenn: killed: out of memory: ",
		"out of memory: limit 448 MiB: signal: killed": "wrenn: killed: out of memory, limit 448 MiB: ",
		"out of memory: limit -1 MiB: signal: killed":  "wrenn: killed: out of memory: ",
	} {
		url := (&clienttest.Agent{Exit: 137, EndError: said}).Serve(t)
		for _, args := range [][]string{{"exec", clienttest.ID, "x"}, {"run", "x"}} {
			_, stderr, status := wrenn(t, url, args...)
			if status != 137 || !strings.HasPrefix(stderr, want) || (stderr == "") != (want == "") {
				t.Errorf("%q, %q: status %d, %q", said, args, status, stderr)
			}
		}
	}
}

// What breaks off because the sandbox ends says so, whatever it was.
func TestSandboxEndsUnderACall(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	made := &filesystem.EntryInfo{Name: "made", Path: "/made", Type: filesystem.FileType_FILE_TYPE_FILE}
	for ends, want := range map[string]string{
		"stopped":  "sandbox " + clienttest.ID + " has ended: vm_exited, vm_exited; see wrenn logs",
		"stopping": "sandbox " + clienttest.ID + " has ended: vm_exited, vm_exited; see wrenn logs",
		"gone":     "sandbox " + clienttest.ID + " has ended: it was destroyed",
		"paused":   "sandbox " + clienttest.ID + " is paused",
		"running":  "the connection to sandbox " + clienttest.ID + " broke off, and it runs on",
	} {
		for _, args := range [][]string{
			{"exec", clienttest.ID, "x"}, {"exec", "-i", clienttest.ID, "x"}, {"cp", file, clienttest.ID + ":/made"},
			{"cp", clienttest.ID + ":/made", filepath.Dir(file)}, {"logs", "-f", clienttest.ID, "7"}, {"attach", clienttest.ID, "7"},
		} {
			if ends == "running" && args[0] != "logs" {
				continue // it takes two seconds, in which the agent may yet see the end
			}
			a := &clienttest.Agent{Ends: ends, Text: "vm_exited", Entry: made}
			_, stderr, status := wrenn(t, a.Serve(t), args...)
			if !strings.Contains(stderr, want) || status == 0 || strings.Contains(stderr, "envelope") && ends != "running" {
				t.Errorf("%s, %q: status %d, %q, want %q", ends, args, status, stderr, want)
			}
		}
	}
}

// A signal ends the command in the sandbox, and the status says which it was.
// What runs in a sandbox of its own is destroyed all the same.
func TestSignals(t *testing.T) {
	for _, args := range [][]string{{"exec", clienttest.ID, "x"}, {"run", "x"}} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			a := &clienttest.Agent{Archive: []byte("started\n"), Endless: 1}
			cmd := program(t, a.Serve(t), args...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 8)
			if _, err := stdout.Read(buf); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != 128+int(sig) || stderr.String() != "" {
				t.Errorf("%q, %v: status %d, %q", args, sig, got, &stderr)
			}
			if diff := gocmp.Diff([]process.Signal{process.Signal_SIGNAL_SIGTERM}, a.Signaled()); diff != "" {
				t.Errorf("%q, %v: the command got other signals: %s", args, sig, diff)
			}
			if got := slices.Contains(a.Calls(), "DestroySandbox"); got != (args[0] == "run") {
				t.Errorf("%q, %v: destroyed: %v", args, sig, got)
			}
		}
	}
}

// timeout(1) sends its signal twice, which is no request to leave the command
// behind. A second Ctrl-C is.
func TestSignalThatComesTwice(t *testing.T) {
	for pause, want := range map[time.Duration]int{time.Millisecond: 130, time.Second: -1} {
		a := &clienttest.Agent{Archive: []byte("started\n"), Endless: 2} // SIGKILL comes after 2 s
		cmd := program(t, a.Serve(t), "exec", clienttest.ID, "x")
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := stdout.Read(make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			time.Sleep(pause)
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%v between them: status %d, want %d; sent %v", pause, got, want, a.Signaled())
		}
	}
}

// The first signal ends a program whose agent or guest does not answer.
func TestSignalWithoutAnAnswer(t *testing.T) {
	for _, silent := range []string{"ListSandboxes", "GetSandbox", "Start", "start event"} {
		t.Run(silent, func(t *testing.T) {
			t.Parallel()
			cmd := program(t, (&clienttest.Agent{Silent: []string{silent}}).Serve(t), "exec", "012", "--", "x")
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			began := time.Now()
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			took, status := time.Since(began), cmd.ProcessState.ExitCode()
			if status != 143 || took > 6*time.Second || !strings.HasPrefix(stderr.String(), "wrenn: ") {
				t.Errorf("status %d after %v: %q", status, took, &stderr)
			}
		})
	}
}

// An agent or a guest that does not answer is an error after --connect-timeout.
func TestConnectTimeout(t *testing.T) {
	for _, silent := range []string{"ListSandboxes", "GetSandbox", "Start", "start event"} {
		url := (&clienttest.Agent{Silent: []string{silent}}).Serve(t)
		for _, verb := range []string{"exec", "shell"} {
			args := []string{verb, "--connect-timeout", "100ms", "012", "x"}
			if verb == "shell" {
				args = args[:4]
			}
			if _, said, status := ends(t, url, args...); status != 125 || !strings.Contains(said, "within 100ms") {
				t.Errorf("%s, %q: status %d, %q", silent, args, status, said)
			}
		}
	}
	url := (&clienttest.Agent{Exit: 3}).Serve(t)
	if _, said, status := ends(t, url, "exec", "--connect-timeout", "0", "012", "x"); status != 3 {
		t.Errorf("without a limit: %d, %q", status, said)
	}
}

// Without an agent, a command says what to do.
func TestNoAgent(t *testing.T) {
	for _, args := range verbs() {
		_, said, status := ends(t, nowhere, args...)
		if status != ownErrors(args[0]) || !strings.Contains(said, "no host agent answers") || !strings.Contains(said, "`wrenn serve`") {
			t.Errorf("%q: %d, %q", args, status, said)
		}
	}
	if stdout, _, status := wrenn(t, nowhere, "version"); status != 0 || !strings.Contains(stdout, "no host agent answers") {
		t.Errorf("version: %d, %q", status, stdout)
	}
}

// --force takes a thing that does not exist for done, and no other error.
func TestForce(t *testing.T) {
	for code, want := range map[connect.Code]int{connect.CodeNotFound: 0, connect.CodeInternal: 1} {
		url := (&clienttest.Agent{Err: connect.NewError(code, errors.New("no"))}).Serve(t)
		for _, args := range [][]string{{"rm", "-f", clienttest.ID}, {"snapshot", "rm", "-f", "x"}} {
			if _, stderr, status := wrenn(t, url, args...); status != want {
				t.Errorf("%q, %v: status %d, %q", args, code, status, stderr)
			}
		}
	}
}

// A command that does not exist and is a template's name was meant as that.
func TestTemplateAsACommand(t *testing.T) {
	for name, want := range map[string]bool{"minimal": true, "prepared": true, "other": false} {
		url := (&clienttest.Agent{Missing: []string{name}, Text: "prepared"}).Serve(t) // the name of its snapshot
		_, said, status := ends(t, url, "run", name, "true")
		if status != 127 || strings.HasSuffix(said, "did you mean --template "+name+"?") != want {
			t.Errorf("%s: status %d, %q", name, status, said)
		}
	}
}

// A sandbox that has no address shows none.
func TestAddresses(t *testing.T) {
	for status, want := range map[string]bool{"running": true, "paused": true, "stopped": false} {
		printed, _, _ := ends(t, (&clienttest.Agent{Status: status, Text: "10.11.0.9"}).Serve(t), "ps", "-a")
		if line := strings.Split(printed, "\n")[1]; (strings.Count(line, "10.11.0.9") == 3) != want { // the template and the reason, too
			t.Errorf("%s: %q", status, line)
		}
	}
}

// A sandbox that was made from a snapshot shows its name.
func TestSnapshotInPs(t *testing.T) {
	for snapshot, want := range map[string]string{"": "base", "prepared": "prepared"} {
		printed, _, status := ends(t, (&clienttest.Agent{Text: "base", Snapshot: snapshot}).Serve(t), "ps")
		if got := strings.Fields(strings.Split(printed, "\n")[1])[1]; got != want || status != 0 {
			t.Errorf("%q: %q, status %d, %q", snapshot, got, status, printed)
		}
	}
}

// doctor says what its marks mean and what follows from them.
func TestDoctorsWords(t *testing.T) {
	ok := host.Check{OK: true, Level: host.Required}
	no, optional := host.Check{Level: host.Required}, host.Check{Level: host.Optional}
	unknown := host.Check{Level: host.Required, Unknown: true}
	for _, c := range []struct {
		check host.Check
		want  string
	}{
		{ok, "\n\nThis host can run sandboxes.\n"},
		{optional, "\n\n-- is optional: sandboxes run without it, slower or less contained.\nThis host can run sandboxes.\n"},
		{no, "\n\nThis host cannot run sandboxes yet: mend what is marked NO.\n"},
		{unknown, "\n\n?? could not be looked at.\nWhether this host can run sandboxes is not known: run `wrenn doctor` as root.\n"},
	} {
		var out strings.Builder
		if printChecks(&out, []host.Check{ok, c.check}); !strings.HasSuffix(out.String(), c.want) {
			t.Errorf("%+v: %q, want %q", c.check, &out, c.want)
		}
	}
}

// rm --all spares hibernated sandboxes, and asks on a terminal; not so with --force.
func TestRemoveAll(t *testing.T) {
	for _, c := range []struct {
		status, args, typed string
		want                bool
	}{
		{"running", "rm --all", "", true}, {"paused", "rm --all", "", true},
		{"hibernated", "rm --all", "", false}, {"hibernated", "rm --all --force", "", true}, {"hibernated", "rm 012", "", true},
		{"running", "rm --all", "y\n", true}, {"running", "rm --all", "yes\n", true}, {"running", "rm --all", "n\n", false},
		{"running", "rm --all", "\n", false}, {"running", "rm --all", "\x04", false},
		{"running", "rm --all --force", "n\n", true}, {"running", "rm 012", "n\n", true}, {"stopped", "rm --all", "n\n", true},
	} {
		a := &clienttest.Agent{Status: c.status}
		cmd := program(t, a.Serve(t), strings.Fields(c.args)...)
		if c.typed != "" {
			file, tty, err := pty.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			defer tty.Close()
			cmd.Stdin = tty
			if _, err := file.WriteString(c.typed); err != nil {
				t.Fatal(err)
			}
		}
		out, err := cmd.CombinedOutput()
		if got := slices.Contains(a.Calls(), "DestroySandbox"); got != c.want || (err == nil) != (c.want || c.typed == "") {
			t.Errorf("%s sandbox, %s, %q: destroyed: %v, %v: %q", c.status, c.args, c.typed, got, err, out)
		}
	}
}

// An error among several does not keep the others from being done.
func TestSeveral(t *testing.T) {
	url := (&clienttest.Agent{}).Serve(t)
	stdout, stderr, status := wrenn(t, url, "pause", "ffff", clienttest.ID, "eeee")
	if stdout != clienttest.ID+"\n" || strings.Count(stderr, "`wrenn ps` lists them\n") != 2 || status != 1 {
		t.Errorf("%q, %q, %d", stdout, stderr, status)
	}
}

// A running command passes on its environment's variables, and what it is told.
func TestVariables(t *testing.T) {
	t.Setenv("WRENN_TEST_PASSED", "on")
	os.Unsetenv("WRENN_TEST_MISSING")
	got, err := (&vars{pairs: []string{"A=1", "B=", "C=a=b", "WRENN_TEST_PASSED", "WRENN_TEST_MISSING", "A=2"}}).read()
	want := map[string]string{"A": "2", "B": "", "C": "a=b", "WRENN_TEST_PASSED": "on"}
	if diff := gocmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v, %s", err, diff)
	}
}

func TestParseMiB(t *testing.T) {
	for text, want := range map[string]int32{
		"512": 512, "512m": 512, "512M": 512, "512MB": 512, "512MiB": 512, "2g": 2048, "2G": 2048, "2GiB": 2048, "1.5g": 1536, " 1g ": 1024,
		"": -1, "0": -1, "-1": -1, "m": -1, "1k": -1, "1t": -1, "NaN": -1, "Inf": -1, "1e30": -1, "two": -1,
	} {
		if got, err := parseMiB(text); (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestRough(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0 seconds", time.Second: "1 second", 1999 * time.Millisecond: "1 second", 2 * time.Second: "2 seconds",
		119 * time.Second: "119 seconds", 2 * time.Minute: "2 minutes", 119 * time.Minute: "119 minutes",
		2 * time.Hour: "2 hours", 47 * time.Hour: "47 hours", 48 * time.Hour: "2 days", 1000 * time.Hour: "41 days",
	} {
		if got := rough(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
