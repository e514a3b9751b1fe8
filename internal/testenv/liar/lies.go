package liar

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"git.omukk.dev/wrenn/sandbox/api/process"
)

// Lie is one wrong answer.
type Lie struct {
	Name string
	// Endless is a lie that only the client's own time limit can end: it has
	// the form of an answer that has just not come to its end.
	Endless bool
	// OfStreams is a lie in the content of a stream of events; to any other
	// request it is an answer that has no meaning.
	OfStreams bool

	answer func(*reply)
}

// Escape is in each lie that has words: what a terminal would obey.
const Escape = "\x1b]52;c;cm0gLXJmIH4=\a\x1b[2J"

// reply is a connection that waits for the answer to a request.
type reply struct {
	net.Conn
	request *http.Request
	canary  string
}

func (r *reply) print(format string, args ...any) bool {
	_, err := fmt.Fprintf(r, format, args...)
	return err == nil
}

func (r *reply) isStream() bool {
	return strings.HasPrefix(r.request.Header.Get("Content-Type"), "application/connect+")
}

// contentType is what the client wants to get.
func (r *reply) contentType() string {
	if r.request.Header.Get("Connect-Protocol-Version") != "" {
		return r.request.Header.Get("Content-Type")
	}
	return "application/json"
}

// begin writes the header of an answer whose body comes in chunks.
func (r *reply) begin(status string, headers ...string) {
	r.print("HTTP/1.1 %s\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n", status, r.contentType())
	for _, h := range headers {
		r.print("%s\r\n", h)
	}
	r.print("\r\n")
}

func (r *reply) chunk(data []byte) bool {
	if len(data) == 0 {
		return true
	}
	return r.print("%x\r\n%s\r\n", len(data), data)
}

func (r *reply) end() { r.print("0\r\n\r\n") }

// words answers that the request was refused, in the form that fits it.
func (r *reply) words(code, text string) {
	text = strings.NewReplacer("\x1b", `\u001b`, "\a", `\u0007`, `"`, `\"`).Replace(text)
	if r.isStream() {
		r.begin("200 OK")
		r.chunk(frame(last, fmt.Appendf(nil, `{"error":{"code":%q,"message":"%s"}}`, code, text)))
	} else {
		r.begin("400 Bad Request")
		r.chunk(fmt.Appendf(nil, `{"code":%q,"message":"%s"}`, code, text))
	}
	r.end()
}

// last and compressed are the flags of a frame.
const (
	compressed = 1
	last       = 2
)

// frame is a message of a stream.
func frame(flags byte, data []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flags}, uint32(len(data))), data...)
}

func event(e *process.ProcessEvent) []byte {
	data, err := proto.Marshal(&process.StartResponse{Event: e})
	if err != nil {
		panic(err)
	}
	return frame(0, data)
}

var started = event(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})

func stdout(text string) []byte {
	return event(&process.ProcessEvent{Event: &process.ProcessEvent_Data{
		Data: &process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: []byte(text)}},
	}})
}

func ended(end *process.ProcessEvent_EndEvent) []byte {
	return event(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}})
}

// rubbish is what floods are made of.
var rubbish = bytes.Repeat([]byte("a"), 64<<10)

// flood writes up to n bytes of it.
func (r *reply) flood(n int) {
	for ; n > 0; n -= len(rubbish) {
		if _, err := r.Write(rubbish); err != nil {
			return
		}
	}
}

// repeat writes the same until the client has enough.
func (r *reply) repeat(data []byte) {
	many := bytes.Repeat(data, max(1, 16<<10/len(data)))
	for {
		if _, err := r.Write(many); err != nil {
			return
		}
	}
}

