package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Snapshot is a copy of what callers may know of a named snapshot.
type Snapshot struct {
	Name string
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

func snapshotInfo(s template.Snapshot) Snapshot {
	return Snapshot{
		Name: s.Name, Source: ID(s.Source.Sandbox), Template: s.Source.Template,
		VCPUs: s.Shape.VCPUs, MemMiB: s.Shape.MemMiB, CreatedAt: s.Source.CreatedAt, Bytes: s.Bytes,
	}
}

// Snapshotted is what came of a Snapshot.
type Snapshotted struct {
	Snapshot
	// Paused is how long the source stood still.
	Paused time.Duration
}

// Snapshot keeps the present state of a running or paused sandbox, which goes on,
// under a name that Create takes as a template; one is made up if it is empty.
// It is there completely or not at all.
func (m *Manager) Snapshot(ctx context.Context, id ID, name string) (Snapshotted, error) {
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
	copied, err := m.disk.reserve(int64(rec.MemMiB)<<20 + m.store.takenBytes(id))
	if err != nil {
		return fail(err)
	}
	defer copied()
	if name == "" {
		name = "snap-" + randomHex(6)
	}
	stage, err := m.cfg.Templates.StageSnapshot(ctx, name)
	if err != nil {
		return fail(errdefs.DiskFull(err))
	}
	defer stage.Discard()
	began := time.Now()
	was, err := m.copyState(ctx, id, "copied into a snapshot", freezing{op: OpSnapshot, dir: stage.Dir, disk: stage.AddOverlay})
	if err != nil {
		return Snapshotted{}, err
	}
	if err := m.publishSnapshot(ctx, name, stage, was.record); err != nil {
		return fail(errdefs.DiskFull(err))
	}
	m.note(b, Checkpointed, ActorOf(ctx))
	m.log.Info("snapshot made", "snapshot", name, "sandbox", id,
		"paused", was.paused.Round(time.Millisecond), "took", time.Since(began).Round(time.Millisecond))
	made, err := m.cfg.Templates.Snapshot(ctx, name)
	if err != nil {
		return fail(err)
	}
	return Snapshotted{Snapshot: snapshotInfo(made), Paused: was.paused}, nil
}

// publishSnapshot shows what was written of a sandbox, whose record said of, under a
// name.
func (m *Manager) publishSnapshot(ctx context.Context, name string, stage template.Stage, of Record) error {
	meta := template.Meta{
		Shape: template.Shape{Driver: of.VM.Driver, VCPUs: of.VCPUs, MemMiB: of.MemMiB, DiskMiB: of.DiskMiB},
		Source: &template.Source{
			Sandbox: string(of.ID), Template: of.Template, Base: of.Base, CloneKey: of.CloneKey,
			Synced: true, Login: of.Login, CreatedAt: time.Now().UTC(),
		},
	}
	publish, cancel := context.WithTimeoutCause(ctx, moveTimeout(of), errdefs.Unavailable.Errorf("the host's disk is too slow"))
	defer cancel()
	var err error
	if meta.Key, err = m.memoryKey(publish, meta.Shape); err == nil {
		err = stage.Publish(publish, meta)
	}
	if err == nil && ctx.Err() != nil {
		// The caller has left and does not know that it is there.
		err = errors.Join(context.Cause(ctx), m.cfg.Templates.DropSnapshot(name))
	}
	return err
}

// Snapshots returns the named snapshots, newest first.
func (h *host) Snapshots() ([]Snapshot, error) {
	all, err := h.cfg.Templates.Snapshots()
	if err != nil {
		return nil, err
	}
	list := make([]Snapshot, 0, len(all))
	for _, s := range all {
		list = append(list, snapshotInfo(s))
	}
	return list, nil
}

// DeleteSnapshot removes a named snapshot. Sandboxes made from it go on.
func (h *host) DeleteSnapshot(name string) error {
	if err := h.cfg.Templates.DropSnapshot(name); err != nil {
		return err
	}
	h.log.Info("snapshot deleted", "snapshot", name)
	return nil
}

// createFromSnapshot is Create from a named snapshot: the memory and the disk are its
// source's, the identity is the sandbox's own. If the memory does not fit the
// host any more, the sandbox boots from the disk.
func (m *Manager) createFromSnapshot(ctx context.Context, req CreateRequest) (Created, error) {
	name := req.Template
	snap, err := m.cfg.Templates.Snapshot(ctx, name)
	if errors.Is(err, errdefs.NotFound) {
		return Created{}, errdefs.NotFound.Errorf("there is neither a template nor a snapshot %q", name)
	}
	if err != nil {
		return Created{}, err
	}
	switch shape := snap.Shape; {
	case req.VCPUs != 0 && req.VCPUs != shape.VCPUs:
		return Created{}, errdefs.InvalidArgument.Errorf(
			"snapshot %q has %d vcpus, which cannot become %d: name none to take its own", name, shape.VCPUs, req.VCPUs)
	case req.MemMiB != 0 && req.MemMiB != shape.MemMiB:
		return Created{}, errdefs.InvalidArgument.Errorf(
			"snapshot %q has %d MiB of memory, which cannot become %d: name none to take its own", name, shape.MemMiB, req.MemMiB)
	}
	tmpl, err := m.cfg.Templates.Get(snap.Source.Template)
	if errors.Is(err, errdefs.NotFound) {
		return Created{}, errdefs.Unsupported.Errorf("snapshot %q needs the template %q, which is gone", name, snap.Source.Template)
	}
	if err != nil {
		return Created{}, err
	}
	if tmpl.BaseSHA256 != snap.Source.Base {
		return Created{}, errdefs.Unsupported.Errorf(
			"snapshot %q needs the base image that template %q had when it was made; the template has another one now", name, tmpl.Name)
	}
	src, err := m.snapshotSource(ctx, snap)
	if err != nil {
		return Created{}, err
	}
	if err := req.check(); err != nil {
		return Created{}, err
	}
	req.snapshot = name
	req.Template, req.VCPUs, req.MemMiB, req.diskMiB = tmpl.Name, snap.Shape.VCPUs, snap.Shape.MemMiB, snap.Shape.DiskMiB
	req.Login = req.Login.Over(snap.Source.Login)
	return m.create(ctx, req, tmpl, src)
}

// snapshotSource returns what a sandbox starts from that is made from a named snapshot.
// A disk that was synced can be booted where the memory does not fit.
func (h *host) snapshotSource(ctx context.Context, snap template.Snapshot) (sourceOf, error) {
	key, err := h.memoryKey(ctx, snap.Shape)
	why := ""
	switch {
	case err != nil && !errors.Is(err, errdefs.Unsupported):
		return nil, err
	case err != nil:
		why = firstLine(err)
	case key != snap.Key:
		why = "its memory is of another version of the vmm, another machine or another cpu than here"
	}
	src := source{memory: snap.Dir, disk: snap.Overlay, token: snap.Source.CloneKey}
	if snap.Source.Synced {
		src.boot = &source{from: FromBoot, why: why, disk: snap.Overlay}
	}
	if why == "" {
		return fromSnapshot(src), nil
	}
	if src.boot == nil {
		return nil, errdefs.Unsupported.Errorf(
			"snapshot %q cannot be restored: %s; nor can it be booted, for its disk was not up to date", snap.Name, why)
	}
	return fromSnapshotDisk(*src.boot), nil
}
