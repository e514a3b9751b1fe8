package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

const (
	// tailLines is how many lines of a step's output a terminal shows when the step fails.
	tailLines = 30
	// plainProgress is the time between two lines about something that takes long.
	plainProgress = 10 * time.Second
)

// stepLine is the line by which a log begins a step.
var stepLine = regexp.MustCompile(`^(CACHED )?\[([^\]]+ )?[0-9]+/[0-9]+\] `)

// buildView shows how a build goes: on a terminal a line for each step and a last line that
// changes, elsewhere every line of the log. It is safe for concurrent use.
type buildView struct {
	out io.Writer // for whole lines; makes them printable
	raw io.Writer // of the terminal; nil elsewhere
	// quiet shows nothing at all.
	quiet bool
	stop  chan struct{}
	gone  chan struct{}

	mu    sync.Mutex
	began time.Time // of what is under way: the step, or the transfer
	step  string    // that is under way, as its line says; empty for none
	last  string    // line of output
	tail  []string  // last lines of the step's output
	bar   *hostagentv1.BuildProgress
	told  time.Time // when a plain line last said how far the bar is
}

// newBuildView returns a view that runs until close. progress is auto, plain or tty.
func newBuildView(out io.Writer, progress string, quiet bool) (*buildView, error) {
	v := &buildView{out: out, quiet: quiet, stop: make(chan struct{}), gone: make(chan struct{}), began: time.Now()}
	tty := term.IsTerminal(int(os.Stderr.Fd()))
	switch progress {
	case "auto", "plain":
	case "tty":
		if !tty {
			return nil, fmt.Errorf("--progress tty needs a terminal, and stderr is none; plain prints lines")
		}
	default:
		return nil, fmt.Errorf("--progress %q is unknown: use auto, plain or tty", progress)
	}
	if tty && progress != "plain" && !quiet {
		v.raw = os.Stderr
	}
	go v.run()
	return v, nil
}

func (v *buildView) run() {
	defer close(v.gone)
	if v.raw == nil {
		return
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-v.stop:
			fmt.Fprint(v.raw, "\r\x1b[K")
			return
		case <-tick.C:
			v.paint()
		}
	}
}

// close ends the line that changes.
func (v *buildView) close() { close(v.stop); <-v.gone }

// paint writes the line that changes.
func (v *buildView) paint() {
	v.mu.Lock()
	defer v.mu.Unlock()
	took := time.Since(v.began)
	line := fmt.Sprintf("%s %.1fs", v.step, took.Seconds())
	switch {
	case v.bar != nil:
		line = strings.TrimSpace(v.bar.Stage+" "+v.bar.Detail) + " " + barText(v.bar.Done, v.bar.Total, took)
	case v.step == "":
		line = fmt.Sprintf("%s %.1fs", v.last, took.Seconds())
	case v.last != "":
		line += "  " + v.last
	}
	width := 80
	if w, _, err := term.GetSize(int(os.Stderr.Fd())); err == nil && w > 20 {
		width = w
	}
	fmt.Fprint(v.raw, "\r\x1b[K"+shortened(printableLine(line), width-1))
}

// say prints a whole line. Called with mu held.
func (v *buildView) say(format string, args ...any) {
	if v.quiet {
		return
	}
	if v.raw != nil {
		fmt.Fprint(v.raw, "\r\x1b[K")
	}
	fmt.Fprintf(v.out, format+"\n", args...)
}

// entry shows a line of the log.
func (v *buildView) entry(e *hostagentv1.BuildLogEntry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	message := strings.TrimRight(e.Message, "\n")
	head := stepLine.FindStringSubmatch(message)
	if v.bar != nil { // what it showed is over
		v.bar, v.began = nil, time.Now()
	}
	switch {
	case v.raw == nil && head != nil:
		v.say("%s", strings.ReplaceAll(message, "\n", "\n  "))
	case v.raw == nil:
		v.say("%s", indented(message))
	case head != nil:
		v.endStep()
		if head[1] != "" {
			v.say("%s", shortened(message, 200))
			return
		}
		v.step, v.last, v.tail, v.began = shortened(message, 100), "", nil, time.Now()
	case e.Level == "warn":
		v.say("%s", indented(message))
	default:
		v.last = shortened(message, 200)
		v.tail = append(v.tail, message)
		v.tail = v.tail[max(0, len(v.tail)-tailLines):]
	}
}

// endStep prints the step that was under way, with the time that it took.
func (v *buildView) endStep() {
	if v.step != "" {
		v.say("%s %.1fs", v.step, time.Since(v.began).Seconds())
	}
	v.step = ""
}

// progress shows how far something has come.
func (v *buildView) progress(p *hostagentv1.BuildProgress) {
	v.mu.Lock()
	defer v.mu.Unlock()
	fresh := v.bar == nil || v.bar.Stage != p.Stage
	if v.bar = p; fresh {
		v.began = time.Now()
	}
	done := p.Total > 0 && p.Done >= p.Total
	if v.raw != nil || v.quiet || !fresh && !done && time.Since(v.told) < plainProgress {
		return
	}
	if done && !fresh && v.told.IsZero() {
		return // it was said
	}
	v.told = time.Now()
	text := strings.TrimSpace(p.Stage+" "+p.Detail) + " " + bytesText(p.Done)
	if p.Total > 0 {
		text += " of " + bytesText(p.Total)
	}
	text = printableLine(text)
	if done {
		v.told = time.Time{}
	}
	v.say("%s", text)
}

// moved counts bytes of a transfer of this program's own.
func (v *buildView) moved(p *hostagentv1.BuildProgress, n int) {
	p.Done += int64(n)
	v.progress(p)
}

// failed shows the end of the output of the step that failed.
func (v *buildView) failed() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.raw == nil {
		return
	}
	v.endStep()
	for _, line := range v.tail {
		v.say("%s", indented(line))
	}
}

// indented is a text, which may be a guest's, as lines that look like no message of this
// program's own.
func indented(text string) string { return "  " + strings.ReplaceAll(text, "\n", "\n  ") }

// finished shows that the last step has ended.
func (v *buildView) finished() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.endStep()
}

// barText is a bar of bytes with its rate.
func barText(done, total int64, took time.Duration) string {
	return strings.TrimPrefix(copyLine(done, total, took), "\r\x1b[K")
}
