// Package gateway is the agent's HTTP server. It checks which requests may reach
// the control plane, and is the data plane: a reverse proxy to the ports of the
// guests.
package gateway

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const (
	// maxPerSandbox bounds the requests of each kind under way to one sandbox,
	// maxControl those to the agent itself.
	maxPerSandbox = 1024
	maxControl    = 4096
)

// kind is a kind of request. Each is counted apart, so that none locks others out.
type kind int

const (
	toAgent kind = iota
	// ofOwner are requests to envd with its token, ofOthers all others to it:
	// health, questions of browsers, files by signature, and what envd refuses.
	ofOwner
	ofOthers
	// toPort are requests to the ports of users' servers, for which the gateway asks
	// for nothing.
	toPort
)

func (k kind) most() int {
	if k == toAgent {
		return maxControl
	}
	return maxPerSandbox
}

// load is what the gateway counts: requests of one kind to one sandbox.
type load struct {
	id   sandbox.ID
	kind kind
}

// reserved are envd's endpoints for the host agent alone.
var reserved = guestapi.HostOnly()

// hostPattern is <port>-<sandbox id>.<anything>.
var hostPattern = regexp.MustCompile(`^([0-9]{1,5})-(sb-[0-9a-f]+)\.`)

// Sandboxes is what the gateway asks of a sandbox.Manager.
type Sandboxes interface {
	Lease(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error)
	AccessToken(id sandbox.ID) (string, error)
}

// Config says what a Gateway is in front of.
type Config struct {
	Sandboxes Sandboxes
	// Control answers requests that name no sandbox.
	Control http.Handler
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
// others to the control plane, if they come from where they may. A request to a
// sandbox is activity in it until the request ends.
//
// Bodies are streamed, both ways at once. The gateway does not limit their size,
// because the guest keeps what it receives. A client that stops in the middle of
// a request's body is cut off; one that reads an answer slowly is not.
type Gateway struct {
	sandboxes Sandboxes
	control   http.Handler
	door      door
	panics    *atomic.Int64
	log       *slog.Logger
	server    *http.Server
	tcp       *bounds
	local     *bounds // of the Unix socket
	secure    bool    // TCP speaks TLS; the server's TLSConfig is never nil once it serves
	links     links
	errors    *connect.ErrorWriter

	mu    sync.Mutex
	count map[load]int
}

// New returns a gateway that does not serve yet.
func New(c Config) *Gateway {
	g := &Gateway{
		sandboxes: c.Sandboxes, control: c.Control, panics: c.Panics, log: c.Log,
		tcp: newBounds(c.MaxConns, c.MaxConnsEach), local: newBounds(maxLocal, maxLocal), secure: c.TLS != nil,
		errors: connect.NewErrorWriter(),
		count:  make(map[load]int),
	}
	for _, name := range c.Names {
		g.door.names = append(g.door.names, strings.ToLower(strings.TrimSuffix(name, ".")))
	}
	g.server = g.newServer(c.Log, c.TLS)
	return g
}

// Refused is how many connections were closed because there were too many.
func (g *Gateway) Refused() int64 { return g.tcp.refused.Load() + g.local.refused.Load() }

// place is a port of a sandbox as a request names it.
type place struct {
	id, port string
	// byName says that the host name does so. Such a request goes to that sandbox,
	// from wherever it was sent.
	byName bool
}

// placeOf returns what a request names; nil if it names no sandbox. A request that
// names two is an errdefs.InvalidArgument.
func placeOf(r *http.Request) (*place, error) {
	ids, ports := r.Header.Values(guestapi.HeaderSandboxID), r.Header.Values(guestapi.HeaderSandboxPort)
	p := &place{}
	if m := hostPattern.FindStringSubmatch(r.Host); m != nil {
		p.id, p.port, p.byName = m[2], m[1], true
	} else if len(ids) == 0 || ids[0] == "" {
		return nil, nil
	} else {
		p.id, p.port = ids[0], strconv.Itoa(guestapi.Port)
		if len(ports) > 0 && ports[0] != "" {
			p.port = ports[0]
		}
	}
	for _, id := range ids {
		if id != p.id && id != "" {
			return p, errdefs.InvalidArgument.Errorf("the request names two sandboxes, %.40q and %.40q", p.id, id)
		}
	}
	for _, port := range ports {
		if port != p.port && port != "" {
			return p, errdefs.InvalidArgument.Errorf("the request names two ports, %.10q and %.10q", p.port, port)
		}
	}
	return p, nil
}

// isReserved reports whether envd might take the path, however it is spelled,
// for one of the host's endpoints.
func isReserved(p string) bool {
	return slices.Contains(reserved, path.Clean("/"+p))
}

func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	place, err := placeOf(r)
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
	case place == nil:
		g.serveControl(w, r)
	case err != nil:
		refuse(w, place.refusal(0, err))
	default:
		g.serveData(w, r, place, b)
	}
}

