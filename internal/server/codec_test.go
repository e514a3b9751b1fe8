package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
)

// serve runs the control plane without a manager: what gets through to a method
// that needs one panics, and is internal.
func serve(t *testing.T) (url string, panics *atomic.Int64) {
	t.Helper()
	panics = new(atomic.Int64)
	mux := http.NewServeMux()
	path, calls := handler(Config{Version: Version{Version: "1"}, Panics: panics, Log: slog.New(slog.DiscardHandler)})
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		calls.ServeHTTP(w, r.WithContext(auth.WithCaller(r.Context(), auth.Caller{Host: true})))
	})
	s := httptest.NewUnstartedServer(mux)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.URL, panics
}

// post sends a request as curl does.
func post(t *testing.T, url, rpc, contentType, encoding string, body []byte) (status int, answer string) {
	t.Helper()
	return postAs(t, "", url, rpc, contentType, encoding, body)
}

// postAs is post with a key, unless that is empty.
func postAs(t *testing.T, key, url, rpc, contentType, encoding string, body []byte) (status int, answer string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", url+procedure(rpc), bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	if key != "" {
		req.Header.Set("X-API-KEY", key)
	}
	if encoding != "" {
		req.Header.Set("Content-Encoding", encoding)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(all)
}

func TestUnknownJSONFields(t *testing.T) {
	url, panics := serve(t)
	for _, kind := range []string{"application/json", "application/json; charset=utf-8", "application/json;charset=UTF-8"} {
		for _, c := range []struct{ rpc, body, field string }{
			{"CreateSandbox", `{"template":"minimal","colour":"blue"}`, "colour"},
			{"CreateSandbox", `{"network":{"allow_internet":true,"allow_outt":["x"]}}`, "allow_outt"},
			{"GetVersion", `{"x":{}}`, `"x"`},
			{"ListSandboxes", `{"All":true}`, "All"},
			{"Exec", `{"sandbox_id":"sb-1","cmd":"true","secure":true}`, "secure"},
		} {
			status, answer := post(t, url, c.rpc, kind, "", []byte(c.body))
			if status != 400 || !strings.Contains(answer, `"invalid_argument"`) ||
				!strings.Contains(answer, "unknown field") || !strings.Contains(answer, strings.Trim(c.field, `"`)) {
				t.Errorf("%s %s as %s: HTTP %d %s", c.rpc, c.body, kind, status, answer)
			}
		}
		for _, body := range []string{"{}", "  { }\n", `{"sandbox_id":null}`} {
			rpc := map[bool]string{true: "GetSandbox", false: "GetVersion"}[strings.Contains(body, "null")]
			status, answer := post(t, url, rpc, kind, "", []byte(body))
			if rpc == "GetVersion" && status != 200 || strings.Contains(answer, "unknown field") {
				t.Errorf("%s as %s: HTTP %d %s", body, kind, status, answer)
			}
		}
	}
	// Both spellings of a field that is known get as far as the manager.
	for _, field := range []string{"memory_mb", "memoryMb"} {
		if status, answer := post(t, url, "CreateSandbox", "application/json", "", []byte(`{"`+field+`":512}`)); status != 500 {
			t.Errorf("%s: HTTP %d %s", field, status, answer)
		}
	}
	if n := panics.Load(); n != 2 {
		t.Errorf("%d panics are counted, want 2", n)
	}
	if status, answer := post(t, url, "GetVersion", "application/json", "", nil); status != 400 || !strings.Contains(answer, "{}") {
		t.Errorf("an empty body: HTTP %d %s", status, answer)
	}
}

// with adds a field that no version has.
func with[M proto.Message](m M) M {
	m.ProtoReflect().SetUnknown(protoreflect.RawFields{0xf8, 0x3f, 1}) // 1023: 1
	return m
}

func TestUnknownBinaryFields(t *testing.T) {
	url, _ := serve(t)
	h2c := &http.Transport{Protocols: new(http.Protocols)}
	h2c.Protocols.SetUnencryptedHTTP2(true)
	defer h2c.CloseIdleConnections()
	for name, c := range map[string]struct {
		client connect.HTTPClient
		opts   []connect.ClientOption
	}{
		"Connect":  {http.DefaultClient, nil},
		"gzip":     {http.DefaultClient, []connect.ClientOption{connect.WithSendGzip()}},
		"gRPC":     {&http.Client{Transport: h2c}, []connect.ClientOption{connect.WithGRPC()}},
		"gRPC-Web": {http.DefaultClient, []connect.ClientOption{connect.WithGRPCWeb()}},
	} {
		agent := hostagentv1connect.NewHostAgentServiceClient(c.client, url, c.opts...)
		for where, call := range map[string]func() error{
			"GetVersionRequest": func() error {
				_, err := agent.GetVersion(t.Context(), connect.NewRequest(with(&pb.GetVersionRequest{})))
				return err
			},
			"NetworkPolicy": func() error {
				_, err := agent.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{Network: with(&pb.NetworkPolicy{})}))
				return err
			},
			"WatchEventsRequest": func() error {
				stream, err := agent.WatchEvents(t.Context(), connect.NewRequest(with(&pb.WatchEventsRequest{})))
				if err != nil {
					return err
				}
				defer stream.Close()
				stream.Receive()
				return stream.Err()
			},
		} {
			err := call()
			if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "unknown field 1023 of "+where) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := agent.GetVersion(t.Context(), connect.NewRequest(&pb.GetVersionRequest{})); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every kind of field is looked into.
func TestCheckKnown(t *testing.T) {
	for name, m := range map[string]proto.Message{
		"list":     &pb.ListSandboxesResponse{Sandboxes: []*pb.SandboxInfo{{}, with(&pb.SandboxInfo{})}},
		"in depth": &pb.GetSandboxResponse{Sandbox: &pb.SandboxInfo{Traffic: with(&pb.NetworkTraffic{})}},
	} {
		if err := checkKnown(m.ProtoReflect()); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
	if err := checkKnown((&pb.ListSandboxesResponse{Sandboxes: []*pb.SandboxInfo{{Vcpus: 1}}}).ProtoReflect()); err != nil {
		t.Error(err)
	}
}

// newer is an agent that answers with fields of a later version.
type newer struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
}

func (newer) GetVersion(context.Context, *connect.Request[pb.GetVersionRequest]) (*connect.Response[pb.GetVersionResponse], error) {
	return connect.NewResponse(with(&pb.GetVersionResponse{Version: "2"})), nil
}

// A client takes what a newer agent answers.
func TestClientsAreTolerant(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(newer{}, withStrictCodecs()))
	s := httptest.NewServer(mux)
	defer s.Close()
	client := hostagentv1connect.NewHostAgentServiceClient(http.DefaultClient, s.URL)
	resp, err := client.GetVersion(t.Context(), connect.NewRequest(&pb.GetVersionRequest{}))
	if err != nil || resp.Msg.Version != "2" || len(resp.Msg.ProtoReflect().GetUnknown()) == 0 {
		t.Errorf("%v, %v", resp, err)
	}
}

func TestGiantMessages(t *testing.T) {
	url, _ := serve(t)
	giant := []byte(`{"template":"` + strings.Repeat("x", maxMessageBytes) + `"}`)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(giant)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	for encoding, body := range map[string][]byte{"": giant, "gzip": packed.Bytes()} {
		status, answer := post(t, url, "CreateSandbox", "application/json", encoding, body)
		if status != 429 || !strings.Contains(answer, "resource_exhausted") {
			t.Errorf("%q: HTTP %d %.200s", encoding, status, answer)
		}
	}
}
