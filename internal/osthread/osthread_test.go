package osthread_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// The function never runs on the main thread, which cannot end.
func TestDo(t *testing.T) {
	broken := errors.New("broken")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			var tid int
			err := osthread.Do(func() error {
				tid = unix.Gettid()
				return broken
			})
			if !errors.Is(err, broken) || tid == unix.Getpid() {
				t.Errorf("on thread %d of process %d: %v", tid, unix.Getpid(), err)
			}
		})
	}
	wg.Wait()
	ended := false
	if err := osthread.Do(func() error { defer func() { ended = true }(); runtime.Goexit(); return broken }); err != nil || !ended {
		t.Errorf("a goroutine that ended: %v", err)
	}
}

// No thread stays in the namespace that a function entered.
func TestNamespaceIsLeft(t *testing.T) {
	testenv.Root(t)
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		err := osthread.Do(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if ns, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || ns == ours {
				t.Errorf("in %s, %v", ns, err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	strays := func() (n int) {
		tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if ns, err := os.Readlink(task); err == nil && ns != ours {
				n++
			}
		}
		return n
	}
	for deadline := time.Now().Add(5 * time.Second); strays() > 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d threads stay in another namespace", strays())
		}
	}
}
