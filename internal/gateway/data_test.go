package gateway

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// noToken is the token of a sandbox that has none.
const noToken = "none"

const trafficA = "traffic token of a"

// credentials are what a request may show, as headers.
var credentials = map[string]string{
	"nothing": "", "owner": "X-Access-Token: " + tokenA + "\r\n", "wrong owner": "X-Access-Token: x\r\n",
	"traffic": "E2b-Traffic-Access-Token: " + trafficA + "\r\n", "wrong traffic": "E2b-Traffic-Access-Token: x\r\n",
}

// situation is a sandbox in a state, and what becomes of requests to it.
type situation struct {
	name    string
	state   sandbox.State
	pausing bool
	resumes bool // has AutoResume
	private bool
	// filesOnly: it has been paused without memory.
	filesOnly bool
	// userPort and envdPort are the statuses by credential; those that are missing are
	// those of "nothing". 200 is the guest's answer.
	userPort, envdPort map[string]int
}

func situations() []situation {
	none := map[string]int{"nothing": 502}
	open := map[string]int{"nothing": 200}
	guarded := map[string]int{"nothing": 403, "traffic": 200}
	owners := map[string]int{"nothing": 403, "owner": 200}
	var all []situation
	for _, state := range sandbox.States() {
		if state == sandbox.Running {
			continue
		}
		all = append(all, situation{name: string(state), state: state, userPort: none, envdPort: none})
		if state != sandbox.Hibernated && state != sandbox.Paused {
			name := string(state) + " with auto-resume"
			all = append(all, situation{name: name, state: state, resumes: true, userPort: none, envdPort: none})
		}
	}
	for _, state := range []sandbox.State{sandbox.Hibernated, sandbox.Paused, sandbox.Running} {
		pausing := state == sandbox.Running
		name := map[sandbox.State]string{
			sandbox.Hibernated: "hibernated", sandbox.Paused: "paused", sandbox.Running: "pausing",
		}[state]
		for _, s := range []situation{
			{name: ", to be woken", resumes: true, userPort: open, envdPort: owners},
			{name: ", to be woken, private", resumes: true, private: true, userPort: guarded, envdPort: owners},
			{name: ", private", private: true, userPort: none, envdPort: none},
			{name: ", without memory", filesOnly: true, resumes: true, userPort: none, envdPort: none},
		} {
			s.name, s.state, s.pausing = name+s.name, state, pausing
			all = append(all, s)
		}
	}
	return append(all,
		situation{name: "pausing", state: sandbox.Running, pausing: true, userPort: none, envdPort: none},
		situation{name: "running", state: sandbox.Running, userPort: open, envdPort: open},
		situation{name: "running, private", state: sandbox.Running, private: true, userPort: guarded, envdPort: open})
}

// Every state of a sandbox, by every way to name it, with everything that a request
// may show. The guest is asked, and the sandbox woken, only for requests that may.
func TestStatesAndCredentials(t *testing.T) {
	answer := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(guestapi.HeaderTraffic) != "" {
			t.Errorf("the guest got the traffic token")
		}
		fmt.Fprint(w, "guest")
	}
	addr, port := envd(t, answer), guest(t, answer)
	for _, s := range situations() {
		for shown, header := range credentials {
			t.Run(s.name+"/"+shown, func(t *testing.T) {
				t.Parallel()
				for _, envd := range []bool{false, true} {
					for _, byName := range []bool{false, true} {
						s.check(t, addr, port, shown, header, envd, byName)
					}
				}
			})
		}
	}
}

// check asks a sandbox in the situation once. Its envd is at addr, its server on port.
func (s situation) check(t *testing.T, addr netip.Addr, port, shown, header string, envd, byName bool) {
	t.Helper()
	m := newManager(t.Context())
	m.change(idA, func(b *box) {
		b.info.State, b.info.Pausing, b.info.AutoResume = s.state, s.pausing, s.resumes
		b.info.FilesOnly = s.filesOnly
		if s.private {
			b.tokens.Traffic = trafficA
		}
	})
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	statuses := s.userPort
	if envd {
		port, statuses = "49983", s.envdPort
		m.change(idA, func(b *box) { b.addr = addr })
	}
	want, ok := statuses[shown]
	if !ok {
		want = statuses["nothing"]
	}
	head := "Host: " + port + "-" + idA + ".x\r\n"
	if !byName {
		head = "Host: localhost\r\nE2b-Sandbox-Id: " + idA + "\r\nE2b-Sandbox-Port: " + port + "\r\n"
	}
	status, text := e.ask(t, "GET /health HTTP/1.1\r\n"+head+header+"\r\n")
	if status != want || want == http.StatusBadGateway && !strings.Contains(text, guestapi.SandboxNotFound) {
		t.Errorf("%s, envd %v, by name %v: HTTP %d %s, want %d", shown, envd, byName, status, text, want)
	}
	wakes, leases := m.calls(idA)
	stranger := envd && shown != "owner"
	m.change(idA, func(b *box) {
		if glanced := want == http.StatusOK && stranger; (b.glances > 0) != glanced {
			t.Errorf("%s, envd %v: %d glances", shown, envd, b.glances)
		}
	})
	woken := want == http.StatusOK && (s.state != sandbox.Running || s.pausing)
	if (leases > 0) != (want == http.StatusOK && !stranger) || (wakes > 0) != woken {
		t.Errorf("%s, envd %v: woken %d times, %d leases", shown, envd, wakes, leases)
	}
}

