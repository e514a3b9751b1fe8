package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// saved are the entries of an archive of `docker save`, of versions before 25 with links
// between layers.
func saved(t *testing.T, img madeImage, old bool) []entry {
	t.Helper()
	var out []entry
	var names []string
	for i, l := range img.layers {
		name := blobName(l.Digest)
		if old {
			name = fmt.Sprintf("id%d/layer.tar", i)
		}
		names = append(names, name)
		if old && i == 1 && l.Digest == img.layers[0].Digest {
			out = append(out, entry{name: name, link: "../id0/layer.tar", kind: tar.TypeSymlink})
			continue
		}
		out = append(out, entry{name: name, text: string(img.blobs[l.Digest])})
	}
	config := strings.TrimPrefix(digestOf(img.config), sha256Prefix) + ".json"
	manifest := []map[string]any{{"Config": config, "RepoTags": []string{"my/image:1"}, "Layers": names}}
	return append(out, entry{name: config, text: string(img.config)}, entry{name: "manifest.json", text: string(jsonOf(t, manifest))})
}

// laidOut are the files of an OCI layout.
func laidOut(t *testing.T, img madeImage) []entry {
	t.Helper()
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
		MediaType: types.OCIManifestSchema1, Size: int64(len(img.manifest)), Digest: hashOf(t, digestOf(img.manifest)),
		Annotations: map[string]string{"org.opencontainers.image.ref.name": "my/image:1"},
	}}}
	out := []entry{
		{name: "oci-layout", text: `{"imageLayoutVersion":"1.0.0"}`}, {name: "index.json", text: string(jsonOf(t, index))},
		{name: "blobs/"}, {name: "blobs/sha256/"},
		{name: blobName(digestOf(img.manifest)), text: string(img.manifest)},
		{name: blobName(digestOf(img.config)), text: string(img.config)},
	}
	for digest, blob := range img.blobs {
		out = append(out, entry{name: blobName(digest), text: string(blob)})
	}
	return out
}

func TestImport(t *testing.T) {
	img := smallImage(t)
	same := archiveOf(t, entry{name: "x"})
	twice := makeImage(t, v1.Config{}, same, same)
	for _, c := range []struct {
		name    string
		archive []byte
		want    madeImage
	}{
		{"saved", archiveOf(t, saved(t, img, false)...), img},
		{"saved by an old version", archiveOf(t, saved(t, twice, true)...), twice},
		{"saved, by gzip", gzipped(archiveOf(t, saved(t, img, true)...)), img},
		{"layout", archiveOf(t, laidOut(t, img)...), img},
		{"layout, by zstd", zstded(archiveOf(t, laidOut(t, img)...)), img},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, t.TempDir())
			got, err := s.Import(t.Context(), bytes.NewReader(c.archive), "", nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want.layers, got.Layers); diff != "" || got.Reference != "my/image:1" || !validDigest(got.Digest) {
				t.Errorf("%+v\n%s", got, diff)
			}
			if names := left(t, s.dir); len(names) != len(c.want.blobs) {
				t.Errorf("left %v", names)
			}
			path := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(path, c.archive, 0o600); err != nil {
				t.Fatal(err)
			}
			again, err := open(t, t.TempDir()).ImportPath(t.Context(), path, nil)
			if diff := cmp.Diff(got, again); err != nil || diff != "" {
				t.Errorf("from a file: %v\n%s", err, diff)
			}
		})
	}
}

