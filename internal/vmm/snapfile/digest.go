package snapfile

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// PageBytes is the unit in which zeros are left out of a digest and of a file.
	PageBytes = 4096
	// PieceBytes is how much of a file one worker reads, digests and writes at a
	// time. It is part of the format of Digest.
	PieceBytes = 1 << 20
	// maxWorkers bounds the CPUs that work on one file. Another worker is worth its
	// buffer if it has piecesEach to work on.
	maxWorkers = 8
	piecesEach = 4
)

// File is what a manifest says about one file, with one of the digests.
type File struct {
	Size int64 `json:"size"`
	// SHA256 is the digest of the whole contents, or in a snapshot that an earlier
	// version made the digest of OldDigest.
	SHA256 string `json:"sha256,omitempty"`
	// Pieces is the digest of Digest.
	Pieces string `json:"sha256_pieces,omitempty"`
}

// Digest computes the digest of a file that is mostly holes: the SHA-256 of the
// list of its pieces that are not all zero. The list has the number of each piece
// and the SHA-256 of the pages in it that are not all zero followed by a bitmap of
// these pages. A hole and written zeros have the same digest. The CPUs share the
// pieces. An error is one of reading.
func Digest(ctx context.Context, path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	return digestFile(ctx, f, nil)
}

// Dig is Digest that also makes holes of the pages that are zero, which are most
// of a fresh guest's memory: the host then neither flushes nor caches them. On a
// file system without holes the file stays as it is.
func Dig(ctx context.Context, path string) (File, error) {
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

// digestFile computes the digest of f. It calls zero, if not nil, for each run of
// zero pages that is not a hole, from several goroutines.
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
	sum, err := eachPiece(ctx, numbers, func(at int64, buf []byte) (*sum256, error) {
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		return digestPiece(buf[:n], sha256.New(), func(begin, end int, empty bool) error {
			if !empty || zero == nil {
				return nil
			}
			return zero(at+int64(begin), int64(end-begin))
		})
	})
	if err != nil {
		return File{}, fmt.Errorf("digest %s: %w", name, err)
	}
	return File{Size: info.Size(), Pieces: sum}, nil
}

type sum256 = [sha256.Size]byte

var buffers = sync.Pool{New: func() any { return new([PieceBytes]byte) }}

// eachPiece calls do with the offset of each numbered piece, from several
// goroutines, and returns the digest of the digests that do returns. A nil digest
// says that the piece is all zero. do may use buf, of PieceBytes, as it likes.
func eachPiece(ctx context.Context, numbers []int64, do func(at int64, buf []byte) (*sum256, error)) (string, error) {
	digests := make([]*sum256, len(numbers))
	workers := min(runtime.GOMAXPROCS(0), maxWorkers, (len(numbers)+piecesEach-1)/piecesEach)
	errs := make([]error, workers)
	var next atomic.Int64
	var failed atomic.Bool
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			buf := buffers.Get().(*[PieceBytes]byte)
			defer buffers.Put(buf)
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= len(numbers) {
					return
				}
				if ctx.Err() != nil {
					errs[w] = context.Cause(ctx)
				} else {
					digests[i], errs[w] = do(numbers[i]*PieceBytes, buf[:])
				}
				if errs[w] != nil {
					failed.Store(true)
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	all := sha256.New()
	for i, d := range digests {
		if d != nil {
			all.Write(binary.BigEndian.AppendUint64(nil, uint64(numbers[i])))
			all.Write(d[:])
		}
	}
	return hex.EncodeToString(all.Sum(nil)), nil
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
		n := begin / PieceBytes
		if len(numbers) > 0 {
			n = max(n, numbers[len(numbers)-1]+1)
		}
		for ; n*PieceBytes < end; n++ {
			numbers = append(numbers, n)
		}
		at = end
	}
	return numbers, nil
}

// digestPiece computes the digest of one piece with h, unless that is nil; nil says
// that the piece is all zero. It calls run for each run of pages that are all zero,
// or all not.
func digestPiece(piece []byte, h hash.Hash, run func(begin, end int, empty bool) error) (*sum256, error) {
	var there [PieceBytes / PageBytes / 8]byte
	found := false
	n := len(piece)
	for i := 0; i < n; {
		end, empty := i, isZero(piece[i:min(i+PageBytes, n)])
		for end < n && isZero(piece[end:min(end+PageBytes, n)]) == empty {
			if !empty {
				there[end/PageBytes/8] |= 1 << (end / PageBytes % 8)
			}
			end = min(end+PageBytes, n)
		}
		if !empty && h != nil {
			h.Write(piece[i:end])
			found = true
		}
		if err := run(i, end, empty); err != nil {
			return nil, err
		}
		i = end
	}
	if !found {
		return nil, nil
	}
	h.Write(there[:])
	return (*sum256)(h.Sum(nil)), nil
}

var zeroPage [PageBytes]byte

func isZero(page []byte) bool { return string(page) == string(zeroPage[:len(page)]) }

// OldDigest computes the digest in the manifests of snapshots that an earlier
// version made, which stay readable: the SHA-256 of the number and the contents of
// each page that is not all zero.
func OldDigest(ctx context.Context, path string) (File, error) {
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
	h := sha256.New()
	buf := make([]byte, PieceBytes)
	for _, number := range numbers {
		if ctx.Err() != nil {
			return File{}, context.Cause(ctx)
		}
		n, err := f.ReadAt(buf, number*PieceBytes)
		if err != nil && !errors.Is(err, io.EOF) {
			return File{}, fmt.Errorf("digest %s: %w", filepath.Base(path), err)
		}
		for i := 0; i < n; i += PageBytes {
			page := buf[i:min(i+PageBytes, n)]
			if isZero(page) {
				continue
			}
			h.Write(binary.BigEndian.AppendUint64(nil, uint64(number*PieceBytes+int64(i))/PageBytes))
			h.Write(page)
		}
	}
	return File{Size: info.Size(), SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}
