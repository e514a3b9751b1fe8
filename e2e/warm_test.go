package e2e_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// waiting are the guests that records say wait for a sandbox.
func (a *agent) waiting(t testing.TB) (ids []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(a.stateDir, "sandboxes", "sb-*", "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		var record struct{ ID, Warm string }
		data, err := os.ReadFile(file)
		if err == nil && json.Unmarshal(data, &record) == nil && record.Warm != "" {
			ids = append(ids, record.ID)
		}
	}
	return ids
}

// waitWarm waits until so many guests are ready to be sandboxes.
func (a *agent) waitWarm(t testing.TB, n int) {
	t.Helper()
	want := fmt.Sprintf("wrenn_warm{state=\"ready\"} %d\n", n)
	for deadline := time.Now().Add(startLimit); ; time.Sleep(pollEvery) {
		resp, err := http.Get(a.url + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		metrics, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && strings.Contains(string(metrics), want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the pool does not come to %d guests; the agent's log:\n%s", n, a.log.String())
		}
	}
}

// createFrom makes a sandbox and wants it to have started from there.
func (a *agent) createFrom(t testing.TB, from string, req *hostagentv1.CreateSandboxRequest) *sandbox {
	t.Helper()
	resp, err := a.CreateSandbox(t.Context(), connect.NewRequest(req))
	if err != nil {
		t.Fatalf("create sandbox: %v", err)
	}
	var course []string
	for _, p := range resp.Msg.Phases {
		course = append(course, fmt.Sprintf("%s %.1f ms", p.Name, p.Ms))
	}
	t.Logf("%s from %s: %s", resp.Msg.SandboxId, resp.Msg.StartedFrom, strings.Join(course, ", "))
	if resp.Msg.StartedFrom != from || len(course) == 0 || resp.Msg.Why != "" {
		t.Errorf("it started from %q (%q), want %q", resp.Msg.StartedFrom, resp.Msg.Why, from)
	}
	return &sandbox{t, a, resp.Msg.SandboxId}
}

// TestWarm: waiting guests belong to no sandbox until a create takes them, and no
// two sandboxes made of them have anything in common. A waiting guest that dies
// is replaced.
func TestWarm(t *testing.T) {
	a := startAgent(t, "--warm=3")
	restoredBoxes(t, a, 0) // there is a ready snapshot
	a.waitWarm(t, 3)
	waiting := a.waiting(t)
	if len(waiting) != 3 {
		t.Fatalf("%v wait, want 3", waiting)
	}
	before, err := a.ListSandboxes(t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{All: true}))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range before.Msg.Sandboxes {
		if slices.Contains(waiting, s.SandboxId) {
			t.Errorf("the list shows %s, which waits", s.SandboxId)
		}
	}
	hidden := &sandbox{t, a, waiting[2]}
	_, execErr := hidden.exec("true")
	for _, err := range []error{execErr, hidden.destroy(), hidden.pause()} {
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("what waits can be spoken to: %v", err)
		}
	}

	boxes := []*sandbox{
		a.createFrom(t, "warm", &hostagentv1.CreateSandboxRequest{TimeoutSec: 3600}),
		a.createFrom(t, "warm", &hostagentv1.CreateSandboxRequest{}),
	}
	if info := boxes[0].info(); info == nil || info.Status != "running" || info.ExpiresAtUnix == 0 ||
		time.Since(time.Unix(info.CreatedAtUnix, 0)) > time.Minute {
		t.Errorf("it is no new sandbox: %v", info)
	}
	wantDifferent(t, boxes)

	// One that waits dies: it is not handed out, and another takes its place.
	a.waitWarm(t, 3)
	victim := &sandbox{t, a, a.waiting(t)[0]}
	if err := syscall.Kill(victim.vmmPID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	third := a.createFrom(t, "warm", &hostagentv1.CreateSandboxRequest{})
	if third.id == victim.id || third.sh("hostname") != third.id {
		t.Errorf("%s was handed out, %s is dead", third.id, victim.id)
	}
	a.waitWarm(t, 3)
	if slices.Contains(a.waiting(t), victim.id) {
		t.Error("the dead one waits")
	}

	// The agent dies: the sandboxes go on, what waited does not.
	waiting = a.waiting(t)
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	for _, id := range waiting {
		if b := (&sandbox{t, a, id}); b.vmmPID() != 0 || b.info() != nil {
			t.Errorf("%s, which waited, outlives the agent", id)
		}
	}
	if left := a.waiting(t); len(left) != 0 {
		t.Errorf("%v wait, for an agent without a pool", left)
	}
	for _, b := range append(boxes, third) {
		if name := b.sh("hostname"); name != b.id {
			t.Errorf("%s calls itself %s", b.id, name)
		}
	}
}

// TestWarmMakesWay: guests that wait take no room from sandboxes.
func TestWarmMakesWay(t *testing.T) {
	a := startAgent(t, "--warm=2", "--max-sandboxes=2")
	a.waitWarm(t, 2)
	for range 2 {
		a.createFrom(t, "warm", &hostagentv1.CreateSandboxRequest{})
	}
	for _, s := range list(t, a) {
		if err := (&sandbox{t, a, s.SandboxId}).destroy(); err != nil {
			t.Fatal(err)
		}
	}
	a.waitWarm(t, 2)
	for range 2 { // of another kind, which boot
		a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	}
	if left := a.waiting(t); len(left) != 0 {
		t.Errorf("%v wait where there is room for none", left)
	}
	_, err := a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a third of two: %v", err)
	}
}

func list(t testing.TB, a *agent) []*hostagentv1.SandboxInfo {
	t.Helper()
	resp, err := a.ListSandboxes(t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.Sandboxes
}
