// Package build makes templates of images and steps: it runs the steps of a build in
// build sandboxes, and caches what each has changed.
package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Images brings images; *image.Store is one.
type Images interface {
	Hold(ctx context.Context) (release func(), err error)
	Pull(ctx context.Context, ref string, c image.Credentials, progress func(image.Progress)) (image.Image, error)
	Import(ctx context.Context, r io.Reader, name string, progress func(image.Progress)) (image.Image, error)
	Root(ctx context.Context, img image.Image, progress func(image.Progress)) (string, error)
	// Flat is Root for an EROFS: errdefs.Unsupported if the image is too large for one.
	Flat(ctx context.Context, img image.Image, progress func(image.Progress)) (string, error)
}

// Sandboxes makes build sandboxes; OfHost returns those of a host.
type Sandboxes interface {
	Create(ctx context.Context, r Request) (id string, err error)
	Guest(id string) (Guest, error)
	// Capture makes the new file path a consistent copy of the disk.
	Capture(ctx context.Context, id, path string) error
	Destroy(ctx context.Context, id string) error
	// Prepare boots a published build once, runs its program until it is ready, and keeps
	// the state. said gets what the program writes.
	Prepare(ctx context.Context, template, build string, said func(level, step, line string)) error
}

// Request is the build sandbox that a stage needs.
type Request struct {
	Root    template.Template
	Project string

	VCPUs, MemMiB, DiskMiB int
	// Overlay is the disk to start with; empty for an empty one.
	Overlay string
}

// Guest is the guest of a build sandbox.
type Guest interface {
	Exec(ctx context.Context, cmd guest.Command, output func(stderr bool, data []byte)) (guest.Result, error)
	// Unpack unpacks a tar below dir. Directories that are there keep owner and mode.
	Unpack(ctx context.Context, dir string, r io.Reader) error
	// Pack writes a tar of a file, or of a directory with its content: errdefs.NotFound if
	// there is none.
	Pack(ctx context.Context, path string, w io.Writer) error
}

// Config is what an engine stands on.
type Config struct {
	// Dir is the engine's own directory, on the file system of the templates. It is made.
	Dir       string
	Templates *template.Store
	Images    Images
	Sandboxes Sandboxes
	// Flat gives each build its root as one EROFS, too, for drivers without block devices.
	Flat bool
	// Parallel is how many builds run at a time; further ones wait. Zero is 2.
	Parallel int
	// MaxDisk bounds what templates, images and builds take of the disk together, in
	// bytes; zero is no bound. Dirs are what is measured besides Dir.
	MaxDisk int64
	Dirs    []string
	Log     *slog.Logger
}

// Engine runs builds. Safe for concurrent use.
type Engine struct {
	cfg   Config
	cache *cache
	slots chan struct{}
	wg    sync.WaitGroup

	mu      sync.Mutex
	running map[string]*running // by build
	closed  bool
}

// running is a build that waits for a slot or runs.
type running struct {
	spec   Spec
	log    *buildLog
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when nothing of it is left
	before []*running    // what it waits for

	mu       sync.Mutex
	progress *image.Progress
}

// Levels of log entries.
const (
	Debug = "debug"
	Info  = "info"
	Warn  = "warn"
	Error = "error"
)

var (
	errCancelled = errdefs.WrongState.Errorf("build was cancelled")
	errClosing   = errdefs.Unavailable.Errorf("the host agent ends")
	errRevoked   = errdefs.Denied.Errorf("build was cancelled: the API key that asked for it was revoked")
)

// New returns an engine. What an earlier agent left half-made in Dir is removed.
func New(cfg Config) (*Engine, error) {
	e := &Engine{
		cfg: cfg, cache: &cache{dir: cfg.Dir, pinned: map[string]int{}},
		slots: make(chan struct{}, cmp.Or(cfg.Parallel, 2)), running: map[string]*running{},
	}
	if err := os.RemoveAll(filepath.Join(cfg.Dir, workDir)); err != nil {
		return nil, fmt.Errorf("open builds: %w", err)
	}
	for _, dir := range []string{cacheDir, resultsDir, uploadsDir, logsDir, workDir} {
		if err := os.MkdirAll(filepath.Join(cfg.Dir, dir), 0o700); err != nil {
			return nil, fmt.Errorf("open builds: %w", errdefs.DiskFull(err))
		}
	}
	for _, pattern := range []string{cacheDir + "/.*", resultsDir + "/.*", uploadsDir + "/*/.*"} {
		half, err := filepath.Glob(filepath.Join(cfg.Dir, pattern))
		for _, path := range half {
			err = errors.Join(err, os.RemoveAll(path))
		}
		if err != nil {
			return nil, fmt.Errorf("open builds: %w", err)
		}
	}
	return e, nil
}

