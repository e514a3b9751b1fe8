package sandbox

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// What does not answer at the agent's start is kept as it is, told, tried again,
// and goes on when it answers.
func TestAdoptionDestroysNothing(t *testing.T) {
	silent := func(context.Context) error { return errdefs.Unavailable.Errorf("it does not answer") }
	for step, hook := range map[string]func(context.Context) error{
		"attach": silent, "resume": silent, "guest.init": silent, "network.policy": silent, "network.limits": silent, "record snapshot drop": silent,
		"attach done": func(context.Context) error { return syscall.EMFILE },
		"guest.ready": hang,
	} {
		for _, hangs := range []bool{false, true} {
			if hangs {
				if strings.HasPrefix(step, "record ") {
					continue
				}
				hook = hang
			}
			t.Run(step+map[bool]string{true: " hangs"}[hangs], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t)
					id := r.create()
					slot := r.slot(id)
					r.die()
					r.faults.on(step, hook)
					if strings.HasPrefix(step, "guest.") { // its health does not help
						r.faults.on("guest.init", hook)
						r.faults.on("guest.ready", hook)
					}
					began := time.Now()
					r.start()
					if took := time.Since(began); took > adoptTimeout+2*time.Second {
						t.Errorf("the start took %s", took)
					}
					time.Sleep(10 * time.Minute)
					synctest.Wait()
					r.wantLeftAlone(id, slot)
					info := r.wantState(id, Running)
					if step == "record snapshot drop" {
						return // that one is not in the way
					}
					if info.Reason != Unreachable || info.Detail == "" {
						t.Errorf("reason %q, detail %q", info.Reason, info.Detail)
					}
					if strings.HasPrefix(step, "guest.") {
						_, err := r.Exec(t.Context(), id, Command{Cmd: "x"})
						wantClass(t, err, errdefs.Unavailable)
						if err == nil || !strings.Contains(err.Error(), info.Detail) {
							t.Errorf("%v does not say why", err)
						}
					}
					if strings.HasPrefix(step, "attach") {
						wantClass(t, r.Pause(t.Context(), id), errdefs.Unavailable)
						// Its guest does answer.
						if _, err := r.Exec(t.Context(), id, Command{Cmd: "x"}); err != nil {
							t.Errorf("exec: %v", err)
						}
					}
					r.faults.on(step, nil)
					r.faults.on("guest.init", nil)
					r.faults.on("guest.ready", nil)
					time.Sleep(2 * retryMost)
					synctest.Wait()
					if info := r.wantState(id, Running); info.Reason != "" || info.Detail != "" {
						t.Errorf("it is still marked: %q, %q", info.Reason, info.Detail)
					}
					r.wantConsistent()
					if err := r.Pause(t.Context(), id); err != nil {
						t.Errorf("pause: %v", err)
					}
					if err := r.Destroy(t.Context(), id); err != nil {
						t.Error(err)
					}
					r.wantNothing()
					r.wantLegalHistory(t)
				})
			})
		}
	}
}

// One that is unreachable ends when a person says so, when its time is over, or
// when its VM is proven dead.
func TestEndsOfTheUnreachable(t *testing.T) {
	for name, end := range map[string]func(*rig, ID) (Reason, bool){
		"destroyed": func(r *rig, id ID) (Reason, bool) {
			if err := r.Destroy(r.t.Context(), id); err != nil {
				r.t.Error(err)
			}
			return "", false
		},
		"expired": func(r *rig, id ID) (Reason, bool) {
			time.Sleep(time.Hour + time.Minute)
			return Expired, true
		},
		"dead": func(r *rig, id ID) (Reason, bool) {
			r.host.Die(string(id))
			time.Sleep(2 * retryMost)
			return Lost, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				created, err := r.Create(t.Context(), CreateRequest{Timeout: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				id := created.ID
				r.die()
				fails := 0
				r.faults.on("attach", func(context.Context) error {
					if name == "dead" && fails > 3 {
						return nil
					}
					fails++
					return errdefs.Unavailable.Errorf("it does not answer")
				})
				r.start()
				time.Sleep(time.Second)
				if reason, stays := end(r, id); stays {
					synctest.Wait()
					if info := r.wantState(id, Stopped); info.Reason != reason {
						t.Errorf("it ended because of %s, want %s", info.Reason, reason)
					}
				}
				r.wantNothing()
			})
		})
	}
}

