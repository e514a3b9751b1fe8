package sandbox

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// until makes a sandbox with a deadline so far ahead.
func (r *rig) until(d time.Duration, req CreateRequest) ID {
	r.t.Helper()
	req.EndAt = time.Now().Add(d)
	made, err := r.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return made.ID
}

func (r *rig) setDeadline(id ID, at time.Time, then OnTimeout) Info {
	r.t.Helper()
	info, err := r.SetDeadline(r.t.Context(), id, at, then)
	if err != nil {
		r.t.Fatal(err)
	}
	return info
}

// pass lets time pass, and what is due happen.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// A deadline acts to the moment, and no activity moves it.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.exec = func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			select {
			case <-time.After(cmd.Timeout):
				return guest.Result{}, nil
			case <-ctx.Done():
				return guest.Result{}, context.Cause(ctx)
			}
		}
		const at = 10*time.Second + 345*time.Millisecond
		busy, idle := r.until(at, CreateRequest{}), r.until(at, CreateRequest{Timeout: 4 * time.Second})
		paused := r.until(at, CreateRequest{})
		asleep := r.until(at, CreateRequest{OnEnd: HibernateOnTimeout, Timeout: time.Hour})
		stood := r.until(at, CreateRequest{OnEnd: HibernateOnTimeout})
		for _, id := range []ID{paused, stood} {
			if err := r.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		ended := make(chan error, 1)
		go func() {
			_, err := r.Exec(context.Background(), busy, Command{Cmd: "sleep", Timeout: time.Minute})
			ended <- err
		}()
		pass(6 * time.Second)
		if info := r.wantState(idle, Stopped); info.Reason != Expired || info.Detail != "" { // it was the first of the two
			t.Errorf("reason %s, %q", info.Reason, info.Detail)
		}
		pass(at - 6*time.Second - time.Millisecond)
		for id, state := range map[ID]State{busy: Running, asleep: Running, paused: Paused, stood: Paused} {
			r.wantState(id, state)
		}
		pass(time.Millisecond)
		for _, id := range []ID{busy, paused} {
			if info := r.wantState(id, Stopped); info.Reason != Expired || !strings.Contains(info.Detail, "deadline") {
				t.Errorf("reason %s, %q", info.Reason, info.Detail)
			}
		}
		if err := <-ended; err == nil {
			t.Error("the command outlived its sandbox")
		}
		r.wantState(asleep, Hibernated)
		r.wantState(stood, Hibernated)
		pass(24 * time.Hour)
		if info := r.wantState(asleep, Hibernated); !info.ExpiresAt.IsZero() {
			t.Errorf("a hibernated sandbox expires at %s", info.ExpiresAt)
		}
		// One that passed during the hibernation is void.
		if err := r.Resume(t.Context(), asleep); err != nil {
			t.Fatal(err)
		}
		pass(30 * time.Minute)
		if info := r.wantState(asleep, Running); !info.EndAt.IsZero() {
			t.Errorf("after the resume its deadline is %s", info.EndAt)
		}
	})
}

func TestSetDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.until(time.Minute, CreateRequest{})
		pass(50 * time.Second)
		later := time.Now().Add(2*time.Minute + 1234567*time.Nanosecond)
		if info := r.setDeadline(id, later, ""); !info.EndAt.Equal(later.Truncate(time.Millisecond)) || !info.ExpiresAt.Equal(info.EndAt) {
			t.Errorf("the deadline is %s, want %s", info.EndAt, later)
		}
		pass(119 * time.Second)
		r.wantState(id, Running)
		r.setDeadline(id, time.Time{}, "") // never
		pass(time.Hour)
		r.wantState(id, Running)
		r.setDeadline(id, time.Now(), HibernateOnTimeout) // now
		synctest.Wait()
		r.wantState(id, Hibernated)
		r.setDeadline(id, time.Now().Add(10*time.Second), DestroyOnTimeout) // for when it runs again
		pass(5 * time.Second)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		pass(4 * time.Second)
		r.wantState(id, Running)
		pass(time.Second)
		r.wantState(id, Stopped)
		_, err := r.SetDeadline(t.Context(), id, time.Time{}, "")
		wantClass(t, err, errdefs.WrongState)

		id = r.create()
		for _, bad := range []struct {
			at   time.Time
			then OnTimeout
		}{{time.Now().Add(MaxTimeout + time.Second), ""}, {time.Time{}, "explode"}} {
			_, err := r.SetDeadline(t.Context(), id, bad.at, bad.then)
			wantClass(t, err, errdefs.InvalidArgument)
		}
		for _, bad := range []CreateRequest{
			{EndAt: time.Now()}, {EndAt: time.Now().Add(-time.Hour)}, {EndAt: time.Now().Add(MaxTimeout + time.Second)}, {OnEnd: "explode"},
		} {
			_, err := r.Create(t.Context(), bad)
			wantClass(t, err, errdefs.InvalidArgument)
		}
		if n := len(r.List(false)); n != 1 {
			t.Errorf("%d sandboxes", n)
		}
		r.until(MaxTimeout, CreateRequest{})
	})
}

