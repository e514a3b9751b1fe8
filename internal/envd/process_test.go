package envd

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// events is what Start and Connect streams have in common.
type events interface {
	Receive() bool
	Err() error
	Close() error
	event() *processv1.ProcessEvent
}

type started struct {
	*connect.ServerStreamForClient[processv1.StartResponse]
}

func (s started) event() *processv1.ProcessEvent { return s.Msg().GetEvent() }

type connected struct {
	*connect.ServerStreamForClient[processv1.ConnectResponse]
}

func (s connected) event() *processv1.ProcessEvent { return s.Msg().GetEvent() }

func bySh(script string) *processv1.StartRequest {
	return &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "sh", Args: []string{"-c", script}}}
}

func start(t *testing.T, c processconnect.ProcessClient, msg *processv1.StartRequest, headers ...string) (events, uint32) {
	t.Helper()
	return startCtx(t, t.Context(), c, msg, headers...)
}

func startCtx(t *testing.T, ctx context.Context, c processconnect.ProcessClient, msg *processv1.StartRequest, headers ...string) (events, uint32) {
	t.Helper()
	req := connect.NewRequest(msg)
	for i := 0; i < len(headers); i += 2 {
		req.Header().Set(headers[i], headers[i+1])
	}
	stream, err := c.Start(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stream.Close() })
	return started{stream}, firstPID(t, started{stream})
}

func attach(t *testing.T, c processconnect.ProcessClient, sel *processv1.ProcessSelector) events {
	t.Helper()
	stream, err := c.Connect(t.Context(), connect.NewRequest(&processv1.ConnectRequest{Process: sel}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stream.Close() })
	firstPID(t, connected{stream})
	return connected{stream}
}

func firstPID(t *testing.T, e events) uint32 {
	t.Helper()
	if !e.Receive() || e.event().GetStart() == nil {
		t.Fatalf("the first event is %v, %v; want start", e.event(), e.Err())
	}
	return e.event().GetStart().GetPid()
}

// all reads a stream to its end.
func all(t *testing.T, e events) (out, errOut, pty string, end *processv1.ProcessEvent_EndEvent) {
	t.Helper()
	var o, eo, p strings.Builder
	for e.Receive() {
		if end != nil {
			t.Errorf("%v after the end event", e.event())
		}
		d := e.event().GetData()
		o.Write(d.GetStdout())
		eo.Write(d.GetStderr())
		p.Write(d.GetPty())
		end = e.event().GetEnd()
	}
	if err := e.Err(); err != nil {
		t.Errorf("stream: %v", err)
	}
	if end == nil {
		t.Error("no end event")
	}
	return o.String(), eo.String(), p.String(), end
}

// readUntil reads data until it contains text.
func readUntil(t *testing.T, e events, text string) string {
	t.Helper()
	var got strings.Builder
	for !strings.Contains(got.String(), text) {
		if !e.Receive() {
			t.Fatalf("the stream ended (%v) after %q without %q", e.Err(), got.String(), text)
		}
		d := e.event().GetData()
		got.Write(d.GetStdout())
		got.Write(d.GetStderr())
		got.Write(d.GetPty())
	}
	return got.String()
}

func byPID(pid uint32) *processv1.ProcessSelector {
	return &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *processv1.ProcessSelector {
	return &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Tag{Tag: tag}}
}

func stdinOf(text string) *processv1.ProcessInput {
	return &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte(text)}}
}

// input is a request that sends in to a process.
func input(to *processv1.ProcessSelector, in *processv1.ProcessInput) *connect.Request[processv1.SendInputRequest] {
	return connect.NewRequest(&processv1.SendInputRequest{Process: to, Input: in})
}

// more is a message of a stream of input.
func more(in *processv1.ProcessInput) *processv1.StreamInputRequest {
	data := &processv1.StreamInputRequest_DataEvent{Input: in}
	return &processv1.StreamInputRequest{Event: &processv1.StreamInputRequest_Data{Data: data}}
}

func ptyOf(text string) *processv1.ProcessInput {
	return &processv1.ProcessInput{Input: &processv1.ProcessInput_Pty{Pty: []byte(text)}}
}

