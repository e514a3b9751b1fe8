package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// maxWindow bounds what a zstd stream makes its reader keep, in bytes.
const maxWindow = 128 << 20

// plain is what r holds, decompressed if its first bytes say that it is compressed.
// The caller closes it, which does not close r.
func plain(r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 256<<10)
	head, err := buffered.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	starts := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case starts("\x1f\x8b"):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, badStream(err)
		}
		return z, nil
	case starts("\x28\xb5\x2f\xfd"):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, badStream(err)
		}
		return z.IOReadCloser(), nil
	case starts("BZh"), starts("\xfd7zXZ\x00"):
		return nil, errdefs.Unsupported.Errorf("it is compressed by bzip2 or xz; gzip, zstd and none are possible")
	}
	return io.NopCloser(buffered), nil
}

// badStream classes an error of a decompressor that is not the source's.
func badStream(err error) error {
	return errdefs.InvalidArgument.Errorf("its compressed data is damaged: %w", err)
}

// budget bounds the plain bytes of all archives of an image.
type budget struct {
	limits Limits
	used   atomic.Int64
}

// archive reads a layer ahead of its reader: it decompresses, counts and digests on a
// goroutine of its own.
type archive struct {
	chunks chan []byte // closed after err and sum are set
	spare  chan []byte
	now    []byte
	whole  []byte // that now is the rest of

	err error
	sum string // hex
}

const (
	chunkBytes = 1 << 20
	// aheadChunks are how many chunks an archive is ahead of its reader, aheadLayers
	// how many layers begin before it is their turn.
	aheadChunks = 8
	aheadLayers = 2
)

// readAhead begins to read the blob r, which it closes. It ends with ctx, or when all of
// it is read.
func readAhead(ctx context.Context, wg *sync.WaitGroup, r io.ReadCloser, b *budget, onRead func(int64)) *archive {
	a := &archive{chunks: make(chan []byte, aheadChunks), spare: make(chan []byte, aheadChunks+2)}
	wg.Go(func() {
		defer close(a.chunks)
		defer r.Close()
		in, h := &counter{r: r, ctx: ctx, onRead: onRead}, sha256.New()
		if a.err = a.run(ctx, in, b, h); in.err != nil && errdefs.ClassOf(a.err) != errdefs.Exhausted {
			a.err = in.err // what a decompressor makes of it says less
		}
		a.sum = hex.EncodeToString(h.Sum(nil))
	})
	return a
}

func (a *archive) run(ctx context.Context, in *counter, b *budget, h hash.Hash) error {
	z, err := plain(in)
	if err != nil {
		return err
	}
	defer z.Close()
	for total := int64(0); ; {
		var chunk []byte
		select {
		case chunk = <-a.spare:
		default:
			chunk = make([]byte, chunkBytes)
		}
		n, err := fill(z, chunk[:chunkBytes])
		total += int64(n)
		if b.used.Add(int64(n)) > b.limits.TotalBytes {
			return errdefs.Exhausted.Errorf("the image's layers have more than %d bytes", b.limits.TotalBytes)
		}
		if total > b.limits.RatioFrom && total/b.limits.Ratio > in.n {
			return errdefs.Exhausted.Errorf("it is more than %d times larger than its blob", b.limits.Ratio)
		}
		h.Write(chunk[:n])
		if n > 0 {
			select {
			case a.chunks <- chunk[:n]:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return badStream(err)
		}
	}
}

// fill reads until b is full or r has an error, which it returns as it is.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// Read is for the one reader.
func (a *archive) Read(b []byte) (int, error) {
	if len(a.now) == 0 {
		if a.whole != nil {
			select {
			case a.spare <- a.whole:
			default:
			}
			a.whole = nil
		}
		chunk, ok := <-a.chunks
		if !ok {
			if a.err != nil {
				return 0, a.err
			}
			return 0, io.EOF
		}
		a.now, a.whole = chunk, chunk
	}
	n := copy(b, a.now)
	a.now = a.now[n:]
	return n, nil
}

// counter counts what is read, remembers why it ended early, and ends with ctx.
type counter struct {
	r      io.Reader
	ctx    context.Context
	n      int64
	err    error
	onRead func(int64)
}

func (c *counter) Read(b []byte) (int, error) {
	if c.ctx.Err() != nil {
		c.err = context.Cause(c.ctx)
		return 0, c.err
	}
	n, err := c.r.Read(b)
	c.n += int64(n)
	if c.onRead != nil {
		c.onRead(int64(n))
	}
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}
