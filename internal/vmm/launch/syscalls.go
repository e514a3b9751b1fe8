package launch

import (
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// namespaceFlags are the flags of clone that make a namespace. In a user namespace
// of its own a process is root, and reaches parts of the kernel that it does not
// reach otherwise.
const namespaceFlags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// The offsets in struct seccomp_data.
const (
	callNumber = 0
	callArch   = 4
	callArg0   = 16
)

// only renders a filter that lets a program make these system calls of x86-64 and no
// others. For the program the others do not exist in this kernel (ENOSYS), so that
// it falls back where it can. clone can make no namespace, socket and socketpair
// take AF_UNIX alone. clone3 must not be in the list: its flags are in memory, which
// a filter cannot read. The C library falls back to clone.
func only(calls []int) ([]bpf.RawInstruction, error) {
	refuse := func(errno unix.Errno) bpf.Instruction {
		return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
	}
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: callArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipTrue: 1},
		refuse(unix.ENOSYS),
		bpf.LoadAbsolute{Off: callNumber, Size: 4},
	}
	for _, call := range calls {
		allowed := []bpf.Instruction{allow}
		switch call {
		case unix.SYS_CLONE3:
			return nil, fmt.Errorf("filter system calls: clone3 cannot be filtered")
		case unix.SYS_CLONE:
			allowed = []bpf.Instruction{
				bpf.LoadAbsolute{Off: callArg0, Size: 4},
				bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: namespaceFlags, SkipTrue: 1},
				refuse(unix.EPERM),
				allow,
			}
		case unix.SYS_SOCKET, unix.SYS_SOCKETPAIR:
			allowed = []bpf.Instruction{
				bpf.LoadAbsolute{Off: callArg0, Size: 4},
				bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_UNIX, SkipTrue: 1},
				refuse(unix.EAFNOSUPPORT),
				allow,
			}
		}
		program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(call), SkipFalse: uint8(len(allowed))})
		program = append(program, allowed...)
	}
	return bpf.Assemble(append(program, refuse(unix.ENOSYS)))
}

// enterFilter puts a filter on the calling thread, from which the program inherits
// it.
func enterFilter(filter []bpf.RawInstruction) error {
	rules := make([]unix.SockFilter, len(filter))
	for i, r := range filter {
		rules[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	program := unix.SockFprog{Len: uint16(len(rules)), Filter: &rules[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	return nil
}
