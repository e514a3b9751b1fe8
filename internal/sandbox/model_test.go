package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// expected are the classes that a caller may meet when others are at work.
var expected = []*errdefs.Class{
	errdefs.NotFound, errdefs.WrongState, errdefs.Busy, errdefs.Unavailable, errdefs.Exhausted, errdefs.AlreadyExists,
}

func isExpected(err error) bool {
	for _, class := range expected {
		if errors.Is(err, class) {
			return true
		}
	}
	return err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// TestManyAtOnce lets 120 callers do what they like with the same sandboxes
// while VMs die, and then looks whether the story adds up.
func TestManyAtOnce(t *testing.T) {
	for _, warm := range []int{0, 5} {
		t.Run(fmt.Sprintf("warm %d", warm), func(t *testing.T) { testManyAtOnce(t, warm) })
	}
}

func testManyAtOnce(t *testing.T, warm int) {
	const callers, steps = 120, 60
	r := newRig(t, func(c *Config) {
		c.Capacity.Sandboxes, c.Capacity.Starts = 40, 8
		c.Warm, c.poolCalm = warm, time.Nanosecond
	})
	r.exec = func(ctx context.Context, _ guest.Command) (guest.Result, error) {
		select {
		case <-time.After(time.Duration(rand.IntN(2000)) * time.Microsecond):
			return guest.Result{}, nil
		case <-ctx.Done():
			return guest.Result{}, context.Cause(ctx)
		}
	}
	any := func() ID {
		if infos := r.List(rand.IntN(4) == 0); len(infos) > 0 {
			return infos[rand.IntN(len(infos))].ID
		}
		return "sb-0000000000000000"
	}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for range steps {
				ctx, cancel := context.WithCancel(context.Background())
				if rand.IntN(5) == 0 { // some callers lose patience
					ctx, cancel = context.WithTimeout(ctx, time.Duration(rand.IntN(3000))*time.Microsecond)
				}
				var err error
				what := ""
				name := []string{"red", "green", "blue"}[rand.IntN(3)]
				switch rand.IntN(17) {
				case 0, 1:
					what = "create"
					_, err = r.Create(ctx, anyLife())
				case 2, 3:
					what = "exec"
					_, err = r.Exec(ctx, any(), Command{Cmd: "x"})
				case 4:
					what = "pause"
					err = r.Pause(ctx, any())
				case 6:
					what = "destroy"
					err = r.Destroy(ctx, any())
				case 7:
					what = "timeout"
					_, err = r.SetTimeout(ctx, any(), time.Duration(1+rand.IntN(3600))*time.Second)
				case 8:
					what = "sweep"
					janitor{r.Manager}.sweep(time.Now().Add(time.Duration(rand.IntN(3600)) * time.Second))
				case 9:
					what = "vm death"
					if rand.IntN(4) == 0 {
						r.host.Die(string(any()))
					}
					if waiting := r.waiting(); len(waiting) > 0 && rand.IntN(4) == 0 {
						r.host.Die(waiting[rand.IntN(len(waiting))])
					}
				case 10:
					what = "snapshot"
					_, err = r.Snapshot(ctx, any(), SnapshotRequest{Name: name, New: true})
				case 11:
					what = "create from a snapshot"
					_, err = r.Create(ctx, CreateRequest{Template: name})
				case 12:
					what = "delete a snapshot"
					err = r.DeleteSnapshot(r.t.Context(), "", name)
				default:
					what, err = r.comeAndGo(ctx, any())
				}
				cancel()
				if !isExpected(err) {
					t.Errorf("%s: %v", what, err)
				}
				r.wantInvariants(t)
			}
		})
	}
	wg.Wait()
	for _, info := range r.List(true) {
		if err := r.Destroy(t.Context(), info.ID); err != nil && !errors.Is(err, errdefs.NotFound) {
			t.Errorf("destroy: %v", err)
		}
	}
	if warm > 0 {
		if err := r.Shutdown(t.Context(), false); err != nil {
			t.Error(err)
		}
	}
	r.wantNothing()
	r.wantLegalHistory(t)
}

