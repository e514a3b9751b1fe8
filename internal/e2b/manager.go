package e2b

import (
	"context"
	"io"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Manager is what the handlers need of the sandboxes of this host. Calls by id are
// not told whose the sandbox is: the handlers look first, and an id is never used
// for another sandbox. Errors have a class of errdefs; slices and maps are the
// caller's own.
type Manager interface {
	// NewID returns an id that no sandbox has or had.
	NewID() sandbox.ID
	// Create returns when commands can run in the sandbox. On error nothing is left.
	Create(context.Context, CreateRequest) (Sandbox, error)
	// Get and List never wait for an operation. List is in no particular order.
	Get(sandbox.ID) (Sandbox, error)
	List(project string) []Sandbox
	// Tokens are the same for the whole life of a sandbox.
	Tokens(sandbox.ID) (Tokens, error)
	// Destroy ends a sandbox for good, with its saved state.
	Destroy(context.Context, sandbox.ID) error
	// Pause saves a running sandbox to disk and ends its VM.
	Pause(context.Context, sandbox.ID, PauseRequest) error
	// Connect extends a running sandbox's life, or resumes a paused one. It waits
	// for a pause or a snapshot in progress; concurrent calls share one resume.
	Connect(context.Context, sandbox.ID, ConnectRequest) (sb Sandbox, resumed bool, err error)
	// SetEnd moves the end of a running sandbox; with extend, only to a later time.
	// It is WrongState for one that is paused.
	SetEnd(ctx context.Context, id sandbox.ID, end time.Time, extend bool) error
	// UpdateNetwork replaces what a sandbox may reach.
	UpdateNetwork(context.Context, sandbox.ID, Egress) error
	// Fork makes count sandboxes of the same project from the state of one, all or none.
	Fork(ctx context.Context, id sandbox.ID, count int, timeout time.Duration) ([]Sandbox, error)
	// Snapshot keeps the state of a sandbox as a build of a template, while the
	// sandbox goes on.
	Snapshot(context.Context, sandbox.ID, SnapshotRequest) (Template, error)
	// Metrics returns samples from start to end, oldest first; a zero time is no
	// bound.
	Metrics(id sandbox.ID, start, end time.Time) ([]Metric, error)
	// Logs returns what is kept of a sandbox's output, oldest first.
	Logs(sandbox.ID) ([]LogLine, error)
	// Events returns what is kept of a project's events, oldest first: those of one
	// sandbox, which may be gone, or of all if id is empty.
	Events(project string, id sandbox.ID) ([]Event, error)
}

// Templates is what the handlers need of the templates of this host. A snapshot
// that a user made is a template.
type Templates interface {
	// List returns all templates of all projects, in no particular order.
	List() ([]Template, error)
	// Delete removes a template, or one tag of a snapshot with the build that has
	// no other. It is WrongState while sandboxes need it.
	Delete(ctx context.Context, id, tag string) error
	SetPublic(ctx context.Context, id string, public bool) error
	// Tag makes tags lead to a build, wherever they led before.
	Tag(ctx context.Context, id, build string, tags []string) error
	Untag(ctx context.Context, id string, tags []string) error
}

// Builds is what the handlers need of what makes templates.
type Builds interface {
	// New adds a build that waits to be started: of the template of that name, or of a
	// new one. Builds of the template that wait for one of the same tags end.
	New(context.Context, NewBuild) (Template, Build, error)
	// Start begins a build that waits and returns; it is WrongState for another one. A
	// build of the same template that runs is cancelled.
	Start(context.Context, BuildSpec) error
	// Cancel ends a build that waits or runs: NotFound if there is none.
	Cancel(ctx context.Context, template, build string) error
	// Log returns entries of a build's log, of a level and above, from an offset among
	// these on. An entry never changes its offset.
	Log(template, build string, offset, limit int, level string) ([]BuildEntry, error)
	// Upload says whether a project has put an archive under a hash; Put does that, in
	// place of one that is there.
	Upload(project, hash string) (present bool, err error)
	Put(ctx context.Context, project, hash string, r io.Reader) error
}

// NewBuild is what is known of a build before it is made.
type NewBuild = template.NewBuild

// BuildSpec is what a template is to be made of.
type BuildSpec = build.Spec

// BuildEntry is a line of a build's log.
type BuildEntry = build.Entry

// Action is what happens at the end of a sandbox's time.
type Action = sandbox.OnTimeout

const (
	Kill  = sandbox.DestroyOnTimeout
	Pause = sandbox.HibernateOnTimeout
	// PauseFiles is a pause that keeps the files alone.
	PauseFiles = sandbox.HibernateFilesOnTimeout
)

// CreateRequest describes a new sandbox.
type CreateRequest struct {
	// ID is from NewID; one is made up when empty.
	ID      sandbox.ID
	Project string
	// Template and Build are ids.
	Template, Build string
	// User runs programs that name none; empty is the template's or the snapshot's.
	User string
	// Timeout is from the moment at which the sandbox runs until its end. It is kept:
	// the life after an automatic resume goes by it.
	Timeout    time.Duration
	OnEnd      Action
	AutoResume bool
	Metadata   map[string]string
	Env        map[string]string
	Egress     Egress
	Ingress    Ingress
}

// Egress is what a sandbox may reach, as its user said it: nil is not said.
type Egress = sandbox.Egress

// Ingress is how a sandbox's own servers are reached.
type Ingress = sandbox.Ingress

// Sandbox is a copy of what callers may know of one. It has no secrets.
type Sandbox struct {
	ID      sandbox.ID
	Project string
	State   sandbox.State
	// Pausing says that a sandbox is being paused, or will be as soon as that can be.
	Pausing bool
	// Template is the id of the template that it comes from at last, Alias a name.
	Template, Alias        string
	VCPUs, MemMiB, DiskMiB int
	EnvdVersion            string
	StartedAt, EndAt       time.Time // of the last start or resume; zero is no end
	PausedAt               time.Time
	OnEnd                  Action
	AutoResume             bool
	FilesOnly              bool // paused without memory
	Metadata               map[string]string
	Egress                 Egress
	Ingress                Ingress
}

// Tokens are the secrets of a sandbox.
type Tokens = sandbox.Tokens

// PauseRequest says what a pause keeps; with HealthyGuest it is
// sandbox.ErrGuestSilent if the guest does not answer.
type PauseRequest = sandbox.Hibernation

// ConnectRequest asks that a sandbox runs, and for how long.
type ConnectRequest = sandbox.ConnectRequest

// SnapshotRequest names a snapshot. Without a name one is made up.
type SnapshotRequest struct {
	Project, Name, Tag string
	FilesOnly          bool
}

// Template is what sandboxes are made from.
type Template = template.Info

// Build is one content of a template.
type Build = template.Build

// Tag leads to a build of its template.
type Tag = template.Tag

// Metric is a sample of what a sandbox uses, in bytes.
type Metric = sandbox.Metric

// LogLine is one line of a sandbox's output.
type LogLine struct {
	At time.Time
	// Level is debug, info, warn or error.
	Level, Message string
	Fields         map[string]string
}

// Event is one change of a sandbox.
type Event struct {
	// ID is the event's place in the log.
	ID uint64
	At time.Time
	// Type is created, updated, paused, resumed, checkpointed or killed.
	Type     string
	Sandbox  sandbox.ID
	Template string
	Build    string
	Data     map[string]any
}
