package envd

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// outputBuffer bounds the output of a process that is held for subscribers.
	outputBuffer = 256 << 10
	// chunkOverhead is counted for each chunk besides its bytes, so that the output
	// of a process that writes single bytes is bounded, too.
	chunkOverhead = 64
	// stallLimit is how long a process waits for subscribers that take nothing.
	stallLimit = 3 * time.Second
)

// stream is one of a process's outputs.
type stream int

const (
	stdout stream = iota
	stderr
	terminal
	streams
)

// chunk is a piece of output.
type chunk struct {
	stream stream
	data   []byte
	// offset is the number of the stream's bytes before this chunk.
	offset int64
}

// output carries what a process writes to its subscribers. The fastest subscriber
// sets the pace. A sole subscriber loses nothing however slow it is, as at the end
// of a pipe. A slow subscriber beside a faster one loses what does not fit into the
// buffer, and is told how much. Without subscribers, or when all have stalled, the
// process does not wait. Safe for concurrent use.
type output struct {
	mu     sync.Mutex
	chunks []chunk
	// first is the number of chunks[0], counting from the process's start.
	first int
	size  int
	total [streams]int64
	subs  map[*subscriber]struct{}
	// room is closed when a waiting writer may have space.
	room     chan struct{}
	progress time.Time
	stalled  bool
	ended    bool
}

func newOutput() *output {
	return &output{subs: make(map[*subscriber]struct{}), room: make(chan struct{})}
}

// subscriber reads an output. Its methods are for one goroutine.
type subscriber struct {
	out *output
	// next is the number of the chunk to take next.
	next int
	// seen is how far each stream was read.
	seen [streams]int64
	wake chan struct{}
}

// subscribe returns a subscriber to what is written from now on. The caller
// must close it.
func (o *output) subscribe() *subscriber {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.join(&subscriber{out: o, next: o.first + len(o.chunks), seen: o.total, wake: make(chan struct{}, 1)})
}

// resume returns a subscriber that has seen that many bytes of each stream. It gets
// the bytes after that which are still held; the others count as missed.
func (o *output) resume(seen [streams]int64) *subscriber {
	o.mu.Lock()
	defer o.mu.Unlock()
	for st := range streams {
		seen[st] = min(max(seen[st], 0), o.total[st])
	}
	return o.join(&subscriber{out: o, next: o.first, seen: seen, wake: make(chan struct{}, 1)})
}

func (o *output) join(s *subscriber) *subscriber {
	o.subs[s] = struct{}{}
	o.progressed()
	return s
}

// write appends a copy of data. It waits while the buffer is full and a
// subscriber is about to make room.
func (o *output) write(st stream, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	began := time.Now()
	for o.size > 0 && o.size+len(data)+chunkOverhead > outputBuffer {
		if o.mayDrop() {
			o.size -= len(o.chunks[0].data) + chunkOverhead
			o.chunks[0] = chunk{}
			o.chunks = o.chunks[1:]
			o.first++
			continue
		}
		o.awaitRoom(began)
	}
	o.chunks = append(o.chunks, chunk{st, append([]byte(nil), data...), o.total[st]})
	o.size += len(data) + chunkOverhead
	o.total[st] += int64(len(data))
	o.wakeAll()
}

// mayDrop reports whether the oldest chunk can be dropped.
func (o *output) mayDrop() bool {
	if o.stalled || len(o.subs) == 0 {
		return true
	}
	for s := range o.subs {
		if s.next > o.first {
			return true
		}
	}
	return false
}

// awaitRoom waits, without the lock, until a subscriber has moved or all of
// them count as stalled.
func (o *output) awaitRoom(began time.Time) {
	room := o.room
	since := began
	if o.progress.After(since) {
		since = o.progress
	}
	o.mu.Unlock()
	timer := time.NewTimer(time.Until(since.Add(stallLimit)))
	defer timer.Stop()
	var timedOut bool
	select {
	case <-room:
	case <-timer.C:
		timedOut = true
	}
	o.mu.Lock()
	if timedOut && !o.progress.After(since) {
		o.stalled = true
	}
}

// progressed notes that a subscriber came, moved or left.
func (o *output) progressed() {
	o.progress = time.Now()
	o.stalled = false
	close(o.room)
	o.room = make(chan struct{})
}

// end tells the subscribers that nothing more will come.
func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	o.wakeAll()
}

func (o *output) wakeAll() {
	for s := range o.subs {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// close ends the subscription.
func (s *subscriber) close() {
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	delete(s.out.subs, s)
	s.out.progressed()
}

// take returns the next piece of output, or false if there is none now; more says
// whether more can come. Missed output becomes a piece of its own: a line in the
// stream that lacks it.
func (s *subscriber) take() (c chunk, ok, more bool) {
	o := s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if s.next < o.first {
		s.next = o.first
	}
	for i := s.next - o.first; i < len(o.chunks); i++ {
		c = o.chunks[i]
		if known := s.seen[c.stream] - c.offset; known >= int64(len(c.data)) {
			s.next++
			continue
		} else if known > 0 {
			c.data, c.offset = c.data[known:], s.seen[c.stream]
		}
		if missed := c.offset - s.seen[c.stream]; missed > 0 {
			s.seen[c.stream] = c.offset
			return missedChunk(c.stream, missed), true, true
		}
		s.next++
		s.seen[c.stream] += int64(len(c.data))
		o.progressed()
		return c, true, true
	}
	// All that is left was read; a stream may have lost its very end.
	for st := range streams {
		if missed := o.total[st] - s.seen[st]; missed > 0 {
			s.seen[st] = o.total[st]
			return missedChunk(st, missed), true, true
		}
	}
	return chunk{}, false, !o.ended
}

func missedChunk(st stream, n int64) chunk {
	return chunk{stream: st, data: fmt.Appendf(nil, "\n[wrenn: %d bytes of output missed]\n", n)}
}

// await returns when take may have something new, or when ctx ends or tick fires.
// It returns whether tick fired.
func (s *subscriber) await(ctx context.Context, tick <-chan time.Time) (ticked bool) {
	select {
	case <-s.wake:
	case <-ctx.Done():
	case <-tick:
		return true
	}
	return false
}