// panicked counts and logs a panic, which must not end the program.
func (g *Gateway) panicked(what any) {
	g.panics.Add(1)
	g.log.Error("panic in a request", "panic", what, "stack", string(debug.Stack()))
}

// serveControl answers a request that names no sandbox.
func (g *Gateway) serveControl(w http.ResponseWriter, r *http.Request) {
	err := g.door.check(r)
	if err == nil {
		err = g.door.checkType(r)
	}
	all := load{kind: toAgent}
	if err == nil && !g.enter(all) {
		err = errdefs.Exhausted.Errorf("%d requests to this host agent are under way, which is the most", maxControl)
	}
	if err != nil {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_ = g.errors.Write(w, r, connect.NewError(errhttp.OfClass(errdefs.ClassOf(err)).Code, err))
		return
	}
	defer g.leave(all)
	g.control.ServeHTTP(w, r)
}

// checkPort returns the port that a request names, or why the request may not go
// there.
func (g *Gateway) checkPort(r *http.Request, place *place) (uint16, error) {
	number, err := strconv.ParseUint(place.port, 10, 16)
	port := uint16(number)
	if err != nil || port == 0 {
		return 0, errdefs.InvalidArgument.Errorf("port %.10q is not a number from 1 to 65535", place.port)
	}
	if !place.byName {
		if err := g.door.check(r); err != nil {
			return port, err
		}
	}
	if port == guestapi.Port && (r.Method == http.MethodConnect || isReserved(r.URL.Path)) {
		return port, errdefs.NotFound.Errorf("this endpoint is reserved for the host agent")
	}
	return port, nil
}

// serveData answers a request that names a sandbox.
func (g *Gateway) serveData(w http.ResponseWriter, r *http.Request, place *place, b *body) {
	port, err := g.checkPort(r, place)
	if err != nil {
		refuse(w, place.refusal(port, err))
		return
	}
	id, err := sandbox.ParseID(place.id)
	if err != nil {
		refuse(w, refusal{absent(r, port, http.StatusNotFound), err.Error(), place.id, port})
		return
	}
	this := load{id, g.kindOf(r, id, port)}
	if !g.enter(this) {
		w.Header().Set("Retry-After", "1")
		refuse(w, place.refusal(port, errdefs.Exhausted.Errorf(
			"sandbox %s has %d requests of this kind under way, which is the most", id, maxPerSandbox)))
		return
	}
	defer g.leave(this)
	lease, err := g.sandboxes.Lease(r.Context(), id)
	if err != nil {
		refuse(w, refusal{absent(r, port, status(err)), err.Error(), place.id, port})
		return
	}
	defer lease.Release()
	g.serveGuest(w, r, passing{g, r.Context(), lease, place.id, port, b})
}

// passing is a request on its way to a guest.
type passing struct {
	*Gateway
	caller context.Context
	lease  *sandbox.Lease
	id     string
	port   uint16
	body   *body // nil without one
}

