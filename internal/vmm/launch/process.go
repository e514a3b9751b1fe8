// Package launch starts VMMs as confined processes, watches them until they
// exit, and takes up those of an earlier agent.
package launch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// LogName is the file in a run directory that holds what the VMM prints. With a
// program's environment wiped, it is what shows whose the program is.
const LogName = "vmm.log"

const (
	// killTimeout bounds how long Kill waits for a process that was sent
	// SIGKILL. One that takes longer hangs in the kernel.
	killTimeout = 10 * time.Second
	// trimEvery is how often the watcher looks at the size of the files that
	// the process appends to.
	trimEvery = time.Second
	// detailBytes bounds Exit.Detail.
	detailBytes = 2 << 10
)

// Program is a VMM to be launched.
type Program struct {
	// Args is the argument vector; Args[0] is the program's absolute path. No
	// shell ever sees it.
	Args []string
	// Files become descriptors 3, 4, …; the caller closes its own copies.
	// Nothing else of the agent's is open in the program.
	Files []*os.File
	// NetNS is the path of the network namespace to run in; empty for ours.
	NetNS string
	// RunDir marks the program as ours for KillStrays; empty for no mark.
	RunDir string
	// Log receives what the program prints to standard error, and Console what
	// it prints to standard output; both are kept below vmm.MaxConsoleBytes, whether
	// an agent runs or not. Without Console all is the log's, without either it
	// is thrown away.
	Log, Console string
	// Cgroup is made with Limits before the program starts, in which it is
	// born, and removed with everything in it when the program has ended;
	// empty for ours.
	Cgroup string
	Limits vmm.Limits
	// Private gives the program mount, process, IPC and UTS namespaces of its
	// own. It is process 1 of its own, and ends with all that it starts; of the
	// others it sees none, and signals that it does not handle it does not get,
	// but for SIGKILL and SIGSTOP.
	Private bool
	// Mounts are made in that mount namespace, in this order, before the program
	// starts; they imply Private.
	Mounts []Mount
	// Syscalls are the only system calls that the program can make, and whatever
	// it starts; nil for all. See only for what of them it cannot do.
	Syscalls []int
	// Root becomes the program's root directory, in which Args[0] is found;
	// empty to keep ours.
	Root string
	// UID and GID are what the program runs as, with no other groups; zero for
	// root.
	UID, GID int
	// MaxFile is the largest file that the program can write, in bytes; 0 for no
	// bound.
	MaxFile int64
	// ReadOnly is a file that the program cannot write to, though it opens it
	// by this path for reading and writing; empty for none. See Started.
	ReadOnly string
}

// Ref names a process for good, and what the launcher looks after for it:
// enough for a later agent to adopt it.
type Ref struct {
	PID int `json:"pid"`
	// Started is when, in clock ticks after the boot: a pid alone comes back.
	Started uint64 `json:"started"`
	// Boot is the id of the boot that both numbers belong to.
	Boot string `json:"boot"`

	Log     string `json:"log,omitempty"`
	Console string `json:"console,omitempty"`
	// The pipes that lead to these files. Without them the program writes to
	// the files itself: an earlier version started it.
	LogPipe     string `json:"log_pipe,omitempty"`
	ConsolePipe string `json:"console_pipe,omitempty"`
	Cgroup      string `json:"cgroup,omitempty"`
}

// print is a file of what a program prints, and the pipe that leads to it.
type print struct{ pipe, path string }

func (r Ref) prints() []print {
	return []print{{r.LogPipe, r.Log}, {r.ConsolePipe, r.Console}}
}

// Process is a VMM that runs in a session of its own. It depends on nothing of
// the agent's: the agent may be killed, and later adopt the process again.
// Safe for concurrent use.
type Process struct {
	ref   Ref
	child bool // ours to reap
	pidfd *os.File
	// opener, if not nil, gives it its read-only file.
	opener  *opener
	outlets []*outlet

	ended   chan struct{} // closed when the watcher has ended
	done    chan struct{}
	exit    vmm.Exit // valid once done is closed
	cleanup error    // what could not be freed after the exit; likewise
}

// maxFiles bounds the descriptors of a VMM.
const maxFiles = 1024

