package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Builders makes the build sandboxes of a host: guests in which the steps of a template's
// build run. A build sandbox is in the host's ledger and has a record, so that the next
// agent frees it; it is in no list, in no event and in no quota, nothing ends it by time,
// and it starts no program of its template. It is safe for concurrent use.
type Builders struct{ h *holdings }

// Builders returns the build sandboxes of the host.
func (m *Manager) Builders() *Builders { return &Builders{m.holdings} }

// Flat says whether the host's first driver takes a root as one EROFS, so that templates are
// to have one. For another driver than the first it would cost each build more than it gives.
func (bs *Builders) Flat() bool { return bs.h.cfg.Drivers[0].Needs().Flat }

// BuilderRequest describes a build sandbox. Sizes that are zero take the defaults.
type BuilderRequest struct {
	// Root is what the disk is laid over. It need not be a published template, and must
	// stay as it is for as long as the build sandbox is there.
	Root template.Template
	// Project is whose build it is, for the log.
	Project string
	VCPUs   int
	MemMiB  int
	// DiskMiB is the size of an empty disk.
	DiskMiB int
	// Overlay, if not empty, is a file that the disk becomes a copy of: one that Capture
	// made.
	Overlay string
	// Policy is what the build may reach; the host's if zero.
	Policy Policy
}

// Create makes a build sandbox and returns when commands can run in it. ctx bounds the
// making only. On error nothing is left.
func (bs *Builders) Create(ctx context.Context, r BuilderRequest) (ID, error) {
	h := bs.h
	req := CreateRequest{VCPUs: r.VCPUs, MemMiB: r.MemMiB, DiskMiB: r.DiskMiB, Network: r.Policy, build: true}
	if err := req.check(); err != nil {
		return "", err
	}
	var err error
	if req.VMM, err = h.choose(ctx, req, hasDisk); err != nil {
		return "", err
	}
	if err := h.checkPolicy(req.Network); err != nil {
		return "", err
	}
	if _, err := h.disk.reserve(0); err != nil {
		return "", fmt.Errorf("create build sandbox: %w", err)
	}
	root := r.Root
	root.Start = template.Program{}
	src := source{from: FromBoot, tell: tellIdentity, disk: r.Overlay, gone: errNoOverlay}
	b, err := bs.make(ctx, req, root, src)
	if err != nil {
		return "", err
	}
	defer b.unhold()
	h.log.Info("build sandbox made", "sandbox", b.id, "project", r.Project)
	return b.id, nil
}

var errNoOverlay = errdefs.NotFound.Errorf("the disk that the build goes on from is gone")

// make makes a build sandbox that starts from src. It comes back with its op lock held; on
// error nothing is left.
func (bs *Builders) make(ctx context.Context, req CreateRequest, tmpl template.Template, src source) (*box, error) {
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b, err := bs.h.reserve(ctx, req, tmpl, abort)
	if err != nil {
		return nil, fmt.Errorf("create build sandbox: %w", err)
	}
	if _, err := bs.h.start(ctx, b, tmpl, src); err != nil {
		err = bs.h.createFailed(ctx, b, err)
		b.unhold()
		return nil, err
	}
	b.setAbort(nil)
	return b, nil
}

// find returns the box of a build sandbox.
func (bs *Builders) find(id ID) (*box, error) {
	b := bs.h.lookup(id)
	if b == nil || b.state() != Building {
		return nil, errdefs.NotFound.Errorf("build sandbox %s does not exist", id)
	}
	return b, nil
}

// hold returns a build sandbox with its op lock held, which answers.
func (bs *Builders) hold(ctx context.Context, id ID, doing string) (*box, error) {
	b, err := bs.find(id)
	if err != nil {
		return nil, err
	}
	if err := b.hold(ctx, doing); err != nil {
		return nil, err
	}
	_, err = bs.find(id)
	if err == nil {
		err = context.Cause(b.op.alive)
	}
	if err == nil && b.op.guest == nil { // it could not be freed yet
		err = errdefs.Unavailable.Errorf("build sandbox %s is gone", id)
	}
	if err != nil {
		b.unhold()
		return nil, err
	}
	return b, nil
}

