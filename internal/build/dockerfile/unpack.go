package dockerfile

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

var errXZ = errdefs.InvalidArgument.Errorf("ADD does not unpack xz: COPY it, and RUN tar")

// maxUnpacked bounds what ADD unpacks of one archive.
const maxUnpacked = 16 << 30

// decompress returns the content of what is gzip, bzip2 or zstd, and anything else as it
// is.
func decompress(in *bufio.Reader) (io.Reader, error) {
	magic, err := in.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(in)
	case bytes.HasPrefix(magic, []byte("BZh")):
		return bzip2.NewReader(in), nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(128<<20))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, errXZ
	}
	return in, nil
}

// unpack writes the members of an archive into the directory name of out. Owners stay.
func unpack(name string, f io.Reader, out *tar.Writer, sum io.Writer) error {
	in, err := decompress(bufio.NewReader(f))
	if err != nil {
		return err
	}
	if c, ok := in.(io.Closer); ok {
		defer c.Close()
	}
	members := tar.NewReader(io.LimitReader(in, maxUnpacked))
	dir := &tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, Format: tar.FormatPAX}
	if err := out.WriteHeader(dir); err != nil {
		return err
	}
	fmt.Fprintf(sum, "unpacked %q\n", dir.Name)
	for {
		h, err := members.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		if outside(strings.TrimPrefix(h.Name, "/")) {
			return fmt.Errorf("unpack: the member %q leads out of the archive", h.Name)
		}
		isDir := h.Typeflag == tar.TypeDir
		h.Name = path.Join(name, path.Clean("/"+h.Name))
		switch h.Typeflag {
		case tar.TypeDir:
			h.Name += "/"
		case tar.TypeLink:
			h.Linkname = path.Join(name, path.Clean("/"+h.Linkname))
		case tar.TypeReg, tar.TypeSymlink:
		default:
			continue // devices and the like
		}
		if isDir && h.Name == name+"/" {
			continue
		}
		h.Format = tar.FormatPAX
		fmt.Fprintf(sum, "%q %c %o %d %q %d:%d\n", h.Name, h.Typeflag, h.Mode, h.Size, h.Linkname, h.Uid, h.Gid)
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(io.MultiWriter(out, sum), members); err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
}
