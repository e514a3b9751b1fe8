package gateway

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// A request target is read once: what the guest gets of it is what was checked.
func TestTargetsThatAreReadTwice(t *testing.T) {
	var asked atomic.Value
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.RequestURI)
		fmt.Fprint(w, "guest")
	})
	e := serve(t, nil)
	for _, target := range []string{
		"a:http://x/init", "http:http://x/init", "a:b", "a:%2Finit", "a:?x", "a:/init", "ftp://x/init",
	} {
		asked.Store("")
		status, body := e.ask(t, "GET "+target+" HTTP/1.1\r\nHost: "+port+"-"+idA+".x\r\n\r\n")
		if status != http.StatusBadRequest || asked.Load() != "" {
			t.Errorf("%s: HTTP %d %s; the guest was asked for %q", target, status, strings.TrimSpace(body), asked.Load())
		}
	}
}

// A page that a link to a signed file shows is not the agent's own: a browser gives it no
// origin that the agent takes for its own, whatever the guest says.
func TestSignedFileIsNoPageOfTheAgent(t *testing.T) {
	m := newManager(t.Context())
	addr := envd(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Security-Policy"] = []string{"default-src *"}
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Set-Cookie", "a=b")
		w.Header().Set("Alt-Svc", `h2="evil.example:443"`)
		fmt.Fprint(w, "<script>fetch('/hostagent.v1.HostAgentService/CreateSandbox')</script>")
	})
	m.change(idA, func(b *box) { b.addr = addr })
	m.change(idB, func(b *box) { b.tokens.Envd = "token of b" })
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	signature := url.QueryEscape(guestapi.SignedFile{Path: "x.html", Operation: guestapi.SignRead}.Signer()(tokenA))
	for _, c := range []struct {
		url, id  string
		confined bool
	}{
		{"/files?path=x.html&signature=" + signature, "", true},
		{"/files?path=x.html&signature=" + signature, idA, false}, // no link has such a header
		{"/files?path=x.html", idA, false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+e.addr+c.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(guestapi.HeaderSandboxID, c.id)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		policies := resp.Header.Values("Content-Security-Policy")
		if resp.StatusCode != 200 || slices.Contains(policies, "sandbox") != c.confined ||
			(resp.Header.Get("Set-Cookie")+resp.Header.Get("Alt-Svc") == "") != c.confined {
			t.Errorf("%s, %q: HTTP %d, %v", c.url, c.id, resp.StatusCode, resp.Header)
		}
	}
}

// Two names in one request, wherever HTTP has room for one: the guest of one of them
// answers, the one that the request is for, or none does.
func TestTwoNames(t *testing.T) {
	var host atomic.Value
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		host.Store(r.Host)
		fmt.Fprint(w, "guest")
	})
	m := newManager(t.Context())
	m.change(idB, func(b *box) { b.tokens.Traffic = trafficA }) // so that its guest does not answer
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	a, b := port+"-"+idA+".x", port+"-"+idB+".x"
	at := "E2b-Sandbox-Port: " + port + "\r\n"
	for _, c := range []struct {
		text string
		want int
	}{
		{"GET http://" + a + "/ HTTP/1.1\r\nHost: " + b + "\r\n", 200}, // the target counts
		{"GET http://" + b + "/ HTTP/1.1\r\nHost: " + a + "\r\n", 403},
		{"GET http://" + b + "/ HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: " + idA + "\r\n" + at, 400},
		{"GET http://user@" + a + "/ HTTP/1.1\r\nHost: " + b + "\r\n", 200},
		{"GET http://" + b + "\\@" + a + "/ HTTP/1.1\r\nHost: " + a + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: " + a + "\r\nHost: " + b + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: " + a + "," + b + "\r\n", 200},
		{"GET / HTTP/1.1\r\nHost: " + a + "\r\nE2b-Sandbox-Id: " + idB + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: " + a + "\r\nE2b-Sandbox-Id: " + idA + "\r\ne2b-sandbox-id: sb000000000000000b\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: localhost\r\n" + at + "E2b-Sandbox-Id: " + idA + "\r\nE2B-SANDBOX-ID: " + idB + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: localhost\r\n" + at + "E2b-Sandbox-Id: " + idA + "," + idB + "\r\n", 502},
		{"GET / HTTP/1.1\r\nHost: localhost\r\n" + at + "E2b-Sandbox-Id:\t" + idA + " \r\n", 200}, // white space around a value is none of it
		{"GET / HTTP/1.1\r\nHost: localhost\r\n" + at + "E2b-Sandbox-Id : " + idA + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: " + a + "\r\nX-Forwarded-Host: " + b + "\r\nForwarded: host=" + b + "\r\n", 200},
		{"GET / HTTP/1.1\r\nHost: " + a + "\r\nConnection: E2b-Sandbox-Id\r\nE2b-Sandbox-Id: " + idB + "\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: %38%30-" + idA + ".x\r\n", 403},
		{"GET / HTTP/1.1\r\nHost: " + strings.Replace(a, "-", "%2d", 1) + "\r\n", 403},
		{"GET / HTTP/1.1\r\nHost: " + strings.Replace(a, "-sb", "-\uff53b", 1) + "\r\n", 400},
		{"CONNECT " + a + ":80 HTTP/1.1\r\nHost: " + b + "\r\n\r\nGET / HTTP/1.1\r\nHost: in-the-tunnel\r\n", 200},
		{"CONNECT " + b + ":80 HTTP/1.1\r\nHost: " + a + "\r\n", 403},
		{"CONNECT 49983-" + idA + ".x:" + port + " HTTP/1.1\r\nHost: " + a + "\r\n", 404},
		{"CONNECT / HTTP/1.1\r\nHost: 49983-" + idA + ".x\r\n", 404},
		{"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: " + idA + "\r\n", 404},
		{"connect / HTTP/1.1\r\nHost: " + a + "\r\n", 200}, // a method of the guest's own
	} {
		host.Store("")
		status, body := e.ask(t, c.text+"Connection: close\r\n\r\n")
		if status != c.want {
			t.Errorf("%q: HTTP %d %s, want %d", c.text, status, body, c.want)
		}
		if got := host.Load(); strings.HasPrefix(got.(string), b) {
			t.Errorf("%q: the guest was asked as %s", c.text, got)
		}
	}
	e.quiet(t)
}

