package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Isolation is what a create demands to stand between its guest and the host. The set is
// closed.
type Isolation string

const (
	AnyIsolation Isolation = ""
	// VMIsolation: the guest has a kernel of its own, in a machine.
	VMIsolation Isolation = "vm"
)

func (i Isolation) check() error {
	if i != AnyIsolation && i != VMIsolation {
		return fmt.Errorf("isolation is %.40q, must be vm or nothing", string(i))
	}
	return nil
}

// The hard limits of a VMM's cgroup besides its memory: what it may take beyond its
// vCPUs' time, so that a guest that breaks out of bounds ends, and no neighbour.
const (
	vmmCPUMilli = 250
	// maxVMMTasks is for a VMM whose tasks are few whatever its guest does. Of a flat one
	// each process of the guest is a process of the host, with a thread to stop it by.
	maxVMMTasks    = 256
	minFlatProcess = 1024
)

// tasks bounds the tasks of a driver's VMM for a guest with so much memory.
func tasks(needs vmm.Needs, memMiB int) int {
	if !needs.Flat {
		return maxVMMTasks
	}
	return maxVMMTasks + 2*max(minFlatProcess, 2*memMiB)
}

const _ = uint(vmm.MaxLayers - template.MaxLayers) // a machine has all layers of a template

// initName is the image of init beside the memory of a snapshot, and beside the disk of a
// sandbox: its guest reads programs from it for as long as it lives.
const initName = "init.erofs"

// spec is the VM of a record for a driver.
func (h *host) spec(d vmm.Driver, rec Record, tmpl template.Template) vmm.Spec {
	needs := d.Needs()
	spec := vmm.Spec{
		ID: string(rec.ID), RunDir: h.runDir(rec.ID), NetNS: h.cfg.Network.Plan().Addrs(rec.Slot).NetNSPath,
		VCPUs: rec.VCPUs, MemMiB: rec.MemMiB,
		Boot:    guestapi.Boot{Addr: network.GuestAddr, Gateway: network.GuestGateway, DNS: h.cfg.DNS, Hostname: bootName},
		Root:    vmm.Root{Layers: tmpl.Paths(), Overlay: h.store.overlay(rec.ID)},
		Link:    &vmm.Link{Kind: needs.Link, Name: network.Tap, MAC: network.GuestMAC},
		Console: h.store.console(rec.ID),
		UID:     h.cfg.BaseUID + int(rec.Slot), GID: h.cfg.BaseUID + int(rec.Slot),
		Cgroup: h.cgroups() + "/" + string(rec.ID),
		Limits: vmm.Limits{
			CPUMilli: rec.VCPUs*1000 + vmmCPUMilli,
			MemMiB:   rec.MemMiB + vmmOverheadMiB(rec.MemMiB),
			PIDs:     tasks(needs, rec.MemMiB),

			DiskBytes: h.cfg.DiskBytes, DiskOps: h.cfg.DiskOps,
		},
	}
	if needs.Kernel {
		spec.Kernel = vmm.Kernel{Image: tmpl.Kernel, Initrd: tmpl.Initrd}
	}
	if needs.Init {
		spec.Init = h.store.initImage(rec.ID)
	}
	if needs.Flat {
		spec.Root.Layers = []string{tmpl.EROFS.Path}
	}
	if needs.Link == vmm.Packet {
		spec.Link.Name = network.PacketEnd
	}
	return spec
}

// rootImage is Record.RootImage of a sandbox that a driver runs.
func rootImage(d vmm.Driver, tmpl template.Template) string {
	if !d.Needs().Flat {
		return ""
	}
	return tmpl.EROFS.SHA256
}

// imageKey is the part of a boot snapshot's key that the images are which its guest goes
// on reading.
func imageKey(d vmm.Driver, tmpl template.Template) []string {
	if !d.Needs().Flat {
		return nil
	}
	return []string{tmpl.EROFS.SHA256, tmpl.InitSHA256}
}

// drivers returns all drivers, those first that run new VMs.
func (h *host) drivers() []vmm.Driver { return slices.Concat(h.cfg.Drivers, h.cfg.Others) }

