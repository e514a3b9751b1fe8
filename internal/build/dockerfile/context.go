package dockerfile

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// hashVersion tells hashes of archives apart that other code made of the same files.
const hashVersion = "wrenn context 1"

// Archive is what one COPY or ADD takes from the context.
type Archive struct {
	// Hash is of names, modes and contents, and not of times and owners.
	Hash string
	// Bytes is the size of what is in it, for a progress bar.
	Bytes int64

	context *Context
	members []member
}

// member is an entry of an archive.
type member struct {
	name string
	info fs.FileInfo // nil for an inline file
	// from is the path in the context, text the content of an inline file.
	from string
	text string
	link string
	// unpack says that the content of this archive is put in the place of the file.
	unpack bool
}

// Context is a directory that COPY takes from.
type Context struct {
	root    *os.Root
	entries map[string]fs.FileInfo // by path; "." is the directory itself
	names   []string               // sorted
}

// OpenContext lists the context in dir. ignore is the text of a .dockerignore file, nil
// for none; see IgnoreFile. Close must be called.
func OpenContext(dir string, ignore []byte) (*Context, error) {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(ignore))
	if err != nil {
		return nil, errdefs.InvalidArgument.Errorf("read .dockerignore: %w", err)
	}
	matcher, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, errdefs.InvalidArgument.Errorf("read .dockerignore: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, errdefs.InvalidArgument.Errorf("open context: %w", err)
	}
	c := &Context{root: root, entries: map[string]fs.FileInfo{}}
	if err := c.list(matcher); err != nil {
		root.Close()
		return nil, err
	}
	return c, nil
}

// Close releases the directory; archives cannot be written afterwards.
func (c *Context) Close() error { return c.root.Close() }

