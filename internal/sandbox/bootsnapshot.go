package sandbox

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// bootVersion tells boot snapshots apart that other code made of the same
	// parts.
	bootVersion = "1"
	// bootName is a guest's host name until it is told its own, which is as
	// long: files that hold it are written in place.
	bootName = "sb-0000000000000000"
	// saveTimeout bounds the making of a boot snapshot; perGiBMove is added for
	// each GiB of memory.
	saveTimeout = time.Minute
)

// bootSource looks for the boot snapshot that fits a new sandbox. The first create that
// finds none is to make it; others wait for that. It never fails: without
// a snapshot the sandbox boots.
func (v *vms) bootSource(ctx context.Context, rec Record, tmpl template.Template) source {
	cold := func(why string, err error) source {
		if err != nil {
			v.log.Warn("no boot snapshot, the sandbox boots", "sandbox", rec.ID, "why", why, "err", err)
		}
		return source{from: FromBoot, why: why, tell: tellIdentity}
	}
	key, err := v.bootKey(ctx, rec, tmpl)
	if errors.Is(err, errNoRestorer) {
		return cold("the driver cannot restore", nil)
	}
	if err != nil {
		return cold("the snapshot's key is not known", err)
	}
	look := func() (source, error) {
		ready, err := v.cfg.Templates.Ready(ctx, tmpl.ID, tmpl.Build, key)
		return v.fromBootSnapshot(key, ready), err
	}
	src, err := look()
	switch {
	case err == nil:
		return src
	case errors.Is(err, errdefs.Corrupt):
		v.log.Warn("boot snapshot is damaged, another is made", "template", tmpl.Name, "key", key, "err", err)
	case !errors.Is(err, errdefs.NotFound):
		return cold("the snapshot cannot be read", err)
	}
	limit := v.cfg.BootTimeout
	if hasProgram(tmpl) {
		limit += programTime
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stage, err := v.cfg.Templates.StageReady(wait, tmpl.ID, tmpl.Build)
	if err != nil {
		return cold("the snapshot cannot be made", err)
	}
	if src, err := look(); err == nil { // made while we waited
		stage.Discard()
		return src
	}
	return source{from: FromBoot, why: "the first of its kind", tell: tellIdentity, stage: &stage, stageMeta: template.Meta{
		Key:   key,
		Shape: template.Shape{Driver: v.driverOf(rec).Name(), VCPUs: rec.VCPUs, MemMiB: rec.MemMiB, DiskMiB: rec.DiskMiB},
	}}
}

// fromBootSnapshot is what a sandbox starts from where there is a boot snapshot.
func (h *host) fromBootSnapshot(key string, ready template.Ready) source {
	return source{
		from: FromReady, memory: ready.Dir, disk: ready.Overlay, tell: tellIdentity, bootKey: key, token: ready.BootToken,
		boot: &source{from: FromBoot, tell: tellIdentity},
		gone: errors.New("the boot snapshot was removed"),
	}
}

// errNoRestorer is the error of bootKey where the driver restores nothing.
var errNoRestorer = errdefs.Unsupported.Errorf("the vmm cannot restore snapshots")

// bootKey is the digest of all that a boot snapshot depends on. Two
// sandboxes with the same key start from the same bytes.
func (h *host) bootKey(ctx context.Context, rec Record, tmpl template.Template) (string, error) {
	driver := h.driverOf(rec)
	restorer, ok := driver.(vmm.Restorer)
	if !ok {
		return "", errNoRestorer
	}
	rec.ID, rec.Slot = bootName, 1
	spec := h.spec(driver, rec, tmpl)
	machine, err := restorer.SnapshotKey(ctx, spec)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	for _, part := range append([]string{
		bootVersion, machine, spec.BootKey(),
		tmpl.KernelSHA256, tmpl.InitrdSHA256, tmpl.EnvdSHA256, tmpl.RootSHA256,
		fmt.Sprint(spec.VCPUs), fmt.Sprint(spec.MemMiB), fmt.Sprint(rec.DiskMiB),
	}, append(imageKey(driver, tmpl), programKey(tmpl)...)...) {
		fmt.Fprintf(sum, "%d:%s\n", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}

// bootKeyOf is the key of the boot snapshot that a request would start from.
func (h *host) bootKeyOf(ctx context.Context, req CreateRequest, tmpl template.Template) (string, error) {
	rec := Record{VMM: req.VMM, VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: cmp.Or(req.DiskMiB, h.cfg.OverlayMiB)}
	return h.bootKey(ctx, rec, tmpl)
}

// makeBootSnapshot makes a boot snapshot of a guest that has booted, whose template's
// program runs, and that has not been told what it is. A failure costs the snapshot only, unless the guest does not
// go on afterwards. Called with the op lock held.
func (v *vms) makeBootSnapshot(ctx context.Context, b *box, tmpl template.Template, src source) error {
	rec := b.record()
	ctx, cancel := context.WithTimeout(ctx, saveTimeout+perGiB(perGiBMove, rec.MemMiB))
	defer cancel()
	began := time.Now()
	copied, err := v.disk.reserve(int64(rec.MemMiB)<<20 + v.store.takenBytes(b.id))
	if err == nil {
		defer copied()
		f := freezing{op: opBoot, dir: src.stage.Dir, disk: src.stage.AddOverlay}
		if src.token != "" {
			f.programs = v.cfg.Guests(rec.HostIP, src.token)
			defer f.programs.Close()
		}
		_, err = v.freeze(ctx, b, f)
	}
	if err == nil {
		meta := src.stageMeta
		meta.BootToken = src.token
		err = src.stage.Publish(ctx, meta)
	}
	if err == nil {
		v.log.Info("boot snapshot made", "template", tmpl.Name, "key", src.stageMeta.Key, "vcpus", rec.VCPUs, "memory", rec.MemMiB,
			"took", time.Since(began).Round(time.Millisecond))
		return nil
	}
	if cause := context.Cause(b.op.alive); cause != nil || errors.Is(err, errStuck) {
		return errors.Join(cause, err)
	}
	if src.unmade != nil {
		src.unmade(err)
	}
	v.log.Warn("boot snapshot not made", "template", tmpl.Name, "err", err)
	return nil
}

// Prepare makes the boot snapshot that a request would start from, unless it
// is there, by making and destroying a sandbox; made says whether it had to.
func (m *Manager) Prepare(ctx context.Context, req CreateRequest) (made bool, err error) {
	if err := req.check(); err != nil {
		return false, err
	}
	tmpl, err := m.cfg.Templates.Get(req.Template)
	if err != nil {
		return false, err
	}
	if req.VMM, err = m.choose(ctx, req, canRun(req, tmpl)); err != nil {
		return false, err
	}
	if _, err := restorerOf(m.driverOf(Record{VMM: req.VMM})); err != nil {
		return false, err
	}
	rec := Record{
		ID: bootName, Slot: 1, VMM: req.VMM, VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: cmp.Or(req.DiskMiB, m.cfg.OverlayMiB),
	}
	there := func() (bool, error) {
		src := m.bootSource(ctx, rec, tmpl)
		defer src.close()
		if src.memory == "" && src.stage == nil {
			return false, fmt.Errorf("prepare boot snapshot: %s", src.why)
		}
		return src.memory != "", nil
	}
	if ok, err := there(); ok || err != nil {
		return false, err
	}
	info, err := m.Create(ctx, req)
	if err != nil {
		return false, err
	}
	if err := m.Destroy(context.WithoutCancel(ctx), info.ID); err != nil {
		return false, err
	}
	ok, err := there()
	if err == nil && !ok {
		err = errors.New("prepare boot snapshot: none was made, the log says why")
	}
	return true, err
}

// readAhead looks at the boot snapshot of the default kind, which is read and
// checked the first time: the first create need not wait for that.
func (h *host) readAhead(ctx context.Context) {
	var req CreateRequest
	if req.check() != nil {
		return
	}
	tmpl, err := h.cfg.Templates.Get(req.Template)
	if err != nil {
		return // the first create says why
	}
	if req.VMM, err = h.choose(ctx, req, canRun(req, tmpl)); err != nil {
		return
	}
	if key, err := h.bootKeyOf(ctx, req, tmpl); err == nil {
		_, _ = h.cfg.Templates.Ready(ctx, tmpl.ID, tmpl.Build, key)
	}
}
