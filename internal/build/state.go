package build

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// standardPath is where programs are looked for if nothing else is said.
const standardPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// e2bUser is the account of E2B's templates.
const e2bUser = "user"

// command is a command of CMD, ENTRYPOINT or HEALTHCHECK.
type command struct {
	args []string
	exec bool
	// own says that the Dockerfile has it, and not the image.
	own bool
}

// state is what the steps so far say about programs. It is not changed, but replaced.
type state struct {
	env, args     map[string]string
	user, workdir string
	shell         []string
	entry, cmd    command
	health        command
	// start is the program of the template in FROM.
	start template.Program
}

// ofImage is the state in which an image begins.
func ofImage(c image.Config, e2b bool) *state {
	s := &state{env: map[string]string{}, args: map[string]string{}, user: c.User, workdir: c.Workdir, shell: c.Shell}
	for _, variable := range c.Env {
		name, value, _ := strings.Cut(variable, "=")
		s.env[name] = value
	}
	s.entry, s.cmd = command{args: c.Entrypoint, exec: true}, command{args: c.Cmd, exec: true}
	if e2b {
		s.user, s.workdir = e2bUser, "/home/"+e2bUser
	}
	return s
}

// ofTemplate is the state in which a template begins.
func ofTemplate(m template.Making, e2b bool) *state {
	env := maps.Clone(m.Defaults.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, m.Start.Env)
	s := &state{env: env, args: map[string]string{}, user: m.Defaults.User, workdir: m.Defaults.Workdir, start: m.Start}
	if e2b {
		s.user = cmp.Or(s.user, e2bUser)
		s.workdir = cmp.Or(s.workdir, homeOf(s.user))
	}
	return s
}

// homeOf is where the home of an account is unless its database says otherwise.
func homeOf(user string) string {
	if user == "" || user == "root" {
		return "/root"
	}
	return "/home/" + user
}

// Get and Keys make state a shell.EnvGetter. ENV goes before ARG.
func (s *state) Get(name string) (string, bool) {
	if value, ok := s.env[name]; ok {
		return value, true
	}
	value, ok := s.args[name]
	return value, ok
}

func (s *state) Keys() []string {
	return slices.AppendSeq(slices.Collect(maps.Keys(s.env)), maps.Keys(s.args))
}

// expand expands the variables of a word, as Docker does or as E2B does.
func (s *state) expand(word string, e2b bool) (string, error) {
	if e2b {
		return expandPlain(word, s.rootEnv), nil
	}
	text, _, err := shell.NewLex('\\').ProcessWord(word, s)
	if err != nil {
		return "", errdefs.InvalidArgument.Errorf("%.80q: %w", word, err)
	}
	return text, nil
}

// rootEnv are the variables that root has in the guest.
func (s *state) rootEnv(name string) string {
	if value, ok := s.env[name]; ok {
		return value
	}
	return map[string]string{"PATH": standardPath, "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash"}[name]
}

// expandPlain replaces $NAME and ${NAME} outside of single quotes' meaning: quotes are
// characters as all others, and a backslash keeps a dollar sign.
func expandPlain(word string, get func(string) string) string {
	var out strings.Builder
	for i := 0; i < len(word); i++ {
		rest := word[i:]
		switch {
		case strings.HasPrefix(rest, `\$`):
			out.WriteByte('$')
			i++
		case rest[0] == '$' && len(rest) > 1 && rest[1] == '{':
			end := strings.IndexByte(rest, '}')
			if end < 0 || !isName(rest[2:end]) {
				out.WriteByte('$')
				continue
			}
			out.WriteString(get(rest[2:end]))
			i += end
		case rest[0] == '$':
			n := 1
			for n < len(rest) && isName(rest[1:n+1]) {
				n++
			}
			if n == 1 {
				out.WriteByte('$')
				continue
			}
			out.WriteString(get(rest[1:n]))
			i += n - 1
		default:
			out.WriteByte(word[i])
		}
	}
	return out.String()
}

