package network

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// run runs the pool until the test ends, or the returned function is called.
func run(t testing.TB, n *Network) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { n.Run(ctx) })
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

// full waits until the pool is.
func full(t testing.TB, n *Network) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); n.Stats().Pool < n.opts.Pool; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the pool does not fill: %+v", n.Stats())
		}
	}
}

func TestPool(t *testing.T) {
	n := world(t, Options{Pool: 3})
	ctx := t.Context()
	stop := run(t, n)
	full(t, n)
	if strays, err := n.Strays(ctx); err != nil || len(strays) > 0 {
		t.Errorf("the pool's slots are strays: %v, %v", strays, err)
	}

	// A warm slot works, and the pool fills again.
	_, a, g := open(t, n)
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	if got := ask(t, here, "tcp", a.HostIP, 49983, timeout); got == "" {
		t.Error("the guest in a warm slot does not answer")
	}
	full(t, n)

	// One taken and given back unopened is in the pool again.
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	full(t, n)
	must(t, n.Release(s))
	if st := n.Stats(); st.Pool != 4 {
		t.Errorf("stats = %+v, want 4 in the pool", st)
	}
	if err := n.Close(ctx, s); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("close of a slot in the pool = %v", err)
	}

	// A slot that was removed while it waited in the pool is made again.
	s, err = n.Acquire(ctx, kind)
	must(t, err)
	must(t, removeNS(n.plan.Addrs(s).NetNSPath))
	must(t, n.Open(ctx, s))
	if !n.exists(s) {
		t.Error("a broken warm slot was not mended")
	}
	must(t, n.Close(ctx, s))
	must(t, n.Release(s))

	stop()
	if st := n.Stats(); st != (Stats{Reserved: 1, Open: 1}) {
		t.Errorf("stats after the pool's end = %+v, want the one open slot", st)
	}
}

func TestPoolEndsClean(t *testing.T) {
	n := world(t, Options{Pool: 4})
	before := inventory(t)
	stop := run(t, n)
	full(t, n)
	stop()
	if d := cmp.Diff(before, inventory(t)); d != "" {
		t.Errorf("the pool left (-before +after):\n%s", d)
	}
	if st := n.Stats(); st != (Stats{}) {
		t.Errorf("stats = %+v, want none", st)
	}
}

// A slot that cannot be built is freed; one that cannot be removed either is
// kept from everybody until it can.
func TestPoolFencesAndRetries(t *testing.T) {
	n := world(t, Options{Pool: 1})
	var mu sync.Mutex
	failing, tries := true, 0
	n.hook = func(_ Slot, step string) error {
		mu.Lock()
		defer mu.Unlock()
		if step == "veth" && failing {
			tries++
			return errors.New("injected")
		}
		return nil
	}
	// The first slot's name is taken by something that does not go away.
	must(t, os.MkdirAll(netnsDir+"/tnet-1/full", 0o755))
	stop := run(t, n)
	await := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %+v", what, n.Stats())
			}
		}
	}
	await("no second try", func() bool { mu.Lock(); defer mu.Unlock(); return tries >= 1 })
	if err := n.Release(1); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release of the fenced slot = %v", err)
	}
	mu.Lock()
	failing = false
	mu.Unlock()
	await("no slot after the failure", func() bool { return n.Stats().Pool == 1 })
	if s, err := n.Acquire(t.Context(), kind); err != nil || s == 1 {
		t.Errorf("acquire = %d, %v; want another than the fenced slot", s, err)
	} else {
		must(t, n.Release(s))
	}
	must(t, os.Remove(netnsDir+"/tnet-1/full"))
	await("the fenced slot is not freed", func() bool { return !n.slots.reserved(1) })
	stop()
}

func TestPoolConcurrently(t *testing.T) {
	n := world(t, Options{Pool: 3})
	before := inventory(t)
	stop := run(t, n)
	var (
		mu   sync.Mutex
		held = map[Slot]bool{}
		wg   sync.WaitGroup
	)
	for i := range 6 {
		wg.Go(func() {
			for j := range 4 {
				s, err := n.Acquire(t.Context(), kind)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if held[s] {
					t.Errorf("slot %d is handed out twice", s)
				}
				held[s] = true
				mu.Unlock()
				if (i+j)%3 > 0 {
					err = errors.Join(n.Open(t.Context(), s), n.Close(t.Context(), s))
				}
				mu.Lock()
				delete(held, s)
				mu.Unlock()
				if err := errors.Join(err, n.Release(s)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	stop()
	if d := cmp.Diff(before, inventory(t)); d != "" {
		t.Errorf("left (-before +after):\n%s", d)
	}
	if st := n.Stats(); st != (Stats{}) {
		t.Errorf("stats = %+v, want none", st)
	}
}

// The kernel's memory of a closed slot's connections does not await the next.
func TestCloseForgetsConnections(t *testing.T) {
	n := world(t, Options{})
	ctx := t.Context()
	s, err := n.Acquire(ctx, kind)
	must(t, err)
	must(t, n.Open(ctx, s))
	a := n.plan.Addrs(s)
	t.Run("traffic", func(t *testing.T) {
		g := startGuest(t, a)
		serve(t, g.ns, netip.IPv4Unspecified(), 49983)
		serve(t, internet, internetAddr, 7020)
		if ask(t, here, "tcp", a.HostIP, 49983, timeout) == "" || ask(t, g.ns, "udp", internetAddr, 7020, timeout) == "" {
			t.Fatal("no answer")
		}
	})
	if n := connections(t, a.HostIP); n < 2 {
		t.Fatalf("the host remembers %d connections of the slot, want both", n)
	}
	must(t, n.Close(ctx, s))
	if n := connections(t, a.HostIP); n > 0 {
		t.Errorf("the host remembers %d connections of a closed slot", n)
	}
	must(t, n.Release(s))
}

func connections(t *testing.T, ip netip.Addr) (count int) {
	t.Helper()
	flows, err := listed(func() ([]*netlink.ConntrackFlow, error) {
		return netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	})
	must(t, err)
	for _, f := range flows {
		if f.Forward.SrcIP.Equal(ip.AsSlice()) || f.Forward.DstIP.Equal(ip.AsSlice()) {
			count++
		}
	}
	return count
}

// BenchmarkAcquireWarm times what a create waits for: a slot out of the pool,
// opened. Building it again is not part of it.
func BenchmarkAcquireWarm(b *testing.B) {
	n := world(b, Options{Pool: 8})
	run(b, n)
	full(b, n)
	var acquire, open time.Duration
	for b.Loop() {
		b.StopTimer()
		full(b, n)
		b.StartTimer()
		at := time.Now()
		s, err := n.Acquire(b.Context(), kind)
		acquire += time.Since(at)
		must(b, err)
		at = time.Now()
		must(b, n.Open(b.Context(), s))
		open += time.Since(at)
		b.StopTimer()
		must(b, n.Close(b.Context(), s))
		must(b, n.Release(s))
		b.StartTimer()
	}
	b.ReportMetric(float64(acquire.Microseconds())/float64(b.N), "µs-acquire/op")
	b.ReportMetric(float64(open.Microseconds())/float64(b.N), "µs-open/op")
}
