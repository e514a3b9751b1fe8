package network

import (
	"errors"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestAllocatorExhaustsAndTurns(t *testing.T) {
	a := newAllocator(vmm.Tap)
	seen := map[Slot]bool{}
	for range MaxSlot {
		s, err := a.acquire(vmm.Tap)
		if err != nil {
			t.Fatal(err)
		}
		if !s.Valid() || seen[s] {
			t.Fatalf("slot %d: invalid or handed out twice", s)
		}
		seen[s] = true
	}
	if _, err := a.acquire(vmm.Tap); !errors.Is(err, errdefs.Exhausted) {
		t.Fatalf("acquire of a full allocator = %v", err)
	}
	for _, s := range []Slot{1, 255, 256, MaxSlot} {
		if err := a.release(s); err != nil {
			t.Fatal(err)
		}
		if got, err := a.acquire(vmm.Tap); err != nil || got != s {
			t.Fatalf("acquire = %d, %v; want the only free slot %d", got, err, s)
		}
	}
}

func TestAllocatorReusesLast(t *testing.T) {
	a := newAllocator(vmm.Tap)
	first, _ := a.acquire(vmm.Tap)
	if err := a.release(first); err != nil {
		t.Fatal(err)
	}
	if next, _ := a.acquire(vmm.Tap); next == first {
		t.Errorf("slot %d is reused at once", first)
	}
}

func TestAllocatorRefuses(t *testing.T) {
	a := newAllocator(vmm.Tap)
	s, _ := a.acquire(vmm.Tap)
	check := func(what string, err error, class *errdefs.Class) {
		t.Helper()
		if class == nil && err != nil || class != nil && !errors.Is(err, class) {
			t.Errorf("%s = %v, want class %v", what, err, class)
		}
	}
	check("claim of an acquired slot", a.claim(s, vmm.Tap), errdefs.AlreadyExists)
	check("claim of slot 0", a.claim(0, vmm.Tap), errdefs.InvalidArgument)
	check("claim beyond the plan", a.claim(MaxSlot+1, vmm.Tap), errdefs.InvalidArgument)
	check("release of a foreign slot", a.release(s+1), errdefs.NotFound)
	opening := func(s Slot) error { _, err := a.opening(s); return err }
	check("open of a foreign slot", opening(s+1), errdefs.NotFound)
	check("open", opening(s), nil)
	check("open again", opening(s), errdefs.WrongState)
	check("release while open", a.release(s), errdefs.WrongState)
	a.closed(s)
	check("release", a.release(s), nil)
	check("release again", a.release(s), errdefs.NotFound)
	check("claim", a.claim(s, vmm.Tap), nil)
	check("release of a claimed slot that was not closed", a.release(s), errdefs.WrongState)
	a.closed(s + 5)
	check("release of a foreign slot after its close", a.release(s+5), errdefs.NotFound)
}

func TestAllocatorConcurrently(t *testing.T) {
	var (
		a    = newAllocator(vmm.Tap)
		mu   sync.Mutex
		held = map[Slot]bool{}
		wg   sync.WaitGroup
	)
	for range 32 {
		wg.Go(func() {
			for range 200 {
				s, err := a.acquire(vmm.Tap)
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
				mu.Lock()
				delete(held, s)
				mu.Unlock()
				if err := a.release(s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestAllocatorPool(t *testing.T) {
	a := newAllocator(vmm.Tap)
	if _, ok, _ := a.acquireWarm(vmm.Tap); ok {
		t.Fatal("an empty pool gave a slot")
	}
	s, err := a.acquireForPool(vmm.Tap)
	must(t, err)
	if err := a.release(s); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release of a slot being built = %v", err)
	}
	a.warmed(s)
	if err := a.claim(s, vmm.Tap); !errors.Is(err, errdefs.AlreadyExists) {
		t.Errorf("claim of a pooled slot = %v", err)
	}
	if err := a.release(s); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("release of a pooled slot = %v", err)
	}
	if _, err := a.opening(s); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("open of a pooled slot = %v", err)
	}
	for range 2 { // taken, given back unopened, taken again
		got, ok, _ := a.acquireWarm(vmm.Tap)
		if !ok || got != s || a.pooled(s) {
			t.Fatalf("acquireWarm = %d, %v", got, ok)
		}
		if _, ok, _ := a.acquireWarm(vmm.Tap); ok {
			t.Fatal("the pool gave a slot twice")
		}
		must(t, a.release(s))
	}
	a.acquireWarm(vmm.Tap)
	if built, err := a.opening(s); err != nil || !built {
		t.Errorf("open of a warm slot = %v, %v", built, err)
	}
	if built, err := a.opening(s); !errors.Is(err, errdefs.WrongState) || built {
		t.Errorf("second open of a warm slot = %v, %v", built, err)
	}
}

// Each kind has a pool of its own from the time that it was asked for.
func TestAllocatorPoolsOfKinds(t *testing.T) {
	a := newAllocator(vmm.Tap)
	if kind, short := a.short(1); !short || kind != vmm.Tap {
		t.Errorf("short of %q, %v", kind, short)
	}
	tap, err := a.acquireForPool(vmm.Tap)
	must(t, err)
	a.warmed(tap)
	if kind, short := a.short(1); short {
		t.Errorf("short of %q", kind)
	}
	if s, ok, news := a.acquireWarm(vmm.Packet); ok || !news {
		t.Errorf("a tap's slot for a packet socket: %d, %v, %v", s, ok, news)
	}
	if _, _, news := a.acquireWarm(vmm.Packet); news {
		t.Error("the second one that asks is news, too")
	}
	if kind, short := a.short(1); !short || kind != vmm.Packet {
		t.Errorf("short of %q, %v", kind, short)
	}
	packet, err := a.acquireForPool(vmm.Packet)
	must(t, err)
	a.warmed(packet)
	if s, ok, _ := a.acquireWarm(vmm.Packet); !ok || s != packet || a.kindOf(s) != vmm.Packet {
		t.Errorf("slot %d, %v", s, ok)
	}
	must(t, a.release(packet)) // goes back to where it came from
	if s, ok, _ := a.acquireWarm(vmm.Tap); !ok || s != tap {
		t.Errorf("slot %d, %v", s, ok)
	}
	if all := a.drain(); len(all) != 1 || all[0] != packet {
		t.Errorf("drained %v", all)
	}
	if a.kindOf(packet+1) != "" {
		t.Error("a free slot has a kind")
	}
}