// The words of refusals are those that E2B's clients know.
func TestWordsOfRefusals(t *testing.T) {
	m := newManager(t.Context())
	m.change(idA, func(b *box) { b.tokens.Traffic = trafficA; b.info.State, b.info.AutoResume = sandbox.Hibernated, true })
	g := refusing(t, m)
	for words, w := range map[string]struct {
		port   uint16
		header string
	}{
		"Token header 'e2b-traffic-access-token' is missing":             {80, "X: x"},
		"Token header 'e2b-traffic-access-token' is invalid":             {80, "E2b-Traffic-Access-Token: x"},
		"This sandbox can't be resumed with the credentials provided":    {49983, "X-Access-Token: x"},
		"This sandbox can't be resumed with the credentials provided. C": {49983, "X: x"},
	} {
		got := ask(g, "GET", fmt.Sprintf("%d-%s.x", w.port, idA), "/", w.header)
		wantRefusal(t, words, got, http.StatusForbidden, w.port, words)
	}
}

// Many requests that come for one paused sandbox wait for the one resume, a WebSocket's
// and a tunnel's too, and are served after it.
func TestRequestsWaitForTheResume(t *testing.T) {
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			fmt.Fprint(w, "guest")
			return
		}
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.WriteHeader(http.StatusSwitchingProtocols)
	})
	m := newManager(t.Context())
	const clients = 9
	var waiting atomic.Int64
	awake := make(chan struct{})
	m.change(idA, func(b *box) {
		b.info.State, b.info.AutoResume = sandbox.Hibernated, true
		b.wake = func(context.Context) error {
			if waiting.Add(1) == clients {
				close(awake)
			}
			<-awake
			return nil
		}
	})
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	var all sync.WaitGroup
	for i := range clients {
		text, want := "GET / HTTP/1.1\r\nHost: "+port+"-"+idA+".x\r\n\r\n", http.StatusOK
		switch i % 3 {
		case 1:
			text = "GET / HTTP/1.1\r\nHost: " + port + "-" + idA + ".x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
			want = http.StatusSwitchingProtocols
		case 2:
			text = "CONNECT " + port + "-" + idA + ".x:80 HTTP/1.1\r\n\r\n"
		}
		c := e.dial(t)
		all.Go(func() {
			if _, err := io.WriteString(c, text); err != nil {
				t.Error(err)
				return
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: strings.Fields(text)[0]})
			if err != nil || resp.StatusCode != want {
				t.Errorf("%q: %v, %v", text, resp, err)
			}
		})
	}
	all.Wait()
	e.quiet(t)
}

// A sandbox that is paused between the look at it and the lease is woken; one that is
// paused again and again is not for ever.
func TestPausedOnTheWay(t *testing.T) {
	for again, want := range map[int]int{1: http.StatusOK, 2: http.StatusOK, 1000: http.StatusBadGateway} {
		port := guest(t, func(http.ResponseWriter, *http.Request) {})
		m := newManager(t.Context())
		e := serve(t, func(c *Config) { c.Sandboxes = &flipping{manager: m, left: again} })
		m.change(idA, func(b *box) { b.info.AutoResume = true })
		if status, text := e.ask(t, "GET / HTTP/1.1\r\nHost: "+port+"-"+idA+".x\r\n\r\n"); status != want {
			t.Errorf("%d times: HTTP %d %s", again, status, text)
		}
	}
}

// flipping is a manager whose sandboxes are paused just before they are leased.
type flipping struct {
	*manager
	left int
}

func (f *flipping) Lease(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error) {
	if f.left--; f.left >= 0 {
		f.change(id, func(b *box) { b.info.State = sandbox.Hibernated })
	}
	return f.manager.Lease(ctx, id)
}

// The Host of users' servers can be masked; envd's is what the client sent.
func TestMaskHost(t *testing.T) {
	var got atomic.Value
	port := guest(t, func(_ http.ResponseWriter, r *http.Request) {
		got.Store(r.Host + " " + r.Header.Get("X-Forwarded-Host"))
	})
	for mask, want := range map[string]string{
		"": "", "localhost:${PORT}": "localhost:" + port, "${PORT}.${PORT}": port + "." + port, "app": "app",
	} {
		m := newManager(t.Context())
		m.change(idA, func(b *box) { b.info.Ingress.MaskHost = mask })
		e := serve(t, func(c *Config) { c.Sandboxes = m })
		host := port + "-" + idA + ".x"
		if want == "" {
			want = host
		}
		status, text := e.ask(t, "GET / HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		if status != http.StatusOK || got.Load() != want+" "+host {
			t.Errorf("%q: HTTP %d %s, the guest saw %q", mask, status, text, got.Load())
		}
	}
	p := passing{visit: &visit{place: &place{port: guestapi.Port}, info: sandbox.Info{Ingress: sandbox.Ingress{MaskHost: "masked"}}}}
	if host := p.hostFor("sent"); host != "sent" {
		t.Errorf("envd sees %q", host)
	}
}

