// Package clienttest is a host agent with one sandbox, for the tests of what
// speaks to a host agent. The test decides what the guest says.
package clienttest

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
	v1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
)

// ID is the sandbox's.
const ID = "sb-0123456789abcdef"

// Agent is a host agent with one sandbox. What the guest decides is in its fields;
// the rest is answered as an honest agent does.
type Agent struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
	processconnect.UnimplementedProcessHandler
	filesystemconnect.UnimplementedFilesystemHandler

	Err       error                 // every call of the agent's own answers it, if not nil
	Token     string                // of the sandbox; if not empty, the guest demands it
	Text      string                // in every field of an answer that is text
	Snapshot  string                // that the sandbox was made from
	Also      []string              // IDs of other sandboxes, in ListSandboxes
	Console   []byte                // of GetConsole
	Entry     *filesystem.EntryInfo // of Stat
	Archive   []byte                // what tar writes, and any other command
	Stderr    string                // what they say beside it
	Exit      int32                 // and end with
	EndError  string                // and say of that end, if not empty
	Endless   int                   // they end when they were sent so many signals
	Missing   []string              // commands that do not exist
	Fail      error                 // Start answers it, if not nil
	Silent    []string              // calls that are never answered, by name; "start event" is Start after its headers
	File      []byte                // content of /files
	Refusal   string                // answer of /files, /metrics and CONNECT, if not empty
	Elsewhere string                // where /metrics redirects to, if not empty
	Ends      string                // if not empty, what the sandbox is when a call breaks off in the midst
	Absent    bool                  // the data plane finds no sandbox that runs
	Traffic   string                // what the ports demand, if not empty

	URL, Domain, CAFile string // of GetVersion

	// Received is what was sent to /files, or to a command.
	Received []byte

	mu       sync.Mutex // guards Status once it serves, and what follows
	signals  []process.Signal
	calls    []string
	requests []*http.Request
	started  []string
	built    []*v1.BuildTemplateRequest
	uploads  map[string]string
	Status   string        // of the sandbox; "running" if empty, "gone" if it does not exist
	fed      chan struct{} // that the end of a command's input has come
	signaled chan struct{} // that a command was sent a signal
}

// Serve serves until the test ends and returns the URL.
func (a *Agent) Serve(t testing.TB) string {
	t.Helper()
	server := a.server()
	server.Start()
	t.Cleanup(server.Close)
	return server.URL
}

// ServeUnix serves on a Unix socket until the test ends.
func (a *Agent) ServeUnix(t testing.TB, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := a.server()
	server.Listener.Close()
	server.Listener = l
	server.Start()
	t.Cleanup(server.Close)
}

func (a *Agent) server() *httptest.Server {
	a.fed, a.signaled = make(chan struct{}, 1), make(chan struct{}, 10)
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(a, connect.WithInterceptors(watching{a})))
	mux.Handle(hostagentv1connect.NewTemplateServiceHandler(templates{Agent: a}, connect.WithInterceptors(watching{a})))
	guest := http.NewServeMux()
	guest.Handle(processconnect.NewProcessHandler(a))
	guest.Handle(filesystemconnect.NewFilesystemHandler(a))
	guest.HandleFunc("/files", a.files)
	guest.HandleFunc("/metrics", a.metrics)
	guest.HandleFunc("/processes", a.listProcesses)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if slices.Contains(a.Silent, path.Base(r.URL.Path)) {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		if a.Token != "" && (r.Header.Get("X-Access-Token") != a.Token || r.Header.Get("E2b-Sandbox-Id") != ID) {
			http.Error(w, "no token", http.StatusUnauthorized)
			return
		}
		if a.Absent {
			refuse(w, absent)
			return
		}
		guest.ServeHTTP(w, r)
	})
	return httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			a.port(w, r)
			return
		}
		a.mu.Lock()
		a.requests = append(a.requests, r.Clone(context.Background()))
		a.mu.Unlock()
		mux.ServeHTTP(w, r)
	}))
}

// Requests are the heads of all requests except CONNECT, in their order.
func (a *Agent) Requests() []*http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

// watching notes every call, and answers it with Agent.Err.
type watching struct{ *Agent }

