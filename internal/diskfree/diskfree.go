// Package diskfree tells how much a file system can still take.
package diskfree

import (
	"io/fs"
	"syscall"
)

// Bytes returns what processes without privileges can still write on the file
// system of path.
func Bytes(path string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}
