package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	// cgroupTimeout bounds how long a cgroup may take to become empty.
	cgroupTimeout = 5 * time.Second
	cgroupPoll    = 2 * time.Millisecond
	// cpuPeriod is the kernel's customary one, in microseconds.
	cpuPeriod = 100_000
	// cgroupMark begins the name of every cgroup of an agent. A parent with that
	// name is removed together with its last child.
	cgroupMark = "wrenn"
)

// hierarchies are the cgroup trees of this host. A host has one v2 tree with all
// controllers, or a v1 tree for each controller and perhaps a v2 tree without any.
type hierarchies struct {
	v2 string            // empty if there is none
	v1 map[string]string // by controller
}

// v1Controllers are the controllers used under v1. Where there is no cgroup.kill,
// the freezer stops the processes of a group while they are killed.
var v1Controllers = []string{"cpu", "memory", "pids", "freezer"}

func findHierarchies(root string) hierarchies {
	h := hierarchies{v1: map[string]string{}}
	if fsType(root) == unix.CGROUP2_SUPER_MAGIC {
		h.v2 = root
		return h
	}
	if dir := filepath.Join(root, "unified"); fsType(dir) == unix.CGROUP2_SUPER_MAGIC {
		h.v2 = dir
	}
	for _, c := range v1Controllers {
		if dir := filepath.Join(root, c); fsType(dir) == unix.CGROUP_SUPER_MAGIC {
			h.v1[c] = dir
		}
	}
	return h
}

func fsType(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return st.Type
}

// cgroup is one group, in every hierarchy.
type cgroup struct {
	name string
	h    hierarchies
}

func openCgroup(name string) (cgroup, error) {
	if err := vmm.ValidateCgroup(name); err != nil {
		return cgroup{}, err
	}
	return cgroup{name: name, h: findHierarchies(cgroupRoot)}, nil
}

// dirs are the group's directories, one in each hierarchy.
func (c cgroup) dirs() []string {
	var dirs []string
	if c.h.v2 != "" {
		dirs = append(dirs, filepath.Join(c.h.v2, c.name))
	}
	for _, dir := range c.h.v1 {
		dirs = append(dirs, filepath.Join(dir, c.name))
	}
	return dirs
}

// setting is one line to write into a group's file.
type setting struct{ controller, file, value string }

// settings renders limits for a hierarchy of the given version.
func settings(l vmm.Limits, version int) []setting {
	var out []setting
	add := func(controller, file string, value int64) {
		out = append(out, setting{controller, file, strconv.FormatInt(value, 10)})
	}
	if l.CPUMilli > 0 {
		quota := int64(l.CPUMilli) * cpuPeriod / 1000
		if version == 2 {
			out = append(out, setting{"cpu", "cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod)})
		} else {
			add("cpu", "cpu.cfs_period_us", cpuPeriod)
			add("cpu", "cpu.cfs_quota_us", quota)
		}
	}
	if l.MemMiB > 0 {
		file := "memory.max"
		if version == 1 {
			file = "memory.limit_in_bytes"
		}
		add("memory", file, int64(l.MemMiB)<<20)
	}
	if l.PIDs > 0 {
		add("pids", "pids.max", int64(l.PIDs))
	}
	return out
}

// create makes the group with its limits. After an error nothing of it is left.
func (c cgroup) create(l vmm.Limits) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make cgroup: %w", err), c.remove(context.Background()))
		}
	}()
	if len(c.dirs()) == 0 {
		return errdefs.Unsupported.Errorf("this host has no cgroups")
	}
	// Another agent call may remove a parent, as empty, before its child is made.
	for try := 0; ; try++ {
		if err = c.mkdirs(); err == nil || try == 10 || !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return err
	}
	version := 1
	if len(c.h.v1) == 0 {
		version = 2
	}
	for _, s := range settings(l, version) {
		dir := c.h.v1[s.controller]
		if version == 2 {
			dir = c.h.v2
		}
		file := filepath.Join(dir, c.name, s.file)
		if _, err := os.Stat(file); dir == "" || err != nil {
			return errdefs.Unsupported.Errorf("this host's cgroups cannot limit %s", s.controller)
		}
		if err := os.WriteFile(file, []byte(s.value), 0); err != nil {
			return err
		}
	}
	return nil
}

