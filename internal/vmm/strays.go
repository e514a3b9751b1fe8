package vmm

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

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// runDirEnv is in the environment of every program that Launch starts with a
// run directory, and so in that of its children. It shows whose a process is
// when no record does.
const runDirEnv = "WRENN_RUN_DIR"

// KillStrays ends the processes that were launched with a run directory
// directly under runRoot whose name keep refuses, removes the cgroups of such
// names below the cgroup parent, and returns the names. It is for VMs that no
// handle leads to: their agent died before it could write one down, or they do
// not answer. What does not carry our mark is never touched.
func KillStrays(ctx context.Context, runRoot, parent string, keep func(name string) bool) ([]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	gone := map[string]bool{}
	var errs []error
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		name, ok := runDirOf(pid, runRoot)
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

// runDirOf returns the name of the run directory under root that a process was
// launched with.
func runDirOf(pid int, root string) (string, bool) {
	root = filepath.Clean(root)
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", false // gone, or a kernel thread
	}
	for kv := range bytes.SplitSeq(environ, []byte{0}) {
		if dir, ok := strings.CutPrefix(string(kv), runDirEnv+"="); ok {
			return filepath.Base(dir), filepath.Dir(dir) == root
		}
	}
	// There are programs that give the VMM an empty environment. Its log, in
	// that directory, is then still its standard error: opened by us, so that
	// the path is the host's whatever its root is.
	log, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", pid))
	if err != nil {
		return "", false
	}
	log = strings.TrimSuffix(strings.TrimSuffix(log, " (deleted)"), pipeSuffix)
	if filepath.Base(log) != LogName {
		return "", false
	}
	dir := filepath.Dir(log)
	return filepath.Base(dir), filepath.Dir(dir) == root
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
	// Looked at again now that the pid cannot pass to another process.
	if again, ok := runDirOf(pid, root); !ok || again != name {
		p.Release()
		return nil
	}
	return p.Kill(ctx)
}
