package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

const greeting = `{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}`

// monitorOf serves QMP with answers of the test's: a line for each command,
// after which the connection stays; none ends it.
func monitorOf(t *testing.T, hello string, answer func(command string) string) (path string) {
	t.Helper()
	return monitorCounting(t, hello, answer, func() {})
}

// monitorCounting is monitorOf that calls came for each connection before it is served.
func monitorCounting(t *testing.T, hello string, answer func(command string) string, came func()) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			came()
			fmt.Fprintln(conn, hello)
			lines := bufio.NewScanner(conn)
			for lines.Scan() {
				var request struct{ Execute string }
				if err := json.Unmarshal(lines.Bytes(), &request); err != nil {
					t.Errorf("request %q: %v", lines.Text(), err)
				}
				reply := `{"return": {}}`
				if request.Execute != "qmp_capabilities" {
					reply = answer(request.Execute)
				}
				if reply == "" {
					break
				}
				fmt.Fprintln(conn, reply)
			}
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return path
}

// vmAt is a VM behind a monitor of the test's; its process only sleeps.
func vmAt(t *testing.T, path string) *vm {
	t.Helper()
	process, err := launch.Start(launch.Program{Args: []string{"/bin/sleep", "60"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := process.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	v := newVM(process, vmm.Report{Version: "7.2.22", CPU: DefaultCPU}, state{Process: process.Ref(), QMP: path})
	t.Cleanup(v.line.hangUp)
	return v
}

func TestLostAnswers(t *testing.T) {
	for _, c := range []struct {
		name  string
		works bool // the command takes effect before its answer is lost
	}{{"done", true}, {"not done", false}} {
		status := "running"
		path := monitorOf(t, greeting, func(command string) string {
			switch command {
			case "stop":
				if c.works {
					status = "paused"
				}
				return ""
			case "query-status":
				return fmt.Sprintf(`{"return": {"status": %q}}`, status)
			}
			return `{"return": {}}`
		})
		err := vmAt(t, path).Pause(t.Context())
		if c.works && err != nil || !c.works && !errors.Is(err, errdefs.Unavailable) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// The connection of one operation serves the next ones, until it breaks or fails.
func TestConnectionIsKept(t *testing.T) {
	answers := make(chan string, 10)
	var connections atomic.Int32
	path := monitorCounting(t, greeting, func(string) string { return <-answers }, func() { connections.Add(1) })
	v := vmAt(t, path)
	const running = `{"return": {"status": "running"}}`
	ask := func(what, answer string, fails bool, want int32) {
		t.Helper()
		answers <- answer
		if _, err := v.status(t.Context()); (err != nil) != fails {
			t.Errorf("%s: %v", what, err)
		}
		if got := connections.Load(); got != want {
			t.Errorf("%s: %d connections, want %d", what, got, want)
		}
	}
	ask("first", running, false, 1)
	ask("second", running, false, 1)
	ask("refused", `{"error": {"class": "GenericError", "desc": "no"}}`, true, 1)
	ask("after a refusal", running, false, 2)
	ask("broken", "", true, 2)
	ask("after it broke", running, false, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := v.status(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without an answer: %v", err)
	}
	answers <- running // the monitor's, of the question before
	ask("after a time-out", running, false, 4)
	// Another holder of the same VM in this process has the same connection, and a VM
	// that is given up none.
	if other := lineTo(path); other != v.line {
		t.Error("there are two lines to one QEMU")
	}
	v.line.hangUp()
	if v.line.kept != nil || lineTo(path) == v.line {
		t.Error("the line is still there")
	}
	lineTo(path).hangUp()
}

func TestAnswers(t *testing.T) {
	const running = `{"return": {"status": "running"}}`
	for _, c := range []struct {
		name, hello string
		answers     map[string]string
		class       *errdefs.Class
		text        string
	}{
		{"fine", greeting, map[string]string{"cont": `{"return": {}}`, "query-status": running}, nil, ""},
		{"event between", greeting, map[string]string{"cont": `{"event": "RESUME", "timestamp": {}}` + "\n" + `{"return": {}}`, "query-status": running}, nil, ""},
		{"refusal", greeting, map[string]string{"cont": `{"error": {"class": "GenericError", "desc": "no room"}}`, "query-status": `{"return": {"status": "paused"}}`}, nil, "qmp cont: no room"},
		{"other state", greeting, map[string]string{"cont": `{"return": {}}`, "query-status": `{"return": {"status": "internal-error"}}`}, errdefs.WrongState, "vm is internal-error"},
		{"nonsense", greeting, map[string]string{"cont": `what?`}, errdefs.Unavailable, "does not answer"},
		{"other protocol", `{"hello": 1}`, nil, errdefs.Unavailable, "does not speak QMP"},
		{"no json", `220 mail.example.org`, nil, errdefs.Unavailable, "does not answer"},
	} {
		path := monitorOf(t, c.hello, func(command string) string { return c.answers[command] })
		err := vmAt(t, path).Resume(t.Context())
		if errdefs.ClassOf(err) != c.class || (err == nil) != (c.text == "") || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v: %q", c.name, err, c.class, c.text)
		}
	}
}

func TestStalled(t *testing.T) {
	for _, c := range []struct {
		name, status, disks string
		class               *errdefs.Class
	}{
		{"running", "running", "", nil},
		{"paused", "paused", "", nil},
		{"full", "io-error", `[{"io-status": "ok"}, {"io-status": "nospace"}]`, errdefs.Exhausted},
		{"failed", "io-error", `[{"io-status": "failed"}, {}]`, errdefs.Unavailable},
	} {
		path := monitorOf(t, greeting, func(command string) string {
			switch command {
			case "query-status":
				return fmt.Sprintf(`{"return": {"status": %q}}`, c.status)
			case "query-block":
				return `{"return": ` + c.disks + `}`
			}
			return `{"return": {}}`
		})
		v := vmAt(t, path)
		why, err := v.Stalled(t.Context())
		if err != nil || errdefs.ClassOf(why) != c.class {
			t.Errorf("%s: %v, %v", c.name, why, err)
		}
		if c.status != "io-error" {
			continue
		}
		// It is as good as paused, and what stops it again has let it go on.
		if err := errors.Join(v.Pause(t.Context()), v.Resume(t.Context())); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// More callers than the socket's queue has room for wait for their turn.
func TestManyCallers(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for i := range 20 {
		wg.Go(func() {
			call := v.Pause
			if i%2 == 0 {
				call = v.Resume
			}
			// The other half may have changed the state again by the time it
			// is read; that is no failure of the call's transport.
			if err := call(ctx); err != nil && !errors.Is(err, errdefs.WrongState) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := v.Pause(ctx); err != nil {
		t.Error(err)
	}
}

// TestAnswerToAnother: the answer to a command whose connection broke off comes on
// the next one, and is not taken for that of the command which is waited for.
func TestAnswerToAnother(t *testing.T) {
	v := vmAt(t, monitorOf(t, greeting, func(string) string {
		return `{"return": {}, "id": "of-before"}` + "\n" + `{"error": {"class": "GenericError", "desc": "no"}, "id": "of-before"}` + "\n" +
			`{"return": {"status": "paused"}}`
	}))
	if status, err := v.status(t.Context()); err != nil || status != statusPaused {
		t.Errorf("status %q, %v", status, err)
	}
}

// A VM that KVM cannot run on is ended at once, as its VMM's failure, whether this
// agent sees it happen, finds it so or asks for something else.
func TestInternalError(t *testing.T) {
	for name, find := range map[string]func(t *testing.T, v *vm){
		"log": func(*testing.T, *vm) {},
		"stalled": func(t *testing.T, v *vm) {
			if why, err := v.Stalled(t.Context()); why != nil || !errors.Is(err, errdefs.Unavailable) {
				t.Errorf("stalled: %v, %v", why, err)
			}
		},
		"attach": func(t *testing.T, v *vm) {
			if _, err := New(Config{}).Attach(t.Context(), v.Handle()); !errors.Is(err, errdefs.NotFound) {
				t.Errorf("attach: %v, want not found", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := monitorOf(t, greeting, func(string) string { return `{"return": {"status": "internal-error"}}` })
			script := "exec sleep 60"
			if name == "log" {
				script = "echo 'KVM internal error. Suberror: 1' >&2; " + script
			}
			process, err := launch.Start(launch.Program{Args: []string{"/bin/sh", "-c", script}, Log: filepath.Join(t.TempDir(), launch.LogName)})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { process.Kill(context.Background()) })
			v := newVM(process, vmm.Report{Version: "7.2.22", CPU: DefaultCPU}, state{Process: process.Ref(), QMP: path})
			t.Cleanup(v.line.hangUp)
			if name == "log" {
				go v.watch()
			}
			find(t, v)
			select {
			case <-v.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the VM is still there")
			}
			// An agent learns the cause from the driver that ended the VM.
			if exit := v.Exit(); name != "attach" && exit.Cause != vmm.VMMFailed {
				t.Errorf("it %s", exit)
			}
		})
	}
}
