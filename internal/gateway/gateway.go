// Package gateway is the agent's HTTP server. It checks which requests may reach
// the control plane, and is the data plane: a reverse proxy to the ports of the
// guests.
package gateway

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const (
	// maxPerSandbox bounds the requests of each kind under way to one sandbox,
	// maxControl those of each kind to the agent itself.
	maxPerSandbox = 1024
	maxControl    = 4096
)

// kind is a kind of request. Each is counted apart, so that none locks others out.
type kind int

const (
	toAgent kind = iota
	toREST
	// ofOwner are requests to envd with its token or a signature, ofOthers all others to
	// it: health, questions of browsers, and what envd refuses.
	ofOwner
	ofOthers
	// toPort are requests to the ports of users' servers, for which the gateway asks
	// for nothing.
	toPort
)

func (k kind) most() int {
	if k == toAgent || k == toREST {
		return maxControl
	}
	return maxPerSandbox
}

// load is what the gateway counts: requests of one kind to one sandbox.
type load struct {
	id   sandbox.ID
	kind kind
}

// Sandboxes is what the gateway asks of a sandbox.Manager.
type Sandboxes interface {
	Get(id sandbox.ID) (sandbox.Info, error)
	Tokens(id sandbox.ID) (sandbox.Tokens, error)
	WithTokens(fits func(sandbox.Tokens) bool) (sandbox.ID, bool)
	Lease(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error)
	Glance(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error)
	Wake(ctx context.Context, id sandbox.ID) error
}

// Config says what a Gateway is in front of.
type Config struct {
	Sandboxes Sandboxes
	// Control answers requests for the paths of the agent's own API.
	Control http.Handler
	// REST answers requests for all other paths; Control does so if it is nil.
	REST http.Handler
	// Names are host names and addresses of this agent beside localhost and
	// those that connections come to.
	Names []string
	// TLS is spoken on TCP, unless it is nil.
	TLS *tls.Config
	// MaxConns bounds the connections of clients on TCP, MaxConnsEach those of one.
	MaxConns, MaxConnsEach int
	// Panics counts what handlers panicked with.
	Panics *atomic.Int64
	Log    *slog.Logger
}

// Gateway sends requests that name a sandbox to that sandbox's guest, and all
// others to the control plane or the REST API, if they come from where they may. A
// request to a sandbox is activity in it until the request ends, except one to envd that
// shows no secret of the sandbox.
//
// Bodies are streamed, both ways at once. The gateway does not limit their size,
// because the guest keeps what it receives. A client that stops in the middle of
// a request's body is cut off; one that reads an answer slowly is not.
type Gateway struct {
	sandboxes Sandboxes
	control   http.Handler
	rest      http.Handler // nil without a REST API
	door      door
	panics    *atomic.Int64
	log       *slog.Logger
	server    *http.Server
	tcp       *bounds
	local     *bounds // of the Unix socket
	secure    bool    // TCP speaks TLS; the server's TLSConfig is never nil once it serves
	links     links
	errors    *connect.ErrorWriter
	// searching has an element for each search by signature that is under way.
	searching chan struct{}

	mu    sync.Mutex
	count map[load]int
}

// New returns a gateway that does not serve yet.
func New(c Config) *Gateway {
	g := &Gateway{
		sandboxes: c.Sandboxes, control: c.Control, rest: c.REST, panics: c.Panics, log: c.Log,
		tcp: newBounds(c.MaxConns, c.MaxConnsEach), local: newBounds(maxLocal, maxLocal), secure: c.TLS != nil,
		errors:    connect.NewErrorWriter(),
		searching: make(chan struct{}, maxSearches),
		count:     make(map[load]int),
	}
	for _, name := range c.Names {
		g.door.names = append(g.door.names, strings.ToLower(strings.TrimSuffix(name, ".")))
	}
	g.server = g.newServer(c.Log, c.TLS)
	return g
}

// Refused is how many connections were closed because there were too many.
func (g *Gateway) Refused() int64 { return g.tcp.refused.Load() + g.local.refused.Load() }

func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	place, err := g.door.placeOf(r)
	idle := controlIdle
	if place != nil {
		idle = idleFor(r)
	}
	var b *body
	if r.Body != nil && r.Body != http.NoBody {
		b = newBody(w, r, idle, g.panicked)
		r = r.WithContext(r.Context()) // the server's stays as it is
		r.Body = b
	}
	defer func() {
		what := recover()
		if b != nil {
			b.end(w, r, what == nil)
		}
		if what == nil {
			return
		}
		if what != http.ErrAbortHandler {
			g.panicked(what)
		}
		panic(http.ErrAbortHandler)
	}()
	switch {
	case !isPlain(r.URL):
		refuse(w, r, refusal{Code: http.StatusBadRequest, Message: "the request's target is neither a path nor an http URL"})
	case place == nil:
		g.serveAgent(w, r)
	case err != nil:
		refuse(w, r, place.refusal(err))
	default:
		g.serveData(w, r, place, b)
	}
}

// isPlain reports whether a request's target has one meaning. One without a path, such
// as "a:http://x/init", would be passed on as "http://x/init".
func isPlain(u *url.URL) bool {
	return u.Opaque == "" && (u.Scheme == "" || u.Scheme == "http" || u.Scheme == "https")
}

// panicked counts and logs a panic, which must not end the program.
func (g *Gateway) panicked(what any) {
	g.panics.Add(1)
	g.log.Error("panic in a request", "panic", what, "stack", string(debug.Stack()))
}

// serveAgent answers a request that names no sandbox.
func (g *Gateway) serveAgent(w http.ResponseWriter, r *http.Request) {
	handler, check, fail, all := g.control, g.door.checkControl, g.failControl, load{kind: toAgent}
	if g.rest != nil && !isControl(r.URL.Path) {
		handler, check, fail, all = g.rest, g.door.checkREST, failREST, load{kind: toREST}
	}
	err := check(r)
	if err == nil && !g.enter(all) {
		err = errdefs.Exhausted.Errorf("%d requests to this host agent are under way, which is the most", maxControl)
	}
	if err != nil {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		fail(w, r, err)
		return
	}
	defer g.leave(all)
	handler.ServeHTTP(w, r)
}

// isControl reports whether a path is one of the agent's own API.
func isControl(path string) bool {
	switch path {
	case "/healthz", "/readyz", "/metrics":
		return true
	}
	return strings.HasPrefix(path, "/hostagent.v1.")
}

// failControl answers in the form that clients of the agent's own API read.
func (g *Gateway) failControl(w http.ResponseWriter, r *http.Request, err error) {
	_ = g.errors.Write(w, r, connect.NewError(errhttp.OfClass(errdefs.ClassOf(err)).Code, err))
}

// failREST answers in the form that clients of the REST API read.
func failREST(w http.ResponseWriter, _ *http.Request, err error) {
	status := errhttp.OfClass(errdefs.ClassOf(err)).Status
	writeJSON(w, status, refusal{Code: status, Message: err.Error()})
}

// enter counts a request until leave; it returns false if there are too many.
func (g *Gateway) enter(l load) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.count[l] >= l.kind.most() {
		return false
	}
	g.count[l]++
	return true
}

func (g *Gateway) leave(l load) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.count[l]--; g.count[l] == 0 {
		delete(g.count, l)
	}
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
