package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// heap is how many bytes are in use after a collection.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// lines are as many header lines, each another name, as fit into n bytes.
func lines(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%x:\r\n", i)
	}
	return b.Bytes()
}

// Servers that say all that they can think of take little of the agent, however
// many there are.
func TestHostileServers(t *testing.T) {
	// With the race detector up to 257 KiB were seen; without the bounds it is
	// megabytes.
	const n, perRequest = 100, 512 << 10
	end, many := "\r\n", lines(9<<20)
	for name, say := range map[string]func(w io.Writer){
		"nine megabytes of one header": func(w io.Writer) {
			fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nX: ")
			for range 9 << 10 {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 1<<10)); err != nil {
					return
				}
			}
			io.WriteString(w, end+end)
		},
		"nine megabytes of headers": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\n")
			w.Write(many)
			io.WriteString(w, end)
		},
		"as many headers as pass": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\n")
			w.Write(lines(maxResponseHead - 1024))
			io.WriteString(w, "Content-Length: 9\r\n\r\n")
		},
		"one status line": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 ")
			for range 9 << 10 {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 1<<10)); err != nil {
					return
				}
			}
		},
		"early answers": func(w io.Writer) {
			for range 100_000 {
				if _, err := io.WriteString(w, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"); err != nil {
					return
				}
			}
		},
		"chunk extension": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
			for range 9 << 10 {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 1<<10)); err != nil {
					return
				}
			}
		},
		"trailers": func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
			w.Write(many)
			io.WriteString(w, end)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.max = n
			w.dns.set("hostile.test", "192.0.2.1")
			var said sync.WaitGroup
			said.Add(n)
			w.serve("192.0.2.1:80", func(c net.Conn) {
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					say(c)
				}
				said.Done()
				io.Copy(io.Discard, c)
			})
			w.start(Policy{Allow: []string{"hostile.test"}})
			before := heap()
			for range n {
				c := w.dial("192.0.2.1:80")
				io.WriteString(c, "GET / HTTP/1.1\r\nHost: hostile.test\r\n\r\n")
			}
			done := make(chan struct{})
			go func() { said.Wait(); close(done) }()
			most := int64(0)
			for deadline, going := time.Now().Add(timeout/2), true; going && time.Now().Before(deadline); {
				select {
				case <-done:
					going = false
				case <-time.After(50 * time.Millisecond):
				}
				most = max(most, heap()-before)
			}
			t.Logf("%d connections: %d KiB each", n, most/n>>10)
			if most > n*perRequest {
				t.Errorf("%d servers took %d bytes each, want up to %d", n, most/n, perRequest)
			}
		})
	}
}

// Requests are no way in for what is too much either.
func TestHostileRequests(t *testing.T) {
	w := newWorld(t)
	w.dns.set("good.test", "192.0.2.1")
	w.serveHTTP("192.0.2.1:80", "good")
	w.start(Policy{Allow: []string{"good.test"}})
	for name, head := range map[string][]byte{
		"a long line": append([]byte("X: "), bytes.Repeat([]byte("x"), maxRequestHead+8<<10)...),
		"many lines":  lines(8 * (maxLines + 1)),
	} {
		c := w.dial("192.0.2.1:80")
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: good.test\r\n")
		c.Write(head)
		io.WriteString(c, "\r\n\r\n")
		answer, _ := io.ReadAll(c)
		if bytes.Contains(answer, []byte("200 OK")) {
			t.Errorf("%s: %.60q", name, answer)
		}
	}
	if len(w.dialed) > 0 {
		t.Errorf("dialled %v", w.dialed)
	}
}

// An answer may have early ones before it and some hundred lines.
func TestLargeAnswerPasses(t *testing.T) {
	w := newWorld(t)
	w.dns.set("good.test", "192.0.2.1")
	w.serve("192.0.2.1:80", func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n")
			for i := range 200 {
				fmt.Fprintf(c, "X-%d: %s\r\n", i, strings.Repeat("x", 100))
			}
			io.WriteString(c, "Content-Length: 600\r\n\r\n"+strings.Repeat("\n", 600))
		}
	})
	w.start(Policy{Allow: []string{"good.test"}})
	c := w.dial("192.0.2.1:80")
	r := bufio.NewReader(c)
	for range 3 {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: good.test\r\n\r\n")
		for code := 103; code == 103; {
			resp, err := http.ReadResponse(r, nil)
			must(t, err)
			body, err := io.ReadAll(resp.Body)
			if code = resp.StatusCode; code == 200 && (len(body) != 600 || len(resp.Header) < 200 || err != nil) {
				t.Errorf("%d bytes, %d headers, %v", len(body), len(resp.Header), err)
			}
		}
	}
}

