package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// MaxConsoleBytes bounds the files that a VMM appends to: the guest's console
// and the VMM's own diagnostics. The watcher cuts a larger one to its last
// half, about once a second; a VM that no agent watches is cut when it is
// taken up again. (A limit that the kernel enforces would have to be
// RLIMIT_FSIZE, which bounds disks and snapshots as well; a pipe would tie the
// VMM to its reader.)
const MaxConsoleBytes = 1 << 20

const trimmedMarker = "[earlier output was cut]\n"

// Tail returns at most the last n bytes of a file.
func Tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return tail(f, n)
}

func tail(f *os.File, n int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(info.Size()-n, 0)
	return io.ReadAll(io.NewSectionReader(f, from, n))
}

// trim cuts a file that has grown beyond limit to its last half, from a line's
// beginning where there is one. Whoever appends to it (O_APPEND) goes on
// undisturbed; what it writes during the cut may be lost, or stand before what
// was kept. No file is no error.
func trim(path string, limit int64) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.Size() <= limit {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	defer f.Close()
	kept, err := tail(f, limit/2)
	if err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	if i := bytes.IndexByte(kept[:min(len(kept), 4096)], '\n'); i >= 0 {
		kept = kept[i+1:]
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	if _, err := f.Write(append([]byte(trimmedMarker), kept...)); err != nil {
		return fmt.Errorf("trim: %w", err)
	}
	return nil
}