// A URL that is signed and names no sandbox is for the one with whose token it was
// signed, from any page; it is for none otherwise.
func TestSignedURLFindsItsSandbox(t *testing.T) {
	m := newManager(t.Context())
	m.change(idB, func(b *box) { b.tokens.Envd = "token of b" })
	g := refusing(t, m)
	sign := func(method, host, query, op, user, expiration, token string, headers ...string) *http.Request {
		file := guestapi.SignedFile{Path: "/home/user/a b+ü", Operation: op, User: user, Expiration: expiration}
		text := "http://x/files?path=%2Fhome%2Fuser%2Fa+b%2B%C3%BC&" + query
		text += "&signature=" + url.QueryEscape(file.Signer()(strings.TrimPrefix(token, noToken)))
		r, err := http.NewRequestWithContext(t.Context(), method, text, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		return r
	}
	const site, asked = "Sec-Fetch-Site", "Access-Control-Request-Method"
	for name, c := range map[string]struct {
		r    *http.Request
		id   sandbox.ID // whose guest is asked
		want int        // if none is
	}{
		"read":         {sign("GET", ourHost, "username=user", "read", "user", "", tokenA), idA, 0},
		"head":         {sign("HEAD", ourHost, "", "read", "", "", tokenA), idA, 0},
		"write":        {sign("POST", ourHost, "username=user", "write", "user", "", "token of b"), idB, 0},
		"expires":      {sign("GET", ourHost, "signature_expiration=99", "read", "", "99", tokenA), idA, 0},
		"asks first":   {sign("OPTIONS", ourHost, "", "write", "", "", tokenA, asked, "POST", "Origin", "http://a.x"), idA, 0},
		"of a page":    {sign("GET", ourHost, "", "read", "", "", tokenA, "Origin", "http://a.x", site, "cross-site"), idA, 0},
		"rebound":      {sign("GET", otherHost, "", "read", "", "", tokenA), "", 403},
		"other op":     {sign("POST", ourHost, "", "read", "", "", tokenA), "", 502},
		"other user":   {sign("GET", ourHost, "username=root", "read", "user", "", tokenA), "", 502},
		"later":        {sign("GET", ourHost, "signature_expiration=100", "read", "", "99", tokenA), "", 502},
		"unknown":      {sign("GET", ourHost, "", "read", "", "", "token of c"), "", 502},
		"named":        {sign("GET", ourHost, "", "read", "", "", tokenA, "E2b-Sandbox-Id", "sb000000000000000c"), "", 502},
		"not a port's": {sign("GET", ourHost, "", "read", "", "", tokenA, "E2b-Sandbox-Port", "80"), "", 400},
	} {
		before := map[sandbox.ID]int{}
		for id := range m.boxes {
			_, before[id] = m.calls(id)
		}
		w := httptest.NewRecorder()
		g.ServeHTTP(w, c.r)
		for id := range m.boxes {
			if _, n := m.calls(id); (n > before[id]) != (id == c.id) {
				t.Errorf("%s: %d leases of %s", name, n-before[id], id)
			}
		}
		if c.id == "" && w.Code != c.want {
			t.Errorf("%s: HTTP %d %s", name, w.Code, w.Body)
		}
	}
	wantNotFound(t, "unknown", func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		g.ServeHTTP(w, sign("GET", ourHost, "", "read", "", "", "x"))
		return w
	}(), "")
	// A sandbox with no token signs nothing; a signature wakes nothing.
	m.change(idA, func(b *box) { b.tokens.Envd = "" })
	w := httptest.NewRecorder()
	g.ServeHTTP(w, sign("GET", ourHost, "", "read", "", "", noToken))
	wantNotFound(t, "no token", w, "")
	m.change(idA, func(b *box) { b.tokens.Envd, b.info.State, b.info.AutoResume = tokenA, sandbox.Hibernated, true })
	w = httptest.NewRecorder()
	g.ServeHTTP(w, sign("GET", ourHost, "", "read", "", "", tokenA))
	wantRefusal(t, "paused", w, http.StatusForbidden, guestapi.Port, "can't be resumed")
	m.change(idA, func(b *box) { b.info.AutoResume = false })
	w = httptest.NewRecorder()
	g.ServeHTTP(w, sign("GET", ourHost, "", "read", "", "", tokenA))
	wantNotFound(t, "paused", w, "sb000000000000000a")
}

// Searches wait for one another, and not longer than their caller.
func TestSearchesAreBounded(t *testing.T) {
	g := refusing(t, newManager(t.Context()))
	for range maxSearches {
		g.searching <- struct{}{}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errdefs.Busy)
	if id, ok := g.search(ctx, &signed{}); ok {
		t.Errorf("found %s", id)
	}
}
