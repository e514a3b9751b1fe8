package envd

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func filesURL(path string, more ...string) string {
	q := url.Values{"path": {path}}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return "/files?" + q.Encode()
}

// message is the text of an error answer; its shape is checked on the way.
func message(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	var body struct {
		Code    int
		Message string
	}
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body.Code != w.Code {
		t.Errorf("error answer %d %q: %v", w.Code, w.Body, err)
	}
	if ct := w.Header().Get("Content-Type"); ct != "application/json; charset=utf-8" || w.Header().Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers of an error: %v", w.Header())
	}
	return body.Message
}

func TestSignatureKnownAnswer(t *testing.T) {
	got := guestapi.SignedFile{Path: "hello.txt", Operation: guestapi.SignRead, User: "user"}.Signer()("0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0")
	if want := "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestFilesNeedTokenOrSignature(t *testing.T) {
	s, _ := serve(t, Config{})
	path := t.TempDir() + "/file"
	write(t, path, "text")
	const token, read, write = "secret", guestapi.SignRead, guestapi.SignWrite
	request(t, s, "POST", "/init", `{"accessToken":"secret"}`)
	later := strconv.FormatInt(time.Now().Unix()+60, 10)
	before := strconv.FormatInt(time.Now().Unix()-60, 10)
	sign := func(op, exp string) string {
		return guestapi.SignedFile{Path: path, Operation: op, User: "root", Expiration: exp}.Signer()(token)
	}
	for _, tt := range []struct {
		name, target, token string
		code                int
		text                string
	}{
		{"nothing", filesURL(path), "", 401, "missing signature query parameter"},
		{"token", filesURL(path), token, 200, ""},
		{"wrong token", filesURL(path, "username", "root", "signature", sign(read, "")), "x", 401, "access token present in header but does not match"},
		{"signature", filesURL(path, "username", "root", "signature", sign(read, "")), "", 200, ""},
		{"for another user", filesURL(path, "signature", sign(read, "")), "", 401, "invalid signature"},
		{"for another path", filesURL(path+"x", "username", "root", "signature", sign(read, "")), "", 401, "invalid signature"},
		{"for writing", filesURL(path, "username", "root", "signature", sign(write, "")), "", 401, "invalid signature"},
		{"not expired", filesURL(path, "username", "root", "signature", sign(read, later), "signature_expiration", later), "", 200, ""},
		{"expired", filesURL(path, "username", "root", "signature", sign(read, before), "signature_expiration", before), "", 401, "signature is already expired"},
		{"expiration changed", filesURL(path, "username", "root", "signature", sign(read, before), "signature_expiration", later), "", 401, "invalid signature"},
		{"expiration left out", filesURL(path, "username", "root", "signature", sign(read, before)), "", 401, "invalid signature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := request(t, s, "GET", tt.target, "", guestapi.HeaderToken, tt.token)
			if w.Code != tt.code || tt.text != "" && message(t, w) != tt.text {
				t.Errorf("got %d %s, want %d %s", w.Code, w.Body, tt.code, tt.text)
			}
		})
	}
	// The rest of the plain HTTP has no signatures.
	for _, target := range []string{"/metrics", "/envs"} {
		if w := request(t, s, "GET", target, ""); w.Code != 401 {
			t.Errorf("%s: %d", target, w.Code)
		}
	}
	if w := request(t, s, "POST", "/files/compose", "{}"); w.Code != 401 {
		t.Errorf("compose: %d", w.Code)
	}
}

