package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
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

const hostileID = "sb-0123456789abcdef"

// hostile is an agent with one guest behind it. What the guest decides is in
// its fields; the rest is answered as an honest one does.
type hostile struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
	processconnect.UnimplementedProcessHandler
	filesystemconnect.UnimplementedFilesystemHandler

	mu       sync.Mutex            // guards status
	status   string                // of the sandbox; "running" if empty
	text     string                // in every field of an answer that is text
	console  []byte                // of GetConsole
	entry    *filesystem.EntryInfo // of Stat
	archive  []byte                // what tar writes, and any other command
	stderr   string                // what they say beside it
	exit     int32                 // and end with
	fail     error                 // what Start answers instead
	file     []byte                // content of /files
	refusal  string                // answer of /files and of CONNECT instead
	received []byte                // what was sent to /files, or to a command
	fed      chan struct{}         // that the end of it has come
}

func (h *hostile) serve(t *testing.T) string {
	t.Helper()
	h.fed = make(chan struct{}, 1)
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(h))
	mux.Handle(processconnect.NewProcessHandler(h))
	mux.Handle(filesystemconnect.NewFilesystemHandler(h))
	mux.HandleFunc("/files", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case h.refusal != "":
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+h.refusal+`"}`)
		case r.Method == http.MethodPost:
			h.received, _ = io.ReadAll(r.Body)
			_, _ = io.WriteString(w, `[{"path":"/made"}]`)
		default:
			_, _ = w.Write(h.file)
		}
	})
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, _ *http.Request) {
		if h.refusal != "" {
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+h.refusal+`"}`)
			return
		}
		_, _ = io.WriteString(w, `{"cpu_count":1}`)
	})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.WriteString(w, `{"code":502,"message":"`+h.refusal+`"}`)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func (h *hostile) setStatus(status string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status = status
}

func (h *hostile) sandbox() *hostagentv1.SandboxInfo {
	box := &hostagentv1.SandboxInfo{
		SandboxId: hostileID, Status: "running", Template: h.text, HostIp: h.text, Reason: h.text, Detail: h.text,
		CreatedAtUnix: time.Now().Unix(),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.status != "" {
		box.Status = h.status
	}
	return box
}

func (h *hostile) GetSandbox(context.Context, *connect.Request[hostagentv1.GetSandboxRequest]) (*connect.Response[hostagentv1.GetSandboxResponse], error) {
	if box := h.sandbox(); box.Status == "gone" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("sandbox does not exist"))
	}
	return connect.NewResponse(&hostagentv1.GetSandboxResponse{Sandbox: h.sandbox()}), nil
}

func (h *hostile) ListSandboxes(context.Context, *connect.Request[hostagentv1.ListSandboxesRequest]) (*connect.Response[hostagentv1.ListSandboxesResponse], error) {
	return connect.NewResponse(&hostagentv1.ListSandboxesResponse{Sandboxes: []*hostagentv1.SandboxInfo{h.sandbox()}}), nil
}

func (h *hostile) CreateSandbox(context.Context, *connect.Request[hostagentv1.CreateSandboxRequest]) (*connect.Response[hostagentv1.CreateSandboxResponse], error) {
	return connect.NewResponse(&hostagentv1.CreateSandboxResponse{
		SandboxId: hostileID, StartedFrom: "cold boot", Why: h.text, Phases: []*hostagentv1.Phase{{Name: h.text}},
	}), nil
}

func (h *hostile) DestroySandbox(context.Context, *connect.Request[hostagentv1.DestroySandboxRequest]) (*connect.Response[hostagentv1.DestroySandboxResponse], error) {
	return nil, connect.NewError(connect.CodeInternal, errors.New(h.text))
}

func (h *hostile) PauseSandbox(context.Context, *connect.Request[hostagentv1.PauseSandboxRequest]) (*connect.Response[hostagentv1.PauseSandboxResponse], error) {
	return nil, connect.NewError(connect.CodeInternal, errors.New(h.text))
}

func (h *hostile) ListSnapshots(context.Context, *connect.Request[hostagentv1.ListSnapshotsRequest]) (*connect.Response[hostagentv1.ListSnapshotsResponse], error) {
	return connect.NewResponse(&hostagentv1.ListSnapshotsResponse{Snapshots: []*hostagentv1.Snapshot{{Name: h.text, Template: h.text}}}), nil
}