func (w watching) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		if err := w.called(r.Spec().Procedure); err != nil {
			return nil, err
		}
		if slices.Contains(w.Silent, path.Base(r.Spec().Procedure)) {
			<-ctx.Done()
		}
		return next(ctx, r)
	}
}

func (w watching) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := w.called(conn.Spec().Procedure); err != nil {
			return err
		}
		return next(ctx, conn)
	}
}

func (w watching) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// absent is the agent's text about every sandbox that does not run.
const absent = "The sandbox was not found"

// refuse answers as the agent does in place of a guest; the text is within JSON.
func refuse(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadGateway)
	_, _ = io.WriteString(w, `{"code":502,"message":"`+text+`"}`)
}

// port is a port of the sandbox that sends back what it gets, and ends when that
// does.
func (a *Agent) port(w http.ResponseWriter, r *http.Request) {
	if a.Traffic != r.Header.Get("E2b-Traffic-Access-Token") {
		http.Error(w, "no traffic token", http.StatusForbidden)
		return
	}
	if a.Absent {
		refuse(w, absent)
		return
	}
	if a.Refusal != "" {
		refuse(w, a.Refusal)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	_, _ = io.Copy(conn, buffered)
}

func (a *Agent) files(w http.ResponseWriter, r *http.Request) {
	switch {
	case a.Refusal != "":
		refuse(w, a.Refusal)
	case a.Ends != "" && r.Method == http.MethodPost:
		a.breakOff()
	case a.Ends != "":
		w.Header().Set("Content-Length", "1000000")
		_, _ = w.Write(make([]byte, 10000))
		a.breakOff()
	case r.Method == http.MethodPost:
		a.Received, _ = io.ReadAll(r.Body)
		_, _ = io.WriteString(w, `[{"path":"/made"}]`)
	default:
		_, _ = w.Write(a.File)
	}
}

// breakOff ends the sandbox and the connection, if that is asked for.
func (a *Agent) breakOff() {
	if a.Ends != "" {
		a.SetStatus(a.Ends)
		panic(http.ErrAbortHandler)
	}
}

func (a *Agent) metrics(w http.ResponseWriter, r *http.Request) {
	switch {
	case a.Elsewhere != "":
		http.Redirect(w, r, a.Elsewhere, http.StatusTemporaryRedirect)
	case a.Refusal != "":
		refuse(w, a.Refusal)
	default:
		_, _ = io.WriteString(w, `{"cpu_count":1}`)
	}
}

// Signaled are the signals that were sent to commands.
func (a *Agent) Signaled() []process.Signal {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.signals)
}

// Started are the commands that were started.
func (a *Agent) Started() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.started)
}

// Calls are the names of the agent's own calls that were made.
func (a *Agent) Calls() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

func (a *Agent) called(procedure string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, path.Base(procedure))
	return a.Err
}

// SetStatus sets Status while it serves.
func (a *Agent) SetStatus(status string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.Status = status
}

func (a *Agent) sandbox() *v1.SandboxInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &v1.SandboxInfo{
		SandboxId: ID, Status: cmp.Or(a.Status, "running"), Template: a.Text, HostIp: a.Text, Reason: a.Text, Detail: a.Text,
		Snapshot: a.Snapshot, CreatedAtUnix: time.Now().Unix(), Metadata: map[string]string{a.Text: a.Text},
	}
}

type (
	request[T any]  = *connect.Request[T]
	response[T any] = *connect.Response[T]
	sender[T any]   = *connect.ServerStream[T]
)

func (a *Agent) GetSandbox(context.Context, request[v1.GetSandboxRequest]) (response[v1.GetSandboxResponse], error) {
	box := a.sandbox()
	if box.Status == "gone" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("sandbox does not exist"))
	}
	return connect.NewResponse(&v1.GetSandboxResponse{Sandbox: box, AccessToken: a.Token, TrafficToken: a.Traffic}), nil
}

func (a *Agent) ListSandboxes(context.Context, request[v1.ListSandboxesRequest]) (response[v1.ListSandboxesResponse], error) {
	boxes := []*v1.SandboxInfo{a.sandbox()}
	for _, id := range a.Also {
		boxes = append(boxes, &v1.SandboxInfo{SandboxId: id, Status: "running"})
	}
	return connect.NewResponse(&v1.ListSandboxesResponse{Sandboxes: boxes}), nil
}

