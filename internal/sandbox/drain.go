package sandbox

import (
	"context"
	"sync"
	"time"
)

const (
	// drainEvery is how often a drain looks at what is left.
	drainEvery = 500 * time.Millisecond
	// drainWriters is how many sandboxes a drain hibernates at a time: the disk is the same.
	drainWriters = 4
)

// Drain lets no sandbox be made or resumed from disk any more, and returns how many still
// have a VM when none has or ctx has ended: it waits until they have ended or are
// hibernated, or hibernates them itself. It takes nothing back; Shutdown follows it.
func (m *Manager) Drain(ctx context.Context, hibernate bool) (left int) {
	m.drain()
	m.pool.close()
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	for {
		var running []ID
		left = 0
		for _, b := range m.all() {
			switch b.state() {
			case Running, Paused:
				running = append(running, b.id)
				left++
			case Creating, Stopping:
				left++
			}
		}
		if left == 0 || ctx.Err() != nil {
			return left
		}
		if hibernate {
			m.hibernateAll(ctx, running)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// hibernateAll tries to hibernate sandboxes, each once.
func (m *Manager) hibernateAll(ctx context.Context, ids []ID) {
	var wg sync.WaitGroup
	turns := make(chan struct{}, drainWriters)
	for _, id := range ids {
		wg.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			if ctx.Err() != nil {
				return
			}
			if err := m.Hibernate(ctx, id, Hibernation{}); err != nil {
				m.log.Warn("sandbox not hibernated by the drain", "sandbox", id, "err", err)
			}
		})
	}
	wg.Wait()
}
