package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// made makes a sandbox.
func (r *rig) made(req CreateRequest) Info {
	r.t.Helper()
	made, err := r.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return made.Info
}

func (r *rig) connect(id ID, req ConnectRequest) (Info, bool) {
	r.t.Helper()
	info, resumed, err := r.Connect(r.t.Context(), id, req)
	if err != nil {
		r.t.Fatal(err)
	}
	return info, resumed
}

func (r *rig) hibernate(id ID) {
	r.t.Helper()
	if err := r.Hibernate(r.t.Context(), id, Hibernation{}); err != nil {
		r.t.Fatal(err)
	}
}

// endsIn fails the test unless a sandbox ends so long after a moment, to the millisecond.
func (r *rig) endsIn(info Info, from time.Time, d time.Duration) {
	r.t.Helper()
	if want := asEnd(from.Add(d)); !info.EndAt.Equal(want) {
		r.t.Errorf("the deadline is %s, want %s", info.EndAt, want)
	}
}

func TestConnectToARunningOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made := r.made(CreateRequest{Life: time.Minute, OnEnd: HibernateOnTimeout})
		r.endsIn(made, made.StartedAt, time.Minute)
		pass(10*time.Second + 123456*time.Nanosecond)
		saves := r.faults.count("record save running")
		for _, shorter := range []time.Duration{0, time.Second, 49 * time.Second} {
			info, resumed := r.connect(made.ID, ConnectRequest{Timeout: shorter})
			if resumed || !info.EndAt.Equal(made.EndAt) {
				t.Errorf("a connect for %s moved the deadline from %s to %s; resumed: %v", shorter, made.EndAt, info.EndAt, resumed)
			}
		}
		if n := r.faults.count("record save running"); n != saves {
			t.Errorf("%d records were written for nothing", n-saves)
		}
		info, _ := r.connect(made.ID, ConnectRequest{Timeout: 51 * time.Second})
		r.endsIn(info, time.Now(), 51*time.Second)
		if info.OnEnd != HibernateOnTimeout {
			t.Errorf("then it is to %s", info.OnEnd)
		}
		if info, _ = r.connect(made.ID, ConnectRequest{OnEnd: DestroyOnTimeout}); info.OnEnd != DestroyOnTimeout {
			t.Errorf("then it is to %s", info.OnEnd)
		}
		_, _, err := r.Connect(t.Context(), made.ID, ConnectRequest{Timeout: time.Hour, PausedOnly: true})
		wantClass(t, err, errdefs.WrongState)
		endless := r.create()
		if info, _ = r.connect(endless, ConnectRequest{Timeout: time.Minute}); !info.EndAt.IsZero() {
			t.Errorf("what has no deadline got one: %s", info.EndAt)
		}
		for _, bad := range []ConnectRequest{{Timeout: -1}, {Timeout: MaxTimeout + 1}, {OnEnd: "explode"}} {
			_, _, err := r.Connect(t.Context(), made.ID, bad)
			wantClass(t, err, errdefs.InvalidArgument)
		}
		pass(51 * time.Second)
		r.wantState(made.ID, Stopped)
		_, _, err = r.Connect(t.Context(), made.ID, ConnectRequest{})
		wantClass(t, err, errdefs.WrongState)
		_, _, err = r.Connect(t.Context(), "sb-0000000000000000", ConnectRequest{})
		wantClass(t, err, errdefs.NotFound)
	})
}

