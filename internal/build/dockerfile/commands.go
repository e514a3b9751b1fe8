package dockerfile

import (
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"

	"git.omukk.dev/wrenn/sandbox/internal/build"
)

// command adds an instruction to a stage.
func (rd *reader) command(s *readStage, step build.Step, parsed any) error {
	switch c := parsed.(type) {
	case *instructions.RunCommand:
		return rd.run(s, step, c)
	case *instructions.CopyCommand:
		return rd.copy(s, step, c)
	case *instructions.AddCommand:
		return rd.add(s, step, c)
	case *instructions.EnvCommand:
		return rd.env(s, step, c)
	case *instructions.ArgCommand:
		return rd.arg(s, step, c)
	case *instructions.LabelCommand:
		for _, l := range c.Labels {
			step.Args = append(step.Args, l.Key, l.Value)
		}
	case *instructions.MaintainerCommand:
		step.Kind, step.Args = build.Label, []string{"maintainer", quoted(c.Maintainer)}
	case *instructions.WorkdirCommand:
		step.Args = []string{c.Path}
	case *instructions.UserCommand:
		step.Args = []string{c.User}
	case *instructions.ShellCommand:
		step.Args, step.Exec = c.Shell, true
	case *instructions.ExposeCommand:
		step.Args = c.Ports
	case *instructions.CmdCommand:
		return rd.program(s, step, c.ShellDependantCmdLine)
	case *instructions.EntrypointCommand:
		return rd.program(s, step, c.ShellDependantCmdLine)
	case *instructions.HealthCheckCommand:
		return rd.healthcheck(s, step, c)
	case *instructions.VolumeCommand:
		return rd.fault("VOLUME is not supported: a sandbox has one disk, which keeps every directory")
	case *instructions.StopSignalCommand:
		return rd.fault("STOPSIGNAL is not supported: the program of a sandbox ends with the sandbox")
	case *instructions.OnbuildCommand:
		return rd.fault("ONBUILD is not supported: write the instruction into the Dockerfile that stands on this one")
	default:
		return rd.fault("%s is not supported", step.Kind)
	}
	s.Steps = append(s.Steps, step)
	return nil
}

// run adds a RUN. Its heredocs become part of the text for the shell, or the file that
// is run.
func (rd *reader) run(s *readStage, step build.Step, c *instructions.RunCommand) error {
	for _, flag := range c.FlagsUsed {
		if flag == "network" && instructions.GetNetwork(c) == instructions.NetworkDefault {
			continue
		}
		return rd.fault("RUN --%s is not supported: a RUN has the build sandbox, with its files and its network", flag)
	}
	step.Args, step.Exec = c.CmdLine, !c.PrependShell
	if len(step.Args) == 0 || len(step.Args) == 1 && step.Args[0] == "" {
		return rd.fault("RUN has no command")
	}
	if len(c.Files) == 1 && loneHeredoc.MatchString(step.Args[0]) {
		text := heredocText(c.Files[0])
		step.Args, step.Script = []string{text}, strings.HasPrefix(text, "#!")
	} else if len(c.Files) > 0 {
		text := step.Args[0]
		for _, f := range c.Files {
			text += "\n" + f.Data + f.Name
		}
		step.Args = []string{text}
	}
	s.Steps = append(s.Steps, step)
	return nil
}

// loneHeredoc is a RUN that is nothing but a heredoc.
var loneHeredoc = regexp.MustCompile(`^<<-?\s*(['"]?)[a-zA-Z_][a-zA-Z0-9_]*(['"]?)$`)

// heredocText is the text of a heredoc, without leading tabs where it asks for that.
func heredocText(f instructions.ShellInlineFile) string {
	if !f.Chomp {
		return f.Data
	}
	return leadingTabs.ReplaceAllString(f.Data, "")
}

var leadingTabs = regexp.MustCompile(`(?m)^\t+`)

func (rd *reader) program(s *readStage, step build.Step, line instructions.ShellDependantCmdLine) error {
	if len(line.Files) > 0 {
		return rd.fault("%s with a heredoc is not supported: COPY the text into a file", step.Kind)
	}
	step.Args, step.Exec = line.CmdLine, !line.PrependShell
	s.Steps = append(s.Steps, step)
	return nil
}

func (rd *reader) healthcheck(s *readStage, step build.Step, c *instructions.HealthCheckCommand) error {
	switch test := c.Health.Test; {
	case len(test) > 0 && test[0] == "NONE":
		step.Args = nil
	case len(test) > 1:
		step.Args, step.Exec = test[1:], test[0] == "CMD"
	}
	if c.Health.Timeout != 0 || c.Health.StartPeriod != 0 || c.Health.StartInterval != 0 || c.Health.Retries != 0 {
		rd.file.Warnings = append(rd.file.Warnings, rd.at("of HEALTHCHECK, the command and --interval have an effect: "+
			"the command is repeated until it succeeds, for 10 minutes at most"))
	}
	s.interval = c.Health.Interval
	s.Steps = append(s.Steps, step)
	return nil
}

// at is a sentence about the present line.
func (rd *reader) at(text string) string { return rd.name + ":" + strconv.Itoa(rd.line) + ": " + text }