func TestEndEvents(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	for _, tt := range []struct {
		script string
		code   int32
		exited bool
		status string
		err    string
	}{
		{"true", 0, true, "exit status 0", ""},
		{"exit 3", 3, true, "exit status 3", "exit status 3"},
		{"kill -KILL $$", -1, false, "signal: killed", "signal: killed"},
		{"kill -TERM $$", -1, false, "signal: terminated", "signal: terminated"},
	} {
		e, _ := start(t, c, bySh(tt.script))
		_, _, _, end := all(t, e)
		if end.GetExitCode() != tt.code || end.GetExited() != tt.exited || end.GetStatus() != tt.status || end.GetError() != tt.err {
			t.Errorf("%s: %v", tt.script, end)
		}
	}
}

func TestStartCodes(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	nowhere := "/no/such"
	for name, tt := range map[string]struct {
		req  *processv1.StartRequest
		user string
		code connect.Code
		text string
	}{
		"nothing":         {&processv1.StartRequest{}, "", connect.CodeInvalidArgument, "missing"},
		"unknown command": {&processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "no-such"}}, "", connect.CodeNotFound, `command "no-such" not found`},
		"no directory":    {&processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "true", Cwd: &nowhere}}, "", connect.CodeInvalidArgument, "cwd '/no/such' does not exist"},
		"unknown user":    {bySh("true"), "no-such", connect.CodeUnauthenticated, "invalid username: 'no-such'"},
	} {
		t.Run(name, func(t *testing.T) {
			req := connect.NewRequest(tt.req)
			if tt.user != "" {
				req.Header().Set("Authorization", basic(tt.user))
			}
			stream, err := c.Start(t.Context(), req)
			if err == nil {
				for stream.Receive() {
				}
				err = stream.Err()
				stream.Close()
			}
			if connect.CodeOf(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v: %s", err, tt.code, tt.text)
			}
		})
	}
}

func basic(user string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"))
}

func TestEnvironmentOfAUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
	s, url := serve(t, Config{})
	w := request(t, s, "POST", "/init", `{"envVars":{"A":"global","B":"global","E2B_SANDBOX":"changed"},"sandboxId":"sb-7"}`)
	if w.Code != 204 {
		t.Fatal(w.Code, w.Body)
	}
	as, err := s.account("nobody")
	if err != nil {
		t.Fatal(err)
	}
	msg := &processv1.StartRequest{Process: &processv1.ProcessConfig{
		Cmd: "sh", Args: []string{"-c", "id -u; id -g; echo $USER $LOGNAME $HOME $SHELL $A $B $E2B_SANDBOX $E2B_SANDBOX_ID"},
		Envs: map[string]string{"B": "own"}, Cwd: new(string),
	}}
	*msg.Process.Cwd = "/"
	e, _ := start(t, processClient(url), msg, "Authorization", basic("nobody"))
	out, errOut, _, _ := all(t, e)
	want := fmt.Sprintf("%d\n%d\nnobody nobody %s %s global own true sb-7\n", as.uid, as.gid, as.home, as.shell)
	if out != want || errOut != "" {
		t.Errorf("got %q, %q; want %q", out, errOut, want)
	}
}

func TestStdin(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	e, pid := start(t, c, bySh("cat; echo end"))
	for _, text := range []string{"one ", "two\n"} {
		if _, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf(text))); err != nil {
			t.Fatal(err)
		}
	}
	readUntil(t, e, "one two\n")
	if _, err := c.SendInput(t.Context(), input(byPID(pid), ptyOf("x"))); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("terminal input without a terminal: %v", err)
	}
	for range 2 {
		if _, err := c.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(pid)})); err != nil {
			t.Errorf("close stdin: %v", err)
		}
	}
	if out, _, _, _ := all(t, e); out != "end\n" {
		t.Errorf("got %q", out)
	}
	_, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf("x")))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("input after the end: %v", err)
	}
}

func TestStdinDisabled(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	msg := bySh("cat; exec sleep 100")
	msg.Stdin = new(bool)
	_, pid := start(t, c, msg)
	_, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf("x")))
	if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "stdin not enabled or closed") {
		t.Errorf("got %v", err)
	}
}

