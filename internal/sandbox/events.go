package sandbox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// EventKind says what an event is if not a change of state. The set is closed.
type EventKind string

const (
	// Updated: the sandbox got another timeout, deadline or network policy, or was looked
	// at again.
	Updated EventKind = "updated"
	// Checkpointed: a copy of its state was made, as a snapshot or for forks.
	Checkpointed EventKind = "checkpointed"
	// EgressDenied: its network policy refused something, which Detail says.
	EgressDenied EventKind = "egress_denied"
)

// Event is a change of a sandbox, of its state before all.
type Event struct {
	// Cursor is the event's place in the log: 1 is the first of all. Later events
	// have higher ones, not always the next.
	Cursor uint64    `json:"cursor"`
	Time   time.Time `json:"time"`
	ID     ID        `json:"id"`
	// Kind is empty for a change of state. From and To are the same for others.
	Kind EventKind `json:"kind,omitempty"`
	// From is empty for the first state of a sandbox.
	From   State  `json:"from,omitempty"`
	To     State  `json:"to"`
	Reason Reason `json:"reason,omitempty"`
	// Detail is printable, and at most some hundred bytes long.
	Detail string `json:"detail,omitempty"`
	// Actor is the caller that asked for the change; zero if the host made it by itself.
	Actor Actor `json:"actor,omitzero"`
	// What the record said after the change: what the sandbox comes from, its size, since
	// when it has run without a break (zero if it stood still), and its deadline. Earlier agents did not note it.
	Template   string    `json:"template,omitempty"`
	TemplateID string    `json:"templateID,omitempty"`
	Build      string    `json:"build,omitempty"`
	VCPUs      int       `json:"vcpus,omitempty"`
	MemMiB     int       `json:"memMiB,omitempty"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	EndAt      time.Time `json:"endAt,omitzero"`

	Labels
}

const (
	// keptEvents is how many events can be read again at least. Those of the last
	// eventsFor can, too, but no more than mostEvents.
	keptEvents = 10_000
	mostEvents = 100_000
	eventsFor  = 7 * 24 * time.Hour
	// maxEventBytes is the size at which the log's file is written anew with
	// the kept events alone, unless those alone had more than half of it.
	maxEventBytes = 8 << 20
	// maxEventLine bounds a line of the file; they have about 400 bytes, and
	// metadata, each byte of which may be written as six.
	maxEventLine = 8<<10 + 6*MaxMetadataBytes
	// cursorBlock is how many cursors are reserved on disk at a time. After half
	// of them the next are.
	cursorBlock = 10_000
)

// eventLog is an append-only log, kept in memory and in a file of one JSON
// object a line. The file outlives the agent; its last lines may not outlive the
// host's power.
//
// No cursor is given twice, whatever becomes of the file. Those that may be given
// are reserved before, durably, by a line of its own; the next agent begins beyond
// them. Where the file is damaged nothing in it proves which have been given, and
// the next agent begins with the present time in milliseconds, which no counting
// reaches. So there are gaps between cursors, and events may be missing in one.
type eventLog struct {
	path string

	mu sync.Mutex
	f  *os.File
	// size is the file's, kept what it was when the file was last written anew, with
	// keptEvents events.
	size, kept, keptEvents int
	// labelled are the sandboxes whose labels are in the file: the first line of each
	// has them, the others do not.
	labelled map[ID]bool
	events   []Event // in order
	// states are those of sandboxes that have not stopped, by the newest event of each.
	states map[ID]State
	// next is the cursor of the event to come; those up to reserved may be given.
	next, reserved uint64
	// retryAt is when a file that could not be written is tried again: all of it
	// would be written.
	retryAt time.Time
	// writeHook is set by tests: its error is that of a write.
	writeHook func() error
	// more is closed, and made anew, when an event has come.
	more chan struct{}
}

// eventLine is a line of the file: an event, or a reservation.
type eventLine struct {
	Event
	Reserved uint64 `json:"reserved,omitempty"`
}

// openEvents reads the log of an earlier agent. What is torn is skipped. A file
// that cannot be read is set aside.
func openEvents(path string, log *slog.Logger) (*eventLog, error) {
	l := &eventLog{path: path, more: make(chan struct{}), next: 1, states: map[ID]State{}}
	whole, err := l.read()
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		aside := path + ".unreadable"
		log.Error("event log cannot be read and is set aside", "to", aside, "err", err)
		if err := os.Rename(path, aside); err != nil {
			return nil, fmt.Errorf("set event log aside: %w", err)
		}
		l.jump()
	case !whole:
		log.Warn("event log is damaged or of an earlier agent, what can be read of it is kept", "events", len(l.events))
		l.jump()
	}
	if err := l.rewrite(); err != nil {
		// Nothing is told until there is room: see add.
		log.Error("event log not written", "err", err)
	}
	return l, nil
}

// jump leaves the cursors behind of which it is not known whether they were given.
func (l *eventLog) jump() {
	if now := time.Now().UnixMilli(); now > 0 {
		l.next = max(l.next, uint64(now))
	}
}

// read takes the events from the file, and says whether all of it is as it was
// written.
func (l *eventLog) read() (whole bool, err error) {
	f, err := os.Open(l.path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return l.readFrom(f)
}

// readFrom is read of the file's content.
func (l *eventLog) readFrom(f io.Reader) (whole bool, err error) {
	type found struct {
		Event
		sealed bool
	}
	var lines []found
	labels := map[ID]Labels{}
	anySealed := false
	whole = true
	r := bufio.NewReaderSize(f, maxEventLine)
	for {
		text, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			whole = whole && len(text) == 0
			break
		}
		long := errors.Is(err, bufio.ErrBufferFull)
		if err != nil && !long {
			return false, err
		}
		var line eventLine
		object, bad := unseal(text)
		if long || bad != nil || json.Unmarshal(object, &line) != nil {
			whole = false
			continue
		}
		if sealed.Has(text) {
			anySealed = true
			l.reserved = max(l.reserved, line.Reserved)
		}
		if line.Reserved != 0 {
			continue
		}
		if first, ok := labels[line.ID]; ok && line.Labels.isZero() {
			line.Labels = first
		} else if !line.Labels.isZero() {
			labels[line.ID] = line.Labels
		}
		lines = append(lines, found{line.Event, sealed.Has(text)})
		if len(lines) > 4*mostEvents { // which no agent writes
			lines = slices.Clone(lines[2*mostEvents:])
		}
	}
	// Earlier agents wrote neither checksums nor reservations.
	for _, line := range lines {
		switch {
		case anySealed && !line.sealed:
			whole = false
		case line.Cursor > l.last():
			l.events = append(l.events, line.Event)
			l.noteState(line.Event)
		default:
			whole = false
		}
	}
	whole = whole && l.reserved >= l.last() && l.reserved > 0
	l.next = max(l.reserved, l.last()) + 1
	return whole, nil
}

// last is the cursor of the newest event. Called with mu held.
func (l *eventLog) last() uint64 {
	if len(l.events) == 0 {
		return 0
	}
	return l.events[len(l.events)-1].Cursor
}

// lastOf returns the newest event of a sandbox that is remembered.
func (l *eventLog) lastOf(id ID) (Event, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.newestOf(id)
}

// newestOf is lastOf with mu held.
func (l *eventLog) newestOf(id ID) (Event, bool) {
	for _, e := range slices.Backward(l.events) {
		if e.ID == id {
			return e, true
		}
	}
	return Event{}, false
}

// ran says whether an event tells that a sandbox ran.
func (l *eventLog) ran(id ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.events, func(e Event) bool { return e.ID == id && e.To == Running })
}

// encode returns a line, and notes that the file has the labels of its sandbox. Called
// with mu held.
func (l *eventLog) encode(line eventLine) ([]byte, error) {
	if l.labelled[line.ID] {
		line.Labels = Labels{}
	} else if !line.Labels.isZero() {
		l.labelled[line.ID] = true
	}
	data, err := json.Marshal(line)
	if err != nil {
		return nil, err
	}
	return append(sealed.Seal(data), '\n'), nil
}

// toKeep is where the events begin that are kept. Called with mu held.
func (l *eventLog) toKeep(now time.Time) int {
	from := max(0, len(l.events)-keptEvents)
	least := max(0, len(l.events)-mostEvents)
	for from > least && now.Sub(l.events[from-1].Time) < eventsFor {
		from--
	}
	return from
}

// rewrite replaces the file by the kept events, and reserves cursors. Called with
// mu held.
func (l *eventLog) rewrite() error {
	l.events = slices.Clone(l.events[l.toKeep(time.Now()):])
	reserved := l.next + cursorBlock
	lines := []eventLine{{Reserved: reserved}}
	for _, e := range l.events {
		lines = append(lines, eventLine{Event: e})
	}
	var text bytes.Buffer
	l.labelled = map[ID]bool{}
	for _, line := range lines {
		data, err := l.encode(line)
		if err != nil {
			return fmt.Errorf("write event log: %w", err)
		}
		text.Write(data)
	}
	l.close()
	err := atomicfile.Write(l.path, text.Bytes(), 0o600)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	}
	if err != nil {
		l.retryAt = time.Now().Add(retryFirst)
		return fmt.Errorf("write event log: %w", err)
	}
	l.f, l.size, l.kept, l.reserved = f, text.Len(), text.Len(), reserved
	l.keptEvents = len(l.events)
	return nil
}

// reserve reserves the next cursors. Called with mu held.
func (l *eventLog) reserve() error {
	reserved := l.next + cursorBlock
	err := l.write(eventLine{Reserved: reserved})
	if err == nil {
		err = l.f.Sync()
	}
	if err == nil {
		l.reserved = reserved
	}
	return err
}

// write appends a line to the file. After half a line the file is written anew
// next time. Called with mu held.
func (l *eventLog) write(line eventLine) error {
	data, err := l.encode(line)
	if err != nil {
		return err
	}
	if l.writeHook != nil {
		if err := l.writeHook(); err != nil {
			l.close()
			return err
		}
	}
	n, err := l.f.Write(data)
	l.size += n
	if err != nil {
		l.close()
	}
	return err
}

// add appends an event, whose cursor it sets. The error concerns the file
// alone, as long as there are cursors that are reserved: a watcher sees the
// event all the same.
func (l *eventLog) add(e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	switch {
	case l.f == nil && time.Now().Before(l.retryAt):
		err = errors.New("the event log could not be written a moment ago")
	case l.f == nil || l.size > max(maxEventBytes, 2*l.kept) || len(l.events) > l.keptEvents+keptEvents:
		err = l.rewrite()
	case l.next+cursorBlock/2 > l.reserved:
		err = l.reserve()
	}
	if l.next > l.reserved {
		return fmt.Errorf("no cursor is left: %w", err)
	}
	l.follow(&e)
	l.noteState(e)
	e.Cursor = l.next
	l.next++
	l.events = append(l.events, e)
	close(l.more)
	l.more = make(chan struct{})
	if l.f == nil {
		return err
	}
	return errors.Join(err, l.write(eventLine{Event: e}))
}

// follow gives an event that is no change of state the state of the one before: operations
// end in another order than their events come. What is read from the file is left as it
// was told: the one before may be missing there. Called with mu held.
func (l *eventLog) follow(e *Event) {
	if e.Kind == "" {
		return
	}
	if state, known := l.states[e.ID]; known {
		e.From, e.To = state, state
	} else if last, ok := l.newestOf(e.ID); ok { // the sandbox may have stopped
		e.From, e.To = last.To, last.To
	}
}

// noteState notes the state that an event leads to. Called with mu held.
func (l *eventLog) noteState(e Event) {
	if e.To == Stopped {
		delete(l.states, e.ID)
	} else {
		l.states[e.ID] = e.To
	}
}

// after returns the events beyond a cursor, and what is closed when there are
// more.
func (l *eventLog) after(cursor uint64) ([]Event, <-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cursor >= l.next {
		return nil, nil, errdefs.InvalidArgument.Errorf("cursor %d is beyond the last event, %d", cursor, l.last())
	}
	if len(l.events) == 0 {
		return nil, l.more, nil
	}
	if first := l.events[0].Cursor; cursor != 0 && cursor+1 < first {
		return nil, nil, errdefs.NotFound.Errorf("events up to %d are no longer remembered, %d was asked for; begin with 0", first-1, cursor+1)
	}
	at, _ := slices.BinarySearchFunc(l.events, cursor, func(e Event, c uint64) int { return cmp.Compare(e.Cursor, c+1) })
	return slices.Clone(l.events[at:]), l.more, nil
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

// History returns what is remembered of the last seven days of a project's sandboxes,
// oldest first: of one sandbox, which may be gone, or of all if id is empty.
func (r *registry) History(project string, id ID) (events []Event) {
	return r.events.of(project, id, time.Now().Add(-eventsFor))
}

func (l *eventLog) of(project string, id ID, since time.Time) (events []Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.Project == project && (id == "" || e.ID == id) && e.Time.After(since) {
			e.Labels = e.Labels.clone()
			events = append(events, e)
		}
	}
	return events
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
