package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// copying is a COPY whose sources are known.
type copying struct {
	step    Step
	e2b     bool
	sources []source
	// dst is absolute, and ends with a slash if files go into it.
	dst   string
	owner owner
	keep  bool // the members' own owners
	mode  int64
	found []found
}

// found is a member that a source names.
type found struct {
	source int
	name   string
	dir    bool
}

const globs = `*?[\`

// choose finds what the sources name.
func (c *copying) choose() error {
	for _, src := range c.step.Src {
		src = strings.TrimPrefix(path.Clean("/"+src), "/")
		n := len(c.found)
		for i := range c.sources {
			c.match(i, src)
		}
		if len(c.found) == n {
			return errdefs.NotFound.Errorf("COPY: nothing matches %s", src)
		}
	}
	if len(c.found) > 1 && slices.ContainsFunc(c.found, func(f found) bool { return !f.dir }) && !strings.HasSuffix(c.dst, "/") {
		c.dst += "/"
	}
	return nil
}

// match finds what a source names in one archive.
func (c *copying) match(i int, src string) {
	s := &c.sources[i]
	add := func(name string) { c.found = append(c.found, found{i, name, s.kinds[name] == tar.TypeDir}) }
	glob := strings.IndexAny(src, globs)
	if c.e2b && glob >= 0 {
		// E2B's clients put only what matches into the archive.
		src, glob = path.Dir(src[:glob]+"x"), -1
	}
	switch {
	case src == "" || src == ".":
		c.found = append(c.found, found{i, ".", true})
	case glob < 0:
		if _, ok := s.kinds[src]; ok {
			add(src)
		}
	default:
		var names []string
		for name := range s.kinds {
			if ok, err := path.Match(src, name); err == nil && ok {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			add(name)
		}
	}
}

// settle finds out whether one file goes into a directory that is there.
func (c *copying) settle(ctx context.Context, g Guest) error {
	if strings.HasSuffix(c.dst, "/") || len(c.found) != 1 || c.found[0].dir {
		return nil
	}
	dir, err := isDir(ctx, g, c.dst)
	if err != nil {
		return fmt.Errorf("look at %s: %w", c.dst, err)
	}
	if dir {
		c.dst += "/"
	}
	return nil
}

var errEnough = errors.New("no more is needed")

// isDir says whether a directory is at a path of the guest, or where a link there leads.
func isDir(ctx context.Context, g Guest, name string) (dir bool, err error) {
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := g.Pack(ctx, name, w)
		w.CloseWithError(err)
		done <- err
	}()
	h, err := tar.NewReader(r).Next()
	r.CloseWithError(errEnough)
	packed := <-done
	switch {
	case err == nil:
		return h.Typeflag == tar.TypeDir, nil
	case errors.Is(packed, errdefs.NotFound), errors.Is(packed, errdefs.InvalidArgument): // it is a device or the like
		return false, nil
	}
	return false, errors.Join(packed, err)
}

// target is where a member goes, absolute; ok is false for one that is not copied.
func (c *copying) target(source int, name string) (to string, ok bool) {
	for _, f := range c.found {
		if f.source != source {
			continue
		}
		rel, below := strings.CutPrefix(name, f.name+"/")
		switch {
		case f.dir && f.name == ".":
			return path.Join(c.dst, name), true
		case f.dir && name == f.name:
			return path.Clean(c.dst), true
		case f.dir && below:
			return path.Join(c.dst, rel), true
		case name == f.name && strings.HasSuffix(c.dst, "/"):
			return path.Join(c.dst, path.Base(name)), true
		case name == f.name:
			return c.dst, true
		}
	}
	return "", false
}

// send unpacks what was chosen in the guest.
func (c *copying) send(ctx context.Context, g Guest) error {
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := c.write(w)
		w.CloseWithError(err)
		done <- err
	}()
	err := g.Unpack(ctx, "/", r)
	r.CloseWithError(errEnough)
	if written := <-done; written != nil && !errors.Is(written, errEnough) {
		return written
	}
	if err != nil {
		return fmt.Errorf("copy to %s: %w", c.dst, err)
	}
	return nil
}

// write writes the archive that the guest unpacks.
func (c *copying) write(w io.Writer) error {
	out := tar.NewWriter(w)
	dir := path.Dir(c.dst) // without the slash at its end, if it has one
	if len(c.found) > 0 && c.found[0].dir {
		dir = path.Clean(c.dst)
	}
	for _, p := range parents(dir, c.parentOwner()) {
		h := &tar.Header{Name: p.name + "/", Typeflag: tar.TypeDir, Mode: p.mode, Uid: p.uid, Gid: p.gid, Format: tar.FormatPAX}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
	}
	for i := range c.sources {
		s := &c.sources[i]
		err := s.each(func(name string, h *tar.Header, content io.Reader) error { return c.member(out, i, name, h, content) })
		if err != nil {
			return err
		}
	}
	return out.Close()
}

// parentOwner is who gets directories that are made on the way.
func (c *copying) parentOwner() owner {
	if c.keep {
		return owner{}
	}
	return c.owner
}

// member writes one member.
func (c *copying) member(out *tar.Writer, i int, name string, h *tar.Header, content io.Reader) error {
	s := &c.sources[i]
	name, ok := s.straight(name)
	if !ok {
		return nil
	}
	to, ok := c.target(i, name)
	if !ok || to == "/" {
		return nil
	}
	n := &tar.Header{
		Name: strings.TrimPrefix(to, "/"), Typeflag: h.Typeflag, Size: h.Size, Mode: h.Mode & 0o7777, ModTime: h.ModTime,
		Uid: c.owner.uid, Gid: c.owner.gid, Linkname: h.Linkname, Format: tar.FormatPAX,
	}
	if c.keep {
		n.Uid, n.Gid = h.Uid, h.Gid
	}
	if c.mode != 0 || c.step.Mode != "" {
		n.Mode = c.mode
	}
	for key, value := range h.PAXRecords {
		if s.packed && strings.HasPrefix(key, "SCHILY.xattr.") {
			if n.PAXRecords == nil {
				n.PAXRecords = map[string]string{}
			}
			n.PAXRecords[key] = value
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		n.Name += "/"
	case tar.TypeLink:
		linked, ok := s.straight(s.name(&tar.Header{Name: h.Linkname}))
		if ok {
			linked, ok = c.target(i, linked)
		}
		if !ok {
			return errdefs.InvalidArgument.Errorf("COPY: %.200s is a hard link to a file that is not copied", name)
		}
		n.Linkname = strings.TrimPrefix(linked, "/")
	}
	if err := out.WriteHeader(n); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.Copy(out, content)
	return err
}

// straight returns the name of a member with the archive's own links followed on the way
// to it. A member below a link that leads to members which are there anyway, or out of
// the archive, is left out.
func (s *source) straight(name string) (string, bool) {
	if len(s.links) == 0 {
		return name, true
	}
	moved := false
	for hops := 0; ; hops++ {
		at := ""
		for dir := path.Dir(name); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if _, ok := s.links[dir]; ok {
				at = dir // the uppermost
			}
		}
		if at == "" {
			_, there := s.kinds[name]
			return name, !moved || !there
		}
		target := s.links[at]
		name, moved = path.Join(path.Dir(at), target, strings.TrimPrefix(name, at)), true
		if path.IsAbs(target) || hops > 40 || name == ".." || strings.HasPrefix(name, "../") {
			return "", false
		}
	}
}
