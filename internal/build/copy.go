package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Bounds of what a COPY takes.
const (
	maxMembers  = 1_000_000
	maxUnpacked = 64 << 30
)

// source is the archive that a COPY takes from: a file of the host's that can be read
// again and again.
type source struct {
	open func() (io.ReadCloser, error)
	// kinds are the types of the members by their clean names, as far as they matter.
	kinds map[string]byte
	links map[string]string
	// packed says that it came out of a guest, from prefix: the whole tree below, or one
	// file.
	packed, tree bool
	prefix       string
}

// copy runs a COPY.
func (j *job) copy(g Guest, p *planned) error {
	var sources []source
	keep := p.from != nil || p.Extract // the owners that the members have
	if p.from == nil {
		sources = []source{{open: func() (io.ReadCloser, error) { return j.archive(p.Files) }}}
	} else {
		packed, err := j.packAll(p)
		if err != nil {
			return err
		}
		sources = packed
	}
	who, err := j.copyOwner(g, p)
	if err != nil {
		return err
	}
	c := &copying{step: p.Step, e2b: j.spec.E2B, owner: who, keep: keep && p.Owner == "" && !j.spec.E2B, dst: p.Dst}
	if !path.IsAbs(c.dst) {
		c.dst = path.Join("/", p.before.workdir, c.dst)
		if strings.HasSuffix(p.Dst, "/") || p.Dst == "." || strings.HasSuffix(p.Dst, "/.") {
			c.dst += "/"
		}
	}
	if p.Mode != "" {
		if c.mode, err = strconv.ParseInt(p.Mode, 8, 32); err != nil {
			return errdefs.InvalidArgument.Errorf("COPY with the mode %s: %w", p.Mode, err)
		}
	}
	for i := range sources {
		if err := sources[i].index(); err != nil {
			return err
		}
	}
	c.sources = sources
	if err := c.choose(); err != nil {
		return err
	}
	if err := c.settle(j.ctx, g); err != nil {
		return err
	}
	return c.send(j.ctx, g)
}

// copyOwner is who gets the files.
func (j *job) copyOwner(g Guest, p *planned) (owner, error) {
	if p.Owner == "" {
		if !j.spec.E2B {
			return owner{}, nil
		}
		return j.currentOwner(g, p.before)
	}
	d, err := readDatabase(j.ctx, g)
	if err != nil {
		return owner{}, err
	}
	return d.ownerOf(p.Owner)
}

// archive opens an uploaded archive, uncompressed.
func (j *job) archive(hash string) (io.ReadCloser, error) {
	f, err := j.e.open(j.spec.Project, hash)
	if err != nil {
		return nil, err
	}
	in, err := decompress(bufio.NewReader(f))
	if err != nil {
		f.Close()
		return nil, errdefs.InvalidArgument.Errorf("read files: %w", err)
	}
	return &reading{Reader: io.LimitReader(withContext(j.ctx, in), maxUnpacked), under: f, in: in}, nil
}

type reading struct {
	io.Reader
	under *os.File
	in    io.Reader
}

func (r *reading) Close() error {
	if z, ok := r.in.(io.Closer); ok {
		z.Close()
	}
	return r.under.Close()
}

func decompress(in *bufio.Reader) (io.Reader, error) {
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(in)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(128<<20))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return in, nil
}

// packAll packs what a COPY takes out of a stage. What comes of each source is below the
// source's own name, as in an archive.
func (j *job) packAll(p *planned) ([]source, error) {
	from := p.from
	if err := j.runStage(from); err != nil {
		return nil, err
	}
	if err := j.boot(from); err != nil {
		return nil, err
	}
	g, err := j.e.cfg.Sandboxes.Guest(from.box)
	if err != nil {
		return nil, err
	}
	var sources []source
	packed := map[string]bool{}
	for _, src := range p.Src {
		src = path.Clean("/" + src)
		if i := strings.IndexAny(src, `*?[\`); i >= 0 {
			src = path.Dir(src[:i] + "x") // the directory above the pattern
		}
		if packed[src] {
			continue
		}
		packed[src] = true
		s, err := j.pack(g, src)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
	}
	return sources, nil
}

// pack writes what is at a path of a guest into a file of the job.
func (j *job) pack(g Guest, src string) (source, error) {
	name := j.file("copy")
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return source{}, fmt.Errorf("copy %s: %w", src, errdefs.DiskFull(err))
	}
	err = g.Pack(j.ctx, src, &boundedWriter{w: f, left: maxUnpacked})
	if err = errors.Join(err, f.Close()); err != nil {
		if errors.Is(err, errdefs.NotFound) {
			return source{}, errdefs.NotFound.Errorf("COPY: %s does not exist there", src)
		}
		return source{}, fmt.Errorf("copy %s: %w", src, errdefs.DiskFull(err))
	}
	return source{packed: true, prefix: strings.TrimPrefix(src, "/"), open: func() (io.ReadCloser, error) { return os.Open(name) }}, nil
}

type boundedWriter struct {
	w    io.Writer
	left int64
}

func (b *boundedWriter) Write(p []byte) (int, error) {
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, errdefs.Exhausted.Errorf("COPY takes more than %d GiB", int64(maxUnpacked)>>30)
	}
	return b.w.Write(p)
}

// each calls fn with each member of the archive, by its clean name without a slash at
// the beginning; "." is the whole.
func (s *source) each(fn func(name string, h *tar.Header, content io.Reader) error) error {
	in, err := s.open()
	if err != nil {
		return err
	}
	defer in.Close()
	members := tar.NewReader(in)
	for n := 0; ; n++ {
		h, err := members.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return errdefs.InvalidArgument.Errorf("read files: %w", err)
		}
		if n > maxMembers {
			return errdefs.InvalidArgument.Errorf("COPY of more than %d files", maxMembers)
		}
		if path.IsAbs(h.Name) || escapes(h.Name) {
			return errdefs.InvalidArgument.Errorf("the archive of files has the name %.80q, which leads out of it", h.Name)
		}
		if n == 0 {
			s.tree = path.Clean(h.Name) == "."
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
		case tar.TypeGNUSparse:
			h.Typeflag = tar.TypeReg
		default:
			continue // devices and the like
		}
		if err := fn(s.name(h), h, members); err != nil {
			return err
		}
	}
}

// name is the name of a member of the whole. What was packed has its names below prefix,
// or is one file that prefix names.
func (s *source) name(h *tar.Header) string {
	clean := path.Clean(h.Name)
	switch {
	case s.packed && !s.tree, clean == "." && s.packed:
		return cmp.Or(s.prefix, ".")
	case s.packed:
		return path.Join(s.prefix, clean)
	}
	return clean
}

// escapes says whether a name has a "..".
func escapes(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// index finds what kinds of members the archive has.
func (s *source) index() error {
	s.kinds, s.links = map[string]byte{}, map[string]string{}
	return s.each(func(name string, h *tar.Header, _ io.Reader) error {
		s.kinds[name] = h.Typeflag
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := s.kinds[dir]; !ok {
				s.kinds[dir] = tar.TypeDir
			}
		}
		if h.Typeflag == tar.TypeSymlink {
			s.links[name] = h.Linkname
		}
		return nil
	})
}
