package envd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// keptPercent is how much of the memory processes may take together, and goalPercent
	// how much they have when enough of them were ended.
	keptPercent, goalPercent = 95, 90
	// fillRate is more than two CPUs touch of new memory, in bytes per second; a look comes
	// before the rest is gone at that rate. slack is less than what the host gives the
	// sentry beyond the guest's memory and its own needs: an overshoot by less is no harm.
	fillRate = 2 << 30
	slack    = 32 << 20
	minLook  = 10 * time.Millisecond
	maxLook  = 250 * time.Millisecond
	// freeTime is how long a process that was ended may take to give its memory back.
	freeTime = 200 * time.Millisecond
	freeLook = 2 * time.Millisecond
	// crowd is a number of processes beside which envd gets its turn half as often.
	crowd = 16
	// After manyKills within killsWithin the whole command of the process is ended: it
	// makes processes faster than they are found.
	manyKills   = 4
	killsWithin = time.Second
)

// keeper ends processes before there is no memory left, in a guest whose kernel does not.
// It is safe for concurrent use.
type keeper struct {
	// proc and cgroup are where /proc and the cgroups of the users' processes are; meminfo
	// and pids are files there.
	proc, cgroup  string
	meminfo, pids kept
	// wake has a value when a process was started.
	wake chan struct{}
	// whileStill calls a function while no other process runs: together they take memory
	// faster than one after the other can be ended.
	whileStill func(func())

	mu sync.Mutex
	// ended counts the processes that were ended, by the cgroup of their command.
	ended map[string]int
	// last are the times of the last kills.
	last []time.Time
}

func newKeeper(proc, cgroup string, whileStill func(func())) *keeper {
	return &keeper{
		proc: proc, cgroup: cgroup, whileStill: whileStill, wake: make(chan struct{}, 1), ended: map[string]int{},
		meminfo: kept{path: filepath.Join(proc, "meminfo")}, pids: kept{path: filepath.Join(cgroup, "pids.current")},
	}
}

// started says that there is a process.
func (k *keeper) started() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// endedIn returns how many processes of a command were ended.
func (k *keeper) endedIn(dir string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ended[dir]
}

// forget forgets the processes of a command that is over.
func (k *keeper) forget(dir string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.ended, dir)
}

// KeepMemory ends processes that take too much memory until ctx ends, if the body's kernel
// does not.
func (s *Server) KeepMemory(ctx context.Context) {
	if s.processes.cgroups == nil || s.processes.cgroups.keeper == nil {
		return
	}
	k := s.processes.cgroups.keeper
	for {
		wait := k.look(func(killed string) { s.log.Warn("out of memory", "killed", killed) })
		var timer <-chan time.Time // none without processes
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-timer:
		case <-k.wake:
		case <-ctx.Done():
			return
		}
	}
}

// look ends the largest process if there is too little memory, and returns when to look
// again; 0 says not before a process is started.
func (k *keeper) look(tell func(killed string)) time.Duration {
	processes := k.processes()
	if processes == 0 {
		return 0
	}
	if left := k.left(keptPercent, processes); left >= 0 {
		// The more processes there are, the later envd has its turn.
		wait := time.Duration(left+slack) * time.Second / fillRate * crowd / time.Duration(crowd+processes)
		return min(max(wait, minLook), maxLook)
	}
	k.whileStill(func() {
		for k.left(goalPercent, k.processes()) < 0 {
			pid := k.largest()
			if pid == 0 {
				return
			}
			tell(k.kill(pid))
			for began := time.Now(); k.left(goalPercent, k.processes()) < 0 && time.Since(began) < freeTime; {
				time.Sleep(freeLook)
			}
		}
	})
	if k.left(keptPercent, k.processes()) < 0 {
		return maxLook // it is in files
	}
	return minLook
}

// processes counts the users' processes and threads.
func (k *keeper) processes() int64 {
	n, _ := strconv.ParseInt(strings.TrimSpace(k.pids.text()), 10, 64) // 0 if that is not there
	return n
}

// limit is how much the processes may have together, in bytes.
func (k *keeper) limit() uint64 {
	text, err := os.ReadFile(k.meminfo.path)
	if err != nil {
		return 0
	}
	return parseMemInfo(string(text))["MemTotal"] * keptPercent / 100
}

// left is how much so many processes may still take until they have that part of the
// memory, in bytes; below 0 they have more.
func (k *keeper) left(percent, processes int64) int64 {
	info := parseMemInfo(k.meminfo.text())
	beside := max(processes-minProcesses, 0) * processBytes
	return int64(info["MemFree"]) - beside - int64(info["MemTotal"])*(100-percent)/100
}

// kept is a file that is read again and again, by one call each time: when memory runs
// out, each call takes long.
type kept struct {
	path string
	file *os.File
	buf  [4096]byte
}

// text returns what the file has, empty if it cannot be read. It is for one goroutine.
func (f *kept) text() string {
	if f.file == nil {
		var err error
		if f.file, err = os.Open(f.path); err != nil {
			return ""
		}
	}
	n, err := f.file.ReadAt(f.buf[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		f.file.Close()
		f.file = nil
		return ""
	}
	return string(f.buf[:n])
}

// largest finds the process with the most memory; 0 if there is none but envd.
func (k *keeper) largest() (pid int) {
	dirs, err := filepath.Glob(filepath.Join(k.proc, "[0-9]*"))
	if err != nil {
		return 0
	}
	most := int64(-1)
	for _, dir := range dirs {
		n, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || n == os.Getpid() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, "statm"))
		fields := strings.Fields(string(text))
		if err != nil || len(fields) < 2 {
			continue
		}
		if resident, err := strconv.ParseInt(fields[1], 10, 64); err == nil && resident > most {
			most, pid = resident, n
		}
	}
	return pid
}

// kill ends a process, or its whole command, and returns what it was.
func (k *keeper) kill(pid int) string {
	dir := k.commandOf(pid)
	name, _ := os.ReadFile(filepath.Join(k.proc, strconv.Itoa(pid), "comm"))
	k.mu.Lock()
	if dir != "" {
		k.ended[dir]++
	}
	now := time.Now()
	k.last = append(k.last, now)
	if len(k.last) > manyKills {
		k.last = k.last[1:]
	}
	many := len(k.last) == manyKills && now.Sub(k.last[0]) < killsWithin
	k.mu.Unlock()
	if many && dir != "" {
		(&cgroup{dir: dir}).signal(unix.SIGKILL)
	}
	_ = unix.Kill(pid, unix.SIGKILL) // unless it has ended
	return fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(string(name)))
}

// commandOf returns the cgroup of the command that a process belongs to, empty for none.
func (k *keeper) commandOf(pid int) string {
	text, err := os.ReadFile(filepath.Join(k.proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return ""
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(text)), "::")
	name, ok := strings.CutPrefix(path, "/"+filepath.Base(k.cgroup)+"/")
	if name, _, _ = strings.Cut(name, "/"); !ok || name == "" {
		return ""
	}
	return filepath.Join(k.cgroup, name)
}
