package gateway

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// controlIdle and dataIdle bound the time in which a client that owes more
	// of a request's body sends nothing.
	controlIdle = 30 * time.Second
	dataIdle    = 5 * time.Minute
	// drainTime bounds how long the rest of a body is read after the answer. If it
	// were not read, a client that reads its answer late would lose it.
	drainTime = 2 * time.Second
)

// errStalled: more of a body is to come, and the client has sent nothing for too
// long.
var errStalled = fmt.Errorf("the client stopped sending: %w", os.ErrDeadlineExceeded)

// body is what a client sends in one request. The transport of a proxy reads it in
// a goroutine of its own, for which net/http promises too little. body promises
// that no read is under way when the handler returns, that none begins later, and
// that a read which gets no bytes ends.
type body struct {
	from io.ReadCloser
	// stop makes the read that is under way fail, and all later ones.
	stop func()
	// panicked gets what a read panicked with.
	panicked func(any)
	idle     time.Duration // 0 for no bound
	timer    *time.Timer   // runs while a read does; nil without a bound

	mu      sync.Mutex
	changed *sync.Cond
	reading bool
	ended   bool
	stalled bool
	err     error // of the last read; io.EOF means that all has come
}

// newBody takes over the body of a request that has one.
func newBody(w http.ResponseWriter, r *http.Request, idle time.Duration, panicked func(any)) *body {
	b := &body{from: r.Body, idle: idle, panicked: panicked}
	b.changed = sync.NewCond(&b.mu)
	control := http.NewResponseController(w)
	conn, ours := r.Context().Value(connKey{}).(*conn)
	b.stop = func() {
		if ours && r.ProtoMajor == 1 {
			conn.stopReading()
			return
		}
		_ = control.SetReadDeadline(time.Unix(1, 0))
	}
	if r.ProtoMajor == 1 {
		// A guest may answer before it has read all. Without this, net/http
		// waits for the rest of the body, with no bound, before it sends an
		// answer.
		_ = control.EnableFullDuplex()
	}
	return b
}

// idleFor is how long a data-plane request may send nothing. Calls whose
// requests are streams (gRPC, Connect) may be silent for as long as they like,
// like connections that are not HTTP any more.
func idleFor(r *http.Request) time.Duration {
	kind := strings.ToLower(r.Header.Get("Content-Type"))
	if strings.HasPrefix(kind, "application/connect+") || strings.HasPrefix(kind, "application/grpc") {
		return 0
	}
	return dataIdle
}

func (b *body) Read(p []byte) (n int, err error) {
	b.mu.Lock()
	if b.ended || b.reading {
		b.mu.Unlock()
		return 0, http.ErrBodyReadAfterClose
	}
	if b.err != nil {
		defer b.mu.Unlock()
		return 0, b.err
	}
	b.reading = true
	b.mu.Unlock()
	return b.read(p)
}

// read reads for the caller that has set reading.
func (b *body) read(p []byte) (n int, err error) {
	if b.idle > 0 {
		if b.timer == nil {
			b.timer = time.AfterFunc(b.idle, b.stall)
		} else {
			b.timer.Reset(b.idle)
		}
	}
	defer func() {
		// A panic in a transport's goroutine would end the program.
		if what := recover(); what != nil {
			b.panicked(what)
			err = errors.New("the body cannot be read")
		}
		if b.timer != nil {
			b.timer.Stop()
		}
		b.mu.Lock()
		if err != nil && err != io.EOF && b.stalled {
			err = errStalled
		}
		b.reading, b.err = false, err
		b.mu.Unlock()
		b.changed.Broadcast()
	}()
	return b.from.Read(p)
}

func (b *body) stall() {
	b.mu.Lock()
	b.stalled = true
	b.mu.Unlock()
	b.stop()
}

// bodyKey is the key of a request's body in its context.
type bodyKey struct{}

// answering is a connection to a guest that is used for one request. When it ends
// without an answer, it abandons the body, for which the transport would wait.
type answering struct {
	net.Conn
	body     *body
	answered bool // read and written by the transport's one reader
}

func (a *answering) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	a.answered = a.answered || n > 0
	if err != nil && !a.answered {
		a.body.abandon()
	}
	return n, err
}

// abandon ends a read that is under way, and refuses all later ones.
func (b *body) abandon() {
	b.mu.Lock()
	b.ended = true
	reading := b.reading
	b.mu.Unlock()
	if reading {
		b.stop()
	}
}

// hasStalled reports whether the client has sent nothing for too long; b may be
// nil.
func (b *body) hasStalled() bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stalled
}

// Close ends reading for the transport; end reads what is left.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	return nil
}

// end is called by the handler before it returns. A body that has not come in full
// ends its connection of HTTP/1, so that the rest is not taken for the next
// request. (net/http would look for the body's end later, and then start a second
// reader of the connection.) drain is false where the answer was cut off anyway.
func (b *body) end(w http.ResponseWriter, r *http.Request, drain bool) {
	b.mu.Lock()
	b.ended = true
	done := b.err != nil && !b.reading
	b.mu.Unlock()
	if done {
		if b.err != io.EOF {
			b.stop()
		}
		return
	}
	if drain && r.ProtoMajor == 1 && r.Header.Get("Expect") == "" {
		_ = http.NewResponseController(w).Flush()
		defer time.AfterFunc(drainTime, b.stop).Stop()
	} else {
		b.stop()
	}
	b.mu.Lock()
	for b.reading {
		b.changed.Wait()
	}
	b.reading = b.err == nil
	left := b.reading
	b.mu.Unlock()
	rest := buffers.Get()
	defer buffers.Put(rest)
	for left {
		_, err := b.read(rest)
		left = err == nil
	}
	if b.err != io.EOF {
		b.stop()
	}
}
