package sandbox

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

func closed() NetworkSettings {
	no := false
	return NetworkSettings{AllowInternet: &no, Allow: []string{"example.com"}, Limits: network.Limits{InBytes: 10_000}}
}

// wantNetwork fails the test unless the sandbox's slot has what the settings
// come to.
func (r *rig) wantNetwork(id ID, s NetworkSettings) {
	r.t.Helper()
	info, err := r.Get(id)
	if err != nil {
		r.t.Fatal(err)
	}
	if d := cmp.Diff(s, info.Network); d != "" {
		r.t.Errorf("sandbox %s has other settings (-want +got):\n%s", id, d)
	}
	want, err := r.net.ParsePolicy(s.AllowInternet, s.Allow, s.Deny)
	if err != nil {
		r.t.Fatal(err)
	}
	b, err := r.find(id)
	if err != nil {
		r.t.Fatal(err)
	}
	slot := b.record().Slot
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	if d := cmp.Diff(want, r.net.policies[slot]); d != "" {
		r.t.Errorf("sandbox %s has another policy in force (-want +got):\n%s", id, d)
	}
	if got := r.net.limits[slot]; got != s.Limits {
		r.t.Errorf("sandbox %s has the limits %+v in force, want %+v", id, got, s.Limits)
	}
}

func TestNetworkSettings(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	asked := closed()
	info, err := r.Create(ctx, CreateRequest{Network: asked})
	if err != nil {
		t.Fatal(err)
	}
	id := info.ID
	r.wantNetwork(id, closed())
	// What is handed out and what was handed in are copies.
	asked.Allow[0] = "changed"
	info.Network.Allow[0] = "changed"
	*info.Network.AllowInternet = true
	r.wantNetwork(id, closed())

	if err := r.Hibernate(ctx, id); err != nil {
		t.Fatal(err)
	}
	other := NetworkSettings{Deny: []string{"192.0.2.0/24"}}
	if err := r.UpdateNetwork(ctx, id, other); err != nil {
		t.Fatalf("update of a hibernated sandbox: %v", err)
	}
	if err := r.Resume(ctx, id); err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(id, other)

	if err := r.UpdateNetwork(ctx, id, closed()); err != nil {
		t.Fatal(err)
	}
	forked, err := r.Fork(ctx, id, 1)
	if err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(forked.Sandboxes[0].ID, closed())

	if err := r.Pause(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := r.UpdateNetwork(ctx, id, other); err != nil {
		t.Fatalf("update of a paused sandbox: %v", err)
	}
	r.wantNetwork(id, other)

	traffic, err := r.Traffic(ctx)
	if err != nil || len(traffic) != 2 || traffic[id].InBytes == 0 {
		t.Errorf("traffic = %v, %v", traffic, err)
	}
}

func TestNetworkSettingsOutliveTheAgent(t *testing.T) {
	r := newRig(t)
	info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
	if err != nil {
		t.Fatal(err)
	}
	plain := r.create()
	r.die()
	// What the agent did for a policy ended with it.
	r.net.policies = map[network.Slot]network.Policy{}
	r.start()
	r.wantNetwork(info.ID, closed())
	// The host's own settings may have changed meanwhile.
	r.wantNetwork(plain, NetworkSettings{})
}

// TestHostThatBecameStricter: a policy that the host's new settings refuse
// costs the sandbox its network, not its life.
func TestHostThatBecameStricter(t *testing.T) {
	r := newRig(t)
	info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
	if err != nil {
		t.Fatal(err)
	}
	r.die()
	r.net.strict = true
	r.start()
	r.wantState(info.ID, Running)
	b, err := r.find(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	if p := r.net.policies[b.record().Slot]; p.Mode != network.None || len(p.AllowNames) > 0 {
		t.Errorf("it has %+v in force, want nothing reached", p)
	}
	if err := r.UpdateNetwork(t.Context(), info.ID, closed()); !errors.Is(err, errdefs.Denied) {
		t.Errorf("update: %v, want denied", err)
	}
}

func TestBadNetworkSettingsChangeNothing(t *testing.T) {
	r := newRig(t)
	bad := NetworkSettings{Allow: []string{"nonsense!"}}
	if _, err := r.Create(t.Context(), CreateRequest{Network: bad}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("create: %v, want invalid argument", err)
	}
	r.wantNothing()
	info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.UpdateNetwork(t.Context(), info.ID, bad); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("update: %v, want invalid argument", err)
	}
	r.wantNetwork(info.ID, closed())
}

func TestFailedNetworkUpdateIsNotRemembered(t *testing.T) {
	r := newRig(t)
	info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
	if err != nil {
		t.Fatal(err)
	}
	r.faults.on("network.policy", func(context.Context) error { return errFault })
	if err := r.UpdateNetwork(t.Context(), info.ID, NetworkSettings{}); !errors.Is(err, errFault) {
		t.Errorf("update: %v", err)
	}
	r.faults.on("network.policy", nil)
	r.wantNetwork(info.ID, closed())
	if rec, err := (store{dir: r.store.dir}).load(info.ID); err != nil || !cmp.Equal(rec.Network, closed()) {
		t.Errorf("on disk: %+v, %v", rec.Network, err)
	}
}

func TestReconcile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
		if err != nil {
			t.Fatal(err)
		}
		mended, doomed, paused := info.ID, r.create(), r.create()
		if err := r.Pause(t.Context(), paused); err != nil {
			t.Fatal(err)
		}
		slot := func(id ID) network.Slot {
			b, err := r.find(id)
			if err != nil {
				t.Fatal(err)
			}
			return b.record().Slot
		}
		lost := slot(doomed)
		const stray = network.Slot(4711)
		r.net.mu.Lock()
		r.net.broken[slot(mended)], r.net.broken[lost] = false, true
		r.net.policies = map[network.Slot]network.Policy{}
		r.net.open[stray] = true
		r.net.mu.Unlock()

		time.Sleep(reconcileEvery + time.Second)
		synctest.Wait()
		r.wantState(mended, Running)
		r.wantNetwork(mended, closed())
		r.wantState(paused, Paused)
		if info := r.wantState(doomed, Running); info.Reason != Unreachable || info.Detail == "" {
			t.Errorf("it is marked as %q (%s), want %s", info.Reason, info.Detail, Unreachable)
		}
		r.net.mu.Lock()
		defer r.net.mu.Unlock()
		if r.net.open[stray] || r.net.taken[stray] {
			t.Error("the stray slot is still there")
		}
		if !r.net.open[lost] || !r.net.taken[lost] {
			t.Error("the slot of the sandbox that cannot be mended is not its own any more")
		}
		// A new network, its memory and its disk as they were.
		r.net.mu.Unlock()
		err = errors.Join(r.Hibernate(t.Context(), doomed), r.Resume(t.Context(), doomed))
		r.net.mu.Lock()
		if err != nil {
			t.Error(err)
		}
	})
}

// TestReconcileLeavesWhatIsInTheMaking: a sandbox that is being created is
// none of the reconciler's business.
func TestReconcileLeavesWhatIsInTheMaking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.BootTimeout = time.Hour })
		for _, step := range []string{"overlay", "network.open done", "guest.ready"} {
			r.faults.on(step, func(context.Context) error {
				time.Sleep(2 * reconcileEvery)
				return nil
			})
		}
		info, err := r.Create(t.Context(), CreateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if live := r.host.Live(); len(live) != 1 || live[0] != string(info.ID) {
			t.Errorf("VMs %v live, want that of %s", live, info.ID)
		}
		r.wantConsistent()
	})
}