func (h *hostile) WatchEvents(_ context.Context, _ *connect.Request[hostagentv1.WatchEventsRequest], s *connect.ServerStream[hostagentv1.WatchEventsResponse]) error {
	return s.Send(&hostagentv1.WatchEventsResponse{Event: &hostagentv1.Event{Cursor: 1, SandboxId: h.text, To: h.text, Reason: h.text}})
}

func (h *hostile) GetConsole(context.Context, *connect.Request[hostagentv1.GetConsoleRequest]) (*connect.Response[hostagentv1.GetConsoleResponse], error) {
	return connect.NewResponse(&hostagentv1.GetConsoleResponse{Console: h.console}), nil
}

func (h *hostile) Verify(_ context.Context, _ *connect.Request[hostagentv1.VerifyRequest], s *connect.ServerStream[hostagentv1.VerifyResponse]) error {
	return s.Send(&hostagentv1.VerifyResponse{Kind: "snapshot", Name: h.text, Problem: h.text})
}

func (h *hostile) GetVersion(context.Context, *connect.Request[hostagentv1.GetVersionRequest]) (*connect.Response[hostagentv1.GetVersionResponse], error) {
	return connect.NewResponse(&hostagentv1.GetVersionResponse{Version: h.text, Vmm: h.text, VmmVersion: h.text}), nil
}

func (h *hostile) List(context.Context, *connect.Request[process.ListRequest]) (*connect.Response[process.ListResponse], error) {
	return connect.NewResponse(&process.ListResponse{Processes: []*process.ProcessInfo{
		{Pid: 1, Config: &process.ProcessConfig{Cmd: h.text, Args: []string{h.text}}},
	}}), nil
}

func (h *hostile) Start(ctx context.Context, req *connect.Request[process.StartRequest], s *connect.ServerStream[process.StartResponse]) error {
	if h.fail != nil {
		return h.fail
	}
	send := func(e *process.ProcessEvent) error { return s.Send(&process.StartResponse{Event: e}) }
	data := func(d *process.ProcessEvent_DataEvent) error {
		return send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}})
	}
	err := send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})
	for rest := h.archive; err == nil && len(rest) > 0; {
		n := min(len(rest), 32<<10)
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: rest[:n]}})
		rest = rest[n:]
	}
	if err == nil && h.stderr != "" {
		err = data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: []byte(h.stderr)}})
	}
	if err == nil && req.Msg.GetStdin() {
		select {
		case <-h.fed:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{Exited: true, ExitCode: h.exit}}})
}

func (h *hostile) StreamInput(_ context.Context, s *connect.ClientStream[process.StreamInputRequest]) (*connect.Response[process.StreamInputResponse], error) {
	for s.Receive() {
		h.received = append(h.received, s.Msg().GetData().GetInput().GetStdin()...)
	}
	h.fed <- struct{}{}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

func (h *hostile) Stat(context.Context, *connect.Request[filesystem.StatRequest]) (*connect.Response[filesystem.StatResponse], error) {
	return connect.NewResponse(&filesystem.StatResponse{Entry: h.entry}), nil
}

func (h *hostile) MakeDir(context.Context, *connect.Request[filesystem.MakeDirRequest]) (*connect.Response[filesystem.MakeDirResponse], error) {
	return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("it is there"))
}

func dirEntry(path string) *filesystem.EntryInfo {
	return &filesystem.EntryInfo{Type: filesystem.FileType_FILE_TYPE_DIRECTORY, Path: path}
}

func fileEntry(mode uint32) *filesystem.EntryInfo {
	return &filesystem.EntryInfo{Type: filesystem.FileType_FILE_TYPE_FILE, Path: "/x", Mode: mode}
}

// archiveOf makes an archive of entries; files hold "bad".
func archiveOf(t *testing.T, entries ...tar.Header) []byte {
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

// TestProgram is wrenn itself, where a test starts this binary as wrenn.
func TestProgram(t *testing.T) {
	if os.Getenv("WRENN_TEST_PROGRAM") == "" {
		return
	}
	os.Args = append([]string{"wrenn"}, flag.Args()...)
	main()
	os.Exit(0)
}

// program is wrenn as a program of its own, against an agent.
func program(t *testing.T, host string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-test.run=^TestProgram$", "--"}, args...)...)
	cmd.Env = append(os.Environ(), "WRENN_TEST_PROGRAM=1", "WRENN_HOST="+host, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// wrenn runs the program to its end.
func wrenn(t *testing.T, host string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := program(t, host, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
