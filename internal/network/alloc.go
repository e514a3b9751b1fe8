package network

import (
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
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
// last one to be used again. The zero value has all slots free.
//
//	free ─acquire─▶ clean ─opening─▶ dirty ─closed─▶ clean ─release─▶ free
//	free ─claim───────────────────▶ dirty
//	free ─acquireForPool──────────▶ dirty ─warmed─▶ pooled ─acquireWarm─▶ warm ─opening─▶ dirty
//	                                                pooled ◀──release──── warm
type allocator struct {
	mu   sync.Mutex
	last Slot
	used map[Slot]slotState
	pool []Slot // those in slotPooled, the oldest first
	// fenced are those of used whose last removal failed.
	fenced map[Slot]bool
}

func (a *allocator) acquire() (Slot, error) { return a.take(slotClean) }

// acquireForPool reserves a slot about to be built.
func (a *allocator) acquireForPool() (Slot, error) { return a.take(slotDirty) }

func (a *allocator) take(st slotState) (Slot, error) {
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
	a.set(s, st)
	return s, nil
}

// acquireWarm takes the oldest slot out of the pool.
func (a *allocator) acquireWarm() (Slot, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.pool) == 0 {
		return 0, false
	}
	s := a.pool[0]
	a.pool = slices.Delete(a.pool, 0, 1)
	a.used[s] = slotWarm
	return s, true
}

// warmed puts a slot that was built into the pool.
func (a *allocator) warmed(s Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used[s] = slotPooled
	a.pool = append(a.pool, s)
}

func (a *allocator) claim(s Slot) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !s.Valid() {
		return errdefs.InvalidArgument.Errorf("network slot %d is not in 1..%d", s, MaxSlot)
	}
	if a.used[s] != 0 {
		return errdefs.AlreadyExists.Errorf("network slot %d is in use", s)
	}
	a.set(s, slotDirty)
	return nil
}

func (a *allocator) release(s Slot) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.used[s] {
	case slotClean:
		delete(a.used, s)
	case slotWarm:
		a.used[s] = slotPooled
		a.pool = append(a.pool, s)
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
	if a.fenced == nil {
		a.fenced = map[Slot]bool{}
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

func (a *allocator) warmCount() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.pool)
}

func (a *allocator) stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := Stats{Reserved: len(a.used), Pool: len(a.pool), Fenced: len(a.fenced)}
	for _, s := range a.used {
		if s != slotClean {
			st.Open++
		}
	}
	return st
}

func (a *allocator) set(s Slot, st slotState) {
	if a.used == nil {
		a.used = map[Slot]slotState{}
	}
	a.used[s] = st
}
