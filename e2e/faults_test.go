package e2e_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// long says whether the long form of a test is asked for: make test-faults.
func long() bool { return os.Getenv("WRENN_TEST_LONG") != "" }

// settled waits until nothing is on its way, and demands that records and VMMs
// tell the same story.
func settled(t *testing.T, a *agent) {
	t.Helper()
	waitFor(t, "every sandbox to settle", func() bool {
		return !slices.ContainsFunc(listAll(t, a), func(s *hostagentv1.SandboxInfo) bool {
			return s.Status == "creating" || s.Status == "stopping"
		})
	})
	for _, s := range listAll(t, a) {
		b := &sandbox{t, a, s.SandboxId}
		if alive := s.Status == "running" || s.Status == "paused"; alive != (b.vmmPID() != 0) {
			t.Errorf("sandbox %s is %s, its vmm is process %d", s.SandboxId, s.Status, b.vmmPID())
		}
		if s.Status == "running" && b.sh("echo here") != "here" {
			t.Errorf("nothing can be run in sandbox %s", s.SandboxId)
		}
	}
}

// TestAgentKilledAtAnyMoment kills the agent at moments spread over every
// operation, starts it again, and demands that nothing is lost or left.
func TestAgentKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	moments := 3
	if long() {
		moments = 20
	}
	call := func(f func(context.Context) error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		f(ctx) // its answer dies with the agent
	}
	operations := []struct {
		name string
		// takes is about how long it takes: the moments are spread over it.
		takes time.Duration
		keeps bool
		run   func(context.Context, string) error
	}{
		{"create", 3 * time.Second, true, func(ctx context.Context, _ string) error {
			_, err := a.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{}))
			return err
		}},
		{"pause", 8 * time.Millisecond, true, func(ctx context.Context, id string) error {
			_, err := a.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id}))
			return err
		}},
		{"resume", 30 * time.Millisecond, true, func(ctx context.Context, id string) error {
			_, err := a.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
			return err
		}},
		{"pause without memory", 150 * time.Millisecond, true, func(ctx context.Context, id string) error {
			_, err := a.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id, FilesOnly: true}))
			return err
		}},
		{"boot", 6 * time.Second, true, func(ctx context.Context, id string) error {
			// It runs if the agent was killed before it was paused.
			_, _ = a.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id, FilesOnly: true}))
			_, err := a.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id, FilesOnly: true}))
			return err
		}},
		{"destroy", 80 * time.Millisecond, false, func(ctx context.Context, id string) error {
			_, err := a.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
			return err
		}},
	}
	for i := range moments {
		id := a.create(t, &hostagentv1.CreateSandboxRequest{}).id
		for _, op := range operations {
			at := op.takes * time.Duration(i) / time.Duration(moments)
			t.Run(fmt.Sprintf("%s after %s", op.name, at), func(t *testing.T) {
				var wg sync.WaitGroup
				wg.Go(func() { call(func(ctx context.Context) error { return op.run(ctx, id) }) })
				time.Sleep(at)
				if err := a.signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				wg.Wait()
				if err := a.start("--on-shutdown=leave"); err != nil {
					t.Fatal(err)
				}
				settled(t, a)
				b := &sandbox{t, a, id}
				if s := b.info(); op.keeps && (s == nil || s.Status == "stopped") {
					t.Errorf("the agent's death cost the sandbox: %v", s)
				}
			})
		}
		for _, s := range listAll(t, a) {
			b := &sandbox{t, a, s.SandboxId}
			b.destroy()
		}
		if left := traces(t, a); len(left) != 0 {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}
}

