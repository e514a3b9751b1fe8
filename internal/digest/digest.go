// Package digest computes the SHA-256 of files.
package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// File returns the size of the file at path and the SHA-256 of its contents in hex.
func File(path string) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	size, sum, err = Reader(f)
	if err != nil {
		return 0, "", fmt.Errorf("digest %s: %w", filepath.Base(path), err)
	}
	return size, sum, nil
}

// Reader reads r to its end and returns how much that was and its SHA-256 in hex.
func Reader(r io.Reader) (size int64, sum string, err error) {
	h := sha256.New()
	if size, err = io.Copy(h, r); err != nil {
		return 0, "", err
	}
	return size, hex.EncodeToString(h.Sum(nil)), nil
}
