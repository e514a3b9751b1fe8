// Package dockerfile reads Dockerfiles and their contexts.
package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// maxBytes bounds a Dockerfile, maxSteps the steps in it.
const (
	maxBytes = 1 << 20
	maxSteps = 1000
)

// Options say how a Dockerfile is read.
type Options struct {
	// Name is the file's, for errors; empty is "Dockerfile".
	Name string
	// Args are the values of --build-arg.
	Args map[string]string
	// Target is the stage that is the result, by name or number; empty is the last.
	Target string
}

// File is a Dockerfile that was read. Its stages are those that the result needs.
type File struct {
	Stages []build.Stage
	// ReadyInterval is that of HEALTHCHECK, zero if it names none.
	ReadyInterval time.Duration
	// Warnings are sentences about what was read and has no effect.
	Warnings []string

	name string
	// local are the steps that take from the context, by stage and step.
	local map[[2]int]*localCopy
}

// localCopy is what a COPY or ADD takes besides what its step says.
type localCopy struct {
	add     bool
	inline  []inlineFile
	sources []string
}

// inlineFile is a heredoc of COPY.
type inlineFile struct{ name, text string }

// reader turns parsed instructions into stages.
type reader struct {
	name   string
	args   map[string]string
	used   map[string]bool // of args
	meta   *scope          // of the ARGs before the first FROM
	stages []*readStage
	file   *File
	line   int // of the present instruction
	steps  int
}

type readStage struct {
	build.Stage
	parent   int   // the stage in FROM, -1 for none
	needs    []int // stages that it copies from, and parent
	scope    *scope
	local    map[int]*localCopy
	interval time.Duration
}

// Parse reads a Dockerfile. What is wrong or not supported is errdefs.InvalidArgument
// with the file's name and the line.
func Parse(r io.Reader, o Options) (*File, error) {
	rd := &reader{name: o.Name, args: o.Args, used: map[string]bool{}, file: &File{local: map[[2]int]*localCopy{}}}
	if rd.name == "" {
		rd.name = "Dockerfile"
	}
	rd.file.name = rd.name
	rd.meta = newScope()
	for name, value := range platformArgs() {
		rd.meta.set(name, value)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rd.name, err)
	}
	if len(text) > maxBytes {
		return nil, errdefs.InvalidArgument.Errorf("%s has more than %d bytes", rd.name, maxBytes)
	}
	if err := rd.syntax(text); err != nil {
		return nil, err
	}
	tree, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil, rd.parseError(err)
	}
	if tree.EscapeToken != '\\' {
		rd.line = 1
		return nil, rd.fault("the directive escape is not supported: a line goes on with a backslash")
	}
	for _, w := range tree.Warnings {
		rd.file.Warnings = append(rd.file.Warnings, w.Short)
	}
	for _, node := range tree.AST.Children {
		rd.line = node.StartLine
		if err := rd.instruction(node); err != nil {
			return nil, err
		}
	}
	if len(rd.stages) == 0 {
		return nil, errdefs.InvalidArgument.Errorf("%s has no FROM", rd.name)
	}
	return rd.result(o.Target)
}

// platformArgs are the ARGs that exist in every Dockerfile.
func platformArgs() map[string]string {
	args := map[string]string{}
	for _, side := range []string{"BUILD", "TARGET"} {
		args[side+"PLATFORM"] = "linux/" + runtime.GOARCH
		args[side+"OS"], args[side+"ARCH"], args[side+"VARIANT"] = "linux", runtime.GOARCH, ""
	}
	return args
}

// syntax refuses files that are written for another reader.
func (rd *reader) syntax(text []byte) error {
	syntax, _, where, ok := parser.DetectSyntax(text)
	if !ok {
		return nil
	}
	if len(where) > 0 {
		rd.line = where[0].Start.Line
	}
	image, _, _ := strings.Cut(syntax, ":")
	if image = strings.TrimPrefix(image, "docker.io/"); image != "docker/dockerfile" && image != "docker/dockerfile-upstream" {
		return rd.fault("syntax %q is not supported: only Dockerfiles are read", syntax)
	}
	return nil
}

// fault is an error at the present line.
func (rd *reader) fault(format string, args ...any) error {
	if rd.line == 0 {
		return errdefs.InvalidArgument.Errorf("%s: %w", rd.name, fmt.Errorf(format, args...))
	}
	return errdefs.InvalidArgument.Errorf("%s:%d: %w", rd.name, rd.line, fmt.Errorf(format, args...))
}

