package sandbox

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A drain hibernates what runs, or waits until it has ended, for a bounded time.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		running, paused, asleep := r.create(), r.create(), r.create()
		if err := r.Pause(t.Context(), paused); err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), asleep, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if left := r.Drain(ctx, false); left != 2 || time.Since(began) != time.Minute {
			t.Errorf("%d are left after %s", left, time.Since(began))
		}
		_, err := r.Create(t.Context(), CreateRequest{})
		wantClass(t, err, errdefs.Unavailable)
		wantClass(t, r.Resume(t.Context(), asleep), errdefs.Unavailable)
		if left := r.Drain(t.Context(), true); left != 0 {
			t.Errorf("%d are left", left)
		}
		for _, id := range []ID{running, paused, asleep} {
			if info, err := r.Get(id); err != nil || info.State != Hibernated {
				t.Errorf("%s is %s, %v", id, info.State, err)
			}
		}
	})
}
