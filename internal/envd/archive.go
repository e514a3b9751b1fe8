package envd

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// maxArchive bounds the entries of one archive.
	maxArchive = 2_000_000
	// maxNameBytes bounds the name of an entry, maxDepth the directories in it.
	maxNameBytes = 4096
	maxDepth     = 255
	// xattrRecord is what the extended attributes of an entry begin with in a tar stream.
	xattrRecord = "SCHILY.xattr."
	// overlayXattr are the attributes of overlayfs itself. They are of the disk below and
	// no content.
	overlayXattr = "trusted.overlay."
)

// unpackTar is POST /unpack: it puts the entries of a tar stream below a directory.
func (s *Server) unpackTar(w http.ResponseWriter, r *http.Request) {
	if err := s.unpackRequest(r); err != nil {
		w.Header().Set("Connection", "close") // the rest of a long body is not read
		answer(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) unpackRequest(r *http.Request) error {
	q := r.URL.Query()
	dest := q.Get(guestapi.QueryPath)
	if !filepath.IsAbs(dest) || strings.ContainsRune(dest, 0) || len(dest) > maxNameBytes {
		return failf(http.StatusBadRequest, "the directory to unpack into must be an absolute path: '%.200s'", dest)
	}
	u := &unpacking{links: map[string]bool{}, made: map[string]bool{}}
	if text := q.Get(guestapi.QueryOwner); text != "" {
		owner, err := s.accounts.owner(text)
		if errors.Is(err, errNoAccount) {
			return failf(http.StatusBadRequest, "the owner '%.200s' does not exist", text)
		}
		if err != nil {
			return err
		}
		u.owner = &owner
	}
	if err := u.open(filepath.Clean(dest)); err != nil {
		return err
	}
	defer u.close()
	body := &source{body: r.Body}
	err := u.all(tar.NewReader(body))
	if body.err != nil {
		return failf(http.StatusBadRequest, "read the body: %v", body.err)
	}
	return err
}

// owner is the owner of an unpacked file.
type owner struct{ uid, gid int }

// owner finds the owner that a text names: a user, or a user, ":" and a group, each by
// name or id. Without a group it is the user's, or the number of a user that the
// database does not have. errNoAccount if there is none.
func (a accounts) owner(text string) (owner, error) {
	name, group, grouped := strings.Cut(text, ":")
	as, err := a.find(name)
	if uid, ok := parseID(name); errors.Is(err, errNoAccount) && ok {
		as, err = account{uid: uid, gid: uid}, nil
	}
	if err != nil || !grouped {
		return owner{int(as.uid), int(as.gid)}, err
	}
	gid, ok := parseID(group)
	err = a.each("group", 3, func(f []string) bool {
		id, valid := parseID(f[2])
		if f[0] == group && valid {
			gid, ok = id, true
			return false
		}
		return true
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return owner{}, fmt.Errorf("read groups: %w", err)
	}
	if !ok {
		return owner{}, errNoAccount
	}
	return owner{int(as.uid), int(gid)}, nil
}

// place is a name in a directory that is held open, so that it stays the same directory
// whatever happens to the links that led to it.
type place struct {
	dir  *os.File
	base string
}

// path leads to the place; its last element is not followed yet.
func (p place) path() string {
	if p.base == "" {
		return fmt.Sprintf("/proc/self/fd/%d/.", p.dir.Fd())
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", p.dir.Fd(), p.base)
}

// unpacking puts the entries of a tar stream below a directory.
type unpacking struct {
	// owner is the owner of all entries; nil for each its own.
	owner *owner
	dest  *os.File
	// made are the directories that were not there before, by their names, which get what
	// their entries say. Others keep what they have.
	made map[string]bool
	// links are the symbolic links that the stream itself made, by their names. Links
	// that were there before lead where they lead in the guest; those of the stream must
	// not lead out of dest.
	links map[string]bool
	// last is the directory, open, of the last entry; without a name it may be another
	// one by now.
	last struct {
		name string
		dir  *os.File
	}
	// times are of directories, which change until the last entry is written.
	times []dirTime
}

type dirTime struct {
	name string
	at   time.Time
}

// open opens the directory below which the entries go, and makes it with its parents.
func (u *unpacking) open(dest string) error {
	var missing []string
	for at := dest; ; at = filepath.Dir(at) {
		_, err := os.Stat(at)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return notDirectory(dest, err)
		}
		missing = append(missing, at)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		if err := os.Mkdir(missing[i], 0o755); err != nil {
			return notDirectory(dest, err)
		}
		if err := u.own(missing[i], nil); err != nil {
			return err
		}
		if err := os.Chmod(missing[i], 0o755); err != nil { // whatever the umask is
			return err
		}
	}
	if len(missing) > 0 {
		u.made[""] = true
	}
	var err error
	u.dest, err = os.OpenFile(dest, os.O_RDONLY|unix.O_DIRECTORY, 0)
	return notDirectory(dest, err)
}

func notDirectory(dest string, err error) error {
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ELOOP) {
		return failf(http.StatusBadRequest, "'%s' is not a directory, or is below a file", dest)
	}
	return err
}

func (u *unpacking) close() {
	u.forget()
	u.dest.Close()
}

// forget closes the directory of the last entry.
func (u *unpacking) forget() {
	if u.last.dir != nil {
		u.last.dir.Close()
	}
	u.last.name, u.last.dir = "", nil
}

// all unpacks a whole stream.
func (u *unpacking) all(in *tar.Reader) error {
	for n := 0; ; n++ {
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			return u.setTimes()
		case err != nil:
			return failf(http.StatusBadRequest, "read the archive: %v", err)
		case n == maxArchive:
			return failf(http.StatusBadRequest, "the archive has more than %d entries", maxArchive)
		case h.Typeflag == tar.TypeXGlobalHeader:
			continue
		}
		name, err := entryName(h.Name)
		if err == nil {
			err = u.entry(name, h, in)
		}
		if err != nil {
			return entryError(h.Name, err)
		}
	}
}

// entryError says which entry could not be unpacked, and keeps what answer looks for.
func entryError(name string, err error) error {
	var known *httpError
	if errors.As(err, &known) {
		return failf(known.status, "entry '%.200s': %s", name, known.message)
	}
	var link *os.LinkError
	var at *fs.PathError
	switch { // the path is one of /proc
	case errors.As(err, &link):
		err = link.Err
	case errors.As(err, &at):
		err = at.Err
	}
	return fmt.Errorf("entry '%.200s': %w", name, err)
}

// entryName checks the name of an entry and returns it without dots; "" is the directory
// itself.
func entryName(name string) (string, error) {
	switch {
	case len(name) > maxNameBytes || strings.ContainsRune(name, 0):
		return "", failf(http.StatusBadRequest, "its name is too long, or no name")
	case path.IsAbs(name):
		return "", failf(http.StatusBadRequest, "its name is absolute")
	}
	depth := 0
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "..":
			return "", failf(http.StatusBadRequest, "its name has '..' in it")
		case "", ".":
		default:
			depth++
		}
	}
	if depth > maxDepth {
		return "", failf(http.StatusBadRequest, "its name has more than %d parts", maxDepth)
	}
	if name = path.Clean(name); name == "." {
		return "", nil
	}
	return name, nil
}

