package client

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// walk visits everything below a directory, each directory before its content. It
// follows no link.
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

// openSame opens a file or directory below root. If it is not the one that was seen
// before, the error says so.
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

// packer writes an archive of files here.
type packer struct {
	archive *tar.Writer
	copy    *Copy
	// names has the first name of each file that has several.
	names map[inode]string
	// holes are the names of the sparse files.
	holes []string
}

func newPacker(w io.Writer, c *Copy) *packer {
	return &packer{archive: tar.NewWriter(w), copy: c, names: map[inode]string{}}
}

// one writes an open file, and the end of the archive.
func (p *packer) one(content *os.File, name, shown string) error {
	if err := p.file(content, name, shown); err != nil {
		return err
	}
	return p.archive.Close()
}

// all writes the content of a directory, and the end of the archive.
func (p *packer) all(root *os.Root) error {
	if err := p.tree(root); err != nil {
		return err
	}
	return p.archive.Close()
}

// tree writes the content of a directory. It notes what is neither file, directory nor
// symbolic link, and leaves it out.
func (p *packer) tree(root *os.Root) error {
	if p.copy.Preserve {
		info, err := root.Lstat(".")
		if err == nil {
			err = p.entry(info, ".", "")
		}
		if err != nil {
			return err
		}
	}
	return walk(root, ".", func(name string, info fs.FileInfo) error {
		shown := filepath.Join(root.Name(), name)
		switch info.Mode().Type() {
		case fs.ModeDir:
			return p.entry(info, name, "")
		case fs.ModeSymlink:
			link, err := root.Readlink(name)
			if err != nil {
				return err
			}
			return p.entry(info, name, link)
		case 0:
			content, err := openSame(root, name, info)
			if err != nil {
				return err
			}
			defer content.Close()
			return p.file(content, name, shown)
		}
		p.copy.note("%s is not copied: it is neither a file, a directory nor a symbolic link", shown)
		return nil
	})
}

// file writes an open file under a name of the archive. A file that the archive holds
// already under another name becomes a hard link to that.
func (p *packer) file(content *os.File, name, shown string) error {
	info, err := content.Stat()
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if st.Nlink > 1 {
		if first, ok := p.names[inodeOf(info)]; ok {
			return p.header(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: first, Mode: int64(info.Mode().Perm())})
		}
		p.names[inodeOf(info)] = name
	}
	if isSparse(info) {
		p.holes = append(p.holes, name)
	}
	if err := p.entry(info, name, ""); err != nil {
		return err
	}
	return packContent(p.archive, p.copy.reader(content), info.Size(), shown, p.copy)
}

// isSparse says whether a file has holes. Files of the kernel that tell a wrong size
// are small.
func isSparse(info fs.FileInfo) bool {
	st := info.Sys().(*syscall.Stat_t)
	return info.Mode().IsRegular() && info.Size() >= holeBytes && st.Blocks*512 < info.Size()
}

// entry writes the header of a file, a directory or a symbolic link to link.
func (p *packer) entry(info fs.FileInfo, name, link string) error {
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name = name
	if p.copy.Preserve {
		header.Format = tar.FormatPAX // the only one with parts of a second
		header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	} else {
		header.Mode = int64(info.Mode().Perm())
	}
	return p.header(header)
}

func (p *packer) header(h *tar.Header) error {
	h.Uid, h.Gid, h.Uname, h.Gname = p.copy.owner.uid, p.copy.owner.gid, "", ""
	return p.archive.WriteHeader(h)
}

// packContent writes as much of a file as its header says.
func packContent(archive io.Writer, content io.Reader, size int64, name string, c *Copy) error {
	n, err := io.CopyN(archive, content, size)
	if err == io.EOF {
		return fmt.Errorf("%s became shorter while it was copied: it had %d bytes, and %d could be read", name, size, n)
	}
	if err != nil {
		return err
	}
	if n, err := content.Read(make([]byte, 1)); n > 0 || err != nil && err != io.EOF {
		c.note("%s became longer while it was copied, and only its first %d bytes are", name, size)
	}
	return nil
}