// drip writes a byte now and then, until the client has enough.
func (r *reply) drip() {
	for {
		if _, err := r.Write([]byte("a")); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// wait says nothing until the client has enough.
func (r *reply) wait() { _, _ = io.Copy(io.Discard, r) }

const gib = 1 << 30

// bomb is a gigabyte of zeros, packed.
var bomb = sync.OnceValue(func() []byte {
	const member = 16 << 20
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(make([]byte, member)); err != nil {
		panic(err)
	}
	w.Close()
	return bytes.Repeat(b.Bytes(), gib/member)
})

// Lies is the table.
func Lies() []Lie {
	lies := append(ofHTTP(), ofBodies()...)
	lies = append(lies, ofWords()...)
	return slices.Concat(lies, ofStreams(), endlessStreams())
}

// ofHTTP are lies before the body.
func ofHTTP() []Lie {
	var lies []Lie
	for _, status := range []int{300, 301, 302, 303, 304, 305, 307, 308} {
		lies = append(lies, Lie{Name: fmt.Sprintf("redirect %d", status), answer: func(r *reply) {
			r.print("HTTP/1.1 %d Elsewhere\r\nLocation: %s%s\r\nContent-Length: 0\r\n\r\n", status, r.canary, r.request.URL.Path)
		}})
	}
	return append(lies,
		Lie{Name: "redirect to the agent's calls", answer: func(r *reply) {
			r.print("HTTP/1.1 307 Elsewhere\r\nLocation: %s/hostagent.v1.HostAgentService/CreateSandbox\r\nContent-Length: 0\r\n\r\n", r.canary)
		}},
		Lie{Name: "another place for the answer", answer: func(r *reply) {
			r.print("HTTP/1.1 200 OK\r\nAlt-Svc: h2=\"%s\"\r\nContent-Location: %s\r\nRefresh: 0;url=%[2]s\r\nContent-Length: 0\r\n\r\n",
				strings.TrimPrefix(r.canary, "http://"), r.canary)
		}},
		Lie{Name: "a proxy to use", answer: func(r *reply) {
			r.print("HTTP/1.1 407 Ask\r\nProxy-Authenticate: Basic realm=\"x\"\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n", r.canary)
		}},
		Lie{Name: "header of a gigabyte", answer: func(r *reply) { r.print("HTTP/1.1 200 OK\r\nX-A: "); r.flood(gib) }},
		Lie{Name: "status line of a gigabyte", answer: func(r *reply) { r.print("HTTP/1.1 200 "); r.flood(gib) }},
		Lie{Name: "endless headers", answer: func(r *reply) { r.print("HTTP/1.1 200 OK\r\n"); r.repeat([]byte("X-A: b\r\n")) }},
		Lie{Name: "endless 103", answer: func(r *reply) { r.repeat([]byte("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")) }},
		Lie{Name: "endless 100", answer: func(r *reply) { r.repeat([]byte("HTTP/1.1 100 Continue\r\n\r\n")) }},
		Lie{Name: "header drop by drop", Endless: true, answer: func(r *reply) { r.print("HTTP/1.1 200 OK\r\nX-A: "); r.drip() }},
		Lie{Name: "silence", Endless: true, answer: (*reply).wait},
		Lie{Name: "hanging up", answer: func(*reply) {}},
		Lie{Name: "no HTTP", answer: func(r *reply) { r.print("SSH-2.0-OpenSSH_9.2 %s\r\n", Escape) }},
		Lie{Name: "HTTP/2", answer: func(r *reply) { r.print("\x00\x00\x00\x04\x00\x00\x00\x00\x00") }},
		Lie{Name: "status with escapes", answer: func(r *reply) {
			r.print("HTTP/1.1 500 %s%s\r\nContent-Length: 0\r\n\r\n", Escape, rubbish[:20<<10])
		}},
		Lie{Name: "status 999", answer: func(r *reply) { r.print("HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n") }},
		Lie{Name: "status -1", answer: func(r *reply) { r.print("HTTP/1.1 -01 X\r\nContent-Length: 0\r\n\r\n") }},
		Lie{Name: "another protocol", answer: func(r *reply) {
			r.print("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
			r.flood(gib)
		}},
		Lie{Name: "headers that turn writing around", answer: func(r *reply) {
			r.print("HTTP/1.1 204 No Content\r\nWrenn-Guest-Protocol: \u202e%s\r\nWrenn-Guest-Clock: \u202e\r\n\r\n", rubbish[:20<<10])
		}},
		Lie{Name: "clock at the end of time", answer: func(r *reply) {
			r.print("HTTP/1.1 204 No Content\r\nWrenn-Guest-Protocol: 1\r\nWrenn-Guest-Clock: 9223372036854775807\r\nConnection: close\r\n\r\n")
		}},
	)
}

// ofBodies are lies about the body.
func ofBodies() []Lie {
	return []Lie{
		{Name: "length of an exabyte", answer: func(r *reply) {
			r.print("HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: 9223372036854775807\r\n\r\n", r.contentType())
			r.flood(gib)
		}},
		{Name: "length below zero", answer: func(r *reply) { r.print("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"); r.flood(gib) }},
		{Name: "two lengths", answer: func(r *reply) {
			r.print("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
			r.flood(gib)
		}},
		{Name: "chunk of an exabyte", answer: func(r *reply) { r.begin("200 OK"); r.print("7fffffffffffffff\r\n"); r.flood(gib) }},
		{Name: "endless chunk extension", answer: func(r *reply) { r.begin("200 OK"); r.print("1;"); r.flood(gib) }},
		{Name: "endless success", answer: func(r *reply) { r.begin("200 OK"); r.repeat([]byte("4\r\naaaa\r\n")) }},
		{Name: "endless error", answer: func(r *reply) { r.begin("500 Internal Server Error"); r.repeat([]byte("4\r\naaaa\r\n")) }},
		{Name: "endless blank JSON", answer: func(r *reply) { r.begin("400 Bad Request"); r.repeat([]byte("4\r\n    \r\n")) }},
		{Name: "body drop by drop", Endless: true, answer: func(r *reply) {
			r.print("HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: 1000000\r\n\r\n", r.contentType())
			if r.isStream() {
				r.print("\x00\x00\x00\xff\xff") // a message that is about to come
			}
			r.drip()
		}},
		{Name: "endless trailers", answer: func(r *reply) {
			r.begin("200 OK", "Trailer: X-A")
			if r.isStream() {
				r.chunk(started)
			}
			r.print("0\r\n")
			r.repeat([]byte("X-A: b\r\n"))
		}},
		{Name: "gzip bomb", answer: func(r *reply) {
			r.begin("200 OK", "Content-Encoding: gzip", "Connect-Content-Encoding: gzip")
			if r.isStream() {
				r.chunk(frame(compressed, bomb()))
			} else {
				r.chunk(bomb())
			}
			r.end()
		}},
		{Name: "gzip bomb as an error", answer: func(r *reply) {
			r.begin("400 Bad Request", "Content-Encoding: gzip")
			r.chunk(bomb())
			r.end()
		}},
		{Name: "a web page", answer: func(r *reply) {
			r.print("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>")
		}},
		{Name: "no body", answer: func(r *reply) { r.begin("200 OK"); r.end() }},
	}
}

// ofWords are errors that harm by their text.
func ofWords() []Lie {
	long := Escape + strings.Repeat("word ", 600<<10)
	deep := strings.Repeat(`{"a":[`, 400<<10)
	return []Lie{
		{Name: "megabytes of words", answer: func(r *reply) { r.words("internal", long) }},
		{Name: "megabytes of words, not found", answer: func(r *reply) { r.words("not_found", long) }},
		{Name: "megabytes of words, invalid argument", answer: func(r *reply) { r.words("invalid_argument", long) }},
		{Name: "words with escapes", answer: func(r *reply) { r.words("resource_exhausted", Escape) }},
		{Name: "a code that there is not", answer: func(r *reply) { r.words("potato", Escape) }},
		{Name: "time limit that there is not", answer: func(r *reply) { r.words("deadline_exceeded", Escape) }},
		{Name: "plain megabytes", answer: func(r *reply) { r.begin("400 Bad Request"); r.chunk([]byte(long)); r.end() }},
		{Name: "unauthorized with escapes", answer: func(r *reply) {
			r.begin("401 Unauthorized")
			r.chunk([]byte(Escape))
			r.end()
		}},
		{Name: "deep JSON", answer: func(r *reply) {
			if r.isStream() {
				r.begin("200 OK")
				r.chunk(frame(last, []byte(deep)))
			} else {
				r.begin("400 Bad Request")
				r.chunk([]byte(deep))
			}
			r.end()
		}},
		{Name: "deep JSON as success", answer: func(r *reply) { r.begin("200 OK"); r.chunk([]byte(deep)); r.end() }},
	}
}

// ofStreams are lies of a stream of events.
func ofStreams() []Lie {
	streams := func(name string, chunks ...[]byte) Lie {
		return Lie{Name: name, OfStreams: true, answer: func(r *reply) {
			r.begin("200 OK")
			for _, c := range append([][]byte{started}, chunks...) {
				r.chunk(c)
			}
			r.end()
		}}
	}
	exit := func(code int32, exited bool) []byte {
		return ended(&process.ProcessEvent_EndEvent{ExitCode: code, Exited: exited, Status: Escape, Error: proto.String(Escape)})
	}
	head := func(flags byte) []byte { return binary.BigEndian.AppendUint32([]byte{flags}, gib) }
	huge := func(name string, flags byte) Lie {
		return Lie{Name: name, OfStreams: true, answer: func(r *reply) {
			r.begin("200 OK")
			r.chunk(head(flags))
			for r.chunk(rubbish) {
			}
		}}
	}
	return []Lie{
		huge("message of a gigabyte", 0),
		huge("last message of a gigabyte", last),
		huge("packed message of a gigabyte", compressed),
		{Name: "message that never comes", OfStreams: true, answer: func(r *reply) {
			r.begin("200 OK")
			r.chunk(head(0))
			r.wait()
		}},
		{Name: "nothing after the last message", OfStreams: true, answer: func(r *reply) {
			r.begin("200 OK")
			r.chunk(frame(last, []byte(`{"error":{"code":"internal"}}`)))
			r.wait()
		}},
		streams("no end", frame(last, []byte("{}"))),
		streams("no last message"),
		streams("cut message", []byte{0, 0, 0, 1, 0, 'a'}),
		streams("cut length", []byte{0, 0}),
		streams("message that is none", frame(0, rubbish)),
		streams("unknown flags", frame(0xfc, []byte("{}"))),
		streams("exit status -7", exit(-7, true)),
		streams("exit status -1", exit(-1, true)),
		streams("exit status 256", exit(256, true)),
		streams("exit status of a billion", exit(gib, true)),
		streams("lowest exit status", exit(-1<<31, false)),
		streams("signal that there is not", ended(&process.ProcessEvent_EndEvent{ExitCode: -1, Status: "signal: " + string(rubbish)})),
		{Name: "flood of output", OfStreams: true, answer: func(r *reply) {
			r.begin("200 OK")
			part := stdout(string(rubbish))
			for range 4096 {
				if !r.chunk(part) {
					return
				}
			}
			r.chunk(exit(0, true))
			r.end()
		}},
	}
}

// endlessStreams are streams whose end the client must not wait for.
func endlessStreams() []Lie {
	return []Lie{
		{Name: "endless output", OfStreams: true, Endless: true, answer: func(r *reply) {
			r.begin("200 OK")
			part := stdout(string(rubbish))
			for r.chunk(part) {
			}
		}},
		{Name: "endless tiny events", OfStreams: true, Endless: true, answer: func(r *reply) {
			r.begin("200 OK")
			many := bytes.Repeat(stdout(""), 1000)
			for r.chunk(many) {
			}
		}},
		{Name: "endless empty messages", OfStreams: true, Endless: true, answer: func(r *reply) {
			r.begin("200 OK")
			many := bytes.Repeat(frame(0, nil), 1000)
			for r.chunk(many) {
			}
		}},
		{Name: "endless starts", OfStreams: true, Endless: true, answer: func(r *reply) {
			r.begin("200 OK")
			many := bytes.Repeat(started, 1000)
			for r.chunk(many) {
			}
		}},
	}
}
