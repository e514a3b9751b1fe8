package sandbox

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// TestProgramsAreFrozenInCopies: they stand still from before the copy until the
// source, and each copy, has been told what it is.
func TestProgramsAreFrozenInCopies(t *testing.T) {
	copies := map[string]func(r *rig, id ID) error{
		"fork":     func(r *rig, id ID) error { _, err := r.Fork(r.t.Context(), id, ForkRequest{Count: 1}); return err },
		"snapshot": func(r *rig, id ID) error { _, err := r.Snapshot(r.t.Context(), id, SnapshotRequest{}); return err },
	}
	steps := []string{"guest.freeze", "pause", "resume", "snapshot", "guest.init"}
	for name, doCopy := range copies {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			after := func(do func() error) (seen []string, err error) {
				before := len(r.faults.order)
				err = do()
				for _, step := range r.faults.order[before:] {
					if slices.Contains(steps, step) {
						seen = append(seen, step)
					}
				}
				return seen, err
			}
			want := []string{"guest.freeze", "pause", "snapshot", "resume", "guest.init"}
			got, err := after(func() error { return doCopy(r, id) })
			if err != nil || !slices.Equal(got[:min(len(got), len(want))], want) {
				t.Errorf("%s: steps %v, %v; want %v", name, got, err, want)
			}
			// What cannot be frozen is not copied, and goes on.
			r.faults.on("guest.freeze", func(context.Context) error { return errdefs.Unavailable.Errorf("it waits for a device") })
			got, err = after(func() error { return doCopy(r, id) })
			wantClass(t, err, errdefs.Unavailable)
			if want := []string{"guest.freeze", "guest.init"}; !slices.Equal(got, want) {
				t.Errorf("%s of what cannot be frozen: steps %v, want %v", name, got, want)
			}
			r.wantState(id, Running)

			if err := r.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			got, err = after(func() error { return doCopy(r, id) })
			wantClass(t, err, errdefs.Unavailable)
			if want := []string{"resume", "guest.freeze", "guest.init", "pause"}; !slices.Equal(got, want) {
				t.Errorf("%s of a paused one that cannot be frozen: steps %v, want %v", name, got, want)
			}
			r.wantState(id, Paused)
			r.faults.on("guest.freeze", nil)
			got, err = after(func() error { return doCopy(r, id) })
			want = []string{"resume", "guest.freeze", "pause", "snapshot", "pause"}
			if err != nil || !slices.Equal(got[:min(len(got), len(want))], want) {
				t.Errorf("%s of a paused one: steps %v, %v; want %v", name, got, err, want)
			}
			r.wantState(id, Paused)
			if err := r.Resume(t.Context(), id); err != nil {
				t.Error(err)
			}
			r.wantConsistent()
		})
	}
}

// TestHibernationWithoutFreeze: it stays who it is, so that it may.
func TestHibernationWithoutFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		r.faults.on("guest.freeze", func(context.Context) error { return errFault })
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Error(err)
		}
		r.wantState(id, Hibernated)
	})
}

// TestLogin: user and variables are those of the create, over those of what it
// started from, in every way to start, and whatever happens to the agent.
func TestLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		var last guest.Init
		r.told = func(_ string, in guest.Init) {
			if in.SandboxID != "" {
				last = in
			}
		}
		want := func(what string, id ID, from string, made Created, err error, user string, env map[string]string) {
			t.Helper()
			if err != nil || from != "" && made.From != from {
				t.Fatalf("%s: %+v, %v", what, made, err)
			}
			rec, err := r.store.load(id)
			if info, gerr := r.Get(id); gerr != nil || info.User != user || err != nil || rec.user() != user || !maps.Equal(rec.Login.Env, env) {
				t.Errorf("%s: user %q, record %+v, %v", what, info.User, rec.Login, errors.Join(err, gerr))
			}
			if last.SandboxID != string(id) || last.DefaultUser != user || last.Env == nil || !maps.Equal(last.Env, env) {
				t.Errorf("%s: its guest was told user %q, variables %v", what, last.DefaultUser, last.Env)
			}
		}
		none := map[string]string{}
		plain, err := r.Create(t.Context(), CreateRequest{})
		want("without", plain.ID, FromBoot, plain, err, "root", none)
		login := Login{User: "user", Env: map[string]string{"A": "1", "B": "2"}}
		r.fillPool()
		warm, err := r.Create(t.Context(), CreateRequest{Login: login})
		want("warm", warm.ID, FromWarm, warm, err, "user", login.Env)
		r.fillPool()
		again, err := r.Create(t.Context(), CreateRequest{MemMiB: 256, Login: login})
		want("cold", again.ID, FromBoot, again, err, "user", login.Env)
		ready, err := r.Create(t.Context(), CreateRequest{MemMiB: 256, Login: login})
		want("ready", ready.ID, FromReady, ready, err, "user", login.Env)
		forked, err := r.Fork(t.Context(), ready.ID, ForkRequest{Count: 1})
		want("fork", forked.Sandboxes[0].ID, "", Created{}, err, "user", login.Env)
		if _, err := r.Snapshot(t.Context(), ready.ID, SnapshotRequest{Name: "snap", New: true}); err != nil {
			t.Fatal(err)
		}
		snap, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
		want("snapshot", snap.ID, FromSnapshot, snap, err, "user", login.Env)
		other, err := r.Create(t.Context(), CreateRequest{Template: "snap", Login: Login{User: "root", Env: map[string]string{"B": "3"}}})
		want("snapshot with others", other.ID, FromSnapshot, other, err, "root", map[string]string{"A": "1", "B": "3"})
		r.die()
		r.start()
		last = guest.Init{SandboxID: string(warm.ID), DefaultUser: "user", Env: login.Env}
		want("adopted", warm.ID, "", Created{}, nil, "user", login.Env)

		for what, bad := range map[string]Login{
			"user":       {User: "a:b"},
			"no name":    {Env: map[string]string{"": "x"}},
			"name":       {Env: map[string]string{"a=b": "x"}},
			"NUL":        {Env: map[string]string{"a": "secret\x00"}},
			"many bytes": {Env: map[string]string{"a": strings.Repeat("x", MaxEnvBytes)}},
		} {
			_, err := r.Create(t.Context(), CreateRequest{Login: bad})
			wantClass(t, err, errdefs.InvalidArgument)
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: the error tells a value: %v", what, err)
			}
		}
	})
}

// TestLoginOfNobody: a user that the guest does not have costs neither the ready
// snapshot nor the guests that wait.
func TestLoginOfNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 2)
		r.create()
		if _, err := r.Create(t.Context(), CreateRequest{MemMiB: 256}); err != nil {
			t.Fatal(err)
		}
		r.fillPool()
		r.faults.on("guest.init", func(context.Context) error { return errdefs.NotFound.Errorf("it has no such user") })
		made := r.faults.count("guest.init")
		_, err := r.Create(t.Context(), CreateRequest{Login: Login{User: "nobody2"}})
		wantClass(t, err, errdefs.NotFound)
		if n := r.faults.count("guest.init") - made; n != 1 || len(r.waiting()) == 0 {
			t.Errorf("%d guests were asked, %d wait", n, len(r.waiting()))
		}
		_, err = r.Create(t.Context(), CreateRequest{MemMiB: 256, Login: Login{User: "nobody2"}})
		wantClass(t, err, errdefs.NotFound)
		r.faults.on("guest.init", nil)
		created, err := r.Create(t.Context(), CreateRequest{MemMiB: 256})
		if err != nil || created.From != FromReady {
			t.Errorf("the ready snapshot is gone: %+v, %v", created, err)
		}
	})
}