// anyLife asks for a sandbox that lives for an hour or for ever.
func anyLife() CreateRequest {
	then := []OnTimeout{DestroyOnTimeout, HibernateOnTimeout}[rand.IntN(2)]
	return CreateRequest{Life: time.Duration(rand.IntN(2)) * time.Hour, OnEnd: then, AutoResume: rand.IntN(2) == 0}
}

// comeAndGo does one of the things by which a sandbox goes to sleep, wakes up or ends.
func (r *rig) comeAndGo(ctx context.Context, id ID) (what string, err error) {
	switch rand.IntN(5) {
	case 0:
		_, _, err = r.Connect(ctx, id, ConnectRequest{Timeout: time.Duration(rand.IntN(3600)) * time.Second})
		return "connect", err
	case 1:
		at := time.Now().Add(time.Duration(rand.IntN(20)-2) * time.Millisecond)
		return "another end", r.SetEnd(ctx, id, at, rand.IntN(2) == 0)
	case 2:
		return "wake", r.Wake(ctx, id)
	case 3:
		return "resume", r.Resume(ctx, id)
	default:
		return "hibernate", r.Hibernate(ctx, id, Hibernation{FilesOnly: rand.IntN(2) == 0})
	}
}

// wantInvariants holds at any moment: no two sandboxes share an address, and
// nothing exceeds the limits.
func (r *rig) wantInvariants(t *testing.T) {
	t.Helper()
	seen := map[string]ID{}
	for _, info := range r.List(false) {
		if info.State == Stopping || info.State == Stopped || !info.HostIP.IsValid() {
			continue
		}
		key := info.HostIP.String()
		if other, ok := seen[key]; ok {
			// The list is no single moment: look again before crying.
			a, errA := r.Get(other)
			b, errB := r.Get(info.ID)
			if errA == nil && errB == nil && a.HostIP == b.HostIP && a.HostIP.IsValid() &&
				a.State != Stopping && a.State != Stopped && b.State != Stopping && b.State != Stopped {
				t.Errorf("sandboxes %s and %s share %s", other, info.ID, key)
			}
		}
		seen[key] = info.ID
	}
	if taken := r.taken(); taken.Sandboxes < 0 || taken.Sandboxes > r.cfg.Capacity.Sandboxes || taken.MemMiB < 0 {
		t.Errorf("capacity in use: %+v", taken)
	}
}

// wantLegalHistory reads the events, twice: each sandbox's states follow one
// another as the table allows.
func (r *rig) wantLegalHistory(t *testing.T) {
	t.Helper()
	read := func() (events []Event) {
		if err := r.Events(context.Background(), 0, false, func(e Event) error {
			events = append(events, e)
			return nil
		}); err != nil {
			t.Errorf("events: %v", err)
		}
		return events
	}
	events := read()
	if again := read(); len(again) != len(events) {
		t.Errorf("%d events, then %d", len(events), len(again))
	}
	last := map[ID]State{}
	for i, e := range events {
		if i > 0 && e.Cursor <= events[i-1].Cursor {
			t.Errorf("cursor %d follows %d", e.Cursor, events[i-1].Cursor)
		}
		from, known := last[e.ID]
		if e.Kind != "" && from == Stopped { // its copy was made, and it has ended since
			continue
		}
		legal := !known && e.To == Creating && e.From == "" ||
			known && e.From == from && (e.To == Unknown || from == Unknown || e.To == from && (e.Reason == "" || e.Reason.passes()))
		for _, to := range moves[from] {
			legal = legal || known && e.From == from && e.To == to
		}
		if !legal {
			t.Errorf("sandbox %s went from %s to %s (event says from %s)", e.ID, from, e.To, e.From)
		}
		last[e.ID] = e.To
	}
}

// TestModel holds the manager against a model that anybody can read, in every
// order that chance comes up with; an agent may die between any two steps.
func TestModel(t *testing.T) {
	for _, warm := range []int{0, 2} {
		t.Run(fmt.Sprintf("warm %d", warm), func(t *testing.T) { testModel(t, warm) })
	}
}

