package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// history reads what is remembered beyond a cursor.
func (r *rig) history(after uint64) (lines []string) {
	r.t.Helper()
	err := r.Events(r.t.Context(), after, false, func(e Event) error {
		lines = append(lines, fmt.Sprintf("%d %s %s %s", e.Cursor, e.From, e.To, e.Reason))
		return nil
	})
	if err != nil {
		r.t.Fatalf("events: %v", err)
	}
	return lines
}

func TestEventsTellALife(t *testing.T) {
	r := newRig(t)
	id := r.create()
	if err := errors.Join(r.Pause(t.Context(), id), r.Resume(t.Context(), id), r.Destroy(t.Context(), id)); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"1  creating ", "2 creating running ", "3 running paused ", "4 paused running ",
		"5 running stopping destroyed", "6 stopping stopped destroyed",
	}
	if got := r.history(0); !slices.Equal(got, want) {
		t.Errorf("events are %q, want %q", got, want)
	}
	if got := r.history(4); !slices.Equal(got, want[4:]) {
		t.Errorf("after 4: %q", got)
	}

	// The next agent remembers and goes on counting, also after a torn line. No
	// cursor that may have been given is given again.
	r.die()
	file := filepath.Join(r.dir, "state", "events.jsonl")
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(`{"cursor":7,"ti`)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	r.start()
	if got := r.history(0); !slices.Equal(got, want) {
		t.Errorf("after the restart: %q", got)
	}
	r.create()
	var next []uint64
	err = r.Events(t.Context(), 6, false, func(e Event) error { next = append(next, e.Cursor); return nil })
	if err != nil || len(next) != 2 || next[0] <= cursorBlock || next[1] != next[0]+1 {
		t.Errorf("the next events are %v, %v", next, err)
	}
	err = r.Events(t.Context(), next[1]+99, false, func(Event) error { return nil })
	wantClass(t, err, errdefs.InvalidArgument)
}

func TestEventsThatAreForgotten(t *testing.T) {
	l, err := openEvents(filepath.Join(t.TempDir(), "events"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer l.shut()
	const n = 2*keptEvents + 10
	for range n {
		if err := l.add(Event{To: Creating}); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err = l.after(1)
	wantClass(t, err, errdefs.NotFound)
	events, _, err := l.after(0)
	if err != nil || events[len(events)-1].Cursor != n || len(events) < keptEvents {
		t.Errorf("%d events are kept, %v", len(events), err)
	}
}

func TestEventsAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		ctx, cancel := context.WithCancel(t.Context())
		var seen []State
		ended := make(chan error, 1)
		go func() {
			ended <- r.Events(ctx, 0, true, func(e Event) error { seen = append(seen, e.To); return nil })
		}()
		synctest.Wait()
		r.create()
		synctest.Wait()
		if !slices.Equal(seen, []State{Creating, Running}) {
			t.Errorf("seen %v", seen)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the watch ended with %v", err)
		}
	})
}

func TestSetTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		info, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		id := info.ID
		time.Sleep(50 * time.Second)
		set := func(d time.Duration) {
			t.Helper()
			info, err := r.SetTimeout(t.Context(), id, d)
			if err != nil {
				t.Fatal(err)
			}
			if want := time.Now().Add(d); d > 0 && !info.ExpiresAt.Equal(want) || d == 0 && !info.ExpiresAt.IsZero() {
				t.Errorf("expires at %s, want %s", info.ExpiresAt, want)
			}
		}
		set(2 * time.Minute) // longer, counted from now
		time.Sleep(110 * time.Second)
		r.wantState(id, Running)
		set(0) // never
		time.Sleep(24 * time.Hour)
		r.wantState(id, Running)
		set(5 * time.Second) // shorter
		time.Sleep(7 * time.Second)
		if info := r.wantState(id, Stopped); info.Reason != Expired {
			t.Errorf("reason %s", info.Reason)
		}
		for _, bad := range []time.Duration{-time.Second, MaxTimeout + time.Second} {
			_, err := r.SetTimeout(t.Context(), id, bad)
			wantClass(t, err, errdefs.InvalidArgument)
		}
		_, err = r.SetTimeout(t.Context(), id, time.Minute)
		wantClass(t, err, errdefs.WrongState)
	})
}

func TestPausedHaveTheirOwnRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.KeepPaused = time.Hour })
		info, err := r.Create(t.Context(), CreateRequest{Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Pause(t.Context(), info.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Minute)
		r.wantState(info.ID, Paused)
		time.Sleep(2 * time.Minute)
		r.wantState(info.ID, Stopped)
	})
}

