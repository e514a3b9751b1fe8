package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// base is what a stage stands on.
type base struct {
	key   string
	state *state
	e2b   bool
	// bare says that it is no template, and may lack what E2B's clients ask for.
	bare bool

	// One of these is set, or none for scratch.
	image    *image.Image
	template *template.Template
	// from names it in the record of the template.
	imageName, templateName string

	stack *template.BuildStage // once it is needed
	// top is a name of the template's highest layer, if that is not in stack: see goesOn.
	top template.Layer
}

// goesOn says that a build on a template adds no layer: the template has as many as there
// can be. Its highest layer is a disk that a guest wrote over the others, so the build
// sandbox begins with a copy of that and writes on, and the result takes its place. The
// layers below stay shared.
func (b *base) goesOn() bool {
	return b.template != nil && len(b.template.Layers) >= template.MaxLayers
}

// resolve finds what FROM names. Images are pulled or imported.
func (j *job) resolve(from Source) (*base, error) {
	b := &base{e2b: j.spec.E2B, bare: true}
	var what string
	switch {
	case from.Scratch:
		b.state, what = ofImage(image.Config{}, j.spec.E2B), "scratch"
	case from.Template != "":
		if err := j.resolveTemplate(b, from.Template); err != nil {
			return nil, err
		}
	case from.Archive != "":
		j.log.say(Info, baseStep, "[base] import the image")
		img, err := j.importImage(from.Archive)
		if err != nil {
			return nil, err
		}
		b.image = &img
	default:
		if from.Either {
			err := j.resolveTemplate(b, from.Image)
			if err == nil {
				break
			}
			// A name that no template can have, or has, is that of an image.
			if !errors.Is(err, errdefs.NotFound) && !errors.Is(err, errdefs.InvalidArgument) {
				return nil, err
			}
		}
		j.log.say(Info, baseStep, "[base] FROM %s", from.Image)
		img, err := j.e.cfg.Images.Pull(j.ctx, from.Image, from.Credentials, j.transfer)
		j.r.setProgress(nil)
		if err != nil {
			return nil, err // it names the image
		}
		b.image = &img
	}
	if img := b.image; img != nil {
		if len(img.Config.OnBuild) > 0 {
			j.log.say(Warn, baseStep, "[base] the image's ONBUILD instructions are not run")
		}
		b.state, what, b.imageName = ofImage(img.Config, j.spec.E2B), "image "+img.Digest, img.Reference+"@"+img.Digest
	}
	if t := b.template; t != nil {
		what = "template " + t.ID + ":" + t.Build + " " + t.RootSHA256
		b.templateName, b.bare = t.ID+":"+t.Build, false
	}
	b.key = keyOf("", keyVersion, j.spec.Project, what, strconv.Itoa(j.build.DiskMiB), strconv.FormatBool(j.spec.E2B), provisionVersion)
	return b, nil
}

func (j *job) resolveTemplate(b *base, name string) error {
	templates := j.e.cfg.Templates
	info, build, err := templates.Resolve(j.spec.Project, name)
	if err != nil {
		return err
	}
	if info.Source != "" {
		return errdefs.InvalidArgument.Errorf("%q is a snapshot of a sandbox, from which no template is built", name)
	}
	root, err := templates.Root(info, build)
	if err != nil {
		return err
	}
	made, err := templates.Inspect(info.ID, build.ID)
	if err != nil {
		return err
	}
	j.log.say(Info, baseStep, "[base] FROM template %s", name)
	b.template, b.state = &root, ofTemplate(made.Making, j.spec.E2B)
	if j.spec.E2B && info.Project == "" && slices.Contains(info.Names, template.DefaultName) {
		// Its own account is root, and E2B's clients know it as their base.
		b.state.user, b.state.workdir = e2bUser, homeOf(e2bUser)
	}
	return nil
}

// transfer keeps the progress of a pull or an import.
func (j *job) transfer(p image.Progress) { j.r.setProgress(&p) }

func (j *job) importImage(hash string) (image.Image, error) {
	f, err := j.e.open(j.spec.Project, hash)
	if err != nil {
		return image.Image{}, err
	}
	defer f.Close()
	img, err := j.e.cfg.Images.Import(j.ctx, f, "import", j.transfer)
	j.r.setProgress(nil)
	return img, err
}

// stackOf returns the layers that a stage stands on, to boot from or to publish. It is
// called while images are held.
func (j *job) stackOf(s *stage) (*template.BuildStage, error) {
	b := s.base
	if b.stack != nil {
		return b.stack, nil
	}
	stack, err := j.newStack()
	if err != nil {
		return nil, err
	}
	switch {
	case b.goesOn() && slices.ContainsFunc(j.all(), func(s *stage) bool { return s.base == b && s.lastContent() >= 0 }):
		below := *b.template
		n := len(below.Layers) - 1
		top := below.Layers[n]
		top.Path, below.Layers = j.file("layer"), below.Layers[:n]
		below.EROFS = template.Layer{} // of all layers
		if err = stack.Inherit(below); err == nil {
			err = keepName(top.Path, b.template.Layers[n].Path)
		}
		b.top = top
	case b.template != nil:
		err = stack.Inherit(*b.template)
	case b.image != nil:
		var path string
		path, err = j.e.cfg.Images.Root(j.ctx, *b.image, j.transfer)
		j.r.setProgress(nil)
		if err == nil {
			err = stack.AddLayer(j.ctx, path)
		}
		if err == nil && j.asIs(b) {
			err = j.flatImage(b, stack)
		}
	default:
		path := filepath.Join(stack.Dir(), "scratch.ext4")
		if err = template.NewRoot(j.ctx, path); err == nil {
			err = stack.AddLayer(j.ctx, path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("prepare the root file system: %w", err)
	}
	b.stack = stack
	return stack, nil
}

// keepName gives a layer one more name, for as long as the build needs it.
func keepName(name, layer string) error {
	err := os.Link(layer, name)
	if errors.Is(err, fs.ErrNotExist) {
		return errdefs.NotFound.Errorf("the template was removed")
	}
	return errdefs.DiskFull(err)
}

// asIs says whether the template is to be a base without any change of its files.
func (j *job) asIs(b *base) bool {
	result := j.stages[len(j.stages)-1]
	return j.e.cfg.Flat && result.base == b && result.lastContent() < 0
}

// flatImage gives a stack that is an image alone the image's EROFS, which no guest has to
// make.
func (j *job) flatImage(b *base, stack *template.BuildStage) error {
	path, err := j.e.cfg.Images.Flat(j.ctx, *b.image, j.transfer)
	j.r.setProgress(nil)
	if err == nil {
		return stack.SetEROFS(j.ctx, path)
	}
	if context.Cause(j.ctx) != nil || errdefs.IsDiskFull(err) {
		return err
	}
	j.notFlat = err
	return nil
}

// newStack begins a stack that ends with the job.
func (j *job) newStack() (*template.BuildStage, error) {
	stack, err := j.e.cfg.Templates.StageBuild(j.ctx, j.spec.Template, j.spec.Build)
	if err == nil {
		j.stacks = append(j.stacks, stack)
	}
	return stack, err
}

// hold keeps images until the returned function is called.
func (j *job) hold(ctx context.Context) (func(), error) {
	release, err := j.e.cfg.Images.Hold(ctx)
	if err != nil {
		return nil, at(baseStep, err)
	}
	return release, nil
}