func TestConnectResumes(t *testing.T) {
	for name, pause := range map[string]func(*rig, ID) error{
		"paused":     func(r *rig, id ID) error { return r.Pause(r.t.Context(), id) },
		"hibernated": func(r *rig, id ID) error { return r.Hibernate(r.t.Context(), id, Hibernation{}) },
		"hibernated without memory": func(r *rig, id ID) error {
			return r.Hibernate(r.t.Context(), id, Hibernation{FilesOnly: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				made := r.made(CreateRequest{Life: time.Minute, OnEnd: HibernateOnTimeout, AutoResume: true})
				pass(10 * time.Second)
				if err := pause(r, made.ID); err != nil {
					t.Fatal(err)
				}
				asked := time.Now().UTC()
				before, _ := r.Get(made.ID)
				if !before.PausedAt.Equal(asked) || !before.StartedAt.Equal(made.StartedAt) {
					t.Errorf("paused at %s, want %s; started at %s, want %s", before.PausedAt, asked, before.StartedAt, made.StartedAt)
				}
				pass(10 * time.Second)
				r.die()
				r.start()
				again, _ := r.Get(made.ID)
				if !again.PausedAt.Equal(asked) || !again.EndAt.Equal(made.EndAt) || again.Life != time.Minute || !again.AutoResume {
					t.Errorf("the next agent has %+v", again)
				}
				info, resumed := r.connect(made.ID, ConnectRequest{Timeout: 5 * time.Second, PausedOnly: true})
				if !resumed || info.State != Running || !info.PausedAt.IsZero() || info.FilesOnly || !info.StartedAt.After(asked) {
					t.Errorf("resumed: %v, %+v", resumed, info)
				}
				r.endsIn(info, info.StartedAt, 5*time.Second) // earlier than before
				pass(5 * time.Second)
				if info = r.wantState(made.ID, Hibernated); info.OnEnd != HibernateOnTimeout { // once more
					t.Errorf("then it is to %s", info.OnEnd)
				}
				info, _ = r.connect(made.ID, ConnectRequest{Timeout: time.Minute, OnEnd: DestroyOnTimeout})
				r.endsIn(info, info.StartedAt, time.Minute)
				pass(time.Minute)
				r.wantState(made.ID, Stopped)
			})
		})
	}
}

// Ten callers at once share one resume, and the first one's leaving ends it for none.
// The longest of their times counts.
func TestManyConnectAtOnce(t *testing.T) {
	for _, first := range []string{"stays", "leaves"} {
		t.Run("the first "+first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				made := r.made(CreateRequest{Life: time.Minute})
				r.hibernate(made.ID)
				before := r.driver.Calls(vmmtest.OpRestore)
				r.faults.on("restore", func(context.Context) error { time.Sleep(10 * time.Second); return nil })
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				left := make(chan error, 1)
				go func() {
					_, _, err := r.Connect(ctx, made.ID, ConnectRequest{Timeout: 20 * time.Second})
					left <- err
				}()
				synctest.Wait()
				if first == "leaves" {
					leave()
					if err := <-left; !errors.Is(err, context.Canceled) {
						t.Errorf("the first ended with %v", err)
					}
				}
				var wg sync.WaitGroup
				for i := range 10 {
					wg.Go(func() {
						timeout := time.Duration(10+i) * 3 * time.Second
						info, resumed, err := r.Connect(t.Context(), made.ID, ConnectRequest{Timeout: timeout, PausedOnly: i%2 == 0})
						if err != nil || !resumed || info.State != Running || info.EndAt.Before(asEnd(info.StartedAt.Add(timeout))) {
							t.Errorf("caller %d: resumed %v, %s until %s, %v", i, resumed, info.State, info.EndAt, err)
						}
					})
				}
				wg.Wait()
				if first == "stays" && <-left != nil {
					t.Error("the first was refused")
				}
				if n := r.driver.Calls(vmmtest.OpRestore) - before; n != 1 {
					t.Errorf("%d resumes", n)
				}
				info := r.wantState(made.ID, Running)
				r.endsIn(info, info.StartedAt, 57*time.Second)
			})
		})
	}
}

// A resume that fails fails once, for all who wait for it: those who came during it, and
// those who came before it, during the pause.
func TestConnectFailsOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made := r.made(CreateRequest{Life: time.Minute})
		r.faults.on("snapshot", func(context.Context) error { time.Sleep(time.Second); return nil })
		r.faults.on("restore", func(context.Context) error { time.Sleep(time.Second); return errFault })
		before := r.faults.count("restore")
		hibernated := make(chan error, 1)
		go func() { hibernated <- r.Hibernate(t.Context(), made.ID, Hibernation{}) }()
		synctest.Wait()
		if info := r.wantState(made.ID, Running); !info.Pausing {
			t.Error("it is not pausing")
		}
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 150 * time.Millisecond)
				if _, _, err := r.Connect(t.Context(), made.ID, ConnectRequest{Timeout: time.Minute}); !errors.Is(err, errFault) {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if err := <-hibernated; err != nil {
			t.Fatal(err)
		}
		if n := r.faults.count("restore") - before; n != 1 {
			t.Errorf("%d resumes", n)
		}
		r.wantState(made.ID, Hibernated)
		r.faults.on("restore", nil)
		if _, resumed := r.connect(made.ID, ConnectRequest{Timeout: time.Minute}); !resumed { // a later one tries again
			t.Error("not resumed")
		}
	})
}