// entry unpacks one entry.
func (u *unpacking) entry(name string, h *tar.Header, content io.Reader) error {
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return failf(http.StatusBadRequest, "it would take the place of the directory itself")
		}
		return u.finish(place{u.dest, ""}, name, h)
	}
	parent, base := path.Split(name)
	dir, err := u.directory(path.Clean(parent))
	if err != nil {
		return err
	}
	at := place{dir, base}
	if h.Typeflag == tar.TypeDir {
		dir, err := u.step(place{dir, base}, name)
		if err != nil {
			return err
		}
		defer dir.Close()
		return u.finish(place{dir, ""}, name, h)
	}
	var target place
	if h.Typeflag == tar.TypeLink {
		if target, err = u.linked(h.Linkname); err != nil {
			return err
		}
		defer target.dir.Close()
		if same(target, at) {
			return nil
		}
	}
	if err := u.clear(at, name); err != nil {
		return err
	}
	if err := u.make(at, name, h, content, target); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return nil // it is the file that it is a link to
	}
	return u.finish(at, name, h)
}

// make makes what is no directory.
func (u *unpacking) make(at place, name string, h *tar.Header, content io.Reader, target place) error {
	device := func(kind uint32) error {
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > 1<<20 || h.Devminor > 1<<20 {
			return failf(http.StatusBadRequest, "it is a device of an impossible number")
		}
		return unix.Mknod(at.path(), kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return writeSparse(at.path(), content, h.Size)
	case tar.TypeLink:
		return os.Link(target.path(), at.path())
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxNameBytes {
			return failf(http.StatusBadRequest, "it is a link to nothing, or to a name that is too long")
		}
		u.links[name] = true
		return os.Symlink(h.Linkname, at.path())
	case tar.TypeChar:
		return device(unix.S_IFCHR)
	case tar.TypeBlock:
		return device(unix.S_IFBLK)
	case tar.TypeFifo:
		return unix.Mkfifo(at.path(), 0o600)
	default:
		return failf(http.StatusBadRequest, "it is of an unknown type %q", h.Typeflag)
	}
}

// clear removes what is at a place and is no directory.
func (u *unpacking) clear(at place, name string) error {
	info, err := os.Lstat(at.path())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return failf(http.StatusBadRequest, "a directory is in its place")
	}
	delete(u.links, name)
	u.last.name = "" // it may be behind a link that was here
	return os.Remove(at.path())
}

