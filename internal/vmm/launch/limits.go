package launch

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
)

// MaxFiles bounds the descriptors of a VMM.
const MaxFiles = 1024

// limitResources lowers the resource limits of a process that the agent started.
// Root without CAP_SYS_RESOURCE, as in some containers, may not lower the limits
// of another user's process. Where that is refused, limitResources acts as the
// process's own user. The process may be about to change its user, so the attempt
// is repeated.
func limitResources(pid int, maxFile int64) error {
	limit := func() error {
		limits := map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: MaxFiles}
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

// userOf reads which user a process runs as.
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

// asUser runs f on a thread of its own that runs as the user.
func asUser(uid, gid int, f func() error) error {
	return osthread.Do(func() error {
		// The library's functions change the user of every thread; these system
		// calls change that of the calling thread.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
			return errno
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			return errno
		}
		return f()
	})
}
