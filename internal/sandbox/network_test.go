package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

func closed() Policy {
	no := false
	return Policy{
		Egress: Egress{AllowInternet: &no, Allow: []string{"example.com"}, Deny: []string{}},
		Limits: network.Limits{InBytes: 10_000},
	}
}

func (r *rig) updateNetwork(ctx context.Context, id ID, p Policy) error {
	return r.UpdateNetwork(ctx, id, p.Egress, &p.Limits)
}

// wantNetwork fails the test unless the sandbox's slot has what the policy comes
// to.
func (r *rig) wantNetwork(id ID, s Policy) {
	r.t.Helper()
	info, err := r.Get(id)
	if err != nil {
		r.t.Fatal(err)
	}
	if d := cmp.Diff(s, info.Network); d != "" {
		r.t.Errorf("sandbox %s has another network (-want +got):\n%s", id, d)
	}
	want, err := r.net.ParsePolicy(s.Egress)
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

func TestPolicy(t *testing.T) {
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

	if err := r.Hibernate(ctx, id, Hibernation{}); err != nil {
		t.Fatal(err)
	}
	other := Policy{Egress: Egress{Deny: []string{"192.0.2.0/24"}, DNS: []string{}}}
	if err := r.updateNetwork(ctx, id, other); err != nil {
		t.Fatalf("update of a hibernated sandbox: %v", err)
	}
	if err := r.Resume(ctx, id); err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(id, other)

	if err := r.updateNetwork(ctx, id, closed()); err != nil {
		t.Fatal(err)
	}
	forked, err := r.Fork(ctx, id, ForkRequest{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(forked.Sandboxes[0].ID, closed())

	if err := r.Pause(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := r.updateNetwork(ctx, id, other); err != nil {
		t.Fatalf("update of a paused sandbox: %v", err)
	}
	r.wantNetwork(id, other)

	traffic, err := r.Traffic(ctx)
	if err != nil || len(traffic) != 2 || traffic[id].InBytes == 0 {
		t.Errorf("traffic = %v, %v", traffic, err)
	}
}

func TestPolicyOutlivesTheAgent(t *testing.T) {
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
	// The host's own policy may have changed meanwhile.
	r.wantNetwork(plain, Policy{})
}

// TestPolicyOfAnEarlierAgent: a name that is allowed where the internet is open is
// refused by now; a sandbox that has it keeps it.
func TestPolicyOfAnEarlierAgent(t *testing.T) {
	r := newRig(t)
	id := r.create()
	b, err := r.find(id)
	if err != nil {
		t.Fatal(err)
	}
	old := Policy{Egress: Egress{Allow: []string{"example.com"}}}
	if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
		t.Fatal(err)
	}
	if err := r.save(b, func(rec *Record) { rec.Network = old }); err != nil {
		t.Fatal(err)
	}
	if err := r.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(id, old)
	forked, err := r.Fork(t.Context(), id, ForkRequest{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(forked.Sandboxes[0].ID, old)
}

// TestRecordBeforeTheLast: an agent that cannot use the last record takes the one before,
// which must not allow what a later policy denies.
func TestRecordBeforeTheLast(t *testing.T) {
	r := newRig(t)
	id := r.create()
	for _, hibernated := range []bool{false, true} {
		if hibernated {
			if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.updateNetwork(t.Context(), id, Policy{}); err != nil {
			t.Fatal(err)
		}
		if err := r.updateNetwork(t.Context(), id, closed()); err != nil {
			t.Fatal(err)
		}
		data, _, err := readRecord(r.store.previous(id))
		if err != nil {
			t.Fatal(err)
		}
		rec, err := decodeRecord(data)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(closed(), rec.Network); d != "" {
			t.Errorf("hibernated %v: the record before the last has another policy (-want +got):\n%s", hibernated, d)
		}
	}
}

// TestOpenInternetCostsNothing: a policy that changes nothing is not set. Some clients
// say with each create that the internet is open.
func TestOpenInternetCostsNothing(t *testing.T) {
	r := newRig(t)
	yes := true
	r.faults.on("network.policy", func(context.Context) error { return errFault })
	info, err := r.Create(t.Context(), CreateRequest{Network: Policy{Egress: Egress{AllowInternet: &yes}}})
	if err != nil {
		t.Fatal(err)
	}
	r.faults.on("network.policy", nil)
	r.wantNetwork(info.ID, Policy{Egress: Egress{AllowInternet: &yes}})
}

// TestLimitsStayIfNotSaid: what a sandbox may reach is replaced as a whole; the limits,
// of which the caller did not speak, are what they were.
func TestLimitsStayIfNotSaid(t *testing.T) {
	r := newRig(t)
	public := false
	info, err := r.Create(t.Context(), CreateRequest{Network: closed(), Ingress: Ingress{Public: &public}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.UpdateNetwork(t.Context(), info.ID, Egress{}, nil); err != nil {
		t.Fatal(err)
	}
	r.wantNetwork(info.ID, Policy{Limits: closed().Limits})
	if got := r.wantState(info.ID, Running).Ingress; got.Public == nil || *got.Public {
		t.Errorf("ingress is %+v, want it as it was", got)
	}
}

// TestTrafficToken: a sandbox whose servers are not public has a token for them, the
// same for its whole life. Its fork has another one.
func TestTrafficToken(t *testing.T) {
	r := newRig(t)
	tokenOf := func(id ID) string {
		b, err := r.find(id)
		if err != nil {
			t.Fatal(err)
		}
		return b.record().TrafficToken
	}
	yes, no := true, false
	for _, i := range []Ingress{{}, {Public: &yes}} {
		info, err := r.Create(t.Context(), CreateRequest{Ingress: i})
		if err != nil {
			t.Fatal(err)
		}
		if token := tokenOf(info.ID); token != "" {
			t.Errorf("a sandbox with public servers has a token of %d bytes", len(token))
		}
	}
	ingress := Ingress{Public: &no, MaskHost: "localhost:${PORT}"}
	info, err := r.Create(t.Context(), CreateRequest{Ingress: ingress})
	if err != nil {
		t.Fatal(err)
	}
	id, token := info.ID, tokenOf(info.ID)
	if len(token) < 20 {
		t.Fatalf("the token has %d bytes", len(token))
	}
	if text := fmt.Sprintf("%+v", info); strings.Contains(text, token) {
		t.Error("the token is in what everybody may know of the sandbox")
	}
	for what, do := range map[string]func() error{
		"paused":     func() error { return r.Pause(t.Context(), id) },
		"hibernated": func() error { return r.Hibernate(t.Context(), id, Hibernation{}) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		r.die()
		r.start()
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if tokenOf(id) != token {
			t.Errorf("the sandbox has another token after it was %s", what)
		}
		if d := cmp.Diff(ingress, r.wantState(id, Running).Ingress); d != "" {
			t.Errorf("the sandbox has another ingress after it was %s (-want +got):\n%s", what, d)
		}
	}
	forked, err := r.Fork(t.Context(), id, ForkRequest{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	fork := forked.Sandboxes[0]
	if d := cmp.Diff(ingress, fork.Ingress); d != "" {
		t.Errorf("the fork has another ingress (-want +got):\n%s", d)
	}
	if got := tokenOf(fork.ID); len(got) < 20 || got == token {
		t.Errorf("the fork has a token of %d bytes, equal %v", len(got), got == token)
	}
}

// TestHostThatBecameStricter: a policy that the host's new one refuses
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
	if err := r.updateNetwork(t.Context(), info.ID, closed()); !errors.Is(err, errdefs.Denied) {
		t.Errorf("update: %v, want denied", err)
	}
}

func TestBadPolicyChangesNothing(t *testing.T) {
	r := newRig(t)
	bad := []Policy{
		{Egress: Egress{Allow: []string{"nonsense!"}}},
		{Egress: Egress{Allow: []string{"example.com"}}}, // the internet is open
	}
	for _, bad := range bad {
		if _, err := r.Create(t.Context(), CreateRequest{Network: bad}); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("create: %v, want invalid argument", err)
		}
	}
	r.wantNothing()
	info, err := r.Create(t.Context(), CreateRequest{Network: closed()})
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range bad {
		if err := r.updateNetwork(t.Context(), info.ID, bad); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("update: %v, want invalid argument", err)
		}
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
	if err := r.updateNetwork(t.Context(), info.ID, Policy{}); !errors.Is(err, errFault) {
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
		err = errors.Join(r.Hibernate(t.Context(), doomed, Hibernation{}), r.Resume(t.Context(), doomed))
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
