package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// ask sends a request to the control plane from an address, over a connection that
// came to local.
func ask(h http.Handler, local net.Addr, remote, path string, header http.Header) int {
	method, body := http.MethodGet, ""
	if strings.Contains(path, "HostAgentService") {
		method, body = http.MethodPost, "{}"
	}
	r := httptest.NewRequest(method, "http://localhost"+path, strings.NewReader(body))
	r.RemoteAddr = remote
	for name, values := range header {
		r.Header[name] = values
	}
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)))
	return w.Code
}

// Who is let through, by the connection, the keys that there are, and the key that the
// request shows.
func TestWhoMayCall(t *testing.T) {
	config, dir := newPlane(t).config, t.TempDir()
	keys, err := auth.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	config.Keys = keys
	serve := func(keyless bool) http.Handler {
		mux := http.NewServeMux()
		config.Keyless = keyless
		Register(mux, config)
		return mux
	}
	loopback, beyond := serve(true), serve(false)
	const version = "/hostagent.v1.HostAgentService/GetVersion"
	tcp, socket := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, &net.UnixAddr{Name: "/run/wrenn/agent.sock", Net: "unix"}
	show := func(name, value string) http.Header { return http.Header{http.CanonicalHeaderKey(name): {value}} }
	// status of GetVersion: on loopback, on loopback of an agent that listens beyond,
	// from another machine, over the socket
	check := func(what string, header http.Header, want ...int) {
		t.Helper()
		got := []int{
			ask(loopback, tcp, "127.0.0.1:9", version, header), ask(beyond, tcp, "[::1]:9", version, header),
			ask(loopback, tcp, "192.0.2.1:9", version, header), ask(loopback, socket, "@", version, header),
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
		if got := ask(beyond, tcp, "192.0.2.1:9", "/healthz", header); got != http.StatusOK {
			t.Errorf("%s: /healthz: %d", what, got)
		}
	}
	check("no key is made", nil, 200, 401, 401, 200)
	check("a wrong key, no key is made", show("X-API-KEY", "e2b_"+strings.Repeat("0", 40)), 401, 401, 401, 200)
	secret, key, err := keys.CreateKey("blue", "")
	if err != nil {
		t.Fatal(err)
	}
	check("no key is shown", nil, 401, 401, 401, 200)
	check("the key", show("X-API-KEY", secret), 200, 200, 200, 200)
	check("the key as a token", show("Authorization", "Bearer "+secret), 200, 200, 200, 200)
	check("a wrong key", show("X-API-KEY", secret[:40]), 401, 401, 401, 200)
	check("its id", show("X-API-KEY", key.ID), 401, 401, 401, 200)
	check("another scheme", show("Authorization", "Basic "+secret), 401, 401, 401, 200)
	if got := ask(loopback, tcp, "127.0.0.1:9", "/metrics", nil); got != http.StatusUnauthorized {
		t.Errorf("/metrics: %d", got)
	}
	path := filepath.Join(dir, "keys.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, good[:20], 0o600); err != nil {
		t.Fatal(err)
	}
	check("damaged keys", show("X-API-KEY", secret), 500, 500, 500, 200)
	check("damaged keys, none is shown", nil, 500, 500, 500, 200)
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.RemoveKey(key.ID); err != nil {
		t.Fatal(err)
	}
	check("a revoked key", show("X-API-KEY", secret), 401, 401, 401, 200)
	check("the last key is revoked", nil, 200, 401, 401, 200)
}

// A key is held to its rates, the host is not.
func TestRates(t *testing.T) {
	config := newPlane(t).config
	config.Limiter = auth.NewLimiter(auth.Rates{Requests: 1e-9, Burst: 1})
	mux := http.NewServeMux()
	Register(mux, config)
	secret, _, err := config.Keys.CreateKey("", "")
	if err != nil {
		t.Fatal(err)
	}
	tcp := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	for i, want := range []int{http.StatusOK, http.StatusTooManyRequests} {
		header := http.Header{"X-Api-Key": {secret}}
		if got := ask(mux, tcp, "127.0.0.1:9", "/hostagent.v1.HostAgentService/GetVersion", header); got != want {
			t.Errorf("request %d: %d, want %d", i, got, want)
		}
		if got := ask(mux, &net.UnixAddr{}, "@", "/hostagent.v1.HostAgentService/GetVersion", nil); got != http.StatusOK {
			t.Errorf("over the socket: %d", got)
		}
	}
}

// callAs makes a call with a key, and returns the code of its error.
func (p *plane) callAs(secret, rpc, request string) (code, message string) {
	p.Helper()
	p.secret = secret
	defer func() { p.secret = "" }()
	return p.call(rpc, request)
}

// Every call of the service has a rule, which holds for the key of another project.
func TestEveryCallHasARule(t *testing.T) {
	p := newPlane(t)
	secret, _, err := p.keys.CreateKey("other", "")
	if err != nil {
		t.Fatal(err)
	}
	const never = "sb-00000000000000000000"
	before := p.state()
	for _, m := range methods() {
		rpc := string(m.Name())
		named := m.Input().Fields().ByName("sandbox_id") != nil
		rule, ok := rules["/"+string(m.Parent().FullName())+"/"+rpc]
		switch {
		case !ok:
			t.Errorf("%s has no rule: say in access.go what a key may do with it", rpc)
		case rule == ofSandbox && (!named || m.IsStreamingClient() || m.IsStreamingServer()):
			t.Errorf("%s is held to a sandbox that its request does not name", rpc)
		case rule == hostOnly:
			if code, message := p.callAs(secret, rpc, "{}"); code != "permission_denied" {
				t.Errorf("%s: %s, %s", rpc, code, message)
			}
		case named && rule != ofSandbox && rpc != "WatchEvents": // which has a test of its own
			t.Errorf("%s names a sandbox and is not held to it", rpc)
		case rule == ofSandbox:
			code, message := p.callAs(secret, rpc, fmt.Sprintf(`{"sandbox_id":%q}`, p.id))
			none, words := p.callAs(secret, rpc, fmt.Sprintf(`{"sandbox_id":%q}`, never))
			if code != "not_found" || none != code || strings.ReplaceAll(words, never, p.id) != message {
				t.Errorf("%s: %s, %q; of a sandbox that never was: %s, %q", rpc, code, message, none, words)
			}
		}
	}
	if len(rules) != len(methods()) {
		t.Errorf("%d rules for %d calls", len(rules), len(methods()))
	}
	if diff := cmp.Diff(before, p.state()); diff != "" {
		t.Errorf("refused calls have changed something:\n%s", diff)
	}
}

// A stream that is open ends with the next message when its key is revoked, and one
// without a key when one is made.
func TestStreamOfARevokedKey(t *testing.T) {
	p := newPlane(t)
	watch := func(c *http.Client) *connect.ServerStreamForClient[pb.WatchEventsResponse] {
		t.Helper()
		client := hostagentv1connect.NewHostAgentServiceClient(c, p.url)
		events, err := client.WatchEvents(t.Context(), connect.NewRequest(&pb.WatchEventsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if !events.Receive() { // the first says that it watches
			t.Fatal(events.Err())
		}
		return events
	}
	ends := func(what, project string, events *connect.ServerStreamForClient[pb.WatchEventsResponse]) {
		t.Helper()
		defer events.Close()
		made, err := p.manager.Create(t.Context(), sandbox.CreateRequest{Labels: sandbox.Labels{Project: project}})
		if err != nil {
			t.Fatal(err)
		}
		for events.Receive() {
			if e := events.Msg().Event; e.GetSandboxId() == string(made.ID) {
				t.Fatalf("%s: it tells of %v", what, e)
			}
		}
		if err := events.Err(); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s: %v", what, err)
		}
	}
	keyless := watch(&http.Client{})
	secret, key, err := p.keys.CreateKey("blue", "")
	if err != nil {
		t.Fatal(err)
	}
	ends("no key", "", keyless)
	keyed := watch(&http.Client{Transport: withKey{secret, http.DefaultTransport}})
	if _, err := p.keys.RemoveKey(key.ID); err != nil {
		t.Fatal(err)
	}
	ends("a revoked key", "blue", keyed)
}

// A handler that is reached without a caller refuses every call.
func TestCallWithoutCaller(t *testing.T) {
	path, calls := handler(Config{Panics: new(atomic.Int64), Log: slog.New(slog.DiscardHandler)})
	for _, rpc := range []string{"GetVersion", "ListSandboxes"} {
		r := httptest.NewRequest(http.MethodPost, path+rpc, strings.NewReader("{}"))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		calls.ServeHTTP(w, r)
		if w.Code != http.StatusUnauthorized {
			t.Errorf("%s: %d, %s", rpc, w.Code, w.Body)
		}
	}
}

// withKey shows a key with every call.
type withKey struct {
	key  string
	next http.RoundTripper
}

func (k withKey) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-API-KEY", k.key)
	return k.next.RoundTrip(r)
}

// told returns the sandboxes of which a client gets events, when it asks for those of
// each of some sandboxes.
func (p *plane) told(c hostagentv1connect.HostAgentServiceClient, sandboxes ...string) map[string]bool {
	p.Helper()
	of := map[string]bool{}
	for _, only := range sandboxes {
		events, err := c.WatchEvents(p.Context(), connect.NewRequest(&pb.WatchEventsRequest{NoFollow: true, SandboxId: only}))
		if err != nil {
			p.Fatal(err)
		}
		for events.Receive() {
			if e := events.Msg().Event; e != nil {
				of[e.SandboxId] = true
			}
		}
		if err := events.Err(); err != nil {
			p.Error(err)
		}
	}
	return of
}

// Projects see their own sandboxes and events, and the host sees all.
func TestProjectsAreApart(t *testing.T) {
	p := newPlane(t)
	ctx := t.Context()
	clients := map[string]hostagentv1connect.HostAgentServiceClient{}
	own := map[string]string{}
	for _, name := range []string{"blue", "red"} {
		secret, _, err := p.keys.CreateKey(name, "")
		if err != nil {
			t.Fatal(err)
		}
		clients[name] = hostagentv1connect.NewHostAgentServiceClient(
			&http.Client{Transport: withKey{secret, http.DefaultTransport}}, p.url)
		// The same owner key is two names in two projects.
		created, err := clients[name].CreateSandbox(ctx, connect.NewRequest(&pb.CreateSandboxRequest{OwnerKey: "same"}))
		if err != nil {
			t.Fatal(err)
		}
		own[name] = created.Msg.SandboxId
		forked, err := clients[name].ForkSandbox(ctx, connect.NewRequest(&pb.ForkSandboxRequest{SandboxId: own[name]}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := clients[name].DestroySandbox(ctx, connect.NewRequest(
			&pb.DestroySandboxRequest{SandboxId: forked.Msg.Sandboxes[0].SandboxId})); err != nil {
			t.Errorf("destroy of a fork: %v", err)
		}
	}
	for name, c := range clients {
		list, err := c.ListSandboxes(ctx, connect.NewRequest(&pb.ListSandboxesRequest{All: true}))
		if err != nil || len(list.Msg.Sandboxes) != 1 || list.Msg.Sandboxes[0].SandboxId != own[name] {
			t.Errorf("%s lists %v, %v", name, list, err)
		}
		got, err := c.GetSandbox(ctx, connect.NewRequest(&pb.GetSandboxRequest{SandboxId: own[name]}))
		if err != nil || got.Msg.AccessToken == "" {
			t.Errorf("%s gets %v, %v", name, got, err)
		}
		if of := p.told(c, "", own["blue"], own["red"], p.id); len(of) != 2 || !of[own[name]] { // its own and the fork
			t.Errorf("%s is told of %v", name, of)
		}
	}
	h := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/hostagent.v1.HostAgentService/ListSandboxes", strings.NewReader("{}"))
	r.Header.Set("Content-Type", "application/json")
	p.mux.ServeHTTP(h, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.UnixAddr{})))
	var all struct{ Sandboxes []struct{ SandboxID string } }
	if err := json.Unmarshal(h.Body.Bytes(), &all); err != nil || len(all.Sandboxes) != 3 {
		t.Errorf("the host lists %+v, %v", all, err)
	}
}

// TestSnapshotsOfProjects: a key's snapshots are its project's own. Others do not list,
// use or delete them, and may have the same name.
func TestSnapshotsOfProjects(t *testing.T) {
	p := newPlane(t)
	ids := map[string]string{}
	secrets := map[string]string{}
	for _, name := range []string{"blue", "red"} {
		secret, _, err := p.keys.CreateKey(name, "")
		if err != nil {
			t.Fatal(err)
		}
		secrets[name] = secret
		c := hostagentv1connect.NewHostAgentServiceClient(&http.Client{Transport: withKey{secret, http.DefaultTransport}}, p.url)
		created, err := c.CreateSandbox(t.Context(), connect.NewRequest(&pb.CreateSandboxRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		req := &pb.SnapshotSandboxRequest{SandboxId: created.Msg.SandboxId, Name: "snap"}
		made, err := c.SnapshotSandbox(t.Context(), connect.NewRequest(req))
		if err != nil || made.Msg.Snapshot.Name != "snap" || made.Msg.Snapshot.TemplateId == "" || made.Msg.Snapshot.Build == "" {
			t.Fatalf("%s snapshots %v, %v", name, made, err)
		}
		ids[name] = made.Msg.Snapshot.TemplateId
		list, err := c.ListSnapshots(t.Context(), connect.NewRequest(&pb.ListSnapshotsRequest{}))
		if err != nil || len(list.Msg.Snapshots) != 1 || list.Msg.Snapshots[0].TemplateId != ids[name] {
			t.Errorf("%s lists %v, %v", name, list, err)
		}
	}
	for _, text := range []string{ids["red"], "red/snap", ids["red"] + ":default"} {
		for rpc, request := range map[string]string{"CreateSandbox": `{"template":%q}`, "DeleteSnapshot": `{"name":%q}`} {
			if code, message := p.callAs(secrets["blue"], rpc, fmt.Sprintf(request, text)); code != "not_found" {
				t.Errorf("%s of another's %s: %s, %s", rpc, text, code, message)
			}
		}
	}
	if code, message := p.callAs(secrets["blue"], "CreateSandbox", `{"template":"snap"}`); code != "" {
		t.Errorf("from its own: %s, %s", code, message)
	}
	if code, message := p.callAs(secrets["blue"], "DeleteSnapshot", `{"name":"snap"}`); code != "" {
		t.Errorf("delete its own: %s, %s", code, message)
	}
	if code, message := p.callAs(secrets["red"], "CreateSandbox", `{"template":"snap"}`); code != "" {
		t.Errorf("the other's is gone: %s, %s", code, message)
	}
}
