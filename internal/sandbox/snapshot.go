package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
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
	copied, err := m.room(int64(rec.MemMiB)<<20 + m.store.takenBytes(id))
	if err != nil {
		return fail(err)
	}
	defer copied()
	if name == "" {
		name = newSnapshotName()
	}
	stage, err := m.cfg.Templates.StageSnapshot(ctx, name)
	if err != nil {
		return fail(errdefs.DiskFull(err))
	}
	defer stage.Discard()
	began := time.Now()
	source, paused, err := m.photograph(ctx, id, OpSnapshot, "copied into a snapshot", stage.Dir, stage.AddOverlay)
	if err != nil {
		return Snapshotted{}, err
	}
	meta := template.Meta{
		Shape: template.Shape{Driver: source.VM.Driver, VCPUs: source.VCPUs, MemMiB: source.MemMiB, DiskMiB: source.DiskMiB},
		Source: &template.Source{
			Sandbox: string(id), Template: source.Template, Base: source.Base, CloneKey: source.CloneKey,
			Synced: true, Login: source.Login, CreatedAt: time.Now().UTC(),
		},
	}
	publish, cancel := context.WithTimeoutCause(ctx, moveTimeout(source), errdefs.Unavailable.Errorf("the host's disk is too slow"))
	defer cancel()
	if meta.Key, err = m.memoryKey(publish, meta.Shape); err == nil {
		err = stage.Publish(publish, meta)
	}
	if err == nil && ctx.Err() != nil {
		// Whoever left does not know that it is there.
		err = errors.Join(context.Cause(ctx), m.cfg.Templates.DropSnapshot(name))
	}
	if err != nil {
		return fail(errdefs.DiskFull(err))
	}
	m.log.Info("snapshot made", "snapshot", name, "sandbox", id, "paused", paused.Round(time.Millisecond), "took", time.Since(began).Round(time.Millisecond))
	made, err := m.cfg.Templates.Snapshot(ctx, name)
	if err != nil {
		return fail(err)
	}
	return Snapshotted{Snapshot: snapshotInfo(made), Paused: paused}, nil
}

// memoryKey identifies what the memory of a driver's VM of that size depends on
// here. Its kernel and its envd are in it, so they are not part of that. A driver
// that is not here, or cannot restore, is errdefs.Unsupported.
func (m *Manager) memoryKey(ctx context.Context, shape template.Shape) (string, error) {
	driver := m.driverOf(vmm.Handle{Driver: shape.Driver})
	if here := driver.Name(); shape.Driver != here {
		return "", errdefs.Unsupported.Errorf("its memory is of the vmm %s, here is %s", shape.Driver, here)
	}
	restorer, ok := driver.(vmm.Restorer)
	if !ok {
		return "", errdefs.Unsupported.Errorf("the vmm %s cannot restore snapshots", shape.Driver)
	}
	any := Record{ID: bootName, Slot: 1, VCPUs: shape.VCPUs, MemMiB: shape.MemMiB, DiskMiB: shape.DiskMiB}
	return restorer.SnapshotKey(ctx, m.spec(any, template.Template{}))
}

// Snapshots returns the named snapshots, newest first.
func (m *Manager) Snapshots() ([]Snapshot, error) {
	all, err := m.cfg.Templates.Snapshots()
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
func (m *Manager) DeleteSnapshot(name string) error {
	if err := m.cfg.Templates.DropSnapshot(name); err != nil {
		return err
	}
	m.log.Info("snapshot deleted", "snapshot", name)
	return nil
}

// createFrom is Create from a named snapshot: the memory and the disk are its
// source's, the identity is the sandbox's own. If the memory does not fit the
// host any more, the sandbox boots from the disk.
func (m *Manager) createFrom(ctx context.Context, req CreateRequest) (Created, error) {
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
		return Created{}, errdefs.InvalidArgument.Errorf("snapshot %q has %d vcpus, which cannot become %d: name none to take its own", name, shape.VCPUs, req.VCPUs)
	case req.MemMiB != 0 && req.MemMiB != shape.MemMiB:
		return Created{}, errdefs.InvalidArgument.Errorf("snapshot %q has %d MiB of memory, which cannot become %d: name none to take its own", name, shape.MemMiB, req.MemMiB)
	}
	tmpl, err := m.cfg.Templates.Get(snap.Source.Template)
	if errors.Is(err, errdefs.NotFound) {
		return Created{}, errdefs.Unsupported.Errorf("snapshot %q needs the template %q, which is gone", name, snap.Source.Template)
	}
	if err != nil {
		return Created{}, err
	}
	if tmpl.BaseSHA256 != snap.Source.Base {
		return Created{}, errdefs.Unsupported.Errorf("snapshot %q needs the base image that template %q had when it was made; the template has another one now", name, tmpl.Name)
	}
	req.Template, req.VCPUs, req.MemMiB, req.diskMiB = tmpl.Name, snap.Shape.VCPUs, snap.Shape.MemMiB, snap.Shape.DiskMiB
	req.Login = req.Login.Over(snap.Source.Login)
	from := photo{Ready: snap.Ready, token: snap.Source.CloneKey, bootable: snap.Source.Synced}
	key, err := m.memoryKey(ctx, snap.Shape)
	switch {
	case err != nil && !errors.Is(err, errdefs.Unsupported):
		return Created{}, err
	case err != nil:
		from.why = first(err)
	case key != snap.Key:
		from.why = "its memory is of another version of the vmm, another machine or another cpu than here"
	}
	if from.why != "" && !from.bootable {
		return Created{}, errdefs.Unsupported.Errorf(
			"snapshot %q cannot be restored: %s; nor can it be booted, for its disk was not up to date", name, from.why)
	}
	return m.make(ctx, req, tmpl.BaseSHA256, func(ctx context.Context, b *box, took *phases) error {
		if err := m.develop(ctx, b, tmpl, from, took); err != nil {
			return err
		}
		took.log(m.log, b)
		return m.move(b, Running, nil)
	})
}

func newSnapshotName() string {
	var b [6]byte
	rand.Read(b[:]) // never fails
	return "snap-" + hex.EncodeToString(b[:])
}
