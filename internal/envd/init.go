package envd

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	maxInit = 1 << 20
	// A clock that is off by less is left alone: jumps disturb programs.
	clockBehind = 5 * time.Millisecond
	clockAhead  = 5 * time.Second
)

// initRequest is the body of POST /init.
type initRequest guestapi.InitRequest

// init tells the guest its identity and the time, after a boot and after every
// restore. It demands the present token; before the first one is set, it demands
// none.
func (s *Server) init(w http.ResponseWriter, r *http.Request) {
	var req initRequest
	if body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInit)); err != nil {
		http.Error(w, "read the request: "+err.Error(), http.StatusBadRequest)
		return
	} else if len(body) > 0 {
		if err := json.Unmarshal(body, &req); err != nil {
			http.Error(w, "parse the request: "+err.Error(), http.StatusBadRequest)
			return
		}
	}
	s.initMu.Lock()
	defer s.initMu.Unlock()
	state := s.defaults()
	if err := req.check(s.accounts, state.user); err != nil {
		if errors.Is(err, errNoAccount) {
			w.Header().Set(guestapi.HeaderMissing, guestapi.MissingUser)
		}
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	shown := r.Header.Get(guestapi.HeaderToken)
	clone := req.Restored && state.cloneKey != nil && tokenMatches(state.cloneKey, shown)
	if !clone && !tokenMatches(state.token, req.AccessToken) && !tokenMatches(state.token, shown) {
		http.Error(w, "access token mismatch", http.StatusUnauthorized)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set(guestapi.HeaderE2BVersion, guestapi.E2BVersion)
	w.Header().Set(guestapi.HeaderProtocol, guestapi.Protocol)
	if !req.Restored && req.Timestamp != nil && state.done && !req.Timestamp.After(state.stamp) {
		// This is a late copy of an earlier request. A restored guest takes every
		// request, because the host's clock may have been set back.
		s.thaw(false)
		w.Header().Set(guestapi.HeaderClock, strconv.FormatInt(time.Now().UnixNano(), 10))
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if s.guest {
		if err := req.applyToMachine(s, func() time.Duration { return s.conns.age(r) }); err != nil {
			s.log.Error("initialise", "err", err)
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	generation := ""
	if req.Restored {
		s.conns.closeOthers(r)
		if s.guest {
			var err error
			if generation, err = s.newGeneration(req.Entropy); err != nil {
				s.log.Warn("name the generation", "err", err)
			}
		}
	}
	s.mu.Lock()
	s.state = req.merge(state)
	s.mu.Unlock()
	s.thaw(req.Restored)
	if generation != "" {
		go s.runHooks(hookDir, generation)
	}
	// Nothing is logged: the console is slow, and the host knows.
	w.Header().Set(guestapi.HeaderClock, strconv.FormatInt(time.Now().UnixNano(), 10))
	w.WriteHeader(http.StatusNoContent)
}

// thaw lets the users' processes go on. It is the last step, so that they see the
// machine's new identity.
func (s *Server) thaw(cut bool) {
	if s.processes.cgroups != nil {
		s.processes.cgroups.thaw(s.guest, cut)
	}
}

// check validates a request; user is the present default user.
func (req initRequest) check(a accounts, user string) error {
	if req.DefaultUser != "" && req.DefaultUser != user {
		if _, err := a.lookup(req.DefaultUser); err != nil {
			return fmt.Errorf("default user '%s': %w", req.DefaultUser, err)
		}
	}
	if req.Hostname != "" && !guestapi.ValidHostname(req.Hostname) {
		return fmt.Errorf("invalid host name %q", req.Hostname)
	}
	if req.CABundle != "" {
		if err := checkCA([]byte(req.CABundle)); err != nil {
			return err
		}
	}
	if n := len(req.CloneKey); n != 0 && n != sha256.Size {
		return fmt.Errorf("a clone key of %d bytes is no digest", n)
	}
	if len(req.Entropy) > guestapi.MaxEntropy {
		return fmt.Errorf("more than %d bytes of entropy", guestapi.MaxEntropy)
	}
	if err := checkStrings(command{env: req.EnvVars}); err != nil {
		return errors.New("an environment variable has no proper name or contains a NUL byte")
	}
	return nil
}

// merge returns the state after the request. EnvVars replace all previous ones; a
// request without a token means that none is needed.
func (req initRequest) merge(old initState) initState {
	state := old
	state.done = true
	state.token, state.tokenRaw = nil, ""
	if req.AccessToken != "" {
		sum := sha256.Sum256([]byte(req.AccessToken))
		state.token, state.tokenRaw = &sum, req.AccessToken
	}
	if len(req.CloneKey) > 0 {
		state.cloneKey = (*[sha256.Size]byte)(req.CloneKey)
	}
	if req.Timestamp != nil {
		state.stamp = *req.Timestamp
	}
	if req.EnvVars != nil {
		state.env = req.EnvVars
	}
	if req.DefaultUser != "" {
		state.user = req.DefaultUser
	}
	if req.DefaultWorkdir != "" {
		state.workdir = req.DefaultWorkdir
	}
	if req.SandboxID != "" {
		state.ownEnv = maps.Clone(old.ownEnv)
		state.ownEnv["E2B_SANDBOX_ID"] = req.SandboxID
	}
	return state
}

// applyToMachine sets clock, entropy, name and certificates. age returns how long
// ago the request arrived, which is long where code runs for the first time.
func (req initRequest) applyToMachine(s *Server, age func() time.Duration) error {
	if req.Timestamp != nil {
		if err := s.body.setClock(req.Timestamp.Add(age()), req.Restored); err != nil {
			return err
		}
	}
	if len(req.Entropy) > 0 {
		if err := s.body.addEntropy(req.Entropy); err != nil {
			return err
		}
	}
	if req.CABundle != "" {
		if err := installCA("", []byte(req.CABundle)); err != nil {
			return err
		}
	}
	if req.Hostname != "" {
		if err := setHostname(req.Hostname, s.addr); err != nil {
			s.log.Warn("set the host name", "err", err)
		}
	}
	if req.SandboxID != "" && req.SandboxID != s.defaults().ownEnv["E2B_SANDBOX_ID"] {
		if err := setMachineID(); err != nil {
			s.log.Warn("set the machine's id", "err", err)
		}
	}
	if req.NewBootID {
		if err := setBootID(); err != nil {
			s.log.Warn("set the boot's id", "err", err)
		}
	}
	return nil
}

// setClock sets the wall clock if it is off by more than programs should notice,
// or always: a restored guest's clock shows the time of the snapshot.
func setClock(now time.Time, always bool) error {
	if ahead := time.Since(now); !always && ahead > -clockBehind && ahead < clockAhead {
		return nil
	}
	ts := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}

// addEntropy credits bytes to the kernel's pool and reseeds the generator, so that
// two guests restored from one snapshot draw different numbers from then on.
func addEntropy(data []byte) error {
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the random device: %w", err)
	}
	defer unix.Close(fd)
	// struct rand_pool_info: bits, bytes, data.
	var info struct {
		bits, size int32
		data       [guestapi.MaxEntropy]byte
	}
	info.bits, info.size = int32(8*len(data)), int32(len(data))
	copy(info.data[:], data)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed the random generator: %w", errno)
	}
	return nil
}
