package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// Sizes of overlay disks, in MiB. They are sparse: an overlay takes up what
// its guest has written.
const (
	DefaultOverlayMiB = 4096
	MinOverlayMiB     = 64
	MaxOverlayMiB     = 1 << 20
)

// NewOverlay makes the new file path an empty ext4 of sizeMiB, for the
// caller to own. It copies the few blocks that are not holes of a seed kept
// in the store, or shares them where the file system can, so neither time nor
// space grow with the size; only the first of a size is formatted. On error,
// a cancelled ctx included, there is no file. A size out of range is
// errdefs.InvalidArgument, a full disk errdefs.Exhausted.
func (s *Store) NewOverlay(ctx context.Context, path string, sizeMiB int) error {
	if sizeMiB < MinOverlayMiB || sizeMiB > MaxOverlayMiB {
		return errdefs.InvalidArgument.Errorf("overlay of %d MiB: want %d to %d", sizeMiB, MinOverlayMiB, MaxOverlayMiB)
	}
	if _, err := s.EnsureSeed(ctx, sizeMiB); err != nil {
		return fmt.Errorf("make overlay: %w", errdefs.DiskFull(err))
	}
	if err := snapfile.Copy(ctx, path, s.seedPath(sizeMiB)); err != nil {
		return fmt.Errorf("make overlay: %w", errdefs.DiskFull(err))
	}
	return nil
}

func (s *Store) seedPath(sizeMiB int) string {
	return filepath.Join(s.seeds(), "overlay-"+strconv.Itoa(sizeMiB)+".ext4")
}

// EnsureSeed formats the seed of that size unless it is there.
func (s *Store) EnsureSeed(ctx context.Context, sizeMiB int) (made bool, err error) {
	dst := s.seedPath(sizeMiB)
	there := func() bool {
		fi, err := os.Stat(dst)
		return err == nil && fi.Size() == int64(sizeMiB)<<20
	}
	if there() {
		return false, nil
	}
	lock, err := waitLock(ctx, s.seeds(), nil)
	if err != nil {
		return false, err
	}
	defer lock.unlock()
	if there() {
		return false, nil
	}
	f, err := os.CreateTemp(s.seeds(), ".overlay-")
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	defer f.Close()
	if err := f.Truncate(int64(sizeMiB) << 20); err != nil {
		return false, err
	}
	if err := formatExt4(ctx, f.Name(), 0, ""); err != nil {
		return false, err
	}
	if err := f.Sync(); err != nil {
		return false, err
	}
	if err := os.Rename(f.Name(), dst); err != nil {
		return false, err
	}
	return true, flush(s.seeds())
}

// emptyRootBytes is the size of NewRoot's file system, which is never written.
const emptyRootBytes = 16 << 20

// NewRoot makes the new file path an empty root file system, which is the lowest layer of
// a template that is built from nothing.
func NewRoot(ctx context.Context, path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace("make root", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(path)
		}
	}()
	if err := f.Truncate(emptyRootBytes); err != nil {
		return noSpace("make root", err)
	}
	return formatExt4(ctx, path, 64, "")
}

// formatExt4 makes an ext4 in the file, filled from the directory root unless
// that is empty. No journal: a base is never written, and an overlay ends
// with its sandbox. The file is all holes, which lets mke2fs leave the inode
// tables unwritten and tell the guest's kernel not to zero them either.
func formatExt4(ctx context.Context, file string, inodes int64, root string) error {
	args := []string{
		"-q", "-F", "-t", "ext4",
		"-b", "4096", "-I", "256", "-m", "0",
		// Named one by one, so that the host's mke2fs.conf decides nothing.
		"-O", "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-E", "nodiscard,lazy_itable_init=1,assume_storage_prezeroed=1,hash_seed=" + fixedUUID,
		"-U", fixedUUID,
	}
	if inodes > 0 {
		args = append(args, "-N", strconv.FormatInt(inodes, 10))
	}
	if root != "" {
		args = append(args, "-d", root)
	}
	return tool.Command{
		Name: "mke2fs",
		Args: append(args, file),
		Env:  []string{"MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME=" + BuildTime},
	}.Run(ctx)
}

// What would differ from one making to the next is fixed: images are told
// apart by their digests.
const (
	fixedUUID = "77726e6e-0000-4000-8000-000000000001"
	// BuildTime is what images are dated from, in seconds since 1970.
	BuildTime = "1700000000"
)
