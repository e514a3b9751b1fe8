// Package clienttest is a host agent with one sandbox, for the tests of what
// speaks to a host agent. What its guest says is up to the test.
package clienttest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
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

	Token   string                // of CreateSandbox and GetSandbox
	Text    string                // in every field of an answer that is text
	Console []byte                // of GetConsole
	Entry   *filesystem.EntryInfo // of Stat
	Archive []byte                // what tar writes, and any other command
	Stderr  string                // what they say beside it
	Exit    int32                 // and end with
	Fail    error                 // what Start answers instead
	File    []byte                // content of /files
	Refusal string                // answer of /files and of CONNECT instead

	// Received is what was sent to /files, or to a command.
	Received []byte

	mu     sync.Mutex    // guards Status once it serves
	Status string        // of the sandbox; "running" if empty, "gone" if it does not exist
	fed    chan struct{} // that the end of a command's input has come
}

// Serve serves until the test ends and returns the URL.
func (a *Agent) Serve(t testing.TB) string {
	t.Helper()
	a.fed = make(chan struct{}, 1)
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(a))
	mux.Handle(processconnect.NewProcessHandler(a))
	mux.Handle(filesystemconnect.NewFilesystemHandler(a))
	mux.HandleFunc("/files", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case a.Refusal != "":
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+a.Refusal+`"}`)
		case r.Method == http.MethodPost:
			a.Received, _ = io.ReadAll(r.Body)
			_, _ = io.WriteString(w, `[{"path":"/made"}]`)
		default:
			_, _ = w.Write(a.File)
		}
	})
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, _ *http.Request) {
		if a.Refusal != "" {
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+a.Refusal+`"}`)
			return
		}
		_, _ = io.WriteString(w, `{"cpu_count":1}`)
	})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+a.Refusal+`"}`)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// SetStatus sets Status while it serves.
func (a *Agent) SetStatus(status string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.Status = status
}

func (a *Agent) sandbox() *hostagentv1.SandboxInfo {
	box := &hostagentv1.SandboxInfo{
		SandboxId: ID, Status: "running", Template: a.Text, HostIp: a.Text, Reason: a.Text, Detail: a.Text,
		CreatedAtUnix: time.Now().Unix(),
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.Status != "" {
		box.Status = a.Status
	}
	return box
}

func (a *Agent) GetSandbox(context.Context, *connect.Request[hostagentv1.GetSandboxRequest]) (*connect.Response[hostagentv1.GetSandboxResponse], error) {
	if box := a.sandbox(); box.Status == "gone" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("sandbox does not exist"))
	}
	return connect.NewResponse(&hostagentv1.GetSandboxResponse{Sandbox: a.sandbox(), AccessToken: a.Token}), nil
}

func (a *Agent) ListSandboxes(context.Context, *connect.Request[hostagentv1.ListSandboxesRequest]) (*connect.Response[hostagentv1.ListSandboxesResponse], error) {
	return connect.NewResponse(&hostagentv1.ListSandboxesResponse{Sandboxes: []*hostagentv1.SandboxInfo{a.sandbox()}}), nil
}

func (a *Agent) CreateSandbox(context.Context, *connect.Request[hostagentv1.CreateSandboxRequest]) (*connect.Response[hostagentv1.CreateSandboxResponse], error) {
	return connect.NewResponse(&hostagentv1.CreateSandboxResponse{
		SandboxId: ID, AccessToken: a.Token, StartedFrom: "cold boot", Why: a.Text, Phases: []*hostagentv1.Phase{{Name: a.Text}},
	}), nil
}

func (a *Agent) DestroySandbox(context.Context, *connect.Request[hostagentv1.DestroySandboxRequest]) (*connect.Response[hostagentv1.DestroySandboxResponse], error) {
	return nil, connect.NewError(connect.CodeInternal, errors.New(a.Text))
}

