package main

import (
	"archive/tar"
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
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/api/process"
)

func newCp(c *client) *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files and directories into and out of a sandbox",
		Long: `Copy a file or a directory with all that is in it into a running sandbox or out
of it. One of the two is ID:PATH; a relative PATH begins at the user's home. In
place of the other, - is stdin or stdout.

A target that is a directory gets the source inside it; of DIR/. only what is in
DIR is copied. Modes are kept, owners are not: what is copied belongs to who
copied it. Directories need tar in the sandbox.

A copy out of a sandbox stays in the directory that DST names. Links on the way to
that directory are followed, links in it are not: a file or a link of the sandbox
replaces what has its name there, but never a directory, and a directory replaces
nothing. A DST that is itself neither a file nor a directory is refused. Files,
directories and links are copied, and no others.`,
		Example: "  wrenn cp main.py 3fa:/root/\n  wrenn cp 3fa:/var/log ./logs\n  wrenn cp 3fa:results.csv - | head",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, to := parsePlace(args[0]), parsePlace(args[1])
			if (from.ref == "") == (to.ref == "") {
				return errors.New("one of SRC and DST must be ID:PATH, and one must not; a local name with a colon is written ./a:b")
			}
			id, err := c.resolve(cmd.Context(), from.ref+to.ref)
			if err != nil {
				return err
			}
			x := &copier{client: c, id: id, user: user}
			if to.ref != "" {
				return x.upload(cmd.Context(), from.path, to.path)
			}
			return x.download(cmd.Context(), from.path, to.path)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user in the sandbox that files belong to")
	return cmd
}

// place is one end of a copy: in the sandbox that ref names, or here.
type place struct{ ref, path string }

func parsePlace(s string) place {
	ref, path, ok := strings.Cut(s, ":")
	if !ok || ref == "" || strings.ContainsAny(ref, "/.") {
		return place{path: s}
	}
	return place{ref, path}
}

// copier copies between this machine and a sandbox.
type copier struct {
	*client
	id, user string
}

// stat looks at a path in the sandbox; nil if nothing is there.
func (x *copier) stat(ctx context.Context, path string) (*filesystem.EntryInfo, error) {
	resp, err := x.filesystem(x.id, x.user).Stat(ctx, connect.NewRequest(&filesystem.StatRequest{Path: path}))
	switch {
	case err == nil:
		return resp.Msg.Entry, nil
	case connect.CodeOf(err) == connect.CodeNotFound && connect.IsWireError(err):
		return nil, nil
	}
	return nil, err
}

func isDir(e *filesystem.EntryInfo) bool {
	return e != nil && e.Type == filesystem.FileType_FILE_TYPE_DIRECTORY
}

func (x *copier) upload(ctx context.Context, from, to string) error {
	if from == "-" {
		if to == "" || strings.HasSuffix(to, "/") {
			return errors.New("what comes from stdin has no name: let DST end with one")
		}
		_, err := x.put(ctx, os.Stdin, to)
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is %s, neither a file nor a directory; of a pipe, copy -", from, kindOf(info))
	}
	target, err := x.stat(ctx, to)
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
		return x.uploadDir(ctx, from, to)
	}
	f, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// It may be another one by now.
	if info, err = f.Stat(); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s was replaced while it was opened", from)
	}
	p := startMeter(info.Size())
	defer p.stop()
	// Its end is where reading ends: some files say a size that is not theirs.
	made, err := x.put(ctx, p.reader(f), to)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode != 0o644 {
		// Files are made with that mode.
		return x.tool(ctx, nil, nil, "chmod", fmt.Sprintf("%o", mode), made)
	}
	return nil
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

