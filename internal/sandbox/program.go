package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// readyTimeout bounds the time from the start of a template's program until its ready
	// command succeeds, and readyEvery is the pause between two attempts.
	readyTimeout = 10 * time.Minute
	readyEvery   = 2 * time.Second
	// defaultReady is the ready command of a start command without one.
	defaultReady = "sleep 20"
	// programTime bounds all that a boot takes longer for the sake of a program.
	programTime = readyTimeout + time.Minute
	// startTag names the start command among the processes of a guest.
	startTag = "start"
	// maxProgramLog bounds what is told of the output of each of the two commands, and
	// maxProgramLine a line of it.
	maxProgramLog  = 1 << 20
	maxProgramLine = 8 << 10
)

// ProgramLog is told what becomes of a template's program: level as in "info", the step
// "start", "ready" or "finalize", and a line. Calls come one at a time.
type ProgramLog = func(level, step, line string)

// hasProgram says whether something is to run in the guests of a template before they are
// sandboxes.
func hasProgram(t template.Template) bool { return t.Start.Start != "" || t.Start.Ready != "" }

// programKey is the part of a boot snapshot's key that its program is; nil for none.
func programKey(t template.Template) []string {
	if !hasProgram(t) {
		return nil
	}
	text, _ := json.Marshal(t.Start) // of plain data
	return []string{string(text)}
}

// turn is what a start has of the host for a while: a start slot and time.
type turn struct {
	// giveBack gives the start slot back.
	giveBack func()
	timer    *time.Timer
	ends     time.Time
}

// newTurn returns a context that ends after limit, which pause can stop.
func newTurn(ctx context.Context, limit time.Duration, giveBack func()) (context.Context, *turn, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := &turn{giveBack: giveBack, ends: time.Now().Add(limit)}
	t.timer = time.AfterFunc(limit, func() { cancel(errdefs.Unavailable.Errorf("the guest was not ready within %s", limit)) })
	return ctx, t, func() { t.timer.Stop(); cancel(nil) }
}

// pause stops the time until goOn is called. Another may start a VM from now on.
func (t *turn) pause() (goOn func()) {
	t.giveBack()
	t.timer.Stop()
	left := time.Until(t.ends)
	return func() { t.timer.Reset(max(left, 0)) }
}

// startProgram runs the program of a template in a guest that has booted and has not been
// told yet what it is, and returns when the program is ready. The guest has an identity of
// its own for that time. src.token is what it takes then. A disk that no sandbox wrote is
// the template's alone: its program starts under the host's policy and not under that
// of the create, because others may get the guest as it is then. Called with the op lock held.
func (v *vms) startProgram(ctx context.Context, b *box, tmpl template.Template, src source, t *turn) (_ source, err error) {
	defer phase(ctx, "program")()
	defer t.pause()()
	rec := b.record()
	src.token = newToken()
	g := v.cfg.Guests(rec.HostIP, src.token)
	defer g.Close()
	ctx, cancel := b.while(ctx)
	defer cancel()
	in := guest.Init{
		AccessToken: src.token, Hostname: bootName, DefaultUser: "root", Env: map[string]string{}, Entropy: entropy(),
		CABundle: v.cfg.GuestCA,
	}
	if err := b.init(ctx, g, in); err != nil {
		return src, v.bootFailed(b, "initialise guest", err)
	}
	other := src.disk == "" && !v.hasHostPolicy(rec)
	if other {
		open := rec
		open.Network = Policy{}
		if err := v.setNetwork(ctx, open); err != nil {
			return src, err
		}
	}
	err = runProgram(ctx, g, tmpl.Start, src.log)
	if err != nil {
		if cause := b.cause(ctx); cause != nil {
			return src, v.bootFailed(b, "start the template's program", err)
		}
		return src, v.disk.why(b, err)
	}
	if other {
		if err := v.setNetwork(ctx, rec); err != nil {
			return src, err
		}
	}
	return src, nil
}