// Input that a process does not read must not outlive it.
func TestBlockedInputEndsWithTheProcess(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	_, pid := start(t, c, bySh("exec sleep 100"))
	sent := make(chan error, 1)
	go func() {
		_, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf(strings.Repeat("x", 1<<20))))
		sent <- err
	}()
	time.Sleep(20 * time.Millisecond) // for the pipe to be full
	kill(t, c, byPID(pid))
	if err := <-sent; err == nil {
		t.Error("the input counts as taken")
	}
}

func kill(t *testing.T, c processconnect.ProcessClient, sel *processv1.ProcessSelector) {
	t.Helper()
	_, err := c.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: sel, Signal: processv1.Signal_SIGNAL_SIGKILL}))
	if err != nil {
		t.Fatal(err)
	}
}

func TestStreamInputKeepsOrder(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	e, pid := start(t, c, &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "cat"}})
	in := c.StreamInput(t.Context())
	send := func(msg *processv1.StreamInputRequest) {
		if err := in.Send(msg); err != nil {
			t.Fatal(err)
		}
	}
	send(&processv1.StreamInputRequest{Event: &processv1.StreamInputRequest_Start{Start: &processv1.StreamInputRequest_StartEvent{Process: byPID(pid)}}})
	var want strings.Builder
	for i := range 500 {
		line := fmt.Sprintf("%d\n", i)
		want.WriteString(line)
		send(more(stdinOf(line)))
		if i == 100 {
			send(&processv1.StreamInputRequest{Event: &processv1.StreamInputRequest_Keepalive{Keepalive: &processv1.StreamInputRequest_KeepAlive{}}})
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(pid)})); err != nil {
		t.Fatal(err)
	}
	if out, _, _, _ := all(t, e); out != want.String() {
		t.Errorf("got %.40q…", out)
	}
	in = c.StreamInput(t.Context())
	_ = in.Send(more(stdinOf("x")))
	if _, err := in.CloseAndReceive(); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("input for no process: %v", err)
	}
}

func TestPTY(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	msg := bySh(`trap 'stty size' WINCH; tty -s && echo terminal $TERM; stty size; while :; do read -r line || continue; [ "$line" = end ] && exit 5; echo "got $line"; done`)
	msg.Pty = &processv1.PTY{Size: &processv1.PTY_Size{Cols: 91, Rows: 31}}
	e, pid := start(t, c, msg)
	readUntil(t, e, "terminal xterm-256color\r\n31 91\r\n")
	_, err := c.Update(t.Context(), connect.NewRequest(&processv1.UpdateRequest{
		Process: byPID(pid), Pty: &processv1.PTY{Size: &processv1.PTY_Size{Cols: 100, Rows: 40}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	send := func(text string) {
		if _, err := c.SendInput(t.Context(), input(byPID(pid), ptyOf(text))); err != nil {
			t.Fatal(err)
		}
	}
	send("hello\n")
	if got := readUntil(t, e, "got hello"); !strings.Contains(got, "40 100\r\n") {
		t.Errorf("the new size did not arrive: %q", got)
	}
	if _, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf("x"))); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("stdin to a terminal: %v", err)
	}
	if _, err := c.CloseStdin(t.Context(), connect.NewRequest(&processv1.CloseStdinRequest{Process: byPID(pid)})); connect.CodeOf(err) != connect.CodeUnknown {
		t.Errorf("close a terminal's input: %v", err)
	}
	send("end\n")
	if _, _, _, end := all(t, e); end.GetExitCode() != 5 {
		t.Errorf("end: %v", end)
	}
}

func TestPTYInterrupt(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	msg := bySh("echo ready; exec sleep 100")
	msg.Pty = &processv1.PTY{}
	e, pid := start(t, c, msg)
	readUntil(t, e, "ready")
	if _, err := c.SendInput(t.Context(), input(byPID(pid), ptyOf("\x03"))); err != nil {
		t.Fatal(err)
	}
	if _, _, _, end := all(t, e); end.GetStatus() != "signal: interrupt" {
		t.Errorf("end: %v", end)
	}
}

func TestConnect(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	tag := "job"
	msg := bySh("echo before; read x; echo after; exit 4")
	msg.Tag = &tag
	e, pid := start(t, c, msg)
	readUntil(t, e, "before\n")
	others := []events{attach(t, c, byTag(tag)), attach(t, c, byPID(pid))}

	list, err := c.List(t.Context(), connect.NewRequest(&processv1.ListRequest{}))
	if err != nil || len(list.Msg.Processes) != 1 || list.Msg.Processes[0].GetPid() != pid || list.Msg.Processes[0].GetTag() != tag ||
		list.Msg.Processes[0].GetConfig().GetCmd() != "sh" {
		t.Errorf("list: %v, %v", list, err)
	}
	if _, err := c.SendInput(t.Context(), input(byTag(tag), stdinOf("go\n"))); err != nil {
		t.Fatal(err)
	}
	for i, s := range append(others, e) {
		if out, _, _, end := all(t, s); out != "after\n" || end.GetExitCode() != 4 {
			t.Errorf("subscriber %d: %q, %v", i, out, end)
		}
	}
	// For a while the ended process can be asked how it ended.
	if out, _, _, end := all(t, attach(t, c, byPID(pid))); out != "" || end.GetExitCode() != 4 {
		t.Errorf("late: %q, %v", out, end)
	}
	list, err = c.List(t.Context(), connect.NewRequest(&processv1.ListRequest{}))
	if err != nil || len(list.Msg.Processes) != 0 {
		t.Errorf("list after the end: %v, %v", list, err)
	}
	for _, sel := range []*processv1.ProcessSelector{byTag("other"), byPID(1 << 30)} {
		stream, err := c.Connect(t.Context(), connect.NewRequest(&processv1.ConnectRequest{Process: sel}))
		if err == nil {
			stream.Receive()
			err = stream.Err()
			stream.Close()
		}
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("connect to %v: %v", sel, err)
		}
	}
}