// files is a request for a file's content.
func (x *copier) files(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	query := url.Values{"path": {path}}
	if x.user != "" {
		query.Set("username", x.user)
	}
	req, err := http.NewRequestWithContext(ctx, method, x.host+"/files?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = -1
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	req.Header.Set("Accept-Encoding", "identity")
	return x.guestHTTP(req, x.id)
}

// guestHTTP sends a plain HTTP request to a sandbox's envd. Any answer but
// success is an error.
func (c *client) guestHTTP(req *http.Request, id string) (*http.Response, error) {
	guestHeaders{id: id}.set(req.Header)
	token, err := c.token(req.Context(), id)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Access-Token", token)
	guest := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := guest.Do(req)
	if err != nil {
		if cause := context.Cause(req.Context()); cause != nil {
			return nil, cause
		}
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var refusal struct{ Message string }
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if json.Unmarshal(data, &refusal) != nil || refusal.Message == "" {
		return nil, fmt.Errorf("the host answered %s", resp.Status)
	}
	return nil, errors.New(refusal.Message)
}

// put writes a file in the sandbox and returns its path there.
func (x *copier) put(ctx context.Context, content io.Reader, to string) (string, error) {
	resp, err := x.files(ctx, http.MethodPost, to, content)
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

// tool runs a program in the sandbox that must succeed; what it complains of
// is the error.
func (x *copier) tool(ctx context.Context, in io.Reader, out io.Writer, name string, args ...string) error {
	var complaint head
	s := &session{
		config: &process.ProcessConfig{Cmd: name, Args: args}, user: x.user, tied: true,
		stdin: in, stdout: out, stderr: &complaint,
	}
	if out == nil {
		s.stdout = io.Discard
	}
	status, err := x.run(ctx, x.id, s)
	var missing *statusError
	switch {
	case errors.As(err, &missing) && missing.status == notFoundStatus:
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

// uploadDir makes the content of a directory here that of one there.
func (x *copier) uploadDir(ctx context.Context, from, to string) error {
	_, err := x.filesystem(x.id, x.user).MakeDir(ctx, connect.NewRequest(&filesystem.MakeDirRequest{Path: to}))
	if err != nil && connect.CodeOf(err) != connect.CodeAlreadyExists {
		return err
	}
	target, err := x.stat(ctx, to)
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
	p := startMeter(total)
	defer p.stop()
	out, in := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := pack(root, in, p)
		in.CloseWithError(err)
		packed <- err
	}()
	// A source that cannot be read must not look like the end of the archive.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	source := &failing{out, cancel}
	err = x.tool(ctx, source, nil, "tar", "-x", "-o", "-f", "-", "-C", target.Path)
	out.CloseWithError(errStopped)
	if perr := <-packed; perr != nil && !errors.Is(perr, errStopped) {
		return perr
	}
	return err
}

var errStopped = errors.New("the other end stopped")

// failing cancels what reads it when it cannot be read to its end.
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

// walk visits all that is below a directory, each directory before what is in
// it. No link is followed.
func walk(root *os.Root, rel string, visit func(name string, info fs.FileInfo) error) error {
	info, err := root.Lstat(rel)
	if err != nil {
		return err
	}
	dir, err := openSame(root, rel, info)
	if err != nil {
		return err
	}
	entries, err := dir.ReadDir(-1)
	dir.Close()
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		name := path.Join(rel, e.Name())
		info, err := root.Lstat(name)
		if err == nil {
			err = visit(name, info)
		}
		if err == nil && info.IsDir() {
			err = walk(root, name, visit)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// openSame opens the file or directory that was seen below root a moment ago,
// and nothing that was put in its place.
func openSame(root *os.Root, name string, seen fs.FileInfo) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !os.SameFile(seen, info) {
		f.Close()
		return nil, fmt.Errorf("%s was replaced while it was copied", filepath.Join(root.Name(), name))
	}
	return f, nil
}

// treeSize is what the files below a directory hold, in bytes.
func treeSize(root *os.Root) (total int64, err error) {
	err = walk(root, ".", func(_ string, info fs.FileInfo) error {
		if info.Mode().IsRegular() {
			total += info.Size()
		}
		return nil
	})
	return total, err
}

// pack writes what is in a directory as an archive. What is neither file,
// directory nor symbolic link is passed over, with a word about it.
func pack(root *os.Root, w io.Writer, p *meter) error {
	archive := tar.NewWriter(w)
	err := walk(root, ".", func(name string, info fs.FileInfo) error {
		shown := filepath.Join(root.Name(), name)
		link := ""
		var content *os.File
		var err error
		switch info.Mode().Type() {
		case fs.ModeDir:
		case fs.ModeSymlink:
			if link, err = root.Readlink(name); err != nil {
				return err
			}
		case 0:
			if content, err = openSame(root, name, info); err != nil {
				return err
			}
			defer content.Close()
			if info, err = content.Stat(); err != nil {
				return err
			}
		default:
			p.say("%s is not copied: it is neither a file, a directory nor a symbolic link", shown)
			return nil
		}
		header, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		header.Name = name
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
		if err := archive.WriteHeader(header); err != nil || content == nil {
			return err
		}
		return packContent(archive, p.reader(content), header.Size, shown, p)
	})
	if err != nil {
		return err
	}
	return archive.Close()
}

// packContent writes as much of a file as its header says.
func packContent(archive io.Writer, content io.Reader, size int64, name string, p *meter) error {
	n, err := io.CopyN(archive, content, size)
	if err == io.EOF {
		return fmt.Errorf("%s became shorter while it was copied: it had %d bytes, and %d could be read", name, size, n)
	}
	if err != nil {
		return err
	}
	if n, err := content.Read(make([]byte, 1)); n > 0 || err != nil && err != io.EOF {
		p.say("%s became longer while it was copied, and only its first %d bytes are", name, size)
	}
	return nil
}

func (x *copier) download(ctx context.Context, from, to string) error {
	source, err := x.stat(ctx, from)
	if err != nil {
		return err
	}
	if source == nil {
		return fmt.Errorf("%s does not exist in the sandbox", from)
	}
	if isDir(source) && to == "-" {
		return fmt.Errorf("%s is a directory; `wrenn exec %s -- tar -c -C %[1]s .` writes it as an archive", source.Path, x.id)
	}
	var at spot
	if to != "-" {
		if at, err = landing(from, to, isDir(source)); err != nil {
			return err
		}
		defer at.dir.Close()
	}
	if isDir(source) {
		return x.downloadDir(ctx, source.Path, at)
	}
	if to != "-" && at.name == "" {
		return fmt.Errorf("%s in the sandbox is not a directory", from)
	}
	resp, err := x.files(ctx, http.MethodGet, source.Path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	p := startMeter(resp.ContentLength)
	defer p.stop()
	if to == "-" {
		_, err := io.Copy(os.Stdout, p.reader(resp.Body))
		return cut(ctx, err)
	}
	_, err = layFile(at.dir, at.name, fs.FileMode(source.Mode), p.reader(resp.Body))
	return cut(ctx, err)
}

// cut is an error of a copy that may be due to its end.
func cut(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// maxPadding bounds what follows an archive's end, in bytes.
const maxPadding = 1 << 20

// downloadDir makes the content of a directory there that of one here.
func (x *copier) downloadDir(ctx context.Context, from string, at spot) error {
	root := at.dir
	if at.name != "" {
		dir, err := openDir(at.dir, at.name, 0o755)
		if err != nil {
			return err
		}
		defer dir.Close()
		root = dir
	}
	p := startMeter(-1)
	defer p.stop()
	out, in := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := unpack(out, root, p)
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
	err := x.tool(ctx, nil, in, "tar", "-c", "-f", "-", "-C", from, ".")
	in.CloseWithError(err)
	if uerr := <-unpacked; uerr != nil {
		return uerr // why the writing stopped, or else err itself
	}
	return err
}

// meter shows on a terminal how far a copy has come.
type meter struct {
	total int64 // bytes; -1: not known
	done  atomic.Int64
	began time.Time
	tty   bool
	end   chan struct{}
	gone  chan struct{}
	note  chan string
}

// startMeter begins to show progress, until stop.
func startMeter(total int64) *meter {
	p := &meter{
		total: total, began: time.Now(), tty: term.IsTerminal(int(os.Stderr.Fd())),
		end: make(chan struct{}), gone: make(chan struct{}), note: make(chan string),
	}
	go p.run()
	return p
}

func (p *meter) run() {
	defer close(p.gone)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.end:
			p.show("\r\x1b[K")
			return
		case text := <-p.note:
			p.show("\r\x1b[K")
			complain("%s", text)
		case <-tick.C:
			p.show(p.line())
		}
	}
}

func (p *meter) show(text string) {
	if p.tty {
		fmt.Fprint(os.Stderr, text)
	}
}

// line is what a terminal shows of a copy.
func (p *meter) line() string {
	done := p.done.Load()
	rate := fmt.Sprintf("%s, %s/s", bytesText(done), bytesText(int64(float64(done)/max(time.Since(p.began).Seconds(), 0.001))))
	if p.total <= 0 {
		return "\r\x1b[K" + rate
	}
	const width = 24
	part := min(done, p.total)
	full := int(part * width / p.total)
	return fmt.Sprintf("\r\x1b[K[%s%s] %3d%%  %s", strings.Repeat("#", full), strings.Repeat("-", width-full), part*100/p.total, rate)
}

// say prints a line beside the meter.
func (p *meter) say(format string, args ...any) {
	select {
	case p.note <- fmt.Sprintf(format, args...):
	case <-p.gone:
	}
}

func (p *meter) stop() { close(p.end); <-p.gone }

func (p *meter) reader(r io.Reader) io.Reader { return &metered{r, p} }

type metered struct {
	r io.Reader
	p *meter
}

func (m *metered) Read(b []byte) (int, error) {
	n, err := m.r.Read(b)
	m.p.done.Add(int64(n))
	return n, err
}

// bytesText is a number of bytes as people read it.
func bytesText(n int64) string {
	value, unit := float64(n), "B"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value < 1024 {
			break
		}
		value, unit = value/1024, next
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
