package envd

import (
	"cmp"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// maxArgsTold bounds what is told of the arguments of a process, in bytes, and
	// maxTold the number of processes.
	maxArgsTold = 4 << 10
	maxTold     = 4096
	// ticksPerSecond is Linux's, in /proc.
	ticksPerSecond = 100
)

// listProcesses answers with all processes, also those that no client has started, and
// with detached ones that have ended.
func (s *Server) listProcesses(w http.ResponseWriter, _ *http.Request) {
	list := s.processes.endedDetached()
	names := map[uint32]string{}
	booted := bootTime()
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		p, uid, ok := readProcess(dir, booted)
		if !ok || p.PID == 1 || p.PID == os.Getpid() || len(list) >= maxTold {
			continue
		}
		if names[uid] == "" {
			as, _ := s.accounts.lookup(strconv.FormatUint(uint64(uid), 10))
			names[uid] = cmp.Or(as.name, strconv.FormatUint(uint64(uid), 10))
		}
		p.User, p.Command = names[uid], s.processes.started(p.PID)
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b guestapi.Process) int {
		return cmp.Or(cmp.Compare(a.Started, b.Started), cmp.Compare(a.PID, b.PID))
	})
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, guestapi.Processes{Processes: list})
}

// endedDetached are the detached processes whose end is kept.
func (ps *processes) endedDetached() []guestapi.Process {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	list := []guestapi.Process{}
	for _, p := range ps.kept {
		if ps.byPID[p.child.pid] != p {
			continue
		}
		list = append(list, guestapi.Process{
			PID: p.child.pid, Started: p.started.Unix(), Command: true, Ended: p.ending.GetStatus(),
			Args: cutArgs(append([]string{p.config.GetCmd()}, p.config.GetArgs()...)),
		})
	}
	return list
}

// started says whether a process that runs was started by a client.
func (ps *processes) started(pid int) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.byPID[pid]
	return p != nil && !p.gone()
}

// readProcess reads what /proc tells of a process. Threads of the kernel are none.
func readProcess(dir string, booted int64) (p guestapi.Process, uid uint32, ok bool) {
	info, err := os.Stat(dir)
	if err != nil {
		return p, 0, false
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, 0, false
	}
	text := string(stat)
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return p, 0, false
	}
	fields := strings.Fields(text[end+1:])
	number := func(field int) int64 { // counted as proc(5) does
		if field-3 >= len(fields) {
			return 0
		}
		n, _ := strconv.ParseInt(fields[field-3], 10, 64)
		return n
	}
	if number(9)&kernelThread != 0 {
		return p, 0, false
	}
	p.PID, err = strconv.Atoi(filepath.Base(dir))
	p.PPID = int(number(4))
	p.CPU = (number(14) + number(15)) * 1000 / ticksPerSecond
	p.Started = booted + number(22)/ticksPerSecond
	p.Memory = number(24) * int64(os.Getpagesize())
	line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	if len(line) == 0 {
		p.Args = []string{"[" + strings.ToValidUTF8(text[open+1:end], "?") + "]"}
	} else {
		p.Args = cutArgs(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
	}
	if owner, isStat := info.Sys().(*syscall.Stat_t); isStat {
		uid = owner.Uid
	}
	return p, uid, err == nil
}

// cutArgs bounds arguments, in UTF-8.
func cutArgs(args []string) []string {
	left := maxArgsTold
	for i, arg := range args {
		if len(arg) > left {
			return append(slices.Clone(args[:i]), strings.ToValidUTF8(arg[:left], "")+"…")
		}
		left -= len(arg) + 1
		left = max(left, 0)
	}
	for i := range args {
		args[i] = strings.ToValidUTF8(args[i], "\ufffd")
	}
	return args
}

// bootTime is when the kernel's clock of processes began, in seconds since 1970.
func bootTime() int64 {
	text, _ := os.ReadFile("/proc/stat")
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return n
		}
	}
	return time.Now().Unix()
}