func TestDownload(t *testing.T) {
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	text := strings.Repeat("some text ", 1000)
	write(t, dir+"/file.txt", text)
	write(t, dir+"/empty", "")
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}

	w := request(t, s, "GET", filesURL(dir+"/file.txt"), "")
	if w.Code != 200 || w.Body.String() != text || w.Header().Get("Content-Length") != "10000" ||
		w.Header().Get("Vary") != "Accept-Encoding" || w.Header().Get("Content-Disposition") != "inline; filename=file.txt" {
		t.Errorf("plain: %d, %d bytes, %v", w.Code, w.Body.Len(), w.Header())
	}
	modified := w.Header().Get("Last-Modified")

	w = request(t, s, "GET", filesURL(dir+"/file.txt"), "", "Accept-Encoding", "gzip, deflate, br")
	zr, err := gzip.NewReader(w.Body)
	if err != nil || w.Header().Get("Content-Encoding") != "gzip" || w.Body.Len() > 1000 {
		t.Fatalf("gzip: %d bytes, %v, %v", w.Body.Len(), err, w.Header())
	}
	if unzipped, err := io.ReadAll(zr); err != nil || string(unzipped) != text {
		t.Errorf("gzip: %d bytes, %v", len(unzipped), err)
	}

	w = request(t, s, "GET", filesURL(dir+"/file.txt"), "", "Range", "bytes=5-8", "Accept-Encoding", "gzip")
	if w.Code != 206 || w.Body.String() != "text" || w.Header().Get("Content-Range") != "bytes 5-8/10000" {
		t.Errorf("range: %d %q %v", w.Code, w.Body, w.Header())
	}
	if w = request(t, s, "GET", filesURL(dir+"/file.txt"), "", "If-Modified-Since", modified); w.Code != 304 {
		t.Errorf("condition: %d", w.Code)
	}
	if w = request(t, s, "HEAD", filesURL(dir+"/file.txt"), ""); w.Code != 200 || w.Body.Len() > 0 {
		t.Errorf("head: %d", w.Code)
	}
	if w = request(t, s, "GET", filesURL(dir+"/empty"), "", "Accept-Encoding", "gzip"); w.Code != 200 || w.Header().Get("Content-Length") != "0" {
		t.Errorf("empty: %d %v", w.Code, w.Header())
	}
	if w = request(t, s, "GET", filesURL("/proc/self/status"), "", "Accept-Encoding", "gzip"); w.Code != 200 || !strings.HasPrefix(w.Body.String(), "Name:") {
		t.Errorf("/proc: %d %.20q", w.Code, w.Body)
	}

	for _, tt := range []struct {
		target string
		accept string
		code   int
		text   string
	}{
		{filesURL(dir + "/missing"), "", 404, "path '" + dir + "/missing' does not exist"},
		{filesURL(dir + "/file.txt/x"), "", 404, "does not exist"},
		{filesURL(dir), "", 400, "path '" + dir + "' is a directory"},
		{filesURL(dir + "/fifo"), "", 400, "is not a regular file"},
		{filesURL("/dev/zero"), "", 400, "is not a regular file"},
		{filesURL("/proc/kmsg"), "", 400, ""},
		{filesURL("a\x00b"), "", 400, "NUL"},
		{filesURL("~other/x"), "", 400, ""},
		{filesURL(dir+"/file.txt", "username", "no-such"), "", 401, "invalid username: 'no-such'"},
		{filesURL(dir + "/file.txt"), "br, identity;q=0", 406, ""},
	} {
		w := request(t, s, "GET", tt.target, "", "Accept-Encoding", tt.accept)
		if w.Code != tt.code || !strings.Contains(message(t, w), tt.text) {
			t.Errorf("%s: %d %s, want %d %s", tt.target, w.Code, w.Body, tt.code, tt.text)
		}
	}
}

func TestChooseEncoding(t *testing.T) {
	for accept, want := range map[string]string{
		"": "", "gzip": "gzip", "deflate, GZIP": "gzip", "gzip;q=0": "", "*": "gzip", "br": "", "identity": "",
		"gzip;q=0.5, identity;q=1": "", "gzip;q=x": "", "*;q=0, gzip": "gzip",
		"identity;q=0, br": "none", "*;q=0": "none",
	} {
		got, err := chooseEncoding(&http.Request{Header: http.Header{"Accept-Encoding": {accept}}})
		if err != nil {
			got = "none"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", accept, got, want)
		}
	}
}

// part is one part of a form; an empty file name is left out.
type part struct{ field, filename, text string }

func form(t *testing.T, parts ...part) (body, contentType string) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, p := range parts {
		disposition := fmt.Sprintf("form-data; name=%q", p.field)
		if p.filename != "" {
			disposition += fmt.Sprintf("; filename=%q", p.filename)
		}
		pw, err := w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {disposition}})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(pw, p.text)
	}
	w.Close()
	return buf.String(), w.FormDataContentType()
}

func zipped(text string) string {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, _ = io.WriteString(w, text)
	w.Close()
	return buf.String()
}

