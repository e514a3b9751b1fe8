// Package envd is the daemon in a guest: it boots the guest as PID 1 and serves the
// guest's processes and files to the host.
package envd

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// maxMessage bounds one request message, unpacked.
	maxMessage = 8 << 20
	// idleTimeout is longer than that of the proxies in front of a guest, so
	// that none of them reuses a connection that is being closed.
	idleTimeout = 640 * time.Second
)

// Config says what a Server may touch.
type Config struct {
	Log *slog.Logger
	// Body is the machine that envd owns: an initialisation sets clock, entropy and
	// host name, and before the first one nothing else is served. It is nil for a
	// process among others.
	Body Body
	// CgroupRoot is a directory in the cgroup2 hierarchy where each process
	// gets a cgroup of its own; empty for none.
	CgroupRoot string
	// Disk is the guest's, whose free space goes back to the host; nil for none.
	Disk *Disk
	// Addr is what the guest's host name resolves to; invalid for none.
	Addr netip.Addr
}

// Server serves processes, files and its own initialisation over HTTP/1.1 and
// h2c. Make it with New, end it with Close.
type Server struct {
	log       *slog.Logger
	guest     bool
	body      Body
	disk      *Disk
	addr      netip.Addr
	processes *processes
	accounts  accounts
	watchers  watchers
	meter     meter
	conns     openConns
	handler   http.Handler

	// initMu serialises initialisations and guards generation.
	initMu     sync.Mutex
	generation string
	mu         sync.Mutex
	state      initState
}

// initState is what the last initialisations said. Its maps are replaced and never
// changed.
type initState struct {
	done     bool
	token    *[sha256.Size]byte // nil: none needed
	tokenRaw string             // for signatures
	cloneKey *[sha256.Size]byte // nil: none
	stamp    time.Time
	user     string
	workdir  string
	env      map[string]string // users'
	ownEnv   map[string]string // users cannot change these
}

// New returns a server that has not been initialised.
func New(c Config) *Server {
	s := &Server{
		log: c.Log, guest: c.Body != nil, body: c.Body, disk: c.Disk, addr: c.Addr,
		processes: newProcesses(c.Log, c.CgroupRoot),
		accounts:  accounts{etc: "/etc"},
		state: initState{
			user:   "root",
			ownEnv: map[string]string{"E2B_SANDBOX": "true"},
		},
	}
	if c.Body != nil && s.processes.cgroups != nil {
		s.processes.cgroups.serve(c.Body.can())
	}
	// Answers are not compressed: a guest has little CPU, and the way to its host
	// is short.
	options := connect.WithHandlerOptions(connect.WithReadMaxBytes(maxMessage), connect.WithCompressMinBytes(math.MaxInt))
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+guestapi.PathHealth, s.health)
	mux.HandleFunc("POST "+guestapi.PathInit, s.init)
	mux.HandleFunc("POST "+guestapi.PathQuiesce, s.quiesce)
	mux.HandleFunc("POST "+guestapi.PathFreeze, s.freeze)
	mux.HandleFunc("POST "+guestapi.PathUnpack, s.unpackTar)
	mux.HandleFunc("GET "+guestapi.PathPack, s.packTar)
	mux.HandleFunc("GET "+guestapi.PathMetrics, s.metrics)
	mux.HandleFunc("GET "+guestapi.PathEnvs, s.envs)
	mux.HandleFunc("GET "+guestapi.PathProcesses, s.listProcesses)
	mux.HandleFunc("GET "+guestapi.PathFiles, s.download)
	mux.HandleFunc("POST "+guestapi.PathFiles, s.upload)
	mux.HandleFunc("POST "+guestapi.PathCompose, s.compose)
	mux.Handle(processconnect.NewProcessHandler(processService{s}, options))
	mux.Handle(filesystemconnect.NewFilesystemHandler(filesystemService{s}, options))
	s.handler = cors(s.guard(s.tunnels(mux)))
	return s
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// Serve answers requests on l, which it closes, until ctx ends. Streams that
// are open then are cut off.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler: s, Protocols: &protocols, IdleTimeout: idleTimeout, ReadHeaderTimeout: 30 * time.Second,
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		ConnState:   s.conns.state,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// ReapOrphans does PID 1's duty until ctx ends.
func (s *Server) ReapOrphans(ctx context.Context) {
	var swept func()
	if s.processes.cgroups != nil {
		swept = s.processes.cgroups.sweep
	}
	s.processes.children.reapOrphans(ctx, s.log, swept)
}

// Close kills the processes that the server has started, ends its watches and
// returns when they are gone.
func (s *Server) Close() {
	s.watchers.close()
	s.processes.close()
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// guard passes a request to next if it shows the access token, or if there is
// none. /health needs no token; /init and /files check their credentials themselves.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case guestapi.PathHealth, guestapi.PathInit:
			next.ServeHTTP(w, r)
			return
		}
		s.mu.Lock()
		ready, token := s.state.done || !s.guest, s.state.token
		s.mu.Unlock()
		switch {
		case !ready && r.URL.Path != guestapi.PathQuiesce:
			writeError(w, http.StatusServiceUnavailable, "the guest is not initialised yet")
		case r.URL.Path != guestapi.PathFiles && !tokenMatches(token, r.Header.Get(guestapi.HeaderToken)):
			writeError(w, http.StatusUnauthorized,
				"unauthorized access, please provide a valid access token or method signing if supported")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// tokenMatches compares in a time that depends on neither token.
func tokenMatches(want *[sha256.Size]byte, got string) bool {
	if want == nil {
		return true
	}
	sum := sha256.Sum256([]byte(got))
	return subtle.ConstantTimeCompare(want[:], sum[:]) == 1
}

// writeError answers with the error shape of envd's plain HTTP endpoints.
func writeError(w http.ResponseWriter, status int, message string) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(guestapi.Error{Code: status, Message: message})
}

// defaults returns what the last initialisation said.
func (s *Server) defaults() initState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// userEnv returns the variables that every process gets beside its own.
func (s *Server) userEnv() map[string]string {
	state := s.defaults()
	env := maps.Clone(state.env)
	if env == nil {
		env = make(map[string]string)
	}
	maps.Copy(env, state.ownEnv)
	return env
}

// environment holds the variables that a login sets for that user.
func (s *Server) environment(as account) map[string]string {
	path := os.Getenv("PATH")
	if path == "" {
		path = DefaultPath
	}
	return map[string]string{
		"PATH": path, "LANG": "C.UTF-8", "HOME": as.home, "USER": as.name, "LOGNAME": as.name, "SHELL": as.shell,
	}
}

// requestUser returns the user that a request acts as: that of its Basic
// authorization, or the default user.
func (s *Server) requestUser(h http.Header) (account, error) {
	return s.account(basicUser(h))
}

// basicUser returns the user of a Basic authorization. A user has an empty password, so
// what stands between two colons is a gid. Other passwords are ignored.
func basicUser(h http.Header) string {
	user, rest, _ := (&http.Request{Header: h}).BasicAuth()
	if gid, ok := strings.CutSuffix(rest, ":"); ok {
		if _, ok := parseID(gid); ok {
			user += ":" + gid
		}
	}
	return user
}

func (s *Server) account(name string) (account, error) {
	if name == "" {
		name = s.defaults().user
	}
	as, err := s.accounts.lookup(name)
	switch {
	case errors.Is(err, errNoAccount):
		return account{}, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s'", name))
	case err != nil:
		return account{}, connect.NewError(connect.CodeInternal, err)
	}
	return as, nil
}

func dirExists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
