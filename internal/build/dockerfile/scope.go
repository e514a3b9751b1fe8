package dockerfile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// scope is what is known of the variables at a place in a Dockerfile. The image's own
// are known to the host alone.
type scope struct {
	env, args map[string]string
	// unsure are variables whose values depend on the image's.
	unsure map[string]bool
}

func newScope() *scope {
	return &scope{env: map[string]string{}, args: map[string]string{}, unsure: map[string]bool{}}
}

// child is the scope of a stage that stands on a stage: it has no ARGs.
func (s *scope) child() *scope {
	return &scope{env: maps.Clone(s.env), args: map[string]string{}, unsure: maps.Clone(s.unsure)}
}

func (s *scope) set(arg, value string) { s.args[arg] = value }

// Get and Keys make scope a shell.EnvGetter. ENV goes before ARG.
func (s *scope) Get(name string) (string, bool) {
	if value, ok := s.env[name]; ok {
		return value, true
	}
	value, ok := s.args[name]
	return value, ok
}

func (s *scope) Keys() []string {
	return slices.AppendSeq(slices.Collect(maps.Keys(s.env)), maps.Keys(s.args))
}

// expand expands a word. Variables that are not known are empty.
func (s *scope) expand(word string) (string, error) {
	text, _, err := shell.NewLex('\\').ProcessWord(word, s)
	return text, err
}

// value expands the word of an ENV. unsure says that the image's variables decide.
func (s *scope) value(word string) (value string, unsure bool, err error) {
	result, err := shell.NewLex('\\').ProcessWordWithMatches(word, s)
	return result.Result, len(s.doubts(result)) > 0, err
}

// doubts are the variables of an expansion that the image may have set.
func (s *scope) doubts(r shell.ProcessWordResult) (names []string) {
	for name := range r.Unmatched {
		names = append(names, name)
	}
	for name := range r.Matched {
		if s.unsure[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// sure expands a word that has only variables which the Dockerfile sets.
func (s *scope) sure(word string) (string, error) {
	result, err := shell.NewLex('\\').ProcessWordWithMatches(word, s)
	if err != nil {
		return "", err
	}
	if names := s.doubts(result); len(names) > 0 {
		return "", fmt.Errorf("the value of %s is not set by this Dockerfile, and files are chosen before the image is known",
			strings.Join(names, ", "))
	}
	return result.Result, nil
}

// quoted is a word that expands to exactly text.
func quoted(text string) string { return "'" + strings.ReplaceAll(text, "'", `'"'"'`) + "'" }
