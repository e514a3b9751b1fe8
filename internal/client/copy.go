package client

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Copy says how files are copied. Its functions hear how far a copy has come;
// each may be nil.
type Copy struct {
	// User owns the files in the sandbox; empty is the sandbox's default user.
	User string
	// Begin is called once before the content of files moves, with its length in
	// bytes, or -1 if that is not known.
	Begin func(total int64)
	// Moved is called with each number of bytes that has moved. After a copy into
	// the sandbox has failed, one more call may come.
	Moved func(n int)
	// Note is called with a line about each thing that is not copied as it is.
	// The text may be a guest's.
	Note func(text string)
}

func (c *Copy) begin(total int64) {
	if c.Begin != nil {
		c.Begin(total)
	}
}

func (c *Copy) note(format string, args ...any) {
	if c.Note != nil {
		c.Note(fmt.Sprintf(format, args...))
	}
}

// reader returns r with a call of Moved for each read.
func (c *Copy) reader(r io.Reader) io.Reader {
	if c.Moved == nil {
		return r
	}
	return &metered{r, c.Moved}
}

type metered struct {
	io.Reader
	moved func(int)
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	m.moved(n)
	return n, err
}

// DirectoryError says that a path of the sandbox is a directory and no file.
type DirectoryError struct{ Path string }

func (e *DirectoryError) Error() string { return e.Path + " is a directory" }

// CopyIn copies a file or a directory with all that is in it into the sandbox. A
// target that is a directory gets the source inside it, or, of DIR/., what is in
// DIR. Modes are kept, owners are not. A directory needs tar in the sandbox.
func (s *Sandbox) CopyIn(ctx context.Context, c Copy, from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is %s, neither a file nor a directory; of a pipe, copy -", from, kindOf(info))
	}
	target, err := s.stat(ctx, c.User, to)
	if err != nil {
		return err
	}
	if target != nil {
		to = target.Path
	}
	if isDir(target) || !info.IsDir() && (to == "" || strings.HasSuffix(to, "/")) {
		if name := localName(from); name != "" {
			to = path.Join(to, name)
		}
	}
	if info.IsDir() {
		return s.copyDirIn(ctx, &c, from, to)
	}
	return s.copyFileIn(ctx, &c, from, to)
}

func (s *Sandbox) copyFileIn(ctx context.Context, c *Copy, from, to string) error {
	f, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s was replaced while it was opened", from)
	}
	c.begin(info.Size())
	// The content ends where reading ends: some files tell a wrong size.
	made, err := s.put(ctx, c.User, c.reader(f), to)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode != 0o644 {
		// Files are made with that mode.
		return s.tool(ctx, c.User, nil, nil, "chmod", fmt.Sprintf("%o", mode), made)
	}
	return nil
}

// WriteFile makes what it reads the content of a file in the sandbox.
func (s *Sandbox) WriteFile(ctx context.Context, c Copy, content io.Reader, to string) error {
	_, err := s.put(ctx, c.User, c.reader(content), to)
	return err
}

// stat looks at a path in the sandbox; nil if nothing is there.
func (s *Sandbox) stat(ctx context.Context, user, path string) (*filesystem.EntryInfo, error) {
	resp, err := call(ctx, s.filesystem(user).Stat, &filesystem.StatRequest{Path: path})
	if connect.CodeOf(err) == connect.CodeNotFound && connect.IsWireError(err) {
		return nil, nil
	}
	return resp.GetEntry(), err
}

func isDir(e *filesystem.EntryInfo) bool {
	return e != nil && e.Type == filesystem.FileType_FILE_TYPE_DIRECTORY
}

// localName is the name that a local source has inside a target; empty for
// DIR/. and the like, whose content alone is meant.
func localName(from string) string {
	if from == "." || strings.HasSuffix(from, "/.") {
		return ""
	}
	abs, err := filepath.Abs(from)
	if err != nil || abs == "/" {
		return ""
	}
	return filepath.Base(abs)
}

