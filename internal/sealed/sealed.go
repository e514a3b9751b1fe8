// Package sealed puts checksums into JSON objects, so that no flipped bit makes one say
// something else, and keeps one object in one file, which is replaced as a whole.
package sealed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// A file begins with a checksum of all that follows it:
//
//	{"sum":"9ae0daaf","version":1}
const (
	begin = `{"sum":"`
	// end is what stands between the checksum and what it is of.
	end = `",`
	// Len is how many bytes the checksum takes at the beginning.
	Len = len(begin) + 8 + len(end)
)

// MaxBytes bounds what Read accepts.
const MaxBytes = 64 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Write replaces the file at path with v, which must encode to an object with at
// least one field. The file is for its owner alone. When Write returns nil, the
// new content survives a crash of the host; on an error other than
// atomicfile.ErrReplaced the old content stands.
func Write(path string, v any) error {
	data, err := json.Marshal(v)
	if err == nil {
		err = errdefs.DiskFull(atomicfile.Write(path, Seal(append(data, '\n')), 0o600))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return nil
}

// Read decodes the file at path into v. An error of class Corrupt says that the
// content is not what Write wrote; a missing file is fs.ErrNotExist.
func Read(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes))
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	object, err := unseal(data)
	if err == nil {
		err = json.Unmarshal(object, v)
	}
	if err != nil {
		return errdefs.Corrupt.Errorf("file %s is damaged: %w", filepath.Base(path), err)
	}
	return nil
}

// Seal puts the checksum into an object that has at least one field. The checksum is of
// all bytes after it, those that follow the object included.
func Seal(object []byte) []byte {
	rest := object[1:]
	return append(fmt.Appendf(nil, "%s%08x%s", begin, crc32.Checksum(rest, castagnoli), end), rest...)
}

// Has says whether data begins as what Seal returns.
func Has(data []byte) bool { return bytes.HasPrefix(data, []byte(begin)) && len(data) > Len }

// Unseal checks the checksum of data of which Has is true, and returns the object.
func Unseal(data []byte) ([]byte, error) {
	rest := data[Len:]
	sum, err := strconv.ParseUint(string(data[len(begin):len(begin)+8]), 16, 32)
	if err != nil || !bytes.HasSuffix(data[:Len], []byte(end)) || uint32(sum) != crc32.Checksum(rest, castagnoli) {
		return nil, errors.New("its checksum does not match")
	}
	return append([]byte("{"), rest...), nil
}

// unseal is Unseal of data that must have a checksum.
func unseal(data []byte) ([]byte, error) {
	if !Has(data) {
		return nil, errors.New("it has no checksum")
	}
	return Unseal(data)
}
