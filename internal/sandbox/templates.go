package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// rootOf returns what the disk of a sandbox is mounted over: errdefs.Unsupported if that
// is not there any more.
func (h *host) rootOf(rec Record) (template.Template, error) {
	tmpl, err := h.cfg.Templates.RootOf(cmp.Or(rec.TemplateID, rec.Template), rec.Base)
	switch {
	case errors.Is(err, errdefs.NotFound):
		err = errdefs.Unsupported.Errorf("it needs the template %q, which is gone", rec.Template)
	case err == nil && tmpl.RootSHA256 != rec.Base:
		err = errdefs.Unsupported.Errorf("template %q has another base image than when the sandbox was made", rec.Template)
	case err == nil && rec.flat() && tmpl.EROFS.SHA256 != rec.RootImage:
		err = errdefs.Unsupported.Errorf(
			"template %q has another image for the vmm %s than when the sandbox was made, or none", rec.Template, rec.vmm())
	}
	return tmpl, err
}

// DeleteTemplate removes a template, or with a tag that of a snapshot, and the build to
// which no other leads. It is errdefs.WrongState while sandboxes need the template;
// sandboxes that were made from a snapshot go on without it.
func (m *Manager) DeleteTemplate(ctx context.Context, id, tag string) error {
	return m.cfg.Templates.Delete(ctx, id, tag, m.usersOf)
}

// usersOf says why a template may not be removed.
func (r *registry) usersOf(t template.Info) error {
	if t.Source != "" {
		return nil // its sandboxes have a disk of their own, and the memory open
	}
	how, ids, more := "", []string(nil), 0
	for _, b := range r.all() {
		rec := b.record()
		state := "running"
		switch {
		case rec.State == Stopped, rec.State == Building: // a build has links of its own to all layers
			continue
		case rec.State == Unknown:
			return errdefs.WrongState.Errorf("cannot delete template '%s' because sandbox %s is unknown and may be using it", t.ID, rec.ID)
		case rec.templateID() != t.ID:
			continue
		case rec.State == Paused || rec.State == Hibernated:
			state = "paused"
		}
		how = cmp.Or(how, state)
		// Another project's are not the caller's to know.
		if mine := t.Project == "" || t.Project == rec.Project; mine && len(ids) < 5 {
			ids = append(ids, string(rec.ID))
		} else {
			more++
		}
	}
	if how == "" {
		return nil
	}
	if more > 0 {
		ids = append(ids, fmt.Sprintf("%d more", more))
	}
	return errdefs.WrongState.Errorf("cannot delete template '%s' because there are %s sandboxes using it: %s",
		t.ID, how, strings.Join(ids, ", "))
}

// PruneTemplates removes the builds of templates to which no tag leads and that no sandbox
// and no snapshot needs: of one project, or of all if it is nil. It returns which they
// are; with dryRun it removes nothing.
func (m *Manager) PruneTemplates(ctx context.Context, project *string, dryRun bool) ([]template.Unused, error) {
	store := m.cfg.Templates
	needed := func(t template.Info, b template.Build) bool {
		return project != nil && t.Project != *project || m.needsBuild(t, b)
	}
	list, err := store.Unused(needed)
	if err != nil || dryRun {
		return list, err
	}
	err = store.Prune(ctx, needed)
	// A sandbox may have been made of one since.
	return slices.DeleteFunc(list, func(u template.Unused) bool { return store.Has(u.Template.ID, u.Build.ID) }), err
}

// needsBuild says whether a sandbox is over a build of a template, or may be.
func (r *registry) needsBuild(t template.Info, build template.Build) bool {
	return slices.ContainsFunc(r.all(), func(b *box) bool {
		rec := b.record()
		return rec.State == Unknown || rec.State != Stopped && rec.templateID() == t.ID && rec.Base == build.Base
	})
}

// pruneTemplates is PruneTemplates of all projects, when the agent starts.
func (m *Manager) pruneTemplates(ctx context.Context) {
	if _, err := m.PruneTemplates(ctx, nil, false); err != nil {
		m.log.Warn("old builds of templates not removed", "err", err)
	}
}
