package gateway

import (
	"fmt"
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
