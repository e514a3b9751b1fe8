package template

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// PackImage makes the new file an ext4 that holds the directory root and little
// more: what a template's base.ext4 is.
func PackImage(ctx context.Context, file, root string) error {
	var blocks, inodes int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		inodes++
		blocks += (fi.Size() + 4095) / 4096
		if d.IsDir() {
			blocks++
		}
		return nil
	})
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
