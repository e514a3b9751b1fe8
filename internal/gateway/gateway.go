// Package gateway is the data plane: one reverse proxy from the agent's
// listener to the ports of its guests.
package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"regexp"
	"slices"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const (
	headerID   = "E2b-Sandbox-Id"
	headerPort = "E2b-Sandbox-Port"
	// headerToken is what envd demands of its callers.
	headerToken = "X-Access-Token"
	envdPort    = 49983
)

// reserved are envd's endpoints for the host agent alone.
var reserved = []string{"/init", "/quiesce", "/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"}

// hostPattern is <port>-<sandbox id>.<anything>.
var hostPattern = regexp.MustCompile(`^([0-9]{1,5})-(sb-[0-9a-f]+)\.`)

// Gateway sends requests that name a sandbox to that sandbox's guest, and all
// others to Next. Such a request is activity in the sandbox until it ends.
type Gateway struct {
	manager *sandbox.Manager
	next    http.Handler
	log     *slog.Logger
}

// New returns a gateway in front of next.
func New(manager *sandbox.Manager, next http.Handler, log *slog.Logger) *Gateway {
	return &Gateway{manager: manager, next: next, log: log}
}

// target returns the sandbox and port that a request names; ok is false where
// it names none.
func target(r *http.Request) (id, port string, ok bool) {
	if id := r.Header.Get(headerID); id != "" {
		port := r.Header.Get(headerPort)
		if port == "" {
			port = strconv.Itoa(envdPort)
		}
		return id, port, true
	}
	if m := hostPattern.FindStringSubmatch(r.Host); m != nil {
		return m[2], m[1], true
	}
	return "", "", false
}

func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rawID, rawPort, ok := target(r)
	if !ok {
		g.next.ServeHTTP(w, r)
		return
	}
	port, err := strconv.ParseUint(rawPort, 10, 16)
	if err != nil || port == 0 {
		refuse(w, rawID, http.StatusBadRequest, fmt.Sprintf("port %.10q is not a number from 1 to 65535", rawPort))
		return
	}
	if port == envdPort && slices.Contains(reserved, r.URL.Path) {
		refuse(w, rawID, http.StatusNotFound, r.URL.Path+" is reserved for the host agent")
		return
	}
	id, err := sandbox.ParseID(rawID)
	if err != nil {
		refuse(w, rawID, http.StatusNotFound, err.Error())
		return
	}
	lease, err := g.manager.Lease(r.Context(), id)
	if err != nil {
		refuse(w, rawID, status(err), err.Error())
		return
	}
	defer lease.Release()
	ctx, cancel := lease.Context(r.Context())
	defer cancel()

	addr := net.JoinHostPort(lease.Addr.String(), strconv.FormatUint(port, 10))
	proxy := httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", addr
			p.Out.Host = p.In.Host
			p.Out.Header.Del(headerID)
			p.Out.Header.Del(headerPort)
			p.SetXForwarded()
			// Whoever may use this listener may use the sandbox; a caller
			// that brings a token means it to be checked.
			if port == envdPort && p.Out.Header.Get(headerToken) == "" {
				p.Out.Header.Set(headerToken, lease.Token)
			}
		},
		Transport:     transport,
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			code, message := http.StatusBadGateway, fmt.Sprintf("nothing answers on port %d of sandbox %s", port, id)
			if lease.Alive.Err() != nil {
				code, message = http.StatusServiceUnavailable, fmt.Sprintf("sandbox %s ended meanwhile", id)
			}
			g.log.Debug("data plane request failed", "sandbox", id, "port", port, "err", err)
			refuse(w, rawID, code, message)
		},
	}
	proxy.ServeHTTP(w, r.WithContext(ctx))
}

// transport keeps no connection for a later request: the same address may then
// belong to another sandbox.
var transport = &http.Transport{
	DisableKeepAlives:  true,
	DisableCompression: true,
}

// status is the HTTP status of an error of the manager.
func status(err error) int {
	switch {
	case errors.Is(err, errdefs.NotFound):
		return http.StatusNotFound
	case errors.Is(err, errdefs.WrongState):
		return http.StatusConflict
	default:
		return http.StatusServiceUnavailable
	}
}

// refuse answers in the form that E2B's clients read.
func refuse(w http.ResponseWriter, id string, code int, message string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]any{"code": code, "message": message, "sandboxId": id})
}
