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
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Copy says how files are copied. Its functions hear how far a copy has come;
// each may be nil.
type Copy struct {
	// User is the user of the sandbox who reads the files, or makes them and owns them;
	// empty is the sandbox's default user.
	User string
	// Preserve keeps modification times, and set-user-ID, set-group-ID and sticky bits.
	Preserve bool
	// Chown is "USER[:GROUP]", by names or numbers of the sandbox: who owns the files
	// that are copied into it, which root makes then.
	Chown string
	owner ids // what Chown says
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

// ids are numbers of a user and a group in the sandbox.
type ids struct{ uid, gid int }

// DirectoryError says that a path of the sandbox is a directory and no file.
type DirectoryError struct{ Path string }

func (e *DirectoryError) Error() string { return e.Path + " is a directory" }

// CopyIn copies a file or a directory with all that is in it into the sandbox. A
// target that is a directory gets the source inside it, or, of DIR/., what is in
// DIR. Modes are kept, owners are not; holes of files stay holes, and files with
// several names keep them. Only a file with nothing of that can do without tar in the
// sandbox.
func (s *Sandbox) CopyIn(ctx context.Context, c Copy, from, to string) (err error) {
	defer func() { err = s.broken(ctx, err) }()
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is %s, neither a file nor a directory; of a pipe, copy -", from, kindOf(info))
	}
	target, err := s.target(ctx, &c, &to)
	if err != nil {
		return err
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

// target looks at the target of a copy into the sandbox, nil if nothing is there, and
// makes its path absolute if it can. With Chown it asks for the numbers of that owner, and
// makes root the user.
func (s *Sandbox) target(ctx context.Context, c *Copy, to *string) (*filesystem.EntryInfo, error) {
	target, err := s.stat(ctx, c.User, *to)
	if err != nil {
		return nil, err
	}
	if target != nil {
		*to = target.Path
	}
	if c.Chown == "" {
		return target, nil
	}
	if target == nil && !path.IsAbs(*to) {
		home, err := s.stat(ctx, c.User, ".")
		if err != nil || home == nil {
			return nil, fmt.Errorf("find the home of the user: %w", cmp.Or(err, fs.ErrNotExist))
		}
		slash := ""
		if strings.HasSuffix(*to, "/") {
			slash = "/"
		}
		*to = path.Join(home.Path, *to) + slash
	}
	c.User = "root"
	c.owner, err = s.idsOf(ctx, c.Chown)
	return target, err
}

// idsOf returns the numbers of "USER[:GROUP]" in the sandbox. Without a group it is the
// one of the user, or of root for a number.
func (s *Sandbox) idsOf(ctx context.Context, owner string) (of ids, err error) {
	user, group, hasGroup := strings.Cut(owner, ":")
	if user == "" || hasGroup && group == "" {
		return ids{}, fmt.Errorf("owner %q is not USER or USER:GROUP", owner)
	}
	if of.uid, err = s.number(ctx, user, "id", "-u", "--", user); err != nil {
		return ids{}, err
	}
	if !hasGroup && user == strconv.Itoa(of.uid) {
		return of, nil // there may be no user with that number
	}
	if !hasGroup {
		of.gid, err = s.number(ctx, "", "id", "-g", "--", user)
		return of, err
	}
	of.gid, err = s.number(ctx, group, "getent", "group", "--", group)
	return of, err
}

// own gives a path in the sandbox to the owner that the copy names, if it names one.
func (s *Sandbox) own(ctx context.Context, c *Copy, path string) error {
	if c.Chown == "" {
		return nil
	}
	return s.tool(ctx, c.User, nil, nil, "chown", fmt.Sprintf("%d:%d", c.owner.uid, c.owner.gid), "--", path)
}

// number returns name itself if it is a number, or else the first number that a program
// in the sandbox prints.
func (s *Sandbox) number(ctx context.Context, name, program string, args ...string) (int, error) {
	const most = 1<<32 - 2 // the next one means "do not change"
	if n, err := strconv.ParseUint(name, 10, 32); err == nil && n <= most {
		return int(n), nil
	}
	var said head
	if err := s.tool(ctx, "root", nil, &said, program, args...); err != nil {
		return 0, err
	}
	for field := range strings.SplitSeq(strings.TrimSpace(string(said)), ":") {
		if n, err := strconv.ParseUint(field, 10, 32); err == nil && n <= most {
			return int(n), nil
		}
	}
	return 0, fmt.Errorf("%s in the sandbox printed no number: %q", program, string(said))
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
	if c.Preserve || c.Chown != "" || isSparse(info) {
		dir, name := path.Split(to)
		return s.extract(ctx, c, cmp.Or(dir, "."), func(p *packer) error { return p.one(f, name, from) })
	}
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

// WriteFile makes what it reads the content of a file in the sandbox. If the target is
// a directory, or ends with a slash, what it reads is an archive of tar, and is unpacked
// there: with the modes and times that it says, and owned by the user.
func (s *Sandbox) WriteFile(ctx context.Context, c Copy, content io.Reader, to string) (err error) {
	defer func() { err = s.broken(ctx, err) }()
	target, err := s.target(ctx, &c, &to)
	if err != nil {
		return err
	}
	if isDir(target) || strings.HasSuffix(to, "/") {
		if c.Chown != "" {
			return errors.New("the files of an archive belong to the user who unpacks it: name that one instead of an owner")
		}
		dir, err := s.makeDir(ctx, &c, to)
		if err != nil {
			return err
		}
		return s.tool(ctx, c.User, c.reader(content), nil, "tar", "-x", "-p", "-o", "-f", "-", "-C", dir)
	}
	made, err := s.put(ctx, c.User, c.reader(content), to)
	if err != nil {
		return err
	}
	return s.own(ctx, &c, made)
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
	req, err := http.NewRequestWithContext(ctx, method, s.host.base.String()+guestapi.PathFiles+"?"+query.Encode(), body)
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
		// GNU's tar keeps parts of a second only in this format; others do not read the variable.
		Env: map[string]string{"TAR_OPTIONS": "--format=posix"},
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
	return s.extract(ctx, c, to, func(p *packer) error { return p.all(root) })
}

// makeDir makes a directory in the sandbox, unless it is there, and returns its path.
func (s *Sandbox) makeDir(ctx context.Context, c *Copy, to string) (string, error) {
	_, err := call(ctx, s.filesystem(c.User).MakeDir, &filesystem.MakeDirRequest{Path: to})
	made := err == nil
	if !made && connect.CodeOf(err) != connect.CodeAlreadyExists {
		return "", err
	}
	target, err := s.stat(ctx, c.User, to)
	if err != nil {
		return "", err
	}
	if !isDir(target) {
		return "", fmt.Errorf("%s in the sandbox is not a directory", to)
	}
	if made {
		err = s.own(ctx, c, target.Path)
	}
	return target.Path, err
}

// extract makes what write packs, to the end of the archive, in a directory of the sandbox.
func (s *Sandbox) extract(ctx context.Context, c *Copy, to string, write func(*packer) error) error {
	dir, err := s.makeDir(ctx, c, to)
	if err != nil {
		return err
	}
	out, in := io.Pipe()
	p := newPacker(in, c)
	packed := make(chan error, 1)
	go func() {
		err := write(p)
		in.CloseWithError(err)
		packed <- err
	}()
	// A source that cannot be read must not look like the end of the archive.
	bounded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	args := []string{"-x", "-p", "-f", "-", "-C", dir}
	if c.Chown == "" {
		args = append(args, "-o")
	}
	if !c.Preserve {
		args = append(args, "-m")
	}
	err = s.tool(bounded, c.User, &failing{out, cancel}, nil, "tar", args...)
	out.CloseWithError(errStopped)
	if perr := <-packed; perr != nil && !errors.Is(perr, errStopped) {
		return perr
	}
	if err != nil || len(p.holes) == 0 {
		return err
	}
	return s.dig(ctx, c, dir, p.holes)
}

// dig makes the zeros of files in the sandbox holes again. tar makes holes only of what
// its own archives say.
func (s *Sandbox) dig(ctx context.Context, c *Copy, dir string, names []string) error {
	var list strings.Builder
	for _, name := range names {
		list.WriteString(path.Join(dir, name) + "\x00")
	}
	const each = `for f; do when=$(stat -c %.Y "$f") && fallocate --dig-holes "$f" && touch -d "@$when" "$f" || exit; done`
	err := s.tool(ctx, c.User, strings.NewReader(list.String()), nil, "xargs", "-0", "sh", "-c", each, "sh")
	if err != nil && ctx.Err() == nil {
		c.note("%d files with holes are copied without them: %v", len(names), err)
		err = nil
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
func (s *Sandbox) CopyOut(ctx context.Context, c Copy, from, to string) (err error) {
	defer func() { err = s.broken(ctx, err) }()
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
	if c.Preserve {
		// The archive says the time and all of the mode.
		c.begin(source.Size)
		dir, name := path.Split(source.Path)
		return s.unpackOut(ctx, &c, at.dir, at.name, "-h", "-C", dir, "--", name)
	}
	return s.content(ctx, &c, source.Path, func(r io.Reader) error {
		_, err := layFile(at.dir, at.name, kept{mode: fs.FileMode(source.Mode)}, r)
		return err
	})
}

// ReadArchive writes a file or a directory of the sandbox, with all that is in it, to w
// as an archive of tar; of DIR/., what is in DIR. It needs tar in the sandbox.
func (s *Sandbox) ReadArchive(ctx context.Context, c Copy, from string, w io.Writer) (err error) {
	defer func() { err = s.broken(ctx, err) }()
	source, err := s.source(ctx, c.User, from)
	if err != nil {
		return err
	}
	dir, name := path.Split(source.Path)
	if name == "" || from == "." || strings.HasSuffix(from, "/.") {
		dir, name = source.Path, "."
	}
	c.begin(-1)
	return s.tool(ctx, c.User, nil, &writing{w, &c}, "tar", "-c", "-f", "-", "-C", dir, "--", name)
}

// writing is a writer that tells how much was written.
type writing struct {
	io.Writer
	copy *Copy
}

func (w *writing) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if w.copy.Moved != nil {
		w.copy.Moved(n)
	}
	return n, err
}

// ReadFile writes the content of a file in the sandbox to w. A directory is a
// *DirectoryError.
func (s *Sandbox) ReadFile(ctx context.Context, c Copy, from string, w io.Writer) (err error) {
	defer func() { err = s.broken(ctx, err) }()
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
	return s.unpackOut(ctx, c, root, "", "-C", from, ".")
}

// unpackOut makes what tar packs in the sandbox, with these arguments, below root. only
// is as for unpack.
func (s *Sandbox) unpackOut(ctx context.Context, c *Copy, root *os.Root, only string, args ...string) error {
	out, in := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := unpack(out, root, only, c)
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
	err := s.tool(ctx, c.User, nil, in, "tar", append([]string{"-c", "-f", "-"}, args...)...)
	in.CloseWithError(err)
	if uerr := <-unpacked; uerr != nil {
		return uerr // why the writing stopped, or else err itself
	}
	return err
}
