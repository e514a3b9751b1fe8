package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// host is what this machine gives a sandbox: a VM, a network and directories. It has
// no state of its own.
type host struct {
	cfg   Config
	store store
	log   *slog.Logger
}

// The hard limits of a VMM's cgroup besides its memory: what it may take beyond its
// vCPUs' time, so that a guest that breaks out of bounds ends, and no neighbour.
const (
	vmmCPUMilli = 250
	maxVMMTasks = 256
)

// runDir is the directory of a sandbox's VM.
func (h *host) runDir(id ID) string { return filepath.Join(h.cfg.RunDir, string(id)) }

// cgroups is the parent of the VMs' cgroups. It is named after the instance,
// as all that belongs to this agent outside the state directory.
func (h *host) cgroups() string { return h.cfg.Network.Plan().Instance }

const _ = uint(vmm.MaxLayers - template.MaxLayers) // a machine has all layers of a template

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
			PIDs:     maxVMMTasks,

			DiskBytes: h.cfg.DiskBytes, DiskOps: h.cfg.DiskOps,
		},
	}
	if needs.Kernel {
		spec.Kernel = vmm.Kernel{Image: tmpl.Kernel, Initrd: tmpl.Initrd}
	}
	return spec
}

// driverOf returns the driver that a handle is of. The Driver itself refuses a handle
// of none of them.
func (h *host) driverOf(handle vmm.Handle) vmm.Driver {
	for _, d := range h.cfg.Others {
		if d.Name() == handle.Driver {
			return d
		}
	}
	return h.cfg.Driver
}

// restoreVM starts the VM of a record from a snapshot with the driver that wrote the
// snapshot: the others find that they do not support it.
func (h *host) restoreVM(ctx context.Context, rec Record, tmpl template.Template, dir string) (vmm.VM, error) {
	vm, err := h.restoreWith(ctx, h.cfg.Driver, rec, tmpl, dir)
	for _, d := range h.cfg.Others {
		if !errors.Is(err, errdefs.Unsupported) {
			break
		}
		other, e := h.restoreWith(ctx, d, rec, tmpl, dir)
		if !errors.Is(e, errdefs.Unsupported) {
			return other, e
		}
	}
	return vm, err
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
// here. Kernel and envd are in the memory, so they are not part of the key. A driver
// that is not here, or cannot restore, is errdefs.Unsupported.
func (h *host) memoryKey(ctx context.Context, shape template.Shape) (string, error) {
	driver := h.driverOf(vmm.Handle{Driver: shape.Driver})
	if here := driver.Name(); shape.Driver != here {
		return "", errdefs.Unsupported.Errorf("its memory is of the vmm %s, here is %s", shape.Driver, here)
	}
	restorer, err := restorerOf(driver)
	if err != nil {
		return "", err
	}
	rec := Record{ID: bootName, Slot: 1, VCPUs: shape.VCPUs, MemMiB: shape.MemMiB, DiskMiB: shape.DiskMiB}
	return restorer.SnapshotKey(ctx, h.spec(driver, rec, template.Template{}))
}

// vmGone says whether it is proven that the VM of a record is not there.
func (h *host) vmGone(ctx context.Context, rec Record) bool {
	if rec.VM == nil {
		return true
	}
	_, err := h.driverOf(*rec.VM).Attach(ctx, *rec.VM)
	return errors.Is(err, errdefs.NotFound)
}

// free takes apart what a sandbox has of the host and a hibernated one does not need:
// VM, network, run directory and overlay. "Not there" is done. The files go last, for
// the VMM uses them. Called with the op lock held.
func (h *host) free(ctx context.Context, b *box) error {
	rec := b.record()
	var killed, closed error
	var wg sync.WaitGroup
	if rec.Slot != 0 {
		wg.Go(func() { closed = h.cfg.Network.Close(ctx, rec.Slot) })
	}
	if killed = h.killVM(ctx, b); killed != nil {
		killed = fmt.Errorf("kill vm: %w", killed)
	}
	wg.Wait()
	if closed != nil {
		closed = fmt.Errorf("close network: %w", closed)
	}
	if killed != nil {
		return errors.Join(killed, closed)
	}
	errs := []error{closed}
	if err := os.RemoveAll(h.runDir(b.id)); err != nil {
		errs = append(errs, fmt.Errorf("remove run directory: %w", err))
	}
	if err := remove(h.store.overlay(b.id)); err != nil {
		errs = append(errs, fmt.Errorf("remove overlay: %w", err))
	}
	return errors.Join(errs...)
}

// killVM ends the VM of a sandbox. A VM that an earlier agent started is found by its
// run directory. Called with the op lock held.
func (h *host) killVM(ctx context.Context, b *box) error {
	if b.op.vm != nil {
		return b.op.vm.Kill(ctx)
	}
	keep := func(name string) bool { return name != string(b.id) }
	_, err := h.cfg.KillStrays(ctx, h.cfg.RunDir, h.cgroups(), keep)
	return err
}

// releaseSlot gives the address slot of a freed record back.
func (h *host) releaseSlot(rec Record) {
	if rec.Slot == 0 {
		return
	}
	if err := h.cfg.Network.Release(rec.Slot); err != nil {
		h.log.Error("slot not given back", "sandbox", rec.ID, "slot", rec.Slot, "err", err)
	}
}

// detail is an error as a record's detail has it: short, printable and without the
// host's directories.
func (h *host) detail(err error) string {
	text := strings.NewReplacer(h.cfg.RunDir+"/", "", h.cfg.StateDir+"/", "", "/run/netns/", "").Replace(pathless(err))
	return errdefs.Foreign(strings.ReplaceAll(text, "\n", ";"))
}

// consoleEnd is the end of the guest's console, for an error's text.
func (h *host) consoleEnd(id ID) string {
	const lines = 8
	data, err := h.store.tail(id, 1<<10)
	if err != nil || len(data) == 0 {
		return ""
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	end := ""
	for i := len(all) - 1; i >= max(0, len(all)-lines); i-- { // the last lines say most
		line := errdefs.Foreign(all[i])
		if len(end)+len(line) > errdefs.MaxForeign {
			break
		}
		end = " | " + line + end
	}
	return "; the console ends: " + strings.TrimPrefix(end, " | ")
}

// firstLine is an error's first line.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
