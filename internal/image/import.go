package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// maxArchived bounds the entries of an image's archive, maxArchivedName their names.
	maxArchived     = 20_000
	maxArchivedName = 512
)

// files are the files of an image's archive by their names in it.
type files interface {
	// open returns errdefs.NotFound for a name that is not there.
	open(name string) (*os.File, error)
}

// Import brings the image in an archive, as `docker save` and OCI tools write them, also
// compressed by gzip or zstd, into the store. name becomes its Reference; without one it
// is the archive's own. An archive with several images is refused.
func (s *Store) Import(ctx context.Context, r io.Reader, name string, progress func(Progress)) (Image, error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return Image{}, err
	}
	defer release()
	m := newMeter(progress)
	defer m.stop()
	m.begin(Importing, sizeOf(r), "")
	dir, err := os.MkdirTemp(s.dir, ".import-")
	if err != nil {
		return Image{}, fmt.Errorf("import image: %w", errdefs.DiskFull(err))
	}
	defer os.RemoveAll(dir)
	archived, err := s.ingest(ctx, dir, r, m)
	if err != nil {
		return Image{}, fmt.Errorf("import image: %w", err)
	}
	return s.importFiles(ctx, archived, name)
}

// ImportPath is Import of a file, or of a directory with an OCI layout.
func (s *Store) ImportPath(ctx context.Context, path string, progress func(Progress)) (Image, error) {
	f, err := openFile(os.Open, path)
	if err == nil {
		defer f.Close()
		return s.Import(ctx, f, "", progress)
	}
	root, rootErr := os.OpenRoot(path)
	if rootErr != nil {
		return Image{}, fmt.Errorf("import image: %w", err)
	}
	defer root.Close()
	release, err := s.Hold(ctx)
	if err != nil {
		return Image{}, err
	}
	defer release()
	m := newMeter(progress)
	defer m.stop()
	m.begin(Importing, 0, "")
	return s.importFiles(ctx, layout{root}, "")
}

// sizeOf is the size of a file, else 0.
func sizeOf(r io.Reader) int64 {
	if f, ok := r.(*os.File); ok {
		if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
			return fi.Size()
		}
	}
	return 0
}

// openFile opens a regular file and does not wait for another end of what is none.
func openFile(open func(string) (*os.File, error), name string) (*os.File, error) {
	f, err := open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.NotFound.Errorf("%s is not there", quote(name))
	}
	if err != nil {
		return nil, errdefs.InvalidArgument.Errorf("%s cannot be opened", quote(name))
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		return nil, errdefs.InvalidArgument.Errorf("%s is not a file", quote(name))
	}
	return f, nil
}

// layout are the files of a directory.
type layout struct{ root *os.Root }

func (l layout) open(name string) (*os.File, error) {
	return openFile(func(name string) (*os.File, error) {
		return l.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}, name)
}

// archived are the files of an archive, which are numbered files of a directory.
type archived struct {
	dir   string
	names map[string]string // to a number, or to "=" and another name
}

func (a archived) open(name string) (*os.File, error) {
	for range 8 { // links to links
		to, ok := a.names[path.Clean(name)]
		if !ok {
			break
		}
		if next, isLink := strings.CutPrefix(to, "="); isLink {
			name = next
			continue
		}
		return os.Open(filepath.Join(a.dir, to))
	}
	return nil, errdefs.NotFound.Errorf("%s is not there", quote(name))
}

// ingest writes the files of an archive into dir, which is all that it makes of their names.
func (s *Store) ingest(ctx context.Context, dir string, r io.Reader, m *meter) (files, error) {
	in := &counter{r: r, ctx: ctx, onRead: m.add}
	out, err := s.ingestAll(ctx, dir, in)
	if err != nil && in.err != nil && errdefs.ClassOf(err) != errdefs.Exhausted {
		err = in.err
	}
	return out, err
}