// parseError is an error of the parser's.
func (rd *reader) parseError(err error) error {
	var at *parser.LocationError
	if errors.As(err, &at) && len(at.Locations) > 0 && len(at.Locations[0]) > 0 {
		rd.line = at.Locations[0][0].Start.Line
	}
	return rd.fault("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
}

// instruction reads one instruction.
func (rd *reader) instruction(node *parser.Node) error {
	parsed, err := instructions.ParseInstruction(node)
	if err != nil {
		return rd.fault("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	if from, ok := parsed.(*instructions.Stage); ok {
		return rd.from(from)
	}
	if len(rd.stages) == 0 {
		arg, ok := parsed.(*instructions.ArgCommand)
		if !ok {
			return rd.fault("%s before the first FROM", strings.ToUpper(node.Value))
		}
		return rd.metaArg(arg)
	}
	if rd.steps++; rd.steps > maxSteps {
		return rd.fault("more than %d instructions", maxSteps)
	}
	step := build.Step{Kind: strings.ToUpper(node.Value), Line: node.StartLine, Text: strings.TrimSpace(node.Original)}
	return rd.command(rd.stages[len(rd.stages)-1], step, parsed)
}

// metaArg reads an ARG before the first FROM.
func (rd *reader) metaArg(c *instructions.ArgCommand) error {
	for _, arg := range c.Args {
		value, given := rd.given(arg.Key)
		switch {
		case given:
		case arg.Value == nil:
			continue
		default:
			var err error
			if value, err = rd.meta.expand(*arg.Value); err != nil {
				return rd.fault("ARG %s: %w", arg.Key, err)
			}
		}
		rd.meta.set(arg.Key, value)
	}
	return nil
}

// given returns the value of a --build-arg.
func (rd *reader) given(name string) (string, bool) {
	value, ok := rd.args[name]
	rd.used[name] = rd.used[name] || ok
	return value, ok
}

// from begins a stage.
func (rd *reader) from(c *instructions.Stage) error {
	s := &readStage{parent: -1, scope: newScope(), local: map[int]*localCopy{}}
	s.Name = c.Name
	platform, err := rd.meta.expand(c.Platform)
	if err != nil {
		return rd.fault("FROM --platform: %w", err)
	}
	if want := "linux/" + runtime.GOARCH; platform != "" && platform != want && platform != "linux" {
		return rd.fault("FROM --platform=%s is not supported: sandboxes of this host are %s", platform, want)
	}
	base, err := rd.meta.expand(c.BaseName)
	if err != nil {
		return rd.fault("FROM: %w", err)
	}
	if c.Name != "" && rd.find(c.Name) >= 0 {
		return rd.fault("the stage %s exists already", c.Name)
	}
	switch i := rd.find(base); {
	case base == "":
		return rd.fault("FROM %s names no image: a variable in it has no value", c.BaseName)
	case i >= 0:
		s.parent, s.needs = i, []int{i}
		s.scope = rd.stages[i].scope.child()
	case base == "scratch":
		s.From.Scratch = true
	default:
		s.From.Image, s.From.Either = base, true
	}
	rd.stages = append(rd.stages, s)
	return nil
}

// find returns the number of the stage with that name, -1 if there is none.
func (rd *reader) find(name string) int {
	return slices.IndexFunc(rd.stages, func(s *readStage) bool { return s.Name != "" && strings.EqualFold(s.Name, name) })
}

// stageOf returns the number of the stage that --from or --target names.
func (rd *reader) stageOf(name string) int {
	if i := rd.find(name); i >= 0 {
		return i
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < len(rd.stages) {
		return n
	}
	return -1
}

// result keeps the stages that the target needs.
func (rd *reader) result(target string) (*File, error) {
	last := len(rd.stages) - 1
	if target != "" {
		if last = rd.stageOf(target); last < 0 {
			return nil, errdefs.InvalidArgument.Errorf("%s has no stage %q", rd.name, target)
		}
	}
	needed := map[int]bool{last: true}
	for i := last; i >= 0; i-- { // a stage needs earlier ones only
		if needed[i] {
			for _, n := range rd.stages[i].needs {
				needed[n] = true
			}
		}
	}
	place := map[int]int{}
	for i := range last + 1 {
		if !needed[i] {
			continue
		}
		s := rd.stages[i]
		place[i] = len(rd.file.Stages)
		if s.parent >= 0 {
			s.From.Stage = strconv.Itoa(place[s.parent])
		}
		for j := range s.Steps {
			if from := s.Steps[j].FromStage; from != "" {
				n, _ := strconv.Atoi(from) // copyFrom wrote it
				s.Steps[j].FromStage = strconv.Itoa(place[n])
			}
		}
		for j, l := range s.local {
			rd.file.local[[2]int{place[i], j}] = l
		}
		rd.file.Stages = append(rd.file.Stages, s.Stage)
	}
	for at := last; at >= 0 && rd.file.ReadyInterval == 0; at = rd.stages[at].parent {
		rd.file.ReadyInterval = rd.stages[at].interval
	}
	for name := range rd.args {
		if !rd.used[name] {
			rd.file.Warnings = append(rd.file.Warnings, fmt.Sprintf("--build-arg %s: %s has no such ARG", name, rd.name))
		}
	}
	slices.Sort(rd.file.Warnings)
	return rd.file, nil
}

// IgnoreFile returns the path of the file that says what a context leaves out, which
// may not exist: that of the Dockerfile's own, where it is there, or the directory's.
func IgnoreFile(dockerfile, dir string, exists func(path string) bool) string {
	if own := dockerfile + ".dockerignore"; dockerfile != "" && exists(own) {
		return own
	}
	return filepath.Join(dir, ".dockerignore")
}
