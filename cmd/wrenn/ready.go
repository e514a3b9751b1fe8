package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/host"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// managerConfig is what setup and serve open the sandboxes of a host with.
func (c *hostConfig) managerConfig(plan network.Plan, uids int, chosen host.Choice, templates *template.Store, log *slog.Logger) sandbox.Config {
	return sandbox.Config{
		StateDir: c.stateDir, RunDir: filepath.Join("/run", plan.Instance),
		Driver: chosen.Driver, Others: chosen.Others,
		Network: network.New(plan, network.Options{BaseUID: uids, RangesFile: c.rangesFile(), Log: log}), Templates: templates, KillStrays: launch.KillStrays, NetNSOf: launch.NetNSOf,
		Guests: func(addr netip.Addr, token string) sandbox.Guest {
			return guest.New(netip.AddrPortFrom(addr, guestapi.Port), token)
		},
		OverlayMiB: template.DefaultOverlayMiB, DNS: network.Resolvers(),
		BaseUID: uids, BootTimeout: 2 * time.Minute, KeepStopped: time.Hour, Log: log,
	}
}

// prepareReady makes the ready snapshot that a create without wishes starts
// from. Where it cannot be made, no sandbox can.
func (c *hostConfig) prepareReady(ctx context.Context, plan network.Plan, templates *template.Store, report progress.Func) error {
	const step = "ready snapshot"
	report(progress.Event{Step: step, Phase: progress.Began, Detail: "booting a guest to start others from"})
	made, err := c.makeReady(ctx, plan, templates)
	switch {
	case errors.Is(err, errdefs.Busy):
		report(progress.Event{Step: step, Phase: progress.Kept, Detail: "left to the host agent, which is running;"})
	case err != nil:
		return fmt.Errorf("not ready: all is in %s but the ready snapshot, and a sandbox could not start either: %w; "+
			"`wrenn doctor --state-dir %s` says what this host lacks, then run `wrenn setup` again", c.stateDir, err, c.stateDir)
	case made:
		report(progress.Event{Step: step, Phase: progress.Did, Detail: "1 vCPU, 512 MiB"})
	default:
		report(progress.Event{Step: step, Phase: progress.Kept, Detail: "1 vCPU, 512 MiB"})
	}
	return nil
}

func (c *hostConfig) makeReady(ctx context.Context, plan network.Plan, templates *template.Store) (made bool, err error) {
	chosen, err := host.Choose(ctx, c.vmm, c.drivers(false))
	if err != nil {
		return false, err
	}
	uids, err := claimUIDs(uidClaims, c.stateDir)
	if err != nil {
		return false, err
	}
	cfg := c.managerConfig(plan, uids, chosen, templates, slog.New(slog.DiscardHandler))
	cfg.Capacity = sandbox.Capacity{
		Resources: sandbox.Resources{Sandboxes: 1 << 20, VCPUs: 1 << 20, MemMiB: 1 << 30},
		Starts:    max(2, runtime.NumCPU()), StartQueue: time.Minute,
	}
	manager, _, err := sandbox.Open(ctx, cfg)
	if err != nil {
		return false, err
	}
	made, err = manager.Prepare(ctx, sandbox.CreateRequest{})
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	serr := manager.Shutdown(end, false)
	if serr == nil && len(manager.List(false)) == 0 {
		serr = errors.Join(cfg.Network.(*network.Network).Teardown(end), releaseUIDs(uidClaims, uids))
	}
	err = errors.Join(err, serr)
	return made, err
}
