package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// create makes the entry base of d, in the place of what is there.
func (t *tree) create(ctx context.Context, d *dir, base string, hdr *tar.Header, content io.Reader) error {
	if d.ino == t.root.ino && base == "lost+found" && hdr.Typeflag != tar.TypeDir {
		return errdefs.InvalidArgument.Errorf("it has to be a directory, which every ext4 has")
	}
	var err error
	for range 2 {
		switch hdr.Typeflag {
		case tar.TypeDir:
			return t.directory(d, base, hdr)
		case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont: // isFile
			err = t.file(ctx, d, base, hdr, content)
		case tar.TypeSymlink:
			err = t.symlink(d, base, hdr)
		case tar.TypeLink:
			err = t.link(d, base, hdr)
		case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
			err = t.node(d, base, hdr)
		default:
			return errdefs.InvalidArgument.Errorf("type %q is not known", hdr.Typeflag)
		}
		if err != unix.EEXIST {
			break
		}
		if err := t.clear(d, base); err != nil {
			return err
		}
	}
	return err
}

func (t *tree) directory(d *dir, base string, hdr *tar.Header) error {
	if err := d.mayHold(); err != nil {
		return err
	}
	err := unix.Mkdirat(d.fd, base, 0o700)
	existed := err == unix.EEXIST
	if existed {
		var st unix.Stat_t
		if err := unix.Fstatat(d.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if err := t.clear(d, base); err != nil {
				return err
			}
			existed, err = false, unix.Mkdirat(d.fd, base, 0o700)
		} else {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	var own *dir
	if existed {
		fd, err := unix.Openat(d.fd, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		own, err = t.know(fd, d.length+1+len(base))
		if err != nil {
			unix.Close(fd)
			return err
		}
	} else if own, err = t.newDir(d, base); err != nil {
		return err
	}
	defer unix.Close(own.fd)
	return t.describeDir(d, base, own, hdr, existed)
}

// describeDir gives the directory own, which is base in d, what hdr says. Of one that
// existed, attributes that hdr does not have go away.
func (t *tree) describeDir(d *dir, base string, own *dir, hdr *tar.Header, existed bool) error {
	own.mtime, own.acl = timeOf(hdr), nil
	if acl, ok := hdr.PAXRecords[paxXattr+defaultACL]; ok {
		own.acl = []byte(acl)
	}
	if existed {
		if err := dropXattrs(at(d.fd, base)); err != nil {
			return err
		}
	}
	if err := describe(d.fd, base, hdr); err != nil {
		return err
	}
	return t.xattrs(d, base, hdr)
}

// describe sets owner and mode, in this order: a change of the owner takes setuid away.
func describe(fd int, base string, hdr *tar.Header) error {
	if int64(hdr.Uid) < 0 || int64(hdr.Gid) < 0 || int64(hdr.Uid) >= 1<<32-1 || int64(hdr.Gid) >= 1<<32-1 {
		return errdefs.InvalidArgument.Errorf("owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	if err := unix.Fchownat(fd, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeSymlink {
		return nil
	}
	return unix.Fchmodat(fd, base, uint32(hdr.Mode&0o7777), 0)
}

// timeOf is the entry's mtime, within what ext4 can hold.
func timeOf(hdr *tar.Header) unix.Timespec {
	sec := hdr.ModTime.Unix()
	if sec < -1<<31 || sec >= 1<<33 {
		return unix.Timespec{Sec: max(-1<<31, min(sec, 1<<33))}
	}
	return unix.Timespec{Sec: sec, Nsec: int64(hdr.ModTime.Nanosecond())}
}

// finish describes what archives named: all but directories, whose times come last.
func (t *tree) finish(d *dir, base string, hdr *tar.Header) error {
	if err := describe(d.fd, base, hdr); err != nil {
		return err
	}
	if err := t.xattrs(d, base, hdr); err != nil {
		return err
	}
	when := timeOf(hdr)
	return unix.UtimesNanoAt(d.fd, base, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
}

func (t *tree) file(ctx context.Context, d *dir, base string, hdr *tar.Header, content io.Reader) error {
	if hdr.Size > t.limits.FileBytes {
		return errdefs.Exhausted.Errorf("a file of %d bytes; at most %d are possible", hdr.Size, t.limits.FileBytes)
	}
	if hdr.Size > t.limits.TotalBytes-t.bytes {
		return errdefs.Exhausted.Errorf("the image's files have more than %d bytes", t.limits.TotalBytes)
	}
	fd, err := unix.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	t.bytes += hdr.Size
	err = t.write(ctx, fd, hdr.Size, content)
	if err2 := unix.Close(fd); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	return t.finish(d, base, hdr)
}

var zeros [4096]byte

// write copies size bytes, and leaves holes where blocks are zero.
func (t *tree) write(ctx context.Context, fd int, size int64, content io.Reader) error {
	var end int64 // of what is written
	for off := int64(0); off < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.ReadFull(content, t.buf[:min(int64(len(t.buf)), size-off)])
		if err != nil {
			return notTar(err)
		}
		for from := 0; from < n; {
			to, zero := run(t.buf[from:n])
			if !zero {
				if err := pwrite(fd, t.buf[from:from+to], off+int64(from)); err != nil {
					return err
				}
				end = off + int64(from+to)
			}
			from += to
		}
		off += int64(n)
	}
	if end < size {
		return unix.Ftruncate(fd, size)
	}
	return nil
}

// run returns how many bytes at the start of b are blocks of the same kind, and whether
// that is zero.
func run(b []byte) (n int, zero bool) {
	for n < len(b) {
		block := b[n:min(n+len(zeros), len(b))]
		z := string(block) == string(zeros[:len(block)])
		if n > 0 && z != zero {
			return n, zero
		}
		zero = z
		n += len(block)
	}
	return n, zero
}

func pwrite(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

func (t *tree) symlink(d *dir, base string, hdr *tar.Header) error {
	to := hdr.Linkname
	if to == "" || len(to) > t.limits.LinkBytes || strings.ContainsRune(to, 0) {
		return errdefs.InvalidArgument.Errorf("a link to a name of %d bytes; 1 to %d are possible", len(to), t.limits.LinkBytes)
	}
	if !strings.HasPrefix(to, "/") {
		// In a sandbox it would lead to the root. That the image means something
		// outside is no better than an entry there.
		in := path.Dir(path.Clean("/" + hdr.Name))
		if _, err := inside(in + "/" + to); err != nil {
			return errdefs.InvalidArgument.Errorf("a link to %s leads out of the image", quote(to))
		}
	}
	if err := unix.Symlinkat(to, d.fd, base); err != nil {
		return err
	}
	return t.finish(d, base, hdr)
}

// link gives a file one more name.
func (t *tree) link(d *dir, base string, hdr *tar.Header) error {
	if len(hdr.Linkname) > t.limits.NameBytes {
		return errdefs.InvalidArgument.Errorf("a link to a name of %d bytes; at most %d are possible", len(hdr.Linkname), t.limits.NameBytes)
	}
	to, err := inside(hdr.Linkname)
	if err != nil {
		return errdefs.InvalidArgument.Errorf("a link to %s leads out of the image", quote(hdr.Linkname))
	}
	in, toBase := path.Split(to)
	from, err := t.lookup(strings.TrimSuffix(in, "/"))
	var st, have unix.Stat_t
	if err == nil {
		err = unix.Fstatat(from.fd, toBase, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == unix.ENOENT {
		return errdefs.InvalidArgument.Errorf("a link to %s, which is not there", quote(hdr.Linkname))
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return errdefs.InvalidArgument.Errorf("a link to %s, which is a directory", quote(hdr.Linkname))
	}
	if unix.Fstatat(d.fd, base, &have, unix.AT_SYMLINK_NOFOLLOW) == nil && have.Ino == st.Ino {
		return nil // it is there, and what it leads to must not be removed for it
	}
	if st.Nlink == 1 {
		if t.linked++; t.linked > maxLinked {
			return errdefs.Exhausted.Errorf("more than %d files of the image have several names", maxLinked)
		}
	}
	return unix.Linkat(from.fd, toBase, d.fd, base, 0)
}

func (t *tree) node(d *dir, base string, hdr *tar.Header) error {
	mode := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[hdr.Typeflag]
	var dev uint64
	if mode != unix.S_IFIFO {
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return errdefs.InvalidArgument.Errorf("device %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		dev = unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	}
	err := unix.Mknodat(d.fd, base, mode|0o600, int(dev))
	if err == unix.EPERM {
		return errdefs.Unsupported.Errorf("this host lets the agent make no devices")
	}
	if err != nil {
		return err
	}
	return t.finish(d, base, hdr)
}

// at is a path of base in the open directory fd.
func at(fd int, base string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", fd, base) }

const (
	paxXattr   = "SCHILY.xattr."
	defaultACL = "system.posix_acl_default"
)

// wanted says which attributes are the image's. The others mean something to the machine
// on which the archive was made, or to the overlay of a sandbox.
func wanted(name string) bool {
	switch {
	case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
		return false
	case name == "security.capability", name == "system.posix_acl_access", name == defaultACL:
		return true
	}
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.")
}

func (t *tree) xattrs(d *dir, base string, hdr *tar.Header) error {
	sum := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || !wanted(name) {
			continue
		}
		if strings.HasPrefix(name, "user.") && hdr.Typeflag != tar.TypeDir && !isFile(hdr) {
			continue // the kernel has none there
		}
		if sum += len(name) + len(value) + 32; sum > maxXattrs || len(name) > 255 {
			return errdefs.InvalidArgument.Errorf("its extended attributes have more than %d bytes", maxXattrs)
		}
		if name == defaultACL {
			continue // Finish sets it, on directories
		}
		if err := setXattr(at(d.fd, base), name, value); err != nil {
			return err
		}
	}
	return nil
}

func isFile(hdr *tar.Header) bool {
	return hdr.Typeflag == tar.TypeReg || hdr.Typeflag == tar.TypeGNUSparse || hdr.Typeflag == tar.TypeCont
}

func setXattr(path, name, value string) error {
	err := unix.Lsetxattr(path, name, []byte(value), 0)
	switch err {
	case unix.ENOTSUP, unix.EPERM:
		return errdefs.Unsupported.Errorf("the host's file system does not take the attribute %s", quote(name))
	case unix.EINVAL, unix.ERANGE, unix.E2BIG:
		return errdefs.InvalidArgument.Errorf("the attribute %s has no valid value", quote(name))
	}
	return err
}

// dropXattrs removes the attributes that wanted names.
func dropXattrs(path string) error {
	var buf [8 << 10]byte
	n, err := unix.Llistxattr(path, buf[:])
	if err != nil || n == 0 {
		if err == unix.ENOTSUP {
			err = nil
		}
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if wanted(name) {
			if err := unix.Lremovexattr(path, name); err != nil && err != unix.ENODATA {
				return err
			}
		}
	}
	return nil
}
