package build

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Bounds of a spec.
const (
	maxStages  = 32
	maxSteps   = 1000
	maxArgs    = 1000
	maxText    = 1 << 20 // of one step, in bytes
	maxCommand = 64 << 10
	maxTags    = 32
)

var (
	hashPattern  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	modePattern  = regexp.MustCompile(`^[0-7]{1,5}$`)
	ownerPattern = regexp.MustCompile(`^[^:/\s]+(:[^:/\s]+)?$`)
)

// Check looks for what is wrong with a spec whatever the host has:
// errdefs.InvalidArgument. It does no I/O.
func (s Spec) Check() error {
	switch {
	case len(s.Stages) == 0:
		return errdefs.InvalidArgument.Errorf("a build needs a stage")
	case len(s.Stages) > maxStages:
		return errdefs.InvalidArgument.Errorf("a build of %d stages: want at most %d", len(s.Stages), maxStages)
	case len(s.Tags) > maxTags:
		return errdefs.InvalidArgument.Errorf("a build with %d tags: want at most %d", len(s.Tags), maxTags)
	case len(s.Start) > maxCommand || len(s.Ready) > maxCommand:
		return errdefs.InvalidArgument.Errorf("a start or ready command has more than %d bytes", maxCommand)
	case s.ReadyInterval < 0 || s.ReadyInterval > time.Hour:
		return errdefs.InvalidArgument.Errorf("a ready command each %v: want at most 1h", s.ReadyInterval)
	}
	n := 0
	for i, stage := range s.Stages {
		if err := s.checkSource(i, stage.From); err != nil {
			return err
		}
		for _, step := range stage.Steps {
			n++
			if err := s.checkStep(i, step); err != nil {
				return errdefs.InvalidArgument.Errorf("%s: %w", step.where(n), err)
			}
		}
	}
	if n > maxSteps {
		return errdefs.InvalidArgument.Errorf("a build of %d steps: want at most %d", n, maxSteps)
	}
	return nil
}

// where names a step to the caller.
func (s Step) where(n int) string {
	if s.Line > 0 {
		return fmt.Sprintf("line %d", s.Line)
	}
	return fmt.Sprintf("step %d", n)
}

func (s Spec) checkSource(i int, from Source) error {
	given := 0
	for _, is := range []bool{from.Image != "", from.Template != "", from.Stage != "", from.Archive != "", from.Scratch} {
		if is {
			given++
		}
	}
	switch {
	case given != 1:
		return errdefs.InvalidArgument.Errorf("a build starts from one image or one template")
	case from.Archive != "" && !hashPattern.MatchString(from.Archive):
		return errHash
	case from.Stage != "" && s.stageOf(i, from.Stage) < 0:
		return errdefs.InvalidArgument.Errorf("there is no stage %q before", from.Stage)
	case len(from.Image) > 1024 || len(from.Template) > 1024:
		return errdefs.InvalidArgument.Errorf("the reference of an image or template is too long")
	}
	return nil
}

var errHash = errdefs.InvalidArgument.Errorf("the hash of files is not 64 digits of lower-case hex")

// stageOf returns the stage before i that has a name or number, or -1.
func (s Spec) stageOf(i int, name string) int {
	before := s.Stages[:i]
	if n := slices.IndexFunc(before, func(s Stage) bool { return s.Name != "" && s.Name == name }); n >= 0 {
		return n
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < i {
		return n
	}
	return -1
}

func (s Spec) checkStep(stage int, step Step) error {
	size := len(step.Text) + len(step.Dst) + len(step.User)
	for _, text := range slices.Concat(step.Args, step.Src) {
		size += len(text)
		if strings.ContainsRune(text, 0) {
			return fmt.Errorf("%s has a zero byte", step.Kind)
		}
	}
	if size > maxText || len(step.Args) > maxArgs || len(step.Src) > maxArgs {
		return fmt.Errorf("%s is too long", step.Kind)
	}
	switch step.Kind {
	case Copy:
		return s.checkCopy(stage, step)
	case Run:
		if len(step.Args) == 0 || step.Args[0] == "" {
			return fmt.Errorf("RUN has no command")
		}
	case Env:
		if len(step.Args) == 0 || len(step.Args)%2 != 0 {
			return fmt.Errorf("ENV wants names and values in turn")
		}
		for i := 0; i < len(step.Args); i += 2 {
			if name := step.Args[i]; name == "" || strings.ContainsAny(name, "= \t\n") {
				return fmt.Errorf("ENV %.80q: not a name of a variable", name)
			}
		}
	case Workdir, User:
		if len(step.Args) != 1 || step.Args[0] == "" {
			return fmt.Errorf("%s wants one word", step.Kind)
		}
	case Arg, Shell, Label, Cmd, Entrypoint, Expose, Healthcheck:
		if s.E2B {
			return fmt.Errorf("there is no step %.40q", step.Kind)
		}
		if (step.Kind == Shell || step.Kind == Arg) && len(step.Args) == 0 {
			return fmt.Errorf("%s wants a word", step.Kind)
		}
	default:
		return fmt.Errorf("there is no step %.40q", step.Kind)
	}
	return nil
}

func (s Spec) checkCopy(stage int, step Step) error {
	given := 0
	for _, from := range []string{step.Files, step.FromStage, step.FromImage} {
		if from != "" {
			given++
		}
	}
	switch {
	case given != 1:
		return fmt.Errorf("COPY takes from one archive, stage or image")
	case step.Files != "" && !hashPattern.MatchString(step.Files):
		return errHash
	case step.FromStage != "" && s.stageOf(stage, step.FromStage) < 0:
		return fmt.Errorf("COPY from the stage %.80q: there is none of that name before", step.FromStage)
	case len(step.Src) == 0 || step.Dst == "":
		return fmt.Errorf("COPY wants a source and a destination")
	case s.E2B && step.Mode != "" && !modePattern.MatchString(step.Mode):
		return fmt.Errorf("COPY with the mode %.40q: want octal digits", step.Mode)
	case s.E2B && step.Owner != "" && !ownerPattern.MatchString(step.Owner):
		return fmt.Errorf("COPY with the owner %.80q: want user or user:group", step.Owner)
	}
	return nil
}