func TestUpload(t *testing.T) {
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	const raw = "application/octet-stream"
	oneBody, oneType := form(t, part{"file", "ignored", "one"}, part{"other", "x", "no file"})
	bareBody, bareType := form(t, part{"file", "", "bare"})
	manyBody, manyType := form(t, part{"file", dir + "/many/a", "A"}, part{"file", dir + "/many/sub/b", "B"})
	for _, tt := range []struct {
		name, target, body string
		headers            []string
		answer             string
		files              map[string]string
	}{
		{"raw", filesURL(dir + "/new/dir/raw"), "hello", []string{"Content-Type", raw},
			`[{"path":"` + dir + `/new/dir/raw","name":"raw","type":"file"}]`, map[string]string{"new/dir/raw": "hello"}},
		{"shorter", filesURL(dir + "/new/dir/raw"), "hi", []string{"Content-Type", raw}, "", map[string]string{"new/dir/raw": "hi"}},
		{"empty", filesURL(dir + "/empty"), "", []string{"Content-Type", raw}, "", map[string]string{"empty": ""}},
		{"gzip", filesURL(dir + "/zipped"), zipped("text"), []string{"Content-Type", raw, "Content-Encoding", "gzip"}, "", map[string]string{"zipped": "text"}},
		{"form with a path", filesURL(dir + "/one"), oneBody, []string{"Content-Type", oneType},
			`[{"path":"` + dir + `/one","name":"one","type":"file"}]`, map[string]string{"one": "one"}},
		{"form without a file name", filesURL(dir + "/bare"), bareBody, []string{"Content-Type", bareType}, "", map[string]string{"bare": "bare"}},
		{"form with several files", "/files", manyBody, []string{"Content-Type", manyType},
			`[{"path":"` + dir + `/many/a","name":"a","type":"file"},{"path":"` + dir + `/many/sub/b","name":"b","type":"file"}]`,
			map[string]string{"many/a": "A", "many/sub/b": "B"}},
		{"metadata", filesURL(dir + "/meta"), "x", []string{"Content-Type", raw, "X-Metadata-Kind", "greeting"},
			`[{"path":"` + dir + `/meta","name":"meta","type":"file","metadata":{"kind":"greeting"}}]`, map[string]string{"meta": "x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := request(t, s, "POST", tt.target, tt.body, tt.headers...)
			if got := strings.TrimSpace(w.Body.String()); w.Code != 200 || tt.answer != "" && got != tt.answer {
				t.Fatalf("got %d %s, want %s", w.Code, got, tt.answer)
			}
			for name, want := range tt.files {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v; want %q", name, got, err, want)
				}
			}
		})
	}
	if len(attributes(dir+"/meta")) > 0 {
		if got := readMetadata(dir + "/meta"); got["kind"] != "greeting" {
			t.Errorf("metadata: %v", got)
		}
		request(t, s, "POST", filesURL(dir+"/meta"), "x", "Content-Type", raw, "X-Metadata-Other", "2")
		if got := readMetadata(dir + "/meta"); len(got) != 1 || got["other"] != "2" {
			t.Errorf("metadata is not replaced as a whole: %v", got)
		}
	}
	if info, err := os.Stat(dir + "/one"); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode: %v, %v", info.Mode(), err)
	}
}

func TestUploadGivesToTheUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	w := request(t, s, "POST", filesURL(dir+"/a/b/file", "username", "nobody"), "x", "Content-Type", "application/octet-stream")
	if w.Code != 200 {
		t.Fatal(w.Code, w.Body)
	}
	as, _ := s.account("nobody")
	for _, name := range []string{"a", "a/b", "a/b/file"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != as.uid || st.Gid != as.gid {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
}

// A program that runs is replaced, and runs on.
func TestUploadOverAProgram(t *testing.T) {
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	program, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "program")
	if err := errors.Join(os.WriteFile(path, program, 0o751), os.Symlink("program", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"program", "link"} {
		if err := errors.Join(os.WriteFile(path+".new", program, 0o751), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
		run := exec.Command(path, "1000")
		if err := run.Start(); err != nil {
			t.Fatal(err)
		}
		w := request(t, s, "POST", filesURL(filepath.Join(dir, name)), "new", "Content-Type", "application/octet-stream")
		if err := run.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("over %s: the program is gone: %v", name, err)
		}
		if err := run.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = run.Wait()
		content, err := os.ReadFile(path)
		info, serr := os.Lstat(path)
		if w.Code != 200 || err != nil || serr != nil || string(content) != "new" || info.Mode() != 0o751 {
			t.Errorf("over %s: got %d %s; %q %v, %v %v", name, w.Code, w.Body, content, err, info, serr)
		}
		if _, err := os.Readlink(filepath.Join(dir, "link")); err != nil {
			t.Errorf("over %s: %v", name, err)
		}
	}
}

func TestUploadRefused(t *testing.T) {
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	write(t, dir+"/file", "")
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	const raw = "application/octet-stream"
	twiceBody, twiceType := form(t, part{"file", "", "1"}, part{"file", "", "2"})
	noneBody, noneType := form(t, part{"other", "", "1"})
	namelessBody, namelessType := form(t, part{"file", "", "1"})
	for _, tt := range []struct {
		name, target, body string
		headers            []string
		code               int
		text               string
	}{
		{"no path", "/files", "x", []string{"Content-Type", raw}, 400, "the path is missing"},
		{"a directory", filesURL(dir), "x", []string{"Content-Type", raw}, 400, "is a directory"},
		{"a FIFO", filesURL(dir + "/fifo"), "x", []string{"Content-Type", raw}, 400, "not a regular file"},
		{"a device", filesURL("/dev/null"), "x", []string{"Content-Type", raw}, 400, "not a regular file"},
		{"below a file", filesURL(dir + "/file/x"), "x", []string{"Content-Type", raw}, 400, ""},
		{"unknown user", filesURL(dir+"/x", "username", "no-such"), "x", []string{"Content-Type", raw}, 401, "invalid username"},
		{"twice the same path", filesURL(dir + "/x"), twiceBody, []string{"Content-Type", twiceType}, 400, "same path"},
		{"no file in the form", filesURL(dir + "/x"), noneBody, []string{"Content-Type", noneType}, 400, `no part named "file"`},
		{"neither path nor name", "/files", namelessBody, []string{"Content-Type", namelessType}, 400, "no file name"},
		{"not gzip", filesURL(dir + "/new1"), "x", []string{"Content-Type", raw, "Content-Encoding", "gzip"}, 400, "unpack"},
		{"broken gzip", filesURL(dir + "/new2"), zipped(strings.Repeat("text", 100))[:30], []string{"Content-Type", raw, "Content-Encoding", "gzip"}, 400, "read the body"},
		{"unknown encoding", filesURL(dir + "/new3"), "x", []string{"Content-Type", raw, "Content-Encoding", "br"}, 400, "encoding"},
		{"cut form", filesURL(dir + "/new4"), oneHalf(t), []string{"Content-Type", "multipart/form-data; boundary=b"}, 400, ""},
		{"metadata that is no text", filesURL(dir + "/new5"), "x", []string{"Content-Type", raw, "X-Metadata-A", "ü"}, 400, "printable"},
		{"too much metadata", filesURL(dir + "/new6"), "x", []string{"Content-Type", raw, "X-Metadata-A", strings.Repeat("a", 5000)}, 400, "4096"},
		{"metadata key too long", filesURL(dir + "/new7"), "x", []string{"Content-Type", raw, "X-Metadata-" + strings.Repeat("a", 247), "1"}, 400, "246"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := request(t, s, "POST", tt.target, tt.body, tt.headers...)
			if w.Code != tt.code || !strings.Contains(message(t, w), tt.text) {
				t.Errorf("got %d %s, want %d %s", w.Code, w.Body, tt.code, tt.text)
			}
		})
	}
	if left, _ := filepath.Glob(dir + "/new*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// oneHalf is a form whose client went away.
func oneHalf(t *testing.T) string {
	t.Helper()
	return "--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nhalf of it"
}

func TestUploadToAFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mount: %v", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	s, _ := serve(t, Config{})
	w := request(t, s, "POST", filesURL(dir+"/big"), strings.Repeat("x", 3<<20), "Content-Type", "application/octet-stream")
	if w.Code != 507 || message(t, w) != "not enough disk space available" {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
	if _, err := os.Stat(dir + "/big"); !os.IsNotExist(err) {
		t.Errorf("a part of the file is left: %v", err)
	}
}

// A file that shrinks while it is served must not end as if it were whole.
func TestDownloadCutShortIsNoCleanEnd(t *testing.T) {
	_, url := serve(t, Config{})
	path := t.TempDir() + "/big"
	write(t, path, "")
	if err := os.Truncate(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}).Get(url + filesURL(path))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := os.Truncate(path, 10); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Errorf("%d bytes and a clean end", n)
	}
}

// A client that goes away in the middle leaves no file that looks whole.
func TestUploadCutShort(t *testing.T) {
	_, base := serve(t, Config{})
	path := t.TempDir() + "/file"
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nhalf", filesURL(path))
	eventually(t, "the file to be begun", func() bool { _, err := os.Stat(path); return err == nil })
	conn.Close()
	eventually(t, "the file to be removed", func() bool { _, err := os.Stat(path); return os.IsNotExist(err) })
}

