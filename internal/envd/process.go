package envd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// readSize is how much is read from a pipe, and sent, at once.
	readSize = 32 << 10
	// drainGrace is how long after the end of a process the writes of its
	// descendants count as its output.
	drainGrace = 100 * time.Millisecond
	// drainMax bounds what is taken from a pipe after that.
	drainMax = 1 << 20
	// termGrace is what processes get between SIGTERM and SIGKILL.
	termGrace = 500 * time.Millisecond
	// killWait bounds the wait for killed processes to be gone.
	killWait = 2 * time.Second
	// keepEnded is how long a process that has ended can be connected to.
	keepEnded = 30 * time.Second
)

// processes starts processes and keeps those that run or have just ended.
// Safe for concurrent use.
type processes struct {
	log      *slog.Logger
	children *children
	cgroups  *cgroups // nil: none

	mu      sync.Mutex
	byPID   map[int]*process
	readers map[*reader]struct{}
	kept    []*process // detached ones that have ended, the first one first
	closed  bool
	wg      sync.WaitGroup
}

func newProcesses(log *slog.Logger, cgroupRoot string) *processes {
	ps := &processes{log: log, children: newChildren(), byPID: make(map[int]*process), readers: make(map[*reader]struct{})}
	if cgroupRoot != "" {
		ps.cgroups = newCgroups(cgroupRoot)
	}
	return ps
}

// process is one that start has started. Its methods are safe for concurrent
// use.
type process struct {
	child   *child
	config  *processv1.ProcessConfig
	tag     *string
	cgroup  *cgroup // nil: none
	out     *output
	started time.Time
	// overran is set when the process is ended because its time is up.
	overran atomic.Bool
	// asked is done when SIGTERM was sent to end the process gently.
	asked sync.Once

	// input is the writing end of stdin, or the terminal; nil for neither. It
	// may be closed at any time: os.File then wakes a waiting writer.
	input  *os.File
	hasPTY bool
	// detached: its end is kept for those who ask later.
	detached bool
	writeMu  sync.Mutex // keeps inputs whole

	// reaped is closed when the process is no longer there, finished when
	// its output and ending are complete.
	reaped   chan struct{}
	finished chan struct{}
	// ending is set once finished is closed.
	ending *processv1.ProcessEvent_EndEvent

	forget *time.Timer
}

// command is what start needs to know.
type command struct {
	config *processv1.ProcessConfig
	tag    *string
	size   *processv1.PTY_Size // nil: no terminal
	stdin  bool
	as     account
	cwd    string
	env    map[string]string
	// limit ends the process and its descendants after that time; 0: never.
	limit time.Duration
	// gentle gives them SIGTERM and a moment before SIGKILL.
	gentle bool
	// detached keeps its end.
	detached bool
}

