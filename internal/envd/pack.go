package envd

import (
	"archive/tar"
	"bufio"
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

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// packTar is GET /pack: it answers with a tar stream. A directory's entries have names
// below it, a file's name is its own; a link that the path itself is, is followed.
// What is mounted below the path is an empty directory in the stream. If something
// cannot be packed, the connection is cut, so that a part is not taken for the whole.
func (s *Server) packTar(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.Query().Get(guestapi.QueryPath)
	if !filepath.IsAbs(asked) || strings.ContainsRune(asked, 0) {
		answer(w, failf(http.StatusBadRequest, "the path to pack must be absolute: '%.200s'", asked))
		return
	}
	real, err := filepath.EvalSymlinks(asked)
	var info fs.FileInfo
	if err == nil {
		info, err = os.Lstat(real)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		answer(w, failf(http.StatusNotFound, "path '%s' does not exist", asked))
		return
	case err != nil:
		answer(w, err)
		return
	case !info.IsDir() && !info.Mode().IsRegular():
		answer(w, failf(http.StatusBadRequest, "path '%s' is neither a directory nor a file", asked))
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	buffer := bufio.NewWriterSize(w, copyBuffer) // small pieces are dear in an emulated guest
	p := &packing{out: tar.NewWriter(buffer), seen: map[inode]string{}, fs: stat(info).Dev}
	if info.IsDir() {
		err = p.tree(real)
	} else {
		err = p.add(real, filepath.Base(filepath.Clean(asked)), info)
	}
	if err == nil {
		err = errors.Join(p.out.Close(), buffer.Flush())
	}
	if err != nil {
		s.log.Warn("pack", "err", err)
		panic(http.ErrAbortHandler)
	}
}

type inode struct{ dev, ino uint64 }

func stat(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }

// packing writes what is below a path into a tar stream.
type packing struct {
	out *tar.Writer
	// seen are the files with several names, by their first.
	seen    map[inode]string
	fs      uint64
	entries int
}

// tree packs a directory of the file system that the first one is of.
func (p *packing) tree(root string) error {
	return filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		if err := p.add(file, name, info); err != nil {
			return err
		}
		if d.IsDir() && stat(info).Dev != p.fs {
			return fs.SkipDir
		}
		return nil
	})
}

// add packs one file or directory. A socket is nothing without its server and is left out.
func (p *packing) add(file, name string, info fs.FileInfo) error {
	if info.Mode().Type() == fs.ModeSocket {
		return nil
	}
	if p.entries++; p.entries > maxArchive {
		return fmt.Errorf("more than %d entries", maxArchive)
	}
	h, err := p.header(file, name, info)
	if err != nil {
		return fmt.Errorf("pack %s: %w", file, err)
	}
	if h.Typeflag != tar.TypeReg {
		return p.out.WriteHeader(h)
	}
	f, opened, err := openRegular(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h.Size = opened.Size()
	if err := p.out.WriteHeader(h); err != nil {
		return err
	}
	// A file that grows is packed as it was, one that shrinks ends the stream.
	_, err = io.CopyN(p.out, f, h.Size)
	if err != nil {
		return fmt.Errorf("pack %s: %w", file, err)
	}
	return nil
}

// header is that of a file. Names of owners are left out: they are the guest's, and ids
// are what counts.
func (p *packing) header(file, name string, info fs.FileInfo) (*tar.Header, error) {
	st := stat(info)
	h := &tar.Header{
		Name: path.Clean(name), Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: info.ModTime(), Format: tar.FormatPAX,
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case fs.ModeSymlink:
		target, err := os.Readlink(file)
		if err != nil {
			return nil, err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		h.Typeflag = tar.TypeBlock
		if info.Mode()&fs.ModeCharDevice != 0 {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case 0:
		h.Typeflag = tar.TypeReg
		if id := (inode{st.Dev, st.Ino}); st.Nlink > 1 {
			if first, ok := p.seen[id]; ok {
				h.Typeflag, h.Linkname = tar.TypeLink, first
				return h, nil
			}
			p.seen[id] = h.Name
		}
	default:
		return nil, fmt.Errorf("it is of an unknown type %s", info.Mode().Type())
	}
	return h, packXattrs(file, h)
}

// packXattrs adds the extended attributes of a file that are its own.
func packXattrs(file string, h *tar.Header) error {
	for _, name := range attributes(file) {
		if strings.HasPrefix(name, overlayXattr) || strings.HasPrefix(name, "system.") || strings.Contains(name, "=") {
			continue
		}
		value := make([]byte, 64<<10) // the kernel's bound
		n, err := unix.Lgetxattr(file, name, value)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read attribute %q: %w", name, err)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = string(value[:n])
	}
	return nil
}
