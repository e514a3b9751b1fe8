package image

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
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// source is the blob of one layer. diffID is "sha256:…", or empty where it is not known.
type source struct {
	name   string
	open   func() (io.ReadCloser, error)
	diffID string
}

// unpack makes the empty directory at path the tree of the layers, the lowest first.
func unpack(ctx context.Context, path string, layers []source, limits Limits, onRead func(int64)) error {
	t, err := newTree(path, limits)
	if err != nil {
		return err
	}
	defer t.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b := &budget{limits: limits}
	var ahead []*archive
	for i, l := range layers {
		for len(ahead) < min(i+1+aheadLayers, len(layers)) {
			r, err := layers[len(ahead)].open()
			if err != nil {
				return fmt.Errorf("open layer: %w", err)
			}
			ahead = append(ahead, readAhead(ctx, &wg, r, b, onRead))
		}
		err := t.apply(ctx, ahead[i])
		if err == nil {
			// What follows the end of the archive counts for the digest.
			_, err = io.Copy(io.Discard, ahead[i])
		}
		if err == nil && l.diffID != "" && l.diffID != sha256Prefix+ahead[i].sum {
			err = errdefs.InvalidArgument.Errorf("the image says that it is %s, and it is %s%s", l.diffID, sha256Prefix, ahead[i].sum)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		ahead[i] = nil
	}
	return t.Finish(ctx)
}

const sha256Prefix = "sha256:"

// key is the name of the root layer that verified diffIDs make.
func key(diffIDs []string) string {
	// The number changes with what unpacking makes of the same layers.
	sum := sha256.Sum256([]byte("root 1\n" + strings.Join(diffIDs, "\n")))
	return hex.EncodeToString(sum[:])
}

// Root makes the image's layers one ext4 file and returns its path, to be hard-linked and
// never written. It is made once for all images with the same layers. Call it within the
// Hold in which the image was pulled.
func (s *Store) Root(ctx context.Context, img Image, progress func(Progress)) (string, error) {
	return s.root(ctx, img, rootFile, progress)
}

// Flat is Root for an EROFS, for drivers without block devices. It makes the ext4, too, if
// there is none. errdefs.Unsupported says that the image is too large for one; see
// template.PackEROFS.
func (s *Store) Flat(ctx context.Context, img Image, progress func(Progress)) (string, error) {
	return s.root(ctx, img, flatFile, progress)
}

// root makes one of the two files of an image's layers.
func (s *Store) root(ctx context.Context, img Image, name string, progress func(Progress)) (string, error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	m := newMeter(progress)
	defer m.stop()
	var diffIDs []string
	var total int64
	for _, l := range img.Layers {
		if !validDigest(l.Digest) || !validDigest(l.DiffID) {
			return "", errdefs.InvalidArgument.Errorf("make root layer: %s is no digest", quote(l.Digest+" "+l.DiffID))
		}
		diffIDs = append(diffIDs, l.DiffID)
		total += l.Size
	}
	id := key(diffIDs)
	path := s.path(rootsDir, id, name)
	// What an image says of its layers opens nothing: a root layer that exists is
	// handed out when it is proven that these blobs make it.
	if there(path) && touch(filepath.Dir(path)) && s.proven(img.Layers) {
		return path, nil
	}
	m.begin(Unpacking, total, "")
	// The layers' own digests are in the name, because the diffIDs are not proven.
	flight := name
	for _, l := range img.Layers {
		flight += " " + l.Digest + " " + l.DiffID
	}
	if _, err = s.flights.do(ctx, flight, func(ctx context.Context) error { return s.makeRoot(ctx, id, name, img.Layers, m) }); err != nil {
		return "", fmt.Errorf("make root layer: %w", err)
	}
	m.end()
	return path, nil
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// makeRoot unpacks and packs the layers and publishes the result: the ext4 unless it is
// there, and the EROFS if it is asked for.
func (s *Store) makeRoot(ctx context.Context, id, name string, layers []Layer, m *meter) error {
	work, err := os.MkdirTemp(s.dir, ".root-")
	if err != nil {
		return errdefs.DiskFull(err)
	}
	defer func() {
		if err := os.RemoveAll(work); err != nil {
			s.log.Warn("unpacked image is not removed", "error", err)
		}
	}()
	var from []source
	for i, l := range layers {
		from = append(from, source{
			name: fmt.Sprintf("layer %d of %d, %s", i+1, len(layers), l.Digest),
			open: func() (io.ReadCloser, error) { return s.openBlob(l.Digest) }, diffID: l.DiffID,
		})
	}
	tree, ready := filepath.Join(work, "tree"), filepath.Join(work, "ready")
	for _, d := range []string{tree, ready} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return errdefs.DiskFull(err)
		}
	}
	if err := unpack(ctx, tree, from, s.limits, m.add); err != nil {
		return s.blame(layers, err)
	}
	for _, l := range layers {
		if err := s.prove(l); err != nil {
			return err
		}
	}
	m.begin(Packing, 0, "")
	dst := s.path(rootsDir, id)
	if !there(filepath.Join(dst, rootFile)) {
		if err := packInto(ctx, ready, rootFile, tree, FromTree); err != nil {
			return err
		}
		err := os.Rename(ready, dst)
		if err != nil && !errors.Is(err, fs.ErrExist) { // else made of the same layers in other blobs
			return errdefs.DiskFull(err)
		}
	}
	if name != flatFile || there(filepath.Join(dst, flatFile)) {
		return nil
	}
	if err := packInto(ctx, work, flatFile, tree, flatFromTree); err != nil {
		return err
	}
	return errdefs.DiskFull(errors.Join(os.Rename(filepath.Join(work, flatFile), filepath.Join(dst, flatFile)), atomicfile.SyncDir(dst)))
}