// serveGuest lets the guest that a request is for answer it.
func (g *Gateway) serveGuest(w http.ResponseWriter, r *http.Request, p passing) {
	ctx, cancel := p.lease.Context(p.caller)
	defer cancel()
	r = r.WithContext(ctx)
	if p.body != nil {
		r = r.WithContext(context.WithValue(ctx, bodyKey{}, p.body))
		// It is not clear which bytes after an upgrade are the body's. A server may
		// always go on without the upgrade that it was asked for.
		r.Header = r.Header.Clone()
		r.Header.Del("Upgrade")
	}
	link, addr := g.links.of(p.lease), netip.AddrPortFrom(p.lease.Addr, p.port).String()
	if r.Method == http.MethodConnect {
		g.tunnel(w, r, link, addr, p.fail)
		return
	}
	g.forward(w, r, link.transport(r, p.port == guestapi.Port), addr, p.fail, p.ended)
}

// ended says why the sandbox ended; it is empty if the sandbox did not.
func (p passing) ended() string {
	if err := p.lease.Ended(p.caller); err != nil {
		return err.Error()
	}
	return ""
}

// fail answers a request that the guest did not answer.
func (p passing) fail(w http.ResponseWriter, err error) {
	p.log.Debug("data plane request failed", "sandbox", p.id, "port", p.port, "err", err)
	var why string
	if p.port == guestapi.Port || p.lease.Alive.Err() != nil {
		why = p.ended()
	}
	no := refusal{http.StatusBadGateway, "", p.id, p.port}
	switch {
	case p.body.hasStalled():
		no.Code, no.Message = http.StatusRequestTimeout, fmt.Sprintf("nothing more of the request came for %s", dataIdle)
	case why != "":
		no.Code, no.Message = errhttp.OfClass(errdefs.Unavailable).Status, why
	case errors.Is(err, errNotOpen):
		// These words are E2B's; its clients look for them.
		no.Message = "The sandbox is running but port is not open"
	default:
		no.Message = fmt.Sprintf("port %d of sandbox %s gave no answer that can be passed on", p.port, p.id)
	}
	refuse(w, no)
}

// kindOf returns the kind of a request. A request to a sandbox that does not exist
// has any kind.
func (g *Gateway) kindOf(r *http.Request, id sandbox.ID, port uint16) kind {
	if port != guestapi.Port {
		return toPort
	}
	token, err := g.sandboxes.AccessToken(id)
	if err == nil && token != "" && subtle.ConstantTimeCompare([]byte(token), []byte(r.Header.Get(guestapi.HeaderToken))) == 1 {
		return ofOwner
	}
	return ofOthers
}

// forward passes a request on to an address in the guest; ended says why the
// sandbox ended, if it did. The client sends the token that envd demands. The
// gateway adds none, because it does not know who sent the request.
func (g *Gateway) forward(w http.ResponseWriter, r *http.Request, transport http.RoundTripper, addr string,
	fail func(http.ResponseWriter, error), ended func() string) {
	proxy := httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", addr
			p.Out.Host = p.In.Host
			p.Out.Header.Del(guestapi.HeaderSandboxID)
			p.Out.Header.Del(guestapi.HeaderSandboxPort)
			p.SetXForwarded()
		},
		Transport: transport,
		ModifyResponse: func(resp *http.Response) error {
			endWell(resp, ended)
			return nil
		},
		BufferPool:   buffers,
		ErrorLog:     slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { fail(w, err) },
	}
	proxy.ServeHTTP(w, r)
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

// status is the HTTP status for a sandbox that cannot be asked: that of the error
// where its caller can act on it, otherwise that of a host that cannot serve now.
func status(err error) int {
	switch class := errdefs.ClassOf(err); class {
	case errdefs.NotFound, errdefs.WrongState:
		return errhttp.OfClass(class).Status
	default:
		return errhttp.OfClass(errdefs.Unavailable).Status
	}
}

// absent returns the status for a sandbox that cannot be asked. For envd's health
// it is 502, by which E2B's clients learn that a sandbox does not run.
func absent(r *http.Request, port uint16, status int) int {
	if port == guestapi.Port && r.URL.Path == guestapi.PathHealth {
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

// refusal returns the answer to a request for the place that has failed with a
// classed error.
func (p *place) refusal(port uint16, err error) refusal {
	return refusal{errhttp.OfClass(errdefs.ClassOf(err)).Status, err.Error(), p.id, port}
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
