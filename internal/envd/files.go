package envd

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// maxPseudo bounds what is served of a file in /proc or /sys, whose size is
	// not known before it is read.
	maxPseudo = 4 << 20
	// maxParts bounds the files of one upload.
	maxParts = 100_000

	copyBuffer     = 256 << 10
	metadataHeader = "X-Metadata-"
)

// httpError is an error whose status and text are for the client.
type httpError struct {
	status  int
	message string
}

func (e *httpError) Error() string { return e.message }

func failf(status int, format string, args ...any) error {
	return &httpError{status, fmt.Sprintf(format, args...)}
}

// answer writes an error in envd's shape.
func answer(w http.ResponseWriter, err error) {
	var known *httpError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &known):
		writeError(w, known.status, known.message)
	case connect.CodeOf(err) == connect.CodeUnauthenticated:
		var coded *connect.Error
		errors.As(err, &coded)
		writeError(w, http.StatusUnauthorized, coded.Message())
	case noSpace(err):
		writeError(w, http.StatusInsufficientStorage, "not enough disk space available")
	case errors.As(err, &tooLarge):
		writeError(w, http.StatusRequestEntityTooLarge, err.Error())
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		writeError(w, http.StatusForbidden, err.Error())
	default:
		writeError(w, http.StatusInternalServerError, err.Error())
	}
}

// fileUser returns the user that a /files request acts as, after it has checked
// the access token or the signature.
func (s *Server) fileUser(r *http.Request, operation string) (account, error) {
	state := s.defaults()
	q := r.URL.Query()
	if err := checkSignature(state, r.Header.Get(guestapi.HeaderToken), q, operation); err != nil {
		return account{}, err
	}
	name := q.Get("username")
	if name == "" {
		name = basicUser(r.Header)
	}
	return s.account(name)
}

// download is GET /files.
func (s *Server) download(w http.ResponseWriter, r *http.Request) {
	as, err := s.fileUser(r, guestapi.SignRead)
	if err != nil {
		answer(w, err)
		return
	}
	path, err := s.resolvePath(r.URL.Query().Get("path"), as)
	if err != nil {
		answer(w, failf(http.StatusBadRequest, "%s", err))
		return
	}
	f, info, err := openRegular(path)
	if err != nil {
		answer(w, err)
		return
	}
	defer f.Close()

	h := w.Header()
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	h.Set("Vary", "Accept-Encoding")
	h.Set("X-Content-Type-Options", "nosniff")
	if isPseudo(f) {
		servePseudo(w, r, f, info)
		return
	}
	encoding, err := chooseEncoding(r)
	if err != nil {
		answer(w, err)
		return
	}
	if encoding == "gzip" && info.Size() > 0 {
		serveGzip(w, r, f, info)
		return
	}
	http.ServeContent(w, r, path, info.ModTime(), f)
}

// openRegular opens a regular file. It refuses devices, FIFOs and sockets: opening
// one may block or have effects.
func openRegular(path string) (*os.File, fs.FileInfo, error) {
	info, err := os.Stat(path)
	if err == nil {
		err = checkRegular(path, info)
	}
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	if err == nil {
		// The path may lead to another file now.
		if info, err = f.Stat(); err == nil {
			err = checkRegular(path, info)
		}
		if err != nil {
			f.Close()
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return nil, nil, failf(http.StatusNotFound, "path '%s' does not exist", path)
	case err != nil:
		return nil, nil, err
	}
	return f, info, nil
}

func checkRegular(path string, info fs.FileInfo) error {
	switch {
	case info.IsDir():
		return failf(http.StatusBadRequest, "path '%s' is a directory", path)
	case !info.Mode().IsRegular():
		return failf(http.StatusBadRequest, "path '%s' is not a regular file", path)
	}
	return nil
}

// isPseudo reports whether the kernel makes a file's content when it is read.
func isPseudo(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var st unix.Statfs_t
	var statErr error
	if err := raw.Control(func(fd uintptr) { statErr = unix.Fstatfs(int(fd), &st) }); err != nil || statErr != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC,
		unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC:
		return true
	}
	return false
}

