package sandbox

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

const testKeepMiB = 512

// diskRig is a rig whose host has as much room as the test says.
func diskRig(t *testing.T) (*rig, *atomic.Int64) {
	free := new(atomic.Int64)
	free.Store(100 << 30)
	return newRig(t, func(c *Config) {
		c.Capacity.FreeDiskMiB, c.freeDisk = testKeepMiB, free.Load
	}), free
}

// passes lets time pass, and what happens then.
func passes(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// wantFull fails the test unless the sandbox runs, stands still for want of room,
// and says so to whoever needs it.
func (r *rig) wantFull(id ID) {
	r.t.Helper()
	if info := r.wantState(id, Running); info.Reason != DiskFull || info.Detail == "" {
		r.t.Errorf("its reason is %q: %q", info.Reason, info.Detail)
	}
	_, lease := r.Lease(r.t.Context(), id)
	_, exec := r.Exec(r.t.Context(), id, Command{Cmd: "true"})
	_, fork := r.Fork(r.t.Context(), id, ForkRequest{Count: 1})
	_, snapshot := r.Snapshot(r.t.Context(), id, SnapshotRequest{})
	for what, err := range map[string]error{
		"lease": lease, "exec": exec, "fork": fork, "snapshot": snapshot, "hibernate": r.Hibernate(r.t.Context(), id, Hibernation{}),
	} {
		text := "the host's disk is full; sandbox " + string(id) + " goes on when there is room"
		if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(err.Error(), text) {
			r.t.Errorf("%s: %v", what, err)
		}
	}
}

func (r *rig) wantGoesOn(id ID) {
	r.t.Helper()
	paused, stalled := r.host.Paused(string(id)), r.host.Stalled(string(id))
	if info := r.wantState(id, Running); info.Reason != "" || info.Detail != "" || paused || stalled {
		r.t.Errorf("it is marked %q (%s), its vm is paused: %v, stalled: %v", info.Reason, info.Detail, paused, stalled)
	}
	if _, err := r.Exec(r.t.Context(), id, Command{Cmd: "true"}); err != nil {
		r.t.Error(err)
	}
}

var errNoSpace = errdefs.Exhausted.Errorf("the host's disk is full")

// TestStall: a sandbox whose VMM stopped it is seen, tells why, and goes on by
// itself, its clock set right.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		id, other := r.create(), r.create()
		var told []guest.Init
		r.told = func(_ string, in guest.Init) { told = append(told, in) }
		free.Store(0)
		r.host.Stall(string(id), errNoSpace)
		passes(3 * time.Second)
		r.wantFull(id)
		r.wantGoesOn(other)
		if s := r.Stats(); s.Marked[DiskFull] != 1 || s.DiskFree != 0 || s.DiskKept != testKeepMiB<<20 {
			t.Errorf("stats: %+v", s)
		}
		// A pause is one, and a resume says why not.
		if err := r.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if info := r.wantState(id, Paused); info.Reason != "" {
			t.Errorf("its reason is %q", info.Reason)
		}
		wantClass(t, r.Resume(t.Context(), id), errdefs.Exhausted)
		r.wantState(id, Paused)
		r.host.Stall(string(id), nil)
		free.Store(testKeepMiB << 20)
		passes(3 * time.Second)
		wantClass(t, r.Resume(t.Context(), id), errdefs.Exhausted) // there must be a little more
		free.Store(testKeepMiB << 20 * 5 / 4)
		passes(3 * time.Second)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantGoesOn(id)

		free.Store(0)
		r.host.Stall(string(id), errNoSpace)
		passes(3 * time.Second)
		r.wantFull(id)
		r.die() // the next agent finds it as it is
		r.start()
		r.wantFull(id)
		r.wantGoesOn(other)
		told = nil
		r.host.Stall(string(id), nil)
		free.Store(100 << 30)
		passes(3 * time.Second)
		r.wantGoesOn(id)
		if len(told) != 1 || told[0].Time.IsZero() {
			t.Errorf("the guest was told %+v", told)
		}
		var got []string
		for _, line := range r.history(0) {
			if strings.Contains(line, " running running ") {
				got = append(got, line[strings.Index(line, " ")+1:])
			}
		}
		if want := []string{"running running disk_full", "running running disk_full", "running running "}; !slices.Equal(got, want) {
			t.Errorf("the events are %q, want %q", got, want)
		}
	})
}