// start starts a process; the subscription that comes with it misses nothing.
// The caller must close it. Errors are Connect errors.
func (ps *processes) start(c command) (*process, *subscriber, error) {
	info, err := os.Stat(c.cwd)
	if err != nil || !info.IsDir() {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cwd '%s' does not exist", c.cwd))
	}
	path, err := lookPath(c.config.GetCmd(), c.cwd, c.env["PATH"])
	if err != nil {
		return nil, nil, err
	}
	if err := checkStrings(c); err != nil {
		return nil, nil, err
	}

	p := &process{
		config: c.config, tag: c.tag, detached: c.detached, out: newOutput(), started: time.Now(),
		reaped: make(chan struct{}), finished: make(chan struct{}),
	}
	files, err := p.openFiles(c)
	if err != nil {
		return nil, nil, err
	}
	defer files.closeTheirs()

	attr := &syscall.ProcAttr{Dir: c.cwd, Files: files.theirFDs(), Env: environ(c.env), Sys: &syscall.SysProcAttr{
		Setsid: true, Setctty: c.size != nil, Credential: credential(c.as),
	}}
	if ps.cgroups != nil {
		done, err := ps.cgroups.starting()
		if err != nil {
			files.closeOurs()
			return nil, nil, err
		}
		defer done()
		// A process without a cgroup could not be frozen, so none is started.
		group, dir, err := ps.cgroups.make()
		if err != nil {
			files.closeOurs()
			return nil, nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("start process: %w", cause(err)))
		}
		defer dir.Close()
		p.cgroup = group
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(dir.Fd())
	}

	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.closed {
		err = connect.NewError(connect.CodeUnavailable, errors.New("envd is ending"))
	} else {
		argv := append([]string{c.config.GetCmd()}, c.config.GetArgs()...)
		p.child, err = ps.children.start(path, argv, attr)
		if errors.Is(err, syscall.ENOEXEC) {
			// The shell runs a script that names no interpreter.
			argv = append([]string{"/bin/sh", path}, c.config.GetArgs()...)
			p.child, err = ps.children.start("/bin/sh", argv, attr)
		}
		err = startError(c.config.GetCmd(), err)
	}
	if err != nil {
		files.closeOurs()
		if p.cgroup != nil {
			ps.cgroups.release(p.cgroup)
		}
		return nil, nil, err
	}
	p.adjustOOM()
	if ps.cgroups != nil && ps.cgroups.keeper != nil {
		ps.cgroups.keeper.started()
	}

	sub := p.out.subscribe()
	ps.byPID[p.child.pid] = p
	for _, r := range files.readers {
		ps.readers[r] = struct{}{}
	}
	ps.wg.Go(func() { ps.run(p, files, c) })
	return p, sub, nil
}

// run follows a process to its end.
func (ps *processes) run(p *process, files *stdio, c command) {
	if c.limit > 0 {
		ps.wg.Go(func() { p.endAfter(c.limit, c.gentle) })
	}
	var drained sync.WaitGroup
	for _, r := range files.readers {
		drained.Add(1)
		ps.wg.Go(func() {
			r.run(p.out, &drained)
			ps.mu.Lock()
			defer ps.mu.Unlock()
			delete(ps.readers, r)
		})
	}
	status, err := ps.children.wait(p.child)
	if err != nil {
		ps.log.Warn("wait for process", "pid", p.child.pid, "err", err)
	}
	close(p.reaped)
	for _, r := range files.readers {
		_ = r.file.SetReadDeadline(time.Now().Add(drainGrace))
	}
	drained.Wait()
	if p.input != nil && !p.hasPTY {
		_ = p.input.Close()
	}

	p.ending = endEvent(status)
	if err != nil {
		// It is not known how it ended, so it is no success.
		text := "exit status unknown"
		p.ending = &processv1.ProcessEvent_EndEvent{ExitCode: -1, Status: text, Error: &text}
	}
	if p.cgroup != nil {
		if n := ps.cgroups.oomKills(p.cgroup); n > 0 {
			text := guestapi.OutOfMemory
			if limit := ps.cgroups.memoryLimit(); limit > 0 {
				text += fmt.Sprintf(guestapi.MemoryLimit, limit>>20)
			}
			text += p.ending.GetStatus()
			p.ending.Error = &text
		}
		ps.cgroups.release(p.cgroup)
	}
	_ = p.child.pidfd.Close()
	close(p.finished)
	p.out.end()

	ps.mu.Lock()
	defer ps.mu.Unlock()
	switch {
	case ps.closed:
	case p.detached:
		if ps.kept = append(ps.kept, p); len(ps.kept) > guestapi.KeptDetached {
			ps.dropLocked(ps.kept[0])
			ps.kept = slices.Delete(ps.kept, 0, 1)
		}
	default:
		p.forget = time.AfterFunc(keepEnded, func() { ps.drop(p) })
	}
}

func (ps *processes) drop(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.dropLocked(p)
}

// dropLocked is drop with the lock held.
func (ps *processes) dropLocked(p *process) {
	if ps.byPID[p.child.pid] == p { // the pid may be another's by now
		delete(ps.byPID, p.child.pid)
	}
}