// runProgram runs the start command of a template in the background and its ready command
// again and again until that succeeds. The start command goes on; nothing listens to it
// any more when runProgram returns.
func runProgram(ctx context.Context, g Guest, p template.Program, log ProgramLog) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, errNotReady)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	log = serial(log)
	started := &lines{step: "start", log: log}
	defer started.flush()
	if p.Start != "" {
		unhear, err := startCommand(ctx, g, p, started, fail)
		if err != nil {
			return err
		}
		defer unhear()
	}
	ready := &lines{step: "ready", log: log}
	defer ready.flush()
	err := untilReady(ctx, g, p, ready)
	cause := context.Cause(ctx)
	switch {
	case errors.Is(cause, errNotReady):
		return errdefs.WrongState.Errorf("ready command timed out after %s%s%s", readyTimeout, ready.said(), started.said())
	case cause != nil:
		return cause
	}
	return err
}

var errNotReady = errors.New("the ready command did not succeed")

// startCommand starts the start command. fail is called if it ends badly until unhear is.
func startCommand(ctx context.Context, g Guest, p template.Program, out *lines, fail context.CancelCauseFunc) (unhear func(), err error) {
	cmd := programCommand(p, p.Start)
	cmd.Output = out.write
	listen, stop := context.WithCancel(ctx)
	ended, err := g.Start(listen, cmd, startTag)
	if err != nil {
		stop()
		return nil, notRun(ctx, "start", err)
	}
	var heard sync.WaitGroup
	heard.Go(func() {
		for end := range ended {
			switch {
			case end.Err != nil:
				fail(notRun(ctx, "start", end.Err))
			case end.ExitCode != 0:
				fail(errdefs.WrongState.Errorf("start command failed: %s%s", howEnded(end.Result), out.said()))
			}
		}
	})
	// What is in the guest must not hold a connection: its state is about to be copied.
	return func() { stop(); heard.Wait() }, nil
}

// notRun is the error of a command that cannot be run, now or later, or the reason why
// the guest did not say what became of it.
func notRun(ctx context.Context, which string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.Is(err, errdefs.Unavailable) {
		return err
	}
	return errdefs.WrongState.Errorf("%s command failed: %w", which, err)
}

func howEnded(r guest.Result) string {
	if r.Detail != "" {
		return r.Detail
	}
	return fmt.Sprintf("exit status %d", r.ExitCode)
}

// untilReady returns when the ready command has succeeded, or ctx ends.
func untilReady(ctx context.Context, g Guest, p template.Program, out *lines) error {
	text := p.Ready
	if text == "" {
		text = defaultReady
	}
	cmd := programCommand(p, text)
	cmd.Output, cmd.Whole = out.write, true
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		result, err := g.Exec(ctx, cmd)
		switch {
		case err != nil:
			return notRun(ctx, "ready", err)
		case result.ExitCode == 0:
			return nil
		}
		timer.Reset(readyEvery)
	}
}

// programCommand is a command of a template's program.
func programCommand(p template.Program, text string) guest.Command {
	shell := p.Shell
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	args := append(append([]string{}, shell[1:]...), text)
	return guest.Command{Cmd: shell[0], Args: args, Env: p.Env, Cwd: p.Workdir, User: p.User}
}

// serial returns a log whose calls come one at a time; nil is one that keeps nothing.
func serial(log ProgramLog) ProgramLog {
	var mu sync.Mutex
	return func(level, step, line string) {
		if log != nil {
			mu.Lock()
			defer mu.Unlock()
			log(level, step, line)
		}
	}
}

// lines makes lines of what a command writes, tells them, and keeps the last of it. It is
// safe for concurrent use.
type lines struct {
	step string
	log  ProgramLog

	mu   sync.Mutex
	part [2][]byte // of stdout and stderr, without its end
	last []byte
	told int
}

