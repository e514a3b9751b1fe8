package gateway

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"strings"
)

const (
	// Before each message of a Connect stream come a byte of flags and its length.
	prefixBytes = 5
	// flagEnd marks the last message, which has the stream's error.
	flagEnd = 0x02
)

// ending is the body of a Connect stream from a guest. If the sandbox ends before
// the guest has ended the stream, ending ends the stream with an error that says
// why. It can do so between two messages only: after a message that is cut short,
// the stream is aborted.
type ending struct {
	io.ReadCloser
	// why says why the sandbox ended; empty if it did not.
	why func() string

	prefix []byte // of the message that begins
	left   uint32 // bytes of the message that are still to come
	ended  bool   // the last message has begun
	rest   []byte // of the last message, which is not the guest's
}

// endWell puts ending around the guest's answer if it is a Connect stream, and
// untilClosed if it ends where its connection does.
func endWell(resp *http.Response, why func() string, alive context.Context) {
	switch {
	case strings.HasPrefix(resp.Header.Get("Content-Type"), "application/connect+"):
		resp.Body = &ending{ReadCloser: resp.Body, why: why}
	case resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 && resp.ProtoMajor == 1 &&
		resp.StatusCode != http.StatusSwitchingProtocols:
		resp.Body = untilClosed{resp.Body, alive}
	}
}

// untilClosed is the body of an answer without a length. A guest that ends closes its
// connections: that is not the answer's end.
type untilClosed struct {
	io.ReadCloser
	alive context.Context
}

// Read implements io.Reader.
func (u untilClosed) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err == io.EOF && u.alive.Err() != nil {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Read implements io.Reader.
func (e *ending) Read(p []byte) (int, error) {
	if e.rest != nil {
		n := copy(p, e.rest)
		if e.rest = e.rest[n:]; len(e.rest) == 0 {
			return n, io.EOF
		}
		return n, nil
	}
	n, err := e.ReadCloser.Read(p)
	e.follow(p[:n])
	if err == nil || e.ended || len(e.prefix) > 0 || e.left > 0 {
		return n, err
	}
	if text := e.why(); text != "" {
		e.rest = endMessage(text)
		return n, nil
	}
	return n, err
}

// follow notes where messages begin and end.
func (e *ending) follow(data []byte) {
	for len(data) > 0 {
		if e.left > 0 {
			n := min(e.left, uint32(len(data)))
			data, e.left = data[n:], e.left-n
			continue
		}
		n := min(prefixBytes-len(e.prefix), len(data))
		e.prefix, data = append(e.prefix, data[:n]...), data[n:]
		if len(e.prefix) == prefixBytes {
			e.ended = e.ended || e.prefix[0]&flagEnd != 0
			e.left, e.prefix = binary.BigEndian.Uint32(e.prefix[1:]), e.prefix[:0]
		}
	}
}

// endMessage is the last message of a stream that ended for that reason.
func endMessage(text string) []byte {
	var end struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	end.Error.Code, end.Error.Message = "unavailable", text
	body, err := json.Marshal(end)
	if err != nil {
		panic(err) // strings always encode
	}
	return append(binary.BigEndian.AppendUint32([]byte{flagEnd}, uint32(len(body))), body...)
}