// close kills what runs and returns when nothing of it is left.
func (ps *processes) close() {
	ps.mu.Lock()
	ps.closed = true
	all := slices.Collect(maps.Values(ps.byPID))
	for _, p := range all {
		if p.forget != nil {
			p.forget.Stop()
		}
	}
	ps.mu.Unlock()
	for _, p := range all {
		p.terminate(false)
	}
	ps.mu.Lock()
	for r := range ps.readers {
		_ = r.file.Close() // held open by a descendant that lives on
	}
	ps.mu.Unlock()
	ps.wg.Wait()
	if ps.cgroups != nil {
		ps.cgroups.sweep()
	}
}

// find returns the process that the selector names, which may have just ended. Of
// several processes with one tag it returns the latest.
func (ps *processes) find(sel *processv1.ProcessSelector) (*process, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	switch s := sel.GetSelector().(type) {
	case *processv1.ProcessSelector_Pid:
		if p := ps.byPID[int(s.Pid)]; p != nil {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", s.Pid))
	case *processv1.ProcessSelector_Tag:
		var found *process
		for _, p := range ps.byPID {
			if p.tag != nil && *p.tag == s.Tag && (found == nil || p.started.After(found.started)) {
				found = p
			}
		}
		if found != nil {
			return found, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag %s not found", s.Tag))
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("select a process by pid or by tag"))
	}
}

// list returns the processes that run, oldest first.
func (ps *processes) list() []*process {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var running []*process
	for _, p := range ps.byPID {
		if !p.gone() {
			running = append(running, p)
		}
	}
	slices.SortFunc(running, func(a, b *process) int { return a.started.Compare(b.started) })
	return running
}

// gone reports whether the process has ended and is reaped.
func (p *process) gone() bool {
	select {
	case <-p.reaped:
		return true
	default:
		return false
	}
}

// endAfter terminates the process when it still runs after limit.
func (p *process) endAfter(limit time.Duration, gentle bool) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.reaped:
	case <-timer.C:
		p.overran.Store(true)
		p.terminate(gentle)
	}
}

// terminate ends the process with all its descendants and returns when they
// are gone, or cannot be got rid of. Its time limit and the end of its client's
// request may both call it: a gentle end sends SIGTERM once, because a program
// may do its work of ending again for each.
func (p *process) terminate(gentle bool) {
	if gentle {
		p.asked.Do(func() { p.signalAll(unix.SIGTERM) })
		if p.awaitGone(termGrace) {
			return
		}
	}
	p.signalAll(unix.SIGKILL)
	p.awaitGone(killWait)
}

func (p *process) signalAll(sig syscall.Signal) {
	if p.cgroup != nil {
		p.cgroup.signal(sig)
		return
	}
	// Leader of its own session, hence of its own group.
	_ = syscall.Kill(-p.child.pid, sig)
}

func (p *process) awaitGone(limit time.Duration) bool {
	deadline := time.Now().Add(limit)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.reaped:
	case <-timer.C:
		return false
	}
	if p.cgroup != nil {
		return p.cgroup.awaitEmpty(time.Until(deadline))
	}
	for syscall.Kill(-p.child.pid, 0) == nil {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pollInterval)
	}
	return true
}

// adjustOOM makes the process, and what it has already forked, more eligible
// for the OOM killer than envd, whose protection it inherited.
func (p *process) adjustOOM() {
	adjust := func(pid int) {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("100"), 0o644)
	}
	adjust(p.child.pid)
	// It has rarely forked by now, so its tree is searched only then.
	if p.cgroup != nil && !p.cgroup.alone(p.child.pid) {
		for _, pid := range p.cgroup.pids() {
			adjust(pid)
		}
	}
}

// errNoStdin is an internal error on the wire; clients know its text.
var errNoStdin = errors.New("stdin not enabled or closed")

