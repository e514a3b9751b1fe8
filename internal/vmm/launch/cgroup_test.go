package launch

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestSettings(t *testing.T) {
	all := vmm.Limits{CPUMilli: 1500, MemMiB: 256, PIDs: 64}
	for _, c := range []struct {
		limits  vmm.Limits
		version int
		want    []setting
	}{
		{vmm.Limits{}, 1, nil},
		{vmm.Limits{}, 2, nil},
		{all, 2, []setting{{"cpu", "cpu.max", "150000 100000"}, {"memory", "memory.max", "268435456"}, {"pids", "pids.max", "64"}}},
		{all, 1, []setting{
			{"cpu", "cpu.cfs_period_us", "100000"}, {"cpu", "cpu.cfs_quota_us", "150000"},
			{"memory", "memory.limit_in_bytes", "268435456"}, {"pids", "pids.max", "64"},
		}},
	} {
		got := settings(c.limits, c.version)
		if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(setting{})); diff != "" {
			t.Errorf("%+v, version %d:\n%s", c.limits, c.version, diff)
		}
	}
}

func TestCgroupNames(t *testing.T) {
	for _, bad := range []string{"", "/", "/a", "a/", "..", "a/../b", ".", "a//b", "-a", "a b", "a\x00b", "a\nb", strings.Repeat("a", 300)} {
		if _, err := openCgroup(bad); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, good := range []string{"a", "wrenn/sb-1", "machine.slice/wrenn_x/1"} {
		if _, err := openCgroup(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}

var itoa = strconv.Itoa

const testCgroup = "wrenn-vmmtest/one"

func cgroupDirs(t *testing.T) []string {
	t.Helper()
	c, err := openCgroup(testCgroup)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.dirs()) == 0 {
		t.Skip("this machine lacks cgroups")
	}
	return c.dirs()
}

// exist returns those of the directories that are there.
func exist(dirs []string) (there []string) {
	for _, dir := range dirs {
		if _, err := os.Stat(dir); err == nil {
			there = append(there, dir)
		}
	}
	return there
}

func TestCgroup(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	dirs := cgroupDirs(t)
	p := sh("sleep 60 & sleep 60 & setsid sleep 60 & wait")
	p.Cgroup = testCgroup
	p.Limits = vmm.Limits{CPUMilli: 500, MemMiB: 64, PIDs: 10}
	process := launch(t, p)
	if got := exist(dirs); len(got) != len(dirs) {
		t.Errorf("made %v of %v", got, dirs)
	}
	membership, err := os.ReadFile("/proc/" + itoa(process.Ref().PID) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(membership), ":/"+testCgroup+"\n"); n != len(dirs) {
		t.Errorf("in %d of %d groups:\n%s", n, len(dirs), membership)
	}
	for _, dir := range dirs {
		for file, want := range map[string]string{
			"pids.max": "10", "memory.limit_in_bytes": "67108864", "memory.max": "67108864",
			"cpu.cfs_quota_us": "50000", "cpu.max": "50000 100000",
		} {
			if got, err := os.ReadFile(filepath.Join(dir, file)); err == nil && strings.TrimSpace(string(got)) != want {
				t.Errorf("%s/%s = %s, want %s", dir, file, got, want)
			}
		}
	}
	// Its children die with it, those in other sessions too.
	if err := process.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if left := exist(append(dirs, parents(dirs)...)); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCgroupEndsWithAnExit(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	dirs := cgroupDirs(t)
	p := sh("setsid sleep 60 & exit 3")
	p.Cgroup = testCgroup
	process := launch(t, p)
	if exit := wait(t, process); exit.Code != 3 {
		t.Errorf("%+v", exit)
	}
	if left := exist(dirs); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCgroupOfAFailedLaunch(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	cgroupDirs(t)
	if _, err := Start(Program{Args: []string{"/nonexistent"}, Cgroup: testCgroup}); err == nil {
		t.Error("no error")
	}
	if _, err := Start(Program{Args: []string{"/bin/true"}, Cgroup: "../etc"}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("%v", err)
	}
}

// What an agent left behind that died, with a VMM that nobody watches.
func TestRemoveCgroup(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	dirs := cgroupDirs(t)
	p := sh("trap '' TERM; sleep 60 & wait")
	p.Cgroup = testCgroup
	process := launch(t, p)
	if err := RemoveCgroup(t.Context(), testCgroup); err != nil {
		t.Fatal(err)
	}
	if left := exist(dirs); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	wait(t, process)
	for _, name := range []string{testCgroup, ""} {
		if err := RemoveCgroup(t.Context(), name); err != nil {
			t.Errorf("again: %v", err)
		}
	}
}

// Groups come and go beside each other; the parent goes with the last.
func TestCgroupsBesideEachOther(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	cgroupDirs(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 10 {
				p := sh("true")
				p.Cgroup = "wrenn-vmmtest/" + itoa(i)
				process, err := Start(p)
				if err != nil {
					t.Error(err)
					return
				}
				<-process.Done()
				if err := process.Kill(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// Without cgroup.kill: the freezer holds the group still.
func TestFreezerKill(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-vmmtest")
	cgroupDirs(t)
	c, err := openCgroup(testCgroup)
	if err != nil {
		t.Fatal(err)
	}
	if c.h.v1["freezer"] == "" {
		t.Skip("this machine lacks a v1 freezer")
	}
	c.h.v2 = ""
	p := sh("sleep 60 & sleep 60 & wait")
	p.Cgroup = testCgroup
	process := launch(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := c.remove(ctx); err != nil {
		t.Error(err)
	}
	if exit := wait(t, process); exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
}

func parents(dirs []string) (out []string) {
	for _, dir := range dirs {
		out = append(out, filepath.Dir(dir))
	}
	return out
}
