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

// pack writes the content of a directory as an archive. It notes what is neither
// file, directory nor symbolic link, and leaves it out.
func pack(root *os.Root, w io.Writer, c *Copy) error {
	archive := tar.NewWriter(w)
	err := walk(root, ".", func(name string, info fs.FileInfo) error {
		shown := filepath.Join(root.Name(), name)
		link := ""
		var content *os.File
		var err error
		switch info.Mode().Type() {
		case fs.ModeDir:
		case fs.ModeSymlink:
			if link, err = root.Readlink(name); err != nil {
				return err
			}
		case 0:
			if content, err = openSame(root, name, info); err != nil {
				return err
			}
			defer content.Close()
			if info, err = content.Stat(); err != nil {
				return err
			}
		default:
			c.note("%s is not copied: it is neither a file, a directory nor a symbolic link", shown)
			return nil
		}
		header, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		header.Name = name
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
		if err := archive.WriteHeader(header); err != nil || content == nil {
			return err
		}
		return packContent(archive, c.reader(content), header.Size, shown, c)
	})
	if err != nil {
		return err
	}
	return archive.Close()
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
