package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

const (
	// runTimeout bounds one RUN.
	runTimeout = time.Hour
	// maxLine bounds a line of output; a longer one is cut into several.
	maxLine = 4 << 10
	// maxShown bounds a command in an error.
	maxShown = 1 << 10
)

// runStage runs the steps of a stage that are not in the cache.
func (j *job) runStage(s *stage) error {
	if s.ran {
		return nil
	}
	if s.box == "" {
		j.advance(s) // other stages may have run its steps
	}
	j.showCached(s, s.resume)
	if s.cached() {
		s.ran = true
		return nil
	}
	if s.resume <= s.lastContent() {
		if err := j.boot(s); err != nil {
			return err
		}
	}
	last := s.lastContent()
	for i, p := range s.steps[s.resume:] {
		if err := context.Cause(j.ctx); err != nil {
			return at(p.label, err)
		}
		if !j.shown[p] {
			j.shown[p] = true
			j.log.say(Info, p.label, "%s", p.title())
		}
		if !p.content || s.resume+i > last {
			continue
		}
		if err := j.step(s, p); err != nil {
			return at(p.label, err)
		}
		if p.capture {
			if err := j.capture(s, p); err != nil {
				return at(p.label, err)
			}
		}
	}
	s.ran = true
	return nil
}

// showCached says which steps are not run.
func (j *job) showCached(s *stage, n int) {
	for _, p := range s.steps[:n] {
		if !j.shown[p] {
			j.shown[p] = true
			j.log.say(Info, p.label, "CACHED %s", p.title())
		}
	}
}

// boot makes the build sandbox of a stage, with the disk as the cache has it.
func (j *job) boot(s *stage) error {
	if s.box != "" {
		return nil
	}
	stack, err := j.stackOf(s)
	if err != nil {
		return at(baseStep, err)
	}
	if err := j.bring(s); err != nil {
		return at(baseStep, err)
	}
	diskMiB := int(j.diskBytes(s.base.top) >> 20)
	root, err := stack.Root(j.ctx)
	if err != nil {
		return at(baseStep, err)
	}
	j.log.say(Debug, baseStep, "[base] start a build sandbox of %d vCPUs, %d MiB of memory and %d MiB of disk",
		j.build.VCPUs, j.build.MemMiB, diskMiB)
	s.box, err = j.e.cfg.Sandboxes.Create(j.ctx, Request{
		Root: root, Project: j.spec.Project, Overlay: s.overlay,
		VCPUs: j.build.VCPUs, MemMiB: j.build.MemMiB, DiskMiB: diskMiB,
	})
	if err != nil {
		return at(baseStep, fmt.Errorf("start a build sandbox: %w", err))
	}
	return nil
}

// capture keeps the disk after a step in the cache.
func (j *job) capture(s *stage, p *planned) error {
	if err := j.e.room(j.ctx); err != nil {
		return err
	}
	path := j.file("disk")
	if err := j.e.cfg.Sandboxes.Capture(j.ctx, s.box, path); err != nil {
		return fmt.Errorf("keep the disk: %w", err)
	}
	if err := j.keep(s, p, path); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	if s.overlay != "" {
		if err := os.Remove(s.overlay); err != nil {
			return fmt.Errorf("remove disk: %w", err)
		}
	}
	s.overlay = path
	return nil
}

// keep puts the disk after a step into the cache.
func (j *job) keep(s *stage, p *planned, path string) error {
	if s.lost {
		return nil
	}
	before := ""
	for _, q := range s.steps {
		if q == p {
			break
		}
		if q.capture {
			before = q.key
		}
	}
	title, _, _ := strings.Cut(p.Text, "\n")
	info := entryInfo{Before: before, BeforeID: s.entry, Text: title}
	id, made, err := j.e.cache.put(j.ctx, p.key, info, s.overlay, path, p.force)
	if err != nil {
		return err
	}
	s.entry, s.lost = id, !made
	j.ran[p.key] = j.ran[p.key] || made
	return nil
}

