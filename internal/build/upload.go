package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// maxUpload bounds one archive.
const maxUpload = 64 << 30

// uploadDir is the directory of a project's archives.
func (e *Engine) uploadDir(project string) string {
	sum := sha256.Sum256([]byte(project))
	return filepath.Join(e.cfg.Dir, uploadsDir, hex.EncodeToString(sum[:8]))
}

func (e *Engine) uploadPath(project, hash string) (string, error) {
	if !hashPattern.MatchString(hash) {
		return "", errHash
	}
	return filepath.Join(e.uploadDir(project), hash), nil
}

// Upload reports whether a project has uploaded the archive with that hash. A hash is
// 64 digits of lower-case hex: errdefs.InvalidArgument if not.
func (e *Engine) Upload(project, hash string) (present bool, err error) {
	path, err := e.uploadPath(project, hash)
	if err != nil {
		return false, err
	}
	now := time.Now()
	err = os.Chtimes(path, now, now) // its client goes on to use it
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Put stores an archive under a hash, which is the caller's word for it. It replaces
// the archive that is there in one step, and is errdefs.Exhausted where it is too big.
// On error nothing is left of it.
func (e *Engine) Put(ctx context.Context, project, hash string, r io.Reader) error {
	path, err := e.uploadPath(project, hash)
	if err != nil {
		return err
	}
	if err := e.room(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("store files: %w", errdefs.DiskFull(err))
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".put-")
	if err != nil {
		return fmt.Errorf("store files: %w", errdefs.DiskFull(err))
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	defer f.Close()
	n, err := io.Copy(f, io.LimitReader(withContext(ctx, r), maxUpload+1))
	switch {
	case context.Cause(ctx) != nil:
		return fmt.Errorf("store files: %w", context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("store files: %w", errdefs.DiskFull(err))
	case n > maxUpload:
		return errdefs.Exhausted.Errorf("the files of a step have more than %d GiB", maxUpload>>30)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("store files: %w", errdefs.DiskFull(err))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("store files: %w", errdefs.DiskFull(err))
	}
	return nil
}

// withContext returns a reader that ends with ctx.
func withContext(ctx context.Context, r io.Reader) io.Reader { return &contextReader{ctx, r} }

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// open opens an archive that was uploaded.
func (e *Engine) open(project, hash string) (*os.File, error) {
	path, err := e.uploadPath(project, hash)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.InvalidArgument.Errorf("its files were not uploaded")
	}
	if err != nil {
		return nil, fmt.Errorf("read files: %w", err)
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now)
	return f, nil
}

// uploads lists what was uploaded.
func (e *Engine) uploads() (items []Item, err error) {
	dir := filepath.Join(e.cfg.Dir, uploadsDir)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") {
			return err
		}
		if st, err := d.Info(); err == nil {
			items = append(items, Item{Kind: KindUpload, Name: d.Name(), Bytes: taken(path), UsedAt: st.ModTime(), path: path})
		}
		return nil
	})
	return items, err
}