// servePseudo serves a bounded file of /proc or /sys from memory.
func servePseudo(w http.ResponseWriter, r *http.Request, f *os.File, info fs.FileInfo) {
	// Reads of some files wait for an event.
	_ = f.SetReadDeadline(time.Now().Add(time.Second))
	data, err := io.ReadAll(io.LimitReader(f, maxPseudo+1))
	if err != nil {
		answer(w, failf(http.StatusBadRequest, "read '%s': %v", f.Name(), cause(err)))
		return
	}
	if len(data) > maxPseudo {
		answer(w, failf(http.StatusBadRequest, "path '%s' has no known end", f.Name()))
		return
	}
	http.ServeContent(w, r, f.Name(), info.ModTime(), bytes.NewReader(data))
}

// serveGzip sends the file compressed. If the file cannot be read to its end, the
// connection is cut, so that the client does not take a part for the whole.
func serveGzip(w http.ResponseWriter, r *http.Request, f *os.File, info fs.FileInfo) {
	h := w.Header()
	h.Set("Content-Encoding", "gzip")
	h.Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
	contentType := mime.TypeByExtension(filepath.Ext(f.Name()))
	if contentType == "" {
		contentType = "application/octet-stream"
	}
	h.Set("Content-Type", contentType)
	if r.Method == http.MethodHead {
		return
	}
	zw, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err == nil {
		_, err = io.CopyBuffer(struct{ io.Writer }{zw}, struct{ io.Reader }{f}, make([]byte, copyBuffer))
	}
	if err == nil {
		err = zw.Close()
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}

// chooseEncoding returns "gzip" or "", by what the client accepts. A request with a
// range or a condition gets the file uncompressed.
func chooseEncoding(r *http.Request) (string, error) {
	for _, name := range []string{"Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if r.Header.Get(name) != "" {
			return "", nil
		}
	}
	weights := map[string]float64{}
	for part := range strings.SplitSeq(strings.Join(r.Header.Values("Accept-Encoding"), ","), ",") {
		name, params, _ := strings.Cut(strings.TrimSpace(part), ";")
		if name = strings.ToLower(strings.TrimSpace(name)); name == "" {
			continue
		}
		weight := 1.0
		if q, ok := strings.CutPrefix(strings.TrimSpace(params), "q="); ok {
			var err error
			if weight, err = strconv.ParseFloat(q, 64); err != nil {
				weight = 0
			}
		}
		weights[name] = weight
	}
	weight := func(name string, otherwise float64) float64 {
		if w, ok := weights[name]; ok {
			return w
		}
		if w, ok := weights["*"]; ok {
			return w
		}
		return otherwise
	}
	gzip, plain := weight("gzip", 0), weight("identity", 0.0001)
	switch {
	case gzip > 0 && gzip >= plain:
		return "gzip", nil
	case plain > 0:
		return "", nil
	default:
		return "", failf(http.StatusNotAcceptable, "no acceptable encoding: gzip and identity are there")
	}
}

// uploaded is one file of an upload's answer.
type uploaded struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// upload is POST /files.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	files, err := s.receive(r)
	if err != nil {
		// The rest of a long body is not read.
		w.Header().Set("Connection", "close")
		answer(w, err)
		return
	}
	writeJSON(w, files)
}

func (s *Server) receive(r *http.Request) ([]uploaded, error) {
	as, err := s.fileUser(r, guestapi.SignWrite)
	if err != nil {
		return nil, err
	}
	metadata, err := requestMetadata(r.Header)
	if err != nil {
		return nil, err
	}
	body, err := unpacked(r)
	if err != nil {
		return nil, err
	}
	u := &upload{server: s, as: as, metadata: metadata, seen: map[string]bool{}}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	path := r.URL.Query().Get("path")
	switch {
	case err == nil && kind == "multipart/form-data":
		err = u.parts(multipart.NewReader(body, params["boundary"]), path)
	case path == "":
		err = failf(http.StatusBadRequest, "the path is missing")
	default:
		err = u.file(path, body)
	}
	if err != nil {
		return nil, err
	}
	return u.files, nil
}

