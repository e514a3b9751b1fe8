package gateway

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
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
				})
				got, err := io.ReadAll(iotest.OneByteReader(resp.Body))
				if string(got) != tt.want || !errors.Is(err, tt.wantErr) {
					t.Errorf("%q, %v; want %q, %v", got, err, tt.want, tt.wantErr)
				}
			}
		})
	}
}
