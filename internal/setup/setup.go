// Package setup makes what a host needs before sandboxes can run: packages, guest
// kernel, initrd, and the root file system of the template "minimal".
package setup

import (
	"context"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/diskfree"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// DebianKernel as Options.Kernel asks for Debian's cloud kernel.
const DebianKernel = "debian"

// Options of Run.
type Options struct {
	// Envd is the path of the guest daemon that the initrd carries.
	Envd string
	// Kernel is DebianKernel, or the path of a vmlinux or bzImage; empty
	// keeps the kernel that is there and fetches Debian's if there is none.
	Kernel string
	// Modules is the directory of that kernel's modules, such as
	// /lib/modules/RELEASE; empty if all that the guest needs is built in.
	// Only with a path in Kernel.
	Modules string
}

// Run makes what is missing: guest kernel, initrd, the template "minimal",
// and the seed of its overlays. What is complete is kept, so that it can be
// called again at any time; an interrupted call leaves nothing half-made in
// use. Two calls at once on one directory take turns. Wants root for the
// template, and the host's apt.
func Run(ctx context.Context, s *template.Store, o Options, report progress.Func) error {
	if o.Modules != "" && (o.Kernel == "" || o.Kernel == DebianKernel) {
		return errdefs.InvalidArgument.Errorf("modules are given without the kernel that they belong to")
	}
	if err := setupKernel(ctx, s, o, report); err != nil {
		return fmt.Errorf("set up guest kernel: %w", err)
	}
	if err := setupMinimal(ctx, s, report); err != nil {
		return fmt.Errorf("set up template %s: %w", template.DefaultName, err)
	}
	st := report.Begin("overlay seed")
	made, err := s.EnsureSeed(ctx, template.DefaultOverlayMiB)
	if err != nil {
		return fmt.Errorf("set up overlay seed: %w", err)
	}
	if made {
		st.Did("%d MiB", template.DefaultOverlayMiB)
	} else {
		st.Kept("%d MiB", template.DefaultOverlayMiB)
	}
	return nil
}

// needSpace is errdefs.Exhausted unless dir's file system has that much free.
func needSpace(dir string, mib int64, what string) error {
	free, err := diskfree.Bytes(dir)
	if err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	free >>= 20
	if free < mib {
		return errdefs.Exhausted.Errorf("%s needs %d MiB of disk for a while and %d MiB are free: free some, or choose another --state-dir",
			what, mib, free)
	}
	return nil
}

// waiting returns what tells that a step waits for another setup.
func waiting(st progress.Step) func() {
	return func() { st.Detail("waiting for another setup to end") }
}
