package sandbox

import (
	"context"
	"errors"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// KindHibernated is the Kind of a hibernated sandbox.
const KindHibernated template.Kind = "sandbox"

// Verified is what Verify found of one template, snapshot or hibernated sandbox.
type Verified = template.Verified

// Verify reads all that sandboxes start or go on from and compares it with its
// digests: the kernel, templates, boot snapshots, named snapshots and hibernated
// sandboxes, or those with the given names alone. A boot snapshot belongs to its
// template. It changes nothing. What it finds it hands to fn, one by one. A
// name of nothing is errdefs.NotFound.
func (m *Manager) Verify(ctx context.Context, names []string, fn func(Verified) error) error {
	found := map[string]bool{}
	wanted := func(name string) bool {
		found[name] = true
		return len(names) == 0 || slices.Contains(names, name)
	}
	err := m.cfg.Templates.Verify(ctx, func(kind template.Kind, name string) bool {
		if kind == template.KindBootSnapshot {
			name, _, _ = strings.Cut(name, "/")
		}
		return wanted(name)
	}, fn)
	if err != nil {
		return err
	}
	for _, info := range m.List(false) {
		if info.State != Hibernated || !wanted(string(info.ID)) {
			continue
		}
		if err := m.verifyHibernated(ctx, info.ID, fn); err != nil {
			return err
		}
	}
	for _, name := range names {
		if !found[name] {
			return errdefs.NotFound.Errorf("there is no template, snapshot or hibernated sandbox %.80q", name)
		}
	}
	return nil
}

// verifyHibernated holds the op lock, so that the sandbox is not resumed while it
// is read.
func (m *Manager) verifyHibernated(ctx context.Context, id ID, fn func(Verified) error) error {
	b, err := m.find(id)
	if errors.Is(err, errdefs.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := b.hold(ctx, "verified"); err != nil {
		return err
	}
	defer b.unhold()
	if b.state() != Hibernated {
		return nil
	}
	kept, err := m.store.openSnapshot(id)
	if err == nil {
		err = kept.verify(ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fn(Verified{Kind: KindHibernated, Name: string(id), Bytes: m.store.snapshotBytes(id), Err: err})
}
