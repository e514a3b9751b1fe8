package template

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A difference of two overlays is a header, runs of blocks in order of their place, and a
// digest of all that. All numbers are little-endian.
//
//	header  magic, size of the older and of the newer file (uint64 each), CRC-32 of these
//	run     place and length in bytes (uint64 each); the top bit of the length says that
//	        the blocks are zero, otherwise they follow. The last block of a file may be
//	        shorter. A run of length 0 at place 0 ends the list.
//	digest  SHA-256
const (
	diffMagic   = "wrenn\x00d1"
	diffHeader  = len(diffMagic) + 8 + 8 + 4
	diffRun     = 8 + 8
	diffZeros   = uint64(1) << 63
	diffBlock   = 4096
	diffRunMost = 1 << 20 // of blocks that follow
	// maxDiffFile bounds the files that are compared.
	maxDiffFile = int64(MaxOverlayMiB) << 20
)

// Diff makes the new file dst the difference of two files that do not change, such as the
// disk of a build sandbox before and after a step: the blocks of 4 KiB of newer that
// older has not. older is empty for a file of zeros of the same size. Holes of both are
// passed over. On error, a cancelled ctx included, dst does not exist.
func Diff(ctx context.Context, dst, older, newer string) (err error) {
	d := differ{ctx: ctx}
	defer d.close()
	if err := d.open(older, newer); err != nil {
		return fmt.Errorf("compare overlays: %w", err)
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace("compare overlays", err)
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			os.Remove(dst)
		}
	}()
	sum := sha256.New()
	buffered := bufio.NewWriterSize(out, 256<<10)
	d.out = io.MultiWriter(buffered, sum)
	if err := d.write(); err != nil {
		return noSpace("compare overlays", err)
	}
	_, err = buffered.Write(sum.Sum(nil))
	return noSpace("compare overlays", errors.Join(err, buffered.Flush()))
}

// differ compares two files.
type differ struct {
	ctx          context.Context
	older, newer *os.File // older is nil for none
	oldSize      int64
	size         int64
	out          io.Writer
	// What was found and not yet written: a run of blocks at a place.
	at    int64
	run   []byte // blocks
	zeros int64  // or bytes that are zero
}

func (d *differ) open(older, newer string) (err error) {
	if d.newer, d.size, err = openDisk(newer); err != nil || older == "" {
		return err
	}
	d.older, d.oldSize, err = openDisk(older)
	return err
}

func (d *differ) close() {
	for _, f := range []*os.File{d.older, d.newer} {
		if f != nil {
			f.Close()
		}
	}
}

