package sandbox

import (
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A sandbox has a token of its own, the same for its whole life, which ends with
// it.
func TestAccessToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a, b := r.create(), r.create()
		token, err := r.AccessToken(a)
		other, oerr := r.AccessToken(b)
		if err != nil || oerr != nil || len(token) < 20 || token == other {
			t.Fatalf("%d and %d bytes, equal %v, %v, %v", len(token), len(other), token == other, err, oerr)
		}
		same := func(when string) {
			t.Helper()
			if got, err := r.AccessToken(a); err != nil || got != token {
				t.Errorf("%s: another token, %v", when, err)
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
		_, err = r.AccessToken(a)
		wantClass(t, err, errdefs.NotFound)
		if err := r.Destroy(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}
