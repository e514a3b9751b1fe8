package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// sh is a program that a shell script stands for; in tests only.
func sh(script string) Program { return Program{Args: []string{"/bin/sh", "-c", script}} }

func launch(t *testing.T, p Program) *Process {
	t.Helper()
	process, err := Start(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := process.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return process
}

func wait(t *testing.T, p *Process) vmm.Exit {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the process does not end")
	}
	return p.Exit()
}

func TestExit(t *testing.T) {
	for _, c := range []struct {
		script string
		want   vmm.Exit
		text   string
	}{
		{"exit 0", vmm.Exit{Code: 0}, "exited with status 0"},
		{"exit 7", vmm.Exit{Code: 7, Cause: vmm.VMMFailed}, "exited with status 7"},
		{"kill -TERM $$", vmm.Exit{Code: -1, Signal: 15, Cause: vmm.Killed}, "killed by signal 15"},
		{"echo out; echo err >&2; exit 1", vmm.Exit{Code: 1, Cause: vmm.VMMFailed, Detail: "out\nerr"}, "exited with status 1"},
	} {
		p := sh(c.script)
		p.Log = filepath.Join(t.TempDir(), "log")
		got := wait(t, launch(t, p))
		if got != c.want || got.String() != c.text {
			t.Errorf("%s: %+v (%s), want %+v (%s)", c.script, got, got, c.want, c.text)
		}
	}
	if _, err := Start(Program{Args: []string{"/nonexistent"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("launch of nothing: %v", err)
	}
}

func TestSurroundings(t *testing.T) {
	t.Setenv("SECRET_OF_THE_AGENT", "x")
	out := filepath.Join(t.TempDir(), "out")
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := sh(`cat; env; pwd; ls /proc/self/fd | tr '\n' ' '; echo; cut -d' ' -f6 /proc/$$/stat; echo $$`)
	p.Log, p.Files = out, []*os.File{f}
	wait(t, launch(t, p))
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	n := len(lines)
	if strings.Contains(string(data), "SECRET") || n < 5 {
		t.Fatalf("environment:\n%s", data)
	}
	// 4 is ls's own look at the directory.
	if lines[n-4] != "/" || lines[n-3] != "0 1 2 3 4 " || lines[n-2] != lines[n-1] {
		t.Errorf("directory %q, descriptors %q, session %s of %s", lines[n-4], lines[n-3], lines[n-2], lines[n-1])
	}
}

func TestNetNS(t *testing.T) {
	testenv.Root(t)
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	// A process that holds a namespace open stands for a named one.
	holder := exec.Command("unshare", "-n", "sh", "-c", "echo; exec sleep 60")
	pipe, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { holder.Process.Kill(); holder.Wait() }()
	if _, err := pipe.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	path := "/proc/" + itoa(holder.Process.Pid) + "/ns/net"
	want, err := os.Readlink(path)
	if err != nil || want == ours {
		t.Fatal(want, err)
	}
	for range 20 {
		p := sh("sleep 60")
		p.NetNS = path
		process := launch(t, p)
		if got, err := os.Readlink("/proc/" + itoa(process.Ref().PID) + "/ns/net"); err != nil || got != want {
			t.Errorf("namespace %s, %v, want %s", got, err, want)
		}
		process.Kill(t.Context())
	}
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Second); ; runtime.Gosched() {
		strays := 0
		for _, task := range tasks {
			if ns, err := os.Readlink(task); err == nil && ns != ours {
				strays++
			}
		}
		if strays == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of our threads stay in the other namespace", strays)
		}
	}
	p := sh("true")
	p.NetNS = "/proc/self/status"
	if _, err := Start(p); err == nil {
		t.Error("launch in a namespace that is none: no error")
	}
}

