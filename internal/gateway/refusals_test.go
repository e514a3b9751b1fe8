package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// failing are sandboxes of which none can be asked.
type failing struct{ err error }

func (f failing) Lease(context.Context, sandbox.ID) (*sandbox.Lease, error) { return nil, f.err }
func (f failing) AccessToken(sandbox.ID) (string, error)                    { return tokenA, f.err }

// refusing returns a gateway whose sandboxes all fail with an error. A request
// that reaches the control plane fails the test.
func refusing(t *testing.T, err error) *Gateway {
	return New(Config{
		Sandboxes: failing{err}, Panics: new(atomic.Int64), Log: slog.New(slog.DiscardHandler), Names: []string{"Host.Example."},
		Control: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("%s %s got through", r.Method, r.URL) }),
	})
}

// ask lets a gateway answer a request with these headers, each "Name: value".
func ask(g *Gateway, method, host, path string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://x/", nil)
	r.Host, r.URL.Path = host, path
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	g.ServeHTTP(w, r)
	return w
}

// wantRefusal checks an answer of the data plane: its status, words of its
// message, and its form.
func wantRefusal(t *testing.T, what string, w *httptest.ResponseRecorder, status int, port uint16, words ...string) {
	t.Helper()
	var got refusal
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatalf("%s: %q: %v", what, w.Body, err)
	}
	if w.Code != status || got.Code != status || got.Port != port || got.Message == "" {
		t.Errorf("%s: HTTP %d, %+v; want %d, port %d", what, w.Code, got, status, port)
	}
	for _, word := range words {
		if !strings.Contains(got.Message, word) {
			t.Errorf("%s: %q lacks %q", what, got.Message, word)
		}
	}
	h := w.Result().Header
	if h.Get("Content-Type") != "application/json; charset=utf-8" || h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%s: headers %v", what, h)
	}
}

const otherHost, ourHost = "evil.example", "localhost"

// The checks of the door, one at a time and in each spelling.
func TestDoorRefuses(t *testing.T) {
	g := refusing(t, nil)
	isJSON := "Content-Type: application/json"
	for _, c := range []struct {
		host    string
		headers []string
		word    string
	}{
		{otherHost, []string{isJSON}, "no name of this host agent"},
		{"LOCALHOST.evil.example:50051", []string{isJSON}, "no name"},
		{"host.example.evil.example", []string{isJSON}, "no name"},
		{"localhost..", []string{isJSON}, "no name"},
		{"localhost:50051:50051", []string{isJSON}, "no name"},
		{"[::ffff:192.0.2.1]", []string{isJSON}, "no name"},
		{"127.0.0.1.", nil, "content type"}, // a name of the agent
		{ourHost, []string{isJSON, "Origin: http://evil.example"}, "web page"},
		{ourHost, []string{isJSON, "Origin: http://localhost:1"}, "web page"},
		{ourHost, []string{isJSON, "Origin: https://localhost"}, "web page"},
		{ourHost, []string{isJSON, "Origin: null"}, "web page"},
		{ourHost, []string{isJSON, "Origin: "}, "web page"},
		{ourHost, []string{isJSON, "Origin: http://localhost", "Origin: http://evil.example"}, "web page"},
		{ourHost, []string{isJSON, "Sec-Fetch-Site: cross-site"}, "another site"},
		{ourHost, []string{isJSON, "Sec-Fetch-Site: same-site"}, "another site"},
		{ourHost, []string{isJSON, "Sec-Fetch-Site: Same-Origin"}, "another site"},
		{ourHost, []string{isJSON, "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"}, "another site"},
		{ourHost, []string{"Content-Type: text/plain"}, "content type"},
		{ourHost, []string{"Content-Type: "}, "content type"},
		{ourHost, []string{"Content-Type: application"}, "content type"},
		{ourHost, []string{"Content-Type: application/json, text/plain"}, "content type"},
		{ourHost, []string{"Content-Type: APPLICATION/x-www-form-urlencoded"}, "content type"},
		{ourHost, []string{"Content-Type: multipart/form-data; boundary=application/json"}, "content type"},
		{ourHost, nil, "content type"},
	} {
		w := ask(g, "POST", c.host, "/hostagent.v1.HostAgentService/CreateSandbox", c.headers...)
		var got struct{ Code, Message string }
		if err := decode(w, &got); err != nil || w.Code != http.StatusForbidden ||
			got.Code != "permission_denied" || !strings.Contains(got.Message, c.word) {
			t.Errorf("%s, %q: HTTP %d, %s; want 403 about %q", c.host, c.headers, w.Code, w.Body, c.word)
		}
		if w.Result().Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s, %q: a browser may guess what the answer is", c.host, c.headers)
		}
		// With a header that names a sandbox, the types are the sandbox's affair.
		if c.word != "content type" {
			w := ask(g, "POST", c.host, "/x", append(c.headers, "E2b-Sandbox-Id: "+idA, "E2b-Sandbox-Port: 80")...)
			wantRefusal(t, c.host, w, http.StatusForbidden, 80, c.word)
		}
	}
}

func decode(w *httptest.ResponseRecorder, to any) error { return json.Unmarshal(w.Body.Bytes(), to) }

