package envd

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// halted are the processes that a freeze has stopped by a signal, each after its
// parent. Their order keeps parents from seeing it: a parent stops before its children
// do and goes on after them.
type halted struct {
	pids []int
}

// stop stops every process but envd and returns when none runs. What a user had stopped
// is left alone.
func (h *halted) stop(ctx context.Context, tick <-chan time.Time) error {
	h.pids = nil
	for h.signal() {
		select {
		case <-tick:
		case <-ctx.Done():
			return errNotFrozen
		}
	}
	return nil
}

// signal tells every process that runs to stop, and says whether there was one.
func (h *halted) signal() bool {
	runs := running()
	for _, pid := range runs {
		if unix.Kill(pid, unix.SIGSTOP) == nil && !slices.Contains(h.pids, pid) {
			h.pids = append(h.pids, pid)
		}
	}
	return len(runs) > 0
}

// whileStill calls f while no other process runs. There is no time to find out which
// processes a user had stopped: they go on, too.
func (g *cgroups) whileStill(f func()) {
	g.freezer.mu.Lock()
	defer g.freezer.mu.Unlock()
	if !g.freezer.frozen {
		const all = -1
		_ = unix.Kill(all, unix.SIGSTOP) // unless there is none
		defer func() { _ = unix.Kill(all, unix.SIGCONT) }()
	}
	f()
}

// goOn lets go on what stop has stopped.
func (h *halted) goOn() {
	for _, pid := range slices.Backward(h.pids) {
		_ = unix.Kill(pid, unix.SIGCONT) // unless it has been killed
	}
	h.pids = nil
}

// running lists the processes but envd that are not stopped, parents before children.
func running() (pids []int) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	parents := map[int]int{}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		state, parent, ok := stateOf(pid)
		if !ok {
			continue
		}
		parents[pid] = parent
		if pid != os.Getpid() && state != "T" && state != "t" && state != "Z" && state != "X" {
			pids = append(pids, pid)
		}
	}
	depth := func(pid int) (n int) {
		for ; parents[pid] != 0 && n < len(parents); n++ {
			pid = parents[pid]
		}
		return n
	}
	slices.SortStableFunc(pids, func(a, b int) int { return depth(a) - depth(b) })
	return pids
}
