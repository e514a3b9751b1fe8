package sandbox

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

func warmRig(t *testing.T, n int, change ...func(*Config)) *rig {
	return newRig(t, func(c *Config) {
		c.Warm = n
		for _, f := range change {
			f(c)
		}
	})
}

// TestWarmPool: a guest that waits is nobody's business until it is handed out,
// and then a sandbox like any other.
func TestWarmPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 2)
		first, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || first.From != FromBoot || first.Why == "" {
			t.Fatalf("the first: %+v, %v", first, err)
		}
		r.fillPool()
		waiting := r.waiting()
		if infos := r.List(true); len(infos) != 1 || r.Stats().States[Creating] != 0 {
			t.Errorf("the list shows what waits: %+v", infos)
		}
		if used := r.Stats().Reserved; used.Sandboxes != 3 {
			t.Errorf("capacity in use: %+v", used)
		}
		for _, id := range waiting {
			_, err := r.Get(ID(id))
			_, cerr := r.Console(ID(id), 10)
			_, lerr := r.Lease(t.Context(), ID(id))
			for _, err := range []error{err, cerr, lerr, r.Destroy(t.Context(), ID(id)), r.Pause(t.Context(), ID(id))} {
				wantClass(t, err, errdefs.NotFound)
			}
		}

		time.Sleep(time.Hour)
		began := time.Now()
		created, err := r.Create(t.Context(), CreateRequest{Timeout: 24 * time.Hour, OnTimeout: HibernateOnTimeout})
		if err != nil || created.From != FromWarm || created.Why != "" || string(created.ID) != waiting[0] {
			t.Fatalf("created %+v, %v; %v waited", created, err, waiting)
		}
		var names []string
		for _, p := range created.Phases {
			names = append(names, p.Name)
		}
		if !slices.Equal(names, []string{"reserve", "init", "commit"}) {
			t.Errorf("phases are %v", names)
		}
		if created.CreatedAt.Before(began) || created.LastActiveAt.Before(began) || created.State != Running ||
			created.Timeout != 24*time.Hour || created.OnTimeout != HibernateOnTimeout {
			t.Errorf("it is no new sandbox: %+v", created)
		}
		if rec, err := r.store.load(created.ID); err != nil || rec.BootKey != "" || rec.State != Running || !rec.Restored {
			t.Errorf("its record: %+v, %v", rec, err)
		}
		r.wantConsistent()
		r.wantLegalHistory(t)
		r.fillPool()

		// The next agent finds the sandboxes, and nothing that waited.
		r.die()
		r.start()
		if len(r.found.Adopted) != 2 || len(r.found.Freed) != 2 {
			t.Errorf("found %+v", r.found)
		}
		if infos := r.List(true); len(infos) != 2 {
			t.Errorf("the list shows what waited: %+v", infos)
		}
		r.fillPool()
		r.wantConsistent()
		if err := r.Shutdown(context.Background(), false); err != nil {
			t.Error(err)
		}
		if live := r.host.Live(); len(live) != 2 {
			t.Errorf("%v live after the end", live)
		}
		r.die()
		r.start()
		if len(r.found.Adopted) != 2 || len(r.found.Freed) != 0 {
			t.Errorf("found %+v", r.found)
		}
		r.wantLegalHistory(t)
	})
}

// TestWarmKind: only a request of the same kind gets a guest that waits, and
// only one that fits what there is today.
func TestWarmKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		machine := &keyedDriver{key: "one"}
		r := warmRig(t, 1, func(c *Config) {
			machine.hookedDriver = c.Drivers[0].(hookedDriver)
			c.Drivers = []vmm.Driver{machine}
		})
		r.create()
		r.fillPool()
		waiting := r.waiting()
		if created, err := r.Create(t.Context(), CreateRequest{MemMiB: 256}); err != nil || created.From == FromWarm {
			t.Errorf("another size: %+v, %v", created, err)
		}
		if !slices.Equal(r.waiting(), waiting) {
			t.Errorf("%v wait, want %v", r.waiting(), waiting)
		}
		machine.key = "two"
		if created, err := r.Create(t.Context(), CreateRequest{}); err != nil || created.From != FromBoot {
			t.Errorf("another machine: %+v, %v", created, err)
		}
		r.fillPool()
		if slices.Equal(r.waiting(), waiting) {
			t.Error("the old guest still waits")
		}
		if created, err := r.Create(t.Context(), CreateRequest{}); err != nil || created.From != FromWarm {
			t.Errorf("after the replacement: %+v, %v", created, err)
		}
		r.wantConsistent()
	})
}

