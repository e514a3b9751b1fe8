package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
)

const (
	tokenID = "sb-0123456789abcdef"
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
	c := &client{host: url}
	for range 2 {
		if _, err := c.usage(t.Context(), tokenID); err != nil {
			t.Error(err)
		}
	}
	if n := a.asked.Load(); n != 1 {
		t.Errorf("the agent was asked %d times", n)
	}
	made := &client{host: url}
	var plain size
	plain.flags(&cobra.Command{})
	if _, err := made.create(t.Context(), &plain); err != nil {
		t.Fatal(err)
	}
	if _, err := made.usage(t.Context(), tokenID); err != nil || a.asked.Load() != 1 {
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
	_, err := (&client{host: s.URL}).processes(tokenID, "").List(t.Context(), connect.NewRequest(&process.ListRequest{}))
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
	c := &client{host: url}
	if _, err := c.usage(t.Context(), tokenID); err == nil {
		t.Error("a redirect is taken for metrics")
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", url+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	guestHeaders{id: tokenID}.set(req.Header)
	resp, err := c.dataPlane().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if followed.Load() != 0 {
		t.Error("a redirect was followed")
	}
}

// The token is printed where it is asked for, and nowhere else.
func TestTokenIsNotPrinted(t *testing.T) {
	_, url := serveToken(t, http.NotFound)
	for _, c := range []struct {
		args    []string
		printed bool
	}{
		{[]string{"create"}, false}, {[]string{"create", "--json"}, false}, {[]string{"create", "-v"}, false},
		{[]string{"inspect", tokenID}, false}, {[]string{"inspect", "--token", tokenID}, true},
	} {
		var out bytes.Buffer
		root := newRoot()
		root.SetArgs(append(c.args, "--host", url))
		root.SetOut(&out)
		root.SetErr(&out)
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%q: %v", c.args, err)
		}
		if got := strings.Contains(out.String(), secret); got != c.printed {
			t.Errorf("%q printed %s", c.args, &out)
		}
	}
}
