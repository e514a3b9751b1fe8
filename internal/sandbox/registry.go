package sandbox

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// registry holds the sandboxes of a host in memory and is the one writer of their
// records on disk and of their events. It is safe for concurrent use.
type registry struct {
	store  store
	events *eventLog
	log    *slog.Logger

	mu    sync.Mutex
	boxes map[ID]*box
	ends  map[Reason]int // of sandboxes, since the start
	// draining: no more sandboxes are added.
	draining bool
}

var errShutDown = errdefs.Unavailable.Errorf("the host is shutting down")

// find returns the box of a sandbox. What is hidden is no sandbox.
func (r *registry) find(id ID) (*box, error) {
	b := r.lookup(id)
	if b == nil || b.hidden() {
		return nil, errdefs.NotFound.Errorf("sandbox %s does not exist", id)
	}
	return b, nil
}

// lookup returns the box of an id, nil if there is none.
func (r *registry) lookup(id ID) *box {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.boxes[id]
}

// all returns the boxes in no particular order, waiting guests included.
func (r *registry) all() []*box {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.AppendSeq(make([]*box, 0, len(r.boxes)), maps.Values(r.boxes))
}

// add makes a new box known, unless the manager shuts down.
func (r *registry) add(b *box) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return errShutDown
	}
	r.boxes[b.id] = b
	return nil
}

// adopt makes a record of an earlier agent known.
func (r *registry) adopt(rec Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.boxes[rec.ID] = newBox(rec)
}

// drain lets no more sandboxes be added.
func (r *registry) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// Draining says whether the manager is drained or shut down.
func (r *registry) Draining() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.draining
}

// countEnd counts a sandbox that has ended.
func (r *registry) countEnd(reason Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ends[reason]++
}

// endings counts the sandboxes that have ended, by reason.
func (r *registry) endings() map[Reason]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.ends)
}

// save changes the record, on disk first. On error the record is the old one in
// memory and, unless the error is errUnsettled, on disk. Called with the op lock
// held.
func (r *registry) save(b *box, change func(*Record)) error {
	rec := b.record()
	change(&rec)
	err := r.store.save(rec)
	if err != nil && rec.State != Stopping && rec.State != Stopped {
		return fmt.Errorf("save sandbox %s: %w", b.id, err)
	}
	// A full disk must not keep a sandbox from being freed: after a crash the
	// older record leads to the same release.
	b.set(func(now *Record) {
		if now.LastActiveAt.After(rec.LastActiveAt) {
			rec.LastActiveAt = now.LastActiveAt
		}
		*now = rec
	})
	if err != nil {
		r.log.Error("record not saved", "sandbox", b.id, "state", rec.State, "err", err)
	}
	return nil
}

// rewrite writes the record again as it is. Called with the op lock held.
func (r *registry) rewrite(b *box) error { return r.save(b, func(*Record) {}) }

// move changes the state of a sandbox. Called with the op lock held.
func (r *registry) move(b *box, to State, change func(*Record)) error {
	return r.moveWith(r.save, b, to, change)
}

// inMemory is a save of a sandbox that has no record on disk any more.
func inMemory(b *box, change func(*Record)) error {
	b.set(change)
	return nil
}

// moveWith is the one place where a state changes. Called with the op lock held.
func (r *registry) moveWith(save func(*box, func(*Record)) error, b *box, to State, change func(*Record)) error {
	from := b.record()
	if !slices.Contains(moves[from.State], to) {
		return fmt.Errorf("sandbox %s cannot become %s from %s", b.id, to, from.State)
	}
	now := time.Now().UTC()
	err := save(b, func(rec *Record) {
		rec.State, rec.StateAt = to, now
		if rec.Reason == "" || rec.Reason.passes() {
			rec.Reason, rec.Detail = "", ""
		}
		if to == Running || to == Paused {
			rec.LastActiveAt = now
		}
		switch to {
		case Running:
			rec.StartedAt, rec.PausedAt, rec.FilesOnly = now, time.Time{}, false
		case Paused, Hibernated:
			if rec.PausedAt.IsZero() { // a hibernated one was perhaps paused before
				rec.PausedAt = b.pausingSince(now)
			}
		}
		if change != nil {
			change(rec)
		}
	})
	if err != nil {
		return err
	}
	rec := b.record()
	if from.State == Waiting { // to callers the sandbox begins here
		from.State, from.StateAt = Creating, rec.CreatedAt
		r.tell(b, Event{Time: rec.CreatedAt, To: Creating, Actor: b.op.actor})
	}
	r.tell(b, Event{Time: now, From: from.State, To: to, Reason: rec.Reason, Actor: b.op.actor})
	r.log.Info("sandbox "+string(to), "sandbox", b.id, "from", from.State, "reason", rec.Reason,
		"after", now.Sub(from.StateAt).Round(time.Millisecond))
	return nil
}

// mark notes on a sandbox, whose state stays, why it does not work as it
// should, or with an empty reason that it does again. A mark that is there
// already is told once. The error concerns the record on disk alone: until
// the agent ends the mark stands all the same. Called with the op lock held.
func (r *registry) mark(b *box, reason Reason, detail string) error {
	rec := b.record()
	if rec.Reason == reason && rec.Detail == detail {
		return nil
	}
	change := func(rec *Record) { rec.Reason, rec.Detail = reason, detail }
	err := r.save(b, change)
	if err != nil {
		// The next agent finds out by itself.
		r.log.Error("mark not saved", "sandbox", b.id, "reason", reason, "err", err)
		b.set(change)
	}
	if rec.Reason != reason {
		r.tell(b, Event{Time: time.Now().UTC(), From: rec.State, To: rec.State, Reason: reason})
		r.log.Info("sandbox marked", "sandbox", b.id, "state", rec.State, "reason", reason, "detail", detail)
	}
	return err
}

// tell puts an event of a sandbox into the log. Of an unknown one the log knows the
// labels, if anything does. Of what is hidden there are none.
func (r *registry) tell(b *box, e Event) {
	if b.hidden() {
		return
	}
	e.ID = b.id
	if rec := b.record(); rec.State != Unknown {
		e.Labels, e.Template, e.TemplateID, e.Build = rec.Labels, rec.Template, rec.templateID(), rec.Build
		e.VCPUs, e.MemMiB = rec.VCPUs, rec.MemMiB
		e.EndAt = rec.EndAt
		if rec.PausedAt.IsZero() || e.From == Running { // it ran until now
			e.StartedAt = rec.StartedAt
		}
	}
	if err := r.events.add(e); err != nil {
		r.log.Warn("event not kept", "sandbox", e.ID, "to", e.To, "err", err)
	}
}

// note puts something into the log that a caller did to a sandbox, whose state stays.
func (r *registry) note(b *box, kind EventKind, by Actor) {
	state := b.state()
	r.tell(b, Event{Time: time.Now().UTC(), Kind: kind, From: state, To: state, Actor: by})
}

// forget drops a box of which nothing is left but its files. Called with the op lock
// held.
func (r *registry) forget(b *box) error {
	if err := r.store.forget(b.id); err != nil {
		return err
	}
	r.drop(b)
	return nil
}

// drop is forget of a box without files. Called with the op lock held.
func (r *registry) drop(b *box) {
	// Who waits for the op lock finds a sandbox that has ended.
	b.set(func(rec *Record) { rec.State = Stopped })
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.boxes[b.id] == b {
		delete(r.boxes, b.id)
	}
}