// write gives the process all of data, waiting until it is taken. Two writes
// do not mix.
func (p *process) write(data []byte, toPTY bool) error {
	switch {
	case toPTY && !p.hasPTY:
		return errors.New("the process has no terminal")
	case !toPTY && p.hasPTY:
		return errors.New("the process has a terminal: send the input to it")
	case p.input == nil:
		return errNoStdin
	}
	p.writeMu.Lock()
	defer p.writeMu.Unlock()
	_, err := p.input.Write(data)
	if errors.Is(err, os.ErrClosed) {
		return errNoStdin
	}
	if err != nil {
		return fmt.Errorf("write input: %w", cause(err))
	}
	return nil
}

// closeStdin ends the process's standard input. Closing it again is no error.
func (p *process) closeStdin() error {
	if p.hasPTY {
		return errors.New("a terminal's input cannot be closed: send it control-D")
	}
	if p.input != nil {
		_ = p.input.Close()
	}
	return nil
}

// resize sets the size of the terminal.
func (p *process) resize(size *processv1.PTY_Size) error {
	if !p.hasPTY {
		return errors.New("the process has no terminal")
	}
	return cause(setSize(p.input, size))
}

// stdio holds both ends of a new process's standard streams.
type stdio struct {
	theirs  []*os.File // stdin, stdout, stderr; an entry may repeat
	readers []*reader
	input   *os.File
}

// openFiles makes the process's terminal or pipes, and notes their inputs.
func (p *process) openFiles(c command) (_ *stdio, err error) {
	s := &stdio{}
	defer func() {
		if err != nil {
			s.closeTheirs()
			s.closeOurs()
			err = connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("open the process's streams: %w", cause(err)))
		}
	}()
	if c.size != nil {
		master, slave, err := openPTY()
		if err != nil {
			return nil, err
		}
		s.theirs = []*os.File{slave, slave, slave}
		s.readers = []*reader{{stream: terminal, file: master}}
		p.input, p.hasPTY = master, true
		// The terminal is its user's, as login would have it.
		_ = slave.Chown(int(c.as.uid), -1)
		return s, setSize(master, c.size)
	}
	if c.stdin {
		theirs, ours, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		s.theirs = append(s.theirs, theirs)
		s.input, p.input = ours, ours
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		s.theirs = append(s.theirs, null)
	}
	for _, st := range []stream{stdout, stderr} {
		ours, theirs, err := os.Pipe()
		if err != nil {
			return s, err
		}
		s.theirs = append(s.theirs, theirs)
		s.readers = append(s.readers, &reader{stream: st, file: ours})
	}
	return s, nil
}

// theirFDs puts the descriptors into blocking mode, as programs expect.
func (s *stdio) theirFDs() []uintptr {
	var fds []uintptr
	for _, f := range s.theirs {
		fds = append(fds, f.Fd())
	}
	return fds
}

func (s *stdio) closeTheirs() {
	for _, f := range s.theirs {
		_ = f.Close()
	}
}

func (s *stdio) closeOurs() {
	for _, r := range s.readers {
		_ = r.file.Close()
	}
	if s.input != nil {
		_ = s.input.Close()
	}
}

// reader carries one stream of a process to its output.
type reader struct {
	stream stream
	file   *os.File
}

// run reads until every writer has closed the stream. It calls drained.Done when
// the output of the process has been read: at the end of the stream, or after the
// read deadline that is set when the process ends. What descendants write later is
// read and dropped, so that they do not block.
func (r *reader) run(out *output, drained *sync.WaitGroup) {
	defer r.file.Close()
	buf := make([]byte, readSize)
	err := r.copy(out, buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		_ = r.file.SetReadDeadline(time.Time{})
		err = r.sweep(out, buf)
	}
	drained.Done()
	for err == nil {
		_, err = r.file.Read(buf)
	}
}

