package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

func flatRig(t *testing.T) *rig {
	t.Helper()
	testenv.Root(t) // the trees have owners
	testenv.Program(t, "mkfs.erofs", "fsck.erofs")
	r := newRig(t)
	r.cfg.Flat = true
	return r
}

// erofs is the EROFS of a build.
func (r *rig) erofs(spec Spec) template.Layer {
	r.t.Helper()
	info, b, err := r.lookup(spec.Template, spec.Build)
	if err != nil {
		r.t.Fatal(err)
	}
	root, err := r.store.Root(info, b)
	if err != nil {
		r.t.Fatal(err)
	}
	return root.EROFS
}

// The EROFS of a build has all that its guest had at the end, and is made once.
func TestBuildsEROFS(t *testing.T) {
	r := flatRig(t)
	steps := []Step{run("mkdir d; echo said >d/file; ln -s d/file link; chmod 4755 d/file"), run("echo more >>d/file")}
	spec, _ := r.made(from(steps...))
	flat := r.erofs(spec)
	out := filepath.Join(t.TempDir(), "out")
	if err := (tool.Command{Name: "fsck.erofs", Args: []string{"--extract=" + out, flat.Path}}).Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(out, "link")); err != nil || string(text) != "said\nmore\n" {
		t.Errorf("read %q, %v", text, err)
	}
	if r.boxes.created != 1 || r.images.flats != 0 || !strings.Contains(r.text(spec), "[finalize] pack the root file system") {
		t.Errorf("%d build sandboxes, %d images\n%s", r.boxes.created, r.images.flats, r.text(spec))
	}
	var sames []Spec
	again, ran := r.made(from(steps...))
	sames = append(sames, again)
	above, _ := r.made(Spec{Stages: []Stage{{From: Source{Template: "t"}, Steps: []Step{{Kind: Env, Args: []string{"A", "1"}}}}}})
	sames = append(sames, above)
	for _, same := range sames {
		a, errA := os.Stat(flat.Path)
		b, errB := os.Stat(r.erofs(same).Path)
		if err := errors.Join(errA, errB); err != nil || !os.SameFile(a, b) {
			t.Errorf("not shared, %v", err)
		}
	}
	if len(ran) != 0 || r.boxes.created != 1 {
		t.Errorf("ran %q in %d build sandboxes", ran, r.boxes.created)
	}
}

// A build on a stack without an EROFS, of before the host had a driver for it, boots once.
func TestBuildAddsEROFSToWhatWasBuilt(t *testing.T) {
	r := flatRig(t)
	r.cfg.Flat = false
	spec, _ := r.made(from(run("echo said >file")))
	if flat := r.erofs(spec); flat.Path != "" {
		t.Errorf("there is one: %+v", flat)
	}
	r.cfg.Flat = true
	again, ran := r.made(from(run("echo said >file")))
	if flat := r.erofs(again); flat.Path == "" || len(ran) != 0 || r.boxes.created != 2 {
		t.Errorf("EROFS %+v, ran %q, %d build sandboxes", flat, ran, r.boxes.created)
	}
}

// That of an image alone is the image's.
func TestImageHasEROFS(t *testing.T) {
	r := flatRig(t)
	spec, _ := r.made(from())
	text, err := os.ReadFile(r.erofs(spec).Path)
	if err != nil || !strings.HasPrefix(string(text), "flat root of sha256:") || r.boxes.created != 0 || r.images.flats != 1 {
		t.Errorf("EROFS %q, %v; %d build sandboxes, %d images", text, err, r.boxes.created, r.images.flats)
	}
	r.images.flatErr = errdefs.Unsupported.Errorf("it has too many files")
	spec, _ = r.made(Spec{Stages: []Stage{{From: Source{Image: "other", Either: true}}}})
	why := strings.Contains(r.text(spec), "cannot run on gVisor: it has too many files")
	if flat := r.erofs(spec); flat.Path != "" || r.boxes.created != 0 || !why {
		t.Errorf("EROFS %+v, %d build sandboxes\n%s", flat, r.boxes.created, r.text(spec))
	}
}

// What a guest packs is not believed. A build whose root cannot be packed is ready all the
// same, for machines.
func TestBuildOfGuestThatLies(t *testing.T) {
	r := flatRig(t)
	for name, pack := range map[string]func(ctx context.Context, w io.Writer) error{
		"leads out": func(_ context.Context, w io.Writer) error {
			out := tar.NewWriter(w)
			return errors.Join(out.WriteHeader(&tar.Header{Name: "../../escaped", Typeflag: tar.TypeReg}), out.Close())
		},
		"has no end": func(ctx context.Context, w io.Writer) error {
			out := tar.NewWriter(w)
			for i := 0; ; i++ {
				h := &tar.Header{Name: fmt.Sprintf("%d/%d", i%100, i), Typeflag: tar.TypeReg, Size: 512 << 20}
				if err := out.WriteHeader(h); err != nil {
					return err
				}
				for zeros := make([]byte, 1<<20); h.Size > 0; h.Size -= int64(len(zeros)) {
					if _, err := out.Write(zeros); err != nil {
						return err
					}
				}
			}
		},
		"is no archive": func(_ context.Context, w io.Writer) error {
			_, err := w.Write(make([]byte, 100))
			return err
		},
		"breaks off": func(_ context.Context, w io.Writer) error {
			return errdefs.Unavailable.Errorf("the guest is gone")
		},
	} {
		r.boxes.pack = pack
		spec, _ := r.made(from(run("echo " + name)))
		warned := strings.Contains(r.text(spec), "warn finalize [finalize] sandboxes of this template cannot run on gVisor")
		if flat := r.erofs(spec); flat.Path != "" || !warned {
			t.Errorf("%s: EROFS %+v\n%s", name, flat, r.text(spec))
		}
	}
	if found, err := filepath.Glob(filepath.Join(r.dir, "*", "escaped")); err != nil || len(found) != 0 {
		t.Error(found, err)
	}
}

func TestCancelWhileRootIsPacked(t *testing.T) {
	r := flatRig(t)
	begun := make(chan struct{})
	r.boxes.pack = func(ctx context.Context, w io.Writer) error {
		close(begun)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	spec := r.begin(from(run("true")))
	<-begun
	if err := r.Cancel(t.Context(), spec.Template, spec.Build); err != nil {
		t.Fatal(err)
	}
	if b := r.end(spec); b.Status != template.StatusError || !strings.Contains(b.Reason.Message, "cancelled") {
		t.Errorf("build is %s: %+v", b.Status, b.Reason)
	}
}