func testModel(t *testing.T, warm int) {
	synctest.Test(t, func(t *testing.T) {
		// Without t's Deadline, which a bubble does not have.
		rapid.Check(struct{ rapid.TB }{t}, func(rt *rapid.T) {
			r := newRig(t, func(c *Config) { c.Warm = warm })
			var graves []chan struct{} // of what an agent did when it died
			defer func() {
				for _, grave := range graves {
					close(grave)
				}
			}()
			model := map[ID]State{}
			snapshots := map[string]bool{}
			type broken struct {
				record []byte
				state  State
			}
			spoiled := map[ID]broken{}
			pick := func(rt *rapid.T) ID {
				var ids []ID
				for _, info := range r.List(true) {
					ids = append(ids, info.ID)
				}
				ids = append(ids, "sb-0000000000000000")
				return rapid.SampledFrom(ids).Draw(rt, "sandbox")
			}
			want := func(rt *rapid.T, what string, id ID, err error, in ...State) bool {
				state, known := model[id]
				ok := false
				for _, s := range in {
					ok = ok || known && s == state
				}
				switch {
				case ok && err != nil:
					rt.Fatalf("%s of a %s sandbox: %v", what, state, err)
				case !known && !errors.Is(err, errdefs.NotFound):
					rt.Fatalf("%s of an unknown sandbox: %v", what, err)
				case known && !ok && !errors.Is(err, errdefs.WrongState):
					rt.Fatalf("%s of a %s sandbox: %v", what, state, err)
				}
				return ok
			}
			m := modelled{r, model, map[ID]modelledEnd{}, map[string]ID{}, pick, want}
			rt.Repeat(m.with(map[string]func(*rapid.T){
				"create": func(rt *rapid.T) {
					if len(model) > 8 {
						rt.Skip()
					}
					info, err := r.Create(t.Context(), CreateRequest{})
					if err != nil {
						rt.Fatal(err)
					}
					model[info.ID] = Running
				},
				"time passes": func(rt *rapid.T) {
					time.Sleep(time.Duration(rapid.IntRange(1, 5000).Draw(rt, "ms")) * time.Millisecond)
					synctest.Wait()
				},
				"waiting vm dies": func(rt *rapid.T) {
					for _, id := range r.waiting() {
						r.host.Die(id)
						break
					}
					synctest.Wait()
				},
				"failing create": func(rt *rapid.T) {
					if warm > 0 {
						rt.Skip() // it might be the pool's
					}
					// Hooks, for an injected fault that does not come to pass waits.
					for _, step := range []string{"start", "restore"} {
						r.faults.on(step, func(context.Context) error { return errFault })
					}
					if _, err := r.Create(t.Context(), CreateRequest{}); !errors.Is(err, errFault) {
						rt.Fatal(err)
					}
					for _, step := range []string{"start", "restore"} {
						r.faults.on(step, nil)
					}
					for _, info := range r.List(true) {
						if _, known := model[info.ID]; !known {
							model[info.ID] = Stopped
						}
					}
				},
				"destroy": func(rt *rapid.T) {
					id := pick(rt)
					if want(rt, "destroy", id, r.Destroy(t.Context(), id), Running, Paused, Hibernated, Stopped, Unknown) {
						delete(model, id)
						delete(spoiled, id)
					}
				},
				"snapshot": func(rt *rapid.T) {
					id, name := pick(rt), rapid.SampledFrom([]string{"red", "green"}).Draw(rt, "name")
					_, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: name, New: true})
					if state, known := model[id]; known && state != Unknown && snapshots[name] {
						if !errors.Is(err, errdefs.AlreadyExists) {
							rt.Fatalf("snapshot under a name that is taken: %v", err)
						}
					} else if want(rt, "snapshot", id, err, Running, Paused) {
						snapshots[name] = true
					}
				},
				"create from a snapshot": func(rt *rapid.T) {
					if len(model) > 8 {
						rt.Skip()
					}
					name := rapid.SampledFrom([]string{"red", "green"}).Draw(rt, "name")
					info, err := r.Create(t.Context(), CreateRequest{Template: name})
					if !snapshots[name] {
						if !errors.Is(err, errdefs.NotFound) {
							rt.Fatalf("create from nothing: %v", err)
						}
						return
					}
					if err != nil {
						rt.Fatal(err)
					}
					model[info.ID] = Running
				},
				"delete a snapshot": func(rt *rapid.T) {
					name := rapid.SampledFrom([]string{"red", "green"}).Draw(rt, "name")
					if err := r.DeleteSnapshot(r.t.Context(), "", name); (err == nil) != snapshots[name] {
						rt.Fatalf("delete a snapshot: %v", err)
					}
					delete(snapshots, name)
				},
				"vm dies": func(rt *rapid.T) {
					id := pick(rt)
					r.host.Die(string(id))
					synctest.Wait()
					if s := model[id]; s == Running || s == Paused {
						model[id] = Stopped
					}
				},
				"agent dies": func(rt *rapid.T) {
					graves = append(graves, r.faults.grave)
					r.die()
					r.start()
				},
				"record breaks": func(rt *rapid.T) {
					id := pick(rt)
					if s := model[id]; s != Running && s != Paused {
						rt.Skip()
					}
					graves = append(graves, r.faults.grave)
					r.die()
					data, err := os.ReadFile(r.store.record(id))
					if err != nil {
						rt.Fatal(err)
					}
					spoiled[id] = broken{data, model[id]}
					r.spoil(id, func(data []byte) []byte { return data[:len(data)/2] })
					if err := os.RemoveAll(r.store.previous(id)); err != nil {
						rt.Fatal(err)
					}
					r.start()
					model[id] = Unknown
				},
				"record is mended": func(rt *rapid.T) {
					id := pick(rt)
					was, ok := spoiled[id]
					if !ok {
						rt.Skip()
					}
					delete(spoiled, id)
					r.spoil(id, func([]byte) []byte { return was.record })
					if model[id] = was.state; !slices.Contains(r.host.Live(), string(id)) {
						model[id] = Stopped
					}
					if _, err := r.Recover(t.Context(), id); err != nil {
						rt.Fatal(err)
					}
				},
				"": func(rt *rapid.T) {
					m.settle(rt)
					infos := r.List(true)
					if len(infos) != len(model) {
						rt.Fatalf("%d sandboxes, the model has %d", len(infos), len(model))
					}
					for _, info := range infos {
						if model[info.ID] != info.State {
							rt.Fatalf("sandbox %s is %s, the model says %s", info.ID, info.State, model[info.ID])
						}
					}
					if list, err := r.Snapshots(""); err != nil || len(list) != len(snapshots) {
						rt.Fatalf("snapshots are %v, %v; the model has %v", list, err, snapshots)
					}
					r.wantConsistent()
				},
			}))
			if err := r.Shutdown(context.Background(), true); err != nil {
				rt.Fatal(err)
			}
			r.wantLegalHistory(t)
		})
	})
}

