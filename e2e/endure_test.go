package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// residentKiB is the resident memory in a process's status.
func residentKiB(t testing.TB, status string) int {
	t.Helper()
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatalf("no VmRSS in %q", status)
	return 0
}

// memory is what the agent and the sandbox's envd hold, in KiB.
func (b *sandbox) memory() (agent, envd int) {
	b.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.a.cmd.Process.Pid))
	if err != nil {
		b.t.Fatal(err)
	}
	return residentKiB(b.t, string(status)), residentKiB(b.t, b.sh("cat /proc/1/status"))
}

// TestEndurance does to one sandbox what wears others out, one after the
// other: it must be as good as new after each.
func TestEndurance(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	t.Run("streaming", func(t *testing.T) { (&sandbox{t, a, b.id}).endureStreaming() })
	t.Run("finished processes", func(t *testing.T) { (&sandbox{t, a, b.id}).endureProcesses() })
	t.Run("disk full", func(t *testing.T) { (&sandbox{t, a, b.id}).endureFullDisk() })
	t.Run("out of memory", func(t *testing.T) { (&sandbox{t, a, b.id}).endureNoMemory() })
	t.Run("fork bomb", func(t *testing.T) { (&sandbox{t, a, b.id}).endureForkBomb() })
	t.Run("what else is scarce", func(t *testing.T) { endureScarcity(t, &sandbox{t, a, b.id}) })
}

// start starts a script over the data plane.
func (b *sandbox) start(ctx context.Context, script string) *connect.ServerStreamForClient[process.StartResponse] {
	b.t.Helper()
	req := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "sh", Args: []string{"-c", script}},
		Stdin: new(bool)})
	b.address(req.Header())
	req.Header().Set(guestapi.HeaderLifetime, guestapi.LifetimeStream)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	stream, err := processconnect.NewProcessClient(client, b.a.url).Start(ctx, req)
	if err != nil {
		b.t.Fatal(err)
	}
	return stream
}

// endureStreaming: what passes through is not kept.
func (b *sandbox) endureStreaming() {
	t := b.t
	const warmUp, slack = time.Second, 16 << 10
	lasts := 5 * time.Second
	if long() {
		lasts = time.Minute
	}
	ctx, cancel := context.WithTimeout(t.Context(), lasts+patience)
	defer cancel()
	stream := b.start(ctx, "exec yes")
	defer stream.Close()
	var agent, envd int
	var passed int64
	began := time.Now()
	for time.Since(began) < lasts && stream.Receive() {
		passed += int64(len(stream.Msg().GetEvent().GetData().GetStdout()))
		if agent == 0 && time.Since(began) > warmUp {
			agent, envd = b.memory()
		}
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	agentNow, envdNow := b.memory()
	t.Logf("%d MB in %s; resident KiB: agent %d, then %d, envd %d, then %d", passed/1e6, time.Since(began).Round(time.Second/10),
		agent, agentNow, envd, envdNow)
	if passed < 1<<20 || agent == 0 {
		t.Errorf("%d bytes passed", passed)
	}
	if agentNow > agent+slack || envdNow > envd+slack {
		t.Errorf("by more than %d KiB", slack)
	}
	cancel()
	stream.Close()
	waitFor(t, "yes to end with its stream", func() bool { return b.sh("grep -lsx yes /proc/[0-9]*/comm | wc -l") == "0" })
}

// endureProcesses: envd keeps nothing of a process that has ended.
func (b *sandbox) endureProcesses() {
	t := b.t
	const slack = 4 << 10
	runs := 100
	if long() {
		runs = 2000
	}
	run := func(n int) {
		t.Helper()
		for range n {
			if resp, err := b.exec("true"); err != nil || resp.ExitCode != 0 {
				t.Fatalf("%v, %v", resp, err)
			}
		}
	}
	held := func() (descriptors, threads, cgroups int) {
		t.Helper()
		out := b.sh("ls /proc/1/fd | wc -l; ls /proc/1/task | wc -l; find /sys/fs/cgroup -type d | wc -l")
		if _, err := fmt.Sscan(out, &descriptors, &threads, &cgroups); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		return descriptors, threads, cgroups
	}
	run(10)
	fds, threads, groups := held()
	_, memory := b.memory()
	run(runs)
	fdsNow, threadsNow, groupsNow := held()
	_, memoryNow := b.memory()
	t.Logf("%d processes; descriptors %d, then %d, threads %d, then %d, cgroups %d, then %d, resident KiB %d, then %d",
		runs, fds, fdsNow, threads, threadsNow, groups, groupsNow, memory, memoryNow)
	// The runtime may add a thread or two, and never gives one back.
	if fdsNow > fds || threadsNow > threads+4 || groupsNow > groups+1 || memoryNow > memory+slack {
		t.Error("envd holds more than before")
	}
	if n := b.sh("grep -ls '^[0-9]* (.*) Z' /proc/[0-9]*/stat | wc -l"); n != "0" {
		t.Errorf("%s processes are defunct", n)
	}
}

// upload writes n bytes into a file of the guest.
func (b *sandbox) upload(path string, n int) (status int, body string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodPost, b.a.url+"/files?path="+path, bytes.NewReader(make([]byte, n)))
	if err != nil {
		b.t.Fatal(err)
	}
	b.address(req.Header)
	req.Header.Set("Content-Type", "application/octet-stream")
	status, body, _ = answer(b.t, req)
	return status, body
}

