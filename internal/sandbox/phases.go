package sandbox

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Phase is a part of an operation.
type Phase struct {
	Name string
	Took time.Duration
}

// phases are the parts of an operation, in the order in which they began. An
// operation carries them in its context.
type phases struct {
	mu   sync.Mutex
	list []Phase
}

type phasesKey struct{}

// withPhases returns a context under which phase notes what it is told.
func withPhases(ctx context.Context) (context.Context, *phases) {
	p := &phases{}
	return context.WithValue(ctx, phasesKey{}, p), p
}

// phase begins a part of the operation that ctx belongs to; end ends it. A phase that
// does not end is in no list.
func phase(ctx context.Context, name string) (end func()) {
	p, ok := ctx.Value(phasesKey{}).(*phases)
	if !ok {
		return func() {}
	}
	began := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	at := len(p.list)
	p.list = append(p.list, Phase{Name: name, Took: -1})
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.list[at].Took = time.Since(began)
	}
}

// done returns the phases that have ended.
func (p *phases) done() []Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.list), func(ph Phase) bool { return ph.Took < 0 })
}

// attrs are the phases as the log has them.
func (p *phases) attrs() (attrs []any) {
	for _, ph := range p.done() {
		attrs = append(attrs, ph.Name, ph.Took.Round(100*time.Microsecond))
	}
	return attrs
}
