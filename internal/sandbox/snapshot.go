package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Snapshot is a copy of what callers may know of a named snapshot.
type Snapshot struct {
	// Name is how the snapshot's project calls it.
	Name string
	// TemplateID, Build and Tag are the template that the snapshot is, its build and a tag
	// that leads to it.
	TemplateID, Build, Tag string
	// Source is the sandbox that it was made of, which may be gone.
	Source ID
	// Template is the one that the source came from.
	Template  string
	VCPUs     int
	MemMiB    int
	CreatedAt time.Time
	// Bytes is what it takes on the host's disk.
	Bytes int64
}

// snapshotInfo is of a build to which a tag leads. all are the templates of the host.
func (h *host) snapshotInfo(all []template.Info, t template.Info, b template.Build, tag string) Snapshot {
	name := t.Name()
	if tag != template.DefaultTag {
		name += ":" + tag
	}
	s := Snapshot{
		Name: name, TemplateID: t.ID, Build: b.ID, Tag: tag, Source: ID(t.Source), Template: b.Over,
		VCPUs: b.VCPUs, MemMiB: b.MemMiB, CreatedAt: b.CreatedAt, Bytes: h.cfg.Templates.Bytes(t.ID, b.ID),
	}
	if i := slices.IndexFunc(all, func(t template.Info) bool { return t.ID == b.Over }); i >= 0 {
		s.Template = all[i].Name()
	}
	return s
}

// SnapshotRequest says what a snapshot keeps and what it is called.
type SnapshotRequest struct {
	// Project is whose the snapshot is.
	Project string
	// Name is what Create takes as a template, with Tag, which is "default" when empty.
	// Without a name the snapshot has an id alone. A name that a snapshot of the project
	// has gets another build, and the tag moves to that when it is complete.
	Name, Tag string
	// FilesOnly keeps the disk and not the memory: sandboxes from it boot.
	FilesOnly bool
	// New refuses a name and tag that a snapshot has: errdefs.AlreadyExists.
	New bool
}

// Snapshotted is what came of a Snapshot.
type Snapshotted struct {
	Snapshot
	// Paused is how long the source stood still.
	Paused time.Duration
}

// Snapshot keeps the present state of a running or paused sandbox, which goes on, as a
// build of a template. It is there completely or not at all.
func (m *Manager) Snapshot(ctx context.Context, id ID, req SnapshotRequest) (Snapshotted, error) {
	b, err := m.find(id)
	if err != nil {
		return Snapshotted{}, err
	}
	fail := func(err error) (Snapshotted, error) {
		return Snapshotted{}, fmt.Errorf("snapshot sandbox %s: %w", id, err)
	}
	rec := b.record()
	switch {
	case m.Draining():
		return fail(errdefs.Unavailable.Errorf("the host is shutting down"))
	case rec.State == Unknown:
		return fail(check(id, OpSnapshot, rec.State))
	case rec.CloneKey == "":
		return fail(errdefs.Unsupported.Errorf("it was made by an older agent, which did not prepare it for that"))
	}
	if err := b.full(OpSnapshot); err != nil {
		return Snapshotted{}, err
	}
	room := m.store.takenBytes(id)
	if !req.FilesOnly {
		room += int64(rec.MemMiB) << 20
	}
	copied, err := m.disk.reserve(room)
	if err != nil {
		return fail(err)
	}
	defer copied()
	naming := template.Naming{Project: req.Project, Name: req.Name, Tag: cmp.Or(req.Tag, template.DefaultTag), New: req.New}
	stage, err := m.cfg.Templates.StageSnapshot(ctx, naming)
	if err != nil {
		return fail(errdefs.DiskFull(err))
	}
	defer stage.Discard()
	began := time.Now()
	was, err := m.copyState(ctx, id, "copied into a snapshot", freezing{
		op: OpSnapshot, dir: stage.Dir, what: Hibernation{FilesOnly: req.FilesOnly}, disk: stage.AddOverlay,
	})
	if err != nil {
		return Snapshotted{}, err
	}
	t, build, err := m.publishSnapshot(ctx, stage, was.record, req.FilesOnly)
	if err != nil {
		return fail(errdefs.DiskFull(err))
	}
	m.note(b, Checkpointed, ActorOf(ctx))
	all, _ := m.cfg.Templates.List() // for the name of the template alone
	made := m.snapshotInfo(all, t, build, naming.Tag)
	m.log.Info("snapshot made", "snapshot", made.Name, "project", t.Project, "sandbox", id,
		"paused", was.paused.Round(time.Millisecond), "took", time.Since(began).Round(time.Millisecond))
	return Snapshotted{Snapshot: made, Paused: was.paused}, nil
}