// Close cancels all builds and waits until they have ended.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	e.closed = true
	for _, r := range e.running {
		r.cancel(errClosing)
	}
	e.mu.Unlock()
	done := make(chan struct{})
	go func() { defer close(done); e.wg.Wait() }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end builds: %w", context.Cause(ctx))
	}
}

// find returns a build that runs, or nil.
func (e *Engine) find(template, build string) *running {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.running[build]; r != nil && r.spec.Template == template {
		return r
	}
	return nil
}

func (e *Engine) busy() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.running) > 0
}

// lookup returns a build: errdefs.NotFound if there is none.
func (e *Engine) lookup(id, build string) (template.Info, template.Build, error) {
	all, err := e.cfg.Templates.List()
	if err != nil {
		return template.Info{}, template.Build{}, err
	}
	if i := slices.IndexFunc(all, func(t template.Info) bool { return t.ID == id }); i >= 0 {
		if j := slices.IndexFunc(all[i].Builds, func(b template.Build) bool { return b.ID == build }); j >= 0 {
			return all[i], all[i].Builds[j], nil
		}
	}
	return template.Info{}, template.Build{}, errdefs.NotFound.Errorf("build %s of template %s does not exist", build, id)
}

// Start begins a build that template.Store.NewBuild made, and returns. What is wrong
// with the spec is errdefs.InvalidArgument, a build that does not wait
// errdefs.WrongState, a disk that is used up errdefs.Exhausted; the build waits on then.
// A build of the same template that runs is cancelled. The build outlives ctx.
func (e *Engine) Start(ctx context.Context, spec Spec) error {
	if err := spec.Check(); err != nil {
		return err
	}
	_, b, err := e.lookup(spec.Template, spec.Build)
	if err != nil {
		return err
	}
	if b.Status != template.StatusWaiting {
		return errNotWaiting
	}
	if err := e.uploaded(spec); err != nil {
		return err
	}
	if err := e.room(ctx); err != nil {
		return err
	}
	path, err := e.logPath(spec.Template, spec.Build)
	if err != nil {
		return err
	}
	// From here on one of two that start the same build goes on.
	err = e.cfg.Templates.SetBuild(ctx, spec.Template, spec.Build, template.StatusBuilding, nil)
	if errors.Is(err, errdefs.WrongState) {
		return errNotWaiting
	}
	if err != nil {
		return err
	}
	log, err := newLog(path)
	if err == nil {
		err = e.launch(spec, log)
	}
	if err != nil {
		return errors.Join(err, e.fail(spec, &template.Reason{Message: sentence(err)}))
	}
	e.cfg.Log.Info("template build started", "template", spec.Template, "build", spec.Build, "project", spec.Project, "key", spec.KeyID)
	return nil
}

var errNotWaiting = errdefs.WrongState.Errorf("build is not in waiting state")

// uploaded refuses a spec whose files are not there.
func (e *Engine) uploaded(spec Spec) error {
	n := 0
	for _, stage := range spec.Stages {
		hashes := map[string]string{}
		if stage.From.Archive != "" {
			hashes[stage.From.Archive] = "the image"
		}
		for _, step := range stage.Steps {
			if n++; step.Files != "" {
				hashes[step.Files] = step.where(n)
			}
		}
		for hash, what := range hashes {
			there, err := e.Upload(spec.Project, hash)
			if err != nil {
				return err
			}
			if !there {
				return errdefs.InvalidArgument.Errorf("the files of %s were not uploaded", what)
			}
		}
	}
	return nil
}

// launch begins to run a build. Those of the same template are cancelled, and it waits
// for their end.
func (e *Engine) launch(spec Spec, log *buildLog) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &running{spec: spec, log: log, cancel: cancel, done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		log.end()
		cancel(nil)
		return errClosing
	}
	for _, other := range e.running {
		if other.spec.Template == spec.Template {
			other.cancel(errCancelled)
			r.before = append(r.before, other)
		}
	}
	e.running[spec.Build] = r
	e.wg.Add(1)
	go e.run(ctx, r)
	return nil
}

