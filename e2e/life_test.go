package e2e_test

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// wantConsole wants a console, each line with the time at which it was printed.
func (b *sandbox) wantConsole() {
	b.t.Helper()
	req := &hostagentv1.GetConsoleRequest{SandboxId: b.id, Timestamps: true, TailBytes: 1 << 20}
	console, err := b.a.GetConsole(b.t.Context(), connect.NewRequest(req))
	if err != nil {
		b.t.Fatal(err)
	}
	last := time.Unix(b.info().CreatedAtUnix, 0)
	for _, line := range strings.Split(strings.TrimSpace(string(console.Msg.Console)), "\n") {
		stamp, _, _ := strings.Cut(line, " ")
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil || at.Before(last) || at.After(time.Now()) {
			b.t.Errorf("line %q is not between %s and now: %v", line, last, err)
		}
		last = at
	}
}

// vmmPID finds the VMM of a sandbox among the processes of this machine; 0 if
// there is none.
func (b *sandbox) vmmPID() int {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		data, _ := os.ReadFile(file)
		argv := strings.Split(string(data), "\x00")
		if strings.HasPrefix(filepath.Base(argv[0]), "qemu-system") && strings.Contains(string(data), "wrenn-"+b.id+"\x00") {
			pid, _ := strconv.Atoi(strings.Split(file, "/")[2])
			return pid
		}
	}
	return 0
}

// The bug that this design exists for: a VM tied to the request that made it.
func TestVMOutlivesItsRequest(t *testing.T) {
	a := sharedAgent(t)
	transport := &http.Transport{}
	client := &http.Client{Transport: transport}
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url+"/hostagent.v1.HostAgentService/CreateSandbox", strings.NewReader(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connect-Timeout-Ms", "60000")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	var created struct{ SandboxID string }
	err = json.NewDecoder(resp.Body).Decode(&created)
	resp.Body.Close()
	cancel()
	transport.CloseIdleConnections()
	if err != nil || created.SandboxID == "" {
		t.Fatalf("create answered %v, %v", created, err)
	}
	b := &sandbox{t, a, created.SandboxID}
	defer b.destroy()
	// The agent has seen the connection's end when it has served another.
	for range 3 {
		if got := b.sh("echo alive"); got != "alive" {
			t.Errorf("got %q", got)
		}
	}
	if s := b.info(); s.Status != "running" {
		t.Errorf("the sandbox is %s", s.Status)
	}
}

// What the create's client gives up on is undone.
func TestCreateGivenUp(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	for name, giveUp := range map[string]func(id string, cancel func()) error{
		"the client leaves": func(_ string, cancel func()) error { cancel(); return nil },
		"another client destroys it": func(id string, _ func()) error {
			_, err := a.DestroySandbox(context.Background(), connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.NoLeaks(t, a.instance()+"-")
			testenv.NoLeaks(t, a.stateDir)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() {
				_, err := a.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{}))
				result <- err
			}()
			b := &sandbox{t: t, a: a}
			waitFor(t, "a guest that boots", func() bool {
				for _, s := range listAll(t, a) {
					if s.Status == "creating" {
						b.id = s.SandboxId
					}
				}
				return b.id != "" && b.vmmPID() != 0
			})
			if err := giveUp(b.id, cancel); err != nil {
				t.Error(err)
			}
			err := <-result
			if code := connect.CodeOf(err); code != connect.CodeCanceled && code != connect.CodeAborted {
				t.Errorf("the create got %v", err)
			}
			waitFor(t, "the sandbox to end", func() bool { s := b.info(); return s == nil || s.Status == "stopped" })
			if pid := b.vmmPID(); pid != 0 {
				t.Errorf("its vmm %d runs on", pid)
			}
		})
	}
}

