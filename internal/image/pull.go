package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"git.omukk.dev/wrenn/sandbox/internal/diskfree"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// minProgress is what a download must bring to count as one that goes on.
const minProgress = 64 << 10

// parallel is how many blobs of one image are downloaded at a time.
const parallel = 4

// ParseReference checks that ref names an image as Pull wants it.
func ParseReference(ref string) error {
	_, err := parseReference(ref)
	return err
}

// IsLocal reports whether ref names an image of a registry on this machine, which is the
// host administrator's, and not every caller's, to ask.
func IsLocal(ref string) bool {
	parsed, err := parseReference(ref)
	return err == nil && isLoopback(parsed.Context().RegistryStr())
}

// The library takes more than registries do.
var (
	repository = regexp.MustCompile(`^[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$`)
	hostname   = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?$`)
)

func parseReference(ref string) (name.Reference, error) {
	const maxReference = 1024
	if len(ref) > maxReference {
		return nil, errdefs.InvalidArgument.Errorf("the name of an image has at most %d bytes", maxReference)
	}
	parsed, err := name.ParseReference(ref)
	if err == nil && repository.MatchString(parsed.Context().RepositoryStr()) && hostname.MatchString(parsed.Context().RegistryStr()) {
		return parsed, nil
	}
	// A name that is not one may have a password in it.
	if at := strings.Index(ref, "@"); strings.Contains(ref, "://") || at >= 0 && !strings.HasPrefix(ref[at:], "@sha256:") {
		return nil, errdefs.InvalidArgument.Errorf("an image is named without a scheme and without credentials")
	}
	return nil, errdefs.InvalidArgument.Errorf("%s is not the name of an image", quote(ref))
}

// Pull brings the image that ref names, for linux/amd64, into the store. ref is a name as
// the field writes it, with a tag or a digest or neither, with a registry or without one.
// Blobs that are there are not asked for again, except whether the caller may have them.
// An image or tag that does not exist is errdefs.NotFound, one for other platforms only
// errdefs.Unsupported, one that the credentials do not open errdefs.Denied, and data
// with another digest errdefs.Corrupt.
func (s *Store) Pull(ctx context.Context, ref string, c Credentials, progress func(Progress)) (Image, error) {
	parsed, err := parseReference(ref)
	if err != nil {
		return Image{}, err
	}
	release, err := s.Hold(ctx)
	if err != nil {
		return Image{}, err
	}
	defer release()
	m := newMeter(progress)
	defer m.stop()
	m.begin(Resolving, 0, ref)
	img, err := s.pull(ctx, parsed, c, m)
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", errdefs.Foreign(ref), err)
	}
	img.Reference = ref
	return img, nil
}

func (s *Store) pull(ctx context.Context, ref name.Reference, c Credentials, m *meter) (Image, error) {
	r, err := connect(ctx, ref.Context(), c)
	if err != nil {
		return Image{}, err
	}
	defer r.Close()
	body, mediaType, err := r.top(ctx, ref)
	if err != nil {
		return Image{}, err
	}
	img, err := resolve(ctx, r, mediaType, body, s.limits)
	if err != nil {
		return Image{}, err
	}
	return img, s.download(ctx, r, img, m)
}

var accept = strings.Join([]string{
	string(types.OCIImageIndex), string(types.DockerManifestList),
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
}, ", ")

// top is the document to which a reference leads.
func (r *registry) top(ctx context.Context, ref name.Reference) ([]byte, types.MediaType, error) {
	body, header, err := r.small(ctx, "manifests/"+ref.Identifier(), accept, maxManifest)
	if errdefs.ClassOf(err) == errdefs.NotFound {
		return nil, "", fmt.Errorf("image or tag %w", err)
	}
	if err != nil {
		return nil, "", err
	}
	want := header.Get("Docker-Content-Digest")
	if d, ok := ref.(name.Digest); ok {
		want = d.DigestStr()
	}
	if got := digestOf(body); validDigest(want) && got != want {
		return nil, "", errdefs.Corrupt.Errorf("what came as %s has the digest %s", want, got)
	}
	mediaType, _, _ := strings.Cut(header.Get("Content-Type"), ";")
	return body, types.MediaType(strings.TrimSpace(mediaType)), nil
}

func (r *registry) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	body, _, err := r.small(ctx, "manifests/"+d.Digest.String(), accept, d.Size)
	if err == nil {
		err = verify(d, body)
	}
	return body, err
}

func (r *registry) config(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	body, _, err := r.small(ctx, "blobs/"+d.Digest.String(), "*/*", d.Size)
	if err == nil {
		err = verify(d, body)
	}
	return body, err
}

// download brings the layers that are missing. Of an image whose root layer is there none is.
func (s *Store) download(ctx context.Context, r *registry, img Image, m *meter) error {
	var diffIDs []string
	for _, l := range img.Layers {
		diffIDs = append(diffIDs, l.DiffID)
	}
	made := s.proven(img.Layers) && touch(s.path(rootsDir, key(diffIDs)))
	unique := map[string]Layer{}
	var total, missing int64
	for _, l := range img.Layers {
		if have, ok := unique[l.Digest]; ok {
			if have.Size != l.Size {
				return errdefs.InvalidArgument.Errorf("its layer %s has two sizes", l.Digest)
			}
			continue
		}
		unique[l.Digest] = l
		total += l.Size
		if _, err := os.Lstat(s.blob(l.Digest)); err != nil && !made {
			missing += l.Size
		}
	}
	if free, err := diskfree.Bytes(s.dir); err == nil && free < missing {
		return errdefs.Exhausted.Errorf("its layers have %d MiB, and the host's disk has room for %d", missing>>20, free>>20)
	}
	m.begin(Downloading, total, "")
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for _, l := range unique {
		group.Go(func() error {
			if err := s.ensure(ctx, r, l, made, m); err != nil {
				return fmt.Errorf("get layer %s: %w", l.Digest, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	m.end()
	return nil
}

// ensure makes sure that the blob is in the store, or need not be, and that the registry
// lets the caller have it.
func (s *Store) ensure(ctx context.Context, r *registry, l Layer, made bool, m *meter) error {
	for {
		if made || touch(s.blob(l.Digest)) {
			if err := r.has(ctx, l.Digest); err != nil {
				return err
			}
			m.add(l.Size)
			return nil
		}
		shared, err := s.flights.do(ctx, "blob "+l.Digest, func(ctx context.Context) error {
			return s.fetch(ctx, r, l, m)
		})
		if !shared {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Another caller's: it is there now, or else this one tries with its own
		// credentials.
	}
}

// partial is a blob while it comes.
type partial struct {
	f   *os.File
	sum hash.Hash
	n   int64
	m   *meter
}

func (p *partial) Write(b []byte) (int, error) {
	n, err := p.f.Write(b)
	p.sum.Write(b[:n])
	p.n += int64(n)
	p.m.add(int64(n))
	if err != nil {
		err = &writeError{err}
	}
	return n, err
}

// writeError is an error of this host's.
type writeError struct{ error }

func (e *writeError) Unwrap() error { return e.error }

func (p *partial) restart() error {
	if _, err := p.f.Seek(0, io.SeekStart); err != nil {
		return &writeError{err}
	}
	if err := p.f.Truncate(0); err != nil {
		return &writeError{err}
	}
	p.m.add(-p.n)
	p.sum.Reset()
	p.n = 0
	return nil
}

// fetch downloads a blob, and goes on where it breaks off. It becomes visible when it is
// complete and verified.
func (s *Store) fetch(ctx context.Context, r *registry, l Layer, m *meter) error {
	f, err := os.CreateTemp(s.dir, ".blob-")
	if err != nil {
		return errdefs.DiskFull(err)
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	defer f.Close()
	p := &partial{f: f, sum: sha256.New(), m: m}
	for n, before := 1, int64(0); ; n++ {
		err := r.blob(ctx, l.Digest, p.n, l.Size, p.restart, p)
		if err == nil && p.n < l.Size {
			err = io.ErrUnexpectedEOF
		}
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var own *writeError
		if errors.As(err, &own) {
			return errdefs.DiskFull(own.error)
		}
		if p.n >= before+minProgress {
			n, before = 1, p.n
		}
		if n >= tries || !passing(err) {
			return r.explain(err)
		}
		if err := pause(ctx, n); err != nil {
			return err
		}
	}
	if got := sha256Prefix + hex.EncodeToString(p.sum.Sum(nil)); p.n != l.Size || got != l.Digest {
		return errdefs.Corrupt.Errorf("what came has the digest %s", got)
	}
	return errdefs.DiskFull(os.Rename(f.Name(), s.blob(l.Digest)))
}
