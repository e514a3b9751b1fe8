package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// fields reads a /proc file of "name: value" lines.
func fields(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.Join(strings.Fields(value), " ")
	}
	return out
}

// TestJail: what /proc says of a sentry and of the processes in which it runs its guest's
// programs. They are a user without rights in namespaces of their own, see no file of
// the host, and have nothing of the agent's.
func TestJail(t *testing.T) {
	s := subject(t)
	s.Spec.Cgroup = "wrenn-vmmtest/" + s.Spec.ID
	s.Spec.Limits = vmm.Limits{CPUMilli: 1000, MemMiB: 256, PIDs: 64}
	secret, err := os.Create(filepath.Join(t.TempDir(), "of-the-agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	v := start(t, s)
	pid := v.state.Process.PID
	proc := "/proc/" + strconv.Itoa(pid)
	children, err := os.ReadFile(proc + "/task/" + strconv.Itoa(pid) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob(proc + "/task/*/status")
	if err != nil || len(tasks) < 2 {
		t.Fatal(tasks, err)
	}
	for _, child := range strings.Fields(string(children)) {
		tasks = append(tasks, "/proc/"+child+"/status")
	}
	for _, task := range tasks {
		rightless(t, task)
	}
	for _, kind := range []string{"user", "mnt", "pid", "ipc", "uts", "net"} {
		mine, _ := os.Readlink("/proc/self/ns/" + kind)
		if ns, err := os.Readlink(proc + "/ns/" + kind); err != nil || ns == mine {
			t.Errorf("namespace %q, %v: ours", ns, err)
		}
	}
	if mapping, err := os.ReadFile(proc + "/uid_map"); err != nil || strings.Join(strings.Fields(string(mapping)), " ") != "0 871234 1" {
		t.Errorf("users %q, %v", mapping, err)
	}
	if seen := walk(t, proc+"/root"); seen != "/ /etc /etc/localtime /proc" && seen != "/ /etc /proc" {
		t.Errorf("it sees %s", seen)
	}
	fds, err := filepath.Glob(proc + "/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		info, err := os.Stat(fd)
		if strings.Contains(target, "of-the-agent") || strings.Contains(target, "bin/sentry") || err == nil && info.IsDir() {
			t.Errorf("it has %s", target)
		}
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, %v, want its own", sid, err)
	}
	if name, err := os.ReadFile(proc + "/comm"); err != nil || string(name) != "sentry\n" {
		t.Errorf("name %q, %v", name, err)
	}
	if err := errors.Join(v.Pause(t.Context()), v.Resume(t.Context())); err != nil { // it works like that
		t.Error(err)
	}
}

// rightless checks what /proc says of a thread of a sentry.
func rightless(t *testing.T, task string) {
	t.Helper()
	const ptrace = "0000000000080000" // over its own children, which run the guest's programs
	status := fields(t, task)
	for name, want := range map[string]string{
		"Uid": "871234 871234 871234 871234", "Gid": "871235 871235 871235 871235", "Groups": "",
		"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := status[name]; got != want {
			t.Errorf("%s: %s is %q, want %q", task, name, got, want)
		}
	}
	for _, name := range []string{"CapPrm", "CapEff", "CapBnd"} {
		if got := status[name]; got != ptrace && got != "0000000000000000" {
			t.Errorf("%s: %s is %q", task, name, got)
		}
	}
}

// walk lists what is below a directory.
func walk(t *testing.T, root string) string {
	t.Helper()
	var seen []string
	err := filepath.WalkDir(root+"/", func(path string, _ os.DirEntry, err error) error {
		seen = append(seen, "/"+strings.TrimPrefix(path, root+"/"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(seen, " ")
}

// agentEnv makes this test program an agent that starts the VM of the spec in it.
const agentEnv = "WRENN_TEST_AGENT"

// beAgent starts the VM of a spec, says its handle, and waits to be killed.
func beAgent(text string) error {
	var spec vmm.Spec
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return err
	}
	cfg := Config{Sentry: os.Getenv(agentEnv + "_SENTRY"), UID: spec.UID, GID: spec.GID}
	v, err := New(cfg).Start(context.Background(), spec)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(v.Handle()); err != nil {
		return err
	}
	select {}
}

// TestAdoption: a VM outlives the agent that started it and that is killed at any moment;
// the next one finds it, in the condition that it is in.
func TestAdoption(t *testing.T) {
	s := subject(t)
	text, err := json.Marshal(s.Spec)
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(os.Args[0])
	agent.Env = append(os.Environ(), agentEnv+"="+string(text), agentEnv+"_SENTRY="+sentry(t))
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	var h vmm.Handle
	err = json.NewDecoder(out).Decode(&h)
	if e := errors.Join(err, agent.Process.Kill()); e != nil {
		t.Fatal(e)
	}
	_ = agent.Wait()
	found, err := s.Driver.Attach(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, found)
	v := found.(*vm)
	for _, step := range []struct {
		name string
		call func(context.Context) error
		want condition
	}{
		{"pause", v.Pause, paused}, {"pause", v.Pause, paused},
		{"resume", v.Resume, running}, {"resume", v.Resume, running}, {"pause", v.Pause, paused},
	} {
		// As if its agent had died between the call and the answer.
		if err := v.write(changing); err != nil {
			t.Fatal(err)
		}
		if err := step.call(t.Context()); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got, err := v.look(t.Context()); err != nil || got != step.want {
			t.Errorf("after %s: %c, %v", step.name, got, err)
		}
	}
	if err := v.Snapshot(t.Context(), t.TempDir()); err != nil {
		t.Error(err)
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := s.Again().Attach(t.Context(), h); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("attach to a dead one: %v", err)
	}
}

// TestLostRestore: the next agent finds out whether a VM whose agent died while it loaded
// a snapshot has loaded it, and loads it if not.
func TestLostRestore(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	dir := t.TempDir()
	if err := errors.Join(v.Pause(t.Context()), v.Snapshot(t.Context(), dir)); err != nil {
		t.Fatal(err)
	}
	for _, sent := range []bool{true, false} {
		clone, err := s.Driver.(vmm.Restorer).Restore(t.Context(), s.Clone(), dir)
		if err != nil {
			t.Fatal(err)
		}
		ended(t, clone)
		c := clone.(*vm)
		if sent {
			err = c.Resume(t.Context())
		}
		if err := errors.Join(err, c.write(loading)); err != nil {
			t.Fatal(err)
		}
		if err := c.Pause(t.Context()); err != nil {
			t.Errorf("sent %v: pause: %v", sent, err)
		}
		if err := c.Resume(t.Context()); err != nil {
			t.Errorf("sent %v: resume: %v", sent, err)
		}
		if got, err := c.look(t.Context()); err != nil || got != running {
			t.Errorf("sent %v: %c, %v", sent, got, err)
		}
	}
}

// TestStuckSentry: a call ends with its context although the sentry is stuck, and with the
// sentry's end.
func TestStuckSentry(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	if err := unix.Kill(v.state.Process.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := v.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pause: %v, want the deadline", err)
	}
	if _, err := s.Again().Attach(ctx, v.Handle()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("attach: %v, want the deadline", err)
	}
	result := make(chan error, 1)
	go func() { result <- v.Pause(t.Context()) }()
	select {
	case err := <-result:
		t.Fatalf("pause of a stopped sentry: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "killed by signal 9") {
		t.Errorf("pause: %v", err)
	}
}

// TestLiar: what a sentry says is bounded, and so is what an error quotes of it.
func TestLiar(t *testing.T) {
	for _, c := range []struct{ name, reply string }{
		{"long answer", `{"success": true, "result": "` + strings.Repeat("a", 2*maxAnswer) + `"}`},
		{"long refusal", `{"success": false, "err": "\u001b` + strings.Repeat("a", maxAnswer/2) + `"}`},
		{"nonsense", "\x1b]52;c;cm0gLXJmIH4=\a"},
		{"half an answer", `{"success": true, `},
		{"nothing", ""},
		{"another type", `{"success": "yes"}`},
	} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 1<<10))
			_, _ = io.WriteString(conn, c.reply)
		}()
		var result int
		err = call(t.Context(), socket, time.Second, methodState, "id", &result)
		l.Close()
		if err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		strange := func(r rune) bool { return !unicode.IsPrint(r) }
		if text := err.Error(); len(text) > errdefs.MaxForeign+200 || strings.ContainsFunc(text, strange) {
			t.Errorf("%s: the error has %d bytes, or is not printable: %.80q", c.name, len(text), text)
		}
	}
}

// TestConsoleIsBounded: a guest that prints without end fills no disk, and what it prints
// reaches the file of its console alone.
func TestConsoleIsBounded(t *testing.T) {
	s := subject(t)
	if err := os.WriteFile(s.Spec.Init, image(floods(strings.Repeat("flood ", 100)+"\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, s)
	for deadline := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) {
		text, err := vmm.Tail(s.Spec.Console, 2*vmm.MaxConsoleBytes)
		if err != nil {
			t.Fatal(err)
		}
		if len(text) > vmm.MaxConsoleBytes+128<<10 {
			t.Fatalf("the console has %d bytes", len(text))
		}
		if len(text) > vmm.MaxConsoleBytes/2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the console has %d bytes", len(text))
		}
	}
	if log, err := os.ReadFile(filepath.Join(s.Spec.RunDir, launch.LogName)); err != nil || bytes.Contains(log, []byte("flood")) {
		t.Errorf("the sentry's log: %.100q, %v", log, err)
	}
}

// TestDamagedMemory: a snapshot whose memory is not what was written loads, or fails to,
// and does nothing else: the call ends, and the VM can be killed.
func TestDamagedMemory(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	whole := t.TempDir()
	if err := errors.Join(v.Pause(t.Context()), v.Snapshot(t.Context(), whole)); err != nil {
		t.Fatal(err)
	}
	for _, part := range []float64{0, 0.5, 0.99} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(dir, "mem"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		if err == nil {
			_, err = f.WriteAt(bytes.Repeat([]byte{0xa5}, 4096), int64(part*float64(info.Size())))
		}
		if err := errors.Join(err, f.Truncate(info.Size()), f.Close()); err != nil {
			t.Fatal(err)
		}
		clone, err := s.Driver.(vmm.Restorer).Restore(t.Context(), s.Clone(), dir)
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		err = clone.Resume(ctx)
		if err != nil && !errors.Is(err, errdefs.Corrupt) && !errors.Is(err, errdefs.Unavailable) {
			t.Errorf("at %v: %v", part, err)
		}
		if err := clone.Kill(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
}

// TestUpgrade: a program that takes the sentry's place while the agent runs is examined
// anew, and does not take the snapshots of the other one.
func TestUpgrade(t *testing.T) {
	s := subject(t)
	path := filepath.Join(filepath.Dir(s.Spec.RunDir), "sentry")
	program, err := os.ReadFile(sentry(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	d := New(Config{Sentry: path, UID: s.Spec.UID, GID: s.Spec.GID})
	s.Driver = d
	v := start(t, s)
	dir := t.TempDir()
	if err := errors.Join(v.Pause(t.Context()), v.Snapshot(t.Context(), dir)); err != nil {
		t.Fatal(err)
	}
	before, err := d.SnapshotKey(t.Context(), s.Spec)
	if err != nil {
		t.Fatal(err)
	}
	// Behind the end of a program is room for anything.
	if err := os.WriteFile(path+".new", append(program, "another"...), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if after, err := d.SnapshotKey(t.Context(), s.Spec); err != nil || after == before {
		t.Errorf("the key is the same, %v", err)
	}
	if _, err := d.Restore(t.Context(), s.Clone(), dir); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("restore: %v, want unsupported", err)
	}
	// The old one runs on under the new driver.
	again, err := New(Config{Sentry: path}).Attach(t.Context(), v.Handle())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Resume(t.Context()); err != nil {
		t.Error(err)
	}
}