// Start starts the program and returns when it runs. Its standard input is
// empty, it gains no privileges by whatever it executes, it dumps no core. It
// is watched until it has exited. On error nothing is left but the log.
func Start(p Program) (_ *Process, err error) {
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("launch %s: %w", filepath.Base(p.Args[0]), err), steps.Unwind(context.Background()))
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out, err := p.makeOutlets(null, &steps)
	defer out.closeOurs()
	if err != nil {
		return nil, err
	}
	files := []uintptr{null.Fd(), out.stdout.Fd(), out.stderr.Fd()}
	for _, f := range p.Files {
		files = append(files, f.Fd())
	}
	defer runtime.KeepAlive(p.Files)

	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	if p.RunDir != "" {
		env = append(env, runDirEnv+"="+p.RunDir)
	}
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd, Chroot: p.Root}
	if p.UID != 0 || p.GID != 0 {
		sys.Credential = &syscall.Credential{Uid: uint32(p.UID), Gid: uint32(p.GID)}
	}
	var group cgroup
	if p.Cgroup != "" {
		if group, err = openCgroup(p.Cgroup); err != nil {
			return nil, err
		}
		if err := group.create(p.Limits); err != nil {
			return nil, err
		}
		steps.Push("remove cgroup", group.remove)
		dir, err := group.open()
		if err != nil {
			return nil, err
		}
		if dir != nil {
			defer dir.Close()
			sys.UseCgroupFD, sys.CgroupFD = p.Syscalls == nil, int(dir.Fd())
		}
	}

	var filter []bpf.RawInstruction
	if p.Syscalls != nil {
		if filter, err = only(p.Syscalls); err != nil {
			return nil, err
		}
	}
	var o *opener
	if p.ReadOnly != "" {
		if o, err = newOpener(p.ReadOnly); err != nil {
			return nil, err
		}
		steps.Push("close opener", func(context.Context) error { o.close(); return nil })
	}
	// What we open ourselves is never inherited. What our parent left open in
	// us is, unless it is told now.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, err
	}
	var pid int
	err = osthread.Do(func() error {
		if err := p.enter(group, o, filter); err != nil {
			return err
		}
		pid, _, err = syscall.StartProcess(p.Args[0], p.Args, &syscall.ProcAttr{Dir: "/", Env: env, Files: files, Sys: sys})
		return err
	})
	if err != nil {
		return nil, err
	}
	// It is not reaped before it is watched, so the number is its own.
	steps.Push("kill", func(context.Context) error {
		return errors.Join(unix.Kill(pid, unix.SIGKILL), reap(pid, &vmm.Exit{}))
	})
	if !sys.UseCgroupFD {
		if err := group.enter(pid); err != nil {
			return nil, errors.Join(err, unix.Close(pidfd))
		}
	}
	if err := limitResources(pid, p.MaxFile); err != nil {
		return nil, errors.Join(fmt.Errorf("set limits: %w", err), unix.Close(pidfd))
	}
	who, err := identify(pid)
	if err != nil {
		return nil, errors.Join(err, unix.Close(pidfd))
	}
	ref := Ref{
		PID: who.PID, Started: who.Started, Boot: who.Boot, Cgroup: p.Cgroup,
		Log: p.Log, Console: p.Console, LogPipe: out.logPipe, ConsolePipe: out.consolePipe,
	}
	process, err := watch(&Process{ref: ref, child: true, opener: o, outlets: out.outlets}, pidfd)
	if err != nil {
		return nil, err
	}
	steps.Keep()
	return process, nil
}

// enter makes the calling thread what the program is to be born as.
func (p Program) enter(group cgroup, o *opener, filter []bpf.RawInstruction) error {
	if err := enterNetNS(p.NetNS); err != nil {
		return err
	}
	if p.Private || len(p.Mounts) > 0 {
		if err := privateNamespaces(p.Mounts); err != nil {
			return err
		}
	}
	if err := group.enterThread(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if o != nil {
		if err := o.enterThread(); err != nil {
			return err
		}
	}
	if filter != nil {
		return enterFilter(filter)
	}
	return nil
}

// printing is where a new program prints to.
type printing struct {
	stdout, stderr       *os.File
	logPipe, consolePipe string
	outlets              []*outlet
	ours                 []*os.File // copies that the program has by then
}

// makeOutlets opens what the program prints to; without a file that is null.
func (p Program) makeOutlets(null *os.File, steps *undo.Stack) (printing, error) {
	out := printing{stdout: null, stderr: null}
	open := func(path string) (string, *os.File, error) {
		pipe := filepath.Join(cmp.Or(p.RunDir, filepath.Dir(path)), filepath.Base(path)) + pipeSuffix
		o, write, err := makeOutlet(pipe, path)
		if err != nil {
			return "", nil, err
		}
		steps.Push("close outlet", func(context.Context) error { o.close(); return os.Remove(pipe) })
		out.outlets, out.ours = append(out.outlets, o), append(out.ours, write)
		return pipe, write, nil
	}
	var err error
	if p.Log != "" {
		if out.logPipe, out.stderr, err = open(p.Log); err != nil {
			return out, err
		}
		out.stdout = out.stderr
	}
	if p.Console != "" {
		out.consolePipe, out.stdout, err = open(p.Console)
	}
	return out, err
}

func (out printing) closeOurs() {
	for _, f := range out.ours {
		f.Close()
	}
}

// limitResources lowers what a process of ours may take. Root without
// CAP_SYS_RESOURCE, as some containers have it, may not do that to the processes
// of others; so where it is refused, it is done as the process's own user, which
// may be about to change.
func limitResources(pid int, maxFile int64) error {
	limit := func() error {
		limits := map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: maxFiles}
		if maxFile > 0 {
			limits[unix.RLIMIT_FSIZE] = uint64(maxFile)
		}
		for resource, n := range limits {
			if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil {
				return err
			}
		}
		return nil
	}
	err := limit()
	for try := 0; errors.Is(err, unix.EPERM) && try < 5; try++ {
		var uid, gid int
		if uid, gid, err = userOf(pid); err == nil {
			err = asUser(uid, gid, limit)
		}
	}
	return err
}