// SnapshotName makes up a name for a snapshot.
func SnapshotName() string { return "snap-" + randomHex(6) }

// publishSnapshot shows what was written of a sandbox, whose record said of.
func (m *Manager) publishSnapshot(
	ctx context.Context, stage template.SnapshotStage, of Record, filesOnly bool,
) (t template.Info, b template.Build, err error) {
	meta := template.Meta{
		Shape: template.Shape{Driver: of.VM.Driver, VCPUs: of.VCPUs, MemMiB: of.MemMiB, DiskMiB: of.DiskMiB},
		Source: &template.Source{
			Sandbox: string(of.ID), Template: of.Template, TemplateID: of.TemplateID, Build: of.Build, Base: of.Base, CloneKey: of.CloneKey,
			Synced: !of.flat(), RootImage: of.RootImage, FilesOnly: filesOnly, Login: of.Login, CreatedAt: time.Now().UTC(),
		},
	}
	publish, cancel := context.WithTimeoutCause(ctx, moveTimeout(of), errdefs.Unavailable.Errorf("the host's disk is too slow"))
	defer cancel()
	if !filesOnly {
		if meta.Key, err = m.memoryKey(publish, meta.Shape, of.RootImage); err != nil {
			return t, b, err
		}
	}
	t, b, err = stage.Publish(publish, meta, template.Build{
		VCPUs: of.VCPUs, MemMiB: of.MemMiB, DiskMiB: of.DiskMiB, EnvdVersion: of.EnvdVersion, Base: of.Base, Over: of.templateID(),
	})
	if err == nil && ctx.Err() != nil && len(t.Builds) == 1 {
		// The caller has left and does not know that it is there.
		err = errors.Join(context.Cause(ctx), m.cfg.Templates.Delete(context.WithoutCancel(ctx), t.ID, "", nil))
	}
	return t, b, err
}

// Snapshots returns the named snapshots of a project, newest first, once for each tag.
func (h *host) Snapshots(project string) ([]Snapshot, error) {
	all, err := h.cfg.Templates.List()
	if err != nil {
		return nil, err
	}
	list := []Snapshot{}
	for _, t := range all {
		if t.Source == "" || t.Project != project {
			continue
		}
		for _, tag := range t.Tags {
			if b, ok := t.BuildOf(tag.Name); ok {
				list = append(list, h.snapshotInfo(all, t, b, tag.Name))
			}
		}
	}
	slices.SortFunc(list, func(a, b Snapshot) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), strings.Compare(a.Name, b.Name))
	})
	return list, nil
}

// DeleteSnapshot removes a snapshot of a project, or the tag that its name has.
// Sandboxes made from it go on.
func (m *Manager) DeleteSnapshot(ctx context.Context, project, name string) error {
	all, err := m.cfg.Templates.List()
	if err != nil {
		return err
	}
	mine := slices.DeleteFunc(all, func(t template.Info) bool { return t.Source == "" || t.Project != project })
	t, ref, err := template.Lookup(mine, project, name)
	if errors.Is(err, errdefs.NotFound) {
		return errdefs.NotFound.Errorf("snapshot %q does not exist", name)
	}
	if err != nil {
		return err
	}
	if err := m.DeleteTemplate(ctx, t.ID, ref.Tag); err != nil {
		return err
	}
	m.log.Info("snapshot deleted", "snapshot", name, "project", project)
	return nil
}

