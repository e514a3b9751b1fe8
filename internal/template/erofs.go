package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

const (
	// rootEROFS is the whole root file system of a build as one EROFS.
	rootEROFS = "root.erofs"

	// maxFlatEntries bounds the entries of an EROFS: mkfs.erofs takes 5 KiB of memory for each.
	maxFlatEntries = 300_000
	// maxFlatHoles bounds what the holes of files take: mkfs.erofs writes them out.
	maxFlatHoles = 1 << 30
)

// PackEROFS makes the new file an EROFS that holds the directory root, for drivers without
// block devices. Equal trees make equal files. Extended attributes are left out: gVisor opens
// no file that has one. A tree with too many entries or holes is errdefs.Unsupported. On
// error there is no file, unless there was one before, which is fs.ErrExist.
func PackEROFS(ctx context.Context, file, root string) error {
	newest, err := measureFlat(root)
	if err != nil {
		return fmt.Errorf("measure root: %w", err)
	}
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return fmt.Errorf("make EROFS: %w", err)
	}
	err = tool.Command{
		Name: "mkfs.erofs",
		Args: []string{
			"--quiet", "-x-1", "-E", "noinline_data", // gVisor maps no data that is beside an inode
			"--preserve-mtime", "-U", fixedUUID, file, root,
		},
		// The time of the file system, from which those of files may differ in nothing but the past.
		Env: []string{"SOURCE_DATE_EPOCH=" + strconv.FormatInt(newest, 10)},
	}.Run(ctx)
	if err == nil {
		err = errors.Join(os.Chmod(file, 0o600), flush(file))
	}
	if err != nil {
		if e := os.Remove(file); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		return errdefs.DiskFull(err)
	}
	return nil
}

// measureFlat returns the time of the newest entry of a tree, and refuses what would take too
// much of the host as an EROFS.
func measureFlat(root string) (newest int64, err error) {
	entries, holes := 0, int64(0)
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if entries++; entries > maxFlatEntries {
			return errdefs.Unsupported.Errorf("it has more than %d files and directories", maxFlatEntries)
		}
		newest = max(newest, fi.ModTime().Unix())
		if taken := fi.Sys().(*syscall.Stat_t).Blocks * 512; d.Type().IsRegular() && taken < fi.Size() {
			holes += fi.Size() - taken
		}
		if holes > maxFlatHoles {
			return errdefs.Unsupported.Errorf("its files have holes of more than %d MiB", int64(maxFlatHoles)>>20)
		}
		return nil
	})
	return newest, err
}

// NewDisk makes the new file path the empty disk of a guest whose driver has no block
// devices: nothing but a hole of sizeMiB, for the caller to own. On error there is no
// file. A size out of range is errdefs.InvalidArgument.
func (s *Store) NewDisk(_ context.Context, path string, sizeMiB int) error {
	if sizeMiB < MinOverlayMiB || sizeMiB > MaxOverlayMiB {
		return errdefs.InvalidArgument.Errorf("disk of %d MiB: want %d to %d", sizeMiB, MinOverlayMiB, MaxOverlayMiB)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace("make disk", err)
	}
	if err := errors.Join(f.Truncate(int64(sizeMiB)<<20), f.Close()); err != nil {
		return noSpace("make disk", errors.Join(err, os.Remove(path)))
	}
	return nil
}

// SetEROFS makes a file the whole root of the build as one EROFS, which its layers must hold
// together. One in Dir is taken away from there; any other one, which must be on the same
// file system, keeps its name too, and must not change any more. A layer that is added
// afterwards ends it.
func (b *BuildStage) SetEROFS(ctx context.Context, path string) error {
	if err := b.check(0); err != nil {
		return err
	}
	if err := b.dropEROFS(); err != nil {
		return noSpace("add EROFS", err)
	}
	l, err := b.take(ctx, path, filepath.Join(b.root(), rootEROFS))
	if err != nil {
		return noSpace("add EROFS", err)
	}
	b.erofs = l
	return nil
}

// EROFS says whether the build has its root as one EROFS.
func (b *BuildStage) EROFS() bool { return b.erofs.Path != "" }

// dropEROFS takes the EROFS away.
func (b *BuildStage) dropEROFS() error {
	if b.erofs.Path == "" {
		return nil
	}
	b.erofs = Layer{}
	return os.Remove(filepath.Join(b.root(), rootEROFS))
}

// EROFSOf returns the path of the EROFS of a ready build whose layers have this digest; empty
// if no build has one.
func (s *Store) EROFSOf(base string) string {
	all, _, err := s.load()
	if err != nil || base == "" {
		return ""
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if b.Base != base || b.Status != StatusReady || t.Source != "" {
				continue
			}
			dir := filepath.Join(s.templateDir(t.ID), b.ID)
			var m buildManifest
			if readManifest(dir, manifestFile, &m, &m.manifest) != nil {
				continue
			}
			if l := erofsOf(dir, m.manifest); l.Path != "" {
				return l.Path
			}
		}
	}
	return ""
}