func TestTooManyRequests(t *testing.T) {
	g := refusing(t, nil)
	for range maxControl {
		g.enter(load{kind: toAgent})
	}
	w := ask(g, "GET", ourHost, "/healthz")
	var got struct{ Code, Message string }
	if err := decode(w, &got); err != nil || w.Code != http.StatusTooManyRequests || got.Code != "resource_exhausted" {
		t.Errorf("to the agent: HTTP %d, %s", w.Code, w.Body)
	}
	for port, kind := range map[uint16]kind{80: toPort, guestapi.Port: ofOthers} {
		for range maxPerSandbox {
			g.enter(load{idA, kind})
		}
		w := ask(g, "GET", ourHost, "/x", "E2b-Sandbox-Id: "+idA, "E2b-Sandbox-Port: "+strconv.Itoa(int(port)))
		wantRefusal(t, "to a sandbox", w, http.StatusTooManyRequests, port, idA, "1024")
		if w.Result().Header.Get("Retry-After") == "" {
			t.Error("the client is not told when to try again")
		}
	}
}

// The endpoints of envd that are the host's, in every spelling that envd might
// take for one of them, and by each way to name a sandbox.
func TestReservedEndpointsAreRefused(t *testing.T) {
	g := refusing(t, errdefs.WrongState.Errorf("sandbox is paused"))
	for _, endpoint := range guestapi.HostOnly() {
		for _, path := range []string{
			endpoint, "/" + endpoint, endpoint + "/", "/." + endpoint, "/a/.." + endpoint, "/.." + endpoint, endpoint + "/.", endpoint + "//",
			strings.TrimPrefix(endpoint, "/"),
		} {
			for _, method := range []string{"GET", "POST", "OPTIONS"} {
				what := method + " " + path
				wantRefusal(t, what, ask(g, method, "49983-"+idA+".localhost", path), http.StatusNotFound, guestapi.Port, "reserved")
				wantRefusal(t, what, ask(g, method, ourHost, path, "E2b-Sandbox-Id: "+idA), http.StatusNotFound, guestapi.Port, "reserved")
			}
		}
		// A user's server may have such a path.
		wantRefusal(t, endpoint, ask(g, "GET", "80-"+idA+".localhost", endpoint), http.StatusConflict, 80, "paused")
		wantRefusal(t, endpoint, ask(g, "GET", "49983-"+idA+".localhost", endpoint+"x"), http.StatusConflict, guestapi.Port, "paused")
	}
	wantRefusal(t, "CONNECT", ask(g, http.MethodConnect, "49983-"+idA+".localhost", ""), http.StatusNotFound, guestapi.Port, "reserved")
}

// Ports and ids that name nothing.
func TestPlacesThatAreNone(t *testing.T) {
	g := refusing(t, errdefs.NotFound.Errorf("sandbox does not exist"))
	for _, port := range []string{"0", "65536", "99999", "-1", "+80", "0x50", "80 ", "eighty", "8_0", "99999999999999999999"} {
		w := ask(g, "GET", ourHost, "/", "E2b-Sandbox-Id: "+idA, "E2b-Sandbox-Port: "+port)
		wantRefusal(t, "port "+port, w, http.StatusBadRequest, 0, "65535")
	}
	wantRefusal(t, "port 0 by name", ask(g, "GET", "0-"+idA+".x", "/"), http.StatusBadRequest, 0, "65535")
	for _, id := range []string{"x", "sb-", "../../etc", "SB-000000000000000A", idA + "\n"} {
		w := ask(g, "GET", ourHost, "/", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 80")
		wantRefusal(t, "id "+id, w, http.StatusNotFound, 80, "sandbox_id")
		if strings.Contains(w.Body.String(), "does not exist") {
			t.Errorf("the manager was asked for %q", id)
		}
	}
	two := ask(g, "GET", "80-"+idA+".x", "/", "E2b-Sandbox-Id: "+idB)
	wantRefusal(t, "two sandboxes", two, http.StatusBadRequest, 0, idA, idB)
	two = ask(g, "GET", "80-"+idA+".x", "/", "E2b-Sandbox-Port: 81")
	wantRefusal(t, "two ports", two, http.StatusBadRequest, 0, "80", "81")
}

// What a manager says of a sandbox, as a status. Of envd's health it is 502.
func TestSandboxesThatCannotBeAsked(t *testing.T) {
	want := map[*errdefs.Class]int{errdefs.NotFound: http.StatusNotFound, errdefs.WrongState: http.StatusConflict}
	for _, class := range errdefs.Classes() {
		status, ok := want[class]
		if !ok {
			status = http.StatusServiceUnavailable
		}
		g := refusing(t, class.Errorf("this is why"))
		wantRefusal(t, class.Error(), ask(g, "GET", "80-"+idA+".x", "/health"), status, 80, "this is why")
		wantRefusal(t, class.Error(), ask(g, "GET", "49983-"+idA+".x", "/files"), status, guestapi.Port, "this is why")
		wantRefusal(t, class.Error(), ask(g, "GET", "49983-"+idA+".x", "/health"), http.StatusBadGateway, guestapi.Port, "this is why")
	}
	g := refusing(t, nil)
	wantRefusal(t, "no id", ask(g, "GET", ourHost, "/health", "E2b-Sandbox-Id: x"), http.StatusBadGateway, guestapi.Port, "sandbox_id")
}
