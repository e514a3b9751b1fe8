// Package atomicfile replaces files so that a reader, and a machine that lost its
// power, sees the old contents or the new ones, and nothing between.
package atomicfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// ErrReplaced is the error of a write whose file has the name already, and of
// which it is not known whether it keeps the name when the machine loses its power.
var ErrReplaced = errors.New("the file is replaced but may not be on the disk")

// Write replaces the file at path, or makes it, with permissions perm. When it
// returns nil, file and name are on the disk. On an error other than ErrReplaced
// the old file is in its place.
func Write(path string, data []byte, perm fs.FileMode) error {
	return WriteWith(path, data, perm, nil)
}

// WriteWith is Write that calls before with the path of the complete new file,
// right before that takes its name. An error of before leaves the old file in
// its place and is returned.
func WriteWith(path string, data []byte, perm fs.FileMode, before func(tmp string) error) error {
	dir := filepath.Dir(path)
	// Named, because renameio would look for a directory with trial files.
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(perm))
	if err != nil {
		return err
	}
	defer f.Cleanup() // does nothing after the replacement
	if _, err := f.Write(data); err != nil {
		return err
	}
	if before != nil {
		if err := before(f.Name()); err != nil {
			return err
		}
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	if err := SyncDir(dir); err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	}
	return nil
}

// WriteJSON replaces the file at path by v as indented JSON that only its owner
// may read.
func WriteJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return Write(path, append(data, '\n'), 0o600)
}

// SyncDir brings the names in a directory to the disk.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