// A VMM that stands still costs the agent's start no more than one such wait, be
// there ever so many.
func TestManyThatHangDelayTheStartOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 60 {
			r.create()
		}
		r.die()
		r.faults.on("attach", hang)
		began := time.Now()
		r.start()
		if took := time.Since(began); took > adoptTimeout+2*time.Second {
			t.Errorf("the start took %s", took)
		}
		if n := len(r.List(false)); n != 60 {
			t.Errorf("%d sandboxes are listed", n)
		}
		r.faults.on("attach", nil)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		for _, info := range r.List(false) {
			if info.State != Running || info.Reason != "" {
				t.Errorf("%s is %s (%s)", info.ID, info.State, info.Reason)
			}
		}
		r.wantConsistent()
	})
}

// counter counts the log's records of a level.
type counter struct {
	slog.Handler
	texts *[]string
}

func (c counter) Enabled(context.Context, slog.Level) bool { return true }
func (c counter) Handle(_ context.Context, rec slog.Record) error {
	if rec.Level >= slog.LevelError {
		*c.texts = append(*c.texts, rec.Message)
	}
	return nil
}

// A host that reaches none of its guests says once that the fault is its own.
func TestHostAtFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 3 {
			r.create()
		}
		r.die()
		var errs []string
		r.changed = func(c *Config) { c.Log = slog.New(counter{slog.DiscardHandler, &errs}) }
		r.faults.on("guest.init", func(context.Context) error { return errdefs.Unavailable.Errorf("no route to host") })
		r.start()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(errs) != 1 || !strings.Contains(errs[0], "none of the 3 guests") || r.HostFault() != errs[0] {
			t.Errorf("the log's errors are %q, the host's fault %q", errs, r.HostFault())
		}
		r.faults.on("guest.init", nil)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if fault := r.HostFault(); fault != "" || len(errs) != 1 {
			t.Errorf("afterwards it is %q, the log's errors are %q", fault, errs)
		}
	})
}

// A VMM that stands still during an operation: it fails, the sandbox does not.
func TestOperationsOnAHungVM(t *testing.T) {
	for name, op := range map[string]struct {
		paused bool
		run    func(*rig, ID) error
	}{
		"pause":     {false, func(r *rig, id ID) error { return r.Pause(context.Background(), id) }},
		"resume":    {true, func(r *rig, id ID) error { return r.Resume(context.Background(), id) }},
		"hibernate": {false, func(r *rig, id ID) error { return r.Hibernate(context.Background(), id, Hibernation{}) }},
		"fork": {false, func(r *rig, id ID) error {
			_, err := r.Fork(context.Background(), id, ForkRequest{Count: 1})
			return err
		}},
		"snapshot": {false, func(r *rig, id ID) error {
			_, err := r.Snapshot(context.Background(), id, SnapshotRequest{})
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				id := r.create()
				want := Running
				if op.paused {
					want = Paused
					if err := r.Pause(t.Context(), id); err != nil {
						t.Fatal(err)
					}
				}
				for _, step := range []string{"pause", "resume", "snapshot"} {
					r.faults.on(step, hang)
				}
				wantClass(t, op.run(r, id), errdefs.Unavailable)
				if info := r.wantState(id, want); info.Reason != Unreachable {
					t.Errorf("reason %q (%s)", info.Reason, info.Detail)
				}
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				r.wantState(id, want)
				for _, step := range []string{"pause", "resume", "snapshot"} {
					r.faults.on(step, nil)
				}
				time.Sleep(2 * retryMost)
				synctest.Wait()
				if info := r.wantState(id, want); info.Reason != "" {
					t.Errorf("reason %q (%s)", info.Reason, info.Detail)
				}
				r.wantConsistent()
			})
		})
	}
}