func (s *Store) ingestAll(ctx context.Context, dir string, in io.Reader) (files, error) {
	z, err := plain(in)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	out := archived{dir, map[string]string{}}
	var sum int64
	buf := make([]byte, 1<<20)
	for tr, n := tar.NewReader(z), 0; ; n++ {
		hdr, err := tr.Next()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, errdefs.InvalidArgument.Errorf("it is not a complete tar archive")
		}
		if n >= maxArchived {
			return nil, errdefs.Exhausted.Errorf("the archive has more than %d entries", maxArchived)
		}
		if len(hdr.Name) > maxArchivedName || len(hdr.Linkname) > maxArchivedName {
			return nil, errdefs.InvalidArgument.Errorf("the archive has a name of more than %d bytes", maxArchivedName)
		}
		name := path.Clean(hdr.Name)
		switch hdr.Typeflag {
		case tar.TypeReg:
			if hdr.Size > s.limits.TotalBytes-sum {
				return nil, errdefs.Exhausted.Errorf("the archive has more than %d bytes", s.limits.TotalBytes)
			}
			sum += hdr.Size
			number := strconv.Itoa(n)
			if err := writeFile(filepath.Join(dir, number), tr, buf); err != nil {
				return nil, err
			}
			out.names[name] = number
		case tar.TypeSymlink:
			out.names[name] = "=" + path.Join(path.Dir(name), hdr.Linkname)
		case tar.TypeLink:
			out.names[name] = "=" + path.Clean(hdr.Linkname)
		}
	}
}

func writeFile(path string, r io.Reader, buf []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return errdefs.DiskFull(err)
	}
	// Without f's own way of copying, so that errors of the two are told apart.
	to := &counting{w: f}
	_, err = io.CopyBuffer(to, struct{ io.Reader }{r}, buf)
	err2 := f.Close()
	if to.err != nil || err == nil && err2 != nil {
		return errdefs.DiskFull(errors.Join(to.err, err2))
	}
	if err != nil {
		return errdefs.InvalidArgument.Errorf("it is not a complete tar archive")
	}
	return nil
}

// counting remembers the writer's error.
type counting struct {
	w   io.Writer
	err error
}

func (c *counting) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.err = err
	return n, err
}

// importFiles reads what an archive says it holds and takes its layers.
func (s *Store) importFiles(ctx context.Context, from files, name string) (Image, error) {
	img, own, take, err := s.describeFiles(ctx, from)
	for i, l := range img.Layers {
		if err == nil {
			err = s.take(ctx, from, take[i], l)
		}
		if err != nil {
			err = fmt.Errorf("layer %d: %w", i+1, err)
			break
		}
	}
	if name == "" {
		name = own
	}
	if err != nil {
		return Image{}, fmt.Errorf("import image: %w", err)
	}
	img.Reference = name
	return img, nil
}

