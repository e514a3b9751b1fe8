package network

import (
	"sync"
	"testing"
)

// BenchmarkManySlots times what is done for all slots together, with 500 open:
// the counters of a listing, and the check of every minute.
func BenchmarkManySlots(b *testing.B) {
	n := world(b, Options{})
	const count = 500
	slots := make([]Slot, count)
	each := func(fn func(i int)) {
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := w; i < count; i += 4 {
					fn(i)
				}
			})
		}
		wg.Wait()
	}
	each(func(i int) {
		s, err := n.Acquire(b.Context(), kind)
		must(b, err)
		must(b, n.Open(b.Context(), s))
		slots[i] = s
	})
	b.Cleanup(func() {
		each(func(i int) {
			must(b, n.Close(b.Context(), slots[i]))
			must(b, n.Release(slots[i]))
		})
	})
	b.Run("counters", func(b *testing.B) {
		for b.Loop() {
			all, err := n.CountersAll(b.Context())
			must(b, err)
			if len(all) != count {
				b.Fatalf("%d slots", len(all))
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			found, err := n.CheckAll(b.Context(), slots)
			must(b, err)
			if found.Host != nil || len(found.Slots) > 0 {
				b.Fatalf("%+v", found)
			}
		}
	})
	b.Run("limits", func(b *testing.B) {
		l := Limits{1 << 20, 1 << 20, 1000, 1000, 100}
		for i := 0; b.Loop(); i++ {
			l.Connections = 100 + i%2
			must(b, n.SetLimits(b.Context(), slots[i%count], l))
		}
	})
}