// A slot whose stray network does not come off is fenced off and tried again.
func TestStraySlotIsFencedAndRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		stray := r.create()
		r.die()
		if err := (store{dir: r.store.dir}).forget(stray); err != nil {
			t.Fatal(err)
		}
		r.faults.on("network.close", func(context.Context) error { return errFault })
		r.start()
		if n := len(r.net.fenced); n != 1 {
			t.Errorf("%d slots are fenced, want 1", n)
		}
		if info := r.wantState(r.create(), Running); info.HostIP == addr("10.11.0.1") {
			t.Error("the fenced slot was handed out")
		}
		r.faults.on("network.close", nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := len(r.net.fenced); n != 0 {
			t.Errorf("%d slots are still fenced", n)
		}
	})
}

// openLog opens an event log in dir.
func openLog(t *testing.T, dir string) *eventLog {
	t.Helper()
	l, err := openEvents(filepath.Join(dir, "events.jsonl"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.shut)
	return l
}

// A reader sees no cursor twice, and what comes after what is torn, whatever
// becomes of the file.
func TestNoCursorTwice(t *testing.T) {
	line := func(data []byte, n int) (from, to int) {
		for range n {
			from += bytes.IndexByte(data[from:], '\n') + 1
		}
		return from, from + bytes.IndexByte(data[from:], '\n')
	}
	for name, c := range map[string]struct {
		damage func(data []byte) []byte
		kept   int // of 20
	}{
		"whole":              {func(d []byte) []byte { return d }, 20},
		"torn in the middle": {func(d []byte) []byte { from, to := line(d, 10); return append(d[:from+20:from+20], d[to:]...) }, 19},
		"long line": {func(d []byte) []byte {
			from, to := line(d, 10)
			return slices.Concat(d[:from], bytes.Repeat([]byte("x"), 1<<20), d[to:])
		}, 19},
		"cursor flipped":      {func(d []byte) []byte { from, _ := line(d, 10); d[from+sealed.Len+10] ^= 1; return d }, 19},
		"reservation gone":    {func(d []byte) []byte { from, _ := line(d, 1); return d[from:] }, 20},
		"reservation flipped": {func(d []byte) []byte { _, to := line(d, 0); d[to-3] ^= 1; return d }, 20},
		"end lost":            {func(d []byte) []byte { from, _ := line(d, 15); return d[:from] }, 14},
		"end torn":            {func(d []byte) []byte { from, _ := line(d, 15); return d[:from+30] }, 14},
		"empty":               {func(d []byte) []byte { return nil }, 0},
		"unsealed line":       {func(d []byte) []byte { return append(d, `{"cursor":999999999,"to":"running"}`+"\n"...) }, 20},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := openLog(t, dir)
			for range 20 {
				if err := l.add(Event{To: Creating}); err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(dir, "events.jsonl")
			data, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, c.damage(data), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			for round := range 3 {
				l = openLog(t, dir)
				before, _, err := l.after(0)
				if err != nil || len(before) != c.kept+round {
					t.Errorf("%d events are left, want %d (%v)", len(before), c.kept+round, err)
				}
				if err := l.add(Event{To: Running}); err != nil {
					t.Fatal(err)
				}
				events, _, err := l.after(20)
				if c.kept == 0 {
					wantClass(t, err, errdefs.NotFound) // they cannot be told any more
					continue
				}
				if err != nil || len(events) != round+1 || events[round].Cursor <= 20 || round > 0 && events[round].Cursor <= events[round-1].Cursor {
					t.Errorf("after 20 there are %+v, %v", events, err)
				}
			}
		})
	}
}