func (c cgroup) mkdirs() error {
	for _, dir := range c.dirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if len(c.h.v1) > 0 {
		return nil
	}
	// Under v2 a group has the controllers that its ancestors pass down. If one
	// is missing, create fails when it sets that controller's limit.
	dir := c.h.v2
	for _, part := range strings.Split(filepath.Dir(c.name), "/") {
		for _, controller := range []string{"cpu", "memory", "pids"} {
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
		dir = filepath.Join(dir, part)
	}
	if dir != c.h.v2 {
		for _, controller := range []string{"cpu", "memory", "pids"} {
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
	}
	return nil
}

// enterThread moves the calling thread into the group's v1 hierarchies, in which
// its children then start.
func (c cgroup) enterThread() error {
	for _, dir := range c.h.v1 {
		if err := os.WriteFile(filepath.Join(dir, c.name, "tasks"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// enter moves a process into the group's v2 hierarchy. It is for a process that
// could not start there, because a filter of system calls forbids clone3.
func (c cgroup) enter(pid int) error {
	if c.name == "" || c.h.v2 == "" {
		return nil
	}
	if err := os.WriteFile(filepath.Join(c.h.v2, c.name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

// open returns the v2 directory for CLONE_INTO_CGROUP, or nil without v2.
func (c cgroup) open() (*os.File, error) {
	if c.h.v2 == "" {
		return nil, nil
	}
	return os.OpenFile(filepath.Join(c.h.v2, c.name), unix.O_PATH|unix.O_DIRECTORY, 0)
}

// remove kills the processes in the group, removes the group, and returns when
// it is gone. A group that does not exist is no error.
func (c cgroup) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, cgroupTimeout,
		errdefs.Unavailable.Errorf("cgroup does not become empty within %s", cgroupTimeout))
	defer cancel()
	for {
		var errs []error
		for _, dir := range c.dirs() {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			}
		}
		if len(errs) == 0 {
			c.removeParents()
			return nil
		}
		if err := c.kill(); err != nil {
			errs = append(errs, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup: %w (%w)", context.Cause(ctx), errors.Join(errs...))
		case <-time.After(cgroupPoll):
		}
	}
}

// removeParents removes the parents with cgroupMark that have become empty.
func (c cgroup) removeParents() {
	for name := filepath.Dir(c.name); name != "." && strings.HasPrefix(filepath.Base(name), cgroupMark); name = filepath.Dir(name) {
		for _, dir := range (cgroup{name: name, h: c.h}).dirs() {
			_ = unix.Rmdir(dir) // fails if the parent has other children
		}
	}
}

// kill sends SIGKILL to everything in the group.
func (c cgroup) kill() error {
	if c.h.v2 != "" {
		err := os.WriteFile(filepath.Join(c.h.v2, c.name, "cgroup.kill"), []byte("1"), 0)
		if err == nil {
			return nil
		}
	}
	freezer, ok := c.h.v1["freezer"]
	dir := filepath.Join(freezer, c.name)
	if !ok {
		return c.killEach(filepath.Join(c.h.v2, c.name, "cgroup.procs"))
	}
	// No process forks or exits while it is frozen, so the list is complete and
	// no pid in it passes to another process.
	state := filepath.Join(dir, "freezer.state")
	if err := os.WriteFile(state, []byte("FROZEN"), 0); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	err := c.killEach(filepath.Join(dir, "cgroup.procs"))
	return errors.Join(err, os.WriteFile(state, []byte("THAWED"), 0))
}

func (c cgroup) killEach(procs string) error {
	list, err := os.ReadFile(procs)
	if err != nil {
		return nil // gone
	}
	var errs []error
	for _, field := range strings.Fields(string(list)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid == os.Getpid() {
			continue // a thread of this agent that is about to end
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone
		}
		if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
		}
		unix.Close(pidfd)
	}
	return errors.Join(errs...)
}

// RemoveCgroup kills the processes in a cgroup and removes it, for a VM that ended
// while no agent ran. A cgroup that does not exist is no error.
func RemoveCgroup(ctx context.Context, name string) error {
	if name == "" {
		return nil
	}
	c, err := openCgroup(name)
	if err != nil {
		return err
	}
	return c.remove(ctx)
}

// oomKilled says whether the kernel has killed a process in a cgroup because the
// cgroup was out of memory. For a cgroup that cannot be read it is false.
func oomKilled(name string) bool {
	if name == "" {
		return false
	}
	c, err := openCgroup(name)
	if err != nil {
		return false
	}
	file := filepath.Join(c.h.v2, name, "memory.events")
	if dir := c.h.v1["memory"]; dir != "" {
		file = filepath.Join(dir, name, "memory.oom_control")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
