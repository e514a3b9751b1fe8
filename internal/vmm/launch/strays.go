package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// runDirEnv is in the environment of every program that Start starts with a run
// directory, and in that of the program's children. It tells which sandbox a process
// belongs to when no record does.
const runDirEnv = "WRENN_RUN_DIR"

// KillStrays kills the processes that were started with a run directory directly
// under runRoot whose name keep refuses, removes the cgroups with such names below
// the cgroup parent, and returns the names. It is for VMs that no handle leads to,
// because their agent died before it saved one or because they do not answer. It
// never touches a process without the mark of Start.
func KillStrays(ctx context.Context, runRoot, parent string, keep func(name string) bool) ([]string, error) {
	pids, err := processes()
	if err != nil {
		return nil, err
	}
	gone := map[string]bool{}
	var errs []error
	for _, pid := range pids {
		name, ok, err := runDirOf(pid, runRoot)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !ok || keep(name) {
			continue
		}
		if err := killStray(ctx, pid, runRoot, name); err != nil {
			errs = append(errs, err)
			continue
		}
		gone[name] = true
	}
	group, err := openCgroup(parent)
	if err != nil {
		return nil, err
	}
	for _, dir := range group.dirs() {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("list cgroups: %w", err))
		}
		for _, e := range entries {
			if !e.IsDir() || keep(e.Name()) {
				continue
			}
			if err := RemoveCgroup(ctx, parent+"/"+e.Name()); err != nil {
				errs = append(errs, err)
				continue
			}
			gone[e.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(gone)), errors.Join(errs...)
}

// processes returns the pids of all processes of this host.
func processes() (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// NetNSOf returns the one of these paths whose network namespace a process with the
// run directory runRoot/name is in. It is empty if there is no such process, or if
// the process is in none of them. After an error it is not known.
func NetNSOf(runRoot, name string, paths []string) (string, error) {
	pids, err := processes()
	if err != nil {
		return "", err
	}
	for _, pid := range pids {
		of, ok, err := runDirOf(pid, runRoot)
		if err != nil {
			return "", err
		}
		if !ok || of != name {
			continue
		}
		in, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the process has ended
		}
		if err != nil {
			return "", fmt.Errorf("look at the network namespace of process %d: %w", pid, err)
		}
		for _, path := range paths {
			if at, err := os.Stat(path); err == nil && os.SameFile(at, in) {
				return path, nil
			}
		}
	}
	return "", nil
}

// runDirOf returns the name of the run directory under root that a process was
// started with. After an error it is not known.
func runDirOf(pid int, root string) (name string, ok bool, err error) {
	root = filepath.Clean(root)
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if overloaded(err) {
		return "", false, fmt.Errorf("look at process %d: %w", pid, err)
	}
	for kv := range bytes.SplitSeq(environ, []byte{0}) {
		if dir, ok := strings.CutPrefix(string(kv), runDirEnv+"="); ok {
			return filepath.Base(dir), filepath.Dir(dir) == root, nil
		}
	}
	// The jailer empties the VMM's environment. The VMM's standard error is still
	// its log in the run directory; the agent opened it, so its path is the host's
	// whatever the VMM's root is.
	log, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", pid))
	if overloaded(err) {
		return "", false, fmt.Errorf("look at process %d: %w", pid, err)
	}
	if err != nil {
		return "", false, nil // it has ended, or is a kernel thread
	}
	log = strings.TrimSuffix(strings.TrimSuffix(log, " (deleted)"), pipeSuffix)
	if filepath.Base(log) != LogName {
		return "", false, nil
	}
	dir := filepath.Dir(log)
	return filepath.Base(dir), filepath.Dir(dir) == root, nil
}

// overloaded says whether err comes of a lack of descriptors or memory, and so tells
// nothing about the process that was looked at.
func overloaded(err error) bool {
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func killStray(ctx context.Context, pid int, root, name string) error {
	id, err := identify(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := Adopt(ctx, id)
	if errors.Is(err, errdefs.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	// Read it again now that the pid cannot pass to another process.
	again, ok, err := runDirOf(pid, root)
	if err != nil || !ok || again != name {
		p.Release()
		return err
	}
	return p.Kill(ctx)
}