// What a connect cannot share with a resume under way, and what ends one.
func TestConnectDuringAResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: time.Minute}).ID
		r.hibernate(id)
		r.faults.on("restore", hang)
		connected := make(chan error, 1)
		go func() {
			_, _, err := r.Connect(t.Context(), id, ConnectRequest{Timeout: time.Minute})
			connected <- err
		}()
		synctest.Wait()
		_, _, err := r.Connect(t.Context(), id, ConnectRequest{Timeout: time.Minute, FilesOnly: true})
		wantClass(t, err, errdefs.WrongState)
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		wantClass(t, <-connected, errdefs.WrongState)
		_, _, err = r.Connect(t.Context(), id, ConnectRequest{})
		wantClass(t, err, errdefs.NotFound)
		r.wantNothing()
		r.faults.on("restore", nil)

		id = r.create()
		if err := r.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		_, _, err = r.Connect(t.Context(), id, ConnectRequest{FilesOnly: true})
		wantClass(t, err, errdefs.WrongState)
	})
}

// The end of the agent ends a shared resume, and costs nothing.
func TestConnectAtTheEndOfTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: time.Minute}).ID
		r.hibernate(id)
		r.faults.on("restore", hang)
		connected := make(chan error, 1)
		go func() {
			_, _, err := r.Connect(context.Background(), id, ConnectRequest{Timeout: time.Minute})
			connected <- err
		}()
		synctest.Wait()
		if err := r.Shutdown(t.Context(), false); err != nil {
			t.Error(err)
		}
		wantClass(t, <-connected, errdefs.Unavailable)
		r.die()
		r.start()
		r.wantState(id, Hibernated)
		r.connect(id, ConnectRequest{Timeout: time.Minute})
	})
}

func TestSetEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		ctx := t.Context()
		set := func(id ID, in time.Duration, extend bool) Info {
			t.Helper()
			if err := r.SetEnd(ctx, id, time.Now().Add(in), extend); err != nil {
				t.Fatal(err)
			}
			info, err := r.Get(id)
			if err != nil {
				t.Fatal(err)
			}
			return info
		}
		made := r.made(CreateRequest{Life: time.Minute, OnEnd: HibernateOnTimeout})
		pass(1500 * time.Microsecond)
		if info := set(made.ID, 10*time.Second, true); !info.EndAt.Equal(made.EndAt) {
			t.Errorf("an extension moved the deadline from %s to %s", made.EndAt, info.EndAt)
		}
		r.endsIn(set(made.ID, 2*time.Minute, true), time.Now(), 2*time.Minute)
		r.endsIn(set(made.ID, time.Second, false), time.Now(), time.Second)
		pass(time.Second)
		r.wantState(made.ID, Hibernated)
		wantClass(t, r.SetEnd(ctx, made.ID, time.Now().Add(time.Hour), false), errdefs.WrongState)
		info, _ := r.connect(made.ID, ConnectRequest{Timeout: time.Minute})
		if info = set(made.ID, 0, false); info.State != Hibernated && !info.Pausing { // now
			t.Errorf("it is %s", info.State)
		}
		synctest.Wait()
		r.wantState(made.ID, Hibernated)

		gone := r.made(CreateRequest{Life: time.Minute})
		if info := set(gone.ID, -time.Hour, false); info.State != Stopped || info.Reason != Expired {
			t.Errorf("it is %s, %s", info.State, info.Reason)
		}
		wantClass(t, r.SetEnd(ctx, gone.ID, time.Now(), false), errdefs.WrongState)

		endless := r.create()
		if info := set(endless, time.Minute, true); !info.EndAt.IsZero() {
			t.Errorf("the extension of what has no end made one: %s", info.EndAt)
		}
		r.endsIn(set(endless, time.Minute, false), time.Now(), time.Minute)
		wantClass(t, r.SetEnd(ctx, endless, time.Time{}, false), errdefs.InvalidArgument)
		wantClass(t, r.SetEnd(ctx, endless, time.Now().Add(MaxTimeout+time.Second), false), errdefs.InvalidArgument)
		if err := r.Pause(ctx, endless); err != nil {
			t.Fatal(err)
		}
		wantClass(t, r.SetEnd(ctx, endless, time.Now().Add(time.Hour), true), errdefs.WrongState)
	})
}

