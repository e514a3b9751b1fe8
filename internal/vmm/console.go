package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"sort"
	"time"
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

// TimesSuffix makes a console's name the name of the file that says when the console was
// written: Stamps, the oldest first.
const TimesSuffix = ".times"

// Stamp says when a console had grown to a size.
type Stamp struct {
	Size int64
	At   time.Time
}

// StampBytes is the size of a Stamp in the file.
const StampBytes = 16

// Append appends the stamp as the file has it.
func (s Stamp) Append(data []byte) []byte {
	data = binary.BigEndian.AppendUint64(data, uint64(s.Size))
	return binary.BigEndian.AppendUint64(data, uint64(s.At.UnixMilli()))
}

// ParseStamps reads what a file with stamps holds. Stamps of before a cut of the console
// are left out: they are of larger sizes than the next.
func ParseStamps(data []byte) (stamps []Stamp) {
	for ; len(data) >= StampBytes; data = data[StampBytes:] {
		s := Stamp{
			int64(binary.BigEndian.Uint64(data)), time.UnixMilli(int64(binary.BigEndian.Uint64(data[8:]))).UTC(),
		}
		if n := len(stamps); n > 0 && s.Size < stamps[n-1].Size {
			stamps = stamps[:0]
		}
		stamps = append(stamps, s)
	}
	return stamps
}

// Line is one line of a console, without its end.
type Line struct {
	// At is when the line's first byte was read, or a little later.
	At   time.Time
	Text []byte
}

// maxTimesBytes bounds what is read of a console's stamps.
const maxTimesBytes = 4 << 20

// Lines returns the lines of a console, oldest first; none if there is no console. A
// last line that has no end yet is left out for a second. What was printed while no
// agent read it has the time at which the next did.
func Lines(path string) ([]Line, error) {
	var stamps []Stamp
	var data []byte
	// A cut between the two reads would give lines the times of others.
	for range 3 {
		before, err := Tail(path+TimesSuffix, maxTimesBytes)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if data, err = Tail(path, 2*MaxConsoleBytes); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			return nil, err
		}
		after, _ := Tail(path+TimesSuffix, maxTimesBytes) // it was there, or there is none
		stamps = ParseStamps(after)
		if bytes.HasPrefix(after, before) {
			break
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return split(data, stamps, info.ModTime().UTC()), nil
}

// split splits a console whose last write was at a time.
func split(data []byte, stamps []Stamp, last time.Time) (lines []Line) {
	for from := 0; from < len(data); {
		text, _, ended := bytes.Cut(data[from:], []byte("\n"))
		at := last
		if i := sort.Search(len(stamps), func(i int) bool { return stamps[i].Size > int64(from) }); i < len(stamps) {
			at = stamps[i].At
		}
		if !ended && time.Since(last) < time.Second {
			break
		}
		lines = append(lines, Line{at, bytes.TrimRight(text, "\r")})
		from += len(text) + 1
	}
	return lines
}
