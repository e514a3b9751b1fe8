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
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
)

// Start starts the program and returns when it runs. Its standard input is
// empty, it gains no privileges by programs that it executes, it dumps no core.
// The program is watched until it has exited. After an error nothing of it is
// left, except its log.
func Start(p Program) (_ *Process, err error) {
	s := starting{Program: p, printed: make(chan struct{}, 1), pidfd: -1}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("launch %s: %w", filepath.Base(p.Args[0]), err), s.steps.Unwind(context.Background()))
		}
	}()
	defer s.closeCopies()
	for _, step := range []func() error{s.openOutput, s.makeCgroup, s.makeFilters, s.spawn, s.limit} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	ref, err := identify(s.pid)
	if err != nil {
		return nil, err
	}
	ref.Cgroup, ref.Log, ref.Console = p.Cgroup, p.Log, p.Console
	ref.LogPipe, ref.ConsolePipe = s.logPipe, s.consolePipe
	pidfd := s.pidfd
	s.pidfd = -1 // watch takes it over
	process, err := watch(&Process{ref: ref, child: true, opener: s.opener, outlets: s.outlets, printed: s.printed}, pidfd)
	if err != nil {
		return nil, err
	}
	s.steps.Keep()
	return process, nil
}

// starting is a program on its way to a process.
type starting struct {
	Program
	steps undo.Stack

	stdin, stdout, stderr *os.File
	logPipe, consolePipe  string
	outlets               []*outlet
	printed               chan struct{}
	copies                []*os.File // the program has its own once it runs

	group    cgroup
	groupDir *os.File
	filter   []bpf.RawInstruction
	opener   *opener

	pid, pidfd int
}

func (s *starting) closeCopies() {
	for _, f := range s.copies {
		f.Close()
	}
}

// openOutput opens what the program reads from and prints to.
func (s *starting) openOutput() (err error) {
	if s.stdin, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return err
	}
	s.copies = append(s.copies, s.stdin)
	s.stdout, s.stderr = s.stdin, s.stdin
	if s.Log != "" {
		if s.logPipe, s.stderr, err = s.openOutlet(s.Log, false, notify(s.printed)); err != nil {
			return err
		}
		s.stdout = s.stderr
	}
	if s.Console != "" {
		s.consolePipe, s.stdout, err = s.openOutlet(s.Console, true, nil)
	}
	return err
}

func (s *starting) openOutlet(path string, stamped bool, carried func()) (pipe string, write *os.File, err error) {
	pipe = filepath.Join(cmp.Or(s.RunDir, filepath.Dir(path)), filepath.Base(path)) + pipeSuffix
	o, write, err := makeOutlet(print{pipe, path, stamped}, carried)
	if err != nil {
		return "", nil, err
	}
	s.steps.Push("close outlet", func(context.Context) error { o.close(); return os.Remove(pipe) })
	s.outlets, s.copies = append(s.outlets, o), append(s.copies, write)
	return pipe, write, nil
}

func (s *starting) makeCgroup() (err error) {
	if s.Cgroup == "" {
		return nil
	}
	if s.group, err = openCgroup(s.Cgroup); err != nil {
		return err
	}
	if err := s.group.create(s.Limits); err != nil {
		return err
	}
	s.steps.Push("remove cgroup", s.group.remove)
	s.groupDir, err = s.group.open()
	if s.groupDir != nil {
		s.copies = append(s.copies, s.groupDir)
	}
	return err
}

func (s *starting) makeFilters() (err error) {
	if s.Syscalls != nil {
		if s.filter, err = only(s.Syscalls); err != nil {
			return err
		}
	}
	if s.ReadOnly != "" {
		if s.opener, err = newOpener(s.ReadOnly); err != nil {
			return err
		}
		s.steps.Push("close opener", func(context.Context) error { s.opener.close(); return nil })
	}
	return nil
}

// bornInCgroup says whether the program's first instruction runs in its cgroup of
// version 2. That takes clone3, which a filter of system calls forbids.
func (s *starting) bornInCgroup() bool { return s.groupDir != nil && s.Syscalls == nil }

