package network

import (
	"errors"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestAllocatorExhaustsAndTurns(t *testing.T) {
	var a allocator
	seen := map[Slot]bool{}
	for range MaxSlot {
		s, err := a.acquire()
		if err != nil {
			t.Fatal(err)
		}
		if !s.Valid() || seen[s] {
			t.Fatalf("slot %d: invalid or handed out twice", s)
		}
		seen[s] = true
	}
	if _, err := a.acquire(); !errors.Is(err, errdefs.Exhausted) {
		t.Fatalf("acquire of a full allocator = %v", err)
	}
	for _, s := range []Slot{1, 255, 256, MaxSlot} {
		if err := a.release(s); err != nil {
			t.Fatal(err)
		}
		if got, err := a.acquire(); err != nil || got != s {
			t.Fatalf("acquire = %d, %v; want the only free slot %d", got, err, s)
		}
	}
}

func TestAllocatorReusesLast(t *testing.T) {
	var a allocator
	first, _ := a.acquire()
	if err := a.release(first); err != nil {
		t.Fatal(err)
	}
	if next, _ := a.acquire(); next == first {
		t.Errorf("slot %d is reused at once", first)
	}
}

func TestAllocatorRefuses(t *testing.T) {
	var a allocator
	s, _ := a.acquire()
	check := func(what string, err error, class *errdefs.Class) {
		t.Helper()
		if class == nil && err != nil || class != nil && !errors.Is(err, class) {
			t.Errorf("%s = %v, want class %v", what, err, class)
		}
	}
	check("claim of an acquired slot", a.claim(s), errdefs.AlreadyExists)
	check("claim of slot 0", a.claim(0), errdefs.InvalidArgument)
	check("claim beyond the plan", a.claim(MaxSlot+1), errdefs.InvalidArgument)
	check("release of a foreign slot", a.release(s+1), errdefs.NotFound)
	opening := func(s Slot) error { _, err := a.opening(s); return err }
	check("open of a foreign slot", opening(s+1), errdefs.NotFound)
	check("open", opening(s), nil)
	check("open again", opening(s), errdefs.WrongState)
	check("release while open", a.release(s), errdefs.WrongState)
	a.closed(s)
	check("release", a.release(s), nil)
	check("release again", a.release(s), errdefs.NotFound)
	check("claim", a.claim(s), nil)
	check("release of a claimed slot that was not closed", a.release(s), errdefs.WrongState)
	a.closed(s + 5)
	check("release of a foreign slot after its close", a.release(s+5), errdefs.NotFound)
}

func TestAllocatorConcurrently(t *testing.T) {
	var (
		a    allocator
		mu   sync.Mutex
		held = map[Slot]bool{}
		wg   sync.WaitGroup
	)
	for range 32 {
		wg.Go(func() {
			for range 200 {
				s, err := a.acquire()
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
	var a allocator
	if _, ok := a.acquireWarm(); ok {
		t.Fatal("an empty pool gave a slot")
	}
	s, err := a.acquireForPool()
	must(t, err)
	if err := a.release(s); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("release of a slot being built = %v", err)
	}
	a.warmed(s)
	if err := a.claim(s); !errors.Is(err, errdefs.AlreadyExists) {
		t.Errorf("claim of a pooled slot = %v", err)
	}
	if err := a.release(s); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("release of a pooled slot = %v", err)
	}
	if _, err := a.opening(s); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("open of a pooled slot = %v", err)
	}
	for range 2 { // taken, given back unopened, taken again
		got, ok := a.acquireWarm()
		if !ok || got != s || a.pooled(s) {
			t.Fatalf("acquireWarm = %d, %v", got, ok)
		}
		if _, ok := a.acquireWarm(); ok {
			t.Fatal("the pool gave a slot twice")
		}
		must(t, a.release(s))
	}
	a.acquireWarm()
	if built, err := a.opening(s); err != nil || !built {
		t.Errorf("open of a warm slot = %v, %v", built, err)
	}
	if built, err := a.opening(s); !errors.Is(err, errdefs.WrongState) || built {
		t.Errorf("second open of a warm slot = %v, %v", built, err)
	}
}
