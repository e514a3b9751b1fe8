package envd

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// setupCgroups makes the cgroup of all users' processes, and raises the limits of the
// kernel that would bind them before it does.
func setupCgroups(mountpoint, root string) error {
	total, err := totalMemory()
	if err != nil {
		return err
	}
	b := boundsOf(total)
	return errors.Join(limitCgroups(mountpoint, root, b), b.raise("/proc/sys"))
}

// totalMemory is the guest's memory in bytes.
func totalMemory() (uint64, error) {
	var info unix.Sysinfo_t
	err := unix.Sysinfo(&info)
	return uint64(info.Totalram) * uint64(info.Unit), err
}

// limitCgroups makes the cgroup of all users' processes, with limits that leave
// memory and process ids to envd and the kernel.
func limitCgroups(mountpoint, root string, b bounds) error {
	var errs []error
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	for _, dir := range []string{mountpoint, root} {
		// One by one: a kernel without one of them still has the others.
		for _, controller := range []string{"+pids", "+memory", "+cpu"} {
			errs = append(errs, os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(controller), 0o644))
		}
	}
	for name, value := range map[string]uint64{"memory.max": b.memory, "pids.max": b.processes} {
		errs = append(errs, os.WriteFile(filepath.Join(root, name), strconv.AppendUint(nil, value, 10), 0o644))
	}
	return errors.Join(errs...)
}

// bounds are what users' processes may have together, so that envd can do its work
// whatever they do.
type bounds struct {
	memory    uint64 // bytes
	processes uint64 // and threads
}

// boundsOf derives them from the memory of the guest, in bytes.
func boundsOf(total uint64) bounds {
	return bounds{
		memory: total - min(total/8, 64<<20),
		// A shell's sleep takes 211 KiB of memory under Linux 6.1, most of it the kernel's:
		// more processes than this only end each other.
		processes: max(1024, total>>18),
	}
}

// raise raises the limits of the kernel that bind users' processes before their bounds
// do: then envd could start no thread or open no file either.
func (b bounds) raise(sysctl string) error {
	const others = 1024 // threads of the kernel and of envd
	var errs []error
	for name, least := range map[string]uint64{
		"kernel/threads-max": b.processes + others,
		"kernel/pid_max":     min(2*(b.processes+others), 4<<20),
		"fs/file-max":        math.MaxInt64, // memory bounds them
	} {
		path := filepath.Join(sysctl, name)
		text, err := os.ReadFile(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		now, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		if err == nil && now < least {
			err = os.WriteFile(path, strconv.AppendUint(nil, least, 10), 0o644)
		}
		errs = append(errs, err)
	}
	// Threads of a real-time priority would leave a twentieth of the CPU to all others.
	errs = append(errs, os.WriteFile(filepath.Join(sysctl, "kernel/sched_rt_runtime_us"), []byte("500000"), 0o644))
	return errors.Join(errs...)
}

// cgroups makes one cgroup per process under root and removes those that have
// become empty. Safe for concurrent use.
type cgroups struct {
	root string
	// halted stops the users' processes where the kernel freezes no cgroups; else nil.
	halted *halted
	// keeper ends processes where the kernel does not when memory runs out; else nil.
	keeper *keeper

	mu sync.Mutex
	// ended holds the cgroups whose process has ended while others, its
	// descendants, may live on.
	ended map[string]struct{}
	next  int

	freezer freezer
}

func newCgroups(root string) *cgroups {
	return &cgroups{root: root, ended: make(map[string]struct{})}
}

// serve does what the body's kernel does not.
func (g *cgroups) serve(kernel abilities) {
	if !kernel.freezes {
		g.halted = &halted{}
	}
	if !kernel.keepsMemory {
		g.keeper = newKeeper("/proc", g.root, g.whileStill)
	}
}

// cgroup is the cgroup of one process and its descendants.
type cgroup struct{ dir string }

// make makes a cgroup and opens its directory, which the caller must close
// once a process is in it.
func (g *cgroups) make() (*cgroup, *os.File, error) {
	g.mu.Lock()
	g.next++
	c := &cgroup{dir: filepath.Join(g.root, "p"+strconv.Itoa(g.next))}
	g.mu.Unlock()
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		return nil, nil, fmt.Errorf("make cgroup: %w", err)
	}
	// A user must be able to start a program that ends a fork bomb: one process
	// and its descendants never get the last eighth of the limit.
	if text, err := os.ReadFile(filepath.Join(g.root, "pids.max")); err == nil {
		if room, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			_ = os.WriteFile(filepath.Join(c.dir, "pids.max"), []byte(strconv.Itoa(room-room/8)), 0o644)
		}
	}
	dir, err := os.Open(c.dir)
	if err != nil {
		g.release(c)
		return nil, nil, fmt.Errorf("open cgroup: %w", err)
	}
	return c, dir, nil
}

