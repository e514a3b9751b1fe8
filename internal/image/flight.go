package image

import (
	"context"
	"sync"
)

// flights lets callers that want the same thing at the same time share the work. The
// work goes on until it is done or every caller has left.
type flights struct {
	mu  sync.Mutex
	all map[string]*flight
}

type flight struct {
	cancel  context.CancelFunc
	callers int
	done    chan struct{}
	err     error // to be read when done is closed
}

// do has work run once for all that call with the same key while it runs, and returns its
// error; shared says that another caller began it. It returns when work has ended or,
// for a caller that is not the last, when ctx has.
func (f *flights) do(ctx context.Context, key string, work func(context.Context) error) (shared bool, err error) {
	f.mu.Lock()
	fl := f.all[key]
	shared = fl != nil
	if fl == nil {
		workCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		fl = &flight{cancel: cancel, done: make(chan struct{})}
		if f.all == nil {
			f.all = map[string]*flight{}
		}
		f.all[key] = fl
		go func() {
			fl.err = work(workCtx)
			f.forget(key, fl)
			cancel()
			close(fl.done)
		}()
	}
	fl.callers++
	f.mu.Unlock()

	select {
	case <-fl.done:
		return shared, fl.err
	case <-ctx.Done():
	}
	if f.leave(key, fl) {
		<-fl.done // what it made half is removed when the last caller returns
	}
	return shared, context.Cause(ctx)
}

func (f *flights) forget(key string, fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all[key] == fl {
		delete(f.all, key)
	}
}

// leave reports whether that was the last caller; then the work is cancelled, and a
// caller that comes now begins anew.
func (f *flights) leave(key string, fl *flight) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.callers--; fl.callers > 0 {
		return false
	}
	if f.all[key] == fl {
		delete(f.all, key)
	}
	fl.cancel()
	return true
}
