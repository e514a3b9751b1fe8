package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

// TestEnding: a stream of messages that breaks off because the sandbox ended has a
// last message that says so. All else passes as it is.
func TestEnding(t *testing.T) {
	const (
		hello = "\x00\x00\x00\x00\x05hello"
		empty = "\x00\x00\x00\x00\x00"
		end   = "\x02\x00\x00\x00\x02{}"
		told  = "\x02\x00\x00\x00\x3b" + `{"error":{"code":"unavailable","message":"the vm is gone"}}`
	)
	broken := errors.New("connection reset")
	for _, tt := range []struct {
		name, kind, body string
		err              error
		gone             bool
		want             string
		wantErr          error
	}{
		{"whole", "application/connect+proto", hello + end, nil, true, hello + end, nil},
		{"broken after a message", "application/connect+proto", hello + empty, broken, true, hello + empty + told, nil},
		{"broken at once", "application/connect+json", "", broken, true, told, nil},
		{"closed without an end", "application/connect+json", hello, nil, true, hello + told, nil},
		{"in the middle of a message", "application/connect+proto", hello + hello[:8], broken, true, hello + hello[:8], broken},
		{"in the middle of a prefix", "application/connect+proto", hello + hello[:3], broken, true, hello + hello[:3], broken},
		{"in the middle of the end", "application/connect+proto", hello + end[:6], broken, true, hello + end[:6], broken},
		{"the sandbox lives", "application/connect+proto", hello, broken, false, hello, broken},
		{"a file", "application/octet-stream", hello, broken, true, hello, broken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.err
			if err == nil {
				err = io.EOF
			}
			for _, chop := range []func(io.Reader) io.Reader{
				func(r io.Reader) io.Reader { return r }, iotest.OneByteReader, iotest.DataErrReader,
			} {
				body := chop(io.MultiReader(strings.NewReader(tt.body), iotest.ErrReader(err)))
				resp := &http.Response{Header: http.Header{"Content-Type": {tt.kind}}, Body: io.NopCloser(body)}
				endWell(resp, func() string {
					if tt.gone {
						return "the vm is gone"
					}
					return ""
				}, t.Context())
				got, err := io.ReadAll(iotest.OneByteReader(resp.Body))
				if string(got) != tt.want || !errors.Is(err, tt.wantErr) {
					t.Errorf("%q, %v; want %q, %v", got, err, tt.want, tt.wantErr)
				}
			}
		})
	}
}

// An answer without a length that ends with its sandbox is cut off; one whose server
// closed the connection is whole.
func TestAnswerUntilTheConnectionCloses(t *testing.T) {
	over, end := context.WithCancel(t.Context())
	end()
	for _, c := range []struct {
		resp  http.Response
		alive context.Context
		want  error
	}{
		{http.Response{ProtoMajor: 1, ContentLength: -1}, over, io.ErrUnexpectedEOF},
		{http.Response{ProtoMajor: 1, ContentLength: -1}, t.Context(), nil},
		{http.Response{ProtoMajor: 1, ContentLength: -1, TransferEncoding: []string{"chunked"}}, over, nil}, // has an end of its own
		{http.Response{ProtoMajor: 1, ContentLength: 4}, over, nil},
		{http.Response{ProtoMajor: 2, ContentLength: -1}, over, nil},
	} {
		c.resp.Body = io.NopCloser(strings.NewReader("body"))
		endWell(&c.resp, func() string { return "" }, c.alive)
		if got, err := io.ReadAll(c.resp.Body); string(got) != "body" || !errors.Is(err, c.want) {
			t.Errorf("%+v: %q, %v; want %v", c.resp, got, err, c.want)
		}
	}
}

