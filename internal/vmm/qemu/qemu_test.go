package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// stays makes the guest, which finds no root file system, hang after its
// panic.
const stays = "panic=0"

// subject is a driver with a guest that consists of a kernel alone.
func subject(t testing.TB) vmmtest.Subject {
	t.Helper()
	kernel := filepath.Join(testenv.StateDir(t), "kernels", "default", "vmlinux")
	testenv.NoLeaks(t, "vmmtest-")
	top, err := os.MkdirTemp("/run", "vmmtest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	id := filepath.Base(top)
	spec := vmm.Spec{
		ID: id, VCPUs: 1, MemMiB: 128, Kernel: vmm.Kernel{Image: kernel, Args: "quiet " + stays},
		Console: filepath.Join(t.TempDir(), "console.log"),
	}
	n := 0
	place := func(spec vmm.Spec) vmm.Spec {
		spec.RunDir = filepath.Join(top, strconv.Itoa(n))
		if err := os.Mkdir(spec.RunDir, 0o700); err != nil {
			t.Fatal(err)
		}
		return spec
	}
	spec = place(spec)
	return vmmtest.Subject{
		Driver: New(Config{}),
		Again:  func() vmm.Driver { return New(Config{}) },
		Spec:   spec,
		Clone: func() vmm.Spec {
			n++
			clone := spec
			clone.ID = fmt.Sprintf("%s-%d", id, n)
			clone.Console = filepath.Join(t.TempDir(), "console.log")
			return place(clone)
		},
		Exiting: func(s *vmm.Spec) { s.Kernel.Args += " panic=-1" },
		Live:    func() int { return len(processes(t, id)) },
	}
}

// processes returns the /proc directories of the QEMUs of a VM.
func processes(t testing.TB, id string) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range all {
		cmdline, err := os.ReadFile(f)
		if err == nil && bytes.Contains(cmdline, []byte("qemu-system")) && bytes.Contains(cmdline, []byte("wrenn-"+id)) {
			found = append(found, filepath.Dir(f))
		}
	}
	return found
}

func start(t testing.TB, s vmmtest.Subject) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	v, err := s.Driver.Start(ctx, s.Spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return v.(*vm)
}

func TestContract(t *testing.T) {
	vmmtest.Run(t, func(t *testing.T) vmmtest.Subject { return subject(t) })
}

func TestConsoleReachesItsFile(t *testing.T) {
	s := subject(t)
	s.Spec.Kernel.Args = "panic=-1"
	v := start(t, s)
	select {
	case <-v.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the guest's panic did not end its VMM")
	}
	text, err := vmm.Tail(s.Spec.Console, 16<<10)
	if err != nil || !strings.Contains(string(text), "Kernel panic") {
		t.Errorf("console: %q, %v", text, err)
	}
}

