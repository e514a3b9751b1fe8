package envd

import (
	"encoding/binary"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// framed is a body of Connect's streaming protocol.
func framed(messages ...string) []byte {
	var body []byte
	for _, m := range messages {
		body = append(binary.BigEndian.AppendUint32(append(body, 0), uint32(len(m))), m...)
	}
	return body
}

// FuzzFraming sends whatever to the streaming calls: they must answer.
func FuzzFraming(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{1, 0xff, 0xff, 0xff, 0xff})
	f.Add(framed(`{"start":{"process":{"pid":1}}}`, `{"data":{"input":{"stdin":"eA=="}}}`, `{"keepalive":{}}`))
	f.Add(framed(`{"process":{"tag":"x"}}`))
	f.Add(framed(`{"process":{"cmd":""}}`))
	s := New(Config{Log: quiet()})
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, call := range []string{"process.Process/StreamInput", "process.Process/Connect", "filesystem.Filesystem/WatchDir"} {
			if strings.Contains(string(body), "/") || strings.Contains(string(body), "path") {
				continue // it may be a directory, watched without end
			}
			if call == "filesystem.Filesystem/WatchDir" && len(body) <= 5 {
				continue // so may nothing be
			}
			r := httptest.NewRequest("POST", "/"+call, strings.NewReader(string(body)))
			r.Header.Set("Content-Type", "application/connect+json")
			r.Header.Set("Connect-Timeout-Ms", "50")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			if w.Code != 200 || w.Body.Len() == 0 {
				t.Errorf("%s answers %d %q to %q", call, w.Code, w.Body, body)
			}
		}
	})
}

// FuzzForm uploads whatever as a form: it must be refused, or its files lie
// where they were said to.
func FuzzForm(f *testing.F) {
	f.Add("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\ntext\r\n--b--\r\n")
	f.Add("--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\ntext\r\n--b--\r\n")
	f.Add("--b\r\nContent-Disposition: form-data; name=file; filename*=utf-8''%2e%2e%2fx\r\n\r\n\r\n--b--\r\n")
	f.Add("--b--")
	s := New(Config{Log: quiet()})
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, body string) {
		path := filepath.Join(t.TempDir(), "file")
		// With a path in the request no name in the body leads elsewhere.
		r := httptest.NewRequest("POST", filesURL(path), strings.NewReader(body))
		r.Header.Set("Content-Type", "multipart/form-data; boundary=b")
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		_, err := os.Stat(path)
		if w.Code == 200 && err != nil || w.Code != 200 && w.Code != 400 || w.Code == 400 && err == nil && strings.Count(body, "--b") < 2 {
			t.Errorf("%q: %d %s, file: %v", body, w.Code, w.Body, err)
		}
	})
}
