package setup

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Offsets in a bzImage's setup header (Linux' x86 boot protocol).
const (
	offSetupSects    = 0x1f1
	offMagic         = 0x202
	offVersion       = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	setupHeaderEnd   = 0x250

	// maxVmlinux bounds what a broken size field can make us write.
	maxVmlinux = 1 << 30
)

var elfMagic = []byte("\x7fELF")

// writeVmlinux writes the uncompressed kernel in src, a vmlinux or a bzImage,
// to the new file dst. A kernel that it cannot read is
// errdefs.InvalidArgument.
func writeVmlinux(dst, src string) error {
	b, err := os.ReadFile(src)
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	r, size, err := openVmlinux(b)
	if err != nil {
		return errdefs.InvalidArgument.Errorf("kernel %s: %w", src, err)
	}
	f, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write kernel: %w", err)
	}
	defer f.Close()
	head := make([]byte, len(elfMagic))
	if _, err := io.ReadFull(r, head); err != nil {
		return errdefs.InvalidArgument.Errorf("kernel %s: unpack payload: %w", src, err)
	}
	if !bytes.Equal(head, elfMagic) {
		return errdefs.InvalidArgument.Errorf("kernel %s: its payload is not an ELF file", src)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	w.Write(head) // an error stays in w until Flush
	if n, err := io.CopyN(w, r, size-int64(len(head))); err != nil {
		return fmt.Errorf("unpack kernel %s: after %d of %d bytes: %w", src, n, size, err)
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write kernel: %w", err)
	}
	return f.Close()
}

// openVmlinux returns a reader of the ELF file in the kernel image b and its
// size.
func openVmlinux(b []byte) (io.Reader, int64, error) {
	if bytes.HasPrefix(b, elfMagic) {
		return bytes.NewReader(b), int64(len(b)), nil
	}
	if len(b) < setupHeaderEnd || string(b[offMagic:offMagic+4]) != "HdrS" {
		return nil, 0, fmt.Errorf("neither a vmlinux nor a bzImage")
	}
	le := binary.LittleEndian
	if v := le.Uint16(b[offVersion:]); v < 0x208 {
		return nil, 0, fmt.Errorf("boot protocol %d.%02d is too old to say where the payload is", v>>8, v&0xff)
	}
	sects := int64(b[offSetupSects])
	if sects == 0 {
		sects = 4 // what 0 has meant since 1991
	}
	start := (sects+1)*512 + int64(le.Uint32(b[offPayload:]))
	end := start + int64(le.Uint32(b[offPayloadLength:]))
	if end > int64(len(b)) || end-start < 8 {
		return nil, 0, fmt.Errorf("payload at %d to %d lies outside of the file of %d bytes", start, end, len(b))
	}
	p := b[start:end]
	// The build appends the unpacked size, which is also gzip's own trailer.
	size := int64(le.Uint32(p[len(p)-4:]))
	if size > maxVmlinux || size < int64(len(elfMagic)) {
		return nil, 0, fmt.Errorf("payload claims %d bytes", size)
	}
	body := bytes.NewReader(p)
	switch {
	case bytes.HasPrefix(p, []byte{0x02, 0x21, 0x4c, 0x18}):
		return lz4.NewReader(body), size, nil
	case bytes.HasPrefix(p, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1))
		return r, size, err
	case bytes.HasPrefix(p, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(body)
		return r, size, err
	case bytes.HasPrefix(p, elfMagic):
		return body, int64(len(p)), nil
	}
	return nil, 0, fmt.Errorf("payload's compression (magic % x) is not one of lz4, zstd, gzip: unpack it to a vmlinux first", p[:4])
}