// named returns the driver of that name, nil if there is none.
func named(name string, drivers []vmm.Driver) vmm.Driver {
	i := slices.IndexFunc(drivers, func(d vmm.Driver) bool { return d.Name() == name })
	if i < 0 {
		return nil
	}
	return drivers[i]
}

// driverOf returns the driver of a record. One that names none, or one that this host does
// not have, gets the best that has such disks: it refuses a handle or memory of another.
func (h *host) driverOf(rec Record) vmm.Driver {
	if d := named(rec.vmm(), h.drivers()); d != nil {
		return d
	}
	for _, d := range h.cfg.Drivers {
		if d.Needs().Flat == rec.flat() {
			return d
		}
	}
	return h.cfg.Drivers[0]
}

// bootDriver returns the driver that boots the VM of a record: its own, or the best that
// boots such a disk if its own does not run here any more.
func (h *host) bootDriver(rec Record) vmm.Driver {
	if named(rec.vmm(), h.cfg.Drivers) == nil && !rec.flat() {
		rec.VMM, rec.VM = "", nil
	}
	return h.driverOf(rec)
}

// isolationOf returns what stands between the guests of a driver and the host, empty if
// that is not known.
func (v *vms) isolationOf(name string) vmm.Isolation {
	d := named(name, v.drivers())
	if d == nil {
		return ""
	}
	report, err := d.Check(v.life) // it has answered before
	if err != nil {
		return ""
	}
	return report.Isolation
}

// choose returns the name of the driver that runs a new sandbox: the one that the request
// names, or the first that can.
func (h *host) choose(ctx context.Context, req CreateRequest, can func(vmm.Driver) error) (string, error) {
	var refused error
	for _, d := range h.cfg.Drivers {
		if req.VMM != "" && req.VMM != d.Name() {
			continue
		}
		err := can(d)
		if err == nil {
			err = isolates(ctx, d, req.Isolation)
		}
		if err == nil {
			return d.Name(), nil
		}
		if refused == nil {
			refused = err
		}
	}
	if refused != nil {
		return "", refused
	}
	if d := named(req.VMM, h.cfg.Others); d != nil {
		why := errors.New("the host's settings do not let it")
		if _, err := d.Check(ctx); err != nil {
			why = err
		}
		return "", errdefs.Unavailable.Errorf("the vmm %s runs no sandboxes on this host: %s", req.VMM, h.detail(why))
	}
	var names []string
	for _, d := range h.cfg.Drivers {
		names = append(names, d.Name())
	}
	return "", errdefs.InvalidArgument.Errorf("no vmm is called %.40q; this host has %s", req.VMM, strings.Join(names, ", "))
}

// isolates says whether a driver isolates its guests as demanded.
func isolates(ctx context.Context, d vmm.Driver, want Isolation) error {
	if want != VMIsolation {
		return nil
	}
	report, err := d.Check(ctx)
	switch {
	case err != nil:
		return errdefs.Unavailable.Errorf("the vmm %s does not run: %w", d.Name(), err)
	case report.Isolation == vmm.UserSpaceKernel:
		return errdefs.WrongState.Errorf(
			"isolation vm is asked for, and the vmm %s has guests without a machine: install qemu, or ask for no isolation", d.Name())
	}
	return nil
}

// canRun returns a function that says whether a driver can run what a request asks for
// over a template.
func canRun(req CreateRequest, tmpl template.Template) func(vmm.Driver) error {
	return func(d vmm.Driver) error {
		switch {
		case !d.Needs().Flat:
			return nil
		case req.OnTimeout == HibernateFilesOnTimeout || req.OnEnd == HibernateFilesOnTimeout:
			return errdefs.Unsupported.Errorf("the vmm %s keeps its disk in its memory: hibernate, which keeps both, or name no vmm", d.Name())
		case tmpl.InitImage == "":
			return errdefs.WrongState.Errorf("this host has no image of init for the vmm %s: run `wrenn setup`, or name no vmm", d.Name())
		case tmpl.EROFS.Path == "":
			return errdefs.WrongState.Errorf("template %q has no image for the vmm %s: build it again, or name no vmm", tmpl.Name, d.Name())
		}
		return nil
	}
}

