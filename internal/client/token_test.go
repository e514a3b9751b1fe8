package client

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	gocmp "github.com/google/go-cmp/cmp"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

const secret = "the sandbox's secret"

// The client asks for the token once and shows it to the sandbox's daemon.
func TestClientShowsTheToken(t *testing.T) {
	a := &clienttest.Agent{Token: secret}
	url := a.Serve(t)
	s := sandboxOf(t, url)
	for range 2 {
		if _, err := s.Usage(t.Context()); err != nil {
			t.Error(err)
		}
	}
	want := []string{"GetSandbox"}
	if diff := gocmp.Diff(want, a.Calls()); diff != "" {
		t.Error(diff)
	}
	h, err := New(url, "")
	if err != nil {
		t.Fatal(err)
	}
	if made, err := h.Create(t.Context(), &hostagentv1.CreateSandboxRequest{}); err != nil || made.AccessToken != secret {
		t.Fatalf("%v, %v", made, err)
	}
	want = append(want, "CreateSandbox")
	_, err = h.Sandbox(clienttest.ID).Usage(t.Context())
	if diff := gocmp.Diff(want, a.Calls()); diff != "" || err != nil {
		t.Errorf("%v, %s", err, diff)
	}
}

// An error of the agent, which knows no token, is not the guest's word: of a
// guest, "not found" would mean that there is no such command.
func TestNoTokenIsNotTheGuestsWord(t *testing.T) {
	s := sandboxOf(t, (&clienttest.Agent{Status: "gone"}).Serve(t))
	_, err := s.processes("").List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if connect.CodeOf(err) != connect.CodeNotFound || connect.IsWireError(err) {
		t.Errorf("%v, from the wire: %v", err, connect.IsWireError(err))
	}
	if _, err := s.Exec(t.Context(), Command{Cmd: "true"}); err == nil || Missing(err) {
		t.Errorf("exec: %v", err)
	}
}

// The data plane says of all sandboxes that do not run that they are not there. The
// client's callers are told what is true.
func TestSandboxThatDoesNotRun(t *testing.T) {
	for status, want := range map[string]struct {
		code connect.Code
		text string
	}{
		"paused":     {connect.CodeFailedPrecondition, "is paused; CALL needs it running"},
		"hibernated": {connect.CodeFailedPrecondition, "is hibernated"},
		"stopped":    {connect.CodeFailedPrecondition, "is stopped"},
		"gone":       {connect.CodeNotFound, "does not exist"},
		"running":    {connect.CodeUnavailable, "did not run a moment ago"},
	} {
		a := &clienttest.Agent{Absent: true, Token: secret}
		s := sandboxOf(t, a.Serve(t))
		if _, err := s.Token(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.SetStatus(status)
		_, rpc := s.processes("").List(t.Context(), connect.NewRequest(&process.ListRequest{}))
		_, exec := s.Exec(t.Context(), Command{Cmd: "true"})
		_, usage := s.Usage(t.Context())
		_, _, tunnel := s.tunnel(t.Context(), 80)
		for what, err := range map[string]error{"rpc": rpc, "exec": exec, "usage": usage, "port": tunnel} {
			call := map[string]string{"rpc": "exec", "exec": "exec", "usage": "top", "port": "a request to a port"}[what]
			text := strings.Replace(want.text, "CALL", call, 1)
			if connect.CodeOf(err) != want.code || !strings.Contains(err.Error(), text) || connect.IsWireError(err) || Missing(err) {
				t.Errorf("%s, %s: %v", status, what, err)
			}
		}
	}
}

// The token does not go where a guest's redirect leads.
func TestTokenFollowsNoRedirect(t *testing.T) {
	var followed atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	defer elsewhere.Close()
	s := sandboxOf(t, (&clienttest.Agent{Token: secret, Elsewhere: elsewhere.URL}).Serve(t))
	if _, err := s.Usage(t.Context()); err == nil {
		t.Error("a redirect is taken for metrics")
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", s.host.base.String()+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	guestHeaders{id: s.ID}.set(req.Header)
	resp, err := s.host.dataPlane().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if followed.Load() != 0 {
		t.Error("a redirect was followed")
	}
}
