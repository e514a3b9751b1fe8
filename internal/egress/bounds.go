package egress

import (
	"bytes"
	"errors"
	"maps"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// What a sandbox and the servers that it talks to may take of the agent. Most
// of the memory is in HTTP: a request takes several times its head's bytes,
// for every line of it is taken apart, and so does an answer.
const (
	// defaultMaxConns is Config.MaxConns where it is 0.
	defaultMaxConns = 512
	// maxHTTP bounds the connections of one sandbox that speak HTTP at a time,
	// maxHTTPTogether those of all. Others wait for a turn.
	maxHTTP, maxHTTPTogether = 128, 1024
	// Heads of requests and answers, trailers beside. net/http allows itself
	// 4 KiB more for a request's, and 4 KiB for a line between chunks.
	maxRequestHead, maxResponseHead = 16 << 10, 32 << 10
	// maxLines bounds the lines of a head; those of early answers (1xx) count
	// with the answer's.
	maxLines = 256
	// relayBuffer is what each direction of a connection takes. It is not left to
	// the kernel to move the bytes: that takes two pipes, of a megabyte each.
	relayBuffer = 16 << 10

	// maxQuestions bounds the questions under way of one sandbox; more are
	// dropped, which resolvers in guests take for a lost datagram. Those of all
	// wait for one of maxTogether.
	maxQuestions, maxTogether = 64, 1024
	// questionRate bounds those that begin in a second, of one sandbox and of
	// all: each is a connection that the host remembers for half a minute.
	questionRate, questionRateTogether = 100, 1000
	// maxDNSConns bounds the TCP connections that ask.
	maxDNSConns = 16
	// logRate bounds the lines in the log that one sandbox causes.
	logRate = 10
)

// Shared bounds and counts what all proxies of an agent take together.
type Shared struct {
	conns, http, questions chan struct{}
	asked                  *rate

	open              atomic.Int64
	accepted, refused atomic.Uint64

	mu     sync.Mutex
	denied map[string]uint64
}

// CountDenied adds to what Counts.Denied says.
func (s *Shared) CountDenied(kind string, n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.denied == nil {
		s.denied = map[string]uint64{}
	}
	s.denied[kind] += n
}

// Counts are what all proxies have done so far, those that are closed among them.
type Counts struct {
	Open     int    // connections at present
	Accepted uint64 // connections begun
	Refused  uint64 // connections, requests and questions that were refused
	// Denied are those of them that a policy refused, and packets, by kind.
	Denied map[string]uint64
}

// Counts returns the present counts.
func (s *Shared) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Counts{Open: int(s.open.Load()), Accepted: s.accepted.Load(), Refused: s.refused.Load(), Denied: maps.Clone(s.denied)}
}

// NewShared bounds the connections of all proxies to conns.
func NewShared(conns int) *Shared {
	return &Shared{
		conns: make(chan struct{}, conns), http: make(chan struct{}, maxHTTPTogether),
		questions: make(chan struct{}, maxTogether), asked: newRate(questionRateTogether),
	}
}

// rate lets through so much a second, and twice that at once.
type rate struct {
	mu        sync.Mutex
	perSecond float64
	left      float64
	at        time.Time
}

func newRate(perSecond float64) *rate {
	return &rate{perSecond: perSecond, left: 2 * perSecond, at: time.Now()}
}

func (r *rate) allow() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.left = min(r.left+now.Sub(r.at).Seconds()*r.perSecond, 2*r.perSecond)
	r.at = now
	if r.left < 1 {
		return false
	}
	r.left--
	return true
}

// waitTurn takes a turn of each, or none and false if that takes longer than
// wait, or until done.
func waitTurn(done <-chan struct{}, wait time.Duration, turns ...chan struct{}) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for i, t := range turns {
		select {
		case t <- struct{}{}:
			continue
		case <-timer.C:
		case <-done:
		}
		for _, t := range turns[:i] {
			<-t
		}
		return false
	}
	return true
}

// tooManyLines says whether a head has more lines than may be.
func tooManyLines(h http.Header) bool {
	n := 0
	for _, v := range h {
		n += len(v)
	}
	return n > maxLines
}

var errLines = errors.New("the server's answer has too many header lines")

// headConn is a connection to a server of which the lines of each answer's head
// are counted as they come: what has been read of a head is kept for as long as
// the server likes to take for the rest.
type headConn struct {
	net.Conn

	mu    sync.Mutex
	in    bool   // a head
	lines int    // of it
	first []byte // line of it, its begin
	line  int    // bytes of the present line without its end
}

// expect says that the next that comes is the head of an answer.
func (c *headConn) expect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in, c.lines, c.first, c.line = true, 0, c.first[:0], 0
}

func (c *headConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.in && !c.count(b[:n]) {
		return 0, errLines
	}
	return n, err
}

// count looks at what was read; false if it is too much.
func (c *headConn) count(b []byte) bool {
	const status = "HTTP/1.1 100"
	for _, x := range b {
		if len(c.first) < len(status) {
			c.first = append(c.first, x)
		}
		switch {
		case x == '\r':
		case x != '\n':
			c.line++
		case c.line > 0:
			if c.lines++; c.lines > maxLines {
				return false
			}
			c.line = 0
		case len(c.first) == len(status) && c.first[9] == '1' && !bytes.HasSuffix(c.first, []byte("101")):
			// Another head follows. It counts with this one.
			c.lines++
			c.first = c.first[:0]
		default:
			c.in = false
			return true
		}
	}
	return true
}