// openDisk opens a file of at most maxDiffFile.
func openDisk(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxDiffFile) {
		err = errdefs.InvalidArgument.Errorf("it is no disk of at most %d MiB", MaxOverlayMiB)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

func (d *differ) write() error {
	head := binary.LittleEndian.AppendUint64([]byte(diffMagic), uint64(d.oldSize))
	head = binary.LittleEndian.AppendUint64(head, uint64(d.size))
	head = binary.LittleEndian.AppendUint32(head, crc32.ChecksumIEEE(head))
	if _, err := d.out.Write(head); err != nil {
		return err
	}
	ours, theirs := newExtents(d.newer, d.size), newExtents(d.older, min(d.oldSize, d.size))
	was, is := make([]byte, diffRunMost), make([]byte, diffRunMost)
	for at := int64(0); ; {
		if d.ctx.Err() != nil {
			return context.Cause(d.ctx)
		}
		// The next part that one of them has data in.
		a, err := ours.next(at)
		if err != nil {
			return err
		}
		b, err := theirs.next(at)
		if err != nil {
			return err
		}
		begin := min(a.begin, b.begin)
		if begin >= d.size {
			break
		}
		begin -= begin % diffBlock
		n := min(diffRunMost, max(min(a.end, b.end), begin+diffBlock)-begin, d.size-begin)
		if n < d.size-begin {
			n += -n & (diffBlock - 1)
			n = min(n, diffRunMost)
		}
		if err := d.compare(was[:n], is[:n], begin); err != nil {
			return err
		}
		at = begin + n
	}
	if err := d.flush(); err != nil {
		return err
	}
	_, err := d.out.Write(make([]byte, diffRun))
	return err
}

// compare finds the differences of a part.
func (d *differ) compare(was, is []byte, at int64) error {
	if _, err := d.newer.ReadAt(is, at); err != nil {
		return err
	}
	clear(was)
	if d.older != nil {
		if _, err := d.older.ReadAt(was, at); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	for i := 0; i < len(is); i += diffBlock {
		old, block := was[i:min(i+diffBlock, len(is))], is[i:min(i+diffBlock, len(is))]
		if bytes.Equal(old, block) {
			continue
		}
		if err := d.found(block, at+int64(i)); err != nil {
			return err
		}
	}
	return nil
}

// found adds a block to the run, or begins another.
func (d *differ) found(block []byte, at int64) error {
	zero := isZeroBlock(block)
	have := max(int64(len(d.run)), d.zeros)
	if have > 0 && (at != d.at+have || zero != (d.zeros > 0) || len(d.run) >= diffRunMost) {
		if err := d.flush(); err != nil {
			return err
		}
		have = 0
	}
	if have == 0 {
		d.at = at
	}
	if zero {
		d.zeros += int64(len(block))
	} else {
		d.run = append(d.run, block...)
	}
	return nil
}

// flush writes the run.
func (d *differ) flush() error {
	length := uint64(len(d.run))
	if d.zeros > 0 {
		length = uint64(d.zeros) | diffZeros
	}
	if length == 0 {
		return nil
	}
	head := binary.LittleEndian.AppendUint64(nil, uint64(d.at))
	head = binary.LittleEndian.AppendUint64(head, length)
	_, err := d.out.Write(append(head, d.run...))
	d.run, d.zeros = d.run[:0], 0
	return err
}

var zeroBlock [diffBlock]byte

func isZeroBlock(b []byte) bool { return string(b) == string(zeroBlock[:len(b)]) }

// extent is a part of a file with data.
type extent struct{ begin, end int64 }

// extents finds the data of a file, in order.
type extents struct {
	f    *os.File // nil for a hole
	size int64
	last extent
}

func newExtents(f *os.File, size int64) *extents { return &extents{f: f, size: size} }

// next returns what is left at a place of the extent that is there, or the first one
// after it: with begin far off if there is none.
func (x *extents) next(at int64) (extent, error) {
	none := extent{maxDiffFile * 2, maxDiffFile * 2}
	if x.f == nil || at >= x.size {
		return none, nil
	}
	if at < x.last.end {
		return extent{max(at, x.last.begin), x.last.end}, nil
	}
	begin, err := unix.Seek(int(x.f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		x.last = none
		return none, nil
	}
	if err != nil {
		return none, err
	}
	end, err := unix.Seek(int(x.f.Fd()), begin, unix.SEEK_HOLE)
	if err != nil {
		return none, err
	}
	if begin >= x.size {
		x.last = none
		return none, nil
	}
	x.last = extent{begin, min(end, x.size)}
	return x.last, nil
}

// Patch makes dst, which holds the older file of a Diff, the newer one. Where Diff had no
// older file, dst is empty or not there. A diff that is not what Diff wrote, or is of
// another file by its size, is errdefs.Corrupt and changes nothing; nothing in it is
// believed before its digest was compared. After any other error dst is of no use.
func Patch(ctx context.Context, dst, diff string) (err error) {
	in, err := os.Open(diff)
	if err != nil {
		return fmt.Errorf("patch overlay: %w", err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return fmt.Errorf("patch overlay: %w", err)
	}
	sizes, err := readDiff(ctx, in, info.Size(), nil)
	if err != nil {
		return fmt.Errorf("patch overlay: %w", err)
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return noSpace("patch overlay", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	have, err := out.Stat()
	if err != nil {
		return fmt.Errorf("patch overlay: %w", err)
	}
	if have.Size() != sizes.older {
		return errdefs.Corrupt.Errorf("patch overlay: the difference is of a file of %d bytes, not of %d", sizes.older, have.Size())
	}
	if err := out.Truncate(sizes.newer); err != nil {
		return noSpace("patch overlay", err)
	}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("patch overlay: %w", err)
	}
	_, err = readDiff(ctx, in, info.Size(), out)
	return noSpace("patch overlay", err)
}

type diffSizes struct{ older, newer int64 }

// readDiff reads a difference of length bytes, and applies it to out unless that is nil.
// errdefs.Corrupt says that it is not what Diff wrote.
func readDiff(ctx context.Context, in io.Reader, length int64, out *os.File) (sizes diffSizes, err error) {
	defer func() {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errdefs.Corrupt.Errorf("it is cut off")
		}
	}()
	sum := sha256.New()
	from := bufio.NewReaderSize(in, 256<<10)
	body := io.TeeReader(io.LimitReader(from, max(0, length-sha256.Size)), sum)
	if sizes, err = readDiffHeader(body); err != nil {
		return sizes, err
	}
	if err := readRuns(ctx, body, sizes.newer, out); err != nil {
		return sizes, err
	}
	if n, _ := io.CopyN(io.Discard, body, 1); n > 0 {
		return sizes, errdefs.Corrupt.Errorf("it goes on after its end")
	}
	return sizes, checkDigest(from, sum)
}

func readDiffHeader(in io.Reader) (sizes diffSizes, err error) {
	var head [diffHeader]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return sizes, err
	}
	fields := head[len(diffMagic):]
	older, newer := binary.LittleEndian.Uint64(fields), binary.LittleEndian.Uint64(fields[8:])
	switch {
	case string(head[:len(diffMagic)]) != diffMagic:
		return sizes, errdefs.Corrupt.Errorf("it is no difference of overlays")
	case binary.LittleEndian.Uint32(fields[16:]) != crc32.ChecksumIEEE(head[:diffHeader-4]):
		return sizes, errdefs.Corrupt.Errorf("its header is not what was written")
	case older > uint64(maxDiffFile) || newer > uint64(maxDiffFile):
		return sizes, errdefs.Corrupt.Errorf("it is of files that are too large")
	}
	return diffSizes{int64(older), int64(newer)}, nil
}

// readRuns reads the runs of a difference whose newer file has size bytes.
func readRuns(ctx context.Context, in io.Reader, size int64, out *os.File) error {
	buf := make([]byte, diffRunMost)
	var head [diffRun]byte
	for end := uint64(0); ; { // of the run before
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		at, length := binary.LittleEndian.Uint64(head[:]), binary.LittleEndian.Uint64(head[8:])
		zeros := length&diffZeros != 0
		length &^= diffZeros
		switch {
		case at == 0 && length == 0 && !zeros:
			return nil
		case length == 0 || at < end || at%diffBlock != 0 || at > uint64(size) || length > uint64(size)-at || !zeros && length > diffRunMost:
			return errdefs.Corrupt.Errorf("it has blocks where none can be")
		}
		end = at + length
		if zeros {
			if err := zeroRange(out, int64(at), int64(length)); err != nil {
				return err
			}
			continue
		}
		block := buf[:length]
		if _, err := io.ReadFull(in, block); err != nil {
			return err
		}
		if out == nil {
			continue
		}
		if _, err := out.WriteAt(block, int64(at)); err != nil {
			return err
		}
	}
}

// zeroRange makes a part of a file zero, and a hole where the file system can.
func zeroRange(f *os.File, at, n int64) error {
	if f == nil {
		return nil
	}
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for ; n > 0 && err != nil; n, at = n-diffBlock, at+diffBlock {
		if _, err := f.WriteAt(zeroBlock[:min(n, diffBlock)], at); err != nil {
			return err
		}
	}
	return nil
}

// checkDigest compares the rest of what is read with a digest.
func checkDigest(in io.Reader, sum hash.Hash) error {
	var want [sha256.Size]byte
	if _, err := io.ReadFull(in, want[:]); err != nil {
		return err
	}
	if !bytes.Equal(want[:], sum.Sum(nil)) {
		return errdefs.Corrupt.Errorf("it is not what was written")
	}
	return nil
}
