package image

import (
	"sync"
	"time"
)

// meter tells a caller how far an operation is, at most every meterEvery and at each
// change of the stage. Safe for concurrent use; calls of the function do not overlap.
type meter struct {
	to func(Progress)

	mu   sync.Mutex
	now  Progress
	told time.Time
}

const meterEvery = 200 * time.Millisecond

func newMeter(to func(Progress)) *meter { return &meter{to: to} }

// begin starts a stage.
func (m *meter) begin(stage string, total int64, detail string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = Progress{Stage: stage, Total: total, Detail: detail}
	m.tell(true)
}

// add counts n more bytes, which may be negative.
func (m *meter) add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.Done += n
	m.tell(false)
}

// end tells the last state of the stage.
func (m *meter) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tell(true)
}

// tell is called with mu held.
func (m *meter) tell(always bool) {
	if now := time.Now(); m.to != nil && (always || now.Sub(m.told) >= meterEvery) {
		m.told = now
		m.to(m.now)
	}
}

// stop ends the telling: the caller's function is not called after it.
func (m *meter) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.to = nil
}