// When a sandbox ends, every stream from it is cut off or ends with an error that says
// so: no client takes it for the whole. Nothing of a stream is left.
func TestStreamsEndWithTheirSandbox(t *testing.T) {
	release := make(chan struct{})
	port := guest(t, func(w http.ResponseWriter, r *http.Request) {
		kind := strings.TrimPrefix(r.URL.Path, "/")
		if kind == "upgrade" {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "websocket")
			w.WriteHeader(http.StatusSwitchingProtocols)
		}
		if kind == "chunked" || kind == "connect" {
			if kind == "connect" {
				w.Header().Set("Content-Type", "application/connect+json")
			}
			fmt.Fprint(w, "\x00\x00\x00\x00\x02{}")
			_ = http.NewResponseController(w).Flush()
			<-release
			return
		}
		conn, rest, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		switch kind {
		case "length":
			_, _ = rest.WriteString("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("first", 100_000))
		case "closes":
			_, _ = rest.WriteString("HTTP/1.0 200 OK\r\n\r\nfirst")
		default:
			_, _ = rest.WriteString("first")
		}
		_ = rest.Flush()
		<-release
	})
	alive, end := context.WithCancel(t.Context())
	e := serve(t, func(c *Config) { c.Sandboxes = newManager(alive) })
	var all sync.WaitGroup
	begun := make(chan struct{})
	n := 0
	for _, kind := range []string{"chunked", "connect", "length", "closes", "upgrade", "tunnel"} {
		for _, client := range streamClients(t, e, port, kind) {
			n++
			all.Go(func() {
				got, err := client(func() { begun <- struct{}{} })
				switch {
				case kind == "connect":
					if err != nil || !strings.Contains(got, `"code":"unavailable"`) {
						t.Errorf("%s: %q, %v", kind, got, err)
					}
				case kind == "upgrade" || kind == "tunnel": // no HTTP any more: the connection's end is the end
				case err == nil:
					t.Errorf("%s: %q came as the whole", kind, got)
				}
			})
		}
	}
	for range n {
		<-begun
	}
	end()
	all.Wait()
	close(release)
	if err := e.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	noneLeft(t, e)
	e.quiet(t)
}

// streamClients begin a stream of a kind and read it to its end, over HTTP/1 and, where
// there is such a stream, HTTP/2. They call begun when its first bytes have come.
func streamClients(t *testing.T, e *edge, port, kind string) (all []func(begun func()) (string, error)) {
	read := func(r io.Reader, begun func()) (string, error) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(r, first); err != nil {
			begun()
			return "", fmt.Errorf("nothing came: %w", err)
		}
		begun()
		rest, err := io.ReadAll(r)
		return string(first) + string(rest), err
	}
	host := port + "-" + idA + ".x"
	overHTTP := func(client *http.Client) func(func()) (string, error) {
		return func(begun func()) (string, error) {
			req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+e.addr+"/"+kind, nil)
			if err != nil {
				return "", err
			}
			req.Host = host
			resp, err := client.Do(req)
			if err != nil {
				begun()
				return "", err
			}
			defer resp.Body.Close()
			return read(resp.Body, begun)
		}
	}
	if kind != "upgrade" && kind != "tunnel" {
		return append(all, overHTTP(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}), overHTTP(h2c(t)))
	}
	request := "GET /upgrade HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	if kind == "tunnel" {
		request = "CONNECT " + host + ":80 HTTP/1.1\r\n\r\nGET /raw HTTP/1.1\r\nHost: x\r\n\r\n"
	}
	c := e.dial(t)
	return append(all, func(begun func()) (string, error) {
		if _, err := io.WriteString(c, request); err != nil {
			return "", err
		}
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, &http.Request{Method: strings.Fields(request)[0]})
		if err != nil {
			begun()
			return "", err
		}
		if resp.StatusCode/100 > 2 {
			t.Errorf("%s: %s", kind, resp.Status)
		}
		return read(r, begun)
	})
}

// noneLeft waits until no goroutine of a request is left, nor anything that is counted.
func noneLeft(t *testing.T, e *edge) {
	t.Helper()
	stacks := make([]byte, 4<<20)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		text := string(stacks[:runtime.Stack(stacks, true)])
		e.mu.Lock()
		counted := len(e.count)
		e.mu.Unlock()
		left := strings.Count(text, "gateway.(*Gateway).ServeHTTP") + strings.Count(text, "internal/splice.") +
			strings.Count(text, "httputil.(*ReverseProxy)") + strings.Count(text, "http.(*persistConn)")
		if left == 0 && counted == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d frames, %d kinds of requests are left:\n%s", left, counted, text)
		}
	}
}
