// Package liar is a guest that means harm: a server in envd's place whose every
// answer is one lie of a table, for the tests of all that speaks to a guest.
package liar

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Token is what a test gives its client to show to the guest. Nothing else may
// ever see it.
const Token = "the-token-of-the-guest"

// MaxGrowth is by how much a client's memory may grow while it is lied to, in
// bytes. (The garbage of a few messages of the largest size is in it.)
const MaxGrowth = 64 << 20

// Guest serves one lie, on every connection and to every request.
type Guest struct {
	// Canary is what the lie may point to; nothing is to come there.
	Canary *Canary
	// Honest, if not nil, answers the requests below HonestPrefix instead of
	// the lie: those to the agent in front of the guest.
	Honest http.Handler

	lie      Lie
	listener net.Listener
	wg       sync.WaitGroup
	mu       sync.Mutex
	open     map[net.Conn]struct{} // nil once closed
	requests atomic.Int64
}

// HonestPrefix is how paths of the agent's own calls begin.
const HonestPrefix = "/hostagent."

// Start serves a lie at an address of the loopback until the test ends.
func Start(t testing.TB, lie Lie, addr string) *Guest {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{Canary: newCanary(t), lie: lie, listener: l, open: map[net.Conn]struct{}{}}
	g.wg.Go(g.serve)
	t.Cleanup(g.close)
	return g
}

// Addr is where the guest serves, URL the same as a client of HTTP wants it.
func (g *Guest) Addr() netip.AddrPort { return g.listener.Addr().(*net.TCPAddr).AddrPort() }
func (g *Guest) URL() string          { return "http://" + g.listener.Addr().String() }

// Within returns a context that ends when its deadline of d, counted from when
// the guest was first asked, has passed.
func (g *Guest) Within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		var asked time.Time
		for asked.IsZero() || time.Since(asked) < d {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if asked.IsZero() && g.Asked() {
					asked = time.Now()
				}
			}
		}
		cancel(context.DeadlineExceeded)
	}()
	return ctx, func() { cancel(nil) }
}

// Asked reports whether any request was lied to: a test that never reached the
// lie has shown nothing.
func (g *Guest) Asked() bool { return g.requests.Load() > 0 }

func (g *Guest) serve() {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return
		}
		g.mu.Lock()
		if g.open == nil {
			g.mu.Unlock()
			conn.Close()
			return
		}
		g.open[conn] = struct{}{}
		g.wg.Go(func() { g.answer(conn) })
		g.mu.Unlock()
	}
}

func (g *Guest) answer(conn net.Conn) {
	defer func() {
		g.mu.Lock()
		delete(g.open, conn)
		g.mu.Unlock()
		conn.Close()
	}()
	in := bufio.NewReader(conn)
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if g.Honest != nil && strings.HasPrefix(r.URL.Path, HonestPrefix) {
			recorded := httptest.NewRecorder()
			g.Honest.ServeHTTP(recorded, r)
			resp := recorded.Result()
			resp.ContentLength = int64(recorded.Body.Len())
			if resp.Write(conn) != nil {
				return
			}
			continue
		}
		g.requests.Add(1)
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		g.lie.answer(&reply{Conn: conn, request: r, canary: g.Canary.URL})
		// What was not read of the request or the answer does not become a
		// reset that takes the answer along.
		if tcp := conn.(*net.TCPConn); tcp.CloseWrite() == nil {
			_, _ = io.Copy(io.Discard, in)
		}
		return
	}
}

func (g *Guest) close() {
	g.listener.Close()
	g.mu.Lock()
	for conn := range g.open {
		conn.Close()
	}
	g.open = nil
	g.mu.Unlock()
	g.wg.Wait()
}

// Canary is a server that must not be called.
type Canary struct {
	*httptest.Server
	mu   sync.Mutex
	hits []string
}

func newCanary(t testing.TB) *Canary {
	c := &Canary{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hit := r.Method + " " + r.URL.Path
		for name, values := range r.Header {
			if strings.Contains(strings.Join(values, " "), Token) {
				hit += " with the guest's token in " + name
			}
		}
		c.mu.Lock()
		c.hits = append(c.hits, hit)
		c.mu.Unlock()
		_, _ = io.WriteString(w, "tweet")
	}))
	t.Cleanup(c.Server.Close)
	return c
}

// Hits are the requests that came all the same.
func (c *Canary) Hits() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.hits...)
}

// Growth runs f and returns by how many bytes the heap grew at most while f ran.
func Growth(f func()) int64 {
	runtime.GC()
	before, peak := heap(), int64(0)
	done, seen := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(seen)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			peak = max(peak, heap())
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	}()
	f()
	close(done)
	<-seen
	return max(peak, heap()) - before
}

func heap() int64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64())
}
