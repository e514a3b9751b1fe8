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
)

// host is what this machine gives a sandbox: a VM, a network and directories. It has
// no state of its own.
type host struct {
	cfg   Config
	store store
	log   *slog.Logger
}

// runDir is the directory of a sandbox's VM.
func (h *host) runDir(id ID) string { return filepath.Join(h.cfg.RunDir, string(id)) }

// cgroups is the parent of the VMs' cgroups. It is named after the instance,
// as all that belongs to this agent outside the state directory.
func (h *host) cgroups() string { return h.cfg.Network.Plan().Instance }

// vmGone says whether it is proven that the VM of a record is not there.
func (h *host) vmGone(ctx context.Context, rec Record) bool {
	if rec.VM == nil {
		return true
	}
	_, err := h.driverOf(rec).Attach(ctx, *rec.VM)
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
	if err := errors.Join(remove(h.store.overlay(b.id)), remove(h.store.initImage(b.id))); err != nil {
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