// unpacked is the request's body without its content encoding.
func unpacked(r *http.Request) (io.Reader, error) {
	switch encoding := strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return r.Body, nil
	case "gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, failf(http.StatusBadRequest, "unpack the body: %v", err)
		}
		return zr, nil
	default:
		return nil, failf(http.StatusBadRequest, "unsupported content encoding %q", encoding)
	}
}

// upload writes the files of one request.
type upload struct {
	server   *Server
	as       account
	metadata map[string]string
	seen     map[string]bool
	files    []uploaded
}

// parts writes the parts named "file". With a path there is one, else each
// names its own, in full.
func (u *upload) parts(parts *multipart.Reader, path string) error {
	for {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return failf(http.StatusBadRequest, "read the form: %v", err)
		}
		if part.FormName() != "file" {
			continue
		}
		target := path
		if target == "" {
			// Part.FileName would keep the last element only.
			_, params, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
			if err != nil || params["filename"] == "" {
				return failf(http.StatusBadRequest, "a part has no file name, and the request no path")
			}
			target = params["filename"]
		}
		if err := u.file(target, part); err != nil {
			return err
		}
	}
	if len(u.files) == 0 {
		return failf(http.StatusBadRequest, `the form has no part named "file"`)
	}
	return nil
}

// file writes one file.
func (u *upload) file(path string, body io.Reader) error {
	resolved, err := u.server.resolvePath(path, u.as)
	if err != nil {
		return failf(http.StatusBadRequest, "%s", err)
	}
	if u.seen[resolved] {
		return failf(http.StatusBadRequest, "you cannot upload multiple files to the same path '%s'", resolved)
	}
	if len(u.files) == maxParts {
		return failf(http.StatusBadRequest, "more than %d files", maxParts)
	}
	u.seen[resolved] = true
	if err := writeFile(resolved, body, u.as, u.metadata); err != nil {
		return err
	}
	u.files = append(u.files, uploaded{resolved, filepath.Base(resolved), "file", u.metadata})
	return nil
}

// writeFile makes body the content of the file at path, which is made, with
// its parents, for the user. A file that it made and could not fill is
// removed.
func writeFile(path string, body io.Reader, as account, metadata map[string]string) (err error) {
	info, err := os.Stat(path)
	made := errors.Is(err, fs.ErrNotExist)
	if err == nil {
		if err := checkRegular(path, info); err != nil {
			return err
		}
	}
	if err := makeDirs(filepath.Dir(path), as); err != nil {
		if errors.Is(err, syscall.ENOTDIR) {
			return failf(http.StatusBadRequest, "a parent of '%s' is not a directory", path)
		}
		return err
	}
	f, err := openToWrite(path, 0o666)
	if errors.Is(err, syscall.ETXTBSY) {
		f, err = replaceProgram(path, info.Mode().Perm())
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && made {
			_ = os.Remove(path)
		}
	}()
	if err := fill(f, body); err != nil {
		return err
	}
	if err := giveTo(path, as); err != nil {
		return err
	}
	if err := writeMetadata(path, metadata); err != nil {
		return failf(http.StatusBadRequest, "write metadata: %v", err)
	}
	return nil
}

func openToWrite(path string, mode fs.FileMode) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK|unix.O_NOCTTY, mode)
}

// replaceProgram puts a new file in the place of a program that runs, which goes on with
// the file that it has.
func replaceProgram(path string, mode fs.FileMode) (*os.File, error) {
	path, err := filepath.EvalSymlinks(path)
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return nil, err
	}
	f, err := openToWrite(path, mode)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(mode); err != nil { // whatever the umask is
		f.Close()
		return nil, err
	}
	return f, nil
}

