package build

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The steps that have no number.
const (
	baseStep     = "base"
	finalizeStep = "finalize"
)

// The kinds of steps that the engine adds in E2B's mode.
const (
	provisionKind = "PROVISION"
	finalizeKind  = "FINALIZE"
)

// planned is a step whose words are expanded. Stages that stand on a stage share its
// steps. It is not changed once its stage is planned.
type planned struct {
	Step
	label string // for the log and for errors: "2", baseStep, finalizeStep
	head  string // as the log has it: "[builder 2/7]"
	key   string
	force bool
	// content says that the step may change files, capture that the disk is kept after it.
	content, capture bool
	before           *state
	from             *stage // what a COPY takes from, nil for an archive
}

// stage is a stage of a job.
type stage struct {
	base  *base
	steps []*planned
	last  *state // after the last step
	// parents is how many of the steps are those of the stage in FROM.
	parents int

	// need says that the stage must have a disk or a guest; resume is the number of steps
	// that are in the cache.
	need   bool
	resume int

	box     string // the id of its build sandbox, while there is one
	overlay string // the disk after the last step that was captured, if it is here
	ran     bool
	// entry is the id of the cache's entry that the disk is; lost says that the cache has
	// another build's disk for a step, on which what follows here does not stand.
	entry string
	lost  bool
}

// key is the key of the stage's disk after its last step; that of its base if no step
// changes files.
func (s *stage) key() string {
	if i := s.lastContent(); i >= 0 {
		return s.steps[i].key
	}
	return s.base.key
}

// lastContent is the place of the last step that may change files, or -1.
func (s *stage) lastContent() int {
	for i, p := range slices.Backward(s.steps) {
		if p.content {
			return i
		}
	}
	return -1
}

// captures are the keys of the steps after which the disk is kept, up to place n.
func (s *stage) captures(n int) (keys []string) {
	for _, p := range s.steps[:n] {
		if p.capture {
			keys = append(keys, p.key)
		}
	}
	return keys
}

// plan expands the steps of a stage and gives each its key.
func (j *job) plan(i int) (*stage, error) {
	spec := j.spec.Stages[i]
	s := &stage{}
	if from := spec.From.Stage; from != "" {
		parent := j.stages[j.spec.stageOf(i, from)]
		s.base, s.last = parent.base, parent.last
		s.last = &state{}
		*s.last = *parent.last
		s.last.args = map[string]string{}
		s.steps = slices.Clone(parent.steps)
		s.parents = len(s.steps)
	} else {
		base, err := j.resolve(spec.From)
		if err != nil {
			return nil, at(baseStep, err)
		}
		s.base, s.last = base, base.state
	}
	e2b := j.spec.E2B
	if e2b && s.parents == 0 && s.base.bare {
		s.add(&planned{Step: Step{Kind: provisionKind, Text: "provision"}, label: baseStep, head: "[base]"})
	}
	name := j.stageName(i)
	for n, step := range spec.Steps {
		j.steps++
		p := &planned{label: strconv.Itoa(j.steps), head: fmt.Sprintf("[%s%d/%d]", name, n+1, len(spec.Steps)), before: s.last}
		p.force = j.spec.Force || step.Force
		next, expanded, err := s.last.after(step, e2b)
		if err == nil {
			p.Step = expanded
			p.from, err = j.source(i, expanded)
		}
		if err != nil {
			return nil, at(p.label, err)
		}
		s.add(p)
		s.last = next
	}
	if e2b && i == len(j.spec.Stages)-1 && s.lastContent() >= 0 {
		s.add(&planned{Step: Step{Kind: finalizeKind, Text: "finalize"}, label: finalizeStep, head: "[finalize]", before: s.last})
	}
	if last := s.lastContent(); last >= s.parents && last >= 0 {
		s.steps[last].capture = true
	}
	return s, nil
}

// add adds a step and gives it its key.
func (s *stage) add(p *planned) {
	before := s.base.key
	if n := len(s.steps); n > 0 {
		before = s.steps[n-1].key
		p.force = p.force || s.steps[n-1].force
	}
	from := ""
	if p.from != nil {
		from = p.from.key()
	}
	if p.before == nil {
		p.before = s.last
	}
	p.key = keyOf(before, append([]string{
		p.Kind, strconv.FormatBool(p.Exec), strconv.FormatBool(p.Script), p.User, p.Files, from, p.Dst, p.Owner, p.Mode,
		strconv.FormatBool(p.Extract), strconv.Itoa(len(p.Src)),
	}, slices.Concat(p.Src, p.Args)...)...)
	switch p.Kind {
	case Run, Copy, provisionKind, finalizeKind:
		p.content, p.capture = true, true
	case Workdir:
		p.content = true // it may make a directory, which the next step's disk has
	case User:
		p.content = s.base.e2b
	}
	s.steps = append(s.steps, p)
}

// stageName is what stands before a step's number in the log.
func (j *job) stageName(i int) string {
	switch name := j.spec.Stages[i].Name; {
	case j.spec.E2B:
		return "builder "
	case len(j.spec.Stages) == 1:
		return ""
	case name != "":
		return name + " "
	}
	return fmt.Sprintf("stage-%d ", i)
}

// source returns the stage that a COPY takes from, which may be one that is nothing but an
// image; nil for an archive.
func (j *job) source(i int, step Step) (*stage, error) {
	switch {
	case step.Kind != Copy || step.Files != "":
		return nil, nil
	case step.FromStage != "":
		return j.stages[j.spec.stageOf(i, step.FromStage)], nil
	}
	if s := j.images[step.FromImage]; s != nil {
		return s, nil
	}
	base, err := j.resolve(Source{Image: step.FromImage, Either: true})
	if err != nil {
		return nil, err
	}
	s := &stage{base: base, last: base.state}
	j.images[step.FromImage] = s
	return s, nil
}

// lookUp finds out how far the cache goes, and what is needed besides.
func (j *job) lookUp(s *stage) {
	if s.need {
		return
	}
	s.need = true
	j.advance(s)
	for _, p := range s.steps[s.resume:] {
		if p.from != nil {
			j.lookUp(p.from)
		}
	}
}

// advance finds out how far the cache goes. Steps that are forced count when this build
// has run them.
func (j *job) advance(s *stage) {
	s.resume, s.entry = 0, ""
	for i, p := range s.steps {
		if !p.capture {
			continue
		}
		info, ok := j.e.cache.read(p.key)
		if !ok || info.BeforeID != s.entry || p.force && !j.ran[p.key] {
			break
		}
		s.resume, s.entry = i+1, info.ID
	}
	if s.resume == s.lastContent()+1 {
		s.resume = len(s.steps)
	}
}

// cached says whether nothing of the stage has to run.
func (s *stage) cached() bool { return s.resume == len(s.steps) }

// title is a step's line in the log.
func (p *planned) title() string {
	text := p.Text
	if text == "" {
		text = strings.TrimSpace(p.Kind + " " + strings.Join(p.Args, " "))
	}
	text, _, _ = strings.Cut(text, "\n")
	return fmt.Sprintf("%s %s [%s]", p.head, text, p.key[:12])
}
