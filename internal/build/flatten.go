package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// flatSpare is what an archive may take beyond the files in it.
const flatSpare = 256 << 20

// packTimeout bounds the packing of a root.
const packTimeout = 30 * time.Minute

// addEROFS gives a stack its root as one EROFS, if drivers of the host run it so. Where that
// is not possible, its sandboxes are machines.
func (j *job) addEROFS(s *stage, stack *template.BuildStage) error {
	if !j.e.cfg.Flat || stack.EROFS() {
		return nil
	}
	root, err := stack.Root(j.ctx)
	if err != nil {
		return at(finalizeStep, err)
	}
	// One of the same stack is taken, unless it is removed just now.
	if have := j.e.cfg.Templates.EROFSOf(root.RootSHA256); have != "" && stack.SetEROFS(j.ctx, have) == nil {
		return nil
	}
	err = j.notFlat
	if err == nil {
		err = j.makeEROFS(s, root, stack)
		j.r.setProgress(nil)
	}
	switch {
	case err == nil:
		return nil
	case context.Cause(j.ctx) != nil, errdefs.IsDiskFull(err):
		return at(finalizeStep, fmt.Errorf("pack the root file system: %w", errdefs.DiskFull(err)))
	}
	why := "the host's log says why"
	if errdefs.ClassOf(err) != nil {
		why = sentence(err)
	}
	j.e.cfg.Log.Warn("build has no EROFS", "template", j.spec.Template, "build", j.spec.Build, "err", err)
	j.log.say(Warn, finalizeStep, "[finalize] sandboxes of this template cannot run on gVisor: %s", why)
	return nil
}

// makeEROFS makes the EROFS of a stack, whose root is root.
func (j *job) makeEROFS(s *stage, root template.Template, stack *template.BuildStage) error {
	if err := j.e.room(j.ctx); err != nil {
		return err
	}
	began := time.Now()
	j.log.say(Info, finalizeStep, "[finalize] pack the root file system for sandboxes on gVisor")
	id, err := j.boxOver(s, root)
	if err != nil {
		return err
	}
	g, err := j.e.cfg.Sandboxes.Guest(id)
	if err != nil {
		return err
	}
	tree := filepath.Join(stack.Dir(), "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return errdefs.DiskFull(err)
	}
	defer os.RemoveAll(tree)
	err = flatten(j.ctx, g, tree, 2*root.Bytes()+flatSpare, func(n int64) {
		j.r.setProgress(&image.Progress{Stage: image.Packing, Done: n, Detail: "the root file system"})
	})
	if err != nil {
		return err
	}
	packed := time.Now()
	file := filepath.Join(stack.Dir(), "root.erofs")
	if err := template.PackEROFS(j.ctx, file, tree); err != nil {
		return err
	}
	size := taken(file)
	if err := stack.SetEROFS(j.ctx, file); err != nil {
		return err
	}
	j.log.say(Debug, finalizeStep, "[finalize] %d MiB; the guest took %v, the host %v", size>>20,
		packed.Sub(began).Round(time.Second), time.Since(packed).Round(time.Second))
	return nil
}

// boxOver returns the build sandbox of a stage that has run, or makes one over its layers.
func (j *job) boxOver(s *stage, root template.Template) (string, error) {
	if s.box != "" {
		return s.box, nil
	}
	var err error
	s.box, err = j.e.cfg.Sandboxes.Create(j.ctx, Request{
		Root: root, Project: j.spec.Project, VCPUs: j.build.VCPUs, MemMiB: j.build.MemMiB, DiskMiB: j.build.DiskMiB,
	})
	if err != nil {
		return "", fmt.Errorf("start a build sandbox: %w", err)
	}
	return s.box, nil
}

// flatten makes the empty directory dir the whole root of a guest, with its layers over each
// other. The guest packs it, because nothing on the host reads a file system that a guest
// wrote; its archive is believed no more than that of an image, and may hold limit bytes.
// read is told how many bytes came.
func flatten(ctx context.Context, g Guest, dir string, limit int64, read func(int64)) error {
	ctx, end := context.WithTimeoutCause(ctx, packTimeout, errdefs.TimedOut.Errorf("its root was not packed within %v", packTimeout))
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, w := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := g.Pack(ctx, "/", w)
		w.CloseWithError(err)
		packed <- err
	}()
	err := image.Unpack(ctx, dir, &counted{r: r, told: read}, image.Limits{TotalBytes: limit, FileBytes: limit})
	cancel(errEnough)
	r.CloseWithError(errEnough)
	if e := <-packed; e != nil && (err == nil || !errors.Is(e, errEnough)) {
		return e
	}
	return err
}

// counted tells how much of a stream was read.
type counted struct {
	r    io.Reader
	n    int64
	told func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.n += int64(n); n > 0 {
		c.told(c.n)
	}
	return n, err
}