// The agent may die, stop and start: its sandboxes do not notice.
func TestAgentRestarts(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{TimeoutSec: 3600})
	still := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	b.sh(`nohup python3 -c '
import time
n = 0
while True:
    n += 1
    open("/root/count.new", "w").write(str(n))
    __import__("os").rename("/root/count.new", "/root/count")
    time.sleep(0.02)
' >/dev/null 2>&1 & echo $! >/root/pid`)
	waitFor(t, "the process to count", func() bool { resp, err := b.exec("cat", "/root/count"); return err == nil && resp.ExitCode == 0 })
	if err := still.pause(); err != nil {
		t.Fatal(err)
	}
	const who = "cat /proc/sys/kernel/random/boot_id /root/pid; test -d /proc/$(cat /root/pid) && echo lives"
	before, pid, info := b.sh(who), b.vmmPID(), b.info()
	if !strings.Contains(before, "lives") || pid == 0 {
		t.Fatalf("before: %s, vmm %d", before, pid)
	}

	for name, end := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "stopped": syscall.SIGTERM} {
		if err := a.signal(end); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if b.vmmPID() != pid || still.vmmPID() == 0 {
			t.Fatalf("%s: the agent's end took VMs along", name)
		}
		if err := a.start("--on-shutdown=leave"); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := b.sh(who); got != before {
			t.Errorf("%s: the sandbox was %s, is %s", name, before, got)
		}
		count := b.sh("cat /root/count")
		waitFor(t, "the process to go on counting", func() bool { return b.sh("cat /root/count") != count })
		now := b.info()
		if now.Status != "running" || now.HostIp != info.HostIp || now.CreatedAtUnix != info.CreatedAtUnix || now.TimeoutSec != 3600 ||
			now.ExpiresAtUnix < info.ExpiresAtUnix {
			t.Errorf("%s: the list said %v, says %v", name, info, now)
		}
		if s := still.info(); s.Status != "paused" {
			t.Errorf("%s: the paused sandbox is %s", name, s.Status)
		}
		_, err := still.exec("true")
		wantCode(t, err, connect.CodeFailedPrecondition, "paused")
	}
	if err := still.resume(); err != nil {
		t.Error(err)
	}
	if got := still.sh("echo resumed"); got != "resumed" {
		t.Errorf("after its resume: %q", got)
	}
	if n := len(listAll(t, a)); n != 2 {
		t.Errorf("%d sandboxes, want 2", n)
	}
	// New ones still get addresses of their own.
	third := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	if ip := third.info().HostIp; ip == b.info().HostIp || ip == still.info().HostIp {
		t.Errorf("address %s is given out twice", ip)
	}
}