// oomKills counts the processes of a cgroup that were ended because there was no memory.
func (g *cgroups) oomKills(c *cgroup) int {
	if g.keeper != nil {
		return g.keeper.endedIn(c.dir)
	}
	return c.oomKills()
}

// memoryLimit is what all users' processes may take together, in bytes, or 0 if nothing
// bounds it but the machine.
func (g *cgroups) memoryLimit() uint64 {
	if g.keeper != nil {
		return g.keeper.limit()
	}
	text, err := os.ReadFile(filepath.Join(g.root, "memory.max"))
	if err != nil {
		return 0
	}
	limit, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64) // or "max"
	return limit
}

// release removes the cgroup now or, if it still has processes, at a later sweep.
func (g *cgroups) release(c *cgroup) {
	g.mu.Lock()
	g.ended[c.dir] = struct{}{}
	g.mu.Unlock()
	if g.keeper != nil {
		g.keeper.forget(c.dir)
	}
	g.sweep()
}

// sweep removes the cgroups whose last process has gone.
func (g *cgroups) sweep() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for dir := range g.ended {
		if err := removeCgroup(dir); err == nil {
			delete(g.ended, dir)
		}
	}
}

// removeCgroup removes dir with the cgroups that its processes made in it.
func removeCgroup(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	entries, readErr := os.ReadDir(dir)
	if readErr != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

// signal sends sig to every process in the cgroup and below it.
func (c *cgroup) signal(sig syscall.Signal) {
	if sig == syscall.SIGKILL {
		if os.WriteFile(filepath.Join(c.dir, "cgroup.kill"), []byte("1"), 0o644) == nil {
			return
		}
	}
	for _, pid := range c.pids() {
		_ = syscall.Kill(pid, sig)
	}
}

// pids lists the processes in the cgroup and below it.
func (c *cgroup) pids() []int {
	var pids []int
	_ = filepath.WalkDir(c.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil // it was removed
		}
		text, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for field := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// alone says whether the process is the only one in the cgroup itself.
func (c *cgroup) alone(pid int) bool {
	text, err := os.ReadFile(filepath.Join(c.dir, "cgroup.procs"))
	return err == nil && strings.TrimSpace(string(text)) == strconv.Itoa(pid)
}

func (c *cgroup) empty() bool {
	return c.event("cgroup.events", "populated") == 0
}

// oomKills counts the processes of the cgroup that the OOM killer took.
func (c *cgroup) oomKills() int { return c.event("memory.events", "oom_kill") }

// event reads one number of a cgroup's flat-keyed file, 0 if there is none.
func (c *cgroup) event(file, key string) int {
	text, err := os.ReadFile(filepath.Join(c.dir, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, key+" "); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(value))
			return n
		}
	}
	return 0
}

// awaitEmpty returns whether the cgroup became empty within limit.
func (c *cgroup) awaitEmpty(limit time.Duration) bool {
	for deadline := time.Now().Add(limit); ; time.Sleep(pollInterval) {
		if c.empty() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}