// TestStallThatStays is tried again more and more seldom, and is told once.
func TestStallThatStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := diskRig(t)
		id := r.create()
		r.host.Stall(string(id), errdefs.Unavailable.Errorf("the host cannot write the disk"))
		passes(2 * stallLook) // nothing is scarce: it is asked seldom
		r.wantFull(id)
		before, tries := len(r.history(0)), r.faults.count("resume")
		passes(time.Hour)
		if tries = r.faults.count("resume") - tries; tries < 30 || tries > 70 {
			t.Errorf("it was tried %d times in an hour", tries)
		}
		if now := len(r.history(0)); now != before {
			t.Errorf("%d more events", now-before)
		}
		r.host.Stall(string(id), nil)
		passes(2 * time.Minute)
		r.wantGoesOn(id)
		// Its end frees what it took, whatever it waits for.
		r.host.Stall(string(id), errNoSpace)
		passes(2 * stallLook)
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}

// grow makes a sandbox's disk take so many MiB.
func (r *rig) grow(id ID, mib int) {
	r.t.Helper()
	os.Remove(r.store.overlay(id)) // the fakes' disks are links to one file
	if err := os.WriteFile(r.store.overlay(id), make([]byte, mib<<20), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// TestShare: when little is left, who writes more than a share of it stands still,
// and nobody else.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		fast, slow := r.create(), r.create()
		r.grow(fast, 40) // before, which counts for nothing
		free.Store(16 << 20)
		passes(time.Second) // 4 MiB are each one's share
		r.wantGoesOn(fast)
		r.grow(slow, 3)
		r.grow(fast, 43)
		passes(time.Second)
		r.wantGoesOn(fast)
		r.grow(fast, 45)
		passes(time.Second)
		r.wantFull(fast)
		r.wantGoesOn(slow)
		if !r.host.Paused(string(fast)) {
			t.Error("its vm runs")
		}
		_, err := r.Create(t.Context(), CreateRequest{})
		wantClass(t, err, errdefs.Exhausted)
		wantClass(t, r.Hibernate(t.Context(), slow, Hibernation{}), errdefs.Exhausted)
		// A pause and a resume give no second share.
		if err := r.Pause(t.Context(), fast); err != nil {
			t.Fatal(err)
		}
		wantClass(t, r.Resume(t.Context(), fast), errdefs.Exhausted)
		r.wantState(fast, Paused)
		free.Store(100 << 30)
		passes(2 * time.Second)
		if err := r.Resume(t.Context(), fast); err != nil {
			t.Fatal(err)
		}
		free.Store(16 << 20)
		passes(time.Second)
		r.grow(fast, 60)
		passes(time.Second)
		r.wantFull(fast)
		r.die() // the next agent leaves it as it is
		r.start()
		passes(time.Second)
		r.wantFull(fast)
		if !r.host.Paused(string(fast)) {
			t.Error("the next agent let its vm run")
		}
		free.Store(100 << 30)
		passes(2 * time.Second)
		r.wantGoesOn(fast)
	})
}

// TestShareInAnOperation: a fast writer in an operation that does not end is
// stopped, too, and the operation says why it was broken off.
func TestShareInAnOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		id := r.create()
		r.faults.on("guest.freeze", hang)
		result := make(chan error, 1)
		go func() { result <- r.Hibernate(t.Context(), id, Hibernation{}) }()
		synctest.Wait()
		free.Store(16 << 20)
		passes(time.Second)
		r.grow(id, 45)
		passes(time.Second)
		select {
		case err := <-result:
			wantClass(t, err, errdefs.Exhausted)
		default:
			t.Fatal("it still hibernates")
		}
		passes(time.Second)
		r.wantFull(id)
	})
}

