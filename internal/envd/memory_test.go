package envd

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// TestKeeper: the process with the most memory ends when too little is left, and no other;
// its command says so. What it takes to look is done as often as memory could run out.
func TestKeeper(t *testing.T) {
	proc, user := t.TempDir(), filepath.Join(t.TempDir(), "user")
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	state := func(freeMiB, processes int) {
		write(filepath.Join(proc, "meminfo"), fmt.Sprintf("MemTotal: %d kB\nMemFree: %d kB\n", 1000<<10, freeMiB<<10))
		write(filepath.Join(user, "pids.current"), strconv.Itoa(processes)+"\n")
	}
	const gone = 1 << 30 // no process has this number
	for pid, pages := range map[int]int{gone: 900, gone + 1: 5, os.Getpid(): 5000} {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		write(filepath.Join(dir, "statm"), fmt.Sprintf("99999 %d 0 0 0 0 0\n", pages))
		write(filepath.Join(dir, "comm"), "hog\n")
		write(filepath.Join(dir, "cgroup"), "0::/user/p7/below\n")
	}
	var killed []string
	k := newKeeper(proc, user, func(f func()) { f() })
	look := func() time.Duration {
		return k.look(func(name string) {
			killed = append(killed, name)
			state(500, 2)
		})
	}
	for _, c := range []struct {
		free, processes int
		least, most     time.Duration
		kills           int
	}{
		{10, 0, 0, 0, 0}, // without processes there is nothing to look at
		{900, 2, maxLook / 2, maxLook, 0},
		{60, 2, minLook, 40 * time.Millisecond, 0},
		{60, 2000, minLook, minLook, 1}, // so many cost the host more than is left
		{49, 2, minLook, minLook, 1},
	} {
		killed = nil
		state(c.free, c.processes)
		if wait := look(); wait < c.least || wait > c.most || len(killed) != c.kills {
			t.Errorf("%d MiB, %d processes: %s, killed %v", c.free, c.processes, wait, killed)
		}
		for _, name := range killed {
			if name != fmt.Sprintf("%d (hog)", gone) {
				t.Errorf("killed %s", name)
			}
		}
	}
	dir := filepath.Join(user, "p7")
	if n := k.endedIn(dir); n != 2 {
		t.Errorf("%d kills in the command", n)
	}
	if k.forget(dir); k.endedIn(dir) != 0 {
		t.Error("a command that is over is remembered")
	}
}

// TestRunningHasParentsFirst: no parent sees a child stop.
func TestRunningHasParentsFirst(t *testing.T) {
	seen := map[int]bool{}
	for _, pid := range running() {
		seen[pid] = true
		if _, parent, ok := stateOf(pid); ok && parent != 0 && !seen[parent] && parent != os.Getpid() {
			if state, _, ok := stateOf(parent); ok && (state == "S" || state == "R") {
				t.Errorf("%d comes before its parent %d", pid, parent)
			}
		}
	}
}

// What killed a command says how much there was: where the kernel kills, and where envd does.
func TestMemoryLimit(t *testing.T) {
	dir := t.TempDir()
	g := newCgroups(dir)
	for text, want := range map[string]uint64{"469762048\n": 448 << 20, "max\n": 0, "": 0} {
		if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := g.memoryLimit(); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "meminfo"), []byte("MemTotal: 1000 kB\nMemFree: 1 kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.keeper = newKeeper(dir, dir, nil)
	if got := g.memoryLimit(); got != 950<<10 {
		t.Errorf("where envd ends processes: %d, want %d", got, 950<<10)
	}
}
