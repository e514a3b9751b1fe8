package template

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// PackImage makes the new file an ext4 that holds the directory root and little
// more: what a template's base.ext4 is.
func PackImage(ctx context.Context, file, root string) error {
	blocks, inodes, err := measure(root)
	if err != nil {
		return fmt.Errorf("measure root: %w", err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// Room for the inode tables and what an estimate forgets; resize2fs then
	// takes back what is free.
	inodes += inodes/16 + 64
	size := (blocks*4096 + inodes*256) / 100 * 115
	size = (size + 16<<20) &^ 4095
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := formatExt4(ctx, file, inodes, root); err != nil {
		return err
	}
	err = tool.Command{Name: "resize2fs", Args: []string{"-M", file}, Env: []string{"E2FSPROGS_FAKE_TIME=" + BuildTime}}.Run(ctx)
	if err != nil {
		return err
	}
	return f.Sync()
}

// measure counts the blocks of 4 KiB and the inodes that an ext4 needs for the tree: a file
// with several names once, and no holes.
func measure(root string) (blocks, inodes int64, err error) {
	linked := map[uint64]bool{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if !d.IsDir() && st.Nlink > 1 {
			if linked[st.Ino] {
				return nil
			}
			linked[st.Ino] = true
		}
		inodes++
		need := (fi.Size() + 4095) / 4096
		if d.Type().IsRegular() && st.Blocks*512 < fi.Size() {
			if need, err = dataBlocks(path, fi.Size()); err != nil {
				return err
			}
		}
		if d.IsDir() {
			need++
		}
		if n, err := unix.Llistxattr(path, nil); err == nil && n > 0 {
			need++ // attributes that do not fit into the inode
		}
		blocks += need
		return nil
	})
	return blocks, inodes, err
}

// dataBlocks counts the blocks of a file that are not holes.
func dataBlocks(path string, size int64) (blocks int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for end := int64(0); end < size; {
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break // nothing but a hole
		}
		if err == nil {
			end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		}
		if err != nil {
			return 0, fmt.Errorf("find holes: %w", err)
		}
		blocks += (end+4095)/4096 - start/4096
	}
	return blocks, nil
}