// userOf reads whose a process is.
func userOf(pid int) (uid, gid int, err error) {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, 0, err
	}
	found := 0
	for line := range strings.Lines(string(status)) {
		for name, id := range map[string]*int{"Uid:": &uid, "Gid:": &gid} {
			if ids, ok := strings.CutPrefix(line, name); ok {
				n, err := fmt.Sscan(ids, id)
				if err != nil {
					return 0, 0, err
				}
				found += n
			}
		}
	}
	if found != 2 {
		return 0, 0, errors.New("process status names no user")
	}
	return uid, gid, nil
}

// asUser runs f on a thread that is that user's, and ends.
func asUser(uid, gid int, f func() error) error {
	return osthread.Do(func() error {
		// The system calls themselves: the library's mean every thread.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
			return errno
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			return errno
		}
		return f()
	})
}

// Adopt watches a process that an earlier agent launched. One that has exited,
// or whose pid belongs to another by now, is errdefs.NotFound; its cgroup is
// removed then.
func Adopt(ctx context.Context, ref Ref) (*Process, error) {
	pidfd, err := openSame(ref)
	if errors.Is(err, errdefs.NotFound) {
		return nil, errors.Join(err, RemoveCgroup(ctx, ref.Cgroup))
	}
	if err != nil {
		return nil, err
	}
	p := &Process{ref: ref}
	for _, to := range ref.prints() {
		if to.pipe == "" {
			continue
		}
		// Without its pipe it runs all the same, and what it prints is lost.
		if o, err := takeOutlet(to.pipe, to.path); err == nil {
			p.outlets = append(p.outlets, o)
		}
	}
	return watch(p, pidfd)
}

// openSame returns a pidfd of the process that ref means, and no other.
func openSame(ref Ref) (int, error) {
	gone := errdefs.NotFound.Errorf("process %d has exited", ref.PID)
	if ref.PID <= 0 {
		return -1, gone
	}
	pidfd, err := unix.PidfdOpen(ref.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, gone
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", ref.PID, err)
	}
	// The descriptor pins whoever has the number now. If that one started
	// when ours did, it is ours.
	now, err := identify(ref.PID)
	if overloaded(err) { // which proves nothing
		return -1, errors.Join(err, unix.Close(pidfd))
	}
	if err != nil || now.Started != ref.Started || now.Boot != ref.Boot || exited(pidfd) {
		return -1, errors.Join(gone, unix.Close(pidfd))
	}
	return pidfd, nil
}

// watch takes over pidfd.
func watch(p *Process, pidfd int) (*Process, error) {
	// A non-blocking descriptor is waited for by the runtime's poller; no
	// thread sits on it.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", p.ref.PID, err), unix.Close(pidfd))
	}
	p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	if err := p.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", p.ref.PID, err), p.pidfd.Close())
	}
	p.done, p.ended = make(chan struct{}), make(chan struct{})
	go p.wait()
	return p, nil
}

// wait is the watcher; it ends with the process, or when that is released.
func (p *Process) wait() {
	defer close(p.ended)
	defer p.pidfd.Close()
	for {
		p.trim()
		err := p.exitWithin(trimEvery)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			for _, o := range p.outlets {
				o.close()
			}
			return // the descriptor is closed: released
		}
	}
	defer close(p.done)
	if p.opener != nil {
		p.opener.close()
	}
	p.exit = vmm.Exit{At: time.Now().UTC(), Code: -1}
	if p.child {
		reap(p.ref.PID, &p.exit)
	}
	oomKilled := oomKilled(p.ref.Cgroup) // which goes with the cgroup
	p.cleanup = RemoveCgroup(context.Background(), p.ref.Cgroup)
	for _, o := range p.outlets {
		o.drain()
	}
	for _, to := range p.ref.prints() {
		if to.pipe != "" {
			os.Remove(to.pipe) // its directory may be gone, too
		}
	}
	p.trim()
	if p.ref.Log != "" {
		tail, _ := vmm.Tail(p.ref.Log, detailBytes)
		p.exit.Detail = strings.TrimSpace(string(tail))
	}
	var console []byte
	if p.ref.Console != "" {
		console, _ = vmm.Tail(p.ref.Console, lastConsole) // or the guest has said nothing
	}
	p.exit.Cause = causeOf(p.exit, oomKilled, console)
}