func TestProcessSurvivesItsClient(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	ctx, cancel := context.WithCancel(t.Context())
	e, pid := startCtx(t, ctx, c, bySh("read x; echo still here"))
	cancel()
	for e.Receive() {
	}
	other := attach(t, c, byPID(pid))
	if _, err := c.SendInput(t.Context(), input(byPID(pid), stdinOf("\n"))); err != nil {
		t.Fatal(err)
	}
	if out, _, _, _ := all(t, other); out != "still here\n" {
		t.Errorf("got %q", out)
	}
}

func TestTimeLimitHoldsWithoutItsClient(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	ctx, cancel := context.WithCancel(t.Context())
	e, pid := startCtx(t, ctx, c, bySh("exec sleep 100"), "Connect-Timeout-Ms", "300")
	cancel()
	for e.Receive() {
	}
	if _, _, _, end := all(t, attach(t, c, byPID(pid))); end.GetStatus() != "signal: killed" {
		t.Errorf("end: %v", end)
	}
}

func TestTimeLimitEndsTheStream(t *testing.T) {
	_, url := serve(t, Config{})
	e, _ := start(t, processClient(url), bySh("exec sleep 100"), "Connect-Timeout-Ms", "200")
	for e.Receive() {
	}
	if connect.CodeOf(e.Err()) != connect.CodeDeadlineExceeded {
		t.Errorf("got %v", e.Err())
	}
}

func TestSignals(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	for _, sig := range []processv1.Signal{processv1.Signal_SIGNAL_SIGKILL, processv1.Signal_SIGNAL_SIGTERM} {
		e, pid := start(t, c, bySh("exec sleep 100"))
		if _, err := c.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: byPID(pid), Signal: sig})); err != nil {
			t.Fatal(err)
		}
		// No zombie is left when the answer comes.
		if err := syscall.Kill(int(pid), 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("%v: the process is still there: %v", sig, err)
		}
		all(t, e)
		_, err := c.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: byPID(pid), Signal: sig}))
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("signal to the dead: %v", err)
		}
	}
	_, pid := start(t, c, bySh("exec sleep 100"))
	if _, err := c.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{Process: byPID(pid)})); err == nil {
		t.Error("no signal was sent, no error either")
	}
}