// In HTTP/2, too, a request has one name: that of its authority.
func TestTwoNamesOverHTTP2(t *testing.T) {
	var asked atomic.Value
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Host + fmt.Sprint(r.Header["Host"]))
		fmt.Fprint(w, "guest")
	})
	m := newManager(t.Context())
	m.change(idB, func(b *box) { b.tokens.Traffic = trafficA })
	e := serve(t, func(c *Config) { c.Sandboxes = m })
	a, b := port+"-"+idA+".x", port+"-"+idB+".x"
	for _, c := range []struct {
		headers []string
		want    string // in the answer; "" for a stream or connection that is refused
		host    string
	}{
		{[]string{":authority", a}, "guest", a + "[]"},
		{[]string{":authority", a, "host", b}, "guest", a + "[]"},
		{[]string{":authority", b, "host", a}, `"code":403`, ""},
		{[]string{"host", a}, "guest", a + "[]"},
		{[]string{":authority", a, ":authority", b}, "", ""},
		{[]string{":authority", a, "e2b-sandbox-id", idB}, `"code":400`, ""},
		{[]string{":authority", a, "E2b-Sandbox-Id", idB}, "", ""}, // not in lower case
		{[]string{":authority", a, ":path", "a:http://x/init"}, `"code":400`, ""},
		{[]string{":authority", "49983-" + idA + ".x", ":method", "CONNECT"}, `"code":404`, ""},
	} {
		asked.Store("")
		body := overHTTP2(t, e, c.headers)
		if (body == "") != (c.want == "") || !strings.Contains(body, c.want) || asked.Load() != c.host {
			t.Errorf("%q: %s, the guest was asked as %q; want %s, %q", c.headers, body, asked.Load(), c.want, c.host)
		}
	}
	e.quiet(t)
}

// overHTTP2 sends one request with these headers, names and values in turn, and returns
// the body of the answer; empty if there is none. It writes HTTP/2 by itself, for a
// client library would refuse some of it.
func overHTTP2(t *testing.T, e *edge, headers []string) string {
	t.Helper()
	const data, headersFrame, reset, settings, goAway = 0, 1, 3, 4, 7
	frame := func(kind, flags byte, stream uint32, payload string) string {
		head := []byte{0, 0, 0, kind, flags, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(head[1:], uint16(len(payload)))
		binary.BigEndian.PutUint32(head[5:], stream)
		return string(head) + payload
	}
	if !slices.Contains(headers, ":method") {
		headers = append([]string{":method", "GET", ":scheme", "http"}, headers...)
		if !slices.Contains(headers, ":path") {
			headers = append([]string{":path", "/"}, headers...)
		}
	}
	var block strings.Builder
	for _, field := range pairs(headers) { // each a literal that is not to be remembered
		block.WriteString("\x00")
		for _, text := range field {
			block.WriteString(string([]byte{byte(len(text))}) + text)
		}
	}
	c := e.dial(t)
	defer c.Close()
	const endStream, endHeaders = 1, 4
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+frame(settings, 0, 0, "")+
		frame(headersFrame, endStream|endHeaders, 1, block.String())); err != nil {
		t.Fatal(err)
	}
	var body strings.Builder
	for {
		var head [9]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return body.String()
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(c, payload); err != nil {
			return body.String()
		}
		switch kind, ended := head[3], head[4]&endStream != 0; {
		case kind == reset, kind == goAway:
			return body.String()
		case kind == data:
			body.Write(payload)
			if ended {
				return body.String()
			}
		}
	}
}

// pairs are the names and values of headers.
func pairs(headers []string) (all [][2]string) {
	for i := 0; i < len(headers); i += 2 {
		all = append(all, [2]string{headers[i], headers[i+1]})
	}
	return all
}