func TestImportLayoutDirectory(t *testing.T) {
	img, s, dir := smallImage(t), open(t, t.TempDir()), t.TempDir()
	for _, e := range laidOut(t, img) {
		path := filepath.Join(dir, e.name)
		if strings.HasSuffix(e.name, "/") {
			if err := os.MkdirAll(path, 0o700); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(e.text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.ImportPath(t.Context(), dir, nil)
	if diff := cmp.Diff(img.layers, got.Layers); err != nil || diff != "" || got.Digest != digestOf(img.manifest) {
		t.Errorf("%v\n%s", err, diff)
	}
	// A blob that is a link out of the directory is not followed.
	layer := filepath.Join(dir, blobName(img.layers[0].Digest))
	other := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(layer, other); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, layer); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, t.TempDir()).ImportPath(t.Context(), dir, nil); errdefs.ClassOf(err) != errdefs.InvalidArgument {
		t.Errorf("got %v", err)
	}
	if _, err := s.ImportPath(t.Context(), filepath.Join(dir, "no"), nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("got %v", err)
	}
}

func TestImportRefuses(t *testing.T) {
	img := smallImage(t)
	layer := blobName(img.layers[0].Digest)
	change := func(entries []entry, name string, to func(*entry)) []byte {
		for i := range entries {
			if entries[i].name == name {
				to(&entries[i])
			}
		}
		return archiveOf(t, slices.DeleteFunc(entries, func(e entry) bool { return e.name == "" })...)
	}
	good := archiveOf(t, saved(t, img, false)...)
	var many []entry
	for i := range maxArchived + 1 {
		many = append(many, entry{name: fmt.Sprint(i, "/")})
	}
	for _, c := range []struct {
		name    string
		archive []byte
		class   *errdefs.Class
		text    string
	}{
		{"nothing", nil, errdefs.InvalidArgument, "neither"},
		{"no archive", bytes.Repeat([]byte("x"), 10_000), errdefs.InvalidArgument, "tar"},
		{"cut off", good[:len(good)/2], errdefs.InvalidArgument, "tar"},
		{"cut off gzip", gzipped(good)[:400], errdefs.InvalidArgument, "tar"},
		{"another archive", archiveOf(t, entry{name: "etc/passwd"}), errdefs.InvalidArgument, "neither"},
		{"other layer", change(laidOut(t, img), layer, func(e *entry) { e.text = strings.Replace(e.text, e.text[20:30], "0123456789", 1) }),
			errdefs.Corrupt, "layer 1"},
		{"missing layer", change(laidOut(t, img), layer, func(e *entry) { e.name = "" }), errdefs.NotFound, "layer 1"},
		{"missing layer, saved", change(saved(t, img, false), layer, func(e *entry) { e.name = "" }), errdefs.NotFound, "layer 1"},
		{"a link to itself", change(saved(t, img, false), layer, func(e *entry) { e.kind, e.link, e.text = tar.TypeLink, e.name, "" }),
			errdefs.NotFound, "layer 1"},
		{"links out", change(saved(t, img, false), layer, func(e *entry) { e.kind, e.link, e.text = tar.TypeSymlink, "/etc/passwd", "" }),
			errdefs.NotFound, "layer 1"},
		{"no JSON", change(saved(t, img, false), "manifest.json", func(e *entry) { e.text = "{" }), errdefs.InvalidArgument, "JSON"},
		{"two images", change(saved(t, img, false), "manifest.json", func(e *entry) { e.text = "[{},{}]" }), errdefs.InvalidArgument, "2 images"},
		{"many entries", archiveOf(t, many...), errdefs.Exhausted, "entries"},
		{"giant name", archiveOf(t, entry{name: strings.Repeat("n/", 400)}), errdefs.InvalidArgument, "name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, t.TempDir())
			_, err := s.Import(t.Context(), bytes.NewReader(c.archive), "x", nil)
			if errdefs.ClassOf(err) != c.class || !strings.Contains(say(err), c.text) {
				t.Errorf("got %v, %v", errdefs.ClassOf(err), err)
			}
			if names := left(t, s.dir); len(names) > 1 || len(names) == 1 && names[0][0] == '.' {
				t.Errorf("left %v", names)
			}
		})
	}
}

// Layers that the store has from elsewhere are not the archive's.
func TestImportTakesNothingFromTheStore(t *testing.T) {
	img, s := smallImage(t), open(t, t.TempDir())
	if _, err := s.Import(t.Context(), bytes.NewReader(archiveOf(t, laidOut(t, img)...)), "", nil); err != nil {
		t.Fatal(err)
	}
	without := slices.DeleteFunc(laidOut(t, img), func(e entry) bool { return e.name == blobName(img.layers[0].Digest) })
	if _, err := s.Import(t.Context(), bytes.NewReader(archiveOf(t, without...)), "", nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("got %v", err)
	}
}
