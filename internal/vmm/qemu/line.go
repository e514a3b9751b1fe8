package qemu

import (
	"context"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// lineIdle is how long a connection is kept that nothing uses. QEMU serves one at a time,
// and keeps the events in its memory that this process does not read: neither may last.
const lineIdle = time.Minute

// line is the way to one QEMU, for all of this process that talks to it. It keeps the
// connection of one operation for the next one, since to connect takes longer than most
// commands. Safe for concurrent use.
type line struct {
	path string
	// turn is held by the operation that uses the connection.
	turn chan struct{}

	mu sync.Mutex
	// kept is the connection that no operation uses, nil if there is none; forget closes
	// it after lineIdle.
	kept   *monitor
	forget *time.Timer
}

// lines are those of this process, by the path of the socket.
var lines = struct {
	sync.Mutex
	m map[string]*line
}{m: map[string]*line{}}

// newLine returns a line to the socket of a new QEMU at path. hangUp ends it.
func newLine(path string) *line {
	lines.Lock()
	defer lines.Unlock()
	return newLineLocked(path)
}

// lineTo returns the line to the socket at path. hangUp ends it.
func lineTo(path string) *line {
	lines.Lock()
	defer lines.Unlock()
	if l := lines.m[path]; l != nil {
		return l
	}
	return newLineLocked(path)
}

func newLineLocked(path string) *line {
	l := &line{path: path, turn: make(chan struct{}, 1)}
	lines.m[path] = l
	return l
}

// with runs f on a connection. ctx and limit bound the wait for the connection and f. The
// connection is closed if f fails: answers may be under way on it.
func (l *line) with(ctx context.Context, limit time.Duration, f func(*monitor) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		errdefs.Unavailable.Errorf("the VMM did not answer within %s", limit))
	defer cancel()
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return vmm.Cancelled(ctx, errdefs.Unavailable.Errorf("the VMM is busy"))
	}
	m := l.take()
	if m != nil && m.open() {
		m.begin(ctx)
	} else {
		if m != nil {
			m.close()
		}
		var err error
		if m, err = dial(ctx, l.path); err != nil {
			return err
		}
	}
	err := f(m)
	if err != nil || !m.end() {
		m.close()
		return err
	}
	l.keep(m)
	return nil
}

// take returns the kept connection, which is the caller's then.
func (l *line) take() *monitor {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.kept
	if l.kept = nil; l.forget != nil {
		l.forget.Stop()
	}
	return m
}

// keep keeps a connection for the next operation.
func (l *line) keep(m *monitor) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = m
	l.forget = time.AfterFunc(lineIdle, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.kept == m {
			l.kept = nil
			m.close()
		}
	})
}

// hangUp closes the connection that is kept, and forgets the line. An operation that is
// under way ends with its QEMU.
func (l *line) hangUp() {
	lines.Lock()
	if lines.m[l.path] == l {
		delete(lines.m, l.path)
	}
	lines.Unlock()
	if m := l.take(); m != nil {
		m.close()
	}
}