// A VM that dies while no agent looks is noticed by the next; what was half
// made is freed.
func TestAgentKilledDuringCreate(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	lost := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	go a.CreateSandbox(context.Background(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{MemoryMb: 256}))
	half := &sandbox{t: t, a: a}
	waitFor(t, "a guest that boots", func() bool {
		for _, s := range listAll(t, a) {
			if s.Status == "creating" {
				half.id = s.SandboxId
			}
		}
		return half.id != "" && half.vmmPID() != 0
	})
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(lost.vmmPID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the vmm's end", func() bool { return lost.vmmPID() == 0 })
	if err := a.start("--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	if s := lost.info(); s == nil || s.Status != "stopped" || s.Reason != "lost" {
		t.Errorf("the sandbox without a vm is %v", s)
	}
	if s := half.info(); s == nil || s.Status != "stopped" || s.Reason != "create_failed" {
		t.Errorf("the half-made sandbox is %v", s)
	}
	if pid := half.vmmPID(); pid != 0 {
		t.Errorf("the half-made sandbox's vmm %d runs on", pid)
	}
	left, err := testenv.Take(a.instance() + "-")
	if err != nil || len(left) > 0 {
		for _, line := range left.Lines() {
			if !strings.Contains(line, "nft") {
				t.Errorf("left: %s (%v)", line, err)
			}
		}
	}
	_, err = lost.exec("true")
	wantCode(t, err, connect.CodeFailedPrecondition, "stopped")
}

// An agent whose log has lost its reader goes on, and cleans up at its end.
func TestLogReaderGoesAway(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := a.serveCommand("--on-shutdown=destroy")
	cmd.Stdout, cmd.Stderr = write, write
	err = cmd.Start()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	read.Close()
	waitFor(t, "the agent to serve", func() bool {
		_, err := a.GetVersion(t.Context(), connect.NewRequest(&hostagentv1.GetVersionRequest{}))
		return err == nil
	})
	b := a.create(t, nil)
	if got := b.sh("echo here"); got != "here" {
		t.Errorf("got %q", got)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	if pid := b.vmmPID(); pid != 0 {
		t.Errorf("the vmm %d runs on", pid)
	}
}

// --on-shutdown=destroy: startAgent's inventories show that nothing is left.
// An agent that is told to end while it starts leaves nothing, at whatever
// moment that is.
func TestEndedWhileItStarts(t *testing.T) {
	a := startAgent(t)
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	clean, err := testenv.Take(a.instance())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 60 {
		cmd := a.serveCommand()
		var log safeBuffer
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 2 * time.Millisecond) // the moment, not a wait
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		// Before it listens for signals, one ends it as any program.
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() && ws.ExitStatus() != 0 && ws.ExitStatus() != 128+15 {
			t.Errorf("after %d ms: %v\n%s", 2*i, cmd.ProcessState, log.String())
		}
		after, err := testenv.Take(a.instance())
		if err != nil {
			t.Fatal(err)
		}
		if diff := clean.Diff(after); len(diff) > 0 {
			t.Errorf("ended after %d ms, it left:\n%s\n%s", 2*i, strings.Join(diff, "\n"), log.String())
		}
	}
}

func TestShutdownDestroys(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=destroy")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	paused := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	if err := paused.pause(); err != nil {
		t.Fatal(err)
	}
	running := make(chan error, 1)
	go func() {
		_, err := b.exec("sleep", "1000")
		running <- err
	}()
	waitFor(t, "a command in flight", func() bool { return b.survivors("1000") == "1" })
	began := time.Now()
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the shutdown took %s", took)
	}
	if err := <-running; err == nil {
		t.Error("the command in flight has succeeded")
	}
	if b.vmmPID() != 0 || paused.vmmPID() != 0 {
		t.Error("VMs run on")
	}
	for _, marker := range append(a.markers()[2:], a.instance(), b.id) {
		if left, err := testenv.Take(marker); err != nil || len(left) > 0 {
			t.Errorf("left: %q, %v", left.Lines(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(a.stateDir, "sandboxes", "*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestOneAgentPerStateDirectory(t *testing.T) {
	a := sharedAgent(t)
	second := a.serveCommand()
	second.Args = append(second.Args, "--listen", "127.0.0.1:0")
	out, err := second.CombinedOutput()
	if err == nil {
		t.Fatalf("a second agent has served:\n%s", out)
	}
	if want := "pid " + strconv.Itoa(a.cmd.Process.Pid); !strings.Contains(string(out), want) {
		t.Errorf("the refusal does not say %q:\n%s", want, out)
	}
	if _, err := sharedBox(t).exec("true"); err != nil {
		t.Errorf("the first agent was disturbed: %v", err)
	}
}

// However a VM ends, the sandbox is stopped at once, calls in flight fail, and
// what it held is free.
func TestVMEnds(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	for _, c := range []struct {
		name string
		told string // what the answer to a call in flight says
		end  func(b *sandbox)
	}{
		{"its vmm is killed", "killed by signal 9", func(b *sandbox) {
			if err := syscall.Kill(b.vmmPID(), syscall.SIGKILL); err != nil {
				b.t.Error(err)
			}
		}},
		{"the guest panics", "the guest panicked", func(b *sandbox) {
			b.exec("sh", "-c",
				"echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
		}},
		{"the guest powers off", "the guest powered off", func(b *sandbox) { b.exec("kill", "1") }},
		{"the guest powers off at once", "the guest powered off",
			func(b *sandbox) { b.exec("sh", "-c", "sync; echo o >/proc/sysrq-trigger; sleep 9") }},
		{"the guest reboots", "the guest rebooted", func(b *sandbox) { b.exec("sh", "-c", "echo b >/proc/sysrq-trigger; sleep 9") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			testenv.NoLeaks(t, a.instance()+"-")
			b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
			inFlight := make(chan error, 1)
			go func() {
				_, err := b.a.Exec(context.Background(), connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: b.id, Cmd: "sleep",
					Args: []string{"98765"}}))
				inFlight <- err
			}()
			waitFor(t, "a command in flight", func() bool { return b.survivors("98765") == "1" })
			streamed := make(chan string, 1)
			go func() {
				out, _ := exec.Command(filepath.Join(a.bin, "wrenn"), "--host", a.url, "exec", b.id, "--", "sleep", "87654").CombinedOutput()
				streamed <- string(out)
			}()
			waitFor(t, "a stream in flight", func() bool { return b.survivors("87654") == "1" })
			pid := b.vmmPID()
			ended := make(chan time.Time, 1)
			go func() {
				for syscall.Kill(pid, 0) == nil && b.vmmPID() == pid {
					time.Sleep(pollEvery)
				}
				ended <- time.Now()
			}()
			c.end(b)
			b.waitStopped("vm_exited")
			if took := time.Since(<-ended); took > time.Second {
				t.Errorf("stopped %s after the vm's end", took)
			}
			select {
			case err := <-inFlight:
				// What ends before the VM does is a command that PID 1 killed.
				if err != nil {
					wantCode(t, err, connect.CodeUnavailable, b.id)
					if !strings.Contains(err.Error(), c.told) {
						t.Errorf("the command in flight is told %v, want %q", err, c.told)
					}
				} else if c.name != "the guest powers off" {
					t.Error("the command in flight has succeeded")
				}
			case <-time.After(time.Second):
				t.Error("the command in flight waits on")
			}
			select {
			case out := <-streamed:
				if !strings.Contains(out, c.told) && c.name != "the guest powers off" {
					t.Errorf("wrenn exec is told %q, want %q", out, c.told)
				}
			case <-time.After(2 * time.Second):
				t.Error("wrenn exec waits on")
			}
			_, err := b.exec("true")
			wantCode(t, err, connect.CodeFailedPrecondition, "stopped")
			if s := b.info(); !strings.Contains(s.Detail, c.told) {
				t.Errorf("the list tells %q, want %q", s.Detail, c.told)
			}
			visible, err := a.ListSandboxes(t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
			if err != nil || len(visible.Msg.Sandboxes) > 0 {
				t.Errorf("the plain list shows %v, %v", visible.Msg.GetSandboxes(), err)
			}
			b.wantConsole()
			if err := b.destroy(); err != nil {
				t.Errorf("destroy: %v", err)
			}
			if s := b.info(); s != nil {
				t.Errorf("destroyed, and listed: %v", s)
			}
		})
	}
}

func TestExpiry(t *testing.T) {
	t.Parallel()
	a := startAgent(t)
	const timeout = 3
	forever := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256, TimeoutSec: timeout})
	created := time.Now()
	if s := b.info(); s.TimeoutSec != timeout || s.ExpiresAtUnix == 0 {
		t.Errorf("listed as %v", s)
	}
	// Work in flight keeps it, for longer than its timeout.
	if got := b.sh("sleep 5; echo done"); got != "done" {
		t.Errorf("the command was cut off: %q", got)
	}
	idle := time.Now()
	b.waitStopped("expired")
	if after := time.Since(idle); after < timeout*time.Second-100*time.Millisecond || after > (timeout+3)*time.Second {
		t.Errorf("expired %s after the last command, want %d s", after, timeout)
	}
	if time.Since(created) < (5+timeout)*time.Second {
		t.Error("it expired before its time")
	}
	if s := forever.info(); s.Status != "running" || s.ExpiresAtUnix != 0 {
		t.Errorf("the sandbox that never expires is %v", s)
	}
	if b.vmmPID() != 0 {
		t.Error("its vmm runs on")
	}
}

// A destroy that many ask for at once is one destroy.
func TestDestroyTogether(t *testing.T) {
	a := sharedAgent(t)
	testenv.NoLeaks(t, a.instance()+"-")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	results := make(chan error, 8)
	for range cap(results) {
		go func() { results <- b.destroy() }()
	}
	done := 0
	for range cap(results) {
		switch err := <-results; {
		case err == nil:
			done++
		case connect.CodeOf(err) != connect.CodeNotFound:
			t.Error(err)
		}
	}
	if done == 0 {
		t.Error("no client has destroyed it")
	}
	if s := b.info(); s != nil {
		t.Errorf("it is listed: %v", s)
	}
}

// A host that is full says what is short.
func TestFullHost(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--max-sandboxes", "1", "--max-vcpus", "4", "--max-memory", "800")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	create := func(req *hostagentv1.CreateSandboxRequest) error {
		_, err := a.CreateSandbox(t.Context(), connect.NewRequest(req))
		return err
	}
	wantCode(t, create(&hostagentv1.CreateSandboxRequest{MemoryMb: 128}), connect.CodeResourceExhausted, "1 of 1")
	if err := b.destroy(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, create(&hostagentv1.CreateSandboxRequest{MemoryMb: 1024}), connect.CodeResourceExhausted, "memory", "800")
	wantCode(t, create(&hostagentv1.CreateSandboxRequest{Vcpus: 5}), connect.CodeResourceExhausted, "vcpus", "4")
	if n := len(listAll(t, a)); n != 0 {
		t.Errorf("%d sandboxes are listed", n)
	}
}

// An agent refuses settings that would be a mistake.
func TestServeRefusesBadSettings(t *testing.T) {
	testenv.Root(t)
	a := &agent{bin: binDir(t), stateDir: t.TempDir(), addr: "127.0.0.1:0"}
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"--listen", "50051"}, []string{"--listen", "missing port"}},
		{[]string{"--on-shutdown", "explode", "--log-format", "xml"}, []string{"explode", "xml"}},
		{[]string{"--host-range", "10.1.0.0/24", "--vmm", "vax"}, []string{"/16", "vax"}},
		{nil, []string{"wrenn setup"}},
	} {
		cmd := a.serveCommand(c.args...)
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("%q was accepted", c.args)
		}
		for _, w := range c.words {
			if !strings.Contains(string(out), w) {
				t.Errorf("%q: the refusal does not say %q:\n%s", c.args, w, out)
			}
		}
	}
}
