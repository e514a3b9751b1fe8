package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// scenario is an operation whose every step is made to misbehave. prepare runs
// before any fault.
type scenario struct {
	prepare func(*rig) ID
	run     func(context.Context, *rig, ID) error
	// keeps says that nothing that fails costs the sandbox, nor does the agent's
	// death in the middle.
	keeps bool
	// asleep says that no failure costs the sandbox: its snapshot is safe.
	asleep bool
	// ends says that the sandbox is gone in the end, whatever fails.
	ends bool
	// change sets up another manager than usual.
	change func(*Config)
}

func warmOne(c *Config) { c.Warm = 1 }

var scenarios = map[string]scenario{
	"first create": {
		prepare: func(*rig) ID { return "" },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{})
			return err
		},
	},
	"create": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{})
			return err
		},
	},
	"build sandbox": {
		prepare: func(*rig) ID { return "" },
		run: func(ctx context.Context, r *rig, _ ID) error {
			builders := r.Builders()
			id, err := builders.Create(ctx, BuilderRequest{Root: root(r), Project: "p"})
			if err != nil {
				return err
			}
			guest, err := builders.Guest(id)
			if err == nil {
				_, err = guest.Exec(ctx, Command{Cmd: "make"}, func(bool, []byte) {})
			}
			if err == nil {
				err = builders.Capture(ctx, id, filepath.Join(r.dir, "captured"))
			}
			if err != nil { // as the owner of a build does
				return errors.Join(err, builders.Destroy(context.WithoutCancel(ctx), id))
			}
			return builders.Destroy(ctx, id)
		},
	},
	"first create with a program": {
		prepare: func(r *rig) ID { withServer(r); return "" },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{Network: closed()})
			return err
		},
	},
	"prepare a build": {
		prepare: func(r *rig) ID { withServer(r); return "" },
		run: func(ctx context.Context, r *rig, _ ID) error {
			return r.PrepareBuild(ctx, minimal.ID, minimal.Builds[0].ID, nil)
		},
	},
	"create with a network policy": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{Network: closed()})
			return err
		},
	},
	"update of the network": {
		prepare: func(r *rig) ID { return r.create() },
		run:     func(ctx context.Context, r *rig, id ID) error { return r.updateNetwork(ctx, id, closed()) },
		keeps:   true,
	},
	"pause": {
		prepare: func(r *rig) ID { return r.create() },
		run:     func(ctx context.Context, r *rig, id ID) error { return r.Pause(ctx, id) },
		keeps:   true,
	},
	"resume": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run:   func(ctx context.Context, r *rig, id ID) error { return r.Resume(ctx, id) },
		keeps: true,
	},
	"hibernate": {
		prepare: func(r *rig) ID { return r.create() },
		run:     func(ctx context.Context, r *rig, id ID) error { return r.Hibernate(ctx, id, Hibernation{}) },
		keeps:   true,
	},
	"hibernate a paused one": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run:   func(ctx context.Context, r *rig, id ID) error { return r.Hibernate(ctx, id, Hibernation{}) },
		keeps: true,
	},
	"hibernate without memory": {
		prepare: func(r *rig) ID { return r.create() },
		run:     func(ctx context.Context, r *rig, id ID) error { return r.Hibernate(ctx, id, filesOnly) },
		keeps:   true,
	},
	"hibernate a paused one without memory": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, id ID) error {
			return r.Hibernate(ctx, id, Hibernation{FilesOnly: true, HealthyGuest: true})
		},
		keeps: true,
	},
	"deadline": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, id ID) error {
			_, err := r.SetDeadline(ctx, id, time.Now().Add(3*time.Second), HibernateOnTimeout)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			return err
		},
		keeps: true,
	},
	"deadline that destroys a paused one": {
		prepare: func(r *rig) ID {
			id := r.until(3*time.Second, CreateRequest{})
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, id ID) error {
			time.Sleep(5 * time.Second)
			synctest.Wait()
			return nil
		},
		ends: true,
	},
	"create with an id and a life": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{ID: r.NewID(), Life: time.Hour})
			return err
		},
	},
	"connect to a running one": {
		prepare: func(r *rig) ID { return r.made(CreateRequest{Life: time.Hour}).ID },
		run:     connectFor(2 * time.Hour),
		keeps:   true,
	},
	"connect to a paused one": {
		prepare: func(r *rig) ID {
			id := r.made(CreateRequest{Life: time.Hour}).ID
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run:   connectFor(2 * time.Hour),
		keeps: true,
	},
	"connect to a hibernated one": {
		prepare: func(r *rig) ID {
			id := r.made(CreateRequest{Life: time.Hour}).ID
			r.hibernate(id)
			return id
		},
		run:   connectFor(2 * time.Hour),
		keeps: true, asleep: true,
	},
	"wake": {
		prepare: func(r *rig) ID {
			id := r.made(CreateRequest{Life: time.Hour, AutoResume: true}).ID
			r.hibernate(id)
			return id
		},
		run:   func(ctx context.Context, r *rig, id ID) error { return r.Wake(ctx, id) },
		keeps: true, asleep: true,
	},
	"life that ends in a hibernation": {
		prepare: func(r *rig) ID { return r.made(CreateRequest{Life: 3 * time.Second, OnEnd: HibernateOnTimeout}).ID },
		run: func(context.Context, *rig, ID) error {
			time.Sleep(5 * time.Second)
			synctest.Wait()
			return nil
		},
		keeps: true,
	},
	"end now": {
		prepare: func(r *rig) ID { return r.made(CreateRequest{Life: time.Hour}).ID },
		run: func(ctx context.Context, r *rig, id ID) error {
			return r.SetEnd(ctx, id, time.Now(), false)
		},
	},
	"fork": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, id ID) error {
			_, err := r.Fork(ctx, id, ForkRequest{Count: 2})
			return err
		},
		keeps: true,
	},
	"snapshot": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, id ID) error {
			_, err := r.Snapshot(ctx, id, SnapshotRequest{Name: "snap", New: true})
			return err
		},
		keeps: true,
	},
	"snapshot of a paused one": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Pause(r.t.Context(), id); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, id ID) error {
			_, err := r.Snapshot(ctx, id, SnapshotRequest{Name: "snap", New: true})
			return err
		},
		keeps: true,
	},
	"snapshot without memory": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, id ID) error {
			_, err := r.Snapshot(ctx, id, SnapshotRequest{Name: "snap", New: true, FilesOnly: true})
			return err
		},
		keeps: true,
	},
	"create from a snapshot without memory": {
		prepare: func(r *rig) ID {
			id := r.create()
			if _, err := r.Snapshot(r.t.Context(), id, SnapshotRequest{Name: "snap", New: true, FilesOnly: true}); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{Template: "snap"})
			return err
		},
		keeps: true,
	},
	"create from a snapshot": {
		prepare: func(r *rig) ID {
			id := r.create()
			if _, err := r.Snapshot(r.t.Context(), id, SnapshotRequest{Name: "snap", New: true}); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{Template: "snap"})
			return err
		},
		keeps: true,
	},
	"resume from disk": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Hibernate(r.t.Context(), id, Hibernation{}); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run:   func(ctx context.Context, r *rig, id ID) error { return r.Resume(ctx, id) },
		keeps: true, asleep: true,
	},
	"boot from its disk": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Hibernate(r.t.Context(), id, filesOnly); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run:   func(ctx context.Context, r *rig, id ID) error { return r.Resume(ctx, id) },
		keeps: true, asleep: true,
	},
	"boot from its disk though it has memory": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Hibernate(r.t.Context(), id, Hibernation{}); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, id ID) error {
			_, _, err := r.Connect(ctx, id, ConnectRequest{FilesOnly: true})
			return err
		},
		keeps: true, asleep: true,
	},
	"destroy a hibernated one": {
		prepare: func(r *rig) ID {
			id := r.create()
			if err := r.Hibernate(r.t.Context(), id, Hibernation{}); err != nil {
				r.t.Fatal(err)
			}
			return id
		},
		run: func(ctx context.Context, r *rig, id ID) error { return r.Destroy(ctx, id) },
	},
	"destroy": {
		prepare: func(r *rig) ID { return r.create() },
		run:     func(ctx context.Context, r *rig, id ID) error { return r.Destroy(ctx, id) },
	},
	"create from the pool": {
		prepare: func(r *rig) ID { id := r.create(); r.fillPool(); return id },
		run: func(ctx context.Context, r *rig, _ ID) error {
			created, err := r.Create(ctx, CreateRequest{})
			if err == nil && created.From != FromWarm {
				r.t.Logf("created from %s", created.From)
			}
			return err
		},
		change: warmOne,
	},
	"create that needs the pool's room": {
		prepare: func(r *rig) ID { id := r.create(); r.fillPool(); return id },
		run: func(ctx context.Context, r *rig, _ ID) error {
			_, err := r.Create(ctx, CreateRequest{MemMiB: 256})
			return err
		},
		change: func(c *Config) { c.Warm, c.Capacity.Sandboxes = 1, 2 },
	},
	"refill of the pool": {
		prepare: func(r *rig) ID { return r.create() },
		run: func(ctx context.Context, r *rig, _ ID) error {
			time.Sleep(30 * time.Second)
			synctest.Wait()
			if n := r.Stats().Warm; n != 1 {
				return fmt.Errorf("%d guests wait", n)
			}
			return nil
		},
		change: warmOne,
	},
	"end of the agent with a pool": {
		prepare: func(r *rig) ID { r.create(); r.fillPool(); return "" },
		run: func(ctx context.Context, r *rig, _ ID) error {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
			defer cancel()
			f := r.faults
			err := r.Shutdown(ctx, false)
			f.mu.Lock()
			dead := f.dead
			f.mu.Unlock()
			if dead { // it was killed in the middle
				return err
			}
			r.die()
			r.start()
			return err
		},
		change: warmOne,
	},
	"start of the agent": {
		prepare: func(r *rig) ID { return prepareRuin(r) },
		run: func(ctx context.Context, r *rig, _ ID) error {
			return r.tryStart(ctx)
		},
		keeps: true,
	},
	"start on a damaged record": {
		prepare: func(r *rig) ID {
			id := prepareRuin(r)
			r.spoil(id, func(data []byte) []byte { return data[:len(data)/2] })
			return id
		},
		run: func(ctx context.Context, r *rig, _ ID) error {
			return r.tryStart(ctx)
		},
		keeps: true,
	},
}

