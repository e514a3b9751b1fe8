package snapfile

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writeBackBytes is how much is written to a file before its write-back to the
// disk is started: a later fsync then finds little to do.
const writeBackBytes = 8 << 20

// Source is contents of Size bytes that do not change while they are copied.
type Source struct {
	Size int64
	// Pieces are the numbers of the pieces that may be other than zero.
	Pieces []int64
	// ReadAt reads a part of a piece, or all of it. It is called from several
	// goroutines. none says that the part is all zero and p has no meaning.
	ReadAt func(p []byte, at int64) (none bool, err error)
}

// FileSource is the contents of f.
func FileSource(f *os.File) (Source, error) {
	info, err := f.Stat()
	if err != nil {
		return Source{}, err
	}
	numbers, err := piecesWithData(f, info.Size())
	return Source{Size: info.Size(), Pieces: numbers, ReadAt: func(p []byte, at int64) (bool, error) {
		_, err := f.ReadAt(p, at)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return false, err
	}}, err
}

// Write writes a source to out, which is empty, and leaves holes where the source
// is zero. It returns the digest of what it wrote, as Digest computes it, and has
// started the write-back to the disk. The CPUs share the pieces.
func Write(ctx context.Context, out *os.File, from Source) (_ File, err error) {
	back, err := startWriteBack(out)
	if err != nil {
		return File{}, err
	}
	defer func() { back.end(err) }()
	sum, err := write(ctx, out, from, sha256.New, back.wrote)
	return File{Size: from.Size, Pieces: sum}, err
}

// write writes a source to an empty file, with the digest if newHash is not nil.
func write(ctx context.Context, out *os.File, from Source, newHash func() hash.Hash, wrote func(n int)) (sum string, err error) {
	if err := out.Truncate(from.Size); err != nil {
		return "", err
	}
	sum, err = eachPiece(ctx, from.Pieces, func(at int64, buf []byte) (*sum256, error) {
		piece := buf[:min(PieceBytes, from.Size-at)]
		none, err := from.ReadAt(piece, at)
		if none || err != nil {
			return nil, err
		}
		var h hash.Hash
		if newHash != nil {
			h = newHash()
		}
		return digestPiece(piece, h, func(begin, end int, empty bool) error {
			if empty {
				return nil
			}
			n, err := out.WriteAt(piece[begin:end], at+int64(begin))
			wrote(n)
			return err
		})
	})
	if err != nil {
		return "", fmt.Errorf("write %s: %w", filepath.Base(out.Name()), err)
	}
	return sum, nil
}

// writeBack has the kernel write a file to the disk while more is written to it.
type writeBack struct {
	since atomic.Int64
	kick  chan struct{}
	// done is closed when the descriptor is.
	done chan struct{}
}

func startWriteBack(f *os.File) (*writeBack, error) {
	// On a slow disk a start of the write-back takes long. No caller waits for it,
	// so it needs a descriptor of its own.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	b := &writeBack{kick: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(b.done)
		defer unix.Close(fd)
		for range b.kick {
			_ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE) // an error shows at the fsync
		}
	}()
	return b, nil
}

func (b *writeBack) wrote(n int) {
	if b.since.Add(int64(n)) < writeBackBytes {
		return
	}
	b.since.Store(0)
	b.wake()
}

func (b *writeBack) wake() {
	select {
	case b.kick <- struct{}{}:
	default: // it has been told and not yet begun
	}
}

// end starts the last write-back. After an error it waits until the file is closed:
// the caller removes it then, and nothing must hold its room or its file system.
func (b *writeBack) end(err error) {
	if err == nil {
		b.wake()
	}
	close(b.kick)
	if err != nil {
		<-b.done
	}
}

// Copy makes the new file dst a copy of src, which must not change until Copy
// returns: a clone where the file system can, otherwise a copy without the holes.
// On error, a cancelled ctx included, dst does not exist.
func Copy(ctx context.Context, dst, src string) error {
	return copyFile(dst, src, func(out *os.File, from Source) error {
		_, err := write(ctx, out, from, nil, func(int) {})
		return err
	})
}

// CopyToKeep is Copy of a file that is to be published: it returns the digest and
// has started the write-back, as Write does. The digest is zero for a clone, which
// reads nothing.
func CopyToKeep(ctx context.Context, dst, src string) (file File, err error) {
	err = copyFile(dst, src, func(out *os.File, from Source) (err error) {
		file, err = Write(ctx, out, from)
		return err
	})
	return file, err
}

// copyFile makes dst a clone of src, or has write fill it.
func copyFile(dst, src string, write func(out *os.File, from Source) error) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			os.Remove(dst)
		}
	}()
	if Clone(out, in) == nil {
		return nil
	}
	from, err := FileSource(in)
	if err != nil {
		return err
	}
	return write(out, from)
}

// Clone makes out share the contents of in, where the file system can.
func Clone(out, in *os.File) error { return unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) }