// Capture makes the new file path a copy of the disk of a build sandbox, whose programs
// stand still and have written all to it while it is copied. Its room is reserved before.
// On error there is no file, and the programs go on.
func (bs *Builders) Capture(ctx context.Context, id ID, path string) error {
	h := bs.h
	b, err := bs.hold(ctx, id, "captured")
	if err != nil {
		return err
	}
	defer b.unhold()
	limit := moveTimeout(b.record())
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errdefs.Unavailable.Errorf("the disk was not copied within %s", limit))
	defer cancel()
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	b.setAbort(abort)
	copyDisk := func(ctx context.Context, overlay string) error {
		copied, err := h.disk.reserve(takenBytes(overlay))
		if err != nil {
			return err
		}
		defer copied()
		return h.cfg.Templates.CloneOverlay(ctx, path, overlay)
	}
	_, err = h.freeze(ctx, b, freezing{op: opCapture, what: Hibernation{FilesOnly: true}, disk: copyDisk})
	if err != nil {
		// The copy is complete if it is the guest that does not go on.
		return errors.Join(err, remove(path))
	}
	return nil
}

// Destroy ends a build sandbox for good. It is no error if there is none.
func (bs *Builders) Destroy(ctx context.Context, id ID) error {
	b, err := bs.find(id)
	if err != nil {
		return nil
	}
	return bs.h.destroy(ctx, b)
}

// Guest returns the guest of a build sandbox.
func (bs *Builders) Guest(id ID) (*BuildGuest, error) {
	if _, err := bs.find(id); err != nil {
		return nil, err
	}
	return &BuildGuest{bs, id}, nil
}

// BuildGuest is the guest of a build sandbox. Calls wait for an operation in progress, and
// end with the guest.
type BuildGuest struct {
	builders *Builders
	id       ID
}

// maxBuildOutput bounds what a command of a build may write if it says nothing else.
const maxBuildOutput = 64 << 20

// Exec runs a command to its end, as root if it names no user. output gets what it writes
// as it comes; Result has none of it. What it leaves in the background ends with it.
func (g *BuildGuest) Exec(ctx context.Context, cmd Command, output func(stderr bool, data []byte)) (result Result, err error) {
	cmd.Output, cmd.Whole = output, true
	if cmd.MaxOutput == 0 {
		cmd.MaxOutput = maxBuildOutput
	}
	err = g.call(ctx, "exec", func(ctx context.Context, guest Guest) (err error) {
		result, err = guest.Exec(ctx, cmd)
		return err
	})
	return result, err
}

// Unpack puts the entries of a tar stream below a directory of the guest; see
// guest.Client.Unpack. Each entry belongs to the ids that it says.
func (g *BuildGuest) Unpack(ctx context.Context, dir string, stream io.Reader) error {
	return g.call(ctx, "unpack", func(ctx context.Context, guest Guest) error { return guest.Unpack(ctx, dir, "", stream) })
}

// Pack writes what is at a path of the guest as a tar stream to w; see guest.Client.Pack.
func (g *BuildGuest) Pack(ctx context.Context, path string, w io.Writer) error {
	return g.call(ctx, "pack", func(ctx context.Context, guest Guest) error { return guest.Pack(ctx, path, w) })
}

// call calls the guest. Where the VM ends, that is the error.
func (g *BuildGuest) call(ctx context.Context, what string, do func(context.Context, Guest) error) error {
	b, err := g.builders.hold(ctx, g.id, "called")
	if err != nil {
		return err
	}
	lease := &Lease{Alive: b.op.alive, guest: b.op.guest}
	b.unhold()
	ctx, cancel := lease.Context(ctx)
	defer cancel()
	err = do(ctx, lease.guest)
	if errors.Is(err, errdefs.Unavailable) {
		if ended := lease.Ended(ctx); ended != nil {
			err = ended
		}
	}
	if err != nil {
		return fmt.Errorf("%s in build sandbox %s: %w", what, g.id, err)
	}
	return nil
}
