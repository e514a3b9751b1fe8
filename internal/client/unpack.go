package client

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// maxEntries and maxDepth bound what an archive of a sandbox can make here.
	// Each level of directories is an open file.
	maxEntries = 1 << 20
	maxDepth   = 200
	// maxTold bounds the notes about entries that are not copied.
	maxTold = 20
)

// spot is where a copy out of a sandbox goes: a name in a directory, or the
// directory itself if the name is empty.
type spot struct {
	dir  *os.Root
	name string
}

// landing returns the spot that the target of a copy names. The caller chose the
// target, so links on the way to its directory are followed. Links in that
// directory may come from an earlier copy and are not followed.
func landing(from, to string, fromDir bool) (spot, error) {
	if to == "" {
		return spot{}, errors.New("the name of the copy is empty")
	}
	if info, err := os.Stat(to); err == nil && info.IsDir() {
		// The caller, not the guest, chose this name too.
		name := path.Base(path.Clean("/" + from))
		if name == "/" || strings.HasSuffix(from, "/.") || from == "." {
			name = ""
		}
		dir, err := os.OpenRoot(to)
		return spot{dir, name}, err
	}
	if strings.HasSuffix(to, "/") && !fromDir {
		return spot{}, fmt.Errorf("%s is not a directory", to)
	}
	to = filepath.Clean(to)
	info, err := os.Lstat(to)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return spot{}, err
	case fromDir:
		return spot{}, fmt.Errorf("%s is %s, not a directory", to, kindOf(info))
	case !info.Mode().IsRegular():
		return spot{}, fmt.Errorf("%s is %s, and only a file is replaced: give another name, or copy to - and redirect that", to, kindOf(info))
	}
	dir, err := os.OpenRoot(filepath.Dir(to))
	return spot{dir, filepath.Base(to)}, err
}

// kindOf names what a path leads to.
func kindOf(info fs.FileInfo) string {
	switch info.Mode().Type() {
	case 0:
		return "a file"
	case fs.ModeDir:
		return "a directory"
	case fs.ModeSymlink:
		return "a symbolic link"
	case fs.ModeNamedPipe:
		return "a pipe"
	case fs.ModeSocket:
		return "a socket"
	default:
		return "a device"
	}
}

// layFile writes content to a temporary file in dir and renames it to name. A file,
// link, pipe or device of that name is replaced and never opened. A directory of
// that name is an error.
func layFile(dir *os.Root, name string, keep kept, content io.Reader) (info fs.FileInfo, err error) {
	if info, err := dir.Lstat(name); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%s is a directory here and a file in the sandbox", name)
	}
	part := ".wrenn-" + rand.Text() + ".part"
	f, err := dir.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, keep.mode.Perm()|0o200)
	if err != nil {
		return nil, err
	}
	defer func() {
		f.Close()
		if err != nil {
			_ = dir.Remove(part)
		}
	}()
	if err := fill(f, content); err != nil {
		return nil, err
	}
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if err := keep.give(dir, part); err != nil {
		return nil, err
	}
	return info, dir.Rename(part, name)
}

// holeBytes is how many zeros in a row become a hole of a file.
const holeBytes = 64 << 10

