package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
)

// The files of a snapshot. The last one is written last and tells what the
// others are.
const (
	memoryName   = "mem"
	stateName    = "state"
	manifestName = "vm.json"
)

const (
	pageSize = 4096
	// copyChunk is how much memory is looked at between two looks at ctx.
	copyChunk = 1 << 20
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
	Accel  string `json:"accel"`
	VCPUs  int    `json:"vcpus"`
	MemMiB int    `json:"mem_mib"`
	// Disks has a letter for each: r for read-only, w else.
	Disks string `json:"disks"`
	// MAC of the network device, empty without one.
	MAC string `json:"mac"`
}

func shapeOf(s vmm.Spec, report vmm.Report) shape {
	sh := shape{Accel: report.Accel, VCPUs: s.VCPUs, MemMiB: s.MemMiB}
	for _, d := range s.Disks {
		if d.ReadOnly {
			sh.Disks += "r"
		} else {
			sh.Disks += "w"
		}
	}
	if s.NIC != nil {
		sh.MAC = strings.ToLower(s.NIC.MAC)
	}
	return sh
}

// manifest is a snapshot's last file.
type manifest struct {
	Version string `json:"qemu_version"`
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
	for _, name := range []string{memoryName, stateName, manifestName} {
		path := filepath.Join(dir, name)
		if there(path) {
			return errdefs.AlreadyExists.Errorf("the directory holds a %s", name)
		}
		steps.Push("remove "+name, func(context.Context) error { return remove(path) })
	}
	limit := callTimeout + perGiB*time.Duration(v.state.Shape.MemMiB)/1024
	// With the only connection in our hands nobody else resumes the VM.
	err = v.with(ctx, limit, func(m *monitor) error {
		status, err := m.status()
		if err != nil {
			return err
		}
		if !is(status, statusPaused) {
			return errdefs.WrongState.Errorf("vm is %s, not paused", status)
		}
		if err := m.saveDevicesTo(filepath.Join(dir, stateName)); err != nil {
			return err
		}
		return v.copyMemory(m.ctx, filepath.Join(dir, memoryName))
	})
	if exit, ok := v.process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("its VMM %s", exit)
	}
	if err != nil {
		return err
	}
	state, err := os.Open(filepath.Join(dir, stateName))
	if err != nil {
		return err
	}
	defer state.Close()
	h := sha256.New() // QEMU decides how long it is
	size, err := io.Copy(h, state)
	if err != nil {
		return err
	}
	if err := vmm.SaveJSON(filepath.Join(dir, manifestName), manifest{
		Version:     v.version,
		Shape:       v.state.Shape,
		MemoryBytes: int64(v.state.Shape.MemMiB) << 20,
		StateBytes:  size,
		StateSHA256: hex.EncodeToString(h.Sum(nil)),
	}); err != nil {
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
		if _, full := f.Write(make([]byte, copyChunk)); errdefs.IsDiskFull(full) {
			return errdefs.DiskFull(full)
		}
		return err
	}
	return nil
}

// copyMemory writes the guest's memory, which must not change, to a sparse
// file. It is read from outside of QEMU, so QEMU neither sees nor slows it.
func (v *vm) copyMemory(ctx context.Context, path string) (err error) {
	ram, err := findRAM(v.process.Ref().PID, int64(v.state.Shape.MemMiB)<<20)
	if err != nil {
		return fmt.Errorf("find guest memory: %w", err)
	}
	defer ram.file.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()

	// Where the file system can, the file is cloned and no byte copied.
	if ram.shared || unix.IoctlFileClone(int(out.Fd()), int(ram.file.Fd())) != nil {
		if err := out.Truncate(ram.size); err != nil {
			return err
		}
		if err := copyData(ctx, out, ram.file, ram.size); err != nil {
			return fmt.Errorf("copy guest memory: %w", err)
		}
	}
	if !ram.shared {
		if err := ram.copyWritten(ctx, out); err != nil {
			return fmt.Errorf("copy guest memory: %w", err)
		}
	}
	return nil
}

// ram is the guest's memory as QEMU has mapped it.
type ram struct {
	pid    int
	size   int64
	shared bool
	file   *os.File // what is mapped
	areas  []area
}

// area is one mapping of a part of the file.
type area struct{ start, end, offset int64 }

// findRAM looks for the one file of that size that a QEMU has mapped.
func findRAM(pid int, size int64) (*ram, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		// Stat first: opening a device or a pipe might have an effect.
		info, err := os.Stat(fd)
		if err != nil || !info.Mode().IsRegular() || info.Size() != size {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(fd, &st); err != nil {
			continue
		}
		areas, shared := areasOf(string(maps), st.Ino)
		if areas == nil || total(areas) != size {
			continue // a disk that happens to be as large
		}
		f, err := os.Open(fd)
		if err != nil {
			return nil, err
		}
		return &ram{pid: pid, size: size, shared: shared, file: f, areas: areas}, nil
	}
	return nil, errors.New("no mapping of its size")
}

// areasOf finds the mappings of an inode in a /proc/PID/maps.
func areasOf(maps string, inode uint64) (areas []area, shared bool) {
	for line := range strings.Lines(maps) {
		var a area
		var perms, device string
		var ino uint64
		n, _ := fmt.Sscanf(line, "%x-%x %s %x %s %d", &a.start, &a.end, &perms, &a.offset, &device, &ino)
		if n == 6 && ino == inode && strings.HasPrefix(perms, "rw") {
			areas = append(areas, a)
			shared = strings.HasSuffix(perms, "s")
		}
	}
	return areas, shared
}

