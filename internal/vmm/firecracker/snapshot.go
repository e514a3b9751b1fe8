package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
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
	for _, d := range s.Root.Disks() {
		if d.ReadOnly {
			sh.Disks += "r"
		} else {
			sh.Disks += "w"
		}
	}
	if s.Link != nil {
		sh.MAC, sh.Tap = strings.ToLower(s.Link.MAC), s.Link.Name
	}
	return sh
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
	for _, name := range snapfile.Names() {
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
	if exit, ok := v.Process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("its VMM %s", exit)
	}
	if err != nil {
		return err
	}
	for _, name := range []string{snapfile.MemoryName, snapfile.StateName} {
		if err := os.Rename(filepath.Join(scratch, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	size := int64(v.state.Shape.MemMiB) << 20
	if !snapfile.IsFile(filepath.Join(dir, snapfile.MemoryName), size) {
		return fmt.Errorf("firecracker wrote no memory of %d bytes", size)
	}
	state, err := snapfile.StateFile(dir)
	if err != nil {
		return err
	}
	for _, name := range []string{snapfile.MemoryName, snapfile.StateName} {
		if err := os.Chmod(filepath.Join(dir, name), 0o600); err != nil {
			return err
		}
	}
	// The memory has no digest yet: the VM need not stand still for it.
	m := snapfile.Manifest[shape]{Driver: Name, Version: v.Version, Shape: v.state.Shape, Memory: snapfile.File{Size: size}, State: state}
	if err := m.Write(dir); err != nil {
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
	if err := v.Process.Mount(launch.Mount{Source: dir, Target: snapshotPath, UID: v.state.UID, GID: v.state.GID}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Process.Unmount(snapshotPath)) }()
	err = v.api.call(ctx, moveLimit(v.state.Shape.MemMiB), create(), nil)
	var said *fault
	if errors.As(err, &said) && (strings.Contains(said.Message, "os error 28)") || strings.Contains(said.Message, "os error 122)")) {
		return errdefs.Exhausted.Errorf("the host's disk is full") // ENOSPC, EDQUOT
	}
	return err
}

// fits checks that a snapshot is complete and of such a VM.
func fits(dir, version string, want shape) error {
	var forget func(*shape)
	if launch.AtLeast(version, overridesMajor, overridesMinor) {
		forget = func(s *shape) { s.Tap = "" }
	}
	state, err := snapfile.Open(dir, Name, version, want, forget)
	if err != nil {
		return err
	}
	return state.Close()
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
	// The calls describe the machine.
	spec = spec.Machine()
	if spec.Link != nil && launch.AtLeast(f.bin.version, overridesMajor, overridesMinor) {
		spec.Link.Name = "" // a restored VM may have another
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