func TestWake(t *testing.T) {
	for name, c := range map[string]struct {
		req  CreateRequest
		what func(*rig, ID) error
		want *errdefs.Class
		life time.Duration
	}{
		"short life":       {CreateRequest{Life: time.Second, AutoResume: true}, nil, nil, minWokenLife},
		"long life":        {CreateRequest{Life: time.Hour, AutoResume: true}, nil, nil, time.Hour},
		"too long a life":  {CreateRequest{Life: 5 * time.Hour, AutoResume: true}, nil, nil, 4 * time.Hour},
		"not asked for":    {CreateRequest{Life: time.Second}, nil, errdefs.WrongState, 0},
		"files at its end": {CreateRequest{Life: time.Second, AutoResume: true}, (*rig).endWithFiles, errdefs.WrongState, 0},
		"files alone": {CreateRequest{Life: time.Minute, AutoResume: true}, func(r *rig, id ID) error {
			return r.Hibernate(r.t.Context(), id, Hibernation{FilesOnly: true})
		}, errdefs.WrongState, 0},
		"paused in memory": {CreateRequest{Life: time.Minute}, func(r *rig, id ID) error {
			return r.Pause(r.t.Context(), id)
		}, errdefs.WrongState, 0},
		"ended": {CreateRequest{Life: time.Minute, AutoResume: true}, func(r *rig, id ID) error {
			return r.SetEnd(r.t.Context(), id, time.Now(), false)
		}, errdefs.WrongState, 0},
		"gone": {CreateRequest{Life: time.Minute, AutoResume: true}, func(r *rig, id ID) error {
			return r.Destroy(r.t.Context(), id)
		}, errdefs.NotFound, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(c *Config) { c.MaxLife = 4 * time.Hour })
				made := r.made(c.req)
				if c.what == nil {
					r.hibernate(made.ID)
				} else if err := c.what(r, made.ID); err != nil {
					t.Fatal(err)
				}
				before := r.driver.Calls(vmmtest.OpRestore)
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() { wantClass(t, r.Wake(t.Context(), made.ID), c.want) })
				}
				wg.Wait()
				if c.want != nil {
					return
				}
				if n := r.driver.Calls(vmmtest.OpRestore) - before; n != 1 {
					t.Errorf("%d resumes", n)
				}
				info := r.wantState(made.ID, Running)
				r.endsIn(info, info.StartedAt, c.life)
				pass(time.Second)
				if err := r.Wake(t.Context(), made.ID); err != nil { // it runs
					t.Error(err)
				}
				if again := r.wantState(made.ID, Running); !again.EndAt.Equal(info.EndAt) {
					t.Errorf("traffic moved the deadline to %s", again.EndAt)
				}
			})
		})
	}
}

// A call resumes what is paused in memory, too, once for all; a sandbox that may live for
// ever gets no deadline by it.
func TestCallsWake(t *testing.T) {
	for name, asleep := range map[string]func(*rig, ID) error{
		"paused":     func(r *rig, id ID) error { return r.Pause(r.t.Context(), id) },
		"hibernated": func(r *rig, id ID) error { return r.Hibernate(r.t.Context(), id, Hibernation{}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				id, other := r.made(CreateRequest{AutoResume: true}).ID, r.made(CreateRequest{}).ID
				for _, id := range []ID{id, other} {
					if err := asleep(r, id); err != nil {
						t.Fatal(err)
					}
				}
				before := r.driver.Calls(vmmtest.OpRestore) + r.driver.Calls(vmmtest.OpResume)
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() {
						if _, err := r.Exec(t.Context(), id, Command{Cmd: "true"}); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				want := map[string]int{"paused": 1, "hibernated": 2}[name] // a restored VM is resumed
				if n := r.driver.Calls(vmmtest.OpRestore) + r.driver.Calls(vmmtest.OpResume) - before; n != want {
					t.Errorf("%d calls of the driver, want %d", n, want)
				}
				if info := r.wantState(id, Running); !info.EndAt.IsZero() {
					t.Errorf("it ends at %s", info.EndAt)
				}
				_, err := r.Exec(t.Context(), other, Command{Cmd: "true"})
				wantClass(t, err, errdefs.WrongState)
				r.wantState(other, map[string]State{"paused": Paused, "hibernated": Hibernated}[name])
			})
		})
	}
}

