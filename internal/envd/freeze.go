package envd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// maxFreeze bounds the freeze, the sync that follows it included.
const maxFreeze = 5 * time.Second

// errNotFrozen: a process waits in the kernel for something that does not come,
// a device or a file system over a network.
var errNotFrozen = errors.New("a process cannot be frozen")

var errNotSynced = errors.New("a file system does not write what it holds in memory")

// freezer says whether the users' processes are frozen. No process is started
// between a freeze and the thaw that follows it: it would be born frozen, and
// envd, which waits for its exec, with it.
type freezer struct {
	// gate is held for reading while a process is started, and for writing
	// from the freeze to the thaw.
	gate sync.RWMutex
	// mu guards frozen, and serialises freezes and thaws.
	mu     sync.Mutex
	frozen bool
	// cuts counts the thaws after a snapshot, in a copy or after a hibernation. A
	// request from before has no caller any more.
	cuts atomic.Int64
}

// starting returns when a process may be started; the caller must call done
// when that has been tried.
func (g *cgroups) starting() (done func(), err error) {
	cuts := g.freezer.cuts.Load()
	g.freezer.gate.RLock()
	if g.freezer.cuts.Load() != cuts {
		g.freezer.gate.RUnlock()
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("the machine went on from a snapshot"))
	}
	return g.freezer.gate.RUnlock, nil
}

// freeze stops all users' processes until thaw and returns when none of them
// runs any more. machine says that the whole hierarchy is ours: then no process
// but envd and the kernel's threads goes on, wherever it moved. On error all go
// on. What is frozen already stays so.
func (g *cgroups) freeze(ctx context.Context, machine bool) error {
	ctx, cancel := context.WithTimeout(ctx, maxFreeze)
	defer cancel()
	g.freezer.mu.Lock()
	defer g.freezer.mu.Unlock()
	if g.freezer.frozen {
		return nil
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for !g.freezer.gate.TryLock() { // a process whose program is being read is waited for
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errNotFrozen
		}
	}
	err := g.stop(ctx, machine, tick.C)
	if err != nil {
		g.goOn(machine)
		return err
	}
	g.freezer.frozen = true
	return nil
}

// stop returns when every process of the cgroups is frozen.
func (g *cgroups) stop(ctx context.Context, machine bool, tick <-chan time.Time) error {
	if g.halted != nil {
		return g.halted.stop(ctx, tick)
	}
	for {
		frozen := true
		for _, dir := range g.frozenDirs(machine) {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("1"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("freeze processes: %w", err)
			}
			c := cgroup{dir: dir}
			frozen = frozen && c.event("cgroup.events", "frozen") == 1
		}
		// The root cgroup cannot be frozen. It is searched last, because that takes
		// the longest.
		if frozen && !(machine && g.gather()) {
			return nil
		}
		select {
		case <-tick:
		case <-ctx.Done():
			return errNotFrozen
		}
	}
}

