package sandbox

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// fence keeps address slots that may belong to unknown sandboxes from other
// sandboxes. It is safe for concurrent use.
type fence struct {
	net Network

	mu    sync.Mutex
	slots map[network.Slot]bool
}

// hold fences a slot off that the network has already claimed.
func (f *fence) hold(s network.Slot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.slots[s] = true
}

// held returns the slots that are fenced off.
func (f *fence) held() []network.Slot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.slots))
}

// drop takes a slot out of the fence, and says whether it was in it.
func (f *fence) drop(s network.Slot) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	held := f.slots[s]
	delete(f.slots, s)
	return held
}

// claim is Network.Claim, of a slot that is fenced off, too.
func (f *fence) claim(s network.Slot) error {
	if f.drop(s) {
		return nil
	}
	return f.net.Claim(s)
}

// free gives all slots back: they turned out to belong to no sandbox. One that cannot
// be closed stays fenced off.
func (f *fence) free(ctx context.Context) error {
	var errs []error
	for _, s := range f.held() {
		err := f.net.Close(ctx, s)
		if err == nil {
			err = f.net.Release(s)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		f.drop(s)
	}
	return errors.Join(errs...)
}
