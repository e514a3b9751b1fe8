package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

const (
	tokenID = clienttest.ID
	secret  = "the sandbox's secret"
)

// tokenAgent makes and shows one sandbox, whose daemon it is as well.
type tokenAgent struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
	processconnect.UnimplementedProcessHandler
	asked atomic.Int64
}

func (a *tokenAgent) CreateSandbox(context.Context, *connect.Request[hostagentv1.CreateSandboxRequest]) (*connect.Response[hostagentv1.CreateSandboxResponse], error) {
	return connect.NewResponse(&hostagentv1.CreateSandboxResponse{SandboxId: tokenID, AccessToken: secret}), nil
}

func (a *tokenAgent) GetSandbox(context.Context, *connect.Request[hostagentv1.GetSandboxRequest]) (*connect.Response[hostagentv1.GetSandboxResponse], error) {
	a.asked.Add(1)
	return connect.NewResponse(&hostagentv1.GetSandboxResponse{Sandbox: &hostagentv1.SandboxInfo{SandboxId: tokenID}, AccessToken: secret}), nil
}

func (a *tokenAgent) List(_ context.Context, req *connect.Request[process.ListRequest]) (*connect.Response[process.ListResponse], error) {
	if got := req.Header().Get("X-Access-Token"); got != secret {
		return nil, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("token %q", got))
	}
	return connect.NewResponse(&process.ListResponse{}), nil
}

// serveToken returns the agent's URL; guest answers what is plain HTTP.
func serveToken(t *testing.T, guest http.HandlerFunc) (*tokenAgent, string) {
	a := &tokenAgent{}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(a))
	mux.Handle(processconnect.NewProcessHandler(a))
	mux.HandleFunc("/", guest)
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return a, s.URL
}

// The client asks for the token once and shows it to the sandbox's daemon.
func TestClientShowsTheToken(t *testing.T) {
	a, url := serveToken(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("X-Access-Token"); got != secret || r.Header.Get("E2b-Sandbox-Id") != tokenID {
			http.Error(w, "token "+got, http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, "{}")
	})
	s := sandboxOf(t, url)
	for range 2 {
		if _, err := s.Usage(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if n := a.asked.Load(); n != 1 {
		t.Errorf("the agent was asked %d times", n)
	}
	h, err := New(url)
	if err != nil {
		t.Fatal(err)
	}
	if made, err := h.Create(t.Context(), &hostagentv1.CreateSandboxRequest{}); err != nil || made.AccessToken != secret {
		t.Fatalf("%v, %v", made, err)
	}
	if _, err := h.Sandbox(tokenID).Usage(t.Context()); err != nil || a.asked.Load() != 1 {
		t.Errorf("%v; asked %d times after a create", err, a.asked.Load())
	}
}

// That there is no such sandbox is the agent's word: of a guest it would mean
// that there is no such command.
func TestNoTokenIsNotTheGuestsWord(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(hostagentv1connect.UnimplementedHostAgentServiceHandler{}))
	s := httptest.NewServer(mux)
	defer s.Close()
	_, err := sandboxOf(t, s.URL).processes("").List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if connect.CodeOf(err) != connect.CodeUnimplemented || connect.IsWireError(err) {
		t.Errorf("%v, from the wire: %v", err, connect.IsWireError(err))
	}
}

// Where a guest's redirect leads, the token does not come.
func TestTokenFollowsNoRedirect(t *testing.T) {
	var followed atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	defer elsewhere.Close()
	_, url := serveToken(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
	})
	s := sandboxOf(t, url)
	if _, err := s.Usage(t.Context()); err == nil {
		t.Error("a redirect is taken for metrics")
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", url+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	guestHeaders{id: tokenID}.set(req.Header)
	resp, err := s.host.dataPlane().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if followed.Load() != 0 {
		t.Error("a redirect was followed")
	}
}