// endWithFiles hibernates a sandbox and has it keep the files alone at its next end.
func (r *rig) endWithFiles(id ID) error {
	if _, err := r.SetDeadline(r.t.Context(), id, time.Now().Add(time.Hour), HibernateFilesOnTimeout); err != nil {
		return err
	}
	return r.Hibernate(r.t.Context(), id, Hibernation{})
}

// Traffic waits for a pause in progress, a minute at most; and learns that the host has
// no room.
func TestWakeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Capacity.MemMiB = 1000 })
		id := r.made(CreateRequest{Life: time.Minute, AutoResume: true, OnEnd: HibernateOnTimeout}).ID
		for took, want := range map[time.Duration]*errdefs.Class{59 * time.Second: nil, 61 * time.Second: errdefs.Busy} {
			r.faults.on("snapshot", func(context.Context) error { time.Sleep(took); return nil })
			go r.Hibernate(context.Background(), id, Hibernation{})
			synctest.Wait()
			wantClass(t, r.Wake(t.Context(), id), want)
			pass(2 * time.Second)
		}
		r.faults.on("snapshot", nil)
		info := r.wantAny(id)
		if info == Running {
			r.hibernate(id)
		}
		r.create()
		wantClass(t, r.Wake(t.Context(), id), errdefs.Exhausted)
		r.wantState(id, Hibernated)
	})
}

// Traffic does not have a sandbox that cannot be resumed read again and again; a connect
// tries at once.
func TestWakeAfterAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: time.Minute, AutoResume: true}).ID
		r.hibernate(id)
		r.faults.on("restore", func(context.Context) error { return errFault })
		before := r.faults.count("restore")
		for range 50 { // in five seconds
			if err := r.Wake(t.Context(), id); !errors.Is(err, errFault) {
				t.Errorf("%v", err)
			}
			pass(100 * time.Millisecond)
		}
		if n := r.faults.count("restore") - before; n != 1 {
			t.Errorf("%d resumes", n)
		}
		if _, _, err := r.Connect(t.Context(), id, ConnectRequest{}); !errors.Is(err, errFault) {
			t.Errorf("%v", err)
		}
		if n := r.faults.count("restore") - before; n != 2 {
			t.Errorf("%d resumes", n)
		}
		r.faults.on("restore", nil)
		pass(5 * time.Second)
		if err := r.Wake(t.Context(), id); err != nil {
			t.Error(err)
		}
	})
}

// Traffic resumes a sandbox that stands still because it could not be hibernated.
func TestWakeOfWhatCouldNotHibernate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: 10 * time.Second, AutoResume: true, OnEnd: HibernateOnTimeout}).ID
		r.faults.on("snapshot", func(context.Context) error { return errFault })
		pass(10 * time.Second)
		if info := r.wantState(id, Paused); !info.Pausing {
			t.Errorf("it is not pausing: %+v", info)
		}
		if err := r.Wake(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		info := r.wantState(id, Running)
		r.endsIn(info, time.Now(), minWokenLife)
		if info.Pausing || !info.PausedAt.IsZero() {
			t.Errorf("it is pausing still: %+v", info)
		}
	})
}

// Traffic that comes between the deadline and the pause keeps the sandbox running.
func TestWakeAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: 10 * time.Second, AutoResume: true, OnEnd: HibernateOnTimeout}).ID
		r.faults.on("snapshot", func(context.Context) error { return errFault })
		r.faults.on("pause", func(context.Context) error { return errFault })
		pass(10 * time.Second)
		if info := r.wantState(id, Running); !info.Pausing {
			t.Errorf("it is not pausing: %+v", info)
		}
		if err := r.Wake(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		info := r.wantState(id, Running)
		r.endsIn(info, time.Now(), minWokenLife)
		if info.Pausing {
			t.Error("it is pausing still")
		}
	})
}