// write takes a piece of output. Only whole lines are told, and no more than
// maxProgramLog.
func (l *lines) write(stderr bool, data []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = append(l.last, data[max(0, len(data)-errdefs.MaxForeign):]...)
	l.last = l.last[max(0, len(l.last)-errdefs.MaxForeign):]
	of := &l.part[0]
	if stderr {
		of = &l.part[1]
	}
	for len(data) > 0 {
		line, rest, ended := bytes.Cut(data, []byte("\n"))
		data = rest
		*of = append(*of, line[:min(len(line), maxProgramLine-len(*of))]...)
		if ended {
			l.tell(of)
		}
	}
}

// tell tells a line. Called with mu held.
func (l *lines) tell(line *[]byte) {
	text := strings.ToValidUTF8(strings.TrimSuffix(string(*line), "\r"), "\uFFFD")
	*line = (*line)[:0]
	if l.told >= maxProgramLog {
		return
	}
	if l.told += len(text) + 1; l.told >= maxProgramLog {
		text = "[wrenn: the rest of the output is missing]"
	}
	l.log("info", l.step, text)
}

// flush tells what has no end of line.
func (l *lines) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.part {
		if len(l.part[i]) > 0 {
			l.tell(&l.part[i])
		}
	}
}

// said is the end of the output, for the text of an error.
func (l *lines) said() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := errdefs.Foreign(strings.ReplaceAll(strings.TrimSpace(string(l.last)), "\n", " | "))
	if text == "" {
		return ""
	}
	return fmt.Sprintf("; the end of what its %s command wrote: %s", l.step, text)
}

// PrepareBuild boots a build of a template once, as its sandboxes will, and runs its
// program. It makes the boot snapshot that sandboxes of the build's size start from, where
// the VMM can. Only a build whose layers are published can be prepared; its status does
// not matter. A program that fails is errdefs.WrongState: "start command failed: …",
// "ready command timed out after …". log may be nil.
func (m *Manager) PrepareBuild(ctx context.Context, id, build string, log ProgramLog) error {
	t, b, err := m.buildOf(id, build)
	if err != nil {
		return err
	}
	tmpl, err := m.cfg.Templates.Root(t, b)
	if err != nil {
		return err
	}
	req := CreateRequest{VCPUs: b.VCPUs, MemMiB: b.MemMiB, build: true}
	if err := req.check(); err != nil {
		return err
	}
	if req.VMM, err = m.choose(ctx, req, canRun(req, tmpl)); err != nil {
		return fmt.Errorf("prepare build: %w", err)
	}
	if _, err := restorerOf(m.driverOf(Record{VMM: req.VMM})); err != nil && !hasProgram(tmpl) {
		return nil // there is nothing that a create would not do
	}
	if _, err := m.disk.reserve(0); err != nil {
		return fmt.Errorf("prepare build: %w", err)
	}
	ctx, took := withPhases(ctx)
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	box, err := m.reserve(ctx, req, tmpl, abort)
	if err != nil {
		return fmt.Errorf("prepare build: %w", err)
	}
	defer box.unhold()
	src := m.bootSource(ctx, box.record(), tmpl)
	defer src.close()
	if src.memory != "" {
		return m.release(box, Destroyed, "there is a boot snapshot")
	}
	var unmade error
	src.log, src.unmade = log, func(err error) { unmade = err }
	if _, err := m.start(ctx, box, tmpl, src); err != nil {
		failed := m.createFailed(ctx, box, err)
		if context.Cause(ctx) == nil && errors.Is(err, errdefs.WrongState) { // the program's fault: no more is to be said
			return err
		}
		return failed
	}
	m.log.Info("build prepared", append([]any{"template", id, "build", build}, took.attrs()...)...)
	err = m.release(box, Destroyed, "")
	if unmade != nil {
		return fmt.Errorf("prepare build: make its boot snapshot: %w", errdefs.DiskFull(unmade))
	}
	return err
}

// buildOf returns a template and a build of it, whatever the status.
func (h *host) buildOf(id, build string) (t template.Info, b template.Build, err error) {
	all, err := h.cfg.Templates.List()
	if err != nil {
		return t, b, err
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if t.ID == id && b.ID == build {
				return t, b, nil
			}
		}
	}
	return t, b, errdefs.NotFound.Errorf("template %s has no build %s", id, build)
}
