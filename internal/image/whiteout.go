package image

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// whiteout handles an entry that hides others; not says that it is an ordinary one.
func (t *tree) whiteout(in, base string, isWhiteout bool) (done bool, err error) {
	if strings.HasPrefix(base, aufs) && base != opaque || strings.Contains("/"+in, "/"+aufs) {
		return true, nil // of one storage driver of Docker, long ago
	}
	if !isWhiteout {
		if strings.Contains("/"+in, "/"+whiteout) {
			return true, errdefs.InvalidArgument.Errorf("it is below a whiteout")
		}
		return false, nil
	}
	if base == opaque {
		d, err := t.lookup(in)
		if err == unix.ENOENT {
			return true, nil
		}
		if err == nil {
			_, err = t.removeBelow(d.fd, d.ino, false)
			t.forget()
		}
		return true, err
	}
	hidden := strings.TrimPrefix(base, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return true, errdefs.InvalidArgument.Errorf("a whiteout of %q", hidden)
	}
	return true, t.hide(in, hidden)
}

// hide removes what archives before the present one have put at base of the directory in.
func (t *tree) hide(in, base string) error {
	d, err := t.lookup(in)
	if err != nil {
		if err == unix.ENOENT || err == unix.ENOTDIR {
			return nil
		}
		return err
	}
	_, err = t.remove(d, base, false)
	return err
}

// clear removes base of d, whatever it is.
func (t *tree) clear(d *dir, base string) error {
	_, err := t.remove(d, base, true)
	return err
}

// remove removes base of d with everything below it; unless all is set, without what the
// present archive has put there. left says that something of it stays.
func (t *tree) remove(d *dir, base string, all bool) (left bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(d.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return false, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR || kind == unix.S_IFLNK {
		t.forget()
	}
	return t.removeAt(d.fd, d.ino, base, kind == unix.S_IFDIR, all)
}

func (t *tree) removeAt(fd int, ino uint64, base string, isDir, all bool) (left bool, err error) {
	keep := !all && t.saw(&dir{ino: ino}, base)
	if !isDir {
		if keep {
			return true, nil
		}
		return false, unix.Unlinkat(fd, base, 0)
	}
	sub, err := unix.Openat(fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(sub, &st); err == nil {
		left, err = t.removeBelow(sub, st.Ino, all)
	}
	unix.Close(sub)
	if err != nil || left || keep {
		return true, err
	}
	return false, unix.Unlinkat(fd, base, unix.AT_REMOVEDIR)
}

// removeBelow does so with all that the directory fd holds.
func (t *tree) removeBelow(fd int, ino uint64, all bool) (left bool, err error) {
	// A descriptor of its own: fd may be one that only names the directory.
	own, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	f := os.NewFile(uintptr(own), "")
	entries, err := f.ReadDir(-1)
	f.Close()
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		stays, err := t.removeAt(fd, ino, e.Name(), e.IsDir(), all)
		if err != nil {
			return true, err
		}
		left = left || stays
	}
	return left, nil
}