// keyedDriver is a driver whose machine changes.
type keyedDriver struct {
	hookedDriver
	key string
}

func (d *keyedDriver) SnapshotKey(ctx context.Context, spec vmm.Spec) (string, error) {
	key, err := d.hookedDriver.SnapshotKey(ctx, spec)
	return key + d.key, err
}

// TestWarmGuestDies: what died in the pool is replaced; what dies when it is
// handed out costs nobody a create.
func TestWarmGuestDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 2)
		r.create()
		r.fillPool()
		dead := r.waiting()[0]
		r.host.Die(dead)
		synctest.Wait()
		if slices.Contains(r.waiting(), dead) {
			t.Error("the dead one waits")
		}
		r.fillPool()
		r.wantConsistent()

		both := r.waiting()
		r.faults.on("guest.init", func(context.Context) error {
			r.faults.on("guest.init", nil)
			r.host.Die(both[0])
			return errFault
		})
		created, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || created.From != FromWarm || string(created.ID) != both[1] {
			t.Errorf("created %+v, %v; want %s", created, err, both[1])
		}
		r.faults.on("guest.init", func(context.Context) error { return errFault })
		if _, err := r.Create(t.Context(), CreateRequest{}); !errors.Is(err, errFault) {
			t.Errorf("no guest answers: %v", err)
		}
		r.faults.on("guest.init", nil)
		r.fillPool()
		r.wantConsistent()
		if ended := r.Stats().Ended; ended[VMExited] != 0 || ended[CreateFailed] != 1 {
			t.Errorf("ended: %v", ended)
		}
	})
}

// TestWarmMakesWay: no create is refused because guests wait, and none is given
// up for a create that would be refused all the same.
func TestWarmMakesWay(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"sandboxes": func(c *Config) { c.Capacity.Sandboxes = 4 },
		"vcpus":     func(c *Config) { c.Capacity.VCPUs = 4 },
		"slots":     nil,
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r *rig
				if change != nil {
					r = warmRig(t, 3, change)
				} else {
					r = warmRig(t, 3)
					r.net.limit = 4
				}
				r.create()
				r.fillPool()
				waiting := r.waiting()
				if _, err := r.Create(t.Context(), CreateRequest{VCPUs: 5, MemMiB: MaxMemMiB}); what == "vcpus" {
					wantClass(t, err, errdefs.Exhausted)
					if !slices.Equal(r.waiting(), waiting) {
						t.Errorf("%v wait, want %v", r.waiting(), waiting)
					}
				} else if err != nil {
					t.Error(err)
				}
				for i := 0; r.Stats().Reserved.Sandboxes-r.Stats().Warm < 4; i++ {
					if _, err := r.Create(t.Context(), CreateRequest{MemMiB: 256}); err != nil {
						t.Fatalf("create %d: %v", i, err)
					}
					if left := r.waiting(); !slices.Equal(left, waiting[len(waiting)-len(left):]) {
						t.Errorf("%v wait, the oldest of %v goes first", left, waiting)
					}
				}
				_, err := r.Create(t.Context(), CreateRequest{})
				wantClass(t, err, errdefs.Exhausted)
				// Room that comes back is taken.
				if err := r.Destroy(t.Context(), r.List(false)[0].ID); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				if n := r.Stats().Warm; n != 1 {
					t.Errorf("%d guests wait", n)
				}
				r.wantConsistent()
			})
		})
	}
}

// TestWarmWaitsForCalm: no guest is made ahead while a create is in progress, or
// just after one.
func TestWarmWaitsForCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		r.create()
		restores := r.driver.Calls("restore")
		r.faults.on("guest.init", func(ctx context.Context) error { time.Sleep(20 * time.Second); return nil })
		went := make(chan struct{})
		go func() { defer close(went); r.create() }()
		time.Sleep(20*time.Second + poolCalm/2)
		<-went
		if n := r.driver.Calls("restore") - restores; n != 1 {
			t.Errorf("%d VMs were restored, one of them for a create", n)
		}
		time.Sleep(poolCalm)
		synctest.Wait()
		if n := r.Stats().Warm; n != 1 {
			t.Errorf("%d guests wait", n)
		}
	})
}

// TestWarmBacksOff: a guest that cannot be made is tried again, less and less
// often.
func TestWarmBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		r.create()
		r.faults.on("guest.quiesce", func(context.Context) error { return errFault })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := r.faults.count("guest.quiesce"); n < 10 || n > 20 {
			t.Errorf("tried %d times in ten minutes", n)
		}
		if len(r.host.Live()) != 1 {
			t.Errorf("left: %v", r.host.Live())
		}
		r.faults.on("guest.quiesce", nil)
		r.fillPool()
	})
}