func (a *Agent) PauseSandbox(context.Context, *connect.Request[hostagentv1.PauseSandboxRequest]) (*connect.Response[hostagentv1.PauseSandboxResponse], error) {
	return nil, connect.NewError(connect.CodeInternal, errors.New(a.Text))
}

func (a *Agent) ListSnapshots(context.Context, *connect.Request[hostagentv1.ListSnapshotsRequest]) (*connect.Response[hostagentv1.ListSnapshotsResponse], error) {
	return connect.NewResponse(&hostagentv1.ListSnapshotsResponse{Snapshots: []*hostagentv1.Snapshot{{Name: a.Text, Template: a.Text}}}), nil
}

func (a *Agent) WatchEvents(_ context.Context, _ *connect.Request[hostagentv1.WatchEventsRequest], s *connect.ServerStream[hostagentv1.WatchEventsResponse]) error {
	return s.Send(&hostagentv1.WatchEventsResponse{Event: &hostagentv1.Event{Cursor: 1, SandboxId: a.Text, To: a.Text, Reason: a.Text}})
}

func (a *Agent) GetConsole(context.Context, *connect.Request[hostagentv1.GetConsoleRequest]) (*connect.Response[hostagentv1.GetConsoleResponse], error) {
	return connect.NewResponse(&hostagentv1.GetConsoleResponse{Console: a.Console}), nil
}

func (a *Agent) Verify(_ context.Context, _ *connect.Request[hostagentv1.VerifyRequest], s *connect.ServerStream[hostagentv1.VerifyResponse]) error {
	return s.Send(&hostagentv1.VerifyResponse{Kind: "snapshot", Name: a.Text, Problem: a.Text})
}

func (a *Agent) GetVersion(context.Context, *connect.Request[hostagentv1.GetVersionRequest]) (*connect.Response[hostagentv1.GetVersionResponse], error) {
	return connect.NewResponse(&hostagentv1.GetVersionResponse{Version: a.Text, Vmm: a.Text, VmmVersion: a.Text}), nil
}

func (a *Agent) List(context.Context, *connect.Request[process.ListRequest]) (*connect.Response[process.ListResponse], error) {
	return connect.NewResponse(&process.ListResponse{Processes: []*process.ProcessInfo{
		{Pid: 1, Config: &process.ProcessConfig{Cmd: a.Text, Args: []string{a.Text}}},
	}}), nil
}

func (a *Agent) Start(ctx context.Context, req *connect.Request[process.StartRequest], s *connect.ServerStream[process.StartResponse]) error {
	if a.Fail != nil {
		return a.Fail
	}
	send := func(e *process.ProcessEvent) error { return s.Send(&process.StartResponse{Event: e}) }
	data := func(d *process.ProcessEvent_DataEvent) error {
		return send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}})
	}
	err := send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})
	for rest := a.Archive; err == nil && len(rest) > 0; {
		n := min(len(rest), 32<<10)
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: rest[:n]}})
		rest = rest[n:]
	}
	if err == nil && a.Stderr != "" {
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: []byte(a.Stderr)}})
	}
	if err == nil && req.Msg.GetStdin() {
		select {
		case <-a.fed:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{Exited: true, ExitCode: a.Exit}}})
}

func (a *Agent) StreamInput(_ context.Context, s *connect.ClientStream[process.StreamInputRequest]) (*connect.Response[process.StreamInputResponse], error) {
	for s.Receive() {
		a.Received = append(a.Received, s.Msg().GetData().GetInput().GetStdin()...)
	}
	a.fed <- struct{}{}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

func (a *Agent) Stat(context.Context, *connect.Request[filesystem.StatRequest]) (*connect.Response[filesystem.StatResponse], error) {
	return connect.NewResponse(&filesystem.StatResponse{Entry: a.Entry}), nil
}

func (a *Agent) MakeDir(context.Context, *connect.Request[filesystem.MakeDirRequest]) (*connect.Response[filesystem.MakeDirResponse], error) {
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
		if h.Typeflag == tar.TypeReg {
			h.Size = 3
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			_, _ = io.WriteString(w, "bad")
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