// A deadline that hibernates never ends a sandbox, however often and for what reason it
// fails; until it succeeds the sandbox stands still.
func TestRefusedHibernationAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		refused := r.made(CreateRequest{Life: 10 * time.Second, OnEnd: HibernateOnTimeout}).ID
		r.faults.on("snapshot", func(context.Context) error { return errdefs.Unavailable.Errorf("the vmm does not answer") })
		pass(10 * time.Second)
		if info := r.wantState(refused, Paused); info.PausedAt.IsZero() || !r.host.Paused(string(refused)) {
			t.Errorf("paused at %s, its VM: %v", info.PausedAt, r.host.Paused(string(refused)))
		}
		pass(time.Hour)
		r.wantState(refused, Paused)
		if n := r.faults.count("snapshot"); n < 60 {
			t.Errorf("%d attempts", n)
		}
		r.die()
		r.faults.on("snapshot", func(context.Context) error { return errFault })
		r.start()
		pass(time.Hour)
		r.wantState(refused, Paused)
		if info, resumed := r.connect(refused, ConnectRequest{Timeout: 5 * time.Second}); !resumed || info.Pausing {
			t.Errorf("resumed %v: %+v", resumed, info)
		}
		r.faults.on("snapshot", nil)
		pass(5 * time.Second)
		r.wantState(refused, Hibernated)

		// Not even its VM can be stopped: it runs on, and reads as what it is to be.
		stuck := r.made(CreateRequest{Life: 10 * time.Second, OnEnd: HibernateFilesOnTimeout}).ID
		r.faults.on("pause", func(context.Context) error { return errFault })
		pass(time.Hour)
		if info := r.wantAny(stuck); info != Running {
			t.Errorf("it is %s", info)
		}
		if info, _ := r.Get(stuck); !info.Pausing {
			t.Error("it is not pausing")
		}
		r.faults.on("pause", nil)
		pass(2 * time.Minute)
		if info := r.wantState(stuck, Hibernated); !info.FilesOnly {
			t.Error("its memory was kept")
		}
	})
}

// As many expire at the same time as may, all expire soon, and those that wait for their
// turn read as paused.
func TestManyExpireAtOnce(t *testing.T) {
	const many = 3*expireMost + 1
	for _, then := range []OnTimeout{DestroyOnTimeout, HibernateOnTimeout} {
		t.Run(string(then), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				at := time.Now().Add(time.Minute)
				for range many {
					r.made(CreateRequest{EndAt: at, OnEnd: then})
				}
				var mu sync.Mutex
				now, most := 0, 0
				r.faults.on("kill", func(context.Context) error {
					mu.Lock()
					now++
					most = max(most, now)
					mu.Unlock()
					time.Sleep(100 * time.Millisecond)
					mu.Lock()
					now--
					mu.Unlock()
					return nil
				})
				pass(time.Until(at))
				for _, info := range r.List(true) {
					if then == HibernateOnTimeout && info.State == Running && !info.Pausing {
						t.Error("a sandbox that waits for its turn does not read as pausing")
					}
				}
				pass(450 * time.Millisecond)
				want := map[OnTimeout]State{DestroyOnTimeout: Stopped, HibernateOnTimeout: Hibernated}[then]
				if n := r.Stats().States[want]; n != many {
					t.Errorf("%d of %d are %s", n, many, want)
				}
				if most != expireMost {
					t.Errorf("%d at the same time, want %d", most, expireMost)
				}
			})
		})
	}
}

// Guests that take their time to hibernate keep no other sandbox from its end.
func TestSlowHibernationsDelayNoEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range expireMost + 1 {
			r.made(CreateRequest{Life: time.Minute, OnEnd: HibernateOnTimeout})
		}
		ends := r.made(CreateRequest{Life: time.Minute + time.Second}).ID
		r.faults.on("guest.freeze", hang)
		pass(time.Minute + time.Second)
		if info := r.wantState(ends, Stopped); info.Reason != Expired {
			t.Errorf("it %s", info.Reason)
		}
		pass(5 * time.Minute)
		if n := r.Stats().States[Hibernated]; n != expireMost+1 {
			t.Errorf("%d are hibernated", n)
		}
	})
}

