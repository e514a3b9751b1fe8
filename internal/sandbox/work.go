package sandbox

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
)

// work runs the goroutines of a manager, so that Shutdown can wait for them.
type work struct {
	log *slog.Logger
	// life ends at Shutdown.
	life context.Context
	end  context.CancelFunc

	wg    sync.WaitGroup
	mu    sync.Mutex
	ended bool // no more goroutines are started
}

func newWork(log *slog.Logger) *work {
	w := &work{log: log}
	w.life, w.end = context.WithCancel(context.Background())
	return w
}

// goes runs fn on a goroutine, unless the work has ended. A panic costs that work
// alone.
func (w *work) goes(what string, fn func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return false
	}
	w.wg.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				w.log.Error("panic", "in", what, "panic", p, "stack", string(debug.Stack()))
			}
		}()
		fn()
	})
	return true
}

// stop ends life and waits, within ctx, for all goroutines.
func (w *work) stop(ctx context.Context) error {
	w.end()
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
	done := make(chan struct{})
	go func() {
		w.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for work in progress: %w", context.Cause(ctx))
	}
}
