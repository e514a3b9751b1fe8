package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// maxLinked bounds the files with more than one name: mke2fs searches through
	// all that it has met for each.
	maxLinked = 100_000
	// maxDirCost bounds the sum of the squares of the directories' sizes: mke2fs looks
	// through a directory for each entry that it puts there. 60,000 files in one
	// directory are possible, and two million in directories of a thousand.
	maxDirCost = 4_000_000_000
	// maxXattrs bounds the extended attributes of one file, in bytes, which ext4 has
	// to put into one block.
	maxXattrs = 3 << 10
	// maxDepth bounds directories in directories: mke2fs has all of a path open.
	maxDepth = 500
	// maxOpen bounds the directories that are kept open.
	maxOpen = 128
)

// tree unpacks archives, each over those before it, into a directory that nothing else
// works in. No name leads out of the directory: the kernel resolves them with the
// directory as its root.
type tree struct {
	limits Limits
	path   string
	root   *dir

	// dirs are open directories by the names under which archives name them. A name
	// may lead through links.
	dirs map[string]*dir
	// made is every directory by its inode number.
	made map[uint64]*made
	// stale are directories that the present entry may still use.
	stale []int

	// seen are the entries of the present archive; whiteouts do not concern them.
	seen map[uint64]struct{}
	seed maphash.Seed

	entries, linked int
	dirCost         int64
	bytes           int64
	buf             []byte
}

// dir is an open directory.
type dir struct {
	fd  int
	ino uint64
	*made
}

// made is what is known of a directory of the tree.
type made struct {
	mtime unix.Timespec
	// length is that of its path, depth how many directories it is in, count how many
	// entries were made in it.
	length, depth, count int
	// acl is its default ACL, which would act on what is made in it.
	acl []byte
}

// newTree begins an empty tree in the empty directory at path. Close must be called.
func newTree(path string, limits Limits) (*tree, error) {
	t := &tree{
		limits: limits, path: path, dirs: map[string]*dir{}, made: map[uint64]*made{}, seed: maphash.MakeSeed(),
		buf: make([]byte, 1<<20),
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open tree: %w", err)
	}
	if t.root, err = t.know(fd, 0); err == nil {
		err = unix.Chmod(path, 0o755)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open tree: %w", err)
	}
	return t, nil
}

// Close closes the tree's directories and leaves what is in them.
func (t *tree) Close() {
	t.forget()
	t.closeStale()
	unix.Close(t.root.fd)
}

// forget drops the directories whose names may lead elsewhere now.
func (t *tree) forget() {
	for _, d := range t.dirs {
		t.stale = append(t.stale, d.fd)
	}
	clear(t.dirs)
}

func (t *tree) closeStale() {
	for _, fd := range t.stale {
		unix.Close(fd)
	}
	t.stale = t.stale[:0]
}

// unmade is the time of directories that no archive names.
var unmade = func() unix.Timespec {
	sec, _ := strconv.ParseInt(template.BuildTime, 10, 64)
	return unix.Timespec{Sec: sec}
}()

// know takes the open directory fd for the tree's; length is that of its path, if it is new.
func (t *tree) know(fd, length int) (*dir, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	m := t.made[st.Ino]
	if m == nil {
		m = &made{mtime: unmade, length: length}
		t.made[st.Ino] = m
	}
	return &dir{fd: fd, ino: st.Ino, made: m}, nil
}

// apply unpacks one archive over what is there. It does not read r to its end.
func (t *tree) apply(ctx context.Context, r io.Reader) error {
	t.seen = map[uint64]struct{}{}
	for tr := tar.NewReader(r); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return notTar(err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if t.entries++; t.entries > t.limits.Entries {
			return errdefs.Exhausted.Errorf("the image has more than %d entries", t.limits.Entries)
		}
		err = t.entry(ctx, hdr, tr)
		t.closeStale()
		if err != nil {
			return explain(hdr.Name, err)
		}
	}
}

// notTar classes an error of the tar reader: its own are about the archive, others
// are the source's.
func notTar(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || err == io.ErrUnexpectedEOF {
		return errdefs.InvalidArgument.Errorf("not a complete tar archive: %w", err)
	}
	return err
}

// explain makes of an errno that the image is to blame for a sentence with a class.
func explain(name string, err error) error {
	name = quote(name)
	if errdefs.ClassOf(err) != nil {
		return fmt.Errorf("entry %s: %w", name, err)
	}
	for errno, why := range map[unix.Errno]string{
		unix.ENAMETOOLONG: "its name is too long",
		unix.ELOOP:        "its path is a loop of links",
		unix.ENOTDIR:      "its path leads through something that is no directory",
		unix.EEXIST:       "its path leads through a link to nothing",
		unix.ENOENT:       "what it stands on is not there",
		unix.EMLINK:       "the file has too many names",
		unix.EXDEV:        "its path leads out of the image",
		unix.EFBIG:        "it is too large for the host's file system",
	} {
		if errors.Is(err, errno) {
			return errdefs.InvalidArgument.Errorf("entry %s: %s", name, why)
		}
	}
	return fmt.Errorf("unpack entry %s: %w", name, errdefs.DiskFull(err))
}

// quote makes a name of an image fit for a message.
func quote(name string) string {
	if len(name) > 200 {
		name = name[:200] + "…"
	}
	return strconv.Quote(name)
}

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	aufs     = ".wh..wh."
)

