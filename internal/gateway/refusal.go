package gateway

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Texts of refusals. They are E2B's; its clients look for some of them.
const (
	textNotOpen      = "The sandbox is running but port is not open"
	textTransition   = "The sandbox is still transitioning. Try again in a moment."
	textNoTraffic    = "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing"
	textWrongTraffic = "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is invalid"
	textNotToBeWoken = "This sandbox can't be resumed with the credentials provided. Check your access token and try again."
)

// refusal is an answer of the gateway's own, in the form that E2B's clients
// read.
type refusal struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	// SandboxID is as the caller wrote it; nil where the answer is about no sandbox.
	SandboxID *string `json:"sandboxId,omitempty"`
	Port      uint16  `json:"port,omitempty"`
	// Path is set where the answer is about a path of envd's.
	Path string `json:"path,omitempty"`
}

// refusal returns the answer to a request for the place that has failed with a
// classed error.
func (p *place) refusal(err error) refusal {
	return p.refuse(errhttp.OfClass(errdefs.ClassOf(err)).Status, err.Error())
}

// refuse returns an answer about the place.
func (p *place) refuse(status int, message string) refusal {
	return refusal{Code: status, Message: message, SandboxID: &p.written, Port: p.port}
}

// notFound is the answer about every sandbox that does not run, whether it ended, is
// paused or never was: a stranger does not learn which.
func (p *place) notFound() refusal {
	return refusal{Code: http.StatusBadGateway, Message: guestapi.SandboxNotFound, SandboxID: &p.written}
}

// unasked is the answer for a sandbox that could not be called or resumed.
func (g *Gateway) unasked(p *place, err error) refusal {
	switch class := errdefs.ClassOf(err); class {
	case errdefs.NotFound, errdefs.WrongState:
		return p.notFound()
	case errdefs.Busy:
		return p.refuse(http.StatusConflict, textTransition)
	case errdefs.Exhausted:
		return p.refusal(err)
	default:
		_, told := errhttp.Tell(g.log, "data plane", err)
		return p.refuse(http.StatusServiceUnavailable, told.Error())
	}
}

// turnAway answers a request that does not reach a guest. Every page may read the answer
// to one by host name; to one by headers, which the door judges, none may. A browser asks
// before it sends what a page wants, and shows no secret then: it may send that.
func (p *place) turnAway(w http.ResponseWriter, r *http.Request, no refusal) {
	h := w.Header()
	if p.byName {
		h.Set("Access-Control-Allow-Origin", "*")
	}
	if !p.byName || r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		refuse(w, r, no)
		return
	}
	h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers", r.Header.Get("Access-Control-Request-Headers"))
	h.Set("Access-Control-Max-Age", "0") // a guest that runs later answers itself
	w.WriteHeader(http.StatusNoContent)
}

// refuse answers with a refusal: a person who follows a link gets a page, all others
// JSON.
func refuse(w http.ResponseWriter, r *http.Request, no refusal) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !isNavigation(r) {
		writeJSON(w, no.Code, no)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	h.Add("Vary", "User-Agent, Sec-Fetch-Mode, Accept")
	w.WriteHeader(no.Code)
	about := ""
	if no.SandboxID != nil && *no.SandboxID != "" {
		about = "<p>Sandbox " + html.EscapeString(*no.SandboxID) + "</p>"
	}
	_, _ = fmt.Fprintf(w, page, no.Code, html.EscapeString(http.StatusText(no.Code)), html.EscapeString(no.Message), about)
}

const page = `<html lang="en"><head><meta charset="utf-8"><title>%[1]d %[2]s</title></head>
<body style="font-family: sans-serif; margin: 4em auto; max-width: 40em"><h1>%[1]d %[2]s</h1><p>%[3]s</p>%[4]s</body></html>`

// isNavigation reports whether a browser asked for a page to show: its user follows a
// link. What a page's program fetches is not that.
func isNavigation(r *http.Request) bool {
	if !strings.HasPrefix(r.UserAgent(), "Mozilla/") {
		return false
	}
	if mode := r.Header.Get("Sec-Fetch-Mode"); mode != "" {
		return mode == "navigate"
	}
	return strings.Contains(r.Header.Get("Accept"), "text/html")
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client may be gone
}
