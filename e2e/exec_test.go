package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
)

func TestExecStatus(t *testing.T) {
	b := sharedBox(t)
	for script, want := range map[string]int32{
		"exit 0": 0, "exit 1": 1, "exit 255": 255,
		"kill -9 $$": 137, "kill -TERM $$": 143, "kill -SEGV $$": 139, "kill -HUP $$": 129,
	} {
		resp, err := b.exec("sh", "-c", script)
		if err != nil || resp.ExitCode != want {
			t.Errorf("%s: %v, %v; want %d", script, resp, err, want)
		}
	}
}

func TestExecStreams(t *testing.T) {
	b := sharedBox(t)
	resp, err := b.exec("sh", "-c", "echo one; echo two >&2; echo three; printf 'no newline' >&2")
	if err != nil || string(resp.Stdout) != "one\nthree\n" || string(resp.Stderr) != "two\nno newline" {
		t.Errorf("%q, %q, %v", resp.GetStdout(), resp.GetStderr(), err)
	}
	// There is no input, and waiting for it ends at once.
	if resp, err := b.exec("cat"); err != nil || resp.ExitCode != 0 || len(resp.Stdout) > 0 {
		t.Errorf("cat: %v, %v", resp, err)
	}
}

func TestExecArguments(t *testing.T) {
	b := sharedBox(t)
	args := []string{"", " ", "two words", "new\nline", `"quotes' and \`, "$HOME `id` $(id) ; | & > <", "ünï ☃", "-x", "*",
		strings.Repeat("x", 100<<10)}
	resp, err := b.exec("python3", append([]string{"-c", "import sys, json; print(json.dumps(sys.argv[1:]))"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := json.Unmarshal(resp.Stdout, &got); err != nil {
		t.Fatalf("%v: %s", err, resp.Stderr)
	}
	if diff := cmp.Diff(args, got); diff != "" {
		t.Errorf("the arguments changed on their way:\n%s", diff)
	}
}

func TestExecUnknownCommand(t *testing.T) {
	b := sharedBox(t)
	for _, cmd := range []string{"no-such-command", "/no/such/file", "/etc/passwd", "/root"} {
		resp, err := b.exec(cmd)
		if err == nil {
			t.Errorf("%s: %v, want an error", cmd, resp)
			continue
		}
		if code := connect.CodeOf(err); code != connect.CodeNotFound && code != connect.CodeInvalidArgument &&
			code != connect.CodePermissionDenied {
			t.Errorf("%s: %v", cmd, err)
		}
		if !strings.Contains(err.Error(), cmd) {
			t.Errorf("%q does not name %s", err, cmd)
		}
	}
}

func TestExecBinaryOutput(t *testing.T) {
	b := sharedBox(t)
	resp, err := b.exec("sh", "-c", "head -c 1000000 /dev/urandom >/tmp/random; sha256sum /tmp/random >&2; cat /tmp/random; rm /tmp/random")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(resp.Stdout)
	if want, _, _ := strings.Cut(string(resp.Stderr), " "); want != hex.EncodeToString(sum[:]) {
		t.Errorf("%d bytes arrived with sha256 %x, sent with %s", len(resp.Stdout), sum, want)
	}
}

func TestExecBoundsOutput(t *testing.T) {
	b := sharedBox(t)
	const limit, extra = 8 << 20, 611_392
	resp, err := b.exec("sh", "-c", fmt.Sprintf("head -c %d /dev/zero; head -c 10 /dev/zero >&2; exit 5", limit+extra))
	if err != nil || resp.ExitCode != 5 {
		t.Fatalf("%v, %v", resp.GetExitCode(), err)
	}
	marker := fmt.Sprintf("\n[wrenn: %d bytes of stdout are missing]\n", extra)
	if !bytes.Equal(resp.Stdout, append(make([]byte, limit), marker...)) {
		t.Errorf("%d bytes that end in %q, want %d and %q", len(resp.Stdout), resp.Stdout[max(0, len(resp.Stdout)-60):], limit, marker)
	}
	if len(resp.Stderr) != 10 {
		t.Errorf("%d bytes of stderr, want 10", len(resp.Stderr))
	}
}

// survivors counts the processes of the guest whose command line has the word.
func (b *sandbox) survivors(word string) string {
	b.t.Helper()
	return b.sh(`grep -lsa ` + word[:len(word)-1] + `[` + word[len(word)-1:] + `] /proc/[0-9]*/cmdline | wc -l`)
}

func TestExecTimeout(t *testing.T) {
	b := sharedBox(t)
	began := time.Now()
	_, err := b.a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
		SandboxId: b.id, Cmd: "sh", TimeoutSec: 1,
		// Deaf to SIGTERM, with a child, a grandchild and one in a session
		// of its own.
		Args: []string{"-c", `echo until then; trap '' TERM; sleep 98761 & (sleep 98761 &)
			setsid sh -c 'trap "" TERM; sleep 98761' & sleep 98761; sleep 98761`},
	}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "1")
	if coded := new(connect.Error); !errors.As(err, &coded) || len(coded.Details()) != 1 {
		t.Errorf("the error has no output: %v", err)
	} else if out, err := coded.Details()[0].Value(); err != nil || string(out.(*hostagentv1.ExecOutput).Stdout) != "until then\n" {
		t.Errorf("the error has the output %v, %v", out, err)
	}
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("took %s", took)
	}
	if n := b.survivors("98761"); n != "0" {
		t.Errorf("%s processes have survived", n)
	}
}

// TestExecOfASilentGuest: a VM that stands still keeps no wrenn exec, neither one that
// it has not answered nor one whose command runs.
func TestExecOfASilentGuest(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.sh("true")
	wrenn := func(args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(a.bin, "wrenn"), append([]string{"--host", a.url, "exec"}, args...)...)
		cmd.Stderr = os.Stderr
		return cmd
	}
	running := wrenn(b.id, "--", "sh", "-c", "echo started; sleep 98763")
	out, err := running.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(b.vmmPID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(b.vmmPID(), syscall.SIGCONT)
	began := time.Now()
	late := wrenn("--connect-timeout", "2s", b.id, "true")
	if err := late.Run(); late.ProcessState.ExitCode() != 125 || time.Since(began) > 6*time.Second {
		t.Errorf("with --connect-timeout 2s: %v after %v", err, time.Since(began))
	}
	waiting := wrenn(b.id, "true")
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // it asks the guest
	for name, cmd := range map[string]*exec.Cmd{"running": running, "waiting": waiting} {
		began := time.Now()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 143 || time.Since(began) > 8*time.Second {
			t.Errorf("%s: %v, %v after SIGTERM", name, err, time.Since(began))
		}
	}
}

func TestExecCancelled(t *testing.T) {
	b := sharedBox(t)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := b.a.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: b.id, Cmd: "sleep", Args: []string{"98762"}}))
		failed <- err
	}()
	waitFor(t, "the command to start", func() bool { return b.survivors("98762") == "1" })
	cancel()
	wantCode(t, <-failed, connect.CodeCanceled)
	waitFor(t, "the command to end", func() bool { return b.survivors("98762") == "0" })
}

func TestExecDoesNotWaitForBackground(t *testing.T) {
	b := sharedBox(t)
	for _, script := range []string{"sleep 98763 & echo started", "setsid sleep 98763 & echo started"} {
		began := time.Now()
		resp, err := b.exec("sh", "-c", script)
		if err != nil || string(resp.Stdout) != "started\n" {
			t.Errorf("%s: %v, %v", script, resp, err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s: took %s", script, took)
		}
	}
	if n := b.survivors("98763"); n != "2" {
		t.Errorf("%s of 2 background processes live on", n)
	}
	b.sh(`kill $(grep -lsa 9876[3] /proc/[0-9]*/cmdline | cut -d/ -f3)`)
}

func TestExecSideBySide(t *testing.T) {
	b := sharedBox(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			resp, err := b.exec("sh", "-c", fmt.Sprintf("for n in 1 2 3 4 5; do echo %d; echo e%d >&2; done; exit %d", i, i, i))
			if err != nil {
				t.Errorf("exec %d: %v", i, err)
				return
			}
			if out := strings.Repeat(fmt.Sprintf("%d\n", i), 5); string(resp.Stdout) != out || resp.ExitCode != int32(i) {
				t.Errorf("exec %d got %q, %d", i, resp.Stdout, resp.ExitCode)
			}
			if out := strings.Repeat(fmt.Sprintf("e%d\n", i), 5); string(resp.Stderr) != out {
				t.Errorf("exec %d got %q on stderr", i, resp.Stderr)
			}
		})
	}
	wg.Wait()
}

// What the control plane's Exec has no field for goes over the data plane.
func TestProcessOverDataPlane(t *testing.T) {
	b := sharedBox(t)
	client := processconnect.NewProcessClient(http.DefaultClient, b.a.url)
	start := func(config *process.ProcessConfig) (stdout string, end *process.ProcessEvent_EndEvent, err error) {
		req := connect.NewRequest(&process.StartRequest{Process: config})
		b.address(req.Header())
		stream, err := client.Start(t.Context(), req)
		if err != nil {
			return "", nil, err
		}
		defer stream.Close()
		for stream.Receive() {
			event := stream.Msg().Event
			stdout += string(event.GetData().GetStdout())
			if e := event.GetEnd(); e != nil {
				end = e
			}
		}
		return stdout, end, stream.Err()
	}
	cwd := "/usr/lib"
	out, end, err := start(&process.ProcessConfig{Cmd: "sh", Args: []string{"-c", "pwd; echo $COLOUR; exit 6"}, Cwd: &cwd,
		Envs: map[string]string{"COLOUR": "blue green"}})
	if err != nil || out != "/usr/lib\nblue green\n" || end.GetExitCode() != 6 || !end.GetExited() {
		t.Errorf("%q, %v, %v", out, end, err)
	}
	if got := b.sh("echo ${COLOUR:-none}"); got != "none" {
		t.Errorf("the environment of one command reached another: %q", got)
	}
	cwd = "/no/such/dir"
	_, _, err = start(&process.ProcessConfig{Cmd: "pwd", Cwd: &cwd})
	wantCode(t, err, connect.CodeInvalidArgument, "/no/such/dir")
}