// spawn starts the process.
func (s *starting) spawn() error {
	// Descriptors that the agent opens are never inherited. Those that the
	// agent inherited itself would be, without this.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return err
	}
	files := []uintptr{s.stdin.Fd(), s.stdout.Fd(), s.stderr.Fd()}
	for _, f := range s.Files {
		files = append(files, f.Fd())
	}
	defer runtime.KeepAlive(s.Files)
	for range s.Stdouts {
		files = append(files, s.stdout.Fd())
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	if s.RunDir != "" {
		env = append(env, runDirEnv+"="+s.RunDir)
	}
	binary, err := s.binary(files)
	if err != nil {
		return err
	}
	sys := s.attributes()
	err = osthread.Do(func() (err error) {
		if err := s.prepareThread(); err != nil {
			return err
		}
		s.pid, _, err = syscall.StartProcess(binary, s.Args, &syscall.ProcAttr{Dir: "/", Env: env, Files: files, Sys: sys})
		return err
	})
	if err != nil {
		return err
	}
	// The process is not reaped before it is watched, so the pid stays its own.
	s.steps.Push("kill", func(context.Context) error {
		if s.pidfd >= 0 {
			unix.Close(s.pidfd)
		}
		return errors.Join(unix.Kill(s.pid, unix.SIGKILL), reap(s.pid, nil))
	})
	return nil
}

// attributes are what the kernel gives the process when it makes it.
func (s *starting) attributes() *syscall.SysProcAttr {
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &s.pidfd, Chroot: s.Root}
	if s.bornInCgroup() {
		sys.UseCgroupFD, sys.CgroupFD = true, int(s.groupDir.Fd())
	}
	switch {
	case s.UserNS:
		sys.Cloneflags = namespaceFlags &^ unix.CLONE_NEWCGROUP
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: s.UID, Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: s.GID, Size: 1}}
		sys.GidMappingsEnableSetgroups = true // to drop the agent's
		sys.Credential = &syscall.Credential{}
	case s.UID != 0 || s.GID != 0:
		sys.Credential = &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.GID)}
	}
	return sys
}

// binary returns the path by which the process executes its program. A user of a
// namespace of its own may not be able to walk to the program, so there the path is
// that of a descriptor, which closes when the program begins. Its number is beyond
// those that the start of a process uses to put files into their places.
func (s *starting) binary(files []uintptr) (string, error) {
	if !s.UserNS {
		return s.Args[0], nil
	}
	program, err := os.Open(s.Args[0])
	if err != nil {
		return "", err
	}
	defer program.Close()
	beyond := int(slices.Max(files)) + 2*len(files)
	fd, err := unix.FcntlInt(program.Fd(), unix.F_DUPFD_CLOEXEC, beyond)
	if err != nil {
		return "", err
	}
	s.copies = append(s.copies, os.NewFile(uintptr(fd), program.Name()))
	return "/proc/self/fd/" + strconv.Itoa(fd), nil
}

// prepareThread gives the calling thread all that the program inherits from it.
func (s *starting) prepareThread() error {
	if err := enterNetNS(s.NetNS); err != nil {
		return err
	}
	if s.UserNS {
		if err := privateName(); err != nil {
			return err
		}
	}
	if s.Private || len(s.Mounts) > 0 {
		if err := privateNamespaces(s.Mounts); err != nil {
			return err
		}
	}
	if err := s.group.enterThread(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if s.opener != nil {
		if err := s.opener.enterThread(); err != nil {
			return err
		}
	}
	if s.filter != nil {
		return enterFilter(s.filter)
	}
	return nil
}

// limit sets the limits that the process cannot inherit.
func (s *starting) limit() error {
	if !s.bornInCgroup() {
		if err := s.group.enter(s.pid); err != nil {
			return err
		}
	}
	if err := limitResources(s.pid, s.MaxFile); err != nil {
		return fmt.Errorf("set limits: %w", err)
	}
	return nil
}

// enterNetNS moves the calling thread into a network namespace.
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

// privateNamespaces gives the calling thread mount, IPC and UTS namespaces of its
// own, with the mounts in the first one, and its next child a process namespace.
// The thread still sees mounts of the host come and go, so that its namespace
// keeps none of them busy. It does not see the host's name.
func privateNamespaces(mounts []Mount) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("unshare namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Sethostname([]byte(noName)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := mountAll(mounts); err != nil {
		return err
	}
	// This comes last: mountAll may start a child, and the first child of the
	// thread becomes process 1 of the namespace.
	if err := unix.Unshare(unix.CLONE_NEWPID); err != nil {
		return fmt.Errorf("unshare processes: %w", err)
	}
	return nil
}

// noName is the host's name as programs see it.
const noName = "localhost"

// privateName gives the calling thread a UTS namespace with another host name, which a
// child in a namespace of its own begins with.
func privateName() error {
	if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("unshare host name: %w", err)
	}
	if err := unix.Sethostname([]byte(noName)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return nil
}