// hasDisk says whether the guests of a driver have disks that can be copied by themselves.
func hasDisk(d vmm.Driver) error {
	if d.Needs().Flat {
		return errdefs.WrongState.Errorf("the vmm %s keeps no disk by itself: this needs a host with qemu or firecracker", d.Name())
	}
	return nil
}

// noFilesAlone is the error of what needs the files of a flat sandbox without its memory.
func noFilesAlone(rec Record) error {
	return errdefs.Unsupported.Errorf(
		"sandbox %s runs with the vmm %s, which keeps its disk in its memory: pause --to-disk keeps both", rec.ID, rec.vmm())
}

// restoreVM starts the VM of a record from a snapshot with the driver that wrote it. Where
// an earlier agent did not note which, the others find that they do not support it.
func (h *host) restoreVM(ctx context.Context, rec Record, tmpl template.Template, dir string) (vm vmm.VM, err error) {
	if rec.VMM != "" {
		return h.restoreWith(ctx, h.driverOf(rec), rec, tmpl, dir)
	}
	for _, d := range h.drivers() {
		if d.Needs().Flat {
			continue
		}
		other, e := h.restoreWith(ctx, d, rec, tmpl, dir)
		if !errors.Is(e, errdefs.Unsupported) {
			return other, e
		}
		if err == nil {
			err = e
		}
	}
	if err == nil {
		err = errdefs.Unsupported.Errorf("no vmm of this host has such memory")
	}
	return nil, err
}

// restoreWith starts the VM of a record from a snapshot with a driver.
func (h *host) restoreWith(ctx context.Context, d vmm.Driver, rec Record, tmpl template.Template, dir string) (vmm.VM, error) {
	restorer, err := restorerOf(d)
	if err != nil {
		return nil, err
	}
	return restorer.Restore(ctx, h.spec(d, rec, tmpl), dir)
}

// restorerOf returns the part of a driver that restores snapshots:
// errdefs.Unsupported if it has none.
func restorerOf(d vmm.Driver) (vmm.Restorer, error) {
	restorer, ok := d.(vmm.Restorer)
	if !ok {
		return nil, errdefs.Unsupported.Errorf("the vmm %s cannot restore snapshots", d.Name())
	}
	return restorer, nil
}

// memoryKey identifies what the memory of a driver's VM of that size depends on
// here. Kernel and envd are in the memory, so they are not part of the key; the image that
// is the root of a flat driver's guest is, by its digest. A driver that is not here, or
// cannot restore, is errdefs.Unsupported.
func (h *host) memoryKey(ctx context.Context, shape template.Shape, rootImage string) (string, error) {
	driver := named(shape.Driver, h.drivers())
	if driver == nil {
		return "", errdefs.Unsupported.Errorf("its memory is of the vmm %s, which is not here", shape.Driver)
	}
	restorer, err := restorerOf(driver)
	if err != nil {
		return "", err
	}
	rec := Record{ID: bootName, Slot: 1, VCPUs: shape.VCPUs, MemMiB: shape.MemMiB, DiskMiB: shape.DiskMiB}
	key, err := restorer.SnapshotKey(ctx, h.spec(driver, rec, template.Template{}))
	if err == nil && rootImage != "" {
		key += " over " + rootImage
	}
	return key, err
}

// linkInit gives a flat sandbox a name of the image of init that its guest reads: that
// beside the memory which it starts from, or the host's own.
func (v *vms) linkInit(ctx context.Context, id ID, tmpl template.Template, src source) error {
	from := tmpl.InitImage
	if src.memory != "" {
		from = filepath.Join(src.memory, initName)
	}
	to := v.store.initImage(id)
	if err := remove(to); err != nil {
		return err
	}
	return v.linkFile(ctx, to, from)
}

// linkFile makes the new file path another name of a file, or a copy where that cannot be.
func (h *host) linkFile(ctx context.Context, path, of string) error {
	err := os.Link(of, path)
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
		return err
	}
	return h.cfg.Templates.CloneOverlay(ctx, path, of) // another file system, or too many names
}
