package gateway

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// A web page may use the REST API with a key that it was given, and nothing else of the
// agent; which API answers goes by the path alone.
func TestRESTBesideTheDoor(t *testing.T) {
	answers := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, name, " ", r.Method) })
	}
	e := serve(t, func(c *Config) {
		c.Control, c.REST, c.Names = answers("control"), answers("rest"), []string{"wrenn.example", "api.wrenn.example"}
	})
	const key, page = "X-API-KEY: e2b_00\r\n", "Origin: https://app.example\r\nSec-Fetch-Site: cross-site\r\n"
	const rpc, json = "POST /hostagent.v1.HostAgentService/CreateSandbox", "Content-Type: application/json\r\n"
	for _, c := range []struct {
		line, host, headers string
		want                string
	}{
		{"GET /health", "wrenn.example", "", "rest GET"},
		{"POST /v2/sandboxes", "api.wrenn.example", key + json, "rest POST"},
		{"DELETE /sandboxes/x", "localhost", key, "rest DELETE"}, // without a content type
		{"POST /sandboxes", "localhost", key + "Content-Type: text/plain\r\n", "rest POST"},
		{"GET /teams", "localhost", "Authorization: Bearer e2b_00\r\n" + page, "rest GET"},
		{"POST /sandboxes", "localhost", key + json + page, "rest POST"},
		{"OPTIONS /sandboxes", "localhost", page + "Access-Control-Request-Method: POST\r\n", "rest OPTIONS"},
		{"PUT /upload/x", "localhost", "", "rest PUT"}, // as clients send a build's files
		{"POST /v2/sandboxes", "localhost", json, "rest POST"},
		{"GET /files?path=x", "localhost", key, "rest GET"}, // without a signature
		{"GET /healthz/", "localhost", "", "rest GET"},
		{"POST //hostagent.v1.HostAgentService/CreateSandbox", "localhost", json, "rest POST"},
		// A page without a key, and one by a name that is not the agent's.
		{"POST /sandboxes", "localhost", json + page, "403 web page"},
		{"POST /sandboxes", "localhost", "Content-Type: text/plain\r\n" + page, "403 web page"},
		{"POST /sandboxes", "localhost", page + "X-API-KEY: \r\n", "403 web page"},
		{"GET /sandboxes", "localhost", "Sec-Fetch-Site: same-site\r\n", "403 another site"},
		{"GET /sandboxes", "localhost", "Authorization: Basic e2b_00\r\n" + page, "403 web page"}, // a browser adds it by itself
		{"POST /sandboxes", "evil.example", key + json + page, "403 no name"},
		{"OPTIONS /sandboxes", "evil.example", page, "403 no name"},
		{"GET /health", "evil.example", "", "403 no name"},
		// The agent's own API stays closed to pages, with a key too.
		{"GET /healthz", "localhost", "", "control GET"},
		{"GET /readyz", "localhost", "", "control GET"},
		{"GET /metrics", "localhost", "", "control GET"},
		{rpc, "localhost", json, "control POST"},
		{rpc, "localhost", key + json + page, "403 web page"},
		{rpc, "localhost", key + "Content-Type: text/plain\r\n", "403 content type"},
		{"OPTIONS /hostagent.v1.HostAgentService/CreateSandbox", "localhost", page, "403 web page"},
	} {
		text := c.line + " HTTP/1.1\r\nHost: " + c.host + "\r\n" + c.headers + "\r\n"
		status, body := e.ask(t, text)
		wantStatus, word := http.StatusOK, c.want
		if rest, refused := strings.CutPrefix(c.want, "403 "); refused {
			wantStatus, word = http.StatusForbidden, rest
		}
		if status != wantStatus || !strings.Contains(body, word) {
			t.Errorf("%q:\nHTTP %d %s, want %s", text, status, body, c.want)
		}
	}
	// What the gateway says in the REST API's place has its form.
	_, body := e.ask(t, "GET /sandboxes HTTP/1.1\r\nHost: evil.example\r\n\r\n")
	if !strings.HasPrefix(body, `{"code":403,"message":"`) {
		t.Errorf("refused with %s", body)
	}
	e.quiet(t)
}