func (t *tree) entry(ctx context.Context, hdr *tar.Header, content io.Reader) error {
	if len(hdr.Name) > t.limits.NameBytes {
		return errdefs.InvalidArgument.Errorf("a name of %d bytes; at most %d are possible", len(hdr.Name), t.limits.NameBytes)
	}
	name, err := inside(hdr.Name)
	if err != nil {
		return err
	}
	if name == "." {
		if hdr.Typeflag != tar.TypeDir {
			return errdefs.InvalidArgument.Errorf("the root is no directory")
		}
		return t.describeDir(t.root, ".", t.root, hdr, true)
	}
	in, base := path.Split(name)
	in = strings.TrimSuffix(in, "/")
	if isWhiteout := strings.HasPrefix(base, whiteout); isWhiteout || strings.Contains(in, whiteout) {
		if ok, err := t.whiteout(in, base, isWhiteout); ok || err != nil {
			return err
		}
	}
	if hdr.Typeflag == tar.TypeChar && hdr.Devmajor == 0 && hdr.Devminor == 0 {
		return t.hide(in, base) // how overlay file systems write a whiteout
	}
	d, err := t.open(in)
	if err != nil {
		return err
	}
	if d.length+1+len(base) > t.limits.NameBytes {
		return errdefs.InvalidArgument.Errorf("its path is longer than %d bytes", t.limits.NameBytes)
	}
	d.count++
	if t.dirCost += int64(2*d.count - 1); t.dirCost > maxDirCost {
		return errdefs.Exhausted.Errorf("directories of the image have too many entries: this is entry %d of its directory", d.count)
	}
	t.see(d, base)
	return t.create(ctx, d, base, hdr, content)
}

// inside is the name as one relative to the root. One that leads out of it is refused,
// as Docker does; that an absolute one is meant from the root of the image is usual.
func inside(name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", errdefs.InvalidArgument.Errorf("its name leads out of the image")
	}
	if strings.ContainsRune(clean, 0) {
		return "", errdefs.InvalidArgument.Errorf("its name has a NUL in it")
	}
	return clean, nil
}

// see notes that the present archive has that entry.
func (t *tree) see(d *dir, base string) { t.seen[t.key(d.ino, base)] = struct{}{} }

func (t *tree) saw(d *dir, base string) bool {
	_, ok := t.seen[t.key(d.ino, base)]
	return ok
}

func (t *tree) key(ino uint64, base string) uint64 {
	var h maphash.Hash
	h.SetSeed(t.seed)
	maphash.WriteComparable(&h, ino)
	h.WriteString(base)
	return h.Sum64()
}

// how resolves names as a program whose root is the tree would.
const how = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// lookup opens the directory of that name, which is relative to the root.
func (t *tree) lookup(name string) (*dir, error) {
	if name == "" {
		return t.root, nil
	}
	if d := t.dirs[name]; d != nil {
		return d, nil
	}
	fd, err := unix.Openat2(t.root.fd, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: how})
	if err != nil {
		return nil, err
	}
	d, err := t.know(fd, t.limits.NameBytes)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	if len(t.dirs) >= maxOpen {
		t.forget()
	}
	t.dirs[name] = d
	return d, nil
}

// open is lookup that makes what is missing.
func (t *tree) open(name string) (*dir, error) {
	d, err := t.lookup(name)
	if err != unix.ENOENT {
		return d, err
	}
	in, base := path.Split(name)
	up, err := t.open(strings.TrimSuffix(in, "/"))
	if err != nil {
		return nil, err
	}
	if up.length+1+len(base) > t.limits.NameBytes {
		return nil, unix.ENAMETOOLONG
	}
	if err := up.mayHold(); err != nil {
		return nil, err
	}
	if t.entries++; t.entries > t.limits.Entries {
		return nil, errdefs.Exhausted.Errorf("the image has more than %d entries", t.limits.Entries)
	}
	if err := unix.Mkdirat(up.fd, base, 0o755); err != nil {
		return nil, err
	}
	if d, err = t.newDir(up, base); err == nil {
		unix.Close(d.fd)
		err = describe(up.fd, base, &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755})
	}
	if err != nil {
		return nil, err
	}
	t.see(up, base)
	return t.lookup(name)
}

// mayHold refuses one more directory below those that lead to d.
func (d *dir) mayHold() error {
	if d.depth >= maxDepth {
		return errdefs.InvalidArgument.Errorf("directories are nested more than %d deep", maxDepth)
	}
	return nil
}

// newDir opens a directory that was made just now, which the caller closes.
func (t *tree) newDir(up *dir, base string) (*dir, error) {
	fd, err := unix.Openat(up.fd, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	m := &made{mtime: unmade, length: up.length + 1 + len(base), depth: up.depth + 1}
	t.made[st.Ino] = m // a number may have been that of a directory that is gone
	return &dir{fd: fd, ino: st.Ino, made: m}, nil
}

// Finish sets what must come last: the default ACLs and the times of directories.
func (t *tree) Finish(ctx context.Context) error {
	err := filepath.WalkDir(t.path, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		m := t.made[st.Ino]
		if m == nil {
			m = &made{mtime: unmade}
		}
		if m.acl != nil {
			if err := setXattr(path, defaultACL, string(m.acl)); err != nil {
				return err
			}
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{m.mtime, m.mtime}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		return fmt.Errorf("finish tree: %w", errdefs.DiskFull(err))
	}
	return nil
}
