package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

var errNotYet = errdefs.Unsupported.Errorf("images are not supported yet")

// Pull brings the image that ref names, for linux/amd64, into the store. ref is a name as
// the field writes it, with a tag or a digest or neither, with a registry or without one.
// Blobs that are there are not asked for again, except whether the caller may have them.
// An image, tag or platform that does not exist is errdefs.NotFound, one that the
// credentials do not open is errdefs.Denied.
func (s *Store) Pull(ctx context.Context, ref string, c Credentials, progress func(Progress)) (Image, error) {
	return Image{}, errNotYet
}

// Import brings the image in an archive, as `docker save` and OCI tools write them, also
// compressed by gzip or zstd, into the store. name becomes its Reference.
func (s *Store) Import(ctx context.Context, r io.Reader, name string, progress func(Progress)) (Image, error) {
	return Image{}, errNotYet
}

// ImportPath is Import of a file, or of a directory with an OCI layout.
func (s *Store) ImportPath(ctx context.Context, path string, progress func(Progress)) (Image, error) {
	return Image{}, errNotYet
}

// Root makes the image's layers one ext4 file and returns its path, to be hard-linked and
// never written. It is made once for all images with the same layers. Call it within the
// Hold in which the image was pulled.
func (s *Store) Root(ctx context.Context, img Image, progress func(Progress)) (string, error) {
	return "", errNotYet
}

// FromTar makes the new file an ext4 that holds what the archive r holds, compressed or
// not. It is what Root does with the layers of an image, without a store; the tree is
// made beside file and removed. On error there is no file.
func FromTar(ctx context.Context, file string, r io.Reader, limits Limits) error { return errNotYet }

// FromTree makes the new file an ext4 that holds the tree below dir.
// On error there is no file.
func FromTree(ctx context.Context, file, dir string) error {
	if err := template.PackImage(ctx, file, dir); err != nil {
		if !errors.Is(err, fs.ErrExist) {
			_ = os.Remove(file)
		}
		return fmt.Errorf("pack tree: %w", errdefs.DiskFull(err))
	}
	return nil
}