// list walks over the directory, without following links.
func (c *Context) list(matcher *patternmatcher.PatternMatcher) error {
	matches := map[string]patternmatcher.MatchInfo{}
	err := fs.WalkDir(c.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name != "." {
			ignored, match, err := matcher.MatchesUsingParentResults(filepath.FromSlash(name), matches[path.Dir(name)])
			if err != nil {
				return errdefs.InvalidArgument.Errorf("read .dockerignore: %w", err)
			}
			if d.IsDir() {
				matches[name] = match
			}
			if ignored {
				if d.IsDir() && !matcher.Exclusions() {
					return fs.SkipDir
				}
				return nil
			}
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch info.Mode().Type() {
		case 0, fs.ModeDir, fs.ModeSymlink:
			c.entries[name] = info
			c.names = append(c.names, name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read context: %w", err)
	}
	slices.Sort(c.names)
	return nil
}

// Archives sets Files of each step of the file that takes from the context, and returns
// the archives that the steps need, each once.
func (f *File) Archives(c *Context) ([]Archive, error) {
	var archives []Archive
	for i := range f.Stages {
		for j := range f.Stages[i].Steps {
			l := f.local[[2]int{i, j}]
			if l == nil {
				continue
			}
			step := &f.Stages[i].Steps[j]
			a := Archive{context: c}
			err := a.choose(l)
			if err == nil {
				a.Hash, err = a.write(io.Discard)
			}
			if err != nil {
				return nil, errdefs.InvalidArgument.Errorf("%s:%d: %s: %w", f.name, step.Line, step.Kind, err)
			}
			step.Files = a.Hash
			step.Extract = slices.ContainsFunc(a.members, func(m member) bool { return m.unpack })
			if !slices.ContainsFunc(archives, func(have Archive) bool { return have.Hash == a.Hash }) {
				archives = append(archives, a)
			}
		}
	}
	return archives, nil
}

// choose finds what a step takes.
func (a *Archive) choose(l *localCopy) error {
	seen := map[string]bool{}
	add := func(m member) {
		if !seen[m.name] {
			seen[m.name] = true
			a.members = append(a.members, m)
			if m.info != nil && m.info.Mode().IsRegular() {
				a.Bytes += m.info.Size()
			}
		}
	}
	for _, src := range l.sources {
		found, err := a.context.match(src)
		if err != nil {
			return err
		}
		for _, name := range found {
			if err := a.context.tree(name, l.add, add); err != nil {
				return err
			}
		}
	}
	for _, f := range l.inline {
		add(member{name: f.name, text: f.text})
		a.Bytes += int64(len(f.text))
	}
	slices.SortFunc(a.members, func(x, y member) int { return strings.Compare(x.name, y.name) })
	return nil
}

// match returns the paths that a source names.
func (c *Context) match(src string) ([]string, error) {
	if src == "" {
		src = "."
	}
	if !strings.ContainsAny(src, `*?[\`) {
		if _, err := c.resolve(src); err != nil {
			return nil, err
		}
		return []string{src}, nil
	}
	var found []string
	for _, name := range c.names {
		ok, err := path.Match(src, name)
		if err != nil {
			return nil, fmt.Errorf("%s: not a pattern", src)
		}
		if ok {
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no file matches %s", src)
	}
	return found, nil
}

// resolve returns where a path leads when links are followed. Links lead nowhere but to
// places in the context.
func (c *Context) resolve(name string) (string, error) {
	missing := fmt.Errorf("%s is not in the context, or .dockerignore leaves it out", name)
	at, rest := ".", strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == "" || part == "." {
			continue
		}
		next := path.Join(at, part)
		if next == ".." || strings.HasPrefix(next, "../") {
			return "", fmt.Errorf("%s leads out of the context", name)
		}
		info, ok := c.entries[next]
		switch {
		case !ok && c.hasBelow(next):
			at = next // a directory that is left out, with something below that is not
		case !ok:
			return "", missing
		case info.Mode().Type() == fs.ModeSymlink:
			if links++; links > 40 {
				return "", fmt.Errorf("%s: too many links", name)
			}
			target, err := c.root.Readlink(filepath.FromSlash(next))
			if err != nil {
				return "", err
			}
			if path.IsAbs(target) {
				at = "."
			}
			rest = append(strings.Split(target, "/"), rest...)
		default:
			at = next
		}
	}
	return at, nil
}

func (c *Context) hasBelow(dir string) bool {
	i, _ := slices.BinarySearch(c.names, dir+"/")
	return i < len(c.names) && strings.HasPrefix(c.names[i], dir+"/")
}

// tree adds what is at a path that a source names, and below.
func (c *Context) tree(name string, unpack bool, add func(member)) error {
	at, err := c.resolve(name)
	if err != nil {
		return err
	}
	for _, have := range c.names {
		rel, below := strings.CutPrefix(have, at+"/")
		switch {
		case at == ".":
			rel = have
		case have == at:
			rel = "."
		case !below:
			continue
		}
		m := member{name: path.Join(name, rel), info: c.entries[have], from: have}
		switch {
		case m.info.Mode().Type() == fs.ModeSymlink:
			if m.link, err = c.root.Readlink(filepath.FromSlash(have)); err != nil {
				return err
			}
		case m.info.Mode().IsRegular() && unpack && have == at:
			if m.unpack, err = c.isArchive(have); err != nil {
				return err
			}
		}
		add(m)
	}
	return nil
}

// Write writes the archive as a gzipped tar. It is an error when the files are not those
// that were hashed.
func (a *Archive) Write(w io.Writer) error {
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	hash, err := a.write(zip)
	if err != nil {
		return err
	}
	if hash != a.Hash {
		return errdefs.Busy.Errorf("files of the context changed while they were read")
	}
	return zip.Close()
}

// write writes the archive as a tar and returns its hash.
func (a *Archive) write(w io.Writer) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, hashVersion)
	out := tar.NewWriter(w)
	for _, m := range a.members {
		if err := a.member(m, out, sum); err != nil {
			return "", fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), out.Close()
}

func (a *Archive) member(m member, out *tar.Writer, sum io.Writer) error {
	h := &tar.Header{Name: m.name, Mode: 0o644, Format: tar.FormatPAX}
	if m.info != nil {
		h.Mode, h.ModTime = mode(m.info.Mode()), m.info.ModTime().Truncate(time.Second)
	}
	var content io.Reader
	switch {
	case m.info == nil:
		h.Typeflag, h.Size, content = tar.TypeReg, int64(len(m.text)), strings.NewReader(m.text)
	case m.info.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, m.name+"/"
	case m.link != "" || m.info.Mode().Type() == fs.ModeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
	default:
		f, err := a.context.root.Open(filepath.FromSlash(m.from))
		if err != nil {
			return err
		}
		defer f.Close()
		if m.unpack {
			return unpack(m.name, f, out, sum)
		}
		h.Typeflag, h.Size, content = tar.TypeReg, m.info.Size(), f
	}
	fmt.Fprintf(sum, "%q %c %o %d %q\n", h.Name, h.Typeflag, h.Mode, h.Size, h.Linkname)
	if err := out.WriteHeader(h); err != nil || content == nil {
		return err
	}
	_, err := io.CopyN(io.MultiWriter(out, sum), content, h.Size)
	if errors.Is(err, io.EOF) {
		return errdefs.Busy.Errorf("it became shorter while it was read")
	}
	return err
}

// mode is a file's mode as tar has it.
func mode(m fs.FileMode) int64 {
	bits := int64(m.Perm())
	for flag, bit := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

// isArchive says whether ADD unpacks a file.
func (c *Context) isArchive(name string) (bool, error) {
	f, err := c.root.Open(filepath.FromSlash(name))
	if err != nil {
		return false, err
	}
	defer f.Close()
	in, err := decompress(bufio.NewReader(f))
	if errors.Is(err, errXZ) {
		return false, err
	}
	if err != nil {
		return false, nil // no archive
	}
	_, err = tar.NewReader(in).Next()
	return err == nil, nil
}
