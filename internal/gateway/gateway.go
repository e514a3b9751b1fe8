// Package gateway is the data plane: one reverse proxy from the agent's
// listener to the ports of its guests.
package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const (
	headerID   = "E2b-Sandbox-Id"
	headerPort = "E2b-Sandbox-Port"
	// headerToken is what envd demands of its callers.
	headerToken = "X-Access-Token"
	envdPort    = 49983

	// maxPerSandbox bounds the requests under way to one sandbox.
	maxPerSandbox = 1024
)

// reserved are envd's endpoints for the host agent alone.
var reserved = []string{"/init", "/quiesce", "/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"}

// hostPattern is <port>-<sandbox id>.<anything>.
var hostPattern = regexp.MustCompile(`^([0-9]{1,5})-(sb-[0-9a-f]+)\.`)

// Gateway sends requests that name a sandbox to that sandbox's guest, and all
// others to Next. Such a request is activity in the sandbox until it ends.
//
// Bodies are streamed, both ways at once, and have no limit here: what they
// fill is the guest's. The server in front limits headers.
type Gateway struct {
	manager *sandbox.Manager
	next    http.Handler
	log     *slog.Logger
	links   links

	mu    sync.Mutex
	count map[sandbox.ID]int
}

// New returns a gateway in front of next.
func New(manager *sandbox.Manager, next http.Handler, log *slog.Logger) *Gateway {
	return &Gateway{manager: manager, next: next, log: log, count: make(map[sandbox.ID]int)}
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

// isReserved reports whether envd might take the path, however it is spelled,
// for one of the host's endpoints.
func isReserved(p string) bool {
	return slices.Contains(reserved, path.Clean("/"+p))
}

func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rawID, rawPort, ok := target(r)
	if !ok {
		g.next.ServeHTTP(w, r)
		return
	}
	number, err := strconv.ParseUint(rawPort, 10, 16)
	port := uint16(number)
	if err != nil || port == 0 {
		refuse(w, refusal{http.StatusBadRequest, fmt.Sprintf("port %.10q is not a number from 1 to 65535", rawPort), rawID, 0})
		return
	}
	if port == envdPort && (r.Method == http.MethodConnect || isReserved(r.URL.Path)) {
		refuse(w, refusal{http.StatusNotFound, "this endpoint is reserved for the host agent", rawID, port})
		return
	}
	id, err := sandbox.ParseID(rawID)
	if err != nil {
		refuse(w, refusal{absent(r, port, http.StatusNotFound), err.Error(), rawID, port})
		return
	}
	if !g.enter(id) {
		w.Header().Set("Retry-After", "1")
		refuse(w, refusal{http.StatusTooManyRequests, fmt.Sprintf("sandbox %s has %d requests under way, which is the most", id, maxPerSandbox), rawID, port})
		return
	}
	defer g.leave(id)
	lease, err := g.manager.Lease(r.Context(), id)
	if err != nil {
		refuse(w, refusal{absent(r, port, status(err)), err.Error(), rawID, port})
		return
	}
	defer lease.Release()
	caller := r.Context()
	ctx, cancel := lease.Context(caller)
	defer cancel()
	r = r.WithContext(ctx)

	link := g.links.of(lease)
	addr := netip.AddrPortFrom(lease.Addr, port).String()
	fail := func(w http.ResponseWriter, err error) {
		g.log.Debug("data plane request failed", "sandbox", id, "port", port, "err", err)
		var why string
		if port == envdPort || lease.Alive.Err() != nil {
			why = ended(caller, lease)
		}
		switch {
		case why != "":
			refuse(w, refusal{http.StatusServiceUnavailable, why, rawID, port})
		case errors.Is(err, errNotOpen):
			// These words are E2B's; its clients look for them.
			refuse(w, refusal{http.StatusBadGateway, "The sandbox is running but port is not open", rawID, port})
		default:
			refuse(w, refusal{http.StatusBadGateway, fmt.Sprintf("port %d of sandbox %s gave no answer that can be passed on", port, id), rawID, port})
		}
	}
	if r.Method == http.MethodConnect {
		g.tunnel(w, r, link, addr, fail)
		return
	}
	if r.ProtoMajor == 1 {
		// A guest may answer before it has read all.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	proxy := httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", addr
			p.Out.Host = p.In.Host
			p.Out.Header.Del(headerID)
			p.Out.Header.Del(headerPort)
			p.SetXForwarded()
			// Whoever may use this listener may use the sandbox; a caller
			// that brings a token or a signature means it to be checked.
			if port == envdPort && p.Out.Header.Get(headerToken) == "" && !p.In.URL.Query().Has("signature") {
				p.Out.Header.Set(headerToken, lease.Token)
			}
		},
		Transport: link.transport(r, port == envdPort),
		ModifyResponse: func(resp *http.Response) error {
			endWell(resp, func() string { return ended(caller, lease) })
			return nil
		},
		BufferPool:   buffers,
		ErrorLog:     slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { fail(w, err) },
	}
	proxy.ServeHTTP(w, r)
}

// ended says why the sandbox of a lease ended, or nothing if it did not.
func ended(ctx context.Context, lease *sandbox.Lease) string {
	if err := lease.Ended(ctx); err != nil {
		return err.Error()
	}
	return ""
}

// enter counts a request to a sandbox, unless there are too many; leave takes
// it back.
func (g *Gateway) enter(id sandbox.ID) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.count[id] >= maxPerSandbox {
		return false
	}
	g.count[id]++
	return true
}

func (g *Gateway) leave(id sandbox.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.count[id]--; g.count[id] == 0 {
		delete(g.count, id)
	}
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

// absent is the status for a sandbox that cannot be asked. Of envd's health
// it is always that of a gateway with nothing behind it, which is how E2B's
// clients learn that a sandbox does not run.
func absent(r *http.Request, port uint16, status int) int {
	if port == envdPort && r.URL.Path == "/health" {
		return http.StatusBadGateway
	}
	return status
}

// refusal is an answer of the gateway's own, in the form that E2B's clients
// read.
type refusal struct {
	Code      int    `json:"code"`
	Message   string `json:"message"`
	SandboxID string `json:"sandboxId"`
	Port      uint16 `json:"port,omitempty"`
}

func refuse(w http.ResponseWriter, r refusal) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(r.Code)
	_ = json.NewEncoder(w).Encode(r)
}

// pool lends the memory that bodies are copied through.
type pool struct{ sync.Pool }

const copySize = 32 << 10

var buffers = &pool{sync.Pool{New: func() any { return new([copySize]byte) }}}

func (p *pool) Get() []byte  { return p.Pool.Get().(*[copySize]byte)[:] }
func (p *pool) Put(b []byte) { p.Pool.Put((*[copySize]byte)(b)) }

// isGRPC reports whether a request needs HTTP/2 all the way.
func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && (strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") || r.Header.Get("Te") == "trailers")
}
