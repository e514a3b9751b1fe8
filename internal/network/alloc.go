package network

import (
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
)

// allocator hands out slots in turn, so that a slot that was given back is the
// last one to be used again. The zero value has all slots free.
type allocator struct {
	mu   sync.Mutex
	last Slot
	used map[Slot]slotState
}

func (a *allocator) acquire() (Slot, error) {
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
	a.set(s, slotClean)
	return s, nil
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
	case 0:
		return errdefs.NotFound.Errorf("network slot %d is not reserved", s)
	case slotDirty:
		return errdefs.WrongState.Errorf("network slot %d is not closed", s)
	}
	delete(a.used, s)
	return nil
}

// opening marks a clean slot dirty, before anything of it is made.
func (a *allocator) opening(s Slot) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.used[s] {
	case 0:
		return errdefs.NotFound.Errorf("network slot %d is not reserved", s)
	case slotDirty:
		return errdefs.WrongState.Errorf("network slot %d is open", s)
	}
	a.used[s] = slotDirty
	return nil
}

// closed marks a slot clean, after everything of it is gone.
func (a *allocator) closed(s Slot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.used[s] != 0 {
		a.used[s] = slotClean
	}
}

func (a *allocator) set(s Slot, st slotState) {
	if a.used == nil {
		a.used = map[Slot]slotState{}
	}
	a.used[s] = st
}
