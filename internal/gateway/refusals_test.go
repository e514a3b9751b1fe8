package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"maps"
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

// refusing returns a gateway in front of sandboxes. A request that reaches the control
// plane fails the test.
func refusing(t *testing.T, m *manager) *Gateway {
	return New(Config{
		Sandboxes: m, Panics: new(atomic.Int64), Log: slog.New(slog.DiscardHandler), Names: []string{"Host.Example."},
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
	if w.Code != status || got.Code != status || got.Port != port || got.Message == "" || got.SandboxID == nil {
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

// wantNotFound checks that an answer is the one about every sandbox that does not run.
func wantNotFound(t *testing.T, what string, w *httptest.ResponseRecorder, written string) {
	t.Helper()
	var got map[string]any
	if err := decode(w, &got); err != nil {
		t.Fatalf("%s: %q: %v", what, w.Body, err)
	}
	want := map[string]any{"sandboxId": written, "message": "The sandbox was not found", "code": 502.0}
	if w.Code != http.StatusBadGateway || !maps.Equal(got, want) {
		t.Errorf("%s: HTTP %d %s, want 502 and %v", what, w.Code, w.Body, want)
	}
}

const otherHost, ourHost = "evil.example", "localhost"

// The checks of the door, one at a time and in each spelling.
func TestDoorRefuses(t *testing.T) {
	g := refusing(t, newManager(t.Context()))
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
	g := refusing(t, newManager(t.Context()))
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
// take for one of them, and by each way to name a sandbox, whether it is there or not.
func TestReservedEndpointsAreRefused(t *testing.T) {
	g := refusing(t, &manager{})
	reserved := func(what string, w *httptest.ResponseRecorder, path string) {
		t.Helper()
		var got map[string]any
		err := decode(w, &got)
		message, _ := got["message"].(string)
		if err != nil || w.Code != http.StatusNotFound || len(got) != 3 || got["code"] != 404.0 || got["path"] != path || message == "" {
			t.Errorf("%s: HTTP %d %s, %v", what, w.Code, w.Body, err)
		}
	}
	for _, endpoint := range guestapi.HostOnly() {
		for _, path := range []string{
			endpoint, "/" + endpoint, endpoint + "/", "/." + endpoint, "/a/.." + endpoint, "/.." + endpoint, endpoint + "/.", endpoint + "//",
			strings.TrimPrefix(endpoint, "/"),
		} {
			for _, method := range []string{"GET", "POST", "OPTIONS"} {
				reserved(method+" "+path, ask(g, method, "49983-"+idA+".localhost", path), path)
				reserved(method+" "+path, ask(g, method, ourHost, path, "E2b-Sandbox-Id: "+idA), path)
			}
		}
		// A user's server may have such a path.
		wantNotFound(t, endpoint, ask(g, "GET", "80-"+idA+".localhost", endpoint), idA)
		wantNotFound(t, endpoint, ask(g, "GET", "49983-"+idA+".localhost", endpoint+"x"), idA)
	}
	w := ask(g, http.MethodConnect, "49983-"+idA+".localhost", "")
	if w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), "reserved") {
		t.Errorf("CONNECT: HTTP %d %s", w.Code, w.Body)
	}
}

// Ports and ids that name nothing.
func TestPlacesThatAreNone(t *testing.T) {
	g := refusing(t, &manager{})
	for _, port := range []string{"0", "65536", "99999", "-1", "+80", "0x50", "80 ", "eighty", "8_0", "99999999999999999999"} {
		w := ask(g, "GET", ourHost, "/", "E2b-Sandbox-Id: "+idA, "E2b-Sandbox-Port: "+port)
		wantRefusal(t, "port "+port, w, http.StatusBadRequest, 0, "65535")
	}
	wantRefusal(t, "port 0 by name", ask(g, "GET", "0-"+idA+".x", "/"), http.StatusBadRequest, 0, "65535")
	for _, id := range []string{"x", "sb-", "../../etc", "SB-000000000000000A", idA + "\n", idA, "sb000000000000000a-x"} {
		w := ask(g, "GET", ourHost, "/", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 80")
		wantNotFound(t, "id "+id, w, id)
	}
	wantNotFound(t, "by name", ask(g, "GET", "80-nonsense.x", "/"), "nonsense")
	two := ask(g, "GET", "80-"+idA+".x", "/", "E2b-Sandbox-Id: "+idB)
	wantRefusal(t, "two sandboxes", two, http.StatusBadRequest, 0, idA, idB)
	two = ask(g, "GET", "80-"+idA+".x", "/", "E2b-Sandbox-Port: 81")
	wantRefusal(t, "two ports", two, http.StatusBadRequest, 80, "80", "81")
	wantRefusal(t, "no sandbox", ask(g, "GET", ourHost, "/", "E2b-Sandbox-Port: 81"), http.StatusBadRequest, 0, "no sandbox")
}

// What a manager's error is to a caller, wherever it comes from: on every path it is
// 502 for what is not there.
func TestErrorsOfTheManager(t *testing.T) {
	want := map[*errdefs.Class]int{
		errdefs.NotFound: 502, errdefs.WrongState: 502, errdefs.Busy: http.StatusConflict, errdefs.Exhausted: http.StatusTooManyRequests,
	}
	for _, class := range errdefs.Classes() {
		status := cmp.Or(want[class], http.StatusServiceUnavailable)
		for _, call := range []string{"Tokens", "Get", "Lease", "Wake"} {
			m := newManager(t.Context())
			m.change(idA, func(b *box) {
				err := class.Errorf("this is why")
				b.err = map[string]error{call: err}
				if call == "Wake" {
					b.info.State, b.info.AutoResume = sandbox.Hibernated, true
					b.wake = func(context.Context) error { return err }
				}
			})
			g := refusing(t, m)
			for _, to := range []struct{ port, path string }{{"80", "/health"}, {"49983", "/files"}, {"49983", "/health"}} {
				what := class.Error() + ", " + call + ", " + to.port + to.path
				w := ask(g, "GET", to.port+"-"+idA+".x", to.path, "X-Access-Token: "+tokenA)
				port, _ := strconv.Atoi(to.port)
				switch {
				case status == 502:
					wantNotFound(t, what, w, idA)
				case class == errdefs.Busy:
					wantRefusal(t, what, w, status, uint16(port), "The sandbox is still transitioning. Try again in a moment.")
				default:
					wantRefusal(t, what, w, status, uint16(port), "this is why")
				}
			}
		}
	}
}

// A person who follows a link in a browser gets a page; every program gets JSON.
func TestRefusalsAsPages(t *testing.T) {
	g := refusing(t, &manager{})
	const browser = "User-Agent: Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0"
	for _, c := range []struct {
		headers []string
		page    bool
	}{
		{[]string{browser, "Accept: text/html,*/*;q=0.8", "Sec-Fetch-Mode: navigate"}, true},
		{[]string{browser, "Accept: text/html,*/*;q=0.8"}, true}, // over plain HTTP
		{[]string{browser, "Accept: */*"}, false},
		{[]string{browser, "Accept: text/html", "Sec-Fetch-Mode: cors"}, false},
		{[]string{browser, "Accept: text/html", "Sec-Fetch-Mode: no-cors"}, false},
		{[]string{"User-Agent: e2b-js-sdk/2.51.0", "Accept: text/html"}, false},
		{nil, false},
	} {
		w := ask(g, "GET", "80-<b>"+idA+".x", "/", c.headers...)
		if w.Code != http.StatusForbidden {
			t.Fatalf("an id that is none: HTTP %d %s", w.Code, w.Body)
		}
		w = ask(g, "GET", ourHost, "/", append(c.headers, "E2b-Sandbox-Id: <b>&")...)
		h := w.Result().Header
		isPage := strings.HasPrefix(w.Body.String(), "<html") && h.Get("Content-Type") == "text/html; charset=utf-8"
		if isPage != c.page || w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "The sandbox was not found") {
			t.Errorf("%q: HTTP %d %v %s", c.headers, w.Code, h, w.Body)
		}
		if strings.Contains(w.Body.String(), "<b>") || h.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("what the caller wrote is in the page: %s", w.Body)
		}
		if c.page && h.Get("Content-Security-Policy") == "" {
			t.Error("the page may run programs")
		}
	}
}
