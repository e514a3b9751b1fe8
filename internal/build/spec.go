package build

import (
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/image"
)

// Spec is what a template is to be made of.
type Spec struct {
	// Project owns the template; empty for the host's own.
	Project string
	// Template and Build are the ids that template.Store.NewBuild gave.
	Template, Build string
	// KeyID says who asked for the build, for the log.
	KeyID string
	// Revoked, if not nil, says whether the key is no more, with which the build ends.
	Revoked func() bool
	// Tags lead to the build when it is ready.
	Tags []string
	// Stages are in the order of the Dockerfile; the last one is the result.
	Stages []Stage
	// Start and Ready are shell commands; empty for none, or for those of the
	// Dockerfile's last stage (CMD, ENTRYPOINT, HEALTHCHECK) or of the template in FROM.
	Start, Ready string
	// ReadyInterval is the time between two runs of Ready; zero is 2 s.
	ReadyInterval time.Duration
	// Force runs all steps, whatever is cached.
	Force bool
	// KeepEnv gives sandboxes the variables of ENV and of the image. Without it they are
	// for the build and its start command only.
	KeepEnv bool
	// E2B means E2B's rules: provisioned images, the account "user", bash as the shell,
	// and COPY as E2B has it. Without it the rules are Docker's.
	E2B bool
}

// Stage is a root file system in the making.
type Stage struct {
	// Name is that of FROM … AS; empty for none.
	Name  string
	From  Source
	Steps []Step
}

// Source is what a stage stands on: one of its fields besides Credentials is set.
type Source struct {
	// Image is a reference such as python:3.12-slim. With Template also empty and
	// Either set, a template of that name that the project sees goes before an image.
	Image string
	// Either says that Image may also be the name of a template, as in a Dockerfile.
	Either bool
	// Credentials are those of the image's registry. They are neither kept nor logged.
	Credentials Credentials
	// Template is a reference as template.ParseReference has it.
	Template string
	// Stage is the name of an earlier stage, or its number from 0.
	Stage string
	// Archive is the hash of an uploaded archive with an image: docker save or OCI layout.
	Archive string
	// Scratch is an empty root file system.
	Scratch bool
}

// The kinds of steps. In E2B's mode only RUN, COPY, ENV, WORKDIR and USER exist.
const (
	Run         = "RUN"
	Copy        = "COPY"
	Env         = "ENV"
	Arg         = "ARG"
	Workdir     = "WORKDIR"
	User        = "USER"
	Shell       = "SHELL"
	Label       = "LABEL"
	Cmd         = "CMD"
	Entrypoint  = "ENTRYPOINT"
	Expose      = "EXPOSE"
	Healthcheck = "HEALTHCHECK"
)

// Step is one instruction. Words are as written: the engine expands variables, for it
// knows those of the image.
type Step struct {
	Kind string
	// Args are: of RUN, CMD, ENTRYPOINT and HEALTHCHECK a command, which is one text for a
	// shell, or with Exec an argument vector; of ENV, ARG and LABEL names and values in
	// turn; of SHELL an argument vector; of WORKDIR, USER and EXPOSE words. An ARG without
	// a value has its name only. HEALTHCHECK without a command is NONE.
	Args []string
	Exec bool
	// Script says that the text of a RUN is a whole file that begins with "#!".
	Script bool
	// User runs a RUN as another account than the current one (E2B).
	User string

	// Files is the hash of the uploaded archive that a COPY takes from, FromStage the
	// name or number of a stage, FromImage an image or template; one of them is set.
	Files, FromStage, FromImage string
	// Src are paths and patterns in what COPY takes from, Dst is where it goes.
	Src []string
	Dst string
	// Owner is "user[:group]" by names or numbers, Mode octal digits; empty for the default.
	Owner, Mode string
	// Extract says that the archive has the content of archives that ADD unpacks.
	Extract bool

	// Force runs this step and all after it, whatever is cached.
	Force bool
	// Line is where the step is in its Dockerfile, 0 for none. Text is the step as written.
	Line int
	Text string
}

// Credentials are for a registry.
type Credentials = image.Credentials

// Progress is how far a transfer of an image is.
type Progress = image.Progress