// linked is the place of a hard link's target, whose directory the caller closes.
func (u *unpacking) linked(to string) (place, error) {
	name, err := entryName(to)
	if err != nil || name == "" {
		return place{}, failf(http.StatusBadRequest, "it is a link to '%.200s', which is not in the archive", to)
	}
	parent, base := path.Split(name)
	dir, err := u.walk(path.Clean(parent), false)
	if err != nil {
		return place{}, failf(http.StatusBadRequest, "it is a link to '%.200s', which is not there", to)
	}
	at := place{dir, base}
	if info, err := os.Lstat(at.path()); err != nil || info.IsDir() {
		dir.Close()
		return place{}, failf(http.StatusBadRequest, "it is a link to '%.200s', which is not there or a directory", to)
	}
	return at, nil
}

// same says whether two places are one.
func same(a, b place) bool {
	x, err := os.Lstat(a.path())
	if err != nil {
		return false
	}
	y, err := os.Lstat(b.path())
	return err == nil && os.SameFile(x, y)
}

// directory opens the directory of an entry, and makes what is missing of it. It is
// closed when another one is asked for.
func (u *unpacking) directory(name string) (*os.File, error) {
	if name == "." {
		return u.dest, nil
	}
	if u.last.dir != nil && u.last.name == name {
		return u.last.dir, nil
	}
	dir, err := u.walk(name, true)
	if err != nil {
		return nil, err
	}
	u.forget()
	u.last.name, u.last.dir = name, dir
	return dir, nil
}

// walk opens a directory below dest, for the caller to close.
func (u *unpacking) walk(name string, create bool) (*os.File, error) {
	dir, err := reopen(u.dest)
	if err != nil || name == "." {
		return dir, err
	}
	walked := ""
	for part := range strings.SplitSeq(name, "/") {
		walked = path.Join(walked, part)
		var next *os.File
		if create {
			next, err = u.step(place{dir, part}, walked)
		} else {
			next, err = u.enter(place{dir, part}, walked)
		}
		dir.Close()
		if err != nil {
			return nil, err
		}
		dir = next
	}
	return dir, nil
}

func reopen(dir *os.File) (*os.File, error) {
	return os.OpenFile(place{dir, ""}.path(), os.O_RDONLY|unix.O_DIRECTORY, 0)
}

// errAstray is the error of a link of the stream that leads out of dest, or to no
// directory.
var errAstray = errors.New("it is behind a link that leads out of the archive")

// step is enter that makes a directory where none is. A link of the stream that leads
// astray gives way to one: E2B's clients send what is behind a link as if that were a
// directory, wherever the link leads.
func (u *unpacking) step(at place, name string) (*os.File, error) {
	dir, err := u.enter(at, name)
	switch {
	case errors.Is(err, errAstray):
		u.last.name = ""
		delete(u.links, name)
		if err := os.Remove(at.path()); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return dir, err
	}
	if err := os.Mkdir(at.path(), 0o755); err != nil {
		return nil, err
	}
	u.made[name] = true
	if err := errors.Join(u.own(at.path(), nil), os.Chmod(at.path(), 0o755)); err != nil {
		return nil, err
	}
	return u.enter(at, name)
}