func connectFor(timeout time.Duration) func(context.Context, *rig, ID) error {
	return func(ctx context.Context, r *rig, id ID) error {
		_, _, err := r.Connect(ctx, id, ConnectRequest{Timeout: timeout})
		return err
	}
}

// prepareRuin leaves what an agent's death can leave: a sandbox in every state,
// and things that no record names.
func prepareRuin(r *rig) ID {
	running, paused, stray, asleep := r.create(), r.create(), r.create(), r.create()
	if err := errors.Join(r.Pause(r.t.Context(), paused), r.Hibernate(r.t.Context(), asleep, Hibernation{})); err != nil {
		r.t.Fatal(err)
	}
	half, ending := r.create(), r.create()
	r.die()
	disk := store{dir: r.store.dir}
	for id, state := range map[ID]State{half: Creating, ending: Stopping} {
		rec, err := disk.load(id)
		if err == nil {
			rec.State = state
			err = disk.save(rec)
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
	if err := disk.forget(stray); err != nil {
		r.t.Fatal(err)
	}
	r.Manager = nil
	return running
}

// steps runs a scenario without faults and returns its steps: every call of
// what is below the manager and every change on disk, in order, each once.
func (s scenario) steps(t *testing.T) (steps []string) {
	synctest.Test(t, func(t *testing.T) {
		r := s.rig(t)
		id := s.prepare(r)
		f := r.faults // not those of an agent to come
		f.mu.Lock()
		before := len(f.order)
		f.mu.Unlock()
		if err := s.run(t.Context(), r, id); err != nil {
			t.Fatalf("without faults: %v", err)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, step := range f.order[before:] {
			if !slices.Contains(steps, step) {
				steps = append(steps, step)
			}
		}
	})
	return steps
}

func (s scenario) rig(t *testing.T) *rig {
	if s.change == nil {
		return newRig(t)
	}
	return newRig(t, s.change)
}

// fillPool waits until the pool is full.
func (r *rig) fillPool() {
	r.t.Helper()
	time.Sleep(time.Minute)
	synctest.Wait()
	if stats := r.Stats(); stats.Warm != stats.WarmWanted {
		r.t.Fatalf("%d guests wait, want %d", stats.Warm, stats.WarmWanted)
	}
}

// waiting are the guests in the pool.
func (r *rig) waiting() (ids []string) {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	for _, b := range r.pool.guests {
		ids = append(ids, string(b.id))
	}
	return ids
}

var errFault = errors.New("injected fault")

// TestFaultMatrix lets every step of every operation fail, hang, be cancelled,
// or kill the agent, and then demands that nothing is lost or left.
func TestFaultMatrix(t *testing.T) {
	cases := 0
	for name, s := range scenarios {
		for _, step := range s.steps(t) {
			for _, kind := range []string{"error", "hang", "cancel", "death"} {
				if kind != "error" && kind != "death" && (strings.HasPrefix(step, "record ") || strings.HasPrefix(step, "proc ")) {
					continue // the disk hangs or it does not; no context reaches it
				}
				cases++
				t.Run(fmt.Sprintf("%s/%s/%s", name, step, kind), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { s.under(t, step, kind) })
				})
			}
		}
	}
	if cases < 100 {
		t.Errorf("the matrix has only %d cases: steps are missing", cases)
	}
	t.Logf("%d cases", cases)
}

// TestFaultMatrixOfAFlatDriver is the part of the matrix in which a flat driver's sandboxes
// differ: what makes a disk, writes memory or starts from it.
func TestFaultMatrixOfAFlatDriver(t *testing.T) {
	for _, name := range []string{
		"first create", "create", "hibernate", "fork", "snapshot", "create from a snapshot", "resume from disk", "create from the pool",
	} {
		s := scenarios[name]
		change := s.change
		s.change = func(c *Config) {
			if change != nil {
				change(c)
			}
			c.Drivers[0].(hookedDriver).Driver.(*vmmtest.Fake).Flat = true
		}
		for _, step := range s.steps(t) {
			for _, kind := range []string{"error", "death"} {
				t.Run(fmt.Sprintf("%s/%s/%s", name, step, kind), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { s.under(t, step, kind) })
				})
			}
		}
	}
}

