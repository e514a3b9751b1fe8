// Package idempotency remembers what a caller's key stood for, so that a request
// that comes twice is carried out once, also when the agent ends in between.
package idempotency

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// Keep is how long a key is remembered.
const Keep = 24 * time.Hour

// The errors of Begin beside those of the disk. Each has a class.
var (
	// ErrInProgress: the first request with the key is under way.
	ErrInProgress = errdefs.Busy.Errorf("a request with this Idempotency-Key is in progress")
	// ErrMismatch: the key stood for another request.
	ErrMismatch = errdefs.InvalidArgument.Errorf("this Idempotency-Key was used with another request")
	// ErrUnknown: what became of the first request cannot be told.
	ErrUnknown = errdefs.WrongState.Errorf("what became of the request with this Idempotency-Key is not known")
)

// Request is what a caller asks once.
type Request struct {
	// Scope keeps callers apart: the keys of two scopes are two keys.
	Scope string
	// Key is the caller's word, Digest what the request asks.
	Key, Digest string
}

// entry is a file: one request, and what came of it.
type entry struct {
	Scope   string    `json:"scope"`
	Key     string    `json:"key"`
	Digest  string    `json:"digest"`
	Subject string    `json:"subject"`
	At      time.Time `json:"at"`
	// Answer is set when the request is done.
	Answer json.RawMessage `json:"answer,omitempty"`
}

// Store keeps requests in a directory of its own, one file each. It is safe for
// concurrent use within one process.
type Store struct {
	dir string
	now func() time.Time

	mu   sync.Mutex      // over busy
	busy map[string]bool // file names of requests under way

	sweeping sync.Mutex
	sweptAt  time.Time
}

// Open returns the store of a directory, which it makes. exists says whether there
// is a subject. A request that an earlier process began and did not end is done if
// its subject is there, and forgotten if not: so Open comes after subjects that
// were half made are gone, and before any that is whole can go.
func Open(dir string, exists func(subject string) bool) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make idempotency directory: %w", err)
	}
	s := &Store{dir: dir, now: time.Now, busy: map[string]bool{}}
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := s.settle(name, exists); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// settle ends a request of an earlier process. A file that cannot be used stays:
// its key is unknown until the file is too old.
func (s *Store) settle(name string, exists func(string) bool) error {
	e, err := s.read(name)
	switch {
	case err != nil:
		return s.dropOld(name)
	case s.old(e):
		return s.drop(name)
	case e.Answer != nil:
		return nil
	case !exists(e.Subject):
		return s.drop(name)
	}
	e.Answer = json.RawMessage("null")
	return sealed.Write(filepath.Join(s.dir, name), e)
}

// Claim is the right to carry out a request, which exactly one of Done and Drop
// ends.
type Claim struct {
	s    *Store
	name string
	e    entry
}

// Done is a request that was carried out before.
type Done struct {
	Subject string
	// Answer is what Claim.Done was given; nil if the agent ended before that.
	Answer json.RawMessage
}

// Begin begins a request that is to make subject. It returns a claim if the
// request is new, and what came of the first one if it is not.
func (s *Store) Begin(r Request, subject string) (*Claim, *Done, error) {
	sum := sha256.Sum256([]byte(r.Scope + "\x00" + r.Key))
	name := hex.EncodeToString(sum[:]) + ".json"
	if !s.take(name) {
		return nil, nil, s.inProgress(name, r)
	}
	claim, done, err := s.begin(name, r, subject)
	if claim == nil {
		s.give(name)
	}
	s.sweep()
	return claim, done, err
}

func (s *Store) begin(name string, r Request, subject string) (*Claim, *Done, error) {
	e, err := s.read(name)
	switch {
	case errors.Is(err, errdefs.Corrupt):
		return nil, nil, ErrUnknown
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, nil, err
	case err == nil && !s.old(e):
		if e.Digest != r.Digest {
			return nil, nil, ErrMismatch
		}
		if e.Answer == nil { // Drop could not remove it
			return nil, nil, ErrUnknown
		}
		if string(e.Answer) == "null" {
			return nil, &Done{Subject: e.Subject}, nil
		}
		return nil, &Done{Subject: e.Subject, Answer: e.Answer}, nil
	}
	e = entry{Scope: r.Scope, Key: r.Key, Digest: r.Digest, Subject: subject, At: s.now().UTC()}
	if err := sealed.Write(filepath.Join(s.dir, name), e); err != nil {
		return nil, nil, err
	}
	return &Claim{s: s, name: name, e: e}, nil, nil
}

// inProgress says how a request that is under way answers r.
func (s *Store) inProgress(name string, r Request) error {
	if e, err := s.read(name); err == nil && e.Digest != r.Digest {
		return ErrMismatch
	}
	return ErrInProgress
}

// Done notes that the request was carried out. An error concerns the note alone;
// the next process settles the request.
func (c *Claim) Done(answer json.RawMessage) error {
	defer c.s.give(c.name)
	c.e.Answer = answer
	return sealed.Write(filepath.Join(c.s.dir, c.name), c.e)
}

// Drop forgets the request: nothing came of it, and it may come again.
func (c *Claim) Drop() error {
	defer c.s.give(c.name)
	return c.s.drop(c.name)
}

func (s *Store) take(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[name] {
		return false
	}
	s.busy[name] = true
	return true
}

func (s *Store) give(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, name)
}

func (s *Store) read(name string) (e entry, err error) {
	err = sealed.Read(filepath.Join(s.dir, name), &e)
	return e, err
}

func (s *Store) old(e entry) bool { return s.now().Sub(e.At) > Keep }

func (s *Store) drop(name string) error {
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget request: %w", err)
	}
	return nil
}

// dropOld removes a file by its time, without reading it.
func (s *Store) dropOld(name string) error {
	info, err := os.Stat(filepath.Join(s.dir, name))
	if err != nil || s.now().Sub(info.ModTime()) <= Keep {
		return nil
	}
	return s.drop(name)
}

// sweepEvery is how often files that are too old are looked for.
const sweepEvery = time.Hour

// sweep removes the requests that are too old, now and then.
func (s *Store) sweep() {
	if !s.sweeping.TryLock() {
		return
	}
	defer s.sweeping.Unlock()
	if s.now().Sub(s.sweptAt) < sweepEvery {
		return
	}
	s.sweptAt = s.now()
	names, err := s.names()
	if err != nil {
		return // the next sweep tries again
	}
	for _, name := range names {
		if s.take(name) {
			_ = s.dropOld(name)
			s.give(name)
		}
	}
}

// names returns the files of requests.
func (s *Store) names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("read idempotency directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
