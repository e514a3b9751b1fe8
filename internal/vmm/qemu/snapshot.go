package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

const (
	// perGiB is added to the time limit of a snapshot for each GiB of memory;
	// a slow disk takes that long.
	perGiB = 60 * time.Second
	// fdSet is the set of the one descriptor that a snapshot passes to QEMU.
	fdSet = 1
)

var (
	_ vmm.Restorer    = (*Driver)(nil)
	_ vmm.Snapshotter = (*vm)(nil)
	_ vmm.Staller     = (*vm)(nil)
)

// shape is what a VM and one restored from its snapshot have in common: the
// devices, as QEMU numbers them, and what is behind the guest's CPU.
type shape struct {
	Accel string `json:"accel"`
	// CPU is what shapeCPU says.
	CPU    string `json:"cpu,omitempty"`
	VCPUs  int    `json:"vcpus"`
	MemMiB int    `json:"mem_mib"`
	// Disks has a letter for each: r for read-only, w else.
	Disks string `json:"disks"`
	// MAC of the network device, empty without one.
	MAC string `json:"mac"`
}

func shapeOf(s vmm.Spec, report vmm.Report) shape {
	sh := shape{Accel: report.Accel, CPU: shapeCPU(report), VCPUs: s.VCPUs, MemMiB: s.MemMiB}
	for _, d := range s.Root.Disks() {
		if d.ReadOnly {
			sh.Disks += "r"
		} else {
			sh.Disks += "w"
		}
	}
	if s.Link != nil {
		sh.MAC = strings.ToLower(s.Link.MAC)
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
	for _, name := range snapfile.Names() {
		path := filepath.Join(dir, name)
		if there(path) {
			return errdefs.AlreadyExists.Errorf("the directory holds a %s", name)
		}
		steps.Push("remove "+name, func(context.Context) error { return remove(path) })
	}
	limit := callTimeout + perGiB*time.Duration(v.state.Shape.MemMiB)/1024
	var memory snapfile.File
	// As long as this connection is open, QEMU serves no other: the VM stays paused.
	err = v.with(ctx, limit, func(m *monitor) error {
		status, err := m.status()
		if err != nil {
			return err
		}
		if !is(status, statusPaused) {
			return errdefs.WrongState.Errorf("vm is %s, not paused", status)
		}
		// A save of the devices changes no memory: QEMU's own migration copies the
		// last of the memory before it saves them.
		copying, cancel := context.WithCancel(m.ctx)
		defer cancel()
		var copied error
		var wg sync.WaitGroup
		wg.Go(func() { memory, copied = v.copyMemory(copying, filepath.Join(dir, snapfile.MemoryName)) })
		if err = m.saveDevicesTo(filepath.Join(dir, snapfile.StateName)); err != nil {
			cancel()
		}
		wg.Wait()
		if err == nil {
			err = copied
		}
		return err
	})
	if exit, ok := v.Process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("its VMM %s", exit)
	}
	if err != nil {
		return err
	}
	state, err := snapfile.StateFile(dir) // QEMU decides how long it is
	if err != nil {
		return err
	}
	m := snapfile.Manifest[shape]{Driver: Name, Version: v.Version, Shape: v.state.Shape, Memory: memory, State: state}
	if err := m.Write(dir); err != nil {
		return err
	}
	steps.Keep()
	return nil
}

// saveDevicesTo writes the devices' state to a file. QEMU cannot open one in
// its empty directory, so it gets it opened.
func (m *monitor) saveDevicesTo(path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	inside, err := m.passFile(fdSet, f)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.dropFile(fdSet)) }()
	if err := m.saveDevices(inside); err != nil {
		// QEMU says that it could not write, and not why: the next write tells.
		if _, full := f.Write(make([]byte, snapfile.PieceBytes)); errdefs.IsDiskFull(full) {
			return errdefs.DiskFull(full)
		}
		return err
	}
	return nil
}

// copyMemory writes the guest's memory, which must not change, to a sparse file.
// It reads it from outside of QEMU, which has no part in it.
func (v *vm) copyMemory(ctx context.Context, path string) (file snapfile.File, err error) {
	ram, err := findRAM(v.Process.Ref().PID, int64(v.state.Shape.MemMiB)<<20)
	if err != nil {
		return file, fmt.Errorf("find guest memory: %w", err)
	}
	defer ram.file.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return file, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if file, err = ram.copyTo(ctx, out); err != nil {
		return file, fmt.Errorf("copy guest memory: %w", err)
	}
	return file, nil
}

// snapshot is one that is opened to be restored.
type snapshot struct {
	dir   string
	state *os.File
}

func (s *snapshot) memory() string { return filepath.Join(s.dir, snapfile.MemoryName) }

// Restore implements vmm.Restorer.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	report, err := d.Check(ctx)
	if err != nil {
		return nil, err
	}
	if err := spec.Validate(needs); err != nil {
		return nil, err
	}
	was, err := snapfile.Shape[shape](dir)
	if err == nil {
		report, err = withCPUOf(report, was)
	}
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	state, err := snapfile.Open(dir, Name, report.Version, shapeOf(spec, report), nil)
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	defer state.Close()
	v, err := d.launch(ctx, spec, report, &snapshot{dir, state})
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	return v, nil
}

// SnapshotKey implements vmm.Restorer.
func (d *Driver) SnapshotKey(ctx context.Context, spec vmm.Spec) (string, error) {
	report, err := d.Check(ctx)
	if err != nil {
		return "", err
	}
	// The arguments describe the machine.
	args := argv(machine{version: report.Version, accel: report.Accel, cpu: model(report), spec: spec.Machine()})
	args = append(args, Name, report.Version, report.Accel)
	if report.Accel == "kvm" { // whose guests see the host's CPU
		cpu, err := kvm.HostCPU()
		if err != nil {
			return "", err
		}
		args = append(args, cpu)
	}
	digest := sha256.Sum256([]byte(strings.Join(args, "\x00")))
	return hex.EncodeToString(digest[:]), nil
}
