package build

import (
	"context"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// OfHost returns the build sandboxes of a manager.
func OfHost(m *sandbox.Manager) Sandboxes { return &host{m, m.Builders()} }

type host struct {
	manager  *sandbox.Manager
	builders *sandbox.Builders
}

func (h *host) Create(ctx context.Context, r Request) (string, error) {
	id, err := h.builders.Create(ctx, sandbox.BuilderRequest{
		Root: r.Root, Project: r.Project, VCPUs: r.VCPUs, MemMiB: r.MemMiB, DiskMiB: r.DiskMiB, Overlay: r.Overlay,
	})
	return string(id), err
}

func (h *host) Guest(id string) (Guest, error) {
	return h.builders.Guest(sandbox.ID(id))
}

func (h *host) Capture(ctx context.Context, id, path string) error {
	return h.builders.Capture(ctx, sandbox.ID(id), path)
}

func (h *host) Destroy(ctx context.Context, id string) error {
	return h.builders.Destroy(ctx, sandbox.ID(id))
}

func (h *host) Prepare(ctx context.Context, template, build string, said func(level, step, line string)) error {
	return h.manager.PrepareBuild(ctx, template, build, said)
}
