package sandbox

import (
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A sandbox has a token of its own, the same for its whole life, which ends with
// it.
func TestTokensAreForLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a, b := r.create(), r.create()
		if id, ok := r.WithTokens(func(Tokens) bool { return false }); ok {
			t.Errorf("%s has any token", id)
		}
		token, err := r.envdToken(a)
		other, oerr := r.envdToken(b)
		if err != nil || oerr != nil || len(token) < 20 || token == other {
			t.Fatalf("%d and %d bytes, equal %v, %v, %v", len(token), len(other), token == other, err, oerr)
		}
		same := func(when string) {
			t.Helper()
			if got, err := r.envdToken(a); err != nil || got != token {
				t.Errorf("%s: another token, %v", when, err)
			}
			if id, ok := r.WithTokens(func(t Tokens) bool { return t.Envd == token }); id != a || !ok {
				t.Errorf("%s: found %q, %v by the token of %s", when, id, ok, a)
			}
		}
		if err := r.Pause(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		same("paused")
		if err := r.Hibernate(t.Context(), a, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		same("hibernated")
		if err := r.Resume(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		same("resumed")
		if err := r.Destroy(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		_, err = r.envdToken(a)
		wantClass(t, err, errdefs.NotFound)
		if id, ok := r.WithTokens(func(t Tokens) bool { return t.Envd == token }); ok {
			t.Errorf("%s has the token of one that ended", id)
		}
		if err := r.Destroy(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}

func (r *rig) envdToken(id ID) (string, error) {
	tokens, err := r.Tokens(id)
	return tokens.Envd, err
}

// A call of a stranger does not keep a sandbox that has been idle for too long, however
// long the call lasts.
func TestGlanceIsNoActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Timeout: time.Minute}).ID
		pass(30 * time.Second)
		glance, err := r.Glance(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		r.wantState(id, Stopped)
		if glance.Alive.Err() == nil {
			t.Error("the call goes on")
		}
		glance.Release()
		_, err = r.Glance(t.Context(), id)
		wantClass(t, err, errdefs.WrongState)
	})
}
