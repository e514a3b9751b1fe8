package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	gocmp "github.com/google/go-cmp/cmp"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestNew(t *testing.T) {
	for addr, want := range map[string]string{
		"http://127.0.0.1:50051": "http://127.0.0.1:50051", "https://host.example": "https://host.example",
		"http://[::1]:1/": "http://[::1]:1", "http://host.example/wrenn//": "http://host.example/wrenn",
		"": "", "host.example": "", "host.example:1": "", "127.0.0.1:1": "", "ftp://host.example": "", "http://": "", "http://:1": "",
		"http://a b": "", "unix:///run/wrenn/agent.sock": "http://localhost", "unix://": "", "unix://host/path": "", "unix:path": "",
	} {
		h, err := New(addr, "")
		if (err != nil) != (want == "") || err == nil && h.base.String() != want {
			t.Errorf("%q: %v, %v; want %q", addr, h, err, want)
		}
	}
}

// The agent says where it is; one of an earlier version is where it was asked.
func TestPortURL(t *testing.T) {
	a := &clienttest.Agent{}
	url := a.Serve(t)
	_, port, _ := strings.Cut(strings.TrimPrefix(url, "http://"), ":")
	s := sandboxOf(t, url)
	for _, c := range []struct {
		at   Address
		want string
	}{
		{Address{}, "http://80-" + clienttest.ID + ".localhost:" + port + "/"},
		{Address{URL: "https://api.a.example", Domain: "a.example"}, "https://80-" + clienttest.ID + ".a.example/"},
		{Address{URL: "http://127.0.0.1:1", Domain: "localhost:1"}, "http://80-" + clienttest.ID + ".localhost:1/"},
	} {
		a.URL, a.Domain = c.at.URL, c.at.Domain
		if got, err := s.PortURL(t.Context(), 80); err != nil || got != c.want {
			t.Errorf("%+v: %s, %v", c.at, got, err)
		}
	}
}

// The key goes to the agent and never to a guest.
func TestKeyIsTheAgentsAlone(t *testing.T) {
	const key = "e2b_0123"
	a := &clienttest.Agent{Token: "token"}
	s := sandboxOf(t, a.Serve(t))
	h, err := New(s.host.base.String(), key)
	if err != nil {
		t.Fatal(err)
	}
	s = h.Sandbox(clienttest.ID)
	if _, err := s.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Usage(t.Context()); err != nil {
		t.Log(err) // what the fake says is not the point
	}
	own, guests := 0, 0
	for _, r := range a.Requests() {
		switch shown := r.Header.Get("X-Api-Key"); {
		case strings.HasPrefix(r.URL.Path, "/hostagent.v1."):
			if own++; shown != key {
				t.Errorf("%s was shown %q", r.URL.Path, shown)
			}
		default:
			if guests++; shown != "" {
				t.Errorf("%s was shown the key", r.URL.Path)
			}
		}
	}
	if own == 0 || guests == 0 {
		t.Errorf("%d calls of the agent, %d of guests", own, guests)
	}
}

func TestFind(t *testing.T) {
	a := &clienttest.Agent{Also: []string{"sb-0123ffffffffffff", "sb-aaaaaaaaaaaaaaaa"}}
	h := sandboxOf(t, a.Serve(t)).host
	for ref, want := range map[string]string{
		clienttest.ID: clienttest.ID, "sb-ffffffffffffffff": "sb-ffffffffffffffff", "": "", // the agent judges
		"01234": clienttest.ID, "sb-01234": clienttest.ID, "a": "sb-aaaaaaaaaaaaaaaa", "sb-a": "sb-aaaaaaaaaaaaaaaa",
	} {
		if s, err := h.Find(t.Context(), ref); err != nil || s.ID != want {
			t.Errorf("%q: %v, %v; want %s", ref, s, err, want)
		}
	}
	for ref, want := range map[string]*errdefs.Class{"b": errdefs.NotFound, "0123": errdefs.InvalidArgument, "s": errdefs.InvalidArgument} {
		if s, err := h.Find(t.Context(), ref); errdefs.ClassOf(err) != want {
			t.Errorf("%q: %v, %v; want %v", ref, s, err, want)
		}
	}
}

// Streams of the agent end with its error, and the caller may leave them.
func TestStreams(t *testing.T) {
	a := &clienttest.Agent{Text: "x"}
	h := sandboxOf(t, a.Serve(t)).host
	for range 2 { // the second time, the caller leaves after the first
		n := 0
		for v, err := range h.Verify(t.Context(), "a") {
			if n++; err != nil || v.Name != "x" {
				t.Errorf("%v, %v", v, err)
			}
			break
		}
		for e, err := range h.Events(t.Context(), &hostagentv1.WatchEventsRequest{}) {
			if n++; err != nil || e.Event.To != "x" {
				t.Errorf("%v, %v", e, err)
			}
		}
		if n != 2 {
			t.Errorf("%d messages", n)
		}
	}
	bad := sandboxOf(t, (&clienttest.Agent{Err: connect.NewError(connect.CodeDataLoss, errors.New("no"))}).Serve(t)).host
	var got []error
	for _, err := range bad.Verify(t.Context()) {
		got = append(got, err)
	}
	if len(got) != 1 || connect.CodeOf(got[0]) != connect.CodeDataLoss {
		t.Errorf("got %v", got)
	}
}

