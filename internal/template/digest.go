package template

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	pageBytes = 4096
	// pieceBytes is how much of a file one worker digests at a time; part of the
	// format.
	pieceBytes = 1 << 20
	// maxWorkers bounds the CPUs that digest one file.
	maxWorkers = 8
)

// digestPieces digests a file that is mostly holes. The digest is that of the
// list of its pieces of 1 MiB that are not all zero: the number of the piece,
// and the SHA-256 of its pages that are not all zero followed by a bitmap of
// them. A hole and written zeros are the same to it, as they are to a reader of
// the file. The CPUs share the pieces. An error is one of reading.
func digestPieces(ctx context.Context, path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	return digestFile(ctx, f, nil)
}

// digAndDigest is digestPieces that makes holes of pages that are zero, which
// are most of a fresh guest's memory: a VMM that writes them all out must not make
// the host flush, keep and cache them. A file system that has no holes keeps them.
func digAndDigest(ctx context.Context, path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	return digestFile(ctx, f, func(at, n int64) error {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return err
	})
}

// digestFile digests the file and calls zero, if not nil, for each run of pages
// that are zero and not a hole, from several goroutines.
func digestFile(ctx context.Context, f *os.File, zero func(at, n int64) error) (File, error) {
	name := filepath.Base(f.Name())
	info, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	numbers, err := piecesWithData(f, info.Size())
	if err != nil {
		return File{}, fmt.Errorf("digest %s: %w", name, err)
	}
	// Each worker takes every n-th piece, so that no two write to one element.
	workers := max(1, min(runtime.GOMAXPROCS(0), maxWorkers, len(numbers)))
	digests := make([]*[sha256.Size]byte, len(numbers))
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			buf := make([]byte, pieceBytes)
			for i := w; i < len(numbers) && errs[w] == nil; i += workers {
				if ctx.Err() != nil {
					errs[w] = context.Cause(ctx)
					return
				}
				digests[i], errs[w] = digestPiece(f, numbers[i]*pieceBytes, buf, zero)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return File{}, fmt.Errorf("digest %s: %w", name, err)
	}
	all := sha256.New()
	for i, d := range digests {
		if d != nil {
			all.Write(binary.BigEndian.AppendUint64(nil, uint64(numbers[i])))
			all.Write(d[:])
		}
	}
	return File{Size: info.Size(), Pieces: hex.EncodeToString(all.Sum(nil))}, nil
}

// piecesWithData lists the pieces that are not one hole.
func piecesWithData(f *os.File, size int64) (numbers []int64, err error) {
	for at := int64(0); at < size; {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		n := begin / pieceBytes
		if len(numbers) > 0 {
			n = max(n, numbers[len(numbers)-1]+1)
		}
		for ; n*pieceBytes < end; n++ {
			numbers = append(numbers, n)
		}
		at = end
	}
	return numbers, nil
}

// digestPiece reads one piece; nil says that it is all zero.
func digestPiece(f *os.File, at int64, buf []byte, zero func(at, n int64) error) (*[sha256.Size]byte, error) {
	n, err := f.ReadAt(buf, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var there [pieceBytes / pageBytes / 8]byte
	h := sha256.New()
	found := false
	for i := 0; i < n; {
		// Pages of one kind in a row are taken together.
		end, empty := i, isZero(buf[i:min(i+pageBytes, n)])
		for end < n && isZero(buf[end:min(end+pageBytes, n)]) == empty {
			if !empty {
				there[end/pageBytes/8] |= 1 << (end / pageBytes % 8)
			}
			end = min(end+pageBytes, n)
		}
		if !empty {
			h.Write(buf[i:end])
			found = true
		} else if zero != nil {
			if err := zero(at+int64(i), int64(end-i)); err != nil {
				return nil, err
			}
		}
		i = end
	}
	if !found {
		return nil, nil
	}
	h.Write(there[:])
	return (*[sha256.Size]byte)(h.Sum(nil)), nil
}

var zeroPage [pageBytes]byte

func isZero(page []byte) bool { return string(page) == string(zeroPage[:len(page)]) }
