package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Event is one change of state.
type Event struct {
	// Cursor is the event's place in the log: 1 is the first of all.
	Cursor uint64    `json:"cursor"`
	Time   time.Time `json:"time"`
	ID     ID        `json:"id"`
	// From is empty for the first state of a sandbox.
	From   State  `json:"from,omitempty"`
	To     State  `json:"to"`
	Reason Reason `json:"reason,omitempty"`
}

const (
	// keptEvents is how many events can be read again.
	keptEvents = 10_000
	// maxEventBytes is the size at which the log's file is written anew with
	// the kept events alone.
	maxEventBytes = 8 << 20
)

// eventLog is an append-only log, kept in memory and in a file of one JSON
// object a line. The file outlives the agent, not the host's power.
type eventLog struct {
	path string

	mu     sync.Mutex
	f      *os.File
	size   int
	events []Event // in order, without gaps
	// more is closed, and made anew, when an event has come.
	more chan struct{}
}

// openEvents reads the log of an earlier agent. A torn last line, of an agent
// that died while writing, is dropped.
func openEvents(path string) (*eventLog, error) {
	l := &eventLog{path: path, more: make(chan struct{})}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read event log: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		var e Event
		if json.Unmarshal(lines.Bytes(), &e) != nil || len(l.events) > 0 && e.Cursor != l.last()+1 {
			continue
		}
		l.events = append(l.events, e)
	}
	if err := l.rewrite(); err != nil && !errdefs.IsDiskFull(err) {
		return nil, err
	}
	return l, nil // on a full disk the file as it is will do until the next event
}

// last is the cursor of the newest event. Called with mu held.
func (l *eventLog) last() uint64 {
	if len(l.events) == 0 {
		return 0
	}
	return l.events[len(l.events)-1].Cursor
}

// rewrite replaces the file by the kept events. Called with mu held.
func (l *eventLog) rewrite() error {
	l.events = l.events[max(0, len(l.events)-keptEvents):]
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	for _, e := range l.events {
		if err := enc.Encode(e); err != nil {
			return fmt.Errorf("write event log: %w", err)
		}
	}
	l.close()
	next := filepath.Join(filepath.Dir(l.path), ".events")
	err := os.WriteFile(next, text.Bytes(), 0o600)
	if err == nil {
		err = os.Rename(next, l.path)
	}
	if err == nil {
		l.f, err = os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	}
	if err != nil {
		return fmt.Errorf("write event log: %w", err)
	}
	l.size = text.Len()
	return nil
}

// add appends an event, whose cursor it sets. The error concerns the file
// alone: whoever watches sees the event all the same.
func (l *eventLog) add(e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Cursor = l.last() + 1
	l.events = append(l.events, e)
	close(l.more)
	l.more = make(chan struct{})

	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if l.f == nil || l.size > maxEventBytes || len(l.events) > 2*keptEvents {
		return l.rewrite()
	}
	n, err := l.f.Write(append(line, '\n'))
	l.size += n
	return err
}

// after returns the events beyond a cursor, and what is closed when there are
// more.
func (l *eventLog) after(cursor uint64) ([]Event, <-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cursor > l.last() {
		return nil, nil, errdefs.InvalidArgument.Errorf("cursor %d is beyond the last event, %d", cursor, l.last())
	}
	if len(l.events) == 0 {
		return nil, l.more, nil
	}
	first := l.events[0].Cursor
	switch {
	case cursor == 0:
		cursor = first - 1
	case cursor+1 < first:
		return nil, nil, errdefs.NotFound.Errorf("events up to %d are no longer remembered, %d was asked for; begin with 0", first-1, cursor+1)
	}
	return append([]Event(nil), l.events[cursor+1-first:]...), l.more, nil
}

// shut ends the log.
func (l *eventLog) shut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close()
}

// close is called with mu held.
func (l *eventLog) close() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

// Events hands every event beyond a cursor to fn, in order: first those that
// are remembered (all of them for 0), then, with follow, new ones as they
// happen, until ctx ends or fn returns an error. What has been read once reads
// the same again.
func (m *Manager) Events(ctx context.Context, after uint64, follow bool, fn func(Event) error) error {
	for {
		events, more, err := m.events.after(after)
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := fn(e); err != nil {
				return err
			}
			after = e.Cursor
		}
		if !follow {
			return nil
		}
		select {
		case <-more:
		case <-m.life.Done():
			return errdefs.Unavailable.Errorf("the host is shutting down")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