func TestExec(t *testing.T) {
	a := &clienttest.Agent{Archive: bytes.Repeat([]byte("out"), 50_000), Stderr: "err", Exit: 3}
	s := sandboxOf(t, a.Serve(t))
	var stdout, stderr bytes.Buffer
	status, err := s.Exec(t.Context(), Command{Cmd: "x", Stdin: strings.NewReader("input"), Stdout: &stdout, Stderr: &stderr})
	if status != 3 || err != nil || !bytes.Equal(stdout.Bytes(), a.Archive) || stderr.String() != "err" || string(a.Received) != "input" {
		t.Errorf("%d, %v; %d bytes, %q; it got %q", status, err, stdout.Len(), &stderr, a.Received)
	}
	if status, err := s.Exec(t.Context(), Command{Cmd: "x"}); status != 3 || err != nil {
		t.Errorf("without any connection: %d, %v", status, err)
	}
	if _, err := s.Exec(t.Context(), Command{Cmd: "x", Stdout: broken{}}); !errors.Is(err, errBroken) {
		t.Errorf("output that cannot be written: %v", err)
	}
}

var errBroken = errors.New("broken")

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errBroken }

func TestCommandThatDoesNotStart(t *testing.T) {
	for code, want := range map[connect.Code]int{
		connect.CodeNotFound: 127, connect.CodePermissionDenied: 126, connect.CodeInvalidArgument: 0, connect.CodeInternal: 0,
	} {
		s := sandboxOf(t, (&clienttest.Agent{Fail: connect.NewError(code, errors.New("no"))}).Serve(t))
		_, err := s.Exec(t.Context(), Command{Cmd: "x"})
		got := 0
		if start := new(StartError); errors.As(err, &start) {
			got = start.Status
		}
		if connect.CodeOf(err) != code || got != want || !strings.Contains(err.Error(), "no") {
			t.Errorf("%v: %v, status %d, want %d", code, err, got, want)
		}
	}
}

// A command gets SIGTERM when the caller leaves, and SIGKILL if that is not
// enough; the error is why the caller left.
func TestExecIsInterrupted(t *testing.T) {
	both := []process.Signal{process.Signal_SIGNAL_SIGTERM, process.Signal_SIGNAL_SIGKILL}
	for signals, want := range map[int][]process.Signal{1: both[:1], 2: both, 3: both} {
		a := &clienttest.Agent{Archive: []byte("started"), Endless: signals}
		ctx, leave := context.WithCancelCause(t.Context())
		s := sandboxOf(t, a.Serve(t))
		if signals > 1 {
			s.host.grace = 200 * time.Millisecond
		}
		_, err := s.Exec(ctx, Command{Cmd: "x", Stdout: writerFunc(func() { leave(errBroken) })})
		if diff := gocmp.Diff(want, a.Signaled()); diff != "" || !errors.Is(err, errBroken) {
			t.Errorf("%d: %v, %s", signals, err, diff)
		}
	}
}

// A command of which the guest does not say that it has started is an error in the
// time that the caller gives, and no reason to wait when the caller leaves.
func TestGuestThatDoesNotAnswer(t *testing.T) {
	for _, silent := range []string{"GetSandbox", "Start", "start event"} { // the latter two are the guest's
		t.Run(silent, func(t *testing.T) {
			t.Parallel()
			s := sandboxOf(t, (&clienttest.Agent{Silent: []string{silent}}).Serve(t))
			s.host.grace = 100 * time.Millisecond
			began := time.Now()
			_, err := s.Exec(t.Context(), Command{Cmd: "x", StartWithin: 50 * time.Millisecond})
			if errdefs.ClassOf(err) != errdefs.TimedOut || !strings.Contains(err.Error(), "did not start the command within 50ms") {
				t.Errorf("the caller waits: %v", err)
			}
			ctx, leave := context.WithCancelCause(t.Context())
			time.AfterFunc(50*time.Millisecond, func() { leave(errBroken) })
			if _, err := s.Exec(ctx, Command{Cmd: "x"}); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "may run on") {
				t.Errorf("the caller leaves: %v", err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("both took %v", took)
			}
		})
	}
}