// While neither the snapshot of a failed hibernation can be removed nor the record
// written, the VM stands still; then it goes on.
func TestFailedHibernationOnABrokenDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		broken := func(context.Context) error { return syscall.EIO }
		drops := 0
		r.faults.on("record snapshot drop", func(context.Context) error {
			if drops++; drops == 1 {
				return nil
			}
			return syscall.EIO
		})
		r.faults.on("record saved hibernated", broken)
		r.faults.on("record save running", broken)
		if err := r.Hibernate(t.Context(), id, Hibernation{}); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		if info := r.wantState(id, Running); info.Reason != Unreachable || !r.host.Paused(string(id)) {
			t.Errorf("reason %q; it stands still: %v", info.Reason, r.host.Paused(string(id)))
		}
		for _, step := range []string{"record snapshot drop", "record saved hibernated", "record save running"} {
			r.faults.on(step, nil)
		}
		time.Sleep(2 * retryMost)
		synctest.Wait()
		if info := r.wantState(id, Running); info.Reason != "" {
			t.Errorf("reason %q", info.Reason)
		}
		r.wantConsistent()
	})
}

// A guest that does not help is hibernated without its help, in time.
func TestTimeoutOfAGuestThatDoesNotHelp(t *testing.T) {
	for name, hook := range map[string]func(context.Context) error{"silent": hang, "refuses": func(context.Context) error { return errFault }} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.faults.on("guest.freeze", hook)
				r.faults.on("guest.quiesce", hook)
				created, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute, OnTimeout: HibernateOnTimeout, MemMiB: 256})
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute + stillTimeout + 3*time.Second)
				synctest.Wait()
				info := r.wantState(created.ID, Hibernated)
				if !strings.Contains(info.Detail, "without the guest's help") {
					t.Errorf("detail %q", info.Detail)
				}
				r.faults.on("guest.freeze", nil)
				r.faults.on("guest.quiesce", nil)
				if err := r.Resume(t.Context(), created.ID); err != nil {
					t.Fatal(err)
				}
				if info := r.wantState(created.ID, Running); info.Detail != "" {
					t.Errorf("detail %q", info.Detail)
				}
			})
		})
	}
}

// One that cannot be hibernated at all ends within a bound; what the host is at
// fault for costs nothing.
func TestTimeoutOfWhatCannotBeHibernated(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want State
	}{
		"vm refuses":   {errors.New("device is in a state that cannot be saved"), Stopped},
		"disk is full": {syscall.ENOSPC, Running},
		"no room":      {errdefs.Exhausted.Errorf("the host's disk is full"), Running},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				created, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute, OnTimeout: HibernateOnTimeout})
				if err != nil {
					t.Fatal(err)
				}
				r.faults.on("snapshot", func(context.Context) error { return c.err })
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				r.wantState(created.ID, Running)
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if info := r.wantState(created.ID, c.want); c.want == Stopped && info.Reason != Expired {
					t.Errorf("reason %s", info.Reason)
				}
			})
		})
	}
}

// A host's clock that is put back gives nobody more than their timeout once more.
func TestClockThatIsPutBack(t *testing.T) {
	r := newRig(t)
	created, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	b, err := r.find(created.ID)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	b.mu.Lock()
	b.mu.rec.LastActiveAt = now.Add(24 * time.Hour)
	b.mu.Unlock()
	if b.expiry(now, 0) != "" || b.expiry(now.Add(61*time.Second), 0) == "" {
		t.Error("it does not expire after its timeout")
	}
}

// No network is two sandboxes'.
func TestTwoRecordsWithOneSlot(t *testing.T) {
	r := newRig(t)
	a, b := r.create(), r.create()
	slotA, slotB := r.slot(a), r.slot(b)
	r.die()
	disk := store{dir: r.store.dir}
	rec, err := disk.load(b)
	if err == nil {
		rec.Slot = slotA
		err = disk.save(rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.start()
	// The VMs show whose slot it is, and which record is wrong.
	for id, want := range map[ID]network.Slot{a: slotA, b: slotB} {
		r.wantState(id, Running)
		if got := r.slot(id); got != want {
			t.Errorf("%s has slot %d, want %d", id, got, want)
		}
	}
	for _, s := range []network.Slot{slotA, slotB} {
		if !r.net.open[s] || !r.net.taken[s] {
			t.Errorf("slot %d is open: %v, taken: %v", s, r.net.open[s], r.net.taken[s])
		}
	}
	if live := r.host.Live(); len(live) != 2 {
		t.Errorf("the VMs %v are left", live)
	}
}