func (r *reader) copy(out *output, buf []byte) error {
	for {
		n, err := r.file.Read(buf)
		if n > 0 {
			out.write(r.stream, buf[:n])
		}
		if err != nil {
			return err
		}
	}
}

// sweep reads what a pipe holds now, up to drainMax.
func (r *reader) sweep(out *output, buf []byte) error {
	raw, err := r.file.SyscallConn()
	if err != nil {
		return err
	}
	for taken := 0; taken < drainMax; {
		var n int
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			n, readErr = unix.Read(int(fd), buf)
			return true
		})
		switch {
		case err != nil:
			return err
		case readErr == unix.EAGAIN:
			return nil
		case readErr == unix.EINTR:
			continue
		case readErr != nil:
			return readErr
		case n == 0:
			return io.EOF
		}
		out.write(r.stream, buf[:n])
		taken += n
	}
	return nil
}

// endEvent says how a process ended. The texts are those of Go's os package, on
// which clients rely.
func endEvent(status syscall.WaitStatus) *processv1.ProcessEvent_EndEvent {
	end := &processv1.ProcessEvent_EndEvent{ExitCode: int32(status.ExitStatus()), Exited: status.Exited()}
	switch {
	case status.Exited():
		end.Status = fmt.Sprintf("exit status %d", status.ExitStatus())
	case status.Signaled():
		end.Status = "signal: " + status.Signal().String()
		if status.CoreDump() {
			end.Status += " (core dumped)"
		}
	}
	if end.ExitCode != 0 {
		text := end.Status
		end.Error = &text
	}
	return end
}

// lookPath finds the program as a shell in cwd with that PATH would.
func lookPath(cmd, cwd, path string) (string, error) {
	if cmd == "" {
		return "", connect.NewError(connect.CodeInvalidArgument, errors.New("the command is empty"))
	}
	if strings.Contains(cmd, "/") {
		if !filepath.IsAbs(cmd) {
			cmd = filepath.Join(cwd, cmd)
		}
		return cmd, nil
	}
	for dir := range strings.SplitSeq(path, ":") {
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(cwd, dir)
		}
		file := filepath.Join(dir, cmd)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", notFound(cmd)
}

func notFound(cmd string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("command %q not found", cmd))
}

// startError gives the error of a fork or exec its code.
func startError(cmd string, err error) error {
	var coded *connect.Error
	switch {
	case err == nil || errors.As(err, &coded):
		return err
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return notFound(cmd)
	case errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("start command %q: %w", cmd, err))
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM):
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("start command %q: %w", cmd, err))
	default:
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("start command %q: %w", cmd, err))
	}
}

// checkStrings refuses what a system call cannot carry.
func checkStrings(c command) error {
	bad := slices.ContainsFunc(append([]string{c.config.GetCmd()}, c.config.GetArgs()...), hasNUL)
	for name, value := range c.env {
		bad = bad || hasNUL(name) || hasNUL(value) || name == "" || strings.Contains(name, "=")
	}
	if bad {
		return connect.NewError(connect.CodeInvalidArgument,
			errors.New("a NUL byte in the command or its environment, or a variable without a proper name"))
	}
	return nil
}

func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }

func environ(env map[string]string) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, name+"="+env[name])
	}
	return list
}

// credential is nil when the process shall run as envd does, which also works
// without privileges.
func credential(as account) *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: as.uid, Gid: as.gid, Groups: as.groups}
}

// cause returns a system call's error without what os adds: names of pipes mean
// nothing to a client.
func cause(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// awaitReaped waits a moment for a process that was sent a deadly signal, so
// that it is not there as a zombie any more when the sender looks.
func (p *process) awaitReaped(ctx context.Context, limit time.Duration) {
	await(ctx, p.reaped, limit)
}

// awaitFinished waits for a process that has ended until its output is whole.
func (p *process) awaitFinished(limit time.Duration) {
	await(context.Background(), p.finished, limit)
}

func await(ctx context.Context, done <-chan struct{}, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-ctx.Done():
	case <-timer.C:
	}
}
