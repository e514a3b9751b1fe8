// Package e2b serves the REST API by which E2B's clients make and command
// sandboxes, over the generated server of api/e2b.
package e2b

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// Config is what the API works with. Every field must be set except Domain and Builds.
type Config struct {
	Manager   Manager
	Templates Templates
	// Builds makes templates; without it, builds are refused.
	Builds  Builds
	Keys    *auth.Store
	Limiter *auth.Limiter
	// Requests remembers Idempotency-Keys.
	Requests *idempotency.Store
	// Domain is told to clients, which make the names of sandboxes' ports with it.
	Domain string
	// DefaultTemplate is the name of the host's template that "base" means if there
	// is no template of that name.
	DefaultTemplate string
	// LocalImages lets builds take images of registries on the host itself: where all
	// callers are on the host, too.
	LocalImages bool
	// DiskMiB is the size of a new sandbox's disk.
	DiskMiB int
	// MaxTimeout is the longest life that a call may ask for.
	MaxTimeout time.Duration
	Log        *slog.Logger
}

// server implements the generated interface.
type server struct {
	Config
	uploads *uploads
	// aws asks AWS for passwords of registries.
	aws *http.Client
	// makingMu is held from the count of a project's builds until there is one more.
	makingMu sync.Mutex
}

// maxBody bounds a request's body.
const maxBody = 1 << 20

// New returns the handler of the API. Everything but GET /health and uploads demands a
// key.
func New(cfg Config) http.Handler {
	s := &server{Config: cfg, aws: &http.Client{Transport: &http.Transport{}, CheckRedirect: noRedirect}}
	s.uploads = newUploads(s.Keys.Revoked, s.putArchive, s.fail)
	strict := api.NewStrictHandlerWithOptions(s, []api.StrictMiddlewareFunc{withActor}, api.StrictHTTPServerOptions{
		RequestErrorHandlerFunc:  s.badRequest,
		ResponseErrorHandlerFunc: s.fail,
	})
	router := newRouter(s.fail)
	api.HandlerWithOptions(strict, api.StdHTTPServerOptions{BaseRouter: router, ErrorHandlerFunc: s.badRequest})
	return withCORS(s.uploads.before(s.withCaller(s.withBody(router))))
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// badRequest answers a request that could not be decoded.
func (s *server) badRequest(w http.ResponseWriter, r *http.Request, err error) {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		err = refuse(http.StatusRequestEntityTooLarge, "the body has more than %d bytes", tooLarge.Limit)
	} else {
		err = refuse(http.StatusBadRequest, "%s", err)
	}
	s.fail(w, r, err)
}

// withCaller lets through requests with a valid key that are not too many.
func (s *server) withCaller(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.URL.Path == "/health" {
			next.ServeHTTP(w, r)
			return
		}
		caller, err := s.Keys.Lookup(auth.KeyOf(r.Header))
		if err != nil {
			s.fail(w, r, err)
			return
		}
		d := s.Limiter.Take(caller.KeyID, startsVM(r), time.Now())
		d.Tell(w.Header())
		if !d.Allowed {
			s.fail(w, r, refuse(http.StatusTooManyRequests, "this key calls too often"))
			return
		}
		next.ServeHTTP(w, r.WithContext(auth.WithCaller(r.Context(), caller)))
	})
}

// withActor says in the context of an operation who calls it.
func withActor(next api.StrictHandlerFunc, operation string) api.StrictHandlerFunc {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, req any) (any, error) {
		c := caller(ctx)
		ctx = sandbox.WithActor(ctx, sandbox.Actor{KeyID: c.KeyID, Project: c.Project.Name, Address: r.RemoteAddr, What: operation})
		return next(withBase(ctx, r), w, r, req)
	}
}

var startsBuild = regexp.MustCompile(`^/templates/[^/]+/builds/[^/]+$`)

func startsVM(r *http.Request) bool {
	path := strings.TrimPrefix(r.URL.Path, "/v2")
	return r.Method == http.MethodPost && (path == "/sandboxes" || strings.HasSuffix(path, "/fork") || startsBuild.MatchString(path))
}

// fromForms are the content types that a browser sends to any host without asking
// it first.
var fromForms = map[string]bool{
	"text/plain": true, "application/x-www-form-urlencoded": true, "multipart/form-data": true,
}

