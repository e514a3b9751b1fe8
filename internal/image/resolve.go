package image

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	maxNesting  = 3
)

// documents is where manifests and configurations come from. The digest of what it returns
// is verified.
type documents interface {
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	config(ctx context.Context, d v1.Descriptor) ([]byte, error)
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return sha256Prefix + hex.EncodeToString(sum[:])
}

// validDigest reports whether text is a digest as this package uses them.
func validDigest(text string) bool {
	h, ok := strings.CutPrefix(text, sha256Prefix)
	if !ok || len(h) != 64 {
		return false
	}
	for _, c := range h {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}

// verify checks what came for d.
func verify(d v1.Descriptor, body []byte) error {
	if got := digestOf(body); got != d.Digest.String() {
		return errdefs.Corrupt.Errorf("what came as %s has the digest %s", d.Digest, got)
	}
	return nil
}

func isIndex(t types.MediaType) bool {
	return t == types.OCIImageIndex || t == types.DockerManifestList
}

func isManifest(t types.MediaType) bool {
	return t == types.OCIManifestSchema1 || t == types.DockerManifestSchema2
}

// resolve finds the image for linux/amd64 in a manifest or an index.
func resolve(ctx context.Context, from documents, mediaType types.MediaType, body []byte, limits Limits) (Image, error) {
	for range maxNesting {
		kind := mediaTypeOf(mediaType, body)
		if isManifest(kind) {
			return describeImage(ctx, from, body, limits)
		}
		if !isIndex(kind) {
			return Image{}, errdefs.Unsupported.Errorf("it is no image of a kind that is supported: its type is %s", quote(string(kind)))
		}
		index, err := v1.ParseIndexManifest(bytes.NewReader(body))
		if err != nil {
			return Image{}, errdefs.InvalidArgument.Errorf("its index is not valid JSON")
		}
		d, err := choose(index.Manifests)
		if err != nil {
			return Image{}, err
		}
		if body, err = from.manifest(ctx, d); err != nil {
			return Image{}, fmt.Errorf("get manifest %s: %w", d.Digest, err)
		}
		mediaType = d.MediaType
	}
	return Image{}, errdefs.InvalidArgument.Errorf("its indexes are nested more than %d deep", maxNesting)
}

// mediaTypeOf prefers what a document says of itself to what is said of it.
func mediaTypeOf(said types.MediaType, body []byte) types.MediaType {
	m, err := v1.ParseManifest(bytes.NewReader(body))
	if err != nil {
		return said
	}
	if m.MediaType == "" {
		return said
	}
	return m.MediaType
}

// choose picks what is for linux/amd64.
func choose(all []v1.Descriptor) (v1.Descriptor, error) {
	var fit []v1.Descriptor
	var others []string
	for _, d := range all {
		p := d.Platform
		switch {
		case !isIndex(d.MediaType) && !isManifest(d.MediaType):
		case p == nil:
			fit = append(fit, d) // its configuration says
		case p.OS == "linux" && p.Architecture == "amd64" && baseline(p.Variant):
			fit = append(fit, d)
		case p.OS != "unknown": // not an image but something about one
			others = append(others, p.String())
		}
	}
	// What says that it fits comes before what says nothing.
	slices.SortStableFunc(fit, func(a, b v1.Descriptor) int { return cmp.Compare(rank(a), rank(b)) })
	if len(fit) == 0 {
		return v1.Descriptor{}, notFor(others)
	}
	if d := fit[0]; validDigest(d.Digest.String()) && d.Size > 0 && d.Size <= maxManifest {
		return d, nil
	}
	return v1.Descriptor{}, errdefs.InvalidArgument.Errorf("its index has a manifest without a valid digest and size")
}

// baseline is what every amd64 machine runs.
func baseline(variant string) bool { return variant == "" || variant == "v1" }

func rank(d v1.Descriptor) int {
	if d.Platform == nil {
		return 1
	}
	return 0
}

func notFor(others []string) error {
	if len(others) == 0 {
		return errdefs.Unsupported.Errorf("it has no image for linux/amd64")
	}
	slices.Sort(others)
	others = slices.Compact(others)
	return errdefs.Unsupported.Errorf("it is for other platforms than linux/amd64: %s", errdefs.Foreign(strings.Join(others, ", ")))
}

// describeImage reads a manifest and the configuration that it names.
func describeImage(ctx context.Context, from documents, body []byte, limits Limits) (Image, error) {
	m, err := v1.ParseManifest(bytes.NewReader(body))
	if err != nil {
		return Image{}, errdefs.InvalidArgument.Errorf("its manifest is not valid JSON")
	}
	if t := m.Config.MediaType; t != types.OCIConfigJSON && t != types.DockerConfigJSON {
		return Image{}, errdefs.Unsupported.Errorf("it is no image: its configuration is %s", quote(string(t)))
	}
	if !validDigest(m.Config.Digest.String()) || m.Config.Size <= 0 || m.Config.Size > maxConfig {
		return Image{}, errdefs.InvalidArgument.Errorf("its manifest has a configuration without a valid digest and size")
	}
	raw, err := from.config(ctx, m.Config)
	if err != nil {
		return Image{}, fmt.Errorf("get configuration: %w", err)
	}
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return Image{}, errdefs.InvalidArgument.Errorf("its configuration is not valid JSON")
	}
	if c.OS != "" && c.OS != "linux" || c.Architecture != "" && c.Architecture != "amd64" || !baseline(c.Variant) {
		return Image{}, notFor([]string{c.Platform().String()})
	}
	img := Image{Digest: digestOf(body), Config: configOf(c.Config)}
	if len(m.Layers) != len(c.RootFS.DiffIDs) {
		return Image{}, errdefs.InvalidArgument.Errorf("it has %d layers, and its configuration says %d", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	if len(m.Layers) > limits.Layers {
		return Image{}, errdefs.Exhausted.Errorf("it has %d layers; at most %d are possible", len(m.Layers), limits.Layers)
	}
	var sum int64
	for i, l := range m.Layers {
		if !l.MediaType.IsLayer() {
			return Image{}, errdefs.Unsupported.Errorf("its layer %d is %s", i+1, quote(string(l.MediaType)))
		}
		layer := Layer{Digest: l.Digest.String(), DiffID: c.RootFS.DiffIDs[i].String(), Size: l.Size}
		if !validDigest(layer.Digest) || !validDigest(layer.DiffID) || l.Size <= 0 {
			return Image{}, errdefs.InvalidArgument.Errorf("its layer %d has no valid digests and size", i+1)
		}
		if l.Size > limits.BlobBytes-sum {
			return Image{}, errdefs.Exhausted.Errorf("its layers have more than %d bytes", limits.BlobBytes)
		}
		sum += l.Size
		img.Layers = append(img.Layers, layer)
	}
	return img, nil
}

func configOf(c v1.Config) Config {
	out := Config{
		Env: c.Env, User: c.User, Workdir: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Shell: c.Shell,
		Exposed: slices.Sorted(maps.Keys(c.ExposedPorts)), Volumes: slices.Sorted(maps.Keys(c.Volumes)),
		Labels: c.Labels, StopSignal: c.StopSignal, OnBuild: c.OnBuild,
	}
	if h := c.Healthcheck; h != nil {
		out.Healthcheck = &Healthcheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, Retries: h.Retries}
	}
	return out
}