func (a *Agent) CreateSandbox(context.Context, request[v1.CreateSandboxRequest]) (response[v1.CreateSandboxResponse], error) {
	return connect.NewResponse(&v1.CreateSandboxResponse{
		SandboxId: ID, AccessToken: a.Token, StartedFrom: "cold boot", Why: a.Text, Phases: []*v1.Phase{{Name: a.Text}},
	}), nil
}

// DestroySandbox fails where there is a text to fail with.
func (a *Agent) DestroySandbox(context.Context, request[v1.DestroySandboxRequest]) (response[v1.DestroySandboxResponse], error) {
	if a.Text != "" {
		return nil, connect.NewError(connect.CodeInternal, errors.New(a.Text))
	}
	return connect.NewResponse(&v1.DestroySandboxResponse{}), nil
}

// PauseSandbox fails where there is a text to fail with.
func (a *Agent) PauseSandbox(context.Context, request[v1.PauseSandboxRequest]) (response[v1.PauseSandboxResponse], error) {
	if a.Text != "" {
		return nil, connect.NewError(connect.CodeInternal, errors.New(a.Text))
	}
	return connect.NewResponse(&v1.PauseSandboxResponse{}), nil
}

func (a *Agent) ListSnapshots(context.Context, request[v1.ListSnapshotsRequest]) (response[v1.ListSnapshotsResponse], error) {
	return connect.NewResponse(&v1.ListSnapshotsResponse{Snapshots: []*v1.Snapshot{{Name: a.Text, Template: a.Text}}}), nil
}

func (a *Agent) WatchEvents(_ context.Context, _ request[v1.WatchEventsRequest], s sender[v1.WatchEventsResponse]) error {
	return s.Send(&v1.WatchEventsResponse{Event: &v1.Event{Cursor: 1, SandboxId: a.Text, To: a.Text, Reason: a.Text,
		Metadata: map[string]string{a.Text: a.Text}}})
}

func (a *Agent) GetConsole(context.Context, request[v1.GetConsoleRequest]) (response[v1.GetConsoleResponse], error) {
	return connect.NewResponse(&v1.GetConsoleResponse{Console: a.Console}), nil
}

func (a *Agent) Verify(_ context.Context, _ request[v1.VerifyRequest], s sender[v1.VerifyResponse]) error {
	return s.Send(&v1.VerifyResponse{Kind: "snapshot", Name: a.Text, Problem: a.Text})
}

func (a *Agent) GetHost(context.Context, request[v1.GetHostRequest]) (response[v1.GetHostResponse], error) {
	return connect.NewResponse(&v1.GetHostResponse{
		Version: a.Text, Fault: a.Text, Templates: []string{a.Text}, Sandboxes: map[string]int32{a.Text: 1},
		Drivers: []*v1.HostDriver{{
			Name: a.Text, SnapshotKey: a.Text, Version: a.Text, Acceleration: a.Text, Cpu: a.Text, Isolation: a.Text, Speed: a.Text,
			Why: a.Text,
		}, {Name: a.Text, Unusable: a.Text}},
	}), nil
}

func (a *Agent) GetVersion(context.Context, request[v1.GetVersionRequest]) (response[v1.GetVersionResponse], error) {
	return connect.NewResponse(&v1.GetVersionResponse{
		Version: a.Text, Vmm: a.Text, VmmVersion: a.Text, Url: a.URL, Domain: a.Domain, CaFile: a.CAFile,
		Isolation: a.Text, Speed: a.Text, Why: a.Text,
	}), nil
}

func (a *Agent) List(context.Context, request[process.ListRequest]) (response[process.ListResponse], error) {
	return connect.NewResponse(&process.ListResponse{Processes: []*process.ProcessInfo{
		{Pid: 1, Config: &process.ProcessConfig{Cmd: a.Text, Args: []string{a.Text}}},
	}}), nil
}