// fill writes content to a new file, and zeros as holes.
func fill(f *os.File, content io.Reader) error {
	buf, zeros := make([]byte, holeBytes), make([]byte, holeBytes)
	at, hole := int64(0), false
	for {
		n, err := 0, error(nil)
		for n < len(buf) && err == nil { // io.ReadFull has one error for a short end and a broken one
			var more int
			more, err = content.Read(buf[n:])
			n += more
		}
		if n > 0 {
			if hole = bytes.Equal(buf[:n], zeros); !hole {
				if _, err := f.WriteAt(buf[:n], at); err != nil {
					return err
				}
			}
			at += int64(n)
		}
		switch {
		case err == io.EOF && hole:
			return f.Truncate(at)
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// kept is what a copy keeps of a file or a directory besides its content.
type kept struct {
	mode fs.FileMode
	// all says that the mode is kept with its set-user-ID, set-group-ID and sticky
	// bits, and whatever the umask is, and that the time is kept.
	all     bool
	changed time.Time
}

// give sets the mode and the time of name in dir, if they are to be kept.
func (k kept) give(dir *os.Root, name string) error {
	if !k.all {
		return nil
	}
	if err := dir.Chmod(name, k.mode&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return dir.Chtimes(name, k.changed, k.changed)
}

// clearName removes the entry name of dir, if there is one. A directory is not
// removed: it is an error.
func clearName(dir *os.Root, name string) error {
	info, err := dir.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("%s is a directory here and none in the sandbox", name)
	}
	return dir.Remove(name)
}

// openDir opens the directory name in parent, and makes it with mode if nothing has
// that name. A link is an error.
func openDir(parent *os.Root, name string, mode fs.FileMode) (*os.Root, error) {
	info, err := parent.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		if err = parent.Mkdir(name, mode&fs.ModePerm|0o700); err == nil {
			info, err = parent.Lstat(name)
		}
	}
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is %s here and a directory in the sandbox", name, kindOf(info))
	}
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	if opened, err := dir.Stat("."); err != nil || !os.SameFile(info, opened) {
		dir.Close()
		return nil, fmt.Errorf("%s was replaced while it was opened", name)
	}
	return dir, nil
}

// tree is what one archive has made below a directory.
type tree struct {
	top *os.Root
	// only is the name of the one file that the archive may hold; empty for any.
	only string
	most int  // entries
	keep kept // by the top
	// open are the directories on the way to the last entry.
	open []level
	// made are the files of this archive.
	made map[inode]bool
	// passed counts the entries that are not copied.
	passed int
	copy   *Copy
}

type level struct {
	name string
	dir  *os.Root
	// keep is given to the directory when nothing more is made in it.
	keep kept
}

type inode struct{ dev, ino uint64 }

func inodeOf(info fs.FileInfo) inode {
	st := info.Sys().(*syscall.Stat_t)
	return inode{uint64(st.Dev), st.Ino}
}

// unpack makes the entries of an archive below top. The archive is a guest's and not
// trusted: unpack writes, reads and links nothing outside of top. It makes only
// files, directories and links; set-user-ID, set-group-ID and sticky bits only if
// the copy preserves them. With only, the archive must hold one file, which gets that
// name.
func unpack(r io.Reader, top *os.Root, only string, c *Copy) error {
	t := &tree{top: top, only: only, most: maxEntries, made: make(map[inode]bool), copy: c}
	return t.layAll(c.reader(r))
}

func (t *tree) layAll(r io.Reader) (err error) {
	defer func() { err = errors.Join(err, t.leave(0), t.keep.give(t.top, ".")) }()
	archive := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := archive.Next()
		if err == io.EOF {
			if more := t.passed - maxTold; more > 0 {
				t.copy.note("%d more are not copied", more)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		if n == t.most {
			return fmt.Errorf("the sandbox's archive has more than %d entries", t.most)
		}
		if t.only != "" {
			if n > 0 || h.Typeflag != tar.TypeReg {
				return errors.New("the sandbox's archive does not hold one file")
			}
			h.Name = t.only
		}
		if err := t.lay(h, archive); err != nil {
			return fmt.Errorf("copy %q: %w", h.Name, err)
		}
	}
}

// lay makes one entry.
func (t *tree) lay(h *tar.Header, content io.Reader) error {
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	keep := kept{mode: h.FileInfo().Mode(), all: t.copy.Preserve, changed: h.ModTime}
	if len(parts) == 0 || h.Typeflag == tar.TypeXGlobalHeader {
		if h.Typeflag == tar.TypeDir {
			t.keep = keep // of the top itself
		}
		return nil
	}
	if h.Typeflag == tar.TypeDir {
		_, err := t.enter(parts, keep)
		return err
	}
	if sparse(h) {
		// A few bytes of archive would become a file as large as the disk.
		return errors.New("it is a sparse file, which this copy does not take")
	}
	name := parts[len(parts)-1]
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeSymlink, tar.TypeLink:
	default:
		if t.passed++; t.passed <= maxTold {
			t.copy.note("%q is not copied: it is neither a file, a directory nor a link", h.Name)
		}
		return nil
	}
	dir, err := t.enter(parts[:len(parts)-1], kept{mode: 0o755})
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		info, err := layFile(dir, name, keep, content)
		if err != nil {
			return err
		}
		t.made[inodeOf(info)] = true
		return nil
	case tar.TypeSymlink:
		if err := clearName(dir, name); err != nil {
			return err
		}
		return dir.Symlink(h.Linkname, name)
	default:
		return t.link(h.Linkname, dir, parts)
	}
}

// link makes another name for a file of this archive. A file that was here before
// gets none: the guest must not choose where that file appears.
func (t *tree) link(to string, dir *os.Root, parts []string) error {
	source, err := split(to)
	if err != nil {
		return err
	}
	old := path.Join(source...)
	info, err := t.top.Lstat(old)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || !t.made[inodeOf(info)] {
		return fmt.Errorf("it is a link to %q, which is no file of this copy", to)
	}
	name := parts[len(parts)-1]
	if there, err := dir.Lstat(name); err == nil && os.SameFile(info, there) {
		return nil
	}
	if err := clearName(dir, name); err != nil {
		return err
	}
	return t.top.Link(old, path.Join(parts...))
}

// enter opens a directory below the top, level by level, and makes the levels that
// are missing. keep is of the last one.
func (t *tree) enter(parts []string, keep kept) (*os.Root, error) {
	n := 0
	for n < len(parts) && n < len(t.open) && t.open[n].name == parts[n] {
		n++
	}
	if err := t.leave(n); err != nil {
		return nil, err
	}
	here := t.top
	if n > 0 {
		here = t.open[n-1].dir
	}
	for i := n; i < len(parts); i++ {
		of := kept{mode: 0o755}
		if i == len(parts)-1 {
			of = keep
		}
		dir, err := openDir(here, parts[i], of.mode)
		if err != nil {
			return nil, err
		}
		t.open = append(t.open, level{parts[i], dir, of})
		here = dir
	}
	if keep.all && len(parts) > 0 {
		t.open[len(parts)-1].keep = keep
	}
	return here, nil
}

// leave closes all but the first n levels. What a directory keeps is given to it then:
// what is made in it changes its time, and its mode may forbid to make anything.
func (t *tree) leave(n int) error {
	var errs []error
	for _, l := range t.open[n:] {
		errs = append(errs, l.keep.give(l.dir, "."))
		l.dir.Close()
	}
	t.open = t.open[:n]
	return errors.Join(errs...)
}

// split returns the levels of an entry's name; the top has none.
func split(name string) ([]string, error) {
	clean := path.Clean(name)
	if clean == "." && name != "" {
		return nil, nil
	}
	if !filepath.IsLocal(clean) || strings.ContainsRune(name, 0) || name == "" {
		return nil, errors.New("the name leads out of the directory that is copied")
	}
	parts := strings.Split(clean, "/")
	if len(parts) > maxDepth {
		return nil, fmt.Errorf("it is more than %d directories deep", maxDepth)
	}
	return parts, nil
}

func sparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}