// A sandbox has so many connections that speak HTTP; one more waits.
func TestHTTPWaitsForATurn(t *testing.T) {
	w := newWorld(t)
	w.max = maxHTTP + 2
	w.dns.set("slow.test", "192.0.2.1")
	begun := make(chan net.Conn, maxHTTP+1)
	w.serve("192.0.2.1:80", func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			begun <- c
			io.Copy(io.Discard, c)
		}
	})
	w.start(Policy{Allow: []string{"slow.test"}})
	var conns []net.Conn
	for range maxHTTP + 1 {
		c := w.dial("192.0.2.1:80")
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: slow.test\r\n\r\n")
		conns = append(conns, c)
	}
	for range maxHTTP {
		<-begun
	}
	select {
	case <-begun:
		t.Errorf("more than %d speak HTTP", maxHTTP)
	case <-time.After(100 * time.Millisecond):
	}
	for _, c := range conns[:maxHTTP/2] {
		c.Close()
	}
	select {
	case <-begun:
	case <-time.After(timeout):
		t.Error("no turn came")
	}
}

// Each connection takes two descriptors of the agent, both while it moves bytes
// and while it does not.
func TestConnectionsTakeTwoDescriptors(t *testing.T) {
	w := newWorld(t)
	w.max = 64
	w.dns.set("echo.test", "192.0.2.1")
	w.serve("192.0.2.1:9", func(c net.Conn) {
		for b := make([]byte, 1024); ; {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			c.Write(b[:n])
		}
	})
	w.start(Policy{Allow: []string{"echo.test"}})
	var hello bytes.Buffer
	tls.Client(recorder{&hello}, &tls.Config{ServerName: "echo.test"}).Handshake()
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(fds)
	}
	before := count()
	const n = 50
	for range n {
		c := w.dial("192.0.2.1:9")
		c.Write(hello.Bytes())
		_, err := io.ReadFull(c, make([]byte, hello.Len()))
		must(t, err)
	}
	// The client's and the server's end are the test's own.
	if got := count() - before; got > 4*n {
		t.Errorf("%d connections take %d descriptors, want %d", n, got, 4*n)
	}
}

// A guest asks the resolvers so much and no more.
func TestQuestionsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.dns.set("good.test", "192.0.2.1")
	w.start(Policy{Allow: []string{"*.good.test"}})
	begin := time.Now()
	c, err := net.Dial("udp4", w.proxy.cfg.DNSPacket.LocalAddr().String())
	must(t, err)
	defer c.Close()
	for i := range 5000 {
		c.Write(question(fmt.Sprintf("x%d.good.test.", i), dnsmessage.TypeA, uint16(i)))
	}
	// The proxy may not have had its turn yet.
	for end := time.Now().Add(timeout); len(w.dns.questions()) < questionRate/4 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	w.proxy.Close()
	most := 2*questionRate + int(time.Since(begin).Seconds()*questionRate) + 1
	if got := len(w.dns.questions()); got < questionRate/4 || got > most {
		t.Errorf("%d questions went on, want up to %d", got, most)
	}
}

func TestLogIsBounded(t *testing.T) {
	var log lockedBuffer
	w := newWorld(t)
	w.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	w.start(Policy{Allow: []string{"good.test"}})
	begin := time.Now()
	for range 200 {
		c := w.dial("192.0.2.1:80")
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: "+strings.Repeat("x", 2000)+"\r\n\r\n")
		io.Copy(io.Discard, c)
		c.Close()
	}
	w.proxy.Close()
	most := 2*logRate + int(time.Since(begin).Seconds()*logRate) + 1
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) > most || len(lines[0]) > 1000 {
		t.Errorf("%d lines of %d bytes, want up to %d", len(lines), len(lines[0]), most)
	}
	if n := w.proxy.cfg.Shared.Counts().Refused; n < 200 {
		t.Errorf("%d refusals are counted", n)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