func (a *Agent) Start(ctx context.Context, req request[process.StartRequest], s sender[process.StartResponse]) error {
	if a.Fail != nil {
		return a.Fail
	}
	if slices.Contains(a.Missing, req.Msg.Process.Cmd) {
		return connect.NewError(connect.CodeNotFound, errors.New(req.Msg.Process.Cmd+" does not exist"))
	}
	a.mu.Lock()
	a.started = append(a.started, req.Msg.Process.Cmd)
	a.mu.Unlock()
	if slices.Contains(a.Silent, "start event") {
		if err := s.Send(nil); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	send := func(e *process.ProcessEvent) error { return s.Send(&process.StartResponse{Event: e}) }
	data := func(d *process.ProcessEvent_DataEvent) error {
		return send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}})
	}
	err := send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})
	a.breakOff()
	for rest := a.Archive; err == nil && len(rest) > 0; {
		n := min(len(rest), 32<<10)
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: rest[:n]}})
		rest = rest[n:]
	}
	if err == nil && a.Stderr != "" {
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: []byte(a.Stderr)}})
	}
	if err == nil && req.Msg.GetStdin() {
		err = await(ctx, a.fed)
	}
	for n := 0; err == nil && n < a.Endless; n++ {
		err = await(ctx, a.signaled)
	}
	if err != nil {
		return err
	}
	end := &process.ProcessEvent_EndEvent{Exited: true, ExitCode: a.Exit}
	if a.EndError != "" {
		end.Error = &a.EndError
	}
	return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}})
}

// Connect tells of process 7 what Start tells of any.
func (a *Agent) Connect(ctx context.Context, req request[process.ConnectRequest], s sender[process.ConnectResponse]) error {
	if req.Msg.Process.GetPid() != 7 {
		return connect.NewError(connect.CodeNotFound, errors.New("no such process"))
	}
	data := &process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: a.Archive}}
	for _, e := range []*process.ProcessEvent{
		{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}},
		{Event: &process.ProcessEvent_Data{Data: data}},
	} {
		if err := s.Send(&process.ConnectResponse{Event: e}); err != nil {
			return err
		}
	}
	a.breakOff()
	if a.Endless > 0 {
		if req.Header().Get("Wrenn-Output-Follow") == "no" {
			return nil
		}
		if err := await(ctx, a.signaled); err != nil {
			return err
		}
	}
	end := &process.ProcessEvent_EndEvent{Exited: true, ExitCode: a.Exit}
	return s.Send(&process.ConnectResponse{Event: &process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}}})
}

// listProcesses tells of process 7, of one that it has begun, and of one that has ended.
func (a *Agent) listProcesses(w http.ResponseWriter, _ *http.Request) {
	if a.Refusal != "" {
		refuse(w, a.Refusal)
		return
	}
	text, _ := json.Marshal(a.Text)
	_, _ = io.WriteString(w, `{"processes":[{"pid":7,"user":`+string(text)+`,"args":["sh",`+string(text)+`],"command":true},
		{"pid":8,"ppid":7,"user":"root","cpu_ms":1500,"memory_bytes":1048576,"args":["sleep","9"]},
		{"pid":9,"args":["true"],"command":true,"ended":"exit status 3"}]}`)
}

func await(ctx context.Context, what <-chan struct{}) error {
	select {
	case <-what:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *Agent) StreamInput(
	_ context.Context, s *connect.ClientStream[process.StreamInputRequest],
) (response[process.StreamInputResponse], error) {
	for s.Receive() {
		a.Received = append(a.Received, s.Msg().GetData().GetInput().GetStdin()...)
	}
	a.fed <- struct{}{}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

func (a *Agent) SendSignal(_ context.Context, r request[process.SendSignalRequest]) (response[process.SendSignalResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.signals = append(a.signals, r.Msg.Signal)
	a.signaled <- struct{}{}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

func (a *Agent) Stat(context.Context, request[filesystem.StatRequest]) (response[filesystem.StatResponse], error) {
	return connect.NewResponse(&filesystem.StatResponse{Entry: a.Entry}), nil
}

func (a *Agent) MakeDir(context.Context, request[filesystem.MakeDirRequest]) (response[filesystem.MakeDirResponse], error) {
	return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("it is there"))
}

// Dir is a directory at a path of the sandbox.
func Dir(path string) *filesystem.EntryInfo {
	return &filesystem.EntryInfo{Type: filesystem.FileType_FILE_TYPE_DIRECTORY, Path: path}
}

// File is a file of the sandbox.
func File(mode uint32) *filesystem.EntryInfo {
	return &filesystem.EntryInfo{Type: filesystem.FileType_FILE_TYPE_FILE, Path: "/x", Mode: mode}
}

// Archive makes an archive of entries; files hold "bad".
func Archive(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range entries {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = "bad"
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