// While another operation has the sandbox at its deadline, it reads as pausing.
func TestPausingBehindAnOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: 10 * time.Second, OnEnd: HibernateOnTimeout}).ID
		r.faults.on("snapshot.overlay", func(context.Context) error { time.Sleep(15 * time.Second); return nil })
		snapshot := make(chan error, 1)
		go func() {
			_, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: "snap"})
			snapshot <- err
		}()
		pass(9 * time.Second)
		if info := r.wantState(id, Running); info.Pausing {
			t.Error("it is pausing already")
		}
		pass(time.Second)
		if info := r.wantState(id, Running); !info.Pausing {
			t.Error("it is not pausing")
		}
		if err := <-snapshot; err != nil {
			t.Fatal(err)
		}
		pass(time.Second)
		r.wantState(id, Hibernated)
	})
}

// An id belongs to one sandbox for ever.
func TestCreateWithAnID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, warmOne)
		r.create()
		r.fillPool()
		free := r.taken()
		id := r.NewID()
		const same = 5
		results := make(chan error, same)
		for range same {
			go func() {
				made, err := r.Create(t.Context(), CreateRequest{ID: id, Life: time.Hour})
				if err == nil && made.ID != id {
					err = fmt.Errorf("made %s", made.ID)
				}
				results <- err
			}()
		}
		made := 0
		for range same {
			if err := <-results; err == nil {
				made++
			} else {
				wantClass(t, err, errdefs.AlreadyExists)
			}
		}
		if made != 1 {
			t.Errorf("%d sandboxes", made)
		}
		again := func(why string) {
			t.Helper()
			before := r.taken()
			if _, err := r.Create(t.Context(), CreateRequest{ID: id}); errdefs.ClassOf(err) != errdefs.AlreadyExists {
				t.Errorf("%s: %v", why, err)
			}
			if r.taken() != before {
				t.Errorf("%s: the refused create takes %+v", why, r.taken().minus(before))
			}
		}
		again("it runs")
		r.hibernate(id)
		again("it is hibernated")
		r.die()
		r.start()
		r.fillPool()
		again("after the agent's death")
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		again("it has existed")
		r.die()
		r.start()
		r.fillPool()
		again("it existed under an agent before")
		if took := r.taken(); took != free {
			t.Errorf("it takes %+v, want %+v", took, free)
		}
		_, err := r.Create(t.Context(), CreateRequest{ID: "sb-nonsense"})
		wantClass(t, err, errdefs.InvalidArgument)
		// A create that failed has used the id up, too.
		id = r.NewID()
		r.faults.on("guest.init", func(context.Context) error { return errFault })
		if _, err := r.Create(t.Context(), CreateRequest{ID: id}); !errors.Is(err, errFault) {
			t.Error(err)
		}
		r.faults.on("guest.init", nil)
		again("a create with it failed")
	})
}

func TestLifeOfACreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, warmOne)
		r.create()
		r.fillPool()
		slow := func(context.Context) error { time.Sleep(7 * time.Second); return nil }
		r.faults.on("guest.init", slow)
		for from, id := range map[string]ID{FromWarm: "", FromReady: r.NewID()} { // an id is no waiting guest's
			created, err := r.Create(t.Context(), CreateRequest{ID: id, Life: 5 * time.Second})
			if err != nil || created.From != from {
				t.Fatalf("from %s, %v", created.From, err)
			}
			r.endsIn(created.Info, time.Now(), 5*time.Second) // from the moment at which it runs
			if created.Life != 5*time.Second || !created.StartedAt.Equal(time.Now()) {
				t.Errorf("%+v", created.Info)
			}
		}
		for _, bad := range []CreateRequest{
			{Life: -1}, {Life: MaxTimeout + 1}, {Life: time.Second, EndAt: time.Now().Add(time.Minute)},
			{AutoResume: true, OnEnd: HibernateFilesOnTimeout},
		} {
			_, err := r.Create(t.Context(), bad)
			wantClass(t, err, errdefs.InvalidArgument)
		}
	})
}