func TestKeepalive(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	e, _ := start(t, c, bySh("exec sleep 100"), guestapi.HeaderKeepalive, "1")
	began := time.Now()
	if !e.Receive() || e.event().GetKeepalive() == nil {
		t.Errorf("got %v, %v", e.event(), e.Err())
	}
	if took := time.Since(began); took < 900*time.Millisecond {
		t.Errorf("after %v", took)
	}
}

func TestKeepaliveInterval(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": keepaliveDefault, "x": keepaliveDefault, "0": keepaliveDefault, "-1": keepaliveDefault,
		"99999999999": keepaliveDefault, "50": 50 * time.Second,
	} {
		if got := keepalive(http.Header{guestapi.HeaderKeepalive: {text}}); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestScriptWithoutInterpreter(t *testing.T) {
	_, url := serve(t, Config{})
	script := t.TempDir() + "/script"
	if err := os.WriteFile(script, []byte("echo $0 $1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	e, _ := start(t, processClient(url), &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: script, Args: []string{"a"}}})
	if out, _, _, _ := all(t, e); out != script+" a\n" {
		t.Errorf("got %q", out)
	}
}

// Each of many commands costs nothing once it is over; serve checks the
// goroutines, this the descriptors.
func TestNothingIsLeftPerProcess(t *testing.T) {
	s, url := serve(t, Config{})
	c := processClient(url)
	run := func() {
		msg := bySh("echo hi")
		msg.Pty = &processv1.PTY{}
		for _, m := range []*processv1.StartRequest{bySh("echo hi"), msg} {
			e, _ := start(t, c, m)
			all(t, e)
		}
	}
	run()
	before := countFDs(t)
	for range 20 {
		run()
	}
	eventually(t, "descriptors to be closed", func() bool { return countFDs(t) <= before })
	eventually(t, "readers to be forgotten", func() bool {
		s.processes.mu.Lock()
		defer s.processes.mu.Unlock()
		return len(s.processes.readers) == 0
	})
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// What E2B's clients send and expect, byte for byte: Connect's streaming JSON.
func TestStartAsPlainJSON(t *testing.T) {
	_, url := serve(t, Config{})
	body := []byte(`{"process":{"cmd":"sh","args":["-c","printf hi; exit 2"],"unknownField":1},"stdin":false}`)
	framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	req, err := http.NewRequest("POST", url+"/process.Process/Start", bytes.NewReader(framed))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/connect+json")
	req.Header.Set("Connect-Protocol-Version", "1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/connect+json" {
		t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	var got []string
	for {
		var head [5]byte
		if _, err := io.ReadFull(resp.Body, head[:]); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		frame := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(resp.Body, frame); err != nil {
			t.Fatal(err)
		}
		var value any
		if err := json.Unmarshal(frame, &value); err != nil {
			t.Fatal(err)
		}
		plain, _ := json.Marshal(value)
		got = append(got, strconv.Itoa(int(head[0]))+string(plain))
	}
	want := []string{
		`0{"event":{"data":{"stdout":"aGk="}}}`,
		`0{"event":{"end":{"error":"exit status 2","exitCode":2,"exited":true,"status":"exit status 2"}}}`,
		`2{}`,
	}
	if len(got) != 4 || !strings.HasPrefix(got[0], `0{"event":{"start":{"pid":`) || strings.Join(got[1:], "\n") != strings.Join(want, "\n") {
		t.Errorf("got %s", strings.Join(got, "\n"))
	}
}

// Whether the process or the deadline is noticed first, the answer is that
// time is up.
func TestTimeLimitIsNoEndOfItsOwn(t *testing.T) {
	_, url := serve(t, Config{})
	c := processClient(url)
	for range 20 {
		e, _ := start(t, c, bySh("exec yes"), "Connect-Timeout-Ms", "20", guestapi.HeaderLifetime, guestapi.LifetimeStream)
		for e.Receive() {
			if end := e.event().GetEnd(); end != nil {
				t.Fatalf("end event: %v", end)
			}
		}
		if connect.CodeOf(e.Err()) != connect.CodeDeadlineExceeded {
			t.Fatalf("got %v", e.Err())
		}
	}
}