// endureFullDisk: commands run on a full disk, uploads are refused with the
// reason, and room that is made can be used.
func (b *sandbox) endureFullDisk() {
	t := b.t
	// As much as there is, then what is left of it in ever smaller pieces.
	b.sh(`i=0; for size in $(df -Pk / | awk 'NR == 2 {print $4}')K 512M 64M 8M 1M 64K 4K; do
  while [ $i -lt 200 ] && fallocate -l $size /root/fill.$i 2>/dev/null; do i=$((i+1)); done; rm -f /root/fill.$i; done
! head -c 100000 /dev/zero 2>/dev/null >/root/fill.last`)
	if got := b.sh("echo here"); got != "here" {
		t.Errorf("on a full disk: %q", got)
	}
	if status, body := b.upload("/root/upload", 4<<20); status != http.StatusInsufficientStorage ||
		!strings.Contains(body, "not enough disk space") {
		t.Errorf("an upload to a full disk: HTTP %d %s, want 507", status, body)
	}
	b.sh("rm -f /root/fill.* /root/upload")
	if status, body := b.upload("/root/upload", 4<<20); status != http.StatusOK {
		t.Errorf("an upload when there is room again: HTTP %d %s", status, body)
	}
	if got := b.sh("stat -c %s /root/upload; rm /root/upload"); got != fmt.Sprint(4<<20) {
		t.Errorf("%s bytes were uploaded", got)
	}
}

// endureNoMemory: a process that takes all memory is killed, and the caller that
// waits for it learns why.
func (b *sandbox) endureNoMemory() {
	t := b.t
	const hog = `exec python3 -c "
held = []
while True: held.append(b'x' * (8 << 20))"`
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream := b.start(ctx, hog)
	defer stream.Close()
	var end *process.ProcessEvent_EndEvent
	for stream.Receive() {
		if e := stream.Msg().GetEvent().GetEnd(); e != nil {
			end = e
		}
	}
	if err := stream.Err(); err != nil || !strings.HasPrefix(end.GetError(), "out of memory: limit ") || end.GetExited() {
		t.Errorf("%v, %v; want out of memory", end, err)
	}
	resp, err := b.exec("sh", "-c", hog)
	if err != nil || resp.ExitCode != 137 || resp.Signal != 9 || !resp.OutOfMemory || resp.MemoryLimitMb < 200 {
		t.Errorf("%v, %v; want 137, for want of memory, and the limit", resp, err)
	}
	if got := b.sh("echo here"); got != "here" {
		t.Errorf("after it: %q", got)
	}
}

// endureScarcity: while a program takes all that there is of something, commands of root
// and of the user run, a file is written, and the program is ended.
func endureScarcity(t *testing.T, b *sandbox) {
	got := b.sh("cd /proc/sys; cat kernel/threads-max /sys/fs/cgroup/user/pids.max fs/file-max kernel/sched_rt_runtime_us | xargs")
	var threads, processes, files, realtime uint64
	if _, err := fmt.Sscan(got, &threads, &processes, &files, &realtime); err != nil {
		t.Fatalf("%q: %v", got, err)
	}
	if threads < processes+512 || files < 1<<40 || realtime > 500000 {
		t.Errorf("limits of threads, processes, files and real-time threads: %s", got)
	}
	for name, script := range map[string]string{
		"the CPU, in real time": `exec chrt -f 99 sh -c 'echo taken; while :; do :; done'`,
		"open files": `exec python3 -c "
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100000, 100000))
kept = []
try:
    while True: kept.append(os.open('/dev/null', 0))
except (OSError, MemoryError): print('taken', flush=True)
import time; time.sleep(1000)"`,
		"shared memory": `head -c 1G /dev/zero >/dev/shm/all 2>/dev/null; echo taken; exec sleep 1000`,
		"inodes": `mkdir -p /root/many && mount -t tmpfs -o nr_inodes=2000 none /root/many && cd /root/many
			python3 -c "
for i in range(1, 3000):
    try: open(str(i), 'w').close()
    except OSError: break"; echo taken; exec sleep 1000`,
	} {
		t.Run(name, func(t *testing.T) {
			b := &sandbox{t, b.a, b.id}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			taker := b.start(ctx, script)
			for seen := ""; !strings.Contains(seen, "taken"); {
				if !taker.Receive() {
					t.Fatalf("%v; it wrote %q", taker.Err(), seen)
				}
				seen += string(taker.Msg().GetEvent().GetData().GetStdout())
			}
			for _, user := range []string{"root", "user"} {
				resp, err := b.a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
					SandboxId: b.id, User: user, Cmd: "sh", Args: []string{"-c", "echo here >/tmp/scarce-$(id -un) && cat /tmp/scarce-$(id -un)"},
				}))
				if err != nil || string(resp.Msg.Stdout) != "here\n" {
					t.Errorf("a command of %s: %v, %v", user, resp, err)
				}
			}
			if out, err := b.a.cli(t, "cp", "endure_test.go", b.id+":/tmp/scarce"); err != nil {
				t.Errorf("copy: %v: %s", err, out)
			}
			if out, err := b.a.cli(t, "top", b.id); err != nil {
				t.Errorf("top: %v: %s", err, out)
			}
			cancel() // its stream's end is its own
			b.sh("umount /root/many 2>/dev/null; rm -f /dev/shm/all")
		})
	}
}

