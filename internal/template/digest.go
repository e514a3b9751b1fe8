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
	info, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	numbers, err := piecesWithData(f, info.Size())
	if err != nil {
		return File{}, fmt.Errorf("digest %s: %w", filepath.Base(path), err)
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
				digests[i], errs[w] = digestPiece(f, numbers[i]*pieceBytes, buf)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return File{}, fmt.Errorf("digest %s: %w", filepath.Base(path), err)
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
func digestPiece(f *os.File, at int64, buf []byte) (*[sha256.Size]byte, error) {
	n, err := f.ReadAt(buf, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var zero [pageBytes]byte
	var there [pieceBytes / pageBytes / 8]byte
	h := sha256.New()
	found := false
	for i := 0; i < n; {
		// Pages in a row go to the hash together.
		end := i
		for end < n && string(buf[end:min(end+pageBytes, n)]) != string(zero[:min(pageBytes, n-end)]) {
			page := end / pageBytes
			there[page/8] |= 1 << (page % 8)
			end = min(end+pageBytes, n)
		}
		if end == i {
			i += pageBytes
			continue
		}
		h.Write(buf[i:end])
		i, found = end, true
	}
	if !found {
		return nil, nil
	}
	h.Write(there[:])
	return (*[sha256.Size]byte)(h.Sum(nil)), nil
}