func (rd *reader) env(s *readStage, step build.Step, c *instructions.EnvCommand) error {
	after := s.scope.child()
	for _, e := range c.Env {
		if e.Key == "" || strings.ContainsAny(e.Key, "=$ \t") {
			return rd.fault("ENV %s: not a name of a variable", e.Key)
		}
		value, unsure, err := s.scope.value(e.Value) // all of one ENV see what was before it
		if err != nil {
			return rd.fault("ENV %s: %w", e.Key, err)
		}
		after.env[e.Key], after.unsure[e.Key] = value, unsure
		step.Args = append(step.Args, e.Key, e.Value)
	}
	s.scope.env, s.scope.unsure = after.env, after.unsure
	s.Steps = append(s.Steps, step)
	return nil
}

func (rd *reader) arg(s *readStage, step build.Step, c *instructions.ArgCommand) error {
	for _, arg := range c.Args {
		one := step
		word := arg.Value
		if value, ok := rd.given(arg.Key); ok {
			value = quoted(value)
			word = &value
		} else if value, ok := rd.meta.args[arg.Key]; ok && word == nil {
			value = quoted(value)
			word = &value
		}
		if one.Args = []string{arg.Key}; word != nil {
			value, err := s.scope.expand(*word)
			if err != nil {
				return rd.fault("ARG %s: %w", arg.Key, err)
			}
			s.scope.set(arg.Key, value)
			one.Args = append(one.Args, *word)
		}
		s.Steps = append(s.Steps, one)
	}
	return nil
}

func (rd *reader) copy(s *readStage, step build.Step, c *instructions.CopyCommand) error {
	switch {
	case c.Parents:
		return rd.fault("COPY --parents is not supported: copy each directory")
	case len(c.ExcludePatterns) > 0:
		return rd.fault("COPY --exclude is not supported: name it in .dockerignore")
	}
	step.Owner, step.Mode, step.Dst = c.Chown, c.Chmod, c.DestPath
	if c.Link {
		rd.file.Warnings = append(rd.file.Warnings, rd.at("COPY --link is a COPY: links in the destination are followed"))
	}
	if c.From == "" {
		return rd.local(s, step, c.SourcesAndDest, false)
	}
	if len(c.SourceContents) > 0 {
		return rd.fault("COPY --from with a heredoc")
	}
	from, err := s.scope.sure(c.From)
	if err != nil {
		return rd.fault("COPY --from: %w", err)
	}
	step.Src = c.SourcePaths
	switch i := rd.stageOf(from); {
	case i == len(rd.stages)-1:
		return rd.fault("COPY --from=%s names its own stage", from)
	case i >= 0:
		s.needs = append(s.needs, i)
		step.FromStage = strconv.Itoa(i)
	case from == "":
		return rd.fault("COPY --from=%s names no stage and no image", c.From)
	default:
		step.FromImage = from
	}
	s.Steps = append(s.Steps, step)
	return nil
}

// remote is a source of ADD that is not in the context.
var remote = regexp.MustCompile(`^([a-z][a-z0-9+.-]*://|git@)`)

func (rd *reader) add(s *readStage, step build.Step, c *instructions.AddCommand) error {
	switch {
	case slices.ContainsFunc(c.SourcePaths, remote.MatchString):
		return rd.fault("ADD of a URL is not supported: RUN a program that downloads it")
	case c.Checksum != "" || c.KeepGitDir != nil:
		return rd.fault("ADD --checksum and --keep-git-dir are for URLs, which are not supported")
	case c.Unpack != nil:
		return rd.fault("ADD --unpack is not supported: ADD unpacks archives, COPY does not")
	case len(c.ExcludePatterns) > 0:
		return rd.fault("ADD --exclude is not supported: name it in .dockerignore")
	}
	step.Kind = build.Copy
	step.Owner, step.Mode, step.Dst = c.Chown, c.Chmod, c.DestPath
	return rd.local(s, step, c.SourcesAndDest, true)
}

// local adds a COPY or ADD from the context. Its sources are expanded here, because the
// files are chosen here.
func (rd *reader) local(s *readStage, step build.Step, c instructions.SourcesAndDest, add bool) error {
	l := &localCopy{add: add}
	for _, word := range c.SourcePaths {
		src, err := s.scope.sure(word)
		if err != nil {
			return rd.fault("%s %s: %w", step.Kind, word, err)
		}
		clean := path.Clean("/" + src)
		if outside(src) {
			return rd.fault("%s %s: it is outside of the context", step.Kind, src)
		}
		l.sources = append(l.sources, strings.TrimPrefix(clean, "/"))
	}
	for _, c := range c.SourceContents {
		text := c.Data
		if c.Expand {
			var err error
			if text, err = s.scope.sure(text); err != nil {
				return rd.fault("%s <<%s: %w", step.Kind, c.Path, err)
			}
		}
		l.inline = append(l.inline, inlineFile{name: path.Base(c.Path), text: text})
	}
	step.Src = slices.Clone(l.sources)
	for _, f := range l.inline {
		step.Src = append(step.Src, f.name)
	}
	if dst := step.Dst; len(step.Src) > 1 && !strings.HasSuffix(dst, "/") {
		return rd.fault("%s of several sources: the destination %s must end with /", step.Kind, dst)
	}
	s.local[len(s.Steps)] = l
	s.Steps = append(s.Steps, step)
	return nil
}

// outside says whether a path leaves the directory that it is relative to.
func outside(name string) bool {
	depth := 0
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			if depth--; depth < 0 {
				return true
			}
		default:
			depth++
		}
	}
	return false
}
