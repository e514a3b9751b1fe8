package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// pastOf reads what the history of a project has of a sandbox.
func (r *rig) pastOf(project string, id ID) (lines []string) {
	for _, e := range r.History(project, id) {
		lines = append(lines, fmt.Sprintf("%s%s %s", e.Kind, e.To, e.Actor.What))
	}
	return lines
}

// wantHistory compares the history of a sandbox of project blue.
func (r *rig) wantHistory(when string, id ID, want []string) {
	r.t.Helper()
	if got := r.pastOf("blue", id); !slices.Equal(got, want) {
		r.t.Errorf("%s: history is\n%q, want\n%q", when, got, want)
	}
	for _, other := range []string{"red", ""} {
		if got := r.pastOf(other, id); len(got) != 0 {
			r.t.Errorf("%s: project %q sees %q", when, other, got)
		}
	}
	if n := len(r.History("blue", "")); n != len(want)+2 { // the fork's
		r.t.Errorf("%s: %d events of the project", when, n)
	}
}

// What a caller does to a sandbox is in the history of its project, though its state
// stays. What failed, or changed nothing, is not.
func TestHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made, err := r.Create(as(t.Context(), "create"), CreateRequest{
			VCPUs: 2, MemMiB: 256, Life: time.Hour, Labels: Labels{Project: "blue", Metadata: map[string]string{"a": "b"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		id := made.ID
		r.create() // of no project
		if _, err := r.createIn("red"); err != nil {
			t.Fatal(err)
		}
		no := false
		_, terr := r.SetTimeout(as(t.Context(), "timeout"), id, time.Minute*50)
		_, derr := r.SetDeadline(as(t.Context(), "deadline"), id, time.Now().Add(2*time.Hour), "")
		_, _, cerr := r.Connect(as(t.Context(), "connect"), id, ConnectRequest{Timeout: 3 * time.Hour})
		_, _, shorter := r.Connect(as(t.Context(), "shorter"), id, ConnectRequest{Timeout: time.Minute})
		_, ferr := r.Fork(as(t.Context(), "fork"), id, ForkRequest{Count: 1})
		_, serr := r.Snapshot(as(t.Context(), "snapshot"), id, SnapshotRequest{Name: "one", New: true})
		if err := errors.Join(terr, derr, cerr, shorter, ferr, serr,
			r.SetEnd(as(t.Context(), "end"), id, time.Now().Add(time.Hour), false),
			r.UpdateNetwork(as(t.Context(), "network"), id, Egress{AllowInternet: &no}, nil),
			r.Hibernate(as(t.Context(), "hibernate"), id, Hibernation{})); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.Connect(as(t.Context(), "wake"), id, ConnectRequest{Timeout: time.Hour}); err != nil {
			t.Fatal(err)
		}
		_, err = r.SetTimeout(as(t.Context(), "bad"), id, -1)
		_, serr = r.Snapshot(as(t.Context(), "bad"), id, SnapshotRequest{Name: "one", New: true})
		if err == nil || serr == nil {
			t.Errorf("%v, %v", err, serr)
		}
		want := []string{
			"creating create", "running create", "updatedrunning timeout", "updatedrunning deadline", "updatedrunning connect",
			"checkpointedrunning fork", "checkpointedrunning snapshot", "updatedrunning end", "updatedrunning network",
			"hibernated hibernate", "running wake",
		}
		for _, when := range []string{"now", "after a restart"} {
			r.wantHistory(when, id, want)
			r.die()
			r.start()
		}
		first := r.History("blue", id)[1]
		if first.VCPUs != 2 || first.MemMiB != 256 || first.Template != "minimal" || !first.StartedAt.Equal(made.StartedAt) ||
			first.EndAt.Sub(first.StartedAt) != time.Hour || first.Metadata["a"] != "b" {
			t.Errorf("event %+v of %+v", first, made.Info)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if got := r.pastOf("blue", id); len(got) != len(want)+2 {
			t.Errorf("of a sandbox that is gone: %q", got)
		}
		time.Sleep(time.Minute)
		if got := r.events.of("blue", "", time.Now().Add(-time.Second)); len(got) != 0 {
			t.Errorf("of the last second there are %d events", len(got))
		}
	})
}

// More events than keptEvents are kept for a week, and no more than mostEvents.
func TestEventsAreKeptForAWeek(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	now := time.Now()
	add := func(n int, at time.Time) {
		t.Helper()
		for range n {
			if err := l.add(Event{Time: at, To: Creating}); err != nil {
				t.Fatal(err)
			}
		}
	}
	kept := func() int {
		t.Helper()
		l.shut()
		l = openLog(t, dir)
		events, _, err := l.after(0)
		if err != nil {
			t.Fatal(err)
		}
		return len(events)
	}
	add(2*keptEvents, now.Add(-eventsFor-time.Minute))
	if n := kept(); n != keptEvents {
		t.Errorf("%d old events are kept", n)
	}
	add(2*keptEvents, now)
	if n := kept(); n != 2*keptEvents {
		t.Errorf("%d events of this week are kept, of %d", n, 2*keptEvents)
	}
	l.mu.Lock()
	l.events = slices.Repeat(l.events, 6)
	from := l.toKeep(now)
	l.mu.Unlock()
	if n := 12*keptEvents - from; n != mostEvents {
		t.Errorf("%d are kept of many", n)
	}
}

// An event that is no change of state has the state that the log says, whatever its
// writer saw.
func TestStateOfANote(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	note := func(want State) {
		t.Helper()
		if err := l.add(Event{ID: "a", Kind: Updated, From: Paused, To: Paused}); err != nil {
			t.Fatal(err)
		}
		events, _, err := l.after(l.last() - 1)
		if err != nil || len(events) != 1 || events[0].From != want || events[0].To != want {
			t.Errorf("the event is %+v, %v; want %s", events, err, want)
		}
	}
	note(Paused) // nothing is known
	for _, e := range []Event{{ID: "a", To: Creating}, {ID: "a", From: Creating, To: Running}, {ID: "b", To: Creating}} {
		if err := l.add(e); err != nil {
			t.Fatal(err)
		}
	}
	note(Running)
	l.shut()
	l = openLog(t, dir)
	note(Running)
	if err := l.add(Event{ID: "a", From: Stopping, To: Stopped}); err != nil {
		t.Fatal(err)
	}
	note(Stopped)
	if len(l.states) != 1 {
		t.Errorf("states of stopped sandboxes are kept: %v", l.states)
	}
}