func TestStartExplainsTheExit(t *testing.T) {
	s := subject(t)
	if err := os.WriteFile(s.Spec.RunDir+"/notakernel", []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Spec.Kernel.Image = s.Spec.RunDir + "/notakernel"
	began := time.Now()
	_, err := s.Driver.Start(t.Context(), s.Spec)
	if err == nil || !strings.Contains(err.Error(), "exited with status 1: ") || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("start: %v, want QEMU's own words", err)
	}
	if errdefs.ClassOf(err) != nil {
		t.Errorf("QEMU's words are in a classed error: %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s to see", took)
	}
	if _, err := os.Stat(qmpSocket(s.Spec.RunDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// A call that waits for a VMM ends when that VMM does.
func TestDeathEndsACall(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	stop(t, v)
	result := make(chan error, 1)
	go func() { result <- v.Pause(t.Context()) }()
	select {
	case err := <-result:
		t.Fatalf("pause of a stopped VMM: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	began := time.Now()
	if err := v.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := <-result
	if !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "killed by signal 9") {
		t.Errorf("pause: %v", err)
	}
	if took := time.Since(began); took > 200*time.Millisecond {
		t.Errorf("it took %s to see", took)
	}
}

// A call ends with its context although the VMM is stuck.
func TestStuckVMM(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	stop(t, v)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := v.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pause: %v, want the deadline", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Again().Attach(ctx, v.Handle()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("attach: %v, want the deadline", err)
	}
}

// The VMM holds nothing of the agent's: not its files, session or directory.
func TestVMMIsDetached(t *testing.T) {
	s := subject(t)
	secret, err := os.Create(filepath.Join(t.TempDir(), "of-the-agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	v := start(t, s)
	proc := "/proc/" + strconv.Itoa(v.state.Process.PID)
	fds, err := filepath.Glob(proc + "/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); strings.Contains(target, "of-the-agent") {
			t.Errorf("%s is the agent's %s", fd, target)
		}
	}
	for fd, want := range map[string]string{"0": os.DevNull, "1": filepath.Join(s.Spec.RunDir, "console.log.pipe"), "2": filepath.Join(s.Spec.RunDir, launch.LogName) + ".pipe"} {
		if got, err := os.Readlink(proc + "/fd/" + fd); err != nil || got != want {
			t.Errorf("fd %s is %q, %v, want %q", fd, got, err, want)
		}
	}
	if sid, err := unix.Getsid(v.state.Process.PID); err != nil || sid != v.state.Process.PID {
		t.Errorf("session %d, %v, want its own", sid, err)
	}
}

// What /proc says of a VMM: it is nobody, in an empty room, without a way out.
func TestHardening(t *testing.T) {
	s := subject(t)
	const uid, gid = 871234, 871235
	s.Spec.UID, s.Spec.GID = uid, gid
	s.Spec.Cgroup = "wrenn-vmmtest/" + s.Spec.ID
	s.Spec.Limits = vmm.Limits{CPUMilli: 1000, MemMiB: 512, PIDs: 64, DiskBytes: 1 << 26, DiskOps: 1000}
	s.Spec.Root = vmm.Root{Layers: []string{s.Spec.Kernel.Image}, Overlay: filepath.Join(t.TempDir(), "overlay")}
	if err := os.WriteFile(s.Spec.Root.Overlay, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	v := start(t, s)
	proc := "/proc/" + strconv.Itoa(v.state.Process.PID)

	// Every thread, not the first alone.
	tasks, err := filepath.Glob(proc + "/task/*/status")
	if err != nil || len(tasks) < 2 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		status := fields(t, task)
		for name, want := range map[string]string{
			"Uid":        "871234 871234 871234 871234",
			"Gid":        "871235 871235 871235 871235",
			"Groups":     "871235",
			"CapInh":     "0000000000000000",
			"CapPrm":     "0000000000000000",
			"CapEff":     "0000000000000000",
			"CapAmb":     "0000000000000000",
			"NoNewPrivs": "1",
			"Seccomp":    "2",
		} {
			if got := status[name]; got != want && !(name == "Groups" && got == "") {
				t.Errorf("%s: %s is %q, want %q", task, name, got, want)
			}
		}
	}
	if root, err := os.Readlink(proc + "/root"); err != nil || root != jail(s.Spec.RunDir) {
		t.Errorf("root directory %q, %v", root, err)
	}
	if cwd, err := os.Readlink(proc + "/cwd"); err != nil || cwd != jail(s.Spec.RunDir) {
		t.Errorf("working directory %q, %v", cwd, err)
	}
	if inside, err := os.ReadDir(proc + "/root"); err != nil || len(inside) != 0 {
		t.Errorf("the VMM sees %v, %v", inside, err)
	}
	for _, kind := range []string{"mnt", "pid", "ipc", "uts"} {
		mine, _ := os.Readlink("/proc/self/ns/" + kind)
		if ns, err := os.Readlink(proc + "/ns/" + kind); err != nil || ns == mine {
			t.Errorf("namespace %q, %v: ours", ns, err)
		}
	}
	limits, err := os.ReadFile(proc + "/limits")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Max core file size 0 0 bytes", "Max open files 1024 1024 files", fmt.Sprintf("Max file size %[1]d %[1]d bytes", s.Spec.MaxFile())} {
		if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), want) {
			t.Errorf("limits lack %q:\n%s", want, limits)
		}
	}
	// It works like that.
	if err := v.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Error(err)
	}
}

// fields reads a /proc file of "name: value" lines.
func fields(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, line := range strings.Split(string(data), "\n") {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.Join(strings.Fields(value), " ")
	}
	return out
}

func stop(t *testing.T, v *vm) {
	t.Helper()
	// Our own child, not reaped before the test's end.
	if err := unix.Kill(v.state.Process.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

// cpuTime is what the VMM has used of the host's CPUs.
func cpuTime(t testing.TB, v *vm) time.Duration {
	t.Helper()
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(v.state.Process.PID) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}