// fill copies body into f and closes it. Its error tells a body that the client did
// not send to its end from a failure of the disk.
func fill(f *os.File, body io.Reader) error {
	defer f.Close()
	source := &source{body: body}
	_, err := io.CopyBuffer(struct{ io.Writer }{f}, source, make([]byte, copyBuffer))
	if source.err != nil {
		return failf(http.StatusBadRequest, "read the body: %v", source.err)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// source remembers why reading failed.
type source struct {
	body io.Reader
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.body.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// requestMetadata collects a request's X-Metadata-… headers.
func requestMetadata(h http.Header) (map[string]string, error) {
	var metadata map[string]string
	total := 0
	for name, values := range h {
		key, ok := strings.CutPrefix(http.CanonicalHeaderKey(name), metadataHeader)
		if !ok {
			continue
		}
		key, value := strings.ToLower(key), strings.Join(values, ", ")
		total += len(key) + len(value)
		switch {
		case key == "" || len(key) > maxMetadataKey:
			return nil, failf(http.StatusBadRequest, "a metadata key must have 1 to %d bytes", maxMetadataKey)
		case !printable(key) || !printable(value):
			return nil, failf(http.StatusBadRequest, "metadata must be printable ASCII: '%s'", key)
		}
		if metadata == nil {
			metadata = make(map[string]string)
		}
		metadata[key] = value
	}
	if total > maxMetadata {
		return nil, failf(http.StatusBadRequest, "more than %d bytes of metadata", maxMetadata)
	}
	return metadata, nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// compose is POST /files/compose: it joins files into one.
func (s *Server) compose(w http.ResponseWriter, r *http.Request) {
	var req struct {
		SourcePaths []string `json:"source_paths"`
		Destination string   `json:"destination"`
		Username    string   `json:"username"`
	}
	if err := readJSON(w, r, &req); err != nil {
		answer(w, err)
		return
	}
	as, err := s.account(req.Username)
	if err != nil {
		answer(w, err)
		return
	}
	if len(req.SourcePaths) == 0 || req.Destination == "" {
		answer(w, failf(http.StatusBadRequest, "source_paths and destination are needed"))
		return
	}
	paths := make([]string, 0, len(req.SourcePaths)+1)
	for _, path := range append(req.SourcePaths, req.Destination) {
		resolved, err := s.resolvePath(path, as)
		if err != nil {
			answer(w, failf(http.StatusBadRequest, "%s", err))
			return
		}
		paths = append(paths, resolved)
	}
	sources, destination := paths[:len(paths)-1], paths[len(paths)-1]
	if err := composeFiles(sources, destination, as); err != nil {
		answer(w, err)
		return
	}
	writeJSON(w, uploaded{Path: destination, Name: filepath.Base(destination), Type: "file"})
}

// composeFiles joins the sources into destination, which may be one of them, and
// removes the sources. destination appears when it is complete.
func composeFiles(sources []string, destination string, as account) (err error) {
	if info, err := os.Stat(destination); err == nil {
		if err := checkRegular(destination, info); err != nil {
			return err
		}
	}
	dir := filepath.Dir(destination)
	if err := makeDirs(dir, as); err != nil {
		return err
	}
	out, err := os.CreateTemp(dir, ".compose-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(out.Name())
		}
	}()
	defer out.Close()
	for _, path := range sources {
		if err := appendFile(out, path); err != nil {
			return err
		}
	}
	if err := errors.Join(out.Chmod(0o644), giveTo(out.Name(), as), out.Close()); err != nil {
		return err
	}
	if err := os.Rename(out.Name(), destination); err != nil {
		return err
	}
	for _, path := range sources {
		if path == destination {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func appendFile(out *os.File, path string) error {
	in, _, err := openRegular(path)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = io.Copy(out, in)
	return err
}
