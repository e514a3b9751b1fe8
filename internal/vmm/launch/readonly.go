package launch

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// opener answers a program that opens one file for reading and writing although it
// may only read the file. The kernel holds the call, and the opener answers it with
// a descriptor of its own that cannot write. A mount, a seal or an attribute that
// forbids writing would make the call fail instead.
type opener struct {
	path     string
	file     *os.File // path, opened to be read
	listener *os.File
	given    atomic.Bool
	ended    chan struct{} // closed when serve has ended
	once     sync.Once
}

// The messages between the kernel and a listener: struct seccomp_notif,
// seccomp_notif_resp and seccomp_notif_addfd.
type (
	notification struct {
		id    uint64
		pid   uint32
		flags uint32
		nr    int32
		arch  uint32
		ip    uint64
		args  [6]uint64
	}
	answer struct {
		id    uint64
		val   int64
		errno int32
		flags uint32
	}
	addition struct {
		id       uint64
		flags    uint32
		srcfd    uint32
		newfd    uint32
		newFlags uint32
	}
)

// writingOpens passes calls that open a file for reading and writing to a listener,
// and allows all others. The offsets are those of struct seccomp_data.
var writingOpens = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 4}, // architecture
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jf: 8},
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // number of the call
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jt: 3},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPEN, Jf: 5},
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16 + 8},
	{Code: unix.BPF_JMP | unix.BPF_JA, K: 1},
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16 + 2*8},
	{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: unix.O_ACCMODE},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.O_RDWR, Jt: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
}

func newOpener(path string) (*opener, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &opener{path: path, file: file}, nil
}

// enterThread puts the filter on the calling thread, which is about to become
// the program.
func (o *opener) enterThread() error {
	program := unix.SockFprog{Len: uint16(len(writingOpens)), Filter: &writingOpens[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("filter the opening of files: %w", errno)
	}
	if err := unix.SetNonblock(int(fd), true); err != nil { // for the runtime's poller
		return errors.Join(err, unix.Close(int(fd)))
	}
	o.listener = os.NewFile(fd, "seccomp")
	if err := o.listener.SetReadDeadline(time.Time{}); err != nil {
		return errors.Join(err, o.listener.Close())
	}
	o.ended = make(chan struct{})
	go o.serve()
	return nil
}

// serve answers calls until every program with the filter has ended, or close is
// called.
func (o *opener) serve() {
	defer close(o.ended)
	conn, err := o.listener.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Read(func(fd uintptr) bool {
		for {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil || n > 0 && poll[0].Revents&unix.POLLIN == 0:
				return true // the last program with the filter has ended
			case n == 0:
				return false
			default:
				o.answer(int(fd))
			}
		}
	})
}

// answer answers one call. A call that it fails to answer gets an error when the
// listener is closed.
func (o *opener) answer(listener int) {
	var n notification
	if errno := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); errno != 0 {
		return // the program was killed
	}
	at, flags := n.args[1], n.args[2]
	if n.nr == unix.SYS_OPEN {
		at, flags = n.args[0], n.args[1]
	}
	if !o.asksForIt(n.pid, at) {
		// It is another file: the kernel opens it as usual.
		_ = ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&answer{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}))
		return
	}
	give := addition{id: n.id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, srcfd: uint32(o.file.Fd()), newFlags: uint32(flags & unix.O_CLOEXEC)}
	if errno := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&give)); errno == 0 {
		o.given.Store(true)
	} else {
		_ = ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&answer{id: n.id, errno: -int32(unix.EACCES)}))
	}
}

// asksForIt says whether the path in a caller's memory is that of the file.
func (o *opener) asksForIt(pid uint32, at uint64) bool {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return false
	}
	defer mem.Close()
	want := append([]byte(o.path), 0)
	got := make([]byte, len(want))
	_, err = mem.ReadAt(got, int64(at))
	return err == nil && bytes.Equal(got, want)
}

// close ends serve and returns when it has ended. A program that opens a file for
// writing by its name after that gets an error. close says whether the program got
// its file.
func (o *opener) close() bool {
	o.once.Do(func() {
		if o.ended != nil {
			o.listener.Close()
			<-o.ended
		}
		o.file.Close()
	})
	return o.given.Load()
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errno != unix.EINTR {
			return errno
		}
	}
}