// enter opens a directory that is there. Links to one are followed: those that the stream
// did not make as the guest follows them.
func (u *unpacking) enter(at place, name string) (*os.File, error) {
	info, err := os.Lstat(at.path())
	if err != nil {
		return nil, err
	}
	link := info.Mode().Type() == fs.ModeSymlink
	if link && u.links[name] {
		fd, err := unix.Openat2(int(u.dest.Fd()), name, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != nil {
			return nil, errAstray
		}
		return os.NewFile(uintptr(fd), name), nil
	}
	flags := unix.O_DIRECTORY
	if !link {
		flags |= unix.O_NOFOLLOW
	}
	dir, err := os.OpenFile(at.path(), os.O_RDONLY|flags, 0)
	if err != nil && (link || !info.IsDir()) {
		return nil, failf(http.StatusBadRequest, "'%s' is not a directory", name)
	}
	return dir, err
}

// own gives a path to its owner; h is nil for a directory that no entry says anything of.
func (u *unpacking) own(path string, h *tar.Header) error {
	switch {
	case u.owner != nil:
		return os.Lchown(path, u.owner.uid, u.owner.gid)
	case h == nil:
		return os.Lchown(path, 0, 0)
	case h.Uid < 0 || h.Gid < 0:
		return failf(http.StatusBadRequest, "its owner is impossible")
	}
	return os.Lchown(path, h.Uid, h.Gid)
}

// finish gives what was made its owner, mode, attributes and time, in this order: a new
// owner takes setuid bits and capabilities away.
func (u *unpacking) finish(at place, name string, h *tar.Header) error {
	if h.Typeflag == tar.TypeDir && !u.made[name] {
		return nil
	}
	file := at.path()
	if err := u.own(file, h); err != nil {
		return err
	}
	link := h.Typeflag == tar.TypeSymlink
	if !link {
		if err := unix.Chmod(file, uint32(h.Mode)&0o7777); err != nil {
			return err
		}
	}
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || strings.HasPrefix(attr, overlayXattr) {
			continue
		}
		// Some file systems have none of a kind, such as one in memory.
		if err := unix.Lsetxattr(file, attr, []byte(value), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set attribute %.100q: %w", attr, err)
		}
	}
	if h.Typeflag == tar.TypeDir {
		u.times = append(u.times, dirTime{name, h.ModTime})
		return nil
	}
	return setTime(file, h.ModTime)
}

// setTimes sets the times of directories. One that was replaced later has none to set.
func (u *unpacking) setTimes() error {
	for _, t := range u.times {
		dir, err := u.walk(cleanDir(t.name), false)
		if err != nil {
			continue
		}
		err = setTime(place{dir, ""}.path(), t.at)
		dir.Close()
		if err != nil {
			return entryError(t.name, err)
		}
	}
	return nil
}

func cleanDir(name string) string {
	if name == "" {
		return "."
	}
	return name
}

func setTime(file string, at time.Time) error {
	ts, err := unix.TimeToTimespec(at)
	if err != nil || at.IsZero() {
		ts = unix.Timespec{}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// writeSparse makes a new file of size bytes. Blocks of zeros become holes.
func writeSparse(file string, content io.Reader, size int64) (err error) {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := make([]byte, min(int64(copyBuffer), max(size, 1)))
	for at := int64(0); ; {
		n, err := io.ReadFull(content, buf)
		if err := writeNonZero(f, buf[:n], at); err != nil {
			return err
		}
		at += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			if at != size {
				return failf(http.StatusBadRequest, "it is shorter than it says")
			}
			return f.Truncate(size)
		case err != nil:
			return failf(http.StatusBadRequest, "read the archive: %v", err)
		}
	}
}

// writeNonZero writes the blocks of data that are not all zero, those in a row at once.
func writeNonZero(f *os.File, data []byte, at int64) error {
	const block = 4096
	for len(data) > 0 {
		zeros := 0
		for zeros < len(data) && allZero(data[zeros:min(zeros+block, len(data))]) {
			zeros = min(zeros+block, len(data))
		}
		end := zeros
		for end < len(data) && !allZero(data[end:min(end+block, len(data))]) {
			end = min(end+block, len(data))
		}
		if end > zeros {
			if _, err := f.WriteAt(data[zeros:end], at+int64(zeros)); err != nil {
				return err
			}
		}
		data, at = data[end:], at+int64(end)
	}
	return nil
}

var zeros [4096]byte

func allZero(block []byte) bool { return bytes.Equal(block, zeros[:len(block)]) }
