package gvisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

const (
	// perGiB is added to the time limit of a snapshot, and of loading one, for each GiB
	// of memory and disk; a slow disk takes that long.
	perGiB = 60 * time.Second
	// pagesName is a file of a snapshot beside those of every driver: it says where in
	// the memory, and in the overlay, the pages in snapfile.MemoryName are.
	pagesName = "pages"
)

var (
	_ vmm.Restorer    = (*Driver)(nil)
	_ vmm.Snapshotter = (*vm)(nil)
)

// shape is what a VM and one restored from its snapshot have in common.
type shape struct {
	// Sentry is the digest of the program: a snapshot fits no other.
	Sentry string `json:"sentry"`
	CPU    string `json:"cpu"`
	VCPUs  int    `json:"vcpus"`
	MemMiB int    `json:"mem_mib"`
	// Root has a letter for each part: i for init, r for the read-only layer, w for the
	// overlay.
	Root string `json:"root"`
	// MAC of the network device, empty without one.
	MAC string `json:"mac"`
	// DiskBytes bounds the overlay, which has no contents of its own: what the guest
	// wrote is in the snapshot.
	DiskBytes int64 `json:"disk_bytes"`
	// PagesBytes and PagesSHA256 describe the file pagesName.
	PagesBytes  int64  `json:"pages_bytes,omitempty"`
	PagesSHA256 string `json:"pages_sha256,omitempty"`
}

func shapeOf(m machine, f facts) shape {
	s := shape{Sentry: f.digest, CPU: f.cpu, VCPUs: m.spec.VCPUs, MemMiB: m.spec.MemMiB, Root: "i", DiskBytes: m.diskBytes}
	if m.layer() != "" {
		s.Root += "r"
	}
	if m.spec.Root.Overlay != "" {
		s.Root += "w"
	}
	if m.spec.Link != nil {
		s.MAC = strings.ToLower(m.spec.Link.MAC)
	}
	return s
}

// forget makes equal what may differ between a VM and the snapshot that it is restored
// from, the size of the disk, and what is compared by itself.
func forget(s *shape) {
	s.Sentry, s.CPU, s.DiskBytes, s.PagesBytes, s.PagesSHA256 = "", "", 0, 0, ""
}

// names are the files of a snapshot. The manifest is the last.
func names() []string {
	return []string{snapfile.StateName, pagesName, snapfile.MemoryName, snapfile.ManifestName}
}

// limit is the time that a call may take which writes or reads a snapshot.
func (v *vm) limit() time.Duration {
	return callTimeout + perGiB*time.Duration((int64(v.state.Shape.MemMiB)<<20+v.state.Shape.DiskBytes)>>30)
}

// Snapshot implements vmm.Snapshotter.
func (v *vm) Snapshot(ctx context.Context, dir string) (err error) {
	var steps undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("snapshot vm: %w", vmm.Cancelled(ctx, err)), steps.Unwind(ctx))
		}
	}()
	for _, name := range names() {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err == nil {
			return errdefs.AlreadyExists.Errorf("the directory holds a %s", name)
		}
		steps.Push("remove "+name, func(context.Context) error { return remove(path) })
	}
	err = v.alone(ctx, func() error {
		c, err := v.known(ctx)
		switch {
		case err != nil:
			return err
		case c == created:
			return v.copyFrom(ctx, dir)
		case c != paused:
			return errdefs.WrongState.Errorf("vm is running, not paused")
		}
		return v.checkpoint(ctx, dir)
	})
	if exit, ok := v.Process.EndedBy(err); ok {
		return errdefs.Unavailable.Errorf("its VMM %s", exit)
	}
	if err != nil {
		return err
	}
	steps.Keep()
	return nil
}

// copyFrom copies the snapshot that a VM begins with, and that it has not loaded yet.
func (v *vm) copyFrom(ctx context.Context, dir string) error {
	for _, name := range names() {
		if err := snapfile.Copy(ctx, filepath.Join(dir, name), filepath.Join(v.state.From, name)); err != nil {
			return err
		}
	}
	return nil
}