// A page that has a sandbox's token, or the token of its ports, may use the sandbox by
// headers; one that has not may not, whether the sandbox is there or not.
func TestPagesAndTheDataPlane(t *testing.T) {
	port := guest(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") })
	m := newManager(t.Context())
	m.change(idB, func(b *box) { b.tokens.Envd, b.tokens.Traffic = "token of b", trafficA })
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	const page = "Origin: https://app.example\r\nSec-Fetch-Site: cross-site\r\n"
	for _, c := range []struct {
		id, headers string
		want        int
		word        string
	}{
		{idA, "X-Access-Token: " + tokenA + "\r\n", 200, "guest"},
		{idB, "E2b-Traffic-Access-Token: " + trafficA + "\r\n", 200, "guest"},
		{idB, "X-Access-Token: token of b\r\n", 403, "is missing"}, // its ports are private for its owner, too
		{idA, "X-Access-Token: token of b\r\n", 403, "web page"},
		{idA, "E2b-Traffic-Access-Token: " + trafficA + "\r\n", 403, "web page"},
		{idA, "", 403, "web page"},
		{idB, "", 403, "web page"},
		{"sb000000000000000c", "", 403, "web page"},
		{"nonsense", "X-Access-Token: " + tokenA + "\r\n", 403, "web page"},
	} {
		place := "E2b-Sandbox-Id: " + c.id + "\r\nE2b-Sandbox-Port: " + port + "\r\n"
		status, body := e.ask(t, "GET / HTTP/1.1\r\nHost: localhost\r\n"+place+page+c.headers+"\r\n")
		if status != c.want || !strings.Contains(body, c.word) {
			t.Errorf("%s, %q: HTTP %d %s, want %d %s", c.id, c.headers, status, body, c.want, c.word)
		}
	}
}

// A browser's question, which shows no secret, does not keep a page with one out: from a
// private port, or from a paused sandbox that it may wake. The page reads why it is
// refused.
func TestPagesAskFirst(t *testing.T) {
	var asked atomic.Int64
	answer := func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodOptions {
			asked.Add(1)
		}
		fmt.Fprint(w, "guest")
	}
	addr, port := envd(t, answer), guest(t, answer)
	const question = "Origin: https://app.example\r\nAccess-Control-Request-Method: POST\r\n" +
		"Access-Control-Request-Headers: x-access-token\r\n"
	for _, c := range []struct {
		port    string
		change  func(*box)
		reaches bool // the guest
	}{
		{port, func(*box) {}, true},
		{port, func(b *box) { b.tokens.Traffic = trafficA }, false},
		{"49983", func(b *box) { b.addr = addr }, true},
		{"49983", func(b *box) { b.info.State, b.info.AutoResume = sandbox.Hibernated, true }, false},
		{"49983", func(b *box) { b.info.State = sandbox.Hibernated }, false},
		{port, func(b *box) { b.info.State = sandbox.Stopped }, false},
	} {
		m := newManager(t.Context())
		m.change(idA, c.change)
		e := serve(t, func(c *Config) { c.Sandboxes = m })
		before := asked.Load()
		conn := e.dial(t)
		fmt.Fprintf(conn, "OPTIONS /x HTTP/1.1\r\nHost: %s-%s.x\r\n%s\r\n", c.port, idA, question)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		h := resp.Header
		if reached := asked.Load() > before; reached != c.reaches || !c.reaches && (resp.StatusCode != http.StatusNoContent ||
			h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Access-Control-Allow-Headers") != "x-access-token") {
			t.Errorf("port %s: reached %v, HTTP %d, %v", c.port, reached, resp.StatusCode, h)
		}
		if wakes, _ := m.calls(idA); wakes > 0 {
			t.Errorf("port %s: a question wakes the sandbox", c.port)
		}
	}
	w := ask(refusing(t, &manager{}), "GET", "80-"+idA+".x", "/")
	if w.Result().Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Error("a page cannot read why it is refused")
	}
	w = ask(refusing(t, &manager{}), "GET", ourHost, "/", "E2b-Sandbox-Id: "+idA, "Origin: http://evil.example")
	if w.Code != http.StatusForbidden || w.Result().Header.Get("Access-Control-Allow-Origin") != "" {
		t.Error("a page reads what the door says to it")
	}
	w = ask(refusing(t, &manager{}), "GET", "80-"+idA+".x", "/", "E2b-Sandbox-Id: "+idB)
	if w.Code != http.StatusBadRequest || w.Result().Header.Get("Access-Control-Allow-Origin") != "" {
		t.Error("a page reads the answer to a request with two names")
	}
}
