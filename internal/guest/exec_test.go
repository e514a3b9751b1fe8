package guest_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/envd"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// serveEnvd runs a real envd in this process and returns a client of it.
func serveEnvd(t *testing.T) *guest.Client {
	t.Helper()
	server := envd.New(envd.Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	ctx, cancel := context.WithCancel(t.Context())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	c := guest.New(l.Addr().(*net.TCPAddr).AddrPort(), "")
	t.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		server.Close()
	})
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

func sh(script string) guest.Command {
	return guest.Command{Cmd: "sh", Args: []string{"-c", script}, Timeout: 20 * time.Second}
}

func TestExec(t *testing.T) {
	c := serveEnvd(t)
	for _, tt := range []struct {
		name           string
		cmd            guest.Command
		stdout, stderr string
		code           int
		signal         bool
	}{
		{"streams apart", sh("echo out; echo err >&2"), "out\n", "err\n", 0, false},
		{"exit status", sh("exit 3"), "", "", 3, false},
		{"exit status 255", sh("exit 255"), "", "", 255, false},
		{"exit status like a signal's", sh("exit 137"), "", "", 137, false},
		{"killed", sh("kill -KILL $$"), "", "", 137, true},
		{"terminated", sh("kill -TERM $$"), "", "", 143, true},
		{"segmentation fault", sh("kill -SEGV $$"), "", "", 139, true},
		{"real-time signal", sh("kill -40 $$"), "", "", 168, true},
		{"no input", sh("cat"), "", "", 0, false},
		{"environment", guest.Command{Cmd: "sh", Args: []string{"-c", "echo $A $HOME"}, Env: map[string]string{"A": "b c", "HOME": "/x"}}, "b c /x\n", "", 0, false},
		{"directory", guest.Command{Cmd: "pwd", Cwd: "/usr"}, "/usr\n", "", 0, false},
		{"user", guest.Command{Cmd: "id", Args: []string{"-un"}, User: "nobody"}, "nobody\n", "", 0, false},
		{"arguments as they are", guest.Command{Cmd: "printf", Args: []string{"%s|", "a b", "", "$x", "*"}}, "a b||$x|*|", "", 0, false},
		{"absolute path", guest.Command{Cmd: "/bin/echo", Args: []string{"hi"}}, "hi\n", "", 0, false},
		{"bytes that are no text", guest.Command{Cmd: "printf", Args: []string{`\377\000\n`}}, "\xff\x00\n", "", 0, false},
		{"beyond the bound", guest.Command{Cmd: "printf", Args: []string{"0123456789"}, MaxOutput: 4}, "0123\n[wrenn: 6 bytes of stdout are missing]\n", "", 0, false},
		{"at the bound", guest.Command{Cmd: "printf", Args: []string{"0123"}, MaxOutput: 4}, "0123", "", 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.cmd.User != "" && os.Getuid() != 0 {
				t.Skip("needs root to become another user")
			}
			got, err := c.Exec(t.Context(), tt.cmd)
			if err != nil {
				t.Fatal(err)
			}
			if string(got.Stdout) != tt.stdout || string(got.Stderr) != tt.stderr || got.ExitCode != tt.code {
				t.Errorf("got %q, %q, %d; want %q, %q, %d", got.Stdout, got.Stderr, got.ExitCode, tt.stdout, tt.stderr, tt.code)
			}
			if signal := map[bool]int{true: tt.code - 128}[tt.signal]; int(got.Signal) != signal || got.OutOfMemory {
				t.Errorf("signal %d, out of memory: %v; want %d", got.Signal, got.OutOfMemory, signal)
			}
		})
	}
}

func TestExecRefused(t *testing.T) {
	c := serveEnvd(t)
	for _, tt := range []struct {
		name  string
		cmd   guest.Command
		class *errdefs.Class
		text  string
	}{
		{"no such command", guest.Command{Cmd: "no-such-command"}, errdefs.NotFound, `command "no-such-command" not found in the guest`},
		{"no such path", guest.Command{Cmd: "/no/such"}, errdefs.NotFound, `command "/no/such" not found in the guest`},
		{"empty", guest.Command{}, errdefs.InvalidArgument, "the command is empty"},
		{"no directory", guest.Command{Cmd: "pwd", Cwd: "/no/such"}, errdefs.InvalidArgument, "cwd '/no/such' does not exist"},
		{"no user", guest.Command{Cmd: "id", User: "no-such-user"}, errdefs.InvalidArgument, "invalid username: 'no-such-user'"},
		{"a directory", guest.Command{Cmd: "/usr"}, errdefs.InvalidArgument, "permission denied"},
		{"NUL", guest.Command{Cmd: "echo", Args: []string{"a\x00b"}}, errdefs.InvalidArgument, "NUL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := c.Exec(t.Context(), tt.cmd)
			if errdefs.ClassOf(err) != tt.class || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %+v, %v; want %v: %s", got, err, tt.class, tt.text)
			}
		})
	}
}

// A script whose descendants leave the process group and ignore SIGTERM, and
// which says who they are.
const stubborn = `trap '' TERM; echo $$; (trap '' TERM; exec sleep 1000) & echo $!; wait; sleep 1000`

func pidsIn(t *testing.T, text []byte, n int) []int {
	t.Helper()
	var pids []int
	for _, word := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(word); err == nil {
			pids = append(pids, pid)
		}
	}
	if len(pids) != n {
		t.Fatalf("%q does not name %d processes", text, n)
	}
	return pids
}