// createFromSnapshot is Create from a snapshot: the memory and the disk are its
// source's, the identity is the sandbox's own. If the memory does not fit the
// host any more, the sandbox boots from the disk.
func (m *Manager) createFromSnapshot(ctx context.Context, req CreateRequest, t template.Info, build template.Build) (Created, error) {
	name := t.Reference(build)
	snap, err := m.cfg.Templates.Snapshot(ctx, t.ID, build.ID)
	if err != nil {
		return Created{}, fmt.Errorf("snapshot %q: %w", name, err)
	}
	switch shape := snap.Shape; {
	case req.VCPUs != 0 && req.VCPUs != shape.VCPUs:
		return Created{}, errdefs.InvalidArgument.Errorf(
			"snapshot %q has %d vcpus, which cannot become %d: name none to take its own", name, shape.VCPUs, req.VCPUs)
	case req.MemMiB != 0 && req.MemMiB != shape.MemMiB:
		return Created{}, errdefs.InvalidArgument.Errorf(
			"snapshot %q has %d MiB of memory, which cannot become %d: name none to take its own", name, shape.MemMiB, req.MemMiB)
	case req.DiskMiB != 0 && req.DiskMiB != shape.DiskMiB:
		return Created{}, errdefs.InvalidArgument.Errorf(
			"snapshot %q has a disk of %d MiB, which cannot become %d: name none to take its own", name, shape.DiskMiB, req.DiskMiB)
	}
	tmpl, err := m.cfg.Templates.RootOf(cmp.Or(snap.Source.TemplateID, snap.Source.Template), snap.Source.Base)
	if errors.Is(err, errdefs.NotFound) {
		return Created{}, errdefs.Unsupported.Errorf("snapshot %q needs the template %q, which is gone", name, snap.Source.Template)
	}
	if err != nil {
		return Created{}, err
	}
	if tmpl.RootSHA256 != snap.Source.Base {
		return Created{}, errdefs.Unsupported.Errorf(
			"snapshot %q needs the base image that template %q had when it was made; the template has another one now", name, tmpl.Name)
	}
	if snap.Source.RootImage != tmpl.EROFS.SHA256 && snap.Source.RootImage != "" {
		return Created{}, errdefs.Unsupported.Errorf(
			"snapshot %q needs the image for the vmm %s that template %q had when it was made; the template has another one now, or none",
			name, snap.Shape.Driver, tmpl.Name)
	}
	if err := req.check(); err != nil {
		return Created{}, err
	}
	src, err := m.snapshotSource(ctx, name, snap, &req)
	if err != nil {
		return Created{}, err
	}
	req.snapshot = name
	req.VCPUs, req.MemMiB, req.DiskMiB = snap.Shape.VCPUs, snap.Shape.MemMiB, snap.Shape.DiskMiB
	req.Login = req.Login.Over(snap.Source.Login)
	return m.create(ctx, req, tmpl, src)
}

// snapshotSource returns what a sandbox starts from that is made from a named snapshot,
// and sets the driver of the request. A disk that was synced can be booted where the memory
// does not fit.
func (h *host) snapshotSource(ctx context.Context, name string, snap template.Snapshot, req *CreateRequest) (sourceOf, error) {
	why, err := h.unfit(ctx, snap, *req)
	if err != nil {
		return nil, err
	}
	src := source{memory: snap.Dir, disk: snap.Overlay, token: snap.Source.CloneKey}
	if snap.Source.Synced {
		src.boot = &source{from: FromBoot, why: why, disk: snap.Overlay}
	}
	switch {
	case why == "":
		req.VMM = snap.Shape.Driver
		return fromSnapshot(src), nil
	case snap.Source.RootImage != "":
		return nil, errdefs.Unsupported.Errorf(
			"snapshot %q cannot be restored: %s; nor can it be booted, for its disk is in its memory", name, why)
	case src.boot == nil:
		return nil, errdefs.Unsupported.Errorf(
			"snapshot %q cannot be restored: %s; nor can it be booted, for its disk was not up to date", name, why)
	}
	if req.VMM, err = h.choose(ctx, *req, hasDisk); err != nil {
		return nil, err
	}
	return fromSnapshotDisk(*src.boot), nil
}

// unfit says why the memory of a snapshot cannot be what a request starts from; empty if
// it can.
func (h *host) unfit(ctx context.Context, snap template.Snapshot, req CreateRequest) (why string, err error) {
	if snap.Source.FilesOnly {
		return "the snapshot has no memory", nil
	}
	if req.VMM != "" && req.VMM != snap.Shape.Driver {
		return fmt.Sprintf("its memory is of the vmm %s, and %s is asked for", snap.Shape.Driver, req.VMM), nil
	}
	key, err := h.memoryKey(ctx, snap.Shape, snap.Source.RootImage)
	switch {
	case errors.Is(err, errdefs.Unsupported):
		return firstLine(err), nil
	case err != nil:
		return "", err
	case key != snap.Key:
		return "its memory is of another version of the vmm, another machine or another cpu than here", nil
	}
	if err := isolates(ctx, named(snap.Shape.Driver, h.drivers()), req.Isolation); err != nil {
		return firstLine(err), nil
	}
	return "", nil
}