// describeFiles returns the image, its name, and the names of the layers' files.
func (s *Store) describeFiles(ctx context.Context, from files) (img Image, name string, take []string, err error) {
	var saved []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	switch err := readJSON(from, "manifest.json", maxManifest, &saved); {
	case err == nil && len(saved) != 1:
		return Image{}, "", nil, errdefs.InvalidArgument.Errorf("the archive has %d images; one is possible", len(saved))
	case err == nil:
		if len(saved[0].RepoTags) > 0 {
			name = saved[0].RepoTags[0]
		}
		img, err = s.describeSaved(ctx, from, saved[0].Config, saved[0].Layers)
		return img, name, saved[0].Layers, err
	case errdefs.ClassOf(err) != errdefs.NotFound:
		return Image{}, "", nil, err
	}
	f, err := from.open("index.json")
	if errdefs.ClassOf(err) == errdefs.NotFound {
		return Image{}, "", nil, errdefs.InvalidArgument.Errorf("it is no image: it has neither manifest.json nor index.json")
	}
	if err != nil {
		return Image{}, "", nil, err
	}
	defer f.Close()
	body, err := readAll(f, maxManifest)
	if err != nil {
		return Image{}, "", nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(body, &index); err != nil {
		return Image{}, "", nil, errdefs.InvalidArgument.Errorf("its index.json is not valid JSON")
	}
	if err := oneImage(index.Manifests); err != nil {
		return Image{}, "", nil, err
	}
	if len(index.Manifests) == 1 {
		name = index.Manifests[0].Annotations["org.opencontainers.image.ref.name"]
	}
	img, err = resolve(ctx, blobFiles{from}, types.OCIImageIndex, body, s.limits)
	for _, l := range img.Layers {
		take = append(take, blobName(l.Digest))
	}
	return img, name, take, err
}

// oneImage refuses a layout in which one of several images would have to be guessed.
func oneImage(all []v1.Descriptor) error {
	fit := 0
	for _, d := range all {
		if p := d.Platform; p == nil && (isIndex(d.MediaType) || isManifest(d.MediaType)) ||
			p != nil && p.OS == "linux" && p.Architecture == "amd64" && baseline(p.Variant) {
			fit++
		}
	}
	if fit > 1 {
		return errdefs.InvalidArgument.Errorf("the archive has %d images; one is possible", fit)
	}
	return nil
}

// describeSaved makes the manifest that an archive of `docker save` does not have.
func (s *Store) describeSaved(ctx context.Context, from files, config string, layers []string) (Image, error) {
	raw, err := read(from, config, maxConfig)
	if err != nil {
		return Image{}, err
	}
	c, err := describe1(raw, types.DockerConfigJSON)
	if err != nil {
		return Image{}, err
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.DockerManifestSchema2, Config: c}
	if len(layers) > s.limits.Layers {
		return Image{}, errdefs.Exhausted.Errorf("it has %d layers; at most %d are possible", len(layers), s.limits.Layers)
	}
	for i, l := range layers {
		d, err := describeFile(ctx, from, l)
		if err != nil {
			return Image{}, fmt.Errorf("layer %d: %w", i+1, err)
		}
		m.Layers = append(m.Layers, d)
	}
	body, err := json.Marshal(m)
	if err != nil {
		return Image{}, fmt.Errorf("write manifest: %w", err)
	}
	return resolve(ctx, savedFiles{from, config}, m.MediaType, body, s.limits)
}

func describe1(b []byte, t types.MediaType) (v1.Descriptor, error) {
	h, err := v1.NewHash(digestOf(b))
	return v1.Descriptor{MediaType: t, Size: int64(len(b)), Digest: h}, err
}

func describeFile(ctx context.Context, from files, name string) (v1.Descriptor, error) {
	f, err := from.open(name)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, &counter{r: f, ctx: ctx})
	if err != nil {
		return v1.Descriptor{}, err
	}
	h, err := v1.NewHash(sha256Prefix + hex.EncodeToString(sum.Sum(nil)))
	return v1.Descriptor{MediaType: types.DockerLayer, Size: n, Digest: h}, err
}

// blobFiles are the documents of an OCI layout.
type blobFiles struct{ files }

func blobName(digest string) string {
	return "blobs/sha256/" + strings.TrimPrefix(digest, sha256Prefix)
}

func (b blobFiles) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	body, err := read(b.files, blobName(d.Digest.String()), d.Size)
	if err == nil {
		err = verify(d, body)
	}
	return body, err
}

func (b blobFiles) config(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	return b.manifest(ctx, d)
}

// savedFiles has the one document that an archive of `docker save` needs.
type savedFiles struct {
	files
	name string
}

func (b savedFiles) manifest(context.Context, v1.Descriptor) ([]byte, error) {
	return nil, errdefs.InvalidArgument.Errorf("it has a manifest that is none")
}

func (b savedFiles) config(_ context.Context, d v1.Descriptor) ([]byte, error) {
	body, err := read(b.files, b.name, d.Size)
	if err == nil {
		err = verify(d, body)
	}
	return body, err
}

func read(from files, name string, limit int64) ([]byte, error) {
	f, err := from.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, limit)
}

func readAll(f *os.File, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = errdefs.InvalidArgument.Errorf("a manifest or configuration has more than %d bytes", limit)
	}
	return b, err
}

func readJSON(from files, name string, limit int64, v any) error {
	b, err := read(from, name, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errdefs.InvalidArgument.Errorf("its %s is not valid JSON", name)
	}
	return nil
}

// take copies a layer of the archive into the store and verifies it. The archive has to
// hold it: that the store does shows nothing about who brings the archive.
func (s *Store) take(ctx context.Context, from files, name string, l Layer) error {
	in, err := from.open(name)
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.CreateTemp(s.dir, ".blob-")
	if err != nil {
		return errdefs.DiskFull(err)
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(&counter{r: in, ctx: ctx}, l.Size+1))
	if err != nil {
		return errdefs.DiskFull(err)
	}
	if got := sha256Prefix + hex.EncodeToString(sum.Sum(nil)); n != l.Size || got != l.Digest {
		return errdefs.Corrupt.Errorf("what is there as %s has the digest %s", l.Digest, got)
	}
	return errdefs.DiskFull(os.Rename(f.Name(), s.blob(l.Digest)))
}
