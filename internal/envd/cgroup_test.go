package envd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// cgroupDir makes a directory in the cgroup2 hierarchy, wherever this machine
// has it.
func cgroupDir(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	for _, mountpoint := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(mountpoint, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir := filepath.Join(mountpoint, "envd-test-"+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("cannot make a cgroup: %v", err)
		}
		t.Cleanup(func() {
			if err := removeCgroup(dir); err != nil {
				t.Errorf("remove cgroup: %v", err)
			}
		})
		return dir
	}
	t.Skip("no cgroup2 hierarchy")
	return ""
}

// The kernel's limits are above the users', whatever memory a guest has, and are never
// lowered.
func TestBounds(t *testing.T) {
	for mib, want := range map[uint64]bounds{
		128:       {112 << 20, 1024},
		512:       {448 << 20, 2048},
		4 << 10:   {4032 << 20, 16384},
		256 << 10: {(256<<10 - 64) << 20, 1 << 20},
	} {
		got := boundsOf(mib << 20)
		if got != want {
			t.Errorf("%d MiB: got %+v, want %+v", mib, got, want)
		}
		dir := t.TempDir()
		for name, value := range map[string]uint64{
			"kernel/threads-max": 900, "kernel/pid_max": 4 << 20, "fs/file-max": 48000, "kernel/sched_rt_runtime_us": 950000,
		} {
			path := filepath.Join(dir, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, fmt.Appendln(nil, value), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if err := got.raise(dir); err != nil {
			t.Fatal(err)
		}
		for name, most := range map[string]uint64{
			"kernel/threads-max": got.processes + 1024, "kernel/pid_max": 4 << 20, "fs/file-max": 1<<63 - 1, "kernel/sched_rt_runtime_us": 500000,
		} {
			text, err := os.ReadFile(filepath.Join(dir, name))
			if is := strings.TrimSpace(string(text)); err != nil || is != strconv.FormatUint(most, 10) {
				t.Errorf("%d MiB: %s is %q, want %d; %v", mib, name, is, most, err)
			}
		}
	}
}

func groups(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		if entry.IsDir() {
			n++
		}
	}
	return n
}

func TestCgroupCatchesProcessesThatLeftTheSession(t *testing.T) {
	dir := cgroupDir(t)
	s, url := serve(t, Config{CgroupRoot: dir})
	msg := bySh(`trap '' TERM; cat /proc/self/cgroup; setsid sh -c 'trap "" TERM; echo away $$; exec sleep 100' & wait`)
	e, _ := start(t, processClient(url), msg, "Connect-Timeout-Ms", "500", guestapi.HeaderLifetime, guestapi.LifetimeStream)
	got := readUntil(t, e, "away ")
	if !strings.Contains(got, "0::"+strings.TrimPrefix(strings.TrimPrefix(dir, "/sys/fs/cgroup"), "/unified")+"/p1\n") {
		t.Errorf("in the cgroups %s", got)
	}
	for e.Receive() {
	}
	// PID 1 sweeps whenever it has reaped an orphan.
	eventually(t, "the cgroup to be removed", func() bool { s.processes.cgroups.sweep(); return groups(t, dir) == 0 })
}

func TestCgroupGoesWithItsLastProcess(t *testing.T) {
	dir := cgroupDir(t)
	s, url := serve(t, Config{CgroupRoot: dir})
	c := processClient(url)
	e, _ := start(t, c, bySh("sleep 0.3 & exit 0"))
	all(t, e)
	if n := groups(t, dir); n != 1 {
		t.Errorf("%d cgroups, want that of the background process", n)
	}
	eventually(t, "the cgroup to be removed", func() bool { s.processes.cgroups.sweep(); return groups(t, dir) == 0 })
}