// BenchmarkList5000 is what a full host's listing costs.
// full is a manager of 5,000 sandboxes, 50 of each project.
func full() *Manager {
	m := &Manager{registry: &registry{boxes: map[ID]*box{}}}
	for i := range 5000 {
		rec := Record{ID: newID(), State: Running, CreatedAt: time.Now()}
		rec.Labels = Labels{Project: fmt.Sprint("p", i%100), Metadata: map[string]string{"user": fmt.Sprint(i % 1000)}}
		m.boxes[rec.ID] = newBox(rec)
	}
	return m
}

func BenchmarkList5000(b *testing.B) {
	m := full()
	for b.Loop() {
		if n := len(m.List(false)); n != 5000 {
			b.Fatal(n)
		}
	}
}

// BenchmarkListOwn: what a project with 50 of the host's 5,000 sandboxes waits for, and
// what a list by metadata does.
func BenchmarkListOwn(b *testing.B) {
	m, project := full(), "p7"
	for name, c := range map[string]struct {
		filter Filter
		want   int
	}{
		"project":  {Filter{Project: &project}, 50},
		"metadata": {Filter{Project: &project, Metadata: map[string]string{"user": "107"}}, 5},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if n := len(m.Select(c.filter)); n != c.want {
					b.Fatal(n)
				}
			}
		})
	}
}
