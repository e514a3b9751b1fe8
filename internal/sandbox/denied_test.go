package sandbox

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// What a policy refuses is told by an event: once in a minute for each name, and not so
// often that a guest can push others' events out.
func TestDeniedIsAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made, other := r.made(CreateRequest{}), r.made(CreateRequest{})
		deny := func(name string) { r.deny(made.ID, name) }
		events := func() []string { return r.deniedEvents(made.ID) }
		pass(time.Second)
		for range 6 {
			deny("evil.example")
			pass(9 * time.Second)
		}
		pass(deniedEvery)
		if got := events(); len(got) < 1 || len(got) > 2 || got[0] != "tls evil.example port 443: not in the allow list" {
			t.Errorf("events %q", got)
		}
		before := len(events())
		for i := range 1000 {
			deny(fmt.Sprint("name-", i))
		}
		pass(deniedEvery)
		if n := len(events()) - before; n > deniedBurst {
			t.Errorf("%d events at once", n)
		}
		r.wantDenied(made.ID, 1006)
		r.wantDenied(other.ID, 0)
		r.hibernate(made.ID)
		r.wantDenied(made.ID, 0)
		_, err := r.Denied(t.Context(), r.NewID())
		wantClass(t, err, errdefs.NotFound)
	})
}

func (r *rig) wantDenied(id ID, want int) {
	r.t.Helper()
	if list, err := r.Denied(r.t.Context(), id); err != nil || len(list) != want {
		r.t.Errorf("sandbox %s: %d denials, %v; want %d", id, len(list), err, want)
	}
}

// deny lets the network refuse a name to a sandbox.
func (r *rig) deny(id ID, name string) {
	r.t.Helper()
	b, err := r.find(id)
	if err != nil {
		r.t.Fatal(err)
	}
	s := b.record().Slot
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	if r.net.denied == nil {
		r.net.denied = map[network.Slot][]network.Denial{}
	}
	r.net.denied[s] = append([]network.Denial{{
		Time: time.Now(), Kind: "tls", Name: name, Addr: netip.MustParseAddrPort("192.0.0.8:443"), Rule: "not in the allow list", Count: 1,
	}}, r.net.denied[s]...)
}

// deniedEvents are the details of the events of a sandbox that say what was refused.
func (r *rig) deniedEvents(id ID) (details []string) {
	for _, e := range r.History("", id) {
		if e.Kind == EgressDenied {
			details = append(details, e.Detail)
		}
	}
	return details
}