// runs reports whether the process exists and is not just waiting for its
// parent, which in this test is no reaper, to look at it.
func runs(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func TestExecTimeoutLeavesNoSurvivor(t *testing.T) {
	c := serveEnvd(t)
	cmd := sh(stubborn)
	cmd.Timeout = 300 * time.Millisecond
	began := time.Now()
	got, err := c.Exec(t.Context(), cmd)
	if errdefs.ClassOf(err) != errdefs.TimedOut {
		t.Fatalf("got %v, want timed out", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	for _, pid := range pidsIn(t, got.Stdout, 2) {
		if runs(pid) {
			t.Errorf("process %d has survived", pid)
		}
	}
}

func TestExecTimeoutTerminatesGently(t *testing.T) {
	c := serveEnvd(t)
	// A child that the shell forks later could run the trap, too, until it calls exec.
	cmd := sh(`sleep 1000 & trap 'echo bye; exit 0' TERM; echo hello; wait`)
	cmd.Timeout = 300 * time.Millisecond
	got, err := c.Exec(t.Context(), cmd)
	if errdefs.ClassOf(err) != errdefs.TimedOut || string(got.Stdout) != "hello\nbye\n" {
		t.Errorf("got %q, %v; want the output up to the end, timed out", got.Stdout, err)
	}
}

func TestExecCancelKills(t *testing.T) {
	c := serveEnvd(t)
	file := t.TempDir() + "/pid"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		waitUntil(t, func() bool { text, _ := os.ReadFile(file); return len(text) > 0 })
		cancel()
	}()
	_, err := c.Exec(ctx, sh("echo $$ >"+file+".new; mv "+file+".new "+file+"; exec sleep 1000"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid := pidsIn(t, text, 1)[0]
	waitUntil(t, func() bool { return !runs(pid) })
}

func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("waited in vain")
			return
		}
	}
}

func TestExecDoesNotWaitForGrandchildren(t *testing.T) {
	c := serveEnvd(t)
	began := time.Now()
	got, err := c.Exec(t.Context(), sh("sleep 1000 & echo $!; exit 7"))
	if err != nil || got.ExitCode != 7 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	pid := pidsIn(t, got.Stdout, 1)[0]
	if !runs(pid) {
		t.Error("the background process did not live on")
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

func TestExecBoundsOutput(t *testing.T) {
	c := serveEnvd(t)
	cmd := sh("yes | head -c 50000000")
	cmd.MaxOutput = 1000
	got, err := c.Exec(t.Context(), cmd)
	if err != nil || got.ExitCode != 0 {
		t.Fatalf("got %d, %v", got.ExitCode, err)
	}
	if !strings.HasSuffix(string(got.Stdout), "\n[wrenn: 49999000 bytes of stdout are missing]\n") {
		t.Errorf("got %q", got.Stdout[900:])
	}
}

func TestExecAllOutputOfAQuickCommand(t *testing.T) {
	c := serveEnvd(t)
	cmd := sh("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2")
	cmd.MaxOutput = 10 << 20
	for range 5 {
		got, err := c.Exec(t.Context(), cmd)
		if err != nil || len(got.Stdout) != 3000000 || len(got.Stderr) != 2000000 {
			t.Fatalf("got %d and %d bytes, %v", len(got.Stdout), len(got.Stderr), err)
		}
	}
}

// A guest that dies in the middle of a stream must not look like success.
func TestExecCutOff(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"at once": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"clean end without an end event": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/connect+proto")
			_, _ = w.Write([]byte{2, 0, 0, 0, 2, '{', '}'})
		},
		"in a frame": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/connect+proto")
			_, _ = w.Write([]byte{0, 0, 0})
		},
		"without the last frame": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/connect+proto")
		},
		"bad gateway": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
			defer c.Close()
			got, err := c.Exec(t.Context(), guest.Command{Cmd: "true"})
			if errdefs.ClassOf(err) != errdefs.Unavailable || got.ExitCode == 0 {
				t.Errorf("got %+v, %v; want unavailable", got, err)
			}
		})
	}
}

func TestExecWithoutAGuest(t *testing.T) {
	c := guest.New(freePort(t), "")
	defer c.Close()
	_, err := c.Exec(t.Context(), guest.Command{Cmd: "true"})
	if errdefs.ClassOf(err) != errdefs.Unavailable || strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("got %v; want unavailable, without an address", err)
	}
}

func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func TestOutOfMemory(t *testing.T) {
	for said, want := range map[string]int{
		"out of memory: limit 448 MiB: signal: killed": 448, "out of memory: signal: killed": 0, "out of memory: ": 0,
		"out of memory: limit -5 MiB: x": 0, "out of memory: limit 99999999999999999999 MiB: x": 0,
		"out of memory: limit 999999999 MiB: x": 0, "out of memory: limit 1e3 MiB: x": 0,
	} {
		if yes, limit := guest.OutOfMemory(&process.ProcessEvent_EndEvent{Error: &said}); !yes || limit != want {
			t.Errorf("%q: %v, limit %d, want %d", said, yes, limit, want)
		}
	}
	for _, said := range []string{"", "signal: killed", "exit status 1: out of memory: limit 1 MiB: "} {
		if yes, limit := guest.OutOfMemory(&process.ProcessEvent_EndEvent{Error: &said}); yes || limit != 0 {
			t.Errorf("%q: %v, limit %d", said, yes, limit)
		}
	}
}
