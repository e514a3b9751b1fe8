package idempotency

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func open(t *testing.T, dir string, subjects ...string) *Store {
	t.Helper()
	s, err := Open(dir, func(subject string) bool {
		for _, name := range subjects {
			if name == subject {
				return true
			}
		}
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func begin(t *testing.T, s *Store, key, digest, subject string) (*Claim, *Done) {
	t.Helper()
	claim, done, err := s.Begin(Request{Scope: "p", Key: key, Digest: digest}, subject)
	if err != nil {
		t.Fatal(err)
	}
	return claim, done
}

func TestSecondRequestGetsTheFirstAnswer(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	claim, _ := begin(t, s, "k", "body", "sb-1")
	if _, _, err := s.Begin(Request{"p", "k", "body"}, "sb-2"); !errors.Is(err, ErrInProgress) {
		t.Errorf("while the first is under way: %v", err)
	}
	if _, _, err := s.Begin(Request{"p", "k", "other"}, "sb-2"); !errors.Is(err, ErrMismatch) {
		t.Errorf("another body while the first is under way: %v", err)
	}
	if other, _ := begin(t, s, "k2", "body", "sb-3"); other == nil {
		t.Error("another key is the same request")
	}
	if other, _, err := s.Begin(Request{"q", "k", "body"}, "sb-4"); other == nil || err != nil {
		t.Errorf("another scope is the same request: %v", err)
	}
	if err := claim.Done(json.RawMessage(`{"a":1}`)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, open(t, dir)} {
		claim, done := begin(t, s, "k", "body", "sb-2")
		if claim != nil || done.Subject != "sb-1" || string(done.Answer) != `{"a":1}` {
			t.Errorf("the second request: %v, %+v", claim, done)
		}
		if _, _, err := s.Begin(Request{"p", "k", "other"}, "sb-2"); !errors.Is(err, ErrMismatch) {
			t.Errorf("another body: %v", err)
		}
	}
}

func TestDroppedRequestMayComeAgain(t *testing.T) {
	s := open(t, t.TempDir())
	claim, _ := begin(t, s, "k", "body", "sb-1")
	if err := claim.Drop(); err != nil {
		t.Fatal(err)
	}
	if claim, _ := begin(t, s, "k", "other", "sb-2"); claim == nil {
		t.Error("it is not new")
	}
}

// The agent ends while requests are under way.
func TestNextProcessSettles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	begin(t, s, "made", "body", "sb-1")
	begin(t, s, "not-made", "body", "sb-2")
	s = open(t, dir, "sb-1")
	if claim, done := begin(t, s, "made", "body", "sb-3"); claim != nil || done.Subject != "sb-1" || done.Answer != nil {
		t.Errorf("a request whose subject is there: %v, %+v", claim, done)
	}
	if claim, _ := begin(t, s, "not-made", "body", "sb-4"); claim == nil {
		t.Error("a request whose subject is not there is not new")
	}
}

func TestDamagedFileIsUnknown(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	claim, _ := begin(t, s, "k", "body", "sb-1")
	if err := os.WriteFile(filepath.Join(dir, claim.name), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if _, _, err := s.Begin(Request{"p", "k", "body"}, "sb-2"); !errors.Is(err, ErrUnknown) {
		t.Errorf("error is %v", err)
	}
	s.now = func() time.Time { return time.Now().Add(Keep + time.Hour) }
	s.sweep()
	if names, err := s.names(); err != nil || len(names) != 0 {
		t.Errorf("files are left: %v, %v", names, err)
	}
}

func TestKeysAreKeptForADay(t *testing.T) {
	s := open(t, t.TempDir())
	claim, _ := begin(t, s, "k", "body", "sb-1")
	if err := claim.Done(json.RawMessage(`{}`)); err != nil {
		t.Fatal(err)
	}
	s.now = func() time.Time { return time.Now().Add(Keep - time.Minute) }
	if _, done := begin(t, s, "k", "body", "sb-2"); done == nil {
		t.Error("it is forgotten early")
	}
	s.now = func() time.Time { return time.Now().Add(Keep + time.Minute) }
	if claim, _ := begin(t, s, "k", "other", "sb-2"); claim == nil {
		t.Error("it is not forgotten")
	}
}

func TestManyAtOnce(t *testing.T) {
	s := open(t, t.TempDir())
	var claims atomic.Int64
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			claim, done, err := s.Begin(Request{"p", "k", "body"}, "sb-1")
			switch {
			case claim != nil:
				claims.Add(1)
				if err := claim.Done(json.RawMessage(`{}`)); err != nil {
					t.Error(err)
				}
			case done == nil && !errors.Is(err, ErrInProgress):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if claims.Load() != 1 {
		t.Errorf("%d requests were carried out", claims.Load())
	}
}