// A fork has a life of its own if it is given one, and its source keeps its own in any
// case.
func TestLifeOfAFork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		metadata := map[string]string{"a": "b"}
		made := r.made(CreateRequest{
			Life: time.Minute, OnEnd: HibernateOnTimeout, AutoResume: true,
			Login:  Login{Env: map[string]string{"C": "d"}},
			Labels: Labels{Project: "blue", OwnerKey: "key", Metadata: metadata},
		})
		pass(10 * time.Second)
		token, err := r.Tokens(made.ID)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{token.Envd: true}
		for life, want := range map[time.Duration]time.Duration{0: 50 * time.Second, 15 * time.Second: 15 * time.Second} {
			forked, err := r.Fork(t.Context(), made.ID, ForkRequest{Count: 2, Life: life})
			if err != nil {
				t.Fatal(err)
			}
			for _, fork := range forked.Sandboxes {
				r.endsIn(fork, time.Now(), want)
				tokens, err := r.Tokens(fork.ID)
				if err != nil || seen[tokens.Envd] {
					t.Errorf("its token is another's, %v", err)
				}
				seen[tokens.Envd] = true
				b, _ := r.find(fork.ID)
				if fork.OnEnd != HibernateOnTimeout || !fork.AutoResume || fork.Labels.Project != "blue" || fork.Labels.OwnerKey != "" ||
					fork.Labels.Metadata["a"] != "b" || b.record().Login.Env["C"] != "d" {
					t.Errorf("the fork is %+v", fork)
				}
			}
		}
		if again := r.wantState(made.ID, Running); !again.EndAt.Equal(made.EndAt) {
			t.Errorf("the source's deadline moved to %s", again.EndAt)
		}
		for _, bad := range []ForkRequest{{Count: 0}, {Count: MaxForks + 1}, {Count: 1, Life: -1}, {Count: 1, Life: MaxTimeout + 1}} {
			_, err := r.Fork(t.Context(), made.ID, bad)
			wantClass(t, err, errdefs.InvalidArgument)
		}
	})
}

func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.made(CreateRequest{Life: time.Minute, OnEnd: HibernateOnTimeout}).ID
		first, err := r.Tokens(id)
		if err != nil || first.Envd == "" || first.Traffic != "" {
			t.Errorf("%#v, %v", first, err)
		}
		pass(time.Minute)
		r.die()
		r.start()
		r.connect(id, ConnectRequest{Timeout: time.Minute, OnEnd: DestroyOnTimeout})
		if again, err := r.Tokens(id); again != first || err != nil {
			t.Errorf("the tokens changed, %v", err)
		}
		if text := fmt.Sprintf("%v %s", first, first); text != "tokens of a sandbox tokens of a sandbox" {
			t.Errorf("they print as %q", text)
		}
		pass(time.Minute)
		r.wantState(id, Stopped)
		_, err = r.Tokens(id)
		wantClass(t, err, errdefs.NotFound)
	})
}

// Of a create whose answer was lost, the next agent knows whether it was carried out.
func TestRan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		running, destroyed, expired := r.create(), r.create(), r.made(CreateRequest{Life: time.Second}).ID
		half, failed := r.NewID(), r.NewID()
		r.faults.on("guest.init", func(context.Context) error { return errFault })
		if _, err := r.Create(t.Context(), CreateRequest{ID: failed}); !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		r.faults.on("guest.init", hang)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			r.Create(ctx, CreateRequest{ID: half})
		}()
		synctest.Wait()
		if err := r.Destroy(t.Context(), destroyed); err != nil {
			t.Fatal(err)
		}
		check := func(when string) {
			t.Helper()
			for id, want := range map[ID]bool{running: true, destroyed: true, expired: true, half: false, failed: false, r.NewID(): false} {
				if got := r.Ran(id); got != want {
					t.Errorf("%s, sandbox %s ran: %v", when, id, got)
				}
			}
		}
		check("before")
		grave := r.faults.grave
		r.die()
		r.start()
		check("after the agent's death")
		pass(2 * time.Hour) // those that ended are forgotten
		check("later")
		close(grave)
		cancel()
		<-ended
	})
}
