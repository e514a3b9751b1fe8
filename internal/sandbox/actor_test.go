package sandbox

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// actors reads who asked for each change of a sandbox, as the next agent remembers it.
func (r *rig) actors(id ID) (names []string) {
	r.t.Helper()
	err := r.Events(r.t.Context(), 0, false, func(e Event) error {
		if e.ID == id {
			names = append(names, strings.TrimSuffix(string(e.To)+" "+e.Actor.What, " "))
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return names
}

func as(ctx context.Context, what string) context.Context {
	return WithActor(ctx, Actor{KeyID: "key", Project: "blue", Address: "192.0.2.1:1", What: what})
}

// Each change that a caller asks for has the caller in its event. What the host does by
// itself has none.
func TestEventsSayWhoAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		made := func(what string) ID {
			t.Helper()
			info, err := r.Create(as(t.Context(), what), CreateRequest{Timeout: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			return info.ID
		}
		cold := made("cold")
		r.fillPool()
		warm := made("warm")
		forked, err := r.Fork(as(t.Context(), "fork"), cold, ForkRequest{Count: 1})
		err = errors.Join(err,
			r.Pause(as(t.Context(), "pause"), cold), r.Resume(as(t.Context(), "resume"), cold),
			r.Hibernate(as(t.Context(), "hibernate"), cold, Hibernation{}), r.Resume(as(t.Context(), "wake"), cold),
			r.Destroy(as(t.Context(), "destroy"), cold))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour + time.Minute)
		synctest.Wait()
		r.die()
		r.start()
		for id, want := range map[ID]string{
			cold: "creating cold, running cold, running fork, paused pause, running resume, hibernated hibernate, running wake, " +
				"stopping destroy, stopped destroy",
			warm:                   "creating warm, running warm, stopping, stopped",
			forked.Sandboxes[0].ID: "creating fork, running fork, stopping, stopped",
		} {
			if got := strings.Join(r.actors(id), ", "); got != want {
				t.Errorf("events are %q, want %q", got, want)
			}
		}
	})
}

// A create that a destroy ends is ended by the destroy's caller.
func TestDestroyerOfACreate(t *testing.T) {
	r := newRig(t)
	started := make(chan struct{})
	r.faults.on("start", func(ctx context.Context) error { close(started); return hang(ctx) })
	ended := make(chan error, 1)
	go func() {
		_, err := r.Create(as(t.Context(), "create"), CreateRequest{})
		ended <- err
	}()
	<-started
	id := r.List(false)[0].ID
	if err := r.Destroy(as(t.Context(), "destroy"), id); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, errDestroyed) {
		t.Errorf("the create ended with %v", err)
	}
	if got := strings.Join(r.actors(id), ", "); got != "creating create, stopping destroy, stopped destroy" {
		t.Errorf("events are %q", got)
	}
}

func TestActorIsBounded(t *testing.T) {
	a := ActorOf(WithActor(t.Context(), Actor{What: strings.Repeat("ü", 1000), Address: "\xff"}))
	if len(a.What) > maxActorField || a.Address != "" || ActorOf(t.Context()) != (Actor{}) {
		t.Errorf("%+v", a)
	}
}