func isName(text string) bool {
	for i, r := range text {
		letter := r == '_' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return text != ""
}

// after returns the state after a step, and the step with its variables expanded.
func (s *state) after(step Step, e2b bool) (*state, Step, error) {
	next := *s
	words, err := s.words(step, e2b)
	if err != nil {
		return nil, step, err
	}
	own := command{args: step.Args, exec: step.Exec, own: len(step.Args) > 0}
	switch step.Kind {
	case Env:
		next.env = maps.Clone(s.env)
		for i := 0; i+1 < len(words); i += 2 {
			next.env[words[i]] = words[i+1]
		}
		step.Args = words
	case Arg:
		if len(words) > 1 {
			next.args = maps.Clone(s.args)
			next.args[words[0]] = words[1]
		}
		step.Args = words
	case Workdir:
		next.workdir = path.Join("/", s.workdir, words[0])
		if path.IsAbs(words[0]) {
			next.workdir = path.Clean(words[0])
		}
		step.Args = []string{next.workdir}
	case User:
		if words[0] == "" {
			return nil, step, errdefs.InvalidArgument.Errorf("USER has no value")
		}
		next.user, step.Args = words[0], words
	case Shell:
		next.shell = step.Args
	case Entrypoint:
		next.entry = own
		if !s.cmd.own { // as Docker: the image's CMD is of the image's ENTRYPOINT
			next.cmd = command{}
		}
	case Cmd:
		next.cmd = own
	case Healthcheck:
		next.health = own
	case Copy:
		step, err = s.copyWords(step, e2b)
	}
	return &next, step, err
}

// words expands the arguments of a step that has words.
func (s *state) words(step Step, e2b bool) ([]string, error) {
	words := slices.Clone(step.Args)
	switch step.Kind {
	case Env, Arg, Label:
		for i := 1; i < len(words); i += 2 {
			value, err := s.expand(words[i], e2b)
			if err != nil {
				return nil, err
			}
			words[i] = value
		}
	case Workdir, User, Expose:
		for i := range words {
			if e2b {
				continue // names, as they are
			}
			value, err := s.expand(words[i], false)
			if err != nil {
				return nil, err
			}
			words[i] = value
		}
	}
	return words, nil
}

// copyWords expands the words of a COPY. Sources in an archive were chosen by its maker.
func (s *state) copyWords(step Step, e2b bool) (Step, error) {
	if e2b {
		return step, nil
	}
	words := []*string{&step.Dst, &step.Owner, &step.Mode}
	if step.Files == "" {
		step.Src = slices.Clone(step.Src)
		for i := range step.Src {
			words = append(words, &step.Src[i])
		}
	}
	for _, word := range words {
		value, err := s.expand(*word, false)
		if err != nil {
			return step, err
		}
		*word = value
	}
	switch {
	case step.Mode != "" && !modePattern.MatchString(step.Mode):
		return step, errdefs.InvalidArgument.Errorf("COPY --chmod=%.40s: want octal digits", step.Mode)
	case step.Owner != "" && !ownerPattern.MatchString(step.Owner):
		return step, errdefs.InvalidArgument.Errorf("COPY --chown=%.80s: want user or user:group", step.Owner)
	}
	return step, nil
}

// variables are those of a RUN.
func (s *state) variables(e2b bool) map[string]string {
	env := maps.Clone(s.args)
	maps.Copy(env, s.env)
	switch have := env["PATH"]; {
	case have == "":
		env["PATH"] = standardPath
	case e2b:
		env["PATH"] = withStandard(have)
	}
	return env
}

// withStandard is a PATH with the standard directories that it has not.
func withStandard(have string) string {
	dirs := strings.Split(have, ":")
	for dir := range strings.SplitSeq(standardPath, ":") {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return strings.Join(dirs, ":")
}

// argv is what a RUN runs.
func (s *state) argv(step Step, e2b bool) []string {
	switch {
	case e2b:
		return []string{"/bin/bash", "-l", "-c", step.Args[0]}
	case step.Exec:
		return step.Args
	}
	return append(slices.Clone(s.shellOf()), step.Args[0])
}

func (s *state) shellOf() []string {
	if len(s.shell) > 0 {
		return s.shell
	}
	return []string{"/bin/sh", "-c"}
}

// text is a command as text for a shell.
func (c command) text() string {
	if !c.exec {
		return strings.Join(c.args, " ")
	}
	var words []string
	for _, arg := range c.args {
		words = append(words, quote(arg))
	}
	return strings.Join(words, " ")
}

// quote is a word that a shell reads as exactly text.
func quote(text string) string {
	plain := text != ""
	for _, r := range text {
		plain = plain && (isName("_"+string(r)) || strings.ContainsRune("-./:=@%+,", r))
	}
	if plain {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// program is what runs in sandboxes of the template from their boot on.
func (s *state) program(spec Spec) template.Program {
	p := template.Program{Start: spec.Start, Ready: spec.Ready}
	if p.Start == "" && (s.entry.own || s.cmd.own) {
		p.Start = s.dockerStart()
	}
	if p.Start == "" {
		p.Start, p.Ready = s.start.Start, cmp.Or(p.Ready, s.start.Ready)
	}
	if p.Ready == "" && s.health.own {
		p.Ready = s.health.text()
	}
	p.Login = template.Login{User: s.user, Workdir: s.workdir, Env: s.env}
	return p
}

// dockerStart is ENTRYPOINT with CMD as its arguments.
func (s *state) dockerStart() string {
	switch {
	case len(s.entry.args) == 0:
		return s.cmd.text()
	case !s.entry.exec || len(s.cmd.args) == 0:
		return s.entry.text()
	case !s.cmd.exec:
		return s.entry.text() + " " + fmt.Sprintf("%s %s", command{args: s.shellOf(), exec: true}.text(), quote(s.cmd.text()))
	}
	return s.entry.text() + " " + s.cmd.text()
}
