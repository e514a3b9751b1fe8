// Package build makes templates of images and steps: it runs the steps of a build in
// build sandboxes, and caches what each has changed.
package build

import (
	"context"
	"io"
	"log/slog"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Config is what an engine stands on.
type Config struct {
	// Dir is the engine's own directory.
	Dir string
	// Parallel is how many builds run at a time; further ones wait. Zero is 2.
	Parallel int
	// MaxDisk bounds what templates, images and builds take of the disk together, in
	// bytes; zero is no bound.
	MaxDisk int64
	Log     *slog.Logger
}

// Engine runs builds. Safe for concurrent use.
type Engine struct{ cfg Config }

// Levels of log entries.
const (
	Debug = "debug"
	Info  = "info"
	Warn  = "warn"
	Error = "error"
)

// Entry is a line of a build's log.
type Entry struct {
	At      time.Time `json:"at"`
	Level   string    `json:"level"`
	Step    string    `json:"step,omitempty"` // "base", "finalize", or the number of a step from 1
	Message string    `json:"message"`
}

// Item is a thing that builds keep on the disk.
type Item struct {
	// Kind is cache, upload or log.
	Kind   string
	Name   string
	Bytes  int64
	UsedAt time.Time
}

// Pruning says what Prune may remove.
type Pruning struct {
	// OlderThan keeps what was used since then; zero removes all that no build uses now.
	OlderThan time.Duration
	// DryRun removes nothing.
	DryRun bool
}

// Progress is how far the present transfer of a build is.
type Progress struct {
	Stage       string // "pull", "unpack", "import"
	Done, Total int64
	Detail      string
}

var errNotYet = errdefs.Unsupported.Errorf("this host cannot build templates yet")

// New returns an engine. What an earlier agent left half-made in Dir is removed, and
// its builds end as failed.
func New(cfg Config) (*Engine, error) { return &Engine{cfg: cfg}, nil }

// Close cancels all builds and waits until they have ended.
func (e *Engine) Close(context.Context) error { return nil }

// Start begins a build that template.Store.NewBuild made, and returns. What is wrong
// with the spec is errdefs.InvalidArgument, and then the build waits on. A build of the
// same template that runs is cancelled. The build outlives ctx.
func (e *Engine) Start(ctx context.Context, spec Spec) error { return errNotYet }

// Cancel ends a build that waits or runs, and returns when it has ended:
// errdefs.NotFound if there is none.
func (e *Engine) Cancel(ctx context.Context, template, build string) error { return errNotYet }

// Log returns up to limit entries of a build's log from an offset on, of that level and
// above. An entry never changes its offset. A build that is not known has none.
func (e *Engine) Log(template, build string, offset, limit int, level string) ([]Entry, error) {
	return nil, errNotYet
}

// Watch calls fn with each entry of a build's log from an offset on, until the build
// has ended and fn has had the last one, or fn or ctx ends it.
func (e *Engine) Watch(ctx context.Context, template, build string, from int, fn func(Entry) error) error {
	return errNotYet
}

// Upload reports whether a project has uploaded the archive with that hash. A hash is
// 64 digits of lower-case hex: errdefs.InvalidArgument if not.
func (e *Engine) Upload(project, hash string) (present bool, err error) { return false, errNotYet }

// Put stores an archive under a hash, which is the caller's word for it. It replaces
// the archive that is there in one step, and is errdefs.Exhausted where it is too big.
func (e *Engine) Put(ctx context.Context, project, hash string, r io.Reader) error { return errNotYet }

// Prune removes from the cache, the uploads and the logs what no build uses, and returns
// what it removed.
func (e *Engine) Prune(ctx context.Context, p Pruning) ([]Item, error) { return nil, errNotYet }

// Usage returns what builds keep on the disk.
func (e *Engine) Usage(ctx context.Context) ([]Item, error) { return nil, nil }

// Progress returns the latest progress of a build's transfer of an image.
func (e *Engine) Progress(template, build string) (Progress, bool) { return Progress{}, false }

// Forget removes the logs of a template's builds that are gone.
func (e *Engine) Forget(template string) error { return nil }