// exitWithin waits for the exit, at most d.
func (p *Process) exitWithin(d time.Duration) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := p.pidfd.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool { return exited(int(fd)) })
}

// Started says that the program has opened all that it ever will. One that
// did not take its read-only file the way it was to is an error; opening for
// writing by name fails from now on.
func (p *Process) Started() error {
	if p.opener != nil && !p.opener.close() {
		return errors.New("the program did not get its file for reading alone")
	}
	return nil
}

// Release ends the watching of an adopted process, which lives on. Done is
// never closed after that.
func (p *Process) Release() {
	p.pidfd.Close()
	<-p.ended
}

// trim bounds the files that a program of an earlier version appends to itself.
func (p *Process) trim() {
	for _, to := range p.ref.prints() {
		if to.pipe == "" && to.path != "" {
			trim(to.path, vmm.MaxConsoleBytes) // it is tried again soon
		}
	}
}

// Ref is what Adopt needs.
func (p *Process) Ref() Ref { return p.ref }

// Done is closed when the process has exited and its cgroup is gone.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the process ended; valid once Done is closed.
func (p *Process) Exit() vmm.Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return vmm.Exit{Code: -1}
	}
}

// EndedBy reports how the process has ended, if that is why a call to it came
// back with err.
func (p *Process) EndedBy(err error) (vmm.Exit, bool) {
	if !errors.Is(err, errdefs.Unavailable) {
		return vmm.Exit{}, false
	}
	// The connection breaks a moment before the process is seen to be gone.
	timer := time.NewTimer(50 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.exit, true
	case <-timer.C:
		return vmm.Exit{}, false
	}
}

// Kill ends the process and returns when it and its cgroup are gone, or when
// ctx or a bound of its own says that this takes too long; the process has then
// been told all the same. Killing a process that is gone is no error.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process %d: %w", p.ref.PID, err)
	}
	timer := time.NewTimer(killTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.cleanup
	case <-ctx.Done():
		return fmt.Errorf("kill process %d: %w", p.ref.PID, context.Cause(ctx))
	case <-timer.C:
		return errdefs.Unavailable.Errorf("process %d is still there %s after SIGKILL", p.ref.PID, killTimeout)
	}
}

// signal sends a signal to the process; to one that is gone it does nothing.
func (p *Process) signal(sig unix.Signal) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return nil // closed: the watcher has seen the end
	}
	var sent error
	conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if errors.Is(sent, unix.ESRCH) {
		return nil
	}
	return sent
}

func enterNetNS(path string) error {
	if path == "" {
		return nil
	}
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// privateNamespaces gives the thread mount, IPC and UTS namespaces of its own,
// with the mounts, and its next child a process namespace. Of the host's mounts
// it still sees them come and go, so that none is kept busy; of the host's name
// nothing.
func privateNamespaces(mounts []Mount) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("unshare namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Sethostname([]byte("localhost")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := mountAll(mounts); err != nil {
		return err
	}
	// Last: mountAll may start a child, too, and the first one is process 1.
	if err := unix.Unshare(unix.CLONE_NEWPID); err != nil {
		return fmt.Errorf("unshare processes: %w", err)
	}
	return nil
}

// exited reports whether the process of a pidfd has.
func exited(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// reap collects the status of our child, which has exited or is about to.
func reap(pid int, exit *vmm.Exit) error {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || exit == nil {
			return err
		}
		break
	}
	if status.Signaled() {
		exit.Signal = int(status.Signal())
	} else {
		exit.Code = status.ExitStatus()
	}
	return nil
}

// identify reads who has the pid now.
func identify(pid int) (Ref, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	started, err := startTime(string(stat))
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Ref{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return Ref{PID: pid, Started: started, Boot: strings.TrimSpace(string(boot))}, nil
}

// startTime finds field 22 of a /proc/PID/stat. The second field is the
// program's name in parentheses and may hold anything, spaces and parentheses
// included, so counting begins after the last one.
func startTime(stat string) (uint64, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("malformed stat %q", stat)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