// run is the life of a build.
func (e *Engine) run(ctx context.Context, r *running) {
	defer e.wg.Done()
	defer func() {
		r.cancel(nil)
		e.mu.Lock()
		delete(e.running, r.spec.Build)
		e.mu.Unlock()
		close(r.done)
	}()
	began := time.Now()
	defer r.endWithKey(ctx)()
	err := e.turn(ctx, r)
	if err == nil {
		defer func() { <-e.slots }()
		err = e.make(ctx, r)
	}
	if lost := r.log.lost(); lost > 0 {
		r.log.say(Warn, "", "%d lines of output are not in this log", lost)
	}
	took := time.Since(began).Round(time.Second)
	if err == nil {
		// A client that sees the status reads on to the end of the log.
		r.log.say(Info, "", "Build finished, took %v", took)
		r.log.end()
		if err = e.cfg.Templates.Finish(context.WithoutCancel(ctx), r.spec.Template, r.spec.Build, r.spec.Tags); err == nil {
			e.cfg.Log.Info("template built", "template", r.spec.Template, "build", r.spec.Build, "project", r.spec.Project,
				"key", r.spec.KeyID, "took", took)
			return
		}
	}
	reason := e.reason(ctx, r, err)
	r.log.say(Error, reason.Step, "Build failed: %s", reason.Message)
	r.log.end()
	if err := e.fail(r.spec, reason); err != nil {
		e.cfg.Log.Error("status of a build not written", "template", r.spec.Template, "build", r.spec.Build, "err", err)
	}
}

// keyEach is how often a build looks whether its key is still there.
const keyEach = time.Second

// endWithKey cancels a build once the key that asked for it is revoked. The returned
// function ends that.
func (r *running) endWithKey(ctx context.Context) (end func()) {
	if r.spec.Revoked == nil {
		return func() {}
	}
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		each := time.NewTicker(keyEach)
		defer each.Stop()
		for {
			select {
			case <-each.C:
			case <-ctx.Done():
				return
			}
			if r.spec.Revoked() {
				r.cancel(errRevoked)
				return
			}
		}
	})
	return func() { stop(); wg.Wait() }
}

// turn waits until a build may run.
func (e *Engine) turn(ctx context.Context, r *running) error {
	for _, other := range r.before {
		select {
		case <-other.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	r.before = nil
	select {
	case e.slots <- struct{}{}:
		return nil
	default:
		r.log.say(Info, baseStep, "[base] waiting for other builds of this host")
	}
	select {
	case e.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stepError is an error of a step. Its text is for the client.
type stepError struct {
	step string
	err  error
}

func (s *stepError) Error() string { return s.err.Error() }
func (s *stepError) Unwrap() error { return s.err }

// at says in which step an error happened.
func at(step string, err error) error {
	var have *stepError
	if err == nil || errors.As(err, &have) {
		return err
	}
	return &stepError{step, err}
}

// reason is what a client is told of an error.
func (e *Engine) reason(ctx context.Context, r *running, err error) *template.Reason {
	reason := &template.Reason{Step: baseStep}
	var step *stepError
	if errors.As(err, &step) {
		reason.Step = step.step
	}
	if cause := context.Cause(ctx); errors.Is(cause, errCancelled) || errors.Is(cause, errClosing) || errors.Is(cause, errRevoked) {
		err = cause
	}
	reason.Message = sentence(err)
	e.cfg.Log.Warn("build failed", "template", r.spec.Template, "build", r.spec.Build, "project", r.spec.Project,
		"key", r.spec.KeyID, "step", reason.Step, "err", err)
	return reason
}

// sentence is an error's text for a client. One without a class has host paths.
func sentence(err error) string {
	if errdefs.ClassOf(err) == nil && !errdefs.IsDiskFull(err) {
		return "the host could not go on with the build: its log says why"
	}
	text := strings.ReplaceAll(errdefs.DiskFull(err).Error(), "\n", "; ")
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "…"
	}
	return text
}

func (e *Engine) fail(spec Spec, reason *template.Reason) error {
	err := e.cfg.Templates.SetBuild(context.Background(), spec.Template, spec.Build, template.StatusError, reason)
	if errors.Is(err, errdefs.NotFound) { // the template was removed
		return nil
	}
	return err
}

// Cancel ends a build that waits or runs, and returns when it has ended:
// errdefs.NotFound if there is none, errdefs.WrongState if it has ended.
func (e *Engine) Cancel(ctx context.Context, id, build string) error {
	if r := e.find(id, build); r != nil {
		r.cancel(errCancelled)
		select {
		case <-r.done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	_, b, err := e.lookup(id, build)
	if err != nil {
		return err
	}
	if b.Status != template.StatusWaiting {
		return errdefs.WrongState.Errorf("build %s is %s", build, b.Status)
	}
	return e.cfg.Templates.SetBuild(ctx, id, build, template.StatusError, &template.Reason{Message: errCancelled.Error()})
}

// Progress returns the latest progress of a build's transfer of an image.
func (e *Engine) Progress(template, build string) (Progress, bool) {
	r := e.find(template, build)
	if r == nil {
		return Progress{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.progress == nil {
		return Progress{}, false
	}
	return *r.progress, true
}

func (r *running) setProgress(p *image.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.progress = p
}
