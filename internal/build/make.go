package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// job is a build that runs. It is for one goroutine.
type job struct {
	e     *Engine
	r     *running
	ctx   context.Context
	spec  Spec
	log   *buildLog
	build template.Build
	dir   string // for its files, removed with it

	stages []*stage
	images map[string]*stage // those that only a COPY names
	steps  int               // numbered so far
	stacks []*template.BuildStage
	ran    map[string]bool // the keys of steps that were run and are in the cache
	shown  map[*planned]bool
	files  int // names of files in dir
	// notFlat is why the image has no EROFS.
	notFlat error
}

// make makes the template's build, up to the moment before it is ready.
func (e *Engine) make(ctx context.Context, r *running) (err error) {
	_, b, err := e.lookup(r.spec.Template, r.spec.Build)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Join(e.cfg.Dir, workDir), "build-")
	if err != nil {
		return fmt.Errorf("begin build: %w", errdefs.DiskFull(err))
	}
	j := &job{
		e: e, r: r, ctx: ctx, spec: r.spec, log: r.log, build: b, dir: dir,
		images: map[string]*stage{}, ran: map[string]bool{}, shown: map[*planned]bool{},
	}
	defer j.discard()
	release, err := j.hold(ctx)
	if err != nil {
		return err
	}
	unpin, kept, err := j.prepare()
	release()
	if err != nil {
		return err
	}
	defer unpin()
	result := j.stages[len(j.stages)-1]
	stack := kept
	if stack == nil {
		if stack, err = j.complete(result); err != nil {
			return err
		}
	} else {
		j.showCached(result, len(result.steps))
	}
	if err := j.addEROFS(result, stack); err != nil {
		return err
	}
	j.endGuests() // their memory is for the template's first guest
	return j.publish(result, stack, kept != nil)
}

// endGuests destroys the build sandboxes.
func (j *job) endGuests() {
	for _, s := range j.all() {
		if s.box == "" {
			continue
		}
		if err := j.e.cfg.Sandboxes.Destroy(context.WithoutCancel(j.ctx), s.box); err != nil {
			j.e.cfg.Log.Error("build sandbox not destroyed", "sandbox", s.box, "err", err)
		}
		s.box = ""
	}
}

// discard frees what the build has of the host.
func (j *job) discard() {
	j.endGuests()
	for _, stack := range j.stacks {
		stack.Discard()
	}
	if err := os.RemoveAll(j.dir); err != nil {
		j.e.cfg.Log.Error("directory of a build not removed", "dir", j.dir, "err", err)
	}
}

func (j *job) all() []*stage {
	all := append([]*stage(nil), j.stages...)
	for _, s := range j.images {
		all = append(all, s)
	}
	return all
}

// prepare plans the stages and brings the root file systems that are needed. kept is the
// stack of an earlier build that has the same content, nil if there is none.
func (j *job) prepare() (unpin func(), kept *template.BuildStage, err error) {
	for i := range j.spec.Stages {
		s, err := j.plan(i)
		if err != nil {
			return nil, nil, err
		}
		j.stages = append(j.stages, s)
	}
	var keys []string
	for _, s := range j.all() {
		keys = append(keys, s.captures(len(s.steps))...)
	}
	unpin = j.e.cache.pin(keys)
	result := j.stages[len(j.stages)-1]
	j.lookUp(result)
	if result.cached() {
		if kept, err = j.inherit(result); err != nil || kept != nil {
			if err != nil {
				unpin()
			}
			return unpin, kept, err
		}
	}
	for _, s := range j.all() {
		if s.need {
			if _, err := j.stackOf(s); err != nil {
				unpin()
				return nil, nil, at(baseStep, err)
			}
		}
	}
	return unpin, nil, nil
}

// inherit returns the layers of an earlier build with the content of a stage; nil if
// there is none.
func (j *job) inherit(s *stage) (*template.BuildStage, error) {
	r, ok := j.e.cache.result(s.key())
	if !ok {
		return nil, nil
	}
	info, b, err := j.e.lookup(r.Template, r.Build)
	if err != nil || b.Status != template.StatusReady {
		return nil, nil
	}
	root, err := j.e.cfg.Templates.Root(info, b)
	if err != nil {
		return nil, nil
	}
	stack, err := j.newStack()
	if err != nil {
		return nil, at(baseStep, err)
	}
	if err := stack.Inherit(root); err != nil {
		j.e.cfg.Log.Warn("layers not inherited", "template", r.Template, "build", r.Build, "err", err)
		return nil, nil // it was removed just now
	}
	return stack, nil
}

// complete runs what is missing of a stage and returns its layers.
func (j *job) complete(s *stage) (*template.BuildStage, error) {
	if err := j.runStage(s); err != nil {
		return nil, err
	}
	stack := s.base.stack
	if s.lastContent() < 0 {
		if top := s.base.top.Path; top != "" { // another stage goes on with it
			if err := stack.AddLayer(j.ctx, top); err != nil {
				return nil, at(finalizeStep, fmt.Errorf("add layer: %w", err))
			}
		}
		return stack, nil
	}
	if err := j.bring(s); err != nil {
		return nil, at(finalizeStep, err)
	}
	// In the stack's own directory the file is taken over, and not copied.
	path := filepath.Join(stack.Dir(), "layer.ext4")
	err := os.Rename(s.overlay, path)
	if err == nil {
		s.overlay = ""
		err = stack.AddLayer(j.ctx, path)
	}
	if err != nil {
		return nil, at(finalizeStep, fmt.Errorf("add layer: %w", errdefs.DiskFull(err)))
	}
	return stack, nil
}

