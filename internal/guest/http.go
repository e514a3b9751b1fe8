package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
)

// A guest may be hostile. These bounds of its answers are in bytes.
const (
	// MaxMessage bounds one message of a Connect stream, and the whole answer
	// to a call that has one.
	MaxMessage = 4 << 20
	// maxHeader bounds the headers of an answer, with all informational ones
	// before it. (A trailer is bounded by net/http, to 4 KiB.)
	maxHeader = 64 << 10
	// maxReason is how much is read of an answer that only says what is wrong.
	maxReason = 4 << 10
)

// headerTimeout bounds the wait for an answer's headers once a request is sent.
const headerTimeout = time.Minute

var errTooLong = errors.New("the guest's answer is too long")

// newTransport returns the transport of all requests to a guest. It connects with
// dial for every URL: no name, proxy or address that the guest chose leads to
// another place.
func newTransport(dial func(context.Context) (net.Conn, error)) *http.Transport {
	return &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableCompression:     true,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
		ResponseHeaderTimeout:  headerTimeout,
	}
}

// NoRedirect is the CheckRedirect of every client whose answers may come from a
// guest. The client does not follow redirects.
func NoRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// ClientOptions are what each Connect client of a guest is made with, besides
// a Bounded transport. A guest's messages are not compressed, so that their
// length is what they say.
func ClientOptions() connect.ClientOption {
	return connect.WithClientOptions(
		connect.WithAcceptCompression("gzip", nil, nil),
		connect.WithReadMaxBytes(MaxMessage),
	)
}

// Bounded is a transport that ends an answer to a Connect call where it exceeds
// MaxMessage. Connect itself would keep no more, but would read to the end of what
// the guest announced, or for ever. Bounded does not change other answers.
type Bounded struct{ Next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b Bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.Next.RoundTrip(r)
	if err != nil || r.Header.Get("Connect-Protocol-Version") == "" {
		return resp, err
	}
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/connect+") {
		resp.Body = &frames{ReadCloser: resp.Body}
	} else {
		resp.Body = &limited{resp.Body, MaxMessage + 1}
	}
	return resp, nil
}

// limited is a reader that fails when more than its limit was read.
type limited struct {
	io.ReadCloser
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, errTooLong
	}
	n, err := l.ReadCloser.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// frames is a stream of Connect's messages, each behind five bytes with its
// length. It ends with the one that is marked as the last, whatever follows,
// and fails after the length of one that is too long.
type frames struct {
	io.ReadCloser
	prefix [5]byte
	have   int    // bytes of prefix
	left   uint32 // bytes of the message behind it
	err    error
}

// lastFrame marks the message that ends a stream.
const lastFrame = 1 << 1

func (f *frames) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.ReadCloser.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if f.have < len(f.prefix) {
			k := copy(f.prefix[f.have:], rest)
			f.have, rest = f.have+k, rest[k:]
			if f.have < len(f.prefix) {
				break
			}
			f.left = binary.BigEndian.Uint32(f.prefix[1:])
			if f.left > MaxMessage {
				f.err = errTooLong
				return n - len(rest), nil
			}
		}
		k := min(uint32(len(rest)), f.left)
		f.left, rest = f.left-k, rest[k:]
		if f.left > 0 {
			break
		}
		f.have = 0
		if f.prefix[0]&lastFrame != 0 {
			f.err = io.EOF
			return n - len(rest), nil
		}
	}
	return n, err
}