func (s scenario) under(t *testing.T, step, kind string) {
	r := s.rig(t)
	id := s.prepare(r)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	f := r.faults
	died := make(chan struct{})
	once := true
	f.on(step, func(ctx context.Context) error {
		f.mu.Lock()
		first := once
		once = false
		f.mu.Unlock()
		if !first {
			return nil
		}
		switch kind {
		case "hang":
			return hang(ctx)
		case "cancel":
			cancel()
			return context.Canceled
		case "death":
			f.die()
			close(died)
			f.rest()
		}
		return errFault
	})
	done, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended) // at its death, too
		done <- s.run(ctx, r, id)
	}()
	select {
	case <-done:
	case <-died:
		manager := r.Manager
		r.die()
		defer func() { // the old agent's goroutines end with the test, its calls among them
			close(f.grave)
			<-ended
			if manager != nil {
				manager.wg.Wait()
			}
		}()
		r.Manager = nil
	}
	if r.Manager == nil { // it died, or did not come up
		r.open.Store(0)
		if kind != "death" {
			r.faults.die() // what a failed start left to itself does no more
			close(r.faults.grave)
			r.die()
		}
		r.start()
	}

	// Whatever is to be tried again has been by then.
	time.Sleep(5 * time.Minute)
	synctest.Wait()
	r.wantConsistent()
	s.wantEnd(r, id)
	if s.asleep {
		info, err := r.Get(id)
		if err == nil && info.State == Hibernated {
			err = r.Resume(t.Context(), id)
		} else if err == nil && info.State != Running {
			err = fmt.Errorf("it is %s (%s, %s)", info.State, info.Reason, info.Detail)
		}
		if err != nil {
			t.Errorf("a failed resume cost the sandbox: %v", err)
		}
		r.wantConsistent()
	}
	// A snapshot is whole and of use, or not there.
	snapshots, err := r.Snapshots("")
	for _, s := range snapshots {
		_, cerr := r.Create(t.Context(), CreateRequest{Template: s.Name})
		err = errors.Join(err, cerr)
		r.wantConsistent()
		err = errors.Join(err, r.DeleteSnapshot(r.t.Context(), "", s.Name))
	}
	if err != nil {
		t.Errorf("snapshots afterwards: %v", err)
	}
	if s.change != nil {
		if stats := r.Stats(); stats.Warm != stats.WarmWanted && stats.Reserved.Sandboxes != stats.Limit.Sandboxes {
			t.Errorf("%d guests wait, want %d", stats.Warm, stats.WarmWanted)
		}
	}
	for _, info := range r.List(true) {
		if err := r.Destroy(t.Context(), info.ID); err != nil && !errors.Is(err, errdefs.NotFound) {
			t.Errorf("destroy afterwards: %v", err)
		}
	}
	if s.change != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Shutdown(ctx, false); err != nil {
			t.Errorf("shutdown afterwards: %v", err)
		}
		r.wantNothing()
		return
	}
	r.wantNothing()
	if again := r.create(); r.wantState(again, Running).ID != again {
		t.Error("no sandbox can be made afterwards")
	}
}