// TestWarmShutdown: a guest on its way into the pool goes with the agent.
func TestWarmShutdown(t *testing.T) {
	for _, destroy := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := warmRig(t, 2)
			r.create()
			r.fillPool()
			r.faults.on("guest.quiesce", hang)
			r.create()
			time.Sleep(2 * poolCalm)
			synctest.Wait()
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := r.Shutdown(ctx, destroy); err != nil {
				t.Error(err)
			}
			if want := map[bool]int{false: 2, true: 0}[destroy]; len(r.host.Live()) != want {
				t.Errorf("%v live, want %d", r.host.Live(), want)
			}
		})
	}
}

// TestWarmCallerLeaves: whoever leaves while a guest is told who it is gets no
// sandbox, and nobody else gets that guest.
func TestWarmCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		var told []string
		r.told = func(_ string, in guest.Init) { told = append(told, in.SandboxID) }
		r.create()
		r.fillPool()
		ctx, cancel := context.WithCancel(t.Context())
		r.faults.on("guest.init", func(ctx context.Context) error { cancel(); return hang(ctx) })
		if _, err := r.Create(ctx, CreateRequest{}); !errors.Is(err, context.Canceled) {
			t.Errorf("create: %v", err)
		}
		r.faults.on("guest.init", nil)
		r.fillPool()
		if _, err := r.Create(t.Context(), CreateRequest{}); err != nil {
			t.Error(err)
		}
		if slices.Sort(told); len(slices.Compact(told)) != 3 {
			t.Errorf("told: %v", told)
		}
		r.wantConsistent()
	})
}

// TestWarmGuestGetsItsNetworkFirst: what a create asks of the network is in
// force before the guest learns whose it is.
func TestWarmGuestGetsItsNetworkFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Warm = 1 })
		r.create() // leaves the ready snapshot
		time.Sleep(time.Minute)
		var order []string
		for _, call := range []string{"network.policy", "guest.init"} {
			r.faults.on(call, func(context.Context) error {
				order = append(order, call)
				return nil
			})
		}
		private := false
		ingress := Ingress{Public: &private, MaskHost: "localhost"}
		created, err := r.Create(t.Context(), CreateRequest{Network: closed(), Ingress: ingress})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(ingress, created.Ingress); d != "" {
			t.Errorf("it has another ingress (-want +got):\n%s", d)
		}
		if tokens, err := r.Tokens(created.ID); err != nil || tokens.Traffic == "" || tokens.Traffic == tokens.Envd {
			t.Errorf("its traffic token has %d bytes, %v", len(tokens.Traffic), err)
		}
		if created.From != FromWarm || !slices.Equal(order, []string{"network.policy", "guest.init"}) {
			t.Errorf("started from %s, calls %v", created.From, order)
		}
		r.wantNetwork(created.ID, closed())
	})
}

// TestWarmAuto: as many flat guests wait as the host's free memory allows, and give way when
// it shrinks. Of a machine none waits.
func TestWarmAuto(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var guests atomic.Int64
		guests.Store(3)
		flat := true
		r := newRig(t, func(c *Config) {
			c.Warm, c.freeMem = WarmAuto, func() int64 { return guests.Load() * warmShare * warmGuest }
			c.Drivers[0].(hookedDriver).Driver.(*vmmtest.Fake).Flat = flat
		})
		if _, err := r.Create(t.Context(), CreateRequest{}); err != nil {
			t.Fatal(err)
		}
		wait := func(want int) {
			t.Helper()
			r.fillPool()
			if stats := r.Stats(); stats.Warm != want || stats.WarmWanted != want {
				t.Errorf("%d guests wait of %d, want %d", stats.Warm, stats.WarmWanted, want)
			}
		}
		wait(3)
		made, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || made.From != FromWarm {
			t.Errorf("made from %s, %v", made.From, err)
		}
		guests.Store(1)
		wait(1)
		guests.Store(1000)
		wait(warmMost)
		guests.Store(0)
		wait(0)
		if _, err := r.Create(t.Context(), CreateRequest{}); err != nil {
			t.Fatal(err)
		}
		guests.Store(2)
		wait(2)
		for _, info := range r.List(true) {
			if err := r.Destroy(t.Context(), info.ID); err != nil {
				t.Fatal(err)
			}
		}
		r.die()
		flat = false
		r.start()
		if _, err := r.Create(t.Context(), CreateRequest{}); err != nil {
			t.Fatal(err)
		}
		wait(0)
	})
}
