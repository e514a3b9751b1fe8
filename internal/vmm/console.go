package vmm

import (
	"io"
	"os"
)

// MaxConsoleBytes bounds the files that hold what a VM prints: the guest's
// console and the VMM's own diagnostics. A larger one is cut to its last half.
const MaxConsoleBytes = 1 << 20

// Tail returns at most the last n bytes of a file.
func Tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(info.Size()-n, 0)
	return io.ReadAll(io.NewSectionReader(f, from, n))
}