// files is a request for the content of a file.
func (s *Sandbox) files(ctx context.Context, user, method, path string, body io.Reader) (*http.Response, error) {
	query := url.Values{"path": {path}}
	if user != "" {
		query.Set("username", user)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.host.URL()+guestapi.PathFiles+"?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = -1
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	req.Header.Set("Accept-Encoding", "identity")
	return s.request(req)
}

// put writes a file in the sandbox and returns its path there.
func (s *Sandbox) put(ctx context.Context, user string, content io.Reader, to string) (string, error) {
	resp, err := s.files(ctx, user, http.MethodPost, to, content)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var made []struct{ Path string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&made); err != nil || len(made) != 1 {
		return "", fmt.Errorf("write %s: the sandbox did not confirm it (%v)", to, err)
	}
	return made[0].Path, nil
}

// tool runs a program in the sandbox that must succeed. The error quotes the
// first line that the program wrote to stderr.
func (s *Sandbox) tool(ctx context.Context, user string, in io.Reader, out io.Writer, name string, args ...string) error {
	var complaint head
	status, err := s.Exec(ctx, Command{
		Cmd: name, Args: args, User: user, Tied: true, Stdin: in, Stdout: out, Stderr: &complaint,
	})
	switch {
	case Missing(err):
		return fmt.Errorf("the sandbox has no %s, which this copy needs", name)
	case err != nil:
		return err
	case status != 0:
		text, _, _ := strings.Cut(string(complaint), "\n")
		return fmt.Errorf("%s in the sandbox ended with status %d: %q", name, status, text)
	}
	return nil
}

// head keeps the beginning of what is written to it.
type head []byte

func (h *head) Write(p []byte) (int, error) {
	*h = append(*h, p[:min(len(p), 4096-len(*h))]...)
	return len(p), nil
}

// copyDirIn makes the content of a directory here that of one in the sandbox.
func (s *Sandbox) copyDirIn(ctx context.Context, c *Copy, from, to string) error {
	_, err := call(ctx, s.filesystem(c.User).MakeDir, &filesystem.MakeDirRequest{Path: to})
	if err != nil && connect.CodeOf(err) != connect.CodeAlreadyExists {
		return err
	}
	target, err := s.stat(ctx, c.User, to)
	if err != nil {
		return err
	}
	if !isDir(target) {
		return fmt.Errorf("%s in the sandbox is not a directory", to)
	}
	root, err := os.OpenRoot(from)
	if err != nil {
		return err
	}
	defer root.Close()
	total, err := treeSize(root)
	if err != nil {
		return err
	}
	c.begin(total)
	out, in := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := pack(root, in, c)
		in.CloseWithError(err)
		packed <- err
	}()
	// A source that cannot be read must not look like the end of the archive.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	source := &failing{out, cancel}
	err = s.tool(ctx, c.User, source, nil, "tar", "-x", "-o", "-f", "-", "-C", target.Path)
	out.CloseWithError(errStopped)
	if perr := <-packed; perr != nil && !errors.Is(perr, errStopped) {
		return perr
	}
	return err
}

var errStopped = errors.New("the other end stopped")

// failing is a reader that cancels a context when a read fails.
type failing struct {
	io.Reader
	fail context.CancelCauseFunc
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && err != io.EOF {
		f.fail(err)
	}
	return n, err
}

// CopyOut copies a file or a directory with all that is in it out of the sandbox.
// The copy stays in the directory that the target names: links on the way to
// that directory are followed, links in it are not, and nothing is made but files,
// directories and links.
func (s *Sandbox) CopyOut(ctx context.Context, c Copy, from, to string) error {
	source, err := s.source(ctx, c.User, from)
	if err != nil {
		return err
	}
	at, err := landing(from, to, isDir(source))
	if err != nil {
		return err
	}
	defer at.dir.Close()
	if isDir(source) {
		return s.copyDirOut(ctx, &c, source.Path, at)
	}
	if at.name == "" {
		return fmt.Errorf("%s in the sandbox is not a directory", from)
	}
	return s.content(ctx, &c, source.Path, func(r io.Reader) error {
		_, err := layFile(at.dir, at.name, fs.FileMode(source.Mode), r)
		return err
	})
}

// ReadFile writes the content of a file in the sandbox to w. A directory is a
// *DirectoryError.
func (s *Sandbox) ReadFile(ctx context.Context, c Copy, from string, w io.Writer) error {
	source, err := s.source(ctx, c.User, from)
	if err != nil {
		return err
	}
	if isDir(source) {
		return &DirectoryError{source.Path}
	}
	return s.content(ctx, &c, source.Path, func(r io.Reader) error {
		_, err := io.Copy(w, r)
		return err
	})
}

// source is what a copy out of the sandbox reads.
func (s *Sandbox) source(ctx context.Context, user, from string) (*filesystem.EntryInfo, error) {
	source, err := s.stat(ctx, user, from)
	if err == nil && source == nil {
		err = fmt.Errorf("%s does not exist in the sandbox", from)
	}
	return source, err
}

// content calls take with the content of a file.
func (s *Sandbox) content(ctx context.Context, c *Copy, from string, take func(io.Reader) error) error {
	resp, err := s.files(ctx, c.User, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	c.begin(resp.ContentLength)
	if err := take(c.reader(resp.Body)); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	return nil
}

// maxPadding bounds what follows the end of an archive, in bytes.
const maxPadding = 1 << 20

// copyDirOut makes the content of a directory in the sandbox that of one here.
func (s *Sandbox) copyDirOut(ctx context.Context, c *Copy, from string, at spot) error {
	root := at.dir
	if at.name != "" {
		dir, err := openDir(at.dir, at.name, 0o755)
		if err != nil {
			return err
		}
		defer dir.Close()
		root = dir
	}
	c.begin(-1)
	out, in := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := unpack(out, root, c)
		if err == nil {
			// tar pads the end of what it writes.
			if n, rerr := io.CopyN(io.Discard, out, maxPadding); rerr != io.EOF {
				err = cmp.Or(rerr, fmt.Errorf("the sandbox's archive goes on for more than %d bytes after its end", n))
			}
		}
		if err != nil {
			out.CloseWithError(err)
		}
		unpacked <- err
	}()
	err := s.tool(ctx, c.User, nil, in, "tar", "-c", "-f", "-", "-C", from, ".")
	in.CloseWithError(err)
	if uerr := <-unpacked; uerr != nil {
		return uerr // why the writing stopped, or else err itself
	}
	return err
}
