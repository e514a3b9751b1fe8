package e2e_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// screen is a wrenn command in a terminal that a test looks at and types on.
type screen struct {
	t       *testing.T
	cmd     *exec.Cmd
	file    *os.File // the terminal's other end
	tty     *os.File // held open, to look at its settings
	shown   safeBuffer
	before  unix.Termios
	drained chan struct{}
}

func openScreen(t *testing.T, a *agent, args ...string) *screen {
	t.Helper()
	cmd := exec.Command(filepath.Join(a.bin, "wrenn"), args...)
	cmd.Env = append(os.Environ(), "WRENN_HOST="+a.url)
	return openTerminal(t, cmd)
}

// openTerminal starts any command in a terminal.
func openTerminal(t *testing.T, cmd *exec.Cmd) *screen {
	t.Helper()
	s := &screen{t: t, cmd: cmd, drained: make(chan struct{})}
	var err error
	if s.file, s.tty, err = pty.Open(); err != nil {
		t.Fatal(err)
	}
	s.before = s.settings()
	s.resize(100, 30)
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = s.tty, s.tty, s.tty
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.drained)
		_, _ = io.Copy(&s.shown, s.file)
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		s.tty.Close()
		s.file.Close()
		<-s.drained
		if t.Failed() {
			t.Logf("on the screen: %q", s.shown.String())
		}
	})
	return s
}

func (s *screen) settings() unix.Termios {
	s.t.Helper()
	got, err := unix.IoctlGetTermios(int(s.tty.Fd()), unix.TCGETS)
	if err != nil {
		s.t.Fatal(err)
	}
	return *got
}

func (s *screen) resize(cols, rows uint16) {
	s.t.Helper()
	if err := pty.Setsize(s.file, &pty.Winsize{Cols: cols, Rows: rows}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *screen) typeIn(keys string) {
	s.t.Helper()
	if _, err := io.WriteString(s.file, keys); err != nil {
		s.t.Fatal(err)
	}
}

// sees waits until the screen has shown the text.
func (s *screen) sees(text string) {
	s.t.Helper()
	waitFor(s.t, text, func() bool { return strings.Contains(s.shown.String(), text) })
}

// ends waits for the command's end, after which the terminal must be as it was
// before.
func (s *screen) ends(status int) {
	s.t.Helper()
	ended := make(chan struct{})
	go func() {
		_ = s.cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		s.t.Fatalf("%q does not end", s.cmd.Args[1:])
	}
	if got := s.cmd.ProcessState.ExitCode(); got != status {
		s.t.Errorf("%q ended with %v, want status %d", s.cmd.Args[1:], s.cmd.ProcessState, status)
	}
	if after := s.settings(); after != s.before {
		s.t.Errorf("%q left the terminal as %+v, it was %+v", s.cmd.Args[1:], after, s.before)
	}
}

func TestTerminal(t *testing.T) {
	b := sharedBox(t)

	t.Run("a shell, its size, its keys, its status", func(t *testing.T) {
		s := openScreen(t, b.a, "shell", b.id)
		s.sees("# ")
		s.typeIn("stty size; tty\r")
		s.sees("30 100")
		s.sees("/dev/pts/")
		s.resize(132, 43)
		s.typeIn("until stty size | grep '43 132'; do sleep 0.05; done\r")
		s.sees("\r43 132")
		// Ctrl-C is the guest's: it ends what runs in the shell, not the shell.
		s.typeIn("sh -c 'echo slee\"\"ping; exec sleep 1000'\r")
		s.sees("sleeping")
		s.typeIn("\x03")
		s.typeIn("echo sti''ll here\r")
		s.sees("still here")
		s.typeIn("exit 7\r")
		s.ends(7)
	})
	t.Run("end of input", func(t *testing.T) {
		s := openScreen(t, b.a, "exec", "-it", b.id, "--", "sh")
		s.sees("# ")
		s.typeIn("\x04")
		s.ends(0)
	})
	t.Run("a signal", func(t *testing.T) {
		s := openScreen(t, b.a, "exec", "-t", b.id, "--", "sh", "-c", "echo read''y; exec sleep 1000")
		s.sees("ready")
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.ends(143)
		if got := b.sh("pgrep -x sleep || true"); got != "" {
			t.Errorf("processes %q run on", got)
		}
	})
	t.Run("a terminal that closes", func(t *testing.T) {
		s := openScreen(t, b.a, "shell", b.id)
		s.sees("# ")
		s.typeIn("echo slee''ping; sleep 1000\r")
		s.sees("sleeping")
		if err := s.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the end of what ran in the shell", func() bool { return b.sh("pgrep -x sleep || true") == "" })
	})
	t.Run("a command that does not exist", func(t *testing.T) {
		s := openScreen(t, b.a, "exec", "-it", b.id, "--", "no-such-command")
		s.ends(127)
		s.sees("no-such-command")
	})
	t.Run("Ctrl-C without a terminal of its own", func(t *testing.T) {
		s := openScreen(t, b.a, "exec", b.id, "--", "sh", "-c", "echo read''y; exec sleep 1000")
		s.sees("ready")
		s.typeIn("\x03")
		s.ends(130)
		if got := b.sh("pgrep -x sleep || true"); got != "" {
			t.Errorf("processes %q run on", got)
		}
	})
	t.Run("much output", func(t *testing.T) {
		s := openScreen(t, b.a, "exec", "-it", b.id, "--", "sh", "-c", "seq 100000; echo all''")
		s.ends(0)
		s.sees("100000\r\nall\r\n")
	})
	t.Run("a sandbox of its own", func(t *testing.T) {
		s := openScreen(t, b.a, "run", "-m", "256", "-it", "--", "sh")
		s.sees("# ")
		s.typeIn("exit 3\r")
		s.ends(3)
	})
	t.Run("a sandbox that ends", func(t *testing.T) {
		b := b.a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
		s := openScreen(t, b.a, "shell", b.id)
		s.sees("# ")
		if err := b.destroy(); err != nil {
			t.Fatal(err)
		}
		s.ends(125)
	})
	t.Run("top", func(t *testing.T) {
		s := openScreen(t, b.a, "top", b.id)
		s.sees("PID   COMMAND")
		s.typeIn("\x03")
		s.ends(0)
	})
	t.Run("progress", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, make([]byte, 30<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		s := openScreen(t, b.a, "cp", file, b.id+":/tmp/")
		s.ends(0)
		if got := b.sh("stat -c '%s %a' /tmp/file && rm /tmp/file"); got != "31457280 600" {
			t.Errorf("got %q", got)
		}
		if shown := s.shown.String(); !strings.Contains(shown, "%  ") || !strings.HasSuffix(shown, "\r\x1b[K") {
			t.Errorf("the screen showed %q", shown)
		}
	})
}