// TestExpiryOfAFullOne: time goes on for a sandbox that stands still, and its end
// makes room.
func TestExpiryOfAFullOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		made, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		free.Store(0)
		r.host.Stall(string(made.ID), errNoSpace)
		passes(3 * time.Second)
		r.wantFull(made.ID)
		passes(time.Minute)
		if info := r.wantState(made.ID, Stopped); info.Reason != Expired {
			t.Errorf("its reason is %q", info.Reason)
		}
	})
}

// TestExecOutlivesAStall, and one whose time is over says why.
func TestExecOutlivesAStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		r.exec = func(ctx context.Context, cmd guest.Command) (guest.Result, error) {
			select {
			case <-time.After(cmd.Timeout):
				return guest.Result{}, errdefs.TimedOut.Errorf("command timed out")
			case <-ctx.Done():
				return guest.Result{}, context.Cause(ctx)
			}
		}
		id := r.create()
		result := make(chan error, 1)
		go func() {
			_, err := r.Exec(t.Context(), id, Command{Cmd: "write", Timeout: 20 * time.Second})
			result <- err
		}()
		synctest.Wait()
		free.Store(0)
		r.host.Stall(string(id), errNoSpace)
		passes(10 * time.Second)
		r.wantFull(id)
		select {
		case err := <-result:
			t.Fatalf("it ended: %v", err)
		default:
		}
		passes(11 * time.Second)
		if err := <-result; errdefs.ClassOf(err) != errdefs.Exhausted {
			t.Errorf("exec: %v", err)
		}
	})
}

// TestNoRoomAnywhere: wherever an operation finds the disk full, or its quota used
// up, it says so without a path of the host, and the sandbox is as it was.
func TestNoRoomAnywhere(t *testing.T) {
	onDisk := func(step string) bool {
		return slices.ContainsFunc([]string{"record ", "overlay", "snapshot", "ready.", "start", "restore"}, func(p string) bool {
			return strings.HasPrefix(step, p)
		})
	}
	for _, name := range []string{
		"first create", "create", "create from a snapshot", "update of the network", "pause", "resume", "hibernate",
		"hibernate a paused one", "fork", "snapshot", "snapshot of a paused one", "resume from disk",
		"create from the pool",
	} {
		s := scenarios[name]
		for i, step := range s.steps(t) {
			if !onDisk(step) || strings.Contains(step, "stopp") || strings.Contains(step, "forget") || strings.HasPrefix(step, "snapshot.read") {
				continue
			}
			errno := []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT}[i%2]
			t.Run(fmt.Sprintf("%s/%s/%v", name, step, errno), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := s.rig(t)
					id := s.prepare(r)
					before := State("")
					if id != "" {
						before = r.wantAny(id)
					}
					var once atomic.Bool
					r.faults.on(step, func(context.Context) error {
						if once.Swap(true) {
							return nil
						}
						return fmt.Errorf("do it: %w", &os.PathError{Op: "write", Path: "/secret/path", Err: errno})
					})
					err := s.run(t.Context(), r, id)
					if err != nil && errdefs.ClassOf(err) != errdefs.Exhausted || err != nil && strings.Contains(err.Error(), "secret") {
						t.Errorf("error is %v (class %v)", err, errdefs.ClassOf(err))
					}
					if err != nil && id != "" {
						if now := r.wantAny(id); now != before {
							t.Errorf("the sandbox is %s, it was %s", now, before)
						}
					}
					for _, info := range r.List(true) {
						if strings.Contains(info.Detail, "secret") {
							t.Errorf("the detail of %s tells a path: %s", info.ID, info.Detail)
						}
					}
					if left, _ := filepath.Glob(filepath.Join(r.store.dir, "*", ".snapshot-*")); len(left) > 0 {
						t.Errorf("left: %v", left)
					}
					if left, _ := filepath.Glob(filepath.Join(r.store.dir, ".fork-*")); len(left) > 0 {
						t.Errorf("left: %v", left)
					}
					r.wantConsistent()
				})
			})
		}
	}
}