// A call that moves the deadline while another operation has the sandbox waits for it,
// and counts: what the janitor saw before is judged again.
func TestDeadlineMovedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.until(10*time.Second, CreateRequest{})
		r.faults.on("pause", func(context.Context) error { time.Sleep(20 * time.Second); return nil })
		go r.Pause(context.Background(), id)
		pass(9 * time.Second)
		moved := make(chan error, 1)
		go func() {
			_, err := r.SetDeadline(context.Background(), id, time.Now().Add(time.Hour), "")
			moved <- err
		}()
		pass(15 * time.Second)
		if err := <-moved; err != nil {
			t.Fatal(err)
		}
		pass(59*time.Minute + 44*time.Second)
		if s := r.wantAny(id); s != Running && s != Paused {
			t.Errorf("it is %s", s)
		}
		pass(2 * time.Second)
		r.wantState(id, Stopped)
	})
}

// A sandbox that is not hibernated at its deadline is kept, paused, and it is tried
// again, also by the next agent; its idle timeout does not destroy it.
func TestFailedHibernationAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.until(10*time.Second, CreateRequest{OnEnd: HibernateOnTimeout, Timeout: 11 * time.Second})
		r.driver.Inject(vmmtest.OpSnapshot, 1, vmmtest.Fault{Err: errFault})
		pass(10 * time.Second)
		r.wantState(id, Paused)
		pass(3 * time.Second)
		r.wantState(id, Hibernated)

		id = r.until(10*time.Second, CreateRequest{OnEnd: HibernateOnTimeout})
		at := r.wantState(id, Running).EndAt
		r.driver.Inject(vmmtest.OpSnapshot, 1, vmmtest.Fault{Err: errFault})
		pass(10 * time.Second)
		r.wantState(id, Paused)
		r.die()
		r.start()
		if info := r.wantState(id, Paused); !info.EndAt.Equal(at) || info.OnEnd != HibernateOnTimeout {
			t.Errorf("the next agent has the deadline %s, %s", info.EndAt, info.OnEnd)
		}
		pass(2 * time.Second)
		r.wantState(id, Hibernated)
	})
}

// A hibernation that fails for ever at the idle timeout does not outlast a deadline
// that destroys.
func TestDeadlineAfterFailedHibernations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.until(20*time.Second, CreateRequest{Timeout: 5 * time.Second, OnTimeout: HibernateOnTimeout})
		r.faults.on("snapshot", func(context.Context) error { return errFault })
		pass(19 * time.Second)
		r.wantState(id, Running)
		pass(time.Second)
		r.wantState(id, Stopped)
	})
}

// While no agent ran, both the idle timeout and the deadline passed: what came first
// counts.
func TestBothPassed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		first := r.until(20*time.Second, CreateRequest{Timeout: 10 * time.Second, OnTimeout: HibernateOnTimeout})
		second := r.until(10*time.Second, CreateRequest{Timeout: 20 * time.Second, OnEnd: HibernateOnTimeout})
		ends := r.until(10*time.Second, CreateRequest{Timeout: 20 * time.Second, OnTimeout: HibernateOnTimeout})
		r.die()
		pass(time.Minute)
		r.start()
		pass(2 * time.Second)
		r.wantState(first, Hibernated)
		r.wantState(second, Hibernated)
		r.wantState(ends, Stopped)
	})
}

// A sandbox made of a waiting guest and a fork have the deadline, too.
func TestDeadlineOfAForkAndFromThePool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		r.create()
		r.fillPool()
		made, err := r.Create(t.Context(), CreateRequest{EndAt: time.Now().Add(time.Minute), OnEnd: HibernateOnTimeout})
		if err != nil || made.From != FromWarm || made.EndAt.IsZero() {
			t.Fatalf("from %s, deadline %s, %v", made.From, made.EndAt, err)
		}
		forked, err := r.Fork(t.Context(), made.ID, ForkRequest{Count: 1})
		if err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		r.wantState(made.ID, Hibernated)
		r.wantState(forked.Sandboxes[0].ID, Hibernated)
	})
}