// frozenDirs are the cgroups whose freezing freezes all users' processes.
func (g *cgroups) frozenDirs(machine bool) []string {
	if !machine {
		return []string{g.root}
	}
	dirs := []string{g.root} // missed, if it is not there
	top := filepath.Dir(g.root)
	entries, err := os.ReadDir(top)
	if err != nil {
		return dirs
	}
	for _, e := range entries {
		if dir := filepath.Join(top, e.Name()); e.IsDir() && dir != g.root {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// gather moves the users' processes of the root cgroup to a cgroup that can be
// frozen, and says whether there were any.
func (g *cgroups) gather() (found bool) {
	top := cgroup{dir: filepath.Dir(g.root)}
	text, err := os.ReadFile(filepath.Join(top.dir, "cgroup.procs"))
	if err != nil {
		return false
	}
	// Read after the list: a number in both is that of a kernel thread now, even if
	// it was another process's before.
	threads := kernelThreads()
	for field := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid == os.Getpid() || threads[field] || !ofUser(pid) {
			continue
		}
		found = true
		dir := filepath.Join(g.root, "moved") // a leaf, as cgroups with controllers need it
		if err := os.Mkdir(dir, 0o755); err == nil || errors.Is(err, os.ErrExist) {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(field), 0o644)
			g.mu.Lock()
			g.ended[dir] = struct{}{} // to go with its last process
			g.mu.Unlock()
		}
	}
	return found
}

// kernelThreads lists the children of kthreadd, which are the kernel's threads:
// one file to read in place of one for each. On a kernel without that file the list
// is empty.
func kernelThreads() map[string]bool {
	const kthreadd = 2
	if _, flags, ok := procStat(kthreadd); !ok || flags&kernelThread == 0 {
		return nil // a process namespace without the kernel's threads
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", kthreadd))
	if err != nil {
		return nil
	}
	threads := map[string]bool{strconv.Itoa(kthreadd): true}
	for field := range strings.FieldsSeq(string(text)) {
		threads[field] = true
	}
	return threads
}

// ofUser says whether a process runs a program, as opposed to a thread of the
// kernel's or a process that has ended.
func ofUser(pid int) bool {
	state, flags, ok := procStat(pid)
	return ok && state != "Z" && state != "X" && flags&kernelThread == 0
}

const kernelThread = 0x00200000 // PF_KTHREAD

// procStat returns the state and the flags of a process.
func procStat(pid int) (state string, flags uint64, ok bool) {
	fields, ok := statFields(pid)
	if !ok {
		return "", 0, false
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return fields[0], flags, err == nil
}

// stateOf returns the state and the parent of a process.
func stateOf(pid int) (state string, parent int, ok bool) {
	fields, ok := statFields(pid)
	if !ok {
		return "", 0, false
	}
	parent, err := strconv.Atoi(fields[1])
	return fields[0], parent, err == nil
}

// statFields are those of a process's stat after its name: state ppid pgrp session
// tty_nr tpgid flags …
func statFields(pid int) (fields []string, ok bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, false
	}
	_, rest, ok := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	fields = strings.Fields(rest)
	return fields, ok && len(fields) >= 7
}

// thaw lets go on what freeze stopped. cut says that the machine is another one
// now, or has been away: the starts that waited are refused.
func (g *cgroups) thaw(machine, cut bool) {
	g.freezer.mu.Lock()
	defer g.freezer.mu.Unlock()
	if cut {
		g.freezer.cuts.Add(1)
	}
	if !g.freezer.frozen {
		return
	}
	g.freezer.frozen = false
	g.goOn(machine)
}

// goOn is called with the gate held for writing, which it gives back.
func (g *cgroups) goOn(machine bool) {
	defer g.freezer.gate.Unlock()
	if g.halted != nil {
		g.halted.goOn()
		return
	}
	for _, dir := range g.frozenDirs(machine) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0o644)
	}
}

// freeze stops the users' processes until the next /init and writes what they left
// in memory to the disk. In a snapshot that the host makes then, none of them runs
// before the machine has a new identity. 409 says that they run on.
func (s *Server) freeze(w http.ResponseWriter, r *http.Request) {
	stopped, err := s.still(r.Context())
	if err != nil {
		s.log.Warn("freeze", "err", err)
		writeError(w, http.StatusConflict, err.Error())
		return
	}
	// The connection would be in the snapshot.
	w.Header().Set("Connection", "close")
	w.Header().Set(guestapi.HeaderStill, strconv.FormatInt(time.Since(stopped).Milliseconds(), 10))
	w.WriteHeader(http.StatusNoContent)
}

// still stops the users' processes and syncs. stopped is when it began to stop them.
func (s *Server) still(ctx context.Context) (stopped time.Time, err error) {
	groups := s.processes.cgroups
	if groups == nil {
		return stopped, errors.New("processes have no cgroups")
	}
	// Most is written while the processes run, so that they stand still for less.
	if !s.sync(ctx, true) {
		return stopped, errNotSynced
	}
	stopped = time.Now()
	ctx, cancel := context.WithTimeout(ctx, maxFreeze)
	defer cancel()
	if err := groups.freeze(ctx, s.guest); err != nil {
		return stopped, err
	}
	// After ctx the caller no longer reads the answer, so it makes no snapshot.
	if s.sync(ctx, false) && ctx.Err() == nil {
		return stopped, nil
	}
	groups.thaw(s.guest, false)
	return stopped, errNotFrozen
}

// sync writes what is in memory to the disk, and, with trim, gives back to the host some
// of what is free there. It says whether that ended before ctx: a file system that a process
// serves may never answer.
func (s *Server) sync(ctx context.Context, trim bool) bool {
	if !s.guest {
		return true
	}
	synced := make(chan struct{})
	go func() {
		defer close(synced)
		unix.Sync()
		if trim {
			s.trim(trimAtFreeze)
		}
	}()
	select {
	case <-synced:
		return true
	case <-ctx.Done():
		return false
	}
}
