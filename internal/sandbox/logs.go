package sandbox

import (
	"bytes"
	"regexp"
	"strings"
	"time"
)

// LogLine is one line of what a guest printed on its console.
type LogLine struct {
	// At is when the agent read it.
	At time.Time
	// Level is debug, info, warn or error.
	Level string
	// Source is kernel or envd as far as the line looks like one of theirs, which a program
	// in the guest can imitate, and console otherwise.
	Source string
	// Message is the line, as UTF-8.
	Message string
}

// Logs returns what is kept of a guest's console, oldest first: its last half or whole
// MiB, without empty lines. It never waits for an operation.
func (r *registry) Logs(id ID) ([]LogLine, error) {
	if _, err := r.find(id); err != nil {
		return nil, err
	}
	lines, err := r.store.lines(id)
	if err != nil {
		return nil, err
	}
	logs := make([]LogLine, 0, len(lines))
	for _, l := range lines {
		if len(bytes.TrimSpace(l.Text)) == 0 {
			continue
		}
		source, level := classify(l.Text)
		logs = append(logs, LogLine{At: l.At, Level: level, Source: source, Message: strings.ToValidUTF8(string(l.Text), "\ufffd")})
	}
	return logs, nil
}

var (
	// kernelLine is a line of a kernel that prints times.
	kernelLine = regexp.MustCompile(`^\[ *[0-9]+\.[0-9]{6}\] `)
	// kernelTrouble are words of a kernel in trouble.
	kernelTrouble = regexp.MustCompile(`Kernel panic|Out of memory|\bBUG:|\bOops:|Call Trace:|I/O error|EXT4-fs error`)
	// envdLine is a line of envd's log, with its level.
	envdLine = regexp.MustCompile(`^time=\S+ level=(DEBUG|INFO|WARN|ERROR)`)
)

// classify says which program a line looks like, and of which level it is.
func classify(line []byte) (source, level string) {
	if m := envdLine.FindSubmatch(line); m != nil {
		return "envd", strings.ToLower(string(m[1]))
	}
	switch {
	case !kernelLine.Match(line):
		return "console", "info"
	case kernelTrouble.Match(line):
		return "kernel", "error"
	}
	return "kernel", "debug"
}
