package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// The files of a snapshot. The last one is written last and tells what the
// others are.
const (
	memoryName   = "mem"
	stateName    = "state"
	manifestName = "vm.json"
)

var (
	_ vmm.Restorer    = (*Driver)(nil)
	_ vmm.Snapshotter = (*vm)(nil)
)

// shape is what a VM and one restored from its snapshot have in common.
type shape struct {
	VCPUs  int `json:"vcpus"`
	MemMiB int `json:"mem_mib"`
	// Disks has a letter for each: r for read-only, w else.
	Disks string `json:"disks"`
	// MAC of the network device, empty without one.
	MAC string `json:"mac"`
	// Tap is the host's end of it.
	Tap string `json:"tap"`
}

func shapeOf(s vmm.Spec) shape {
	sh := shape{VCPUs: s.VCPUs, MemMiB: s.MemMiB}
	for _, d := range s.Disks {
		if d.ReadOnly {
			sh.Disks += "r"
		} else {
			sh.Disks += "w"
		}
	}
	if s.NIC != nil {
		sh.MAC, sh.Tap = strings.ToLower(s.NIC.MAC), s.NIC.Tap
	}
	return sh
}

// manifest is a snapshot's last file.
type manifest struct {
	Version string `json:"firecracker_version"`
	Shape   shape  `json:"shape"`
	// Sizes in bytes. The state's digest is checked too; the memory is too
	// large for that on the way to a guest that is to answer in milliseconds.
	MemoryBytes int64  `json:"memory_bytes"`
	StateBytes  int64  `json:"state_bytes"`
	StateSHA256 string `json:"state_sha256"`
}

// Snapshot implements vmm.Snapshotter.
func (v *vm) Snapshot(ctx context.Context, dir string) (err error) {
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("snapshot vm: %w", vmm.Cancelled(ctx, err)), steps.Unwind(ctx))
		}
	}()
	select {
	case v.writing <- struct{}{}:
		defer func() { <-v.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for _, name := range []string{memoryName, stateName, manifestName} {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err == nil {
			return errdefs.AlreadyExists.Errorf("the directory holds a %s", name)
		}
		steps.Push("remove "+name, func(context.Context) error { return remove(path) })
	}
	// The VMM writes into a directory below, and keeps access to it if it is
	// bad: what has been moved out of there has a name that it cannot change.
	scratch, err := os.MkdirTemp(dir, ".vmm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	err = v.write(ctx, scratch)
	if exit, ok := v.process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("its VMM %s", exit)
	}
	if err != nil {
		return err
	}
	for _, name := range []string{memoryName, stateName} {
		if err := os.Rename(filepath.Join(scratch, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	m := manifest{Version: v.version, Shape: v.state.Shape, MemoryBytes: int64(v.state.Shape.MemMiB) << 20}
	if !isMemory(filepath.Join(dir, memoryName), m.MemoryBytes) {
		return fmt.Errorf("firecracker wrote no memory of %d bytes", m.MemoryBytes)
	}
	if m.StateBytes, m.StateSHA256, err = digest(filepath.Join(dir, stateName)); err != nil {
		return err
	}
	for _, name := range []string{memoryName, stateName} {
		if err := os.Chmod(filepath.Join(dir, name), 0o600); err != nil {
			return err
		}
	}
	if err := vmm.SaveJSON(filepath.Join(dir, manifestName), m); err != nil {
		return err
	}
	steps.Keep()
	return nil
}

// write lets Firecracker write memory and state. The directory is one that it
// cannot see, so it is shown to it for as long as that takes; what the VMM makes
// there is root's on disk.
func (v *vm) write(ctx context.Context, dir string) (err error) {
	now, err := v.api.describe(ctx, callTimeout)
	if err != nil {
		return err
	}
	if now.State != statePaused {
		return errdefs.WrongState.Errorf("vm is %s, not paused", strings.ToLower(now.State))
	}
	if err := v.process.Mount(launch.Mount{Source: dir, Target: snapshotPath, UID: v.state.UID, GID: v.state.GID}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.process.Unmount(snapshotPath)) }()
	err = v.api.call(ctx, moveLimit(v.state.Shape.MemMiB), create(), nil)
	var said *fault
	if errors.As(err, &said) && (strings.Contains(said.Message, "os error 28)") || strings.Contains(said.Message, "os error 122)")) {
		return errdefs.Exhausted.Errorf("the host's disk is full") // ENOSPC, EDQUOT
	}
	return err
}

// isMemory reports whether a file of that size is there, and no link to one.
func isMemory(path string, size int64) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular() && info.Size() == size
}

// digest reads a file that a VMM wrote; a link is none.
func digest(path string) (size int64, sum string, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, "", err
	}
	if !info.Mode().IsRegular() {
		return 0, "", fmt.Errorf("%s is no file", filepath.Base(path))
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return size, hex.EncodeToString(h.Sum(nil)), err
}

// fits checks that a snapshot is whole and of such a VM.
func fits(dir, version string, want shape) error {
	corrupt := errdefs.Corrupt.Errorf
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return corrupt("snapshot is incomplete: it has no %s", manifestName)
	}
	if err != nil {
		return err
	}
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return corrupt("snapshot's %s: %w", manifestName, err)
	}
	if m.Version != version {
		was := "firecracker " + m.Version
		if m.Version == "" {
			was = "another VMM"
		}
		return errdefs.Unsupported.Errorf("snapshot is of %s, here is firecracker %s", was, version)
	}
	if since(version, overridesMajor, overridesMinor) {
		m.Shape.Tap = want.Tap
	}
	if m.Shape != want {
		return errdefs.InvalidArgument.Errorf("snapshot is of a vm with %+v, not %+v", m.Shape, want)
	}
	if !isMemory(filepath.Join(dir, memoryName), m.MemoryBytes) {
		return corrupt("snapshot's memory is not %d bytes long", m.MemoryBytes)
	}
	size, sum, err := digest(filepath.Join(dir, stateName))
	if errors.Is(err, os.ErrNotExist) {
		return corrupt("snapshot has no device state")
	}
	if err == nil && (size != m.StateBytes || sum != m.StateSHA256) {
		err = corrupt("snapshot's device state is not what was written")
	}
	return err
}

// Restore implements vmm.Restorer.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	f, err := d.check(ctx)
	if err != nil {
		return nil, err
	}
	if err := validate(spec); err != nil {
		return nil, err
	}
	if err := fits(dir, f.bin.version, shapeOf(spec)); err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	v, err := d.launch(ctx, spec, f.bin, dir)
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	return v, nil
}

// SnapshotKey implements vmm.Restorer.
func (d *Driver) SnapshotKey(ctx context.Context, spec vmm.Spec) (string, error) {
	f, err := d.check(ctx)
	if err != nil {
		return "", err
	}
	cpu, err := kvm.HostCPU()
	if err != nil {
		return "", err
	}
	// The calls are the machine. What the kernel is and is told, the guest may
	// change without the machine noticing.
	spec.Kernel, spec.Initrd, spec.Cmdline = "", "", ""
	spec.Limits = vmm.Limits{}
	if spec.NIC != nil && since(f.bin.version, overridesMajor, overridesMinor) {
		spec.NIC = &vmm.NIC{MAC: strings.ToLower(spec.NIC.MAC)}
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00%s\x00", Name, f.bin.version, cpu)
	for _, r := range configure(spec) {
		body, err := r.encode()
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %s %s\x00", r.method, r.path, body)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
