// Package osthread runs a function on an operating system thread of its own,
// which may enter other namespaces, change its user or its cgroup, and is never
// used for anything else afterwards.
package osthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Do calls fn on a thread that ends with it, and returns what fn returned. So fn
// need not undo what it did to its thread. Do returns after the thread was given
// up, also when fn ends its goroutine (runtime.Goexit), as a failing test does.
func Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end. While this goroutine holds it, the
			// scheduler has to give another thread to fn.
			defer runtime.UnlockOSThread()
			done <- Do(fn)
			return
		}
		// The goroutine stays locked, so that the runtime ends the thread with it.
		done <- fn()
	}()
	err := <-done
	<-done // closed
	return err
}