// traces lists what is on the machine of an agent's sandboxes.
func traces(t *testing.T, a *agent) []string {
	t.Helper()
	inventory, err := testenv.Take(a.instance())
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, line := range inventory.Lines() {
		kind, _, _ := strings.Cut(line, " ")
		switch {
		case kind == "nft" || kind == "process" && strings.Contains(line, " serve "):
		case strings.HasSuffix(line, "/run/"+a.instance()):
		case strings.Contains(line, a.instance()+"-") || strings.Contains(line, "sb-"):
			left = append(left, line)
		}
	}
	disks, err := filepath.Glob(filepath.Join(a.stateDir, "sandboxes", "*", "overlay*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(left, disks...)
}

// Networks that are built ahead of use belong to no sandbox: the next agent
// removes those of an agent that was killed, and an agent that ends removes its
// own.
func TestPoolOfNetworks(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--pool=3")
	pooled := func() int {
		names, err := filepath.Glob("/run/netns/" + a.instance() + "-*")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	waitFor(t, "three networks", func() bool { return pooled() == 3 })
	b := a.create(t, nil)
	waitFor(t, "three more networks", func() bool { return pooled() == 4 })
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--pool=1", "--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "one network besides the sandbox's", func() bool { return pooled() == 2 })
	if got := b.sh("echo here"); got != "here" {
		t.Errorf("got %q", got)
	}
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if n := pooled(); n != 1 {
		t.Errorf("%d networks are left, want the sandbox's", n)
	}
}

// TestManyCallersOnRealVMs lets several callers do what they like with a
// handful of real sandboxes, whose VMMs die now and then, for a bounded time.
func TestManyCallersOnRealVMs(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--max-sandboxes=4", "--max-starts=2")
	lasts := 20 * time.Second
	if long() {
		lasts = 3 * time.Minute
	}
	// It goes on until each has come off once: what dies may die before it is used.
	ctx, cancel := context.WithTimeout(t.Context(), 4*lasts)
	defer cancel()
	var done sync.Map
	missing := func() (list []string) {
		for _, what := range []string{"create", "exec", "destroy"} {
			if _, ok := done.Load(what); !ok {
				list = append(list, what)
			}
		}
		return list
	}
	enough := time.Now().Add(lasts)
	expected := []connect.Code{
		connect.CodeNotFound, connect.CodeFailedPrecondition, connect.CodeAborted, connect.CodeUnavailable,
		connect.CodeResourceExhausted, connect.CodeCanceled, connect.CodeDeadlineExceeded,
	}
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for ctx.Err() == nil && (time.Now().Before(enough) || len(missing()) > 0) {
				id := "sb-0000000000000000"
				if boxes := listAll(t, a); len(boxes) > 0 {
					id = boxes[rand.IntN(len(boxes))].SandboxId
				}
				var err error
				what := []string{"create", "exec", "exec", "pause", "resume", "resume", "destroy", "kill"}[rand.IntN(8)]
				switch what {
				case "create":
					_, err = a.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{MemoryMb: 256}))
				case "exec":
					_, err = a.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: "true", TimeoutSec: 10}))
				case "pause":
					_, err = a.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id}))
				case "resume":
					_, err = a.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
				case "destroy":
					_, err = a.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
				case "kill":
					b := &sandbox{t, a, id}
					if pid := b.vmmPID(); pid != 0 && rand.IntN(4) == 0 {
						syscall.Kill(pid, syscall.SIGKILL)
					}
				}
				if err != nil && !slices.Contains(expected, connect.CodeOf(err)) {
					t.Errorf("%s: %v", what, err)
				}
				if err == nil {
					done.Store(what, true)
				}
			}
		})
	}
	wg.Wait()
	settled(t, a)
	for _, s := range listAll(t, a) {
		b := &sandbox{t, a, s.SandboxId}
		b.destroy()
	}
	if left := traces(t, a); len(left) != 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	for _, what := range missing() {
		t.Errorf("no %s succeeded in %s: the test shows nothing", what, 4*lasts)
	}
}

// TestSoak makes, uses and destroys sandboxes one after the other and demands
// that the agent is afterwards what it was before. make soak does it 1,000
// times.
func TestSoak(t *testing.T) {
	cycles := 5
	if s := os.Getenv("WRENN_SOAK"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		cycles = n
	}
	a := startAgent(t)
	cycle := func() {
		b := a.create(t, &hostagentv1.CreateSandboxRequest{})
		if got := b.sh("echo $((6*7))"); got != "42" {
			t.Fatalf("got %q", got)
		}
		b.destroy()
	}
	cycle() // what is made once, at first use, is no leak
	before := a.vitals(t)
	start := time.Now()
	for range cycles {
		cycle()
	}
	took := time.Since(start)
	// Idle connections close after a while.
	var after map[string]int
	waitFor(t, "the agent to come to rest", func() bool {
		after = a.vitals(t)
		return after["goroutines"] <= before["goroutines"]+2 && after["descriptors"] <= before["descriptors"]+2
	})
	t.Logf("%d cycles in %s, %s each", cycles, took.Round(time.Second), (took / time.Duration(cycles)).Round(time.Millisecond))
	for _, name := range []string{"descriptors", "goroutines", "memory KiB", "traces", "routes", "disk KiB"} {
		t.Logf("%-12s before %7d  after %7d", name, before[name], after[name])
	}
	// The event log grows by some 1.5 KiB a sandbox until it is cut.
	if grown := after["disk KiB"] - before["disk KiB"]; grown > 64+2*cycles {
		t.Errorf("the state directory grew by %d KiB", grown)
	}
	if after["traces"] != before["traces"] || after["routes"] != before["routes"] {
		t.Error("something is left of the sandboxes")
	}
	if grown := after["memory KiB"] - before["memory KiB"]; grown > 32<<10 {
		t.Errorf("the agent grew by %d KiB", grown)
	}
}

// vitals are the agent's numbers that must not grow with time.
func (a *agent) vitals(t *testing.T) map[string]int {
	t.Helper()
	v := map[string]int{"traces": len(traces(t, a))}
	dir := fmt.Sprintf("/proc/%d/", a.cmd.Process.Pid)
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		t.Fatal(err)
	}
	v["descriptors"] = len(fds)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			v["memory KiB"], _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	resp, err := http.Get(a.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	metrics, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(metrics)) {
		if rest, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			v["goroutines"], _ = strconv.Atoi(strings.TrimSpace(rest))
		}
	}
	if v["goroutines"] == 0 {
		t.Fatal("the metrics do not tell the number of goroutines")
	}
	routes, err := testenv.Take("route ")
	if err != nil {
		t.Fatal(err)
	}
	for line := range routes {
		if strings.Contains(line, a.instance()) {
			v["routes"]++
		}
	}
	err = filepath.Walk(a.stateDir, func(_ string, info os.FileInfo, err error) error {
		if st, ok := info.Sys().(*syscall.Stat_t); err == nil && ok && st.Nlink == 1 {
			v["disk KiB"] += int(st.Blocks / 2)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}