// checkpoint has the sentry write its snapshot. The guest stays paused.
func (v *vm) checkpoint(ctx context.Context, dir string) error {
	var files []*os.File
	defer func() { closeAll(files) }()
	for _, name := range names()[:3] {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	opts := saveOpts{HavePagesFile: true, AppMFExcludeCommittedZeroPages: true, Resume: true}
	if err := v.call(ctx, v.limit(), methodCheckpoint, opts, nil, files...); err != nil {
		if text, ok := said(err); ok {
			return v.refused(text, files[0])
		}
		return err
	}
	of := v.state.Shape
	state, err := snapfile.StateFile(dir)
	if err == nil {
		of.PagesBytes, of.PagesSHA256, err = pagesOf(dir)
	}
	if err != nil {
		return err
	}
	memory, err := files[2].Stat()
	if err != nil {
		return err
	}
	// The memory has no digest yet: the VM need not stand still for it.
	m := snapfile.Manifest[shape]{Driver: Name, Version: v.Version, Shape: of, Memory: snapfile.File{Size: memory.Size()}, State: state}
	return m.Write(dir)
}

// refused is the error of a checkpoint that the sentry could not write. It says that it
// could not, and not always why: a write to the file tells.
func (v *vm) refused(text string, f *os.File) error {
	if _, full := f.WriteAt(make([]byte, snapfile.PieceBytes), 0); errdefs.IsDiskFull(full) {
		return errdefs.DiskFull(full)
	}
	return fmt.Errorf("the sentry wrote none: %s", text)
}

// pagesOf returns size and digest of the file that says where the pages are.
func pagesOf(dir string) (int64, string, error) {
	data, err := os.ReadFile(filepath.Join(dir, pagesName))
	sum := sha256.Sum256(data)
	return int64(len(data)), hex.EncodeToString(sum[:]), err
}

// Restore implements vmm.Restorer. The sentry loads the snapshot at the first Resume,
// because it comes to life with that.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, dir string) (vmm.VM, error) {
	f, err := d.check(ctx)
	if err != nil {
		return nil, err
	}
	if err := validate(spec); err != nil {
		return nil, err
	}
	m := machine{spec: spec}
	if m.diskBytes, err = fits(dir, f, m); err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	v, err := d.launch(ctx, m, f, dir, func(*vm) error { return nil })
	if err != nil {
		return nil, fmt.Errorf("restore vm: %w", err)
	}
	return v, nil
}

// fits checks that a snapshot is complete and of such a machine, and returns the size
// of its disk.
func fits(dir string, f facts, m machine) (diskBytes int64, err error) {
	was, err := snapfile.Shape[shape](dir)
	if err != nil {
		return 0, err
	}
	state, err := snapfile.Open(dir, Name, f.report.Version, shapeOf(m, f), forget)
	if err != nil {
		return 0, err
	}
	if err := state.Close(); err != nil {
		return 0, err
	}
	switch {
	case was.Sentry != f.digest:
		return 0, errdefs.Unsupported.Errorf("snapshot is of another build of gVisor's sentry")
	case was.CPU != f.cpu:
		return 0, errdefs.Unsupported.Errorf("snapshot is of a host with another CPU")
	case !snapfile.IsFile(filepath.Join(dir, pagesName), was.PagesBytes):
		return 0, errdefs.Corrupt.Errorf("snapshot's %s is not %d bytes long", pagesName, was.PagesBytes)
	}
	if _, sum, err := pagesOf(dir); err != nil || sum != was.PagesSHA256 {
		return 0, errors.Join(err, errdefs.Corrupt.Errorf("snapshot's %s is not what was written", pagesName))
	}
	return was.DiskBytes, nil
}

// load brings a restored guest to life. It is called alone.
func (v *vm) load(ctx context.Context) error {
	var files []*os.File
	defer func() { closeAll(files) }()
	for _, name := range names()[:3] {
		f, err := os.Open(filepath.Join(v.state.From, name))
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	if err := v.write(loading); err != nil {
		return err
	}
	err := v.call(ctx, v.limit(), methodRestore, restoreOpts{HavePagesFile: true}, nil, files...)
	if text, ok := said(err); ok {
		// What has begun to load cannot be loaded again.
		return errors.Join(errdefs.Corrupt.Errorf("its snapshot does not load"), errors.New(text), v.Fail())
	}
	if err != nil {
		return err
	}
	return v.write(running)
}

// SnapshotKey implements vmm.Restorer.
func (d *Driver) SnapshotKey(ctx context.Context, spec vmm.Spec) (string, error) {
	f, err := d.check(ctx)
	if err != nil {
		return "", err
	}
	m := machine{spec: spec.Machine()}
	// The arguments describe the machine.
	args := append(argv(m, ""), Name, f.report.Version, fmt.Sprintf("%+v", shapeOf(m, f)))
	sum := sha256.Sum256([]byte(strings.Join(args, "\x00")))
	return hex.EncodeToString(sum[:]), nil
}