// countThreads has a witness that needs no process of its own say how many threads there
// are, ten times a second, until ctx ends. The channel then gets the most that it saw.
func (b *sandbox) countThreads(ctx context.Context) <-chan int {
	b.t.Helper()
	witness := b.start(ctx, `exec python3 -uc "
import time
while True: print(open('/proc/loadavg').read().split()[3].split('/')[1]); time.sleep(0.1)"`)
	most, first := make(chan int, 1), make(chan struct{})
	go func() {
		n := 0
		for witness.Receive() {
			for _, f := range strings.Fields(string(witness.Msg().GetEvent().GetData().GetStdout())) {
				if n == 0 {
					close(first)
				}
				seen, _ := strconv.Atoi(f)
				n = max(n, seen)
			}
		}
		most <- n
	}()
	select {
	case <-first:
	case n := <-most:
		b.t.Fatalf("the witness has ended: %v, %d", witness.Err(), n)
	}
	return most
}

// endureForkBomb: a fork bomb stays within its limits, envd answers and commands
// run while it goes on, and its end is the end of all its processes.
func (b *sandbox) endureForkBomb() {
	t := b.t
	// The limit that there is would take an emulated guest half a minute to
	// reach: a lower one, at the same place, is reached at once.
	const limit = 100
	before := strings.Fields(b.sh("f=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup | xargs dirname)/pids.max; echo $f; cat $f"))
	if len(before) != 2 || before[1] == "max" {
		t.Fatalf("the limit of processes is %q", before)
	}
	b.sh(fmt.Sprintf("echo %d >%s", limit, before[0]))
	defer func() { b.sh("echo " + before[1] + " >" + before[0]) }()
	others, err := strconv.Atoi(b.sh("cut -d/ -f2 /proc/loadavg | cut -d' ' -f1"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	most := b.countThreads(ctx)
	ended := make(chan error, 1)
	go func() {
		_, err := b.a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
			SandboxId: b.id, Cmd: "sh", Args: []string{"-c", "bomb() { while :; do bomb & done; }; bomb & exec sleep 98764"}, TimeoutSec: 5,
		}))
		ended <- err
	}()
	var slowest time.Duration
	for asked := 0; ; asked++ {
		select {
		case err = <-ended:
			t.Logf("asked %d times while it went off, at the most %s for an answer", asked, slowest)
			if asked == 0 {
				t.Error("it ended before anything could be asked")
			}
		default:
			began := time.Now()
			if status, body, _ := answer(t, viaHeaders(t, b, 0, "GET", "/metrics")); status != http.StatusOK {
				t.Errorf("while it goes off: HTTP %d %s", status, body)
			}
			slowest = max(slowest, time.Since(began))
			if got := b.sh("echo here"); got != "here" {
				t.Errorf("while it goes off: %q", got)
			}
			continue
		}
		break
	}
	wantCode(t, err, connect.CodeDeadlineExceeded)
	if got := b.sh("echo here"); got != "here" {
		t.Errorf("after it: %q", got)
	}
	cancel()
	n := <-most
	t.Logf("%d threads at the most, %d of them before", n, others)
	// One process with its descendants leaves an eighth to the others.
	if room := limit - limit/8; n < room || n > others+room+20 {
		t.Errorf("want about %d more than before", room)
	}
	waitFor(t, "the bomb's end", func() bool { return b.survivors("bomb") == "0" })
}