// wantAny is the state of a sandbox that must exist.
func (r *rig) wantAny(id ID) State {
	r.t.Helper()
	info, err := r.Get(id)
	if err != nil {
		r.t.Fatal(err)
	}
	return info.State
}

// TestPoolWithoutRoom: a guest that is made ahead on a full disk, or beyond a quota,
// leaves nothing, is no failure of the pool, and is made when there is room.
func TestPoolWithoutRoom(t *testing.T) {
	for _, step := range []string{"record reserve", "record save waiting", "record saved waiting", "overlay clone", "restore"} {
		for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
			t.Run(fmt.Sprintf("%s/%v", step, errno), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var errs []string
					r := newRig(t, func(c *Config) {
						c.Warm, c.Log = 1, slog.New(warnings{slog.DiscardHandler, &errs})
					})
					r.create() // leaves the boot snapshot
					var room atomic.Bool
					var count atomic.Int64
					r.faults.on(step, func(context.Context) error {
						if room.Load() {
							return nil
						}
						count.Add(1)
						return fmt.Errorf("do it: %w", &os.PathError{Op: "write", Path: "/secret/path", Err: errno})
					})
					time.Sleep(5 * time.Minute)
					synctest.Wait()
					if tries := count.Load(); tries < 5 || tries > 15 || len(r.waiting()) > 0 || len(r.host.Live()) != 1 || r.taken().Sandboxes != 1 {
						t.Errorf("tried %d times; %v wait, the VMs %v are there, %+v is taken", tries, r.waiting(), r.host.Live(), r.taken())
					}
					if len(errs) > 0 {
						t.Errorf("the log warns: %q", errs)
					}
					room.Store(true)
					r.fillPool()
					r.wantConsistent()
				})
			})
		}
	}
}

// warnings keeps the texts of warnings and errors.
type warnings struct {
	slog.Handler
	texts *[]string
}

func (w warnings) Enabled(context.Context, slog.Level) bool { return true }
func (w warnings) Handle(_ context.Context, rec slog.Record) error {
	if rec.Level >= slog.LevelWarn {
		*w.texts = append(*w.texts, rec.Message)
	}
	return nil
}

// TestEventIsNotKept: a change of state that cannot be written to the event log for
// want of room is a change all the same, and is told to those who watch.
func TestEventIsNotKept(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			broken := r.Manager.events
			broken.mu.Lock()
			broken.writeHook = func() error { return errno }
			broken.mu.Unlock()
			before := len(r.history(0))
			if err := r.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			r.wantState(id, Paused)
			if now := r.history(0); len(now) != before+1 {
				t.Errorf("the events are %q", now)
			}
		})
	}
}

// TestStartWithoutRoomForEvents: the event log does not keep an agent from its
// start on a full disk. What happens before there is room gets no cursor, for none
// could be reserved.
func TestStartWithoutRoomForEvents(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	path, ballast := filepath.Join(dir, "events.jsonl"), filepath.Join(dir, "ballast")
	open := func() *eventLog {
		t.Helper()
		l, err := openEvents(path, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := open()
	if err := l.add(Event{ID: "sb-1", To: Creating}); err != nil {
		t.Fatal(err)
	}
	l.shut()
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errdefs.IsDiskFull(err) {
		t.Fatalf("fill the disk: %v", err)
	}
	l = open()
	if err := l.add(Event{ID: "sb-1", To: Running}); err == nil {
		t.Error("an event was kept on a full disk")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(l.retryAt))
	if err := l.add(Event{ID: "sb-1", To: Paused}); err != nil {
		t.Error(err)
	}
	l.shut()
	l = open()
	defer l.shut()
	events, _, err := l.after(0)
	if err != nil || len(events) != 2 || events[0].To != Creating || events[1].To != Paused || events[1].Cursor <= events[0].Cursor {
		t.Errorf("remembered: %+v, %v", events, err)
	}
}
