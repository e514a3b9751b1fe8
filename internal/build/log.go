package build

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Bounds of one log. The lines of commands stay below; what the engine itself says has
// room above.
const (
	maxEntries  = 50_000
	maxLogBytes = 16 << 20
	maxMessage  = 8 << 10
	extraRoom   = 2_000 // entries
)

// Entry is a line of a build's log.
type Entry struct {
	At    time.Time `json:"at"`
	Level string    `json:"level"`
	// Step is "base", "finalize", "start", "ready", or the number of a step from 1.
	Step    string `json:"step,omitempty"`
	Message string `json:"message"`
}

var levels = []string{Debug, Info, Warn, Error}

// atLeast says whether an entry is of a level or above. Any other word is all levels.
func (e Entry) atLeast(level string) bool {
	return slices.Index(levels, e.Level) >= slices.Index(levels, level)
}

// buildLog is the log of a build that runs: in memory and in its file.
type buildLog struct {
	mu      sync.Mutex
	file    *os.File
	entries []Entry
	bytes   int
	dropped int
	ended   bool
	// more is closed, and another one made, when something was added or the log has ended.
	more chan struct{}
}

func newLog(path string) (*buildLog, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make log: %w", errdefs.DiskFull(err))
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make log: %w", errdefs.DiskFull(err))
	}
	return &buildLog{file: f, more: make(chan struct{})}, nil
}

// say adds what the engine says.
func (l *buildLog) say(level, step, format string, args ...any) {
	l.add(Entry{Level: level, Step: step, Message: fmt.Sprintf(format, args...)}, extraRoom)
}

// line adds a line that a command wrote, unless there are too many.
func (l *buildLog) line(level, step, text string) {
	l.add(Entry{Level: level, Step: step, Message: text}, 0)
}

func (l *buildLog) add(e Entry, room int) {
	e.At = time.Now().UTC()
	if len(e.Message) > maxMessage {
		e.Message = e.Message[:maxMessage] + "…"
	}
	e.Message = strings.ToValidUTF8(e.Message, "\ufffd")
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	if len(l.entries) >= maxEntries+room || room == 0 && l.bytes >= maxLogBytes {
		l.dropped++
		return
	}
	text, err := json.Marshal(e)
	if err != nil {
		return // there is no such entry
	}
	// A full disk costs the file's lines and ends the build elsewhere.
	_, _ = l.file.Write(append(text, '\n'))
	l.bytes += len(text)
	l.entries = append(l.entries, e)
	close(l.more)
	l.more = make(chan struct{})
}

// end closes the log.
func (l *buildLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.ended = true
		l.file.Close()
		close(l.more)
	}
}

// lost is how many lines of commands are not in the log.
func (l *buildLog) lost() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// from returns the entries from an offset on, whether the log has ended, and what is
// closed when there is more.
func (l *buildLog) from(offset int) (entries []Entry, ended bool, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if offset < len(l.entries) {
		entries = l.entries[max(offset, 0):len(l.entries):len(l.entries)]
	}
	return entries, l.ended, l.more
}

var idPattern = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// logPath is the file of a build's log.
func (e *Engine) logPath(template, build string) (string, error) {
	if !idPattern.MatchString(template) || !idPattern.MatchString(build) {
		return "", errdefs.NotFound.Errorf("there is no such build")
	}
	return filepath.Join(e.cfg.Dir, logsDir, template, build), nil
}

// entries returns the log of a build as it is now.
func (e *Engine) entries(template, build string) ([]Entry, error) {
	if r := e.find(template, build); r != nil {
		all, _, _ := r.log.from(0)
		return all, nil
	}
	path, err := e.logPath(template, build)
	if err != nil {
		return nil, err
	}
	return readLog(path)
}

func readLog(path string) ([]Entry, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	var all []Entry
	lines := bufio.NewReader(io.LimitReader(f, 4*maxLogBytes))
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return all, nil // a last line without an end was being written when the agent ended
		}
		var entry Entry
		if json.Unmarshal(line, &entry) == nil {
			all = append(all, entry)
		}
	}
}

// Log returns up to limit entries of a build's log from an offset on, 0 for no limit.
// level leaves out those below it, and offset counts those that are not left out. An
// entry never changes its offset. A build that is not known has none.
func (e *Engine) Log(template, build string, offset, limit int, level string) ([]Entry, error) {
	all, err := e.entries(template, build)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(slices.Clone(all), func(e Entry) bool { return !e.atLeast(level) })
	all = all[min(max(offset, 0), len(all)):]
	if limit > 0 {
		all = all[:min(limit, len(all))]
	}
	return all, nil
}

// Watch calls fn with each entry of a build's log from an offset on, until the build
// has ended and fn has had the last one, or fn or ctx ends it.
func (e *Engine) Watch(ctx context.Context, template, build string, from int, fn func(Entry) error) error {
	r := e.find(template, build)
	if r == nil {
		all, err := e.Log(template, build, from, 0, Debug)
		for _, entry := range all {
			if err := fn(entry); err != nil {
				return err
			}
		}
		return err
	}
	from = max(from, 0)
	for {
		entries, ended, more := r.log.from(from)
		for _, entry := range entries {
			if err := fn(entry); err != nil {
				return err
			}
		}
		from += len(entries)
		if len(entries) > 0 {
			continue
		}
		if ended {
			more = r.done // its status is written after its log
		}
		select {
		case <-more:
			if ended {
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