// withBody bounds bodies and refuses those of a form.
func (s *server) withBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if fromForms[kind] {
			s.fail(w, r, refuse(http.StatusUnsupportedMediaType, "the body must be application/json, not %s", kind))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

// withCORS lets pages of every origin call: what they need besides is a key, which
// no browser adds by itself.
func withCORS(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers",
			"X-Next-Token, X-Total-Running, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After")
		if r.Method != http.MethodOptions {
			next.ServeHTTP(w, r)
			return
		}
		h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
		allow := "Authorization, X-API-Key, Content-Type, Idempotency-Key"
		if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
			allow = asked
		}
		h.Set("Access-Control-Allow-Headers", allow)
		h.Add("Vary", "Access-Control-Request-Headers")
		h.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
	})
}

// router is a ServeMux with errors in JSON. The ServeMux of the standard library
// refuses /templates/aliases/{alias} beside /templates/{templateID}/tags, because
// neither is more specific; so the first has a ServeMux of its own that comes first.
type router struct {
	aliases, rest *http.ServeMux
	fail          func(http.ResponseWriter, *http.Request, error)
}

func newRouter(fail func(http.ResponseWriter, *http.Request, error)) *router {
	r := &router{aliases: http.NewServeMux(), rest: http.NewServeMux(), fail: fail}
	r.rest.HandleFunc("/volumecontent/", func(w http.ResponseWriter, req *http.Request) { fail(w, req, errVolumes) })
	return r
}

func (m *router) HandleFunc(pattern string, handler func(http.ResponseWriter, *http.Request)) {
	if strings.Contains(pattern, "/templates/aliases/") {
		m.aliases.HandleFunc(pattern, handler)
		return
	}
	m.rest.HandleFunc(pattern, handler)
}

func (m *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for _, mux := range []*http.ServeMux{m.aliases, m.rest} {
		if _, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
	}
	// A mux without a pattern for the request says by its status whether it has the
	// path for another method.
	refusal := &discard{header: http.Header{}}
	handler, _ := m.rest.Handler(r)
	handler.ServeHTTP(refusal, r)
	if refusal.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", refusal.header.Get("Allow"))
		m.fail(w, r, refuse(http.StatusMethodNotAllowed, "%s does not take %s", r.URL.Path, r.Method))
		return
	}
	m.fail(w, r, refuse(http.StatusNotFound, "there is no %s", r.URL.Path))
}

// discard is a ResponseWriter that keeps head and nothing else.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

// caller returns who calls; every operation but getHealth has one.
func caller(ctx context.Context) auth.Caller {
	c, _ := auth.CallerOf(ctx)
	return c
}

// projectOf is the name of the caller's project, which owns what the caller makes.
func projectOf(ctx context.Context) string { return caller(ctx).Project.Name }

func writeJSON(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"code":500,"message":"internal error"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data) // the client may be gone
}

func (s *server) GetHealth(context.Context, api.GetHealthRequestObject) (api.GetHealthResponseObject, error) {
	return api.GetHealth204Response{}, nil
}

func (s *server) ListTeams(ctx context.Context, _ api.ListTeamsRequestObject) (api.ListTeamsResponseObject, error) {
	c := caller(ctx)
	return api.ListTeams200JSONResponse{{TeamID: c.Project.ID, Name: c.Project.Name, ApiKey: c.Key, IsDefault: true}}, nil
}

// checkTeam refuses a team that is not the caller's project.
func checkTeam(ctx context.Context, teamID *string) error {
	if teamID != nil && *teamID != "" && *teamID != caller(ctx).Project.ID {
		return refuse(http.StatusBadRequest, "team %.70q is not the team of this key", *teamID)
	}
	return nil
}

// list reads a query parameter whose values are separated by commas or repeated.
func list(values *[]string) []string {
	if values == nil {
		return nil
	}
	var all []string
	for _, v := range *values {
		for _, word := range strings.Split(v, ",") {
			if word = strings.TrimSpace(word); word != "" {
				all = append(all, word)
			}
		}
	}
	return all
}

// unescape is url.QueryUnescape with an error for callers.
func unescape(text string) (string, error) {
	plain, err := url.QueryUnescape(text)
	if err != nil {
		return "", refuse(http.StatusBadRequest, "metadata %.70q is not encoded: %s", text, err)
	}
	return plain, nil
}

func value[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// some returns a pointer to v, or nil for the zero value.
func some[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}
