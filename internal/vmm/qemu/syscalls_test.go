package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// intruder is the argument that makes this test's program one that tries what a
// QEMU never does.
const intruder = "intruder"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == intruder {
		for _, a := range attempts {
			fmt.Printf("%s: %v\n", a.name, a.try())
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// call makes a system call. Those of its arguments that are not given are no
// descriptor, address or flag of anything, so that it does no harm where it is
// allowed: with zeros, fchmod would lock everyone out of the null device.
func call(nr uintptr, args ...uintptr) func() unix.Errno {
	return func() unix.Errno {
		none := ^uintptr(0)
		a := [6]uintptr{none, none, none, none, none, none}
		copy(a[:], args)
		_, _, errno := unix.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		return errno
	}
}

var attempts = []struct {
	name string
	try  func() unix.Errno
	want unix.Errno
}{
	{"ptrace", call(unix.SYS_PTRACE, unix.PTRACE_TRACEME), unix.ENOSYS},
	{"process_vm_readv", call(unix.SYS_PROCESS_VM_READV, 1), unix.ENOSYS},
	{"process_vm_writev", call(unix.SYS_PROCESS_VM_WRITEV, 1), unix.ENOSYS},
	{"process_madvise", call(unix.SYS_PROCESS_MADVISE), unix.ENOSYS},
	{"kcmp", call(unix.SYS_KCMP, 1, 1), unix.ENOSYS},
	{"pidfd_open", call(unix.SYS_PIDFD_OPEN, 1), unix.ENOSYS},
	{"pidfd_getfd", call(unix.SYS_PIDFD_GETFD), unix.ENOSYS},
	{"pidfd_send_signal", call(unix.SYS_PIDFD_SEND_SIGNAL), unix.ENOSYS},
	{"kill", call(unix.SYS_KILL, 1), unix.ENOSYS},
	{"io_uring_setup", call(unix.SYS_IO_URING_SETUP, 1), unix.ENOSYS},
	{"io_uring_enter", call(unix.SYS_IO_URING_ENTER), unix.ENOSYS},
	{"io_uring_register", call(unix.SYS_IO_URING_REGISTER), unix.ENOSYS},
	{"io_setup", call(unix.SYS_IO_SETUP), unix.ENOSYS},
	{"bpf", call(unix.SYS_BPF), unix.ENOSYS},
	{"userfaultfd", call(unix.SYS_USERFAULTFD, 1), unix.ENOSYS},
	{"perf_event_open", call(unix.SYS_PERF_EVENT_OPEN), unix.ENOSYS},
	{"fanotify_init", call(unix.SYS_FANOTIFY_INIT), unix.ENOSYS},
	{"init_module", call(unix.SYS_INIT_MODULE), unix.ENOSYS},
	{"finit_module", call(unix.SYS_FINIT_MODULE), unix.ENOSYS},
	{"delete_module", call(unix.SYS_DELETE_MODULE), unix.ENOSYS},
	{"kexec_load", call(unix.SYS_KEXEC_LOAD), unix.ENOSYS},
	{"kexec_file_load", call(unix.SYS_KEXEC_FILE_LOAD), unix.ENOSYS},
	{"reboot", call(unix.SYS_REBOOT), unix.ENOSYS},
	{"mount", call(unix.SYS_MOUNT), unix.ENOSYS},
	{"umount2", call(unix.SYS_UMOUNT2), unix.ENOSYS},
	{"fsopen", call(unix.SYS_FSOPEN), unix.ENOSYS},
	{"open_tree", call(unix.SYS_OPEN_TREE), unix.ENOSYS},
	{"move_mount", call(unix.SYS_MOVE_MOUNT), unix.ENOSYS},
	{"mount_setattr", call(unix.SYS_MOUNT_SETATTR), unix.ENOSYS},
	{"pivot_root", call(unix.SYS_PIVOT_ROOT), unix.ENOSYS},
	{"unshare", call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER), unix.ENOSYS},
	{"setns", call(unix.SYS_SETNS), unix.ENOSYS},
	{"clone3", call(unix.SYS_CLONE3), unix.ENOSYS},
	{"clone into a user namespace", call(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)), unix.EPERM},
	{"clone into a pid namespace", call(unix.SYS_CLONE, unix.CLONE_NEWPID|uintptr(unix.SIGCHLD)), unix.EPERM},
	{"fork", call(unix.SYS_FORK), unix.ENOSYS},
	{"execveat", call(unix.SYS_EXECVEAT), unix.ENOSYS},
	{"keyctl", call(unix.SYS_KEYCTL), unix.ENOSYS},
	{"add_key", call(unix.SYS_ADD_KEY), unix.ENOSYS},
	{"request_key", call(unix.SYS_REQUEST_KEY), unix.ENOSYS},
	{"open_by_handle_at", call(unix.SYS_OPEN_BY_HANDLE_AT), unix.ENOSYS},
	{"name_to_handle_at", call(unix.SYS_NAME_TO_HANDLE_AT), unix.ENOSYS},
	{"openat2", call(unix.SYS_OPENAT2), unix.ENOSYS},
	{"personality", call(unix.SYS_PERSONALITY, 0xffffffff), unix.ENOSYS},
	{"modify_ldt", call(unix.SYS_MODIFY_LDT), unix.ENOSYS},
	{"iopl", call(unix.SYS_IOPL), unix.ENOSYS},
	{"ioperm", call(unix.SYS_IOPERM), unix.ENOSYS},
	{"quotactl", call(unix.SYS_QUOTACTL), unix.ENOSYS},
	{"swapon", call(unix.SYS_SWAPON), unix.ENOSYS},
	{"settimeofday", call(unix.SYS_SETTIMEOFDAY), unix.ENOSYS},
	{"clock_adjtime", call(unix.SYS_CLOCK_ADJTIME), unix.ENOSYS},
	{"syslog", call(unix.SYS_SYSLOG), unix.ENOSYS},
	{"sethostname", call(unix.SYS_SETHOSTNAME), unix.ENOSYS},
	{"shmget", call(unix.SYS_SHMGET), unix.ENOSYS},
	{"msgget", call(unix.SYS_MSGGET), unix.ENOSYS},
	{"semget", call(unix.SYS_SEMGET), unix.ENOSYS},
	{"mq_open", call(unix.SYS_MQ_OPEN), unix.ENOSYS},
	{"move_pages", call(unix.SYS_MOVE_PAGES), unix.ENOSYS},
	{"mbind", call(unix.SYS_MBIND), unix.ENOSYS},
	{"inotify_init1", call(unix.SYS_INOTIFY_INIT1), unix.ENOSYS},
	{"splice", call(unix.SYS_SPLICE), unix.ENOSYS},
	{"vmsplice", call(unix.SYS_VMSPLICE), unix.ENOSYS},
	{"mknodat", call(unix.SYS_MKNODAT), unix.ENOSYS},
	{"linkat", call(unix.SYS_LINKAT), unix.ENOSYS},
	{"fchmod", call(unix.SYS_FCHMOD), unix.ENOSYS},
	{"setxattr", call(unix.SYS_SETXATTR), unix.ENOSYS},
	{"bind", call(unix.SYS_BIND), unix.ENOSYS},
	{"a call of another architecture", call(unix.SYS_GETPID | 1<<30), unix.ENOSYS}, // x32
	{"inet socket", call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM), unix.EAFNOSUPPORT},
	{"packet socket", call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW), unix.EAFNOSUPPORT},
	{"netlink socket", call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW), unix.EAFNOSUPPORT},
	{"vsock socket", call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM), unix.EAFNOSUPPORT},
	{"algorithm socket", call(unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET), unix.EAFNOSUPPORT},
	{"unix socket", call(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM, 0), 0},
	{"another process", func() unix.Errno { // there is none but itself
		var info unix.Stat_t
		if unix.Stat("/proc/self", &info) == nil && unix.Getpid() == 1 {
			return 0
		}
		return unix.ESRCH
	}, 0},
	{"the host's name", func() unix.Errno {
		var name unix.Utsname
		_, _, errno := unix.RawSyscall(unix.SYS_UNAME, uintptr(unsafe.Pointer(&name)), 0, 0)
		if unix.ByteSliceToString(name.Nodename[:]) != "localhost" {
			return unix.EEXIST
		}
		return errno
	}, 0},
}

// What the launcher lets a QEMU do is not left to QEMU: the same program with
// the same filter, as the same user, is refused whatever QEMU does not need.
func TestIntruderIsRefused(t *testing.T) {
	testenv.Root(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), launch.LogName)
	p, err := launch.Start(launch.Program{Args: []string{self, intruder}, Log: log, Private: true, Syscalls: calls})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(t.Context())
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	text, err := os.ReadFile(log)
	if err != nil || p.Exit().Code != 0 {
		t.Fatalf("it %s: %s, %v", p.Exit(), text, err)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, errno, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[name] = errno
	}
	for _, a := range attempts {
		if got := said[a.name]; got != a.want.Error() {
			t.Errorf("%s: %q, want %q", a.name, got, a.want.Error())
		}
	}
}