// A private program sees no process of ours and none of its neighbour's, and
// cannot signal one; we see it, and end it with all that it started.
func TestPrivate(t *testing.T) {
	testenv.Root(t)
	neighbour := sh("exec sleep 60")
	neighbour.Private = true
	n := launch(t, neighbour)
	p := sh(fmt.Sprintf(`kill -9 %d %d; echo $$; cat /proc/sys/kernel/hostname; setsid sleep 60 & echo $!; wait`, n.Ref().PID, os.Getpid()))
	p.Private, p.Log = true, filepath.Join(t.TempDir(), "log")
	process := launch(t, p)
	var lines []string
	for deadline := time.Now().Add(10 * time.Second); (len(lines) < 5 || lines[len(lines)-2] != "3") && time.Now().Before(deadline); runtime.Gosched() {
		text, _ := os.ReadFile(p.Log)
		lines = strings.Split(string(text), "\n")
	}
	if n := len(lines); n < 5 || !strings.Contains(strings.Join(lines[:n-4], ""), "No such process") || lines[n-4] != "1" || lines[n-3] != "localhost" || lines[n-2] != "3" {
		t.Errorf("it says %q", lines)
	}
	select {
	case <-n.Done():
		t.Errorf("its neighbour %s", n.Exit())
	default:
	}
	for _, kind := range []string{"mnt", "pid", "ipc", "uts"} {
		seen := map[string]bool{}
		for _, pid := range []string{"self", itoa(n.Ref().PID), itoa(process.Ref().PID)} {
			ns, err := os.Readlink("/proc/" + pid + "/ns/" + kind)
			if err != nil || seen[ns] {
				t.Errorf("%s of %s: %q, %v: another's", kind, pid, ns, err)
			}
			seen[ns] = true
		}
	}
	ours, err := os.ReadFile("/proc/" + itoa(process.Ref().PID) + "/task/" + itoa(process.Ref().PID) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	sleeper, err := strconv.Atoi(strings.TrimSpace(string(ours)))
	if err != nil {
		t.Fatal(err)
	}
	adopted, err := Adopt(t.Context(), process.Ref())
	if err != nil {
		t.Fatal(err)
	}
	if err := adopted.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(sleeper, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("what it started lives on: %v", err)
	}
	if exit := wait(t, process); exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
}

// No file becomes larger than the bound.
func TestMaxFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	p := sh("read go; head -c 2097152 /dev/zero >" + path)
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer out.Close()
	p.Args[2] = strings.Replace(p.Args[2], "read go", "read go <&3", 1)
	p.Files, p.MaxFile = []*os.File{in}, 1<<20
	process := launch(t, p)
	if _, err := out.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, process); exit.Code == 0 {
		t.Errorf("it %s", exit)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 1<<20 {
		t.Errorf("file %+v, %v", info, err)
	}
}

func TestKill(t *testing.T) {
	p := launch(t, sh("sleep 60"))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	p.Kill(cancelled) // may say that it did not wait, but tells the process
	if exit := wait(t, p); exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
	for range 3 {
		if err := p.Kill(t.Context()); err != nil {
			t.Errorf("kill of the dead: %v", err)
		}
	}
}

func TestAdopt(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	prog := sh("echo hello; exec sleep 60")
	prog.Log = log
	p := launch(t, prog)
	for text, _ := vmm.Tail(log, 100); len(text) == 0; text, _ = vmm.Tail(log, 100) {
		runtime.Gosched()
	}
	adopted, err := Adopt(t.Context(), p.Ref())
	if err != nil {
		t.Fatal(err)
	}
	other := p.Ref()
	other.Started++
	if _, err := Adopt(t.Context(), other); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("adopt with another start time: %v", err)
	}
	other = p.Ref()
	other.Boot = "another"
	if _, err := Adopt(t.Context(), other); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("adopt of another boot's: %v", err)
	}
	if err := adopted.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exit := adopted.Exit(); exit.Code != -1 || exit.Signal != 0 || exit.Detail != "hello" || exit.String() != "exited with unknown status" {
		t.Errorf("exit of the adopted: %+v", exit)
	}
	if exit := wait(t, p); exit.Signal != 9 {
		t.Errorf("exit of the child: %+v", exit)
	}
	for name, id := range map[string]Ref{"dead": p.Ref(), "nobody": {}, "negative": {PID: -1}, "huge": {PID: 1 << 30}} {
		if _, err := Adopt(t.Context(), id); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("adopt of the %s: %v", name, err)
		}
	}
}

// A process that is not our child, as after the agent's restart.
func TestAdoptAStranger(t *testing.T) {
	out, err := exec.Command("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	id, err := identify(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Adopt(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exit := p.Exit(); exit.Code != -1 {
		t.Errorf("%+v", exit)
	}
}

func TestRelease(t *testing.T) {
	p := launch(t, sh("sleep 60"))
	goroutines := runtime.NumGoroutine()
	for range 20 {
		a, err := Adopt(t.Context(), p.Ref())
		if err != nil {
			t.Fatal(err)
		}
		a.Release()
		select {
		case <-a.Done():
			t.Fatal("released means exited")
		default:
		}
	}
	// A watcher has done all when Release returns, but may not be gone yet.
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("goroutines %d -> %d", goroutines, runtime.NumGoroutine())
			break
		}
	}
	select {
	case <-p.Done():
		t.Error("the process has ended")
	default:
	}
}

func TestStartTime(t *testing.T) {
	const rest = " S 1 5 5 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 1 0 123456 1000 10"
	for _, name := range []string{"sleep", "a b", "a) S (b", ")", ""} {
		if got, err := startTime("5 (" + name + ")" + rest + "\n"); err != nil || got != 123456 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "5 (x)", "5 (x) S 1 2 3"} {
		if _, err := startTime(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// Descriptors and goroutines do not grow with the processes that have been.
func TestNothingIsLeft(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	wait(t, launch(t, sh("true")))
	fds, goroutines := count(), runtime.NumGoroutine()
	for range 50 {
		p := launch(t, sh("true"))
		if a, err := Adopt(t.Context(), p.Ref()); err == nil {
			wait(t, a)
		}
		wait(t, p)
	}
	for deadline := time.Now().Add(2 * time.Second); count() > fds || runtime.NumGoroutine() > goroutines; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("descriptors %d -> %d, goroutines %d -> %d", fds, count(), goroutines, runtime.NumGoroutine())
		}
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is not reaped: %v", err)
	}
}