// A guest that falls silent while the command runs does not keep a caller that
// leaves, nor does output that is not taken.
func TestLeavingACommand(t *testing.T) {
	stuck := make(chan struct{})
	defer close(stuck)
	for name, stdout := range map[string]func(leave func()){
		"silent guest":   func(leave func()) { leave() },
		"blocked output": func(leave func()) { leave(); <-stuck },
	} {
		t.Run(name, func(t *testing.T) {
			a := &clienttest.Agent{Archive: []byte("started"), Endless: 3}
			if name == "silent guest" {
				a.Silent = []string{"SendSignal"}
			}
			s := sandboxOf(t, a.Serve(t))
			s.host.grace = 100 * time.Millisecond
			ctx, leave := context.WithCancelCause(t.Context())
			began := time.Now()
			// A command that has started is not subject to StartWithin.
			_, err := s.Exec(ctx, Command{Cmd: "x", StartWithin: 10 * time.Second, Stdout: writerFunc(func() {
				stdout(func() { leave(errBroken) })
			})})
			if took := time.Since(began); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "may run on") || took > 5*time.Second {
				t.Errorf("%v after %v", err, took)
			}
		})
	}
}

// StartWithin bounds the start alone.
func TestLongCommand(t *testing.T) {
	a := &clienttest.Agent{Archive: []byte("started"), Endless: 1, Exit: 4}
	s := sandboxOf(t, a.Serve(t))
	var signalled error
	started := writerFunc(func() {
		go func() {
			time.Sleep(300 * time.Millisecond)
			_, signalled = s.processes("").SendSignal(t.Context(), connect.NewRequest(&process.SendSignalRequest{}))
		}()
	})
	if status, err := s.Exec(t.Context(), Command{Cmd: "x", Stdout: started, StartWithin: 200 * time.Millisecond}); status != 4 || err != nil {
		t.Errorf("%d, %v; %v", status, err, signalled)
	}
}

// writerFunc is called for all that is written.
type writerFunc func()

func (f writerFunc) Write(p []byte) (int, error) { f(); return len(p), nil }

func TestShell(t *testing.T) {
	for missing, want := range map[string]string{"": "bash", "bash": "sh", "bash sh": ""} {
		a := &clienttest.Agent{Missing: strings.Fields(missing), Exit: 4}
		status, err := sandboxOf(t, a.Serve(t)).Shell(t.Context(), Command{})
		if got := strings.Join(a.Started(), " "); got != want {
			t.Errorf("without %q: started %q, want %q", missing, got, want)
		}
		if (err != nil) != (want == "") || err == nil && status != 4 {
			t.Errorf("without %q: %d, %v", missing, status, err)
		}
	}
}

func TestFilesAndProgress(t *testing.T) {
	a := &clienttest.Agent{File: []byte("content"), Entry: clienttest.File(0o644)}
	s := sandboxOf(t, a.Serve(t))
	var heard []string
	x := Copy{
		Begin: func(total int64) { heard = append(heard, fmt.Sprint("begin ", total)) },
		Moved: func(n int) {
			if n > 0 {
				heard = append(heard, fmt.Sprint("moved ", n))
			}
		},
		Note: func(text string) { heard = append(heard, text) },
	}
	var got bytes.Buffer
	if err := s.ReadFile(t.Context(), x, "/x", &got); err != nil || got.String() != "content" {
		t.Errorf("%v, %q", err, &got)
	}
	if err := s.WriteFile(t.Context(), x, strings.NewReader("more"), "/x"); err != nil || string(a.Received) != "more" {
		t.Errorf("%v, %q", err, a.Received)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("own"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.CopyIn(t.Context(), x, file, "/x"); err != nil || string(a.Received) != "own" {
		t.Errorf("%v, %q", err, a.Received)
	}
	want := []string{"begin 7", "moved 7", "moved 4", "begin 3", "moved 3"}
	if diff := gocmp.Diff(want, heard); diff != "" {
		t.Error(diff)
	}
	a.Entry = clienttest.Dir("/d")
	if err, dir := s.ReadFile(t.Context(), x, "/d", io.Discard), new(DirectoryError); !errors.As(err, &dir) || dir.Path != "/d" {
		t.Errorf("a directory: %v", err)
	}
	a.Entry = nil
	if err := s.ReadFile(t.Context(), x, "/d", io.Discard); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("nothing: %v", err)
	}
}

// A forwarded connection carries both directions, and the end of each.
func TestForward(t *testing.T) {
	s := sandboxOf(t, (&clienttest.Agent{Traffic: "token of the ports"}).Serve(t))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- s.Forward(ctx, listener, 80, func(from net.Addr, err error) { t.Errorf("%s: %v", from, err) })
	}()
	sent := bytes.Repeat([]byte("bytes of any kind\x00\xff"), 20_000)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes, %v", len(got), len(sent), err)
	}
	open, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	leave()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a connection is open after the end")
	}
}
