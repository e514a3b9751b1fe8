package main

import (
	"context"
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
)

// prepareBoot makes the boot snapshot from which creates start that say neither
// template nor size. A host on which it cannot be made can run no sandbox.
func prepareBoot(ctx context.Context, cfg agent.Config, report progress.Func) error {
	const step, size = "boot snapshot", "1 vCPU, 512 MiB"
	report(progress.Event{Step: step, Phase: progress.Began, Detail: "booting a guest to start others from"})
	made, err := agent.Prepare(ctx, cfg)
	switch {
	case errors.Is(err, errdefs.Busy):
		report(progress.Event{Step: step, Phase: progress.Kept, Detail: "left to the host agent, which is running;"})
	case err != nil:
		return fmt.Errorf("not ready: all is in %s but the boot snapshot, and a sandbox could not start either: %w; "+
			"`wrenn doctor --state-dir %s` says what this host lacks, then run `wrenn setup` again", cfg.StateDir, err, cfg.StateDir)
	case made:
		report(progress.Event{Step: step, Phase: progress.Did, Detail: size})
	default:
		report(progress.Event{Step: step, Phase: progress.Kept, Detail: size})
	}
	return nil
}