func TestCompose(t *testing.T) {
	s, _ := serve(t, Config{})
	dir := t.TempDir()
	compose := func(body string) *httptest.ResponseRecorder {
		return request(t, s, "POST", "/files/compose", strings.ReplaceAll(body, "DIR", dir))
	}
	write(t, dir+"/1", "one ")
	write(t, dir+"/2", "two ")
	w := compose(`{"source_paths":["DIR/1","DIR/2"],"destination":"DIR/new/all"}`)
	if want := `{"path":"` + dir + `/new/all","name":"all","type":"file"}`; w.Code != 200 || strings.TrimSpace(w.Body.String()) != want {
		t.Errorf("got %d %s, want %s", w.Code, w.Body, want)
	}
	if text, err := os.ReadFile(dir + "/new/all"); err != nil || string(text) != "one two " {
		t.Errorf("%q, %v", text, err)
	}
	if left, _ := filepath.Glob(dir + "/[12]"); len(left) > 0 {
		t.Errorf("sources are left: %v", left)
	}
	// The destination may be a source.
	write(t, dir+"/3", "three")
	if w := compose(`{"source_paths":["DIR/new/all","DIR/3"],"destination":"DIR/new/all"}`); w.Code != 200 {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
	if text, err := os.ReadFile(dir + "/new/all"); err != nil || string(text) != "one two three" {
		t.Errorf("%q, %v", text, err)
	}
	for body, code := range map[string]int{
		`{}`: 400, `{"source_paths":["DIR/new/all"]}`: 400, `[`: 400,
		`{"source_paths":["DIR/missing"],"destination":"DIR/x"}`:                         404,
		`{"source_paths":["DIR/new"],"destination":"DIR/x"}`:                             400,
		`{"source_paths":["DIR/new/all"],"destination":"DIR/x","username":"no-such"}`:    401,
		`{"source_paths":["DIR/new/all","DIR/missing"],"destination":"DIR/new/partial"}`: 404,
	} {
		if w := compose(body); w.Code != code {
			t.Errorf("%s: %d %s, want %d", body, w.Code, w.Body, code)
		}
	}
	if left, _ := filepath.Glob(dir + "/new/*"); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	if left, _ := filepath.Glob(dir + "/.compose*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestEnvsAndMetrics(t *testing.T) {
	s, _ := serve(t, Config{})
	request(t, s, "POST", "/init", `{"envVars":{"A":"1"},"sandboxId":"sb-1"}`)
	w := request(t, s, "GET", "/envs", "")
	if want := `{"A":"1","E2B_SANDBOX":"true","E2B_SANDBOX_ID":"sb-1"}`; strings.TrimSpace(w.Body.String()) != want {
		t.Errorf("envs: %s", w.Body)
	}
	request(t, s, "POST", "/init", `{"envVars":{"B":"2"}}`)
	if w = request(t, s, "GET", "/envs", ""); strings.Contains(w.Body.String(), `"A"`) {
		t.Errorf("variables of before are left: %s", w.Body)
	}
	w = request(t, s, "GET", "/metrics", "")
	var m guestapi.Metrics
	if err := json.Unmarshal(w.Body.Bytes(), &m); err != nil {
		t.Fatal(err)
	}
	if m.CPUCount < 1 || m.CPUUsedPct < 0 || m.CPUUsedPct > 100 || m.MemTotal < 1<<20 || m.MemUsed > m.MemTotal ||
		m.MemTotalMiB != m.MemTotal>>20 || m.DiskTotal == 0 || m.DiskUsed > m.DiskTotal || time.Since(time.Unix(m.Timestamp, 0)) > time.Minute {
		t.Errorf("metrics: %s", w.Body)
	}
}

func TestCORS(t *testing.T) {
	s, _ := serve(t, Config{})
	request(t, s, "POST", "/init", `{"accessToken":"secret"}`)
	w := request(t, s, "OPTIONS", list, "", "Origin", "https://x", "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-access-token,content-type")
	if h := w.Header(); w.Code != 204 || h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Access-Control-Allow-Headers") != "x-access-token,content-type" ||
		!strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") || h.Get("Access-Control-Max-Age") != "7200" {
		t.Errorf("preflight: %d %v", w.Code, h)
	}
	w = request(t, s, "POST", list, "{}", "Origin", "https://x", "Content-Type", "application/json")
	if w.Code != 401 || w.Header().Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("request: %d %v", w.Code, w.Header())
	}
}