// packInto makes a file of the tree in a directory, complete and on the disk.
func packInto(ctx context.Context, dir, name, tree string, pack func(ctx context.Context, file, tree string) error) error {
	file := filepath.Join(dir, name)
	if err := pack(ctx, file, tree); err != nil {
		return err
	}
	return errdefs.DiskFull(errors.Join(os.Chmod(file, 0o400), atomicfile.SyncDir(dir)))
}

// blame finds out whether a stored blob is damaged, which then is removed, so that the
// next pull brings it again.
func (s *Store) blame(layers []Layer, err error) error {
	if c := errdefs.ClassOf(err); c != errdefs.InvalidArgument {
		return err
	}
	for _, l := range layers {
		blob := s.blob(l.Digest)
		if _, sum, sumErr := digest.File(blob); sumErr == nil && sha256Prefix+sum != l.Digest {
			_ = os.Remove(blob)
			err = errdefs.Corrupt.Errorf("the stored blob %s is damaged; pull the image again", l.Digest)
		}
	}
	return err
}

func (s *Store) blob(digest string) string {
	return s.path(blobsDir, strings.TrimPrefix(digest, sha256Prefix))
}

func (s *Store) openBlob(digest string) (io.ReadCloser, error) {
	f, err := os.Open(s.blob(digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.NotFound.Errorf("the blob %s is not stored any more; pull the image again", digest)
	}
	return f, err
}

// prove notes that the layer's blob holds the archive with its DiffID.
func (s *Store) prove(l Layer) error {
	path := s.path(diffsDir, strings.TrimPrefix(l.Digest, sha256Prefix))
	f, err := os.CreateTemp(s.dir, ".diff-")
	if err != nil {
		return errdefs.DiskFull(err)
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	_, err = f.WriteString(l.DiffID)
	return errdefs.DiskFull(errors.Join(err, f.Close(), os.Rename(f.Name(), path)))
}

// proven reports whether all layers' blobs were seen to hold what the image says.
func (s *Store) proven(layers []Layer) bool {
	for _, l := range layers {
		path := s.path(diffsDir, strings.TrimPrefix(l.Digest, sha256Prefix))
		got, err := os.ReadFile(path)
		if err != nil || string(got) != l.DiffID || !touch(path) {
			return false
		}
	}
	return true
}

// FromTar makes the new file an ext4 that holds what the archive r holds, compressed or
// not. It is what Root does with the layers of an image, without a store; the tree is
// made beside file and removed. On error there is no file. Cancelling ctx does not end a
// read of r that blocks.
func FromTar(ctx context.Context, file string, r io.Reader, limits Limits) error {
	tree, err := os.MkdirTemp(filepath.Dir(file), ".tree-")
	if err != nil {
		return fmt.Errorf("unpack archive: %w", errdefs.DiskFull(err))
	}
	defer os.RemoveAll(tree)
	if err := Unpack(ctx, tree, r, limits); err != nil {
		return err
	}
	return FromTree(ctx, file, tree)
}

// Unpack makes the empty directory dir the tree that the archive r holds, compressed or not,
// under the rules and limits for images. On error what is in dir is for the caller to
// remove. Cancelling ctx does not end a read of r that blocks.
func Unpack(ctx context.Context, dir string, r io.Reader, limits Limits) error {
	one := source{name: "archive", open: func() (io.ReadCloser, error) { return io.NopCloser(r), nil }}
	if err := unpack(ctx, dir, []source{one}, limits.orDefault(), nil); err != nil {
		return fmt.Errorf("unpack %w", err)
	}
	return nil
}

// FromTree makes the new file an ext4 that holds the tree below dir.
// On error there is no file.
func FromTree(ctx context.Context, file, dir string) error {
	return packed(file, template.PackImage(ctx, file, dir))
}

// flatFromTree is FromTree for an EROFS.
func flatFromTree(ctx context.Context, file, dir string) error {
	return packed(file, template.PackEROFS(ctx, file, dir))
}

// packed removes what an error left, and makes it one for a client.
func packed(file string, err error) error {
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		_ = os.Remove(file)
	}
	if errdefs.ClassOf(err) == errdefs.Exhausted {
		// What the tool says has paths of the host in it.
		return errdefs.Exhausted.Errorf("pack tree: the host's disk is full")
	}
	return fmt.Errorf("pack tree: %w", errdefs.DiskFull(err))
}