// step runs one step that may change files.
func (j *job) step(s *stage, p *planned) error {
	g, err := j.e.cfg.Sandboxes.Guest(s.box)
	if err != nil {
		return err
	}
	switch p.Kind {
	case Run:
		return j.run(g, p)
	case Copy:
		return j.copy(g, p)
	case Workdir:
		return j.makeDir(g, p.Args[0], p.before)
	case User:
		return j.ensureUser(g, p.Args[0])
	case provisionKind:
		return j.provision(g)
	case finalizeKind:
		return j.finalize(g, p.before)
	}
	return errors.New("a step of the kind " + p.Kind + " changes no files")
}

// run runs a RUN.
func (j *job) run(g Guest, p *planned) error {
	st, e2b := p.before, j.spec.E2B
	user := st.user
	if p.User != "" {
		user = p.User
	}
	user, err := j.execUser(g, user)
	if err != nil {
		return err
	}
	argv := st.argv(p.Step, e2b)
	if p.Script {
		if argv, err = j.script(g, p.Args[0]); err != nil {
			return err
		}
	}
	workdir := st.workdir
	if workdir == "" {
		workdir = "/"
	}
	out := &lines{log: j.log, step: p.label, maxed: maxLine}
	if e2b {
		out.head = p.head
	}
	result, err := g.Exec(j.ctx, guest.Command{
		Cmd: argv[0], Args: argv[1:], Env: st.variables(e2b), Cwd: workdir, User: user, Timeout: runTimeout,
	}, out.write)
	out.flush()
	return failed(j.ctx, strings.Join(p.Args, " "), result, err)
}

// failed is the error of a command that ended.
func failed(ctx context.Context, command string, result guest.Result, err error) error {
	if len(command) > maxShown {
		command = strings.ToValidUTF8(command[:maxShown], "") + "…"
	}
	switch {
	case err == nil && result.ExitCode == 0:
		return nil
	case err == nil && result.OutOfMemory:
		limit := ""
		if result.MemoryLimit > 0 {
			limit = fmt.Sprintf(", limit %d MiB", result.MemoryLimit)
		}
		return errdefs.WrongState.Errorf("failed to run command '%s': exit status %d: the build sandbox was out of memory%s",
			command, result.ExitCode, limit)
	case err == nil:
		return errdefs.WrongState.Errorf("failed to run command '%s': exit status %d", command, result.ExitCode)
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	}
	return fmt.Errorf("failed to run command '%s': %w", command, err)
}

// scriptDir is in memory in every guest, and is in no disk.
const scriptDir = "/run/wrenn-build"

// script puts the text of a RUN with "#!" into the guest, and returns how to run it.
func (j *job) script(g Guest, text string) ([]string, error) {
	err := unpackFiles(j.ctx, g, scriptDir, file{name: "script", mode: 0o755, data: []byte(text)})
	if err != nil {
		return nil, fmt.Errorf("write the script: %w", err)
	}
	return []string{path.Join(scriptDir, "script")}, nil
}

// lines makes entries of what a command writes.
type lines struct {
	log        *buildLog
	step, head string
	maxed      int
	out, err   bytes.Buffer
}

func (l *lines) write(stderr bool, data []byte) {
	buf := &l.out
	if stderr {
		buf = &l.err
	}
	buf.Write(data)
	for {
		at := bytes.IndexByte(buf.Bytes(), '\n')
		switch {
		case at >= 0 && at <= l.maxed:
			line := buf.Next(at + 1)
			l.say(stderr, line[:at])
		case buf.Len() > l.maxed:
			l.say(stderr, buf.Next(l.maxed))
		default:
			return
		}
	}
}

// flush ends lines that have no end.
func (l *lines) flush() {
	for stderr, buf := range map[bool]*bytes.Buffer{false: &l.out, true: &l.err} {
		if buf.Len() > 0 {
			l.say(stderr, buf.Bytes())
			buf.Reset()
		}
	}
}

func (l *lines) say(stderr bool, line []byte) {
	name := "stdout"
	if stderr {
		name = "stderr"
	}
	text := strings.TrimRight(string(line), "\r")
	if l.head != "" {
		text = fmt.Sprintf("%s [%s]: %s", l.head, name, text)
	}
	l.log.line(Info, l.step, text)
}