func total(areas []area) (n int64) {
	for _, a := range areas {
		n += a.end - a.start
	}
	return n
}

// copyWritten copies the pages that a private mapping no longer shares with
// its file.
func (r *ram) copyWritten(ctx context.Context, out *os.File) error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", r.pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", r.pid))
	if err != nil {
		return err
	}
	defer pagemap.Close()

	const pages = copyChunk / pageSize
	entries := make([]byte, pages*8)
	buf := make([]byte, copyChunk)
	for _, a := range r.areas {
		for at := a.start; at < a.end; at += copyChunk {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			n := min(pages, (a.end-at)/pageSize)
			if _, err := pagemap.ReadAt(entries[:n*8], at/pageSize*8); err != nil {
				return err
			}
			for i := int64(0); i < n; {
				run := i
				for run < n && written(binary.NativeEndian.Uint64(entries[run*8:])) {
					run++
				}
				if run == i {
					i++
					continue
				}
				part := buf[:(run-i)*pageSize]
				from := at + i*pageSize
				if _, err := mem.ReadAt(part, from); err != nil {
					return err
				}
				if _, err := out.WriteAt(part, a.offset+from-a.start); err != nil {
					return err
				}
				i = run
			}
		}
	}
	return nil
}

// written reports whether a pagemap entry of a private file mapping means a
// page of the process's own: in memory or in swap, and not the file's.
func written(entry uint64) bool {
	const filePage, swapped, present = 1 << 61, 1 << 62, 1 << 63
	return entry&swapped != 0 || entry&present != 0 && entry&filePage == 0
}

// copyData copies what is not zero of a sparse file into an empty one.
func copyData(ctx context.Context, out, in *os.File, size int64) error {
	buf := make([]byte, copyChunk)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // a hole up to the end
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = data; at < hole; {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			part := buf[:min(copyChunk, hole-at)]
			if _, err := io.ReadFull(io.NewSectionReader(in, at, int64(len(part))), part); err != nil {
				return err
			}
			if err := writeSparse(out, part, at); err != nil {
				return err
			}
			at += int64(len(part))
		}
	}
	return nil
}

var zeroPage [pageSize]byte

// writeSparse writes those pages of part that are not all zero.
func writeSparse(out *os.File, part []byte, at int64) error {
	zero := func(i int) bool {
		page := part[i:min(i+pageSize, len(part))]
		return bytes.Equal(page, zeroPage[:len(page)])
	}
	for i := 0; i < len(part); {
		if zero(i) {
			i += pageSize
			continue
		}
		end := i
		for end < len(part) && !zero(end) {
			end = min(end+pageSize, len(part))
		}
		if _, err := out.WriteAt(part[i:end], at+int64(i)); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// snapshot is one that is opened to be restored.
type snapshot struct {
	dir   string
	state *os.File
}

func (s *snapshot) memory() string { return filepath.Join(s.dir, memoryName) }

// openSnapshot opens a snapshot and checks that it is whole and fits.
func openSnapshot(dir string, version string, want shape) (*snapshot, error) {
	corrupt := errdefs.Corrupt.Errorf
	var m manifest
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, corrupt("snapshot is incomplete: it has no %s", manifestName)
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, corrupt("snapshot's %s: %w", manifestName, err)
	}
	if m.Version != version {
		was := "qemu " + m.Version
		if m.Version == "" {
			was = "another VMM"
		}
		return nil, errdefs.Unsupported.Errorf("snapshot is of %s, here is qemu %s", was, version)
	}
	if m.Shape != want {
		return nil, errdefs.InvalidArgument.Errorf("snapshot is of a vm with %+v, not %+v", m.Shape, want)
	}
	if info, err := os.Stat(filepath.Join(dir, memoryName)); err != nil || info.Size() != m.MemoryBytes {
		return nil, corrupt("snapshot's memory is not %d bytes long", m.MemoryBytes)
	}
	state, err := os.Open(filepath.Join(dir, stateName))
	if err != nil {
		return nil, corrupt("snapshot has no device state")
	}
	h := sha256.New()
	n, err := io.Copy(h, state)
	if err == nil && (n != m.StateBytes || hex.EncodeToString(h.Sum(nil)) != m.StateSHA256) {
		err = corrupt("snapshot's device state is not what was written")
	}
	if err == nil {
		_, err = state.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, state.Close())
	}
	return &snapshot{dir: dir, state: state}, nil
}

// Restore implements vmm.Restorer.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	report, err := d.Check(ctx)
	if err != nil {
		return nil, err
	}
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	from, err := openSnapshot(dir, report.Version, shapeOf(spec, report))
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	defer from.state.Close()
	v, err := d.launch(ctx, spec, report, from)
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
	// The arguments are the machine; what differs from one VM to the next
	// without the guest seeing it is left out.
	spec.ID, spec.RunDir, spec.NetNS, spec.Console, spec.Cgroup = "", "", "", "", ""
	spec.Kernel, spec.Initrd, spec.Cmdline = "", "", ""
	spec.UID, spec.GID, spec.Limits = 0, 0, vmm.Limits{}
	disks := make([]vmm.Disk, len(spec.Disks))
	for i, disk := range spec.Disks {
		disks[i].ReadOnly = disk.ReadOnly
	}
	spec.Disks = disks
	args := argv(machine{version: report.Version, accel: report.Accel, spec: spec})
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
