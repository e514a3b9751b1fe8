package network

import (
	"context"
	"time"
)

// retryAfter is how long Run waits after a slot could not be built or removed.
const retryAfter = time.Second

// Run keeps Options.Pool slots of each kind built ahead until ctx ends. Then it removes those
// that are still in the pool, and returns. Every sandbox gets a new namespace. A
// slot's number is used again after Close has found nothing left of it, and after
// all other free numbers. Call Run once, after Setup and after the slots of the
// records are claimed.
func (n *Network) Run(ctx context.Context) {
	var fenced []Slot // could be neither built nor removed; still reserved
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			n.drain(ctx, fenced)
			return
		case <-n.taken:
		case <-retry.C:
		}
		fenced = n.remove(ctx, fenced)
		for ctx.Err() == nil {
			kind, short := n.slots.short(n.opts.Pool)
			if !short {
				break
			}
			s, err := n.slots.acquireForPool(kind)
			if err == nil {
				if err = n.build(ctx, s); err == nil {
					n.slots.warmed(s)
					continue
				}
				fenced = append(fenced, n.remove(ctx, []Slot{s})...)
			}
			if ctx.Err() == nil {
				n.opts.Log.Warn("network slot not built ahead", "slot", int(s), "err", err)
				retry.Reset(retryAfter)
			}
			break
		}
		if len(fenced) > 0 {
			retry.Reset(retryAfter)
		}
	}
}

// remove closes and frees slots, and returns those it could not.
func (n *Network) remove(ctx context.Context, slots []Slot) (left []Slot) {
	for _, s := range slots {
		err := n.Close(ctx, s)
		if err == nil {
			err = n.slots.release(s)
		}
		if err != nil {
			n.opts.Log.Error("network slot not removed", "slot", int(s), "err", err)
			left = append(left, s)
		}
	}
	return left
}

func (n *Network) drain(ctx context.Context, fenced []Slot) {
	n.remove(ctx, append(fenced, n.slots.drain()...))
}

// Stats are the allocator's counts, for the metrics.
type Stats struct {
	Reserved int // all slots that are not free, those below among them
	Open     int // with something on the host
	Pool     int // built and waiting
	Fenced   int // whose removal failed; it is tried again, and the slot is not handed out before
}

// Stats returns the present counts.
func (n *Network) Stats() Stats { return n.slots.stats() }

// ByState names the counts, as the metrics do.
func (s Stats) ByState() map[string]int {
	return map[string]int{"reserved": s.Reserved, "open": s.Open, "pool": s.Pool, "fenced": s.Fenced}
}