// Whatever bit of the log is flipped, wherever it is cut and whatever stands in 512 bytes
// of it: each event that is read is one that was told, and only those are missing whose
// lines were damaged.
func TestDamagedEventsAreNotBelieved(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	for i, e := range []Event{
		{ID: "a", To: Creating}, {ID: "a", From: Creating, To: Running}, {ID: "b", To: Creating}, {ID: "a", Kind: Checkpointed},
		{ID: "a", From: Running, To: Paused}, {ID: "b", Kind: Updated}, {ID: "a", From: Paused, To: Stopped, Reason: Destroyed},
	} {
		e.Time, e.Template = time.Unix(int64(i), 0).UTC(), "minimal"
		if err := l.add(e); err != nil {
			t.Fatal(err)
		}
	}
	told := map[uint64]Event{}
	for _, e := range l.events {
		told[e.Cursor] = e
	}
	good, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	lineOf := func(at int) int { return bytes.Count(good[:at], []byte("\n")) }
	lines := lineOf(len(good))
	// want reads a log that is damaged in some of its lines.
	want := func(data []byte, damaged int, what string, at int) {
		t.Helper()
		l := &eventLog{next: 1, states: map[ID]State{}}
		// Lines that are gone from the end are not noticed, if any is left.
		whole, err := l.readFrom(bytes.NewReader(data))
		if err != nil || whole && (len(data) == 0 || !bytes.HasPrefix(good, data)) {
			t.Errorf("%s at %d: whole is %v, %v", what, at, whole, err)
		}
		for _, e := range l.events {
			if !reflect.DeepEqual(told[e.Cursor], e) {
				t.Errorf("%s at %d: event %+v was told as %+v", what, at, e, told[e.Cursor])
			}
		}
		if min := lines - 1 - damaged; len(l.events) < min {
			t.Errorf("%s at %d: %d events are left, want %d", what, at, len(l.events), min)
		}
	}
	for at := range good {
		for bit := range 8 {
			data := bytes.Clone(good)
			data[at] ^= 1 << bit
			if from := bytes.LastIndexByte(good[:at], '\n') + 1; at-from >= 8 && at-from < 16 && data[at]|0x20 == good[at]|0x20 {
				continue // a checksum's digit in upper case is the same digit
			}
			damaged := 1
			if good[at] == '\n' { // two lines become one
				damaged = 2
			}
			want(data, damaged, fmt.Sprintf("bit %d", bit), at)
		}
		want(good[:at], lines-lineOf(at), "cut", at)
		data := bytes.Clone(good)
		end := min(at+512, len(good))
		for i := at; i < end; i++ {
			data[i] = byte(i * 7)
		}
		want(data, min(lines, lineOf(end)-lineOf(at)+1), "garbled", at)
	}
}

// Lines of agents that wrote no checksums are read as they are.
func TestEventsWithoutChecksums(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	text := `{"cursor":1,"time":"2024-01-01T00:00:00Z","id":"a","to":"creating"}
{"cursor":2,"time":"2024-01-01T00:00:01Z","id":"a","from":"creating","to":"running"}
{"cursor":4,"time":"2024-01-01T00:00:02Z","id":"a","kind":"updated","from":"paused","to":"paused"}
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	want := []Event{
		{Cursor: 1, Time: at, ID: "a", To: Creating},
		{Cursor: 2, Time: at.Add(time.Second), ID: "a", From: Creating, To: Running},
		{Cursor: 4, Time: at.Add(2 * time.Second), ID: "a", Kind: Updated, From: Paused, To: Paused},
	}
	for range 2 { // the second time as this agent wrote it
		l := openLog(t, filepath.Dir(path))
		l.shut()
		if diff := cmp.Diff(want, l.events); diff != "" {
			t.Error(diff)
		}
	}
}

// A log that cannot be read is not taken for an empty one.
func TestUnreadableEventLogIsSetAside(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "events.jsonl")
	if err := errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, "kept"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, dir)
	if err := l.add(Event{To: Creating}); err != nil {
		t.Fatal(err)
	}
	if l.last() < uint64(time.Now().Add(-time.Minute).UnixMilli()) {
		t.Errorf("the first cursor is %d, which may have been given", l.last())
	}
	if _, err := os.Stat(filepath.Join(path+".unreadable", "kept")); err != nil {
		t.Error(err)
	}
}

// While no cursor can be reserved, none is given that is not.
func TestEventsOnAFullDisk(t *testing.T) {
	l := openLog(t, t.TempDir())
	l.mu.Lock()
	l.close()
	l.path = filepath.Join(t.TempDir(), "gone", "events.jsonl")
	l.mu.Unlock()
	given := 0
	for range 2 * cursorBlock {
		before := l.last()
		_ = l.add(Event{To: Creating})
		if l.last() > before {
			given++
		}
	}
	if uint64(given) > l.reserved || given < cursorBlock/2 {
		t.Errorf("%d cursors were given, %d are reserved", given, l.reserved)
	}
	if err := os.Mkdir(filepath.Dir(l.path), 0o700); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(l.retryAt))
	if err := l.add(Event{To: Creating}); err != nil {
		t.Error(err)
	}
}
