package envd

import (
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
