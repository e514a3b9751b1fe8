package network

import (
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// slotState is how far a reserved slot has come. A slot that is not reserved
// has none.
type slotState int

const (
	// slotClean: nothing of it exists on the host.
	slotClean slotState = iota + 1
	// slotDirty: something of it may exist on the host.
	slotDirty
	// slotWarm: built, never used, and handed out.
	slotWarm
	// slotPooled: built, never used, and waiting in the pool.
	slotPooled
)

// allocator hands out slots in turn, so that a slot that was given back is the
// last one to be used again. Each reserved slot has a kind of link.
//
//	free ─acquire─▶ clean ─opening─▶ dirty ─closed─▶ clean ─release─▶ free
//	free ─claim───────────────────▶ dirty
//	free ─acquireForPool──────────▶ dirty ─warmed─▶ pooled ─acquireWarm─▶ warm ─opening─▶ dirty
//	                                                pooled ◀──release──── warm
type allocator struct {
	mu   sync.Mutex
	last Slot
	used map[Slot]slotState
	kind map[Slot]vmm.LinkKind // of those in used
	// pools have those in slotPooled, the oldest first, for each kind that was asked for.
	pools map[vmm.LinkKind][]Slot
	// fenced are those of used whose last removal failed.
	fenced map[Slot]bool
}

// newAllocator returns one with all slots free, and a pool for a kind.
func newAllocator(kind vmm.LinkKind) allocator {
	return allocator{
		used: map[Slot]slotState{}, kind: map[Slot]vmm.LinkKind{}, pools: map[vmm.LinkKind][]Slot{kind: nil}, fenced: map[Slot]bool{},
	}
}

func (a *allocator) acquire(kind vmm.LinkKind) (Slot, error) { return a.take(kind, slotClean) }

// acquireForPool reserves a slot about to be built.
func (a *allocator) acquireForPool(kind vmm.LinkKind) (Slot, error) { return a.take(kind, slotDirty) }

func (a *allocator) take(kind vmm.LinkKind, st slotState) (Slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.used) >= int(MaxSlot) {
		return 0, errdefs.Exhausted.Errorf("all %d network slots are in use", MaxSlot)
	}
	s := a.last
	for {
		if s++; s > MaxSlot {
			s = 1
		}
		if a.used[s] == 0 {
			break
		}
	}
	a.last = s
	a.used[s], a.kind[s] = st, kind
	return s, nil
}

// acquireWarm takes the oldest slot out of a kind's pool. news says that the pool wants
// another slot now, or that the kind was not asked for before.
func (a *allocator) acquireWarm(kind vmm.LinkKind) (s Slot, ok, news bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	pool, asked := a.pools[kind]
	if len(pool) == 0 {
		a.pools[kind] = nil
		return 0, false, !asked
	}
	s = pool[0]
	a.pools[kind] = slices.Delete(pool, 0, 1)
	a.used[s] = slotWarm
	return s, true, true
}

// short returns a kind of which less than want slots are in the pool.
func (a *allocator) short(want int) (kind vmm.LinkKind, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for kind, pool := range a.pools {
		if len(pool) < want {
			return kind, true
		}
	}
	return "", false
}

// drain takes all slots out of the pools.
func (a *allocator) drain() (all []Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for kind, pool := range a.pools {
		for _, s := range pool {
			a.used[s] = slotWarm
		}
		all = append(all, pool...)
		a.pools[kind] = nil
	}
	return all
}

// warmed puts a slot that was built into the pool.
func (a *allocator) warmed(s Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.toPool(s)
}

func (a *allocator) toPool(s Slot) {
	a.used[s] = slotPooled
	a.pools[a.kind[s]] = append(a.pools[a.kind[s]], s)
}

func (a *allocator) claim(s Slot, kind vmm.LinkKind) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if a.used[s] != 0 {
		return errdefs.AlreadyExists.Errorf("network slot %d is in use", s)
	}
	a.used[s], a.kind[s] = slotDirty, kind
	return nil
}

// kindOf is the kind of a reserved slot, empty for another.
func (a *allocator) kindOf(s Slot) vmm.LinkKind {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.kind[s]
}

func (a *allocator) release(s Slot) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.used[s] {
	case slotClean:
		delete(a.used, s)
		delete(a.kind, s)
	case slotWarm:
		a.toPool(s)
	case slotDirty:
		return errdefs.WrongState.Errorf("network slot %d is not closed", s)
	default:
		return errdefs.NotFound.Errorf("network slot %d is not reserved", s)
	}
	return nil
}

// opening marks a slot dirty, before anything of it is made. A warm slot is
// built already.
func (a *allocator) opening(s Slot) (built bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.used[s] {
	case slotClean:
	case slotWarm:
		built = true
	case slotDirty:
		return false, errdefs.WrongState.Errorf("network slot %d is open", s)
	default:
		return false, errdefs.NotFound.Errorf("network slot %d is not reserved", s)
	}
	a.used[s] = slotDirty
	return built, nil
}

// closed marks a slot clean, after everything of it is gone.
func (a *allocator) closed(s Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.fenced, s)
	if a.used[s] != 0 {
		a.used[s] = slotClean
	}
}

// fence notes that a slot's removal failed. It stays dirty, so that it
// is not handed out, until a removal succeeds.
func (a *allocator) fence(s Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.used[s] == 0 {
		return
	}
	a.used[s] = slotDirty
	a.fenced[s] = true
}

func (a *allocator) pooled(s Slot) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.used[s] == slotPooled
}

func (a *allocator) reserved(s Slot) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.used[s] != 0
}

func (a *allocator) stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := Stats{Reserved: len(a.used), Fenced: len(a.fenced)}
	for _, pool := range a.pools {
		st.Pool += len(pool)
	}
	for _, s := range a.used {
		if s != slotClean {
			st.Open++
		}
	}
	return st
}