// bring makes the disk after a stage's last step that was captured, if it is not here.
func (j *job) bring(s *stage) error {
	if s.overlay != "" {
		return nil
	}
	keys, top := s.captures(s.resume), s.base.top
	if len(keys) == 0 && top.Path == "" {
		return nil
	}
	path := j.file("disk")
	if top.Path != "" {
		if err := j.writable(path, top); err != nil {
			return fmt.Errorf("copy the highest layer: %w", errdefs.DiskFull(err))
		}
	}
	if err := j.e.cache.restore(j.ctx, path, keys); err != nil {
		return err
	}
	s.overlay = path
	return nil
}

// writable makes the new file path a copy of a layer, for a guest to write on. A larger
// disk that the build asks for is as large; the guest makes its file system so.
func (j *job) writable(path string, layer template.Layer) error {
	if err := j.e.room(j.ctx); err != nil {
		return err
	}
	if err := j.e.cfg.Templates.CloneOverlay(j.ctx, path, layer.Path); err != nil {
		return err
	}
	return os.Truncate(path, j.diskBytes(layer))
}

// diskBytes is the size of the disk of a build that goes on with a layer.
func (j *job) diskBytes(layer template.Layer) int64 {
	return max(layer.Size, int64(j.build.DiskMiB)<<20)
}

// file is the path of a new file of the job.
func (j *job) file(what string) string {
	j.files++
	return filepath.Join(j.dir, fmt.Sprintf("%s-%d", what, j.files))
}

// publish makes the layers the build, boots it once, and keeps that for builds of the
// same content.
func (j *job) publish(s *stage, stack *template.BuildStage, kept bool) error {
	making := template.Making{
		Defaults: template.Defaults{VCPUs: j.build.VCPUs, MemMiB: j.build.MemMiB, OverlayMiB: j.build.DiskMiB},
		Start:    s.last.program(j.spec),
		Image:    s.base.imageName, From: s.base.templateName, History: j.history(s), Recipe: s.key(),
	}
	if len(s.last.shell) > 0 {
		making.Start.Shell = s.last.shell
	}
	if j.spec.E2B {
		making.Start.Shell = []string{"/bin/bash", "-l", "-c"}
	}
	making.Defaults.User, making.Defaults.Workdir = withoutGroup(s.last.user), s.last.workdir
	making.Start.User = making.Defaults.User
	if j.spec.KeepEnv {
		making.Defaults.Env = s.last.env
	}
	if making.Start.Start != "" && making.Start.Ready == "" {
		making.Start.Ready = "sleep 20"
	}
	if _, _, err := stack.Publish(j.ctx, making); err != nil {
		return at(finalizeStep, fmt.Errorf("publish: %w", errdefs.DiskFull(err)))
	}
	if p := making.Start; !kept || p.Start != "" || p.Ready != "" {
		if err := j.start(making.Start); err != nil {
			return err
		}
	}
	if err := j.e.cache.setResult(s.key(), result{j.spec.Template, j.spec.Build}); err != nil {
		j.e.cfg.Log.Warn("result of a build not kept", "build", j.spec.Build, "err", err)
	}
	return context.Cause(j.ctx)
}

// withoutGroup is an account as a guest's daemon reads it: a group that has a name is that
// of the account.
func withoutGroup(user string) string {
	name, group, _ := strings.Cut(user, ":")
	if _, ok := number(group); ok {
		return user
	}
	return name
}

// start boots the published build once.
func (j *job) start(p template.Program) error {
	if p.Start != "" {
		j.log.say(Info, finalizeStep, "[start] %s", p.Start)
		j.log.say(Info, finalizeStep, "[ready] %s", p.Ready)
	}
	err := j.e.cfg.Sandboxes.Prepare(j.ctx, j.spec.Template, j.spec.Build, func(level, step, line string) {
		j.log.line(level, finalizeStep, "["+step+"] "+line)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errdefs.Unsupported) && p.Start == "": // its sandboxes boot, each
		return nil
	}
	return at(finalizeStep, err)
}

// history says how the template came about.
func (j *job) history(s *stage) (h []template.HistoryEntry) {
	now := time.Now().UTC()
	from := s.base.imageName
	if s.base.templateName != "" {
		from = "template " + s.base.templateName
	}
	if from == "" {
		from = "scratch"
	}
	h = append(h, template.HistoryEntry{CreatedBy: "FROM " + from, CreatedAt: now, Empty: true})
	for _, p := range s.steps {
		text := p.Text
		if text == "" {
			text = strings.TrimSpace(p.Kind + " " + strings.Join(p.Args, " "))
		}
		entry := template.HistoryEntry{CreatedBy: text, CreatedAt: now, Empty: !p.content}
		if info, ok := j.e.cache.read(p.key); ok {
			entry.Bytes = info.Bytes
		}
		h = append(h, entry)
	}
	return h
}