// wantEnd checks what keeps and ends say of the sandbox.
func (s scenario) wantEnd(r *rig, id ID) {
	r.t.Helper()
	if s.ends {
		r.wantState(id, Stopped)
	}
	if s.keeps {
		info, err := r.Get(id)
		if err == nil && info.State == Unknown {
			info, err = r.Recover(r.t.Context(), id)
		}
		if err != nil || info.State != Running && info.State != Paused && info.State != Hibernated || info.Reason != "" {
			r.t.Errorf("what failed cost the sandbox: %+v, %v", info, err)
		}
	}
}

// wantConsistent fails the test unless records, VMs and slots tell the same
// story.
func (r *rig) wantConsistent() {
	r.t.Helper()
	vms := r.waiting()
	slots := len(vms)
	for _, info := range r.List(true) {
		switch info.State {
		case Running, Paused:
			vms = append(vms, string(info.ID))
			slots++
			if paused := r.host.Paused(string(info.ID)); paused != (info.State == Paused) {
				r.t.Errorf("sandbox %s is %s, its VM is paused: %v", info.ID, info.State, paused)
			}
		case Unknown:
			if slices.Contains(r.host.Live(), string(info.ID)) {
				vms = append(vms, string(info.ID))
			}
			if info.HostIP.IsValid() {
				slots++
			}
		case Stopped:
		case Hibernated:
			if err := r.store.checkSnapshot(info.ID); err != nil {
				r.t.Errorf("sandbox %s is hibernated: %v", info.ID, err)
			}
		default:
			r.t.Errorf("sandbox %s stays %s (%s)", info.ID, info.State, info.Detail)
		}
	}
	slices.Sort(vms)
	if live := r.host.Live(); !slices.Equal(live, vms) && len(live)+len(vms) > 0 {
		r.t.Errorf("VMs %v live, records name %v", live, vms)
	}
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	if len(r.net.open) != slots || len(r.net.taken) != slots {
		r.t.Errorf("%d sandboxes hold slots; open %v, taken %v", slots, r.net.open, r.net.taken)
	}
}
