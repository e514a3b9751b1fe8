package template

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
)

// MaxLayers is how many layers a template can have. Each is a disk of its guests.
const MaxLayers = 8

// Layer is a file of a build: an ext4 that guests read and never write. The lowest one
// holds a whole root file system. Each of the others is the disk that a guest wrote to
// over those below; its tree is in the directory /upper. Builds share a layer by hard
// links.
type Layer struct {
	// Path is absolute.
	Path   string
	SHA256 string
	// Size is the disk's, in bytes. The file takes less, for it has holes.
	Size int64

	file File // as the manifest has it
}

// layerName is the name of layer i in a build's directory, 0 for the lowest.
func layerName(i int) string {
	if i == 0 {
		return baseImage
	}
	return fmt.Sprintf("layer-%d.ext4", i+1)
}

// layersOf are the layers of a build's directory, lowest first.
func layersOf(dir string, m manifest) ([]Layer, error) {
	var layers []Layer
	n := len(m.Files)
	if _, ok := m.Files[rootEROFS]; ok {
		n--
	}
	for range n {
		name := layerName(len(layers))
		f, ok := m.Files[name]
		if !ok {
			return nil, fmt.Errorf("its manifest has no %s", name)
		}
		layers = append(layers, layerOf(filepath.Join(dir, name), f))
	}
	if len(layers) > MaxLayers {
		return nil, fmt.Errorf("it has %d layers, more than %d", len(layers), MaxLayers)
	}
	if len(layers) == 0 {
		return nil, errors.New("it has no layers")
	}
	return layers, nil
}

// erofsOf is the whole root of a build's directory as one EROFS; the zero Layer for none.
func erofsOf(dir string, m manifest) Layer {
	if f, ok := m.Files[rootEROFS]; ok {
		return layerOf(filepath.Join(dir, rootEROFS), f)
	}
	return Layer{}
}

func layerOf(path string, f File) Layer {
	return Layer{Path: path, SHA256: cmp.Or(f.SHA256, f.Pieces), Size: f.Size, file: f}
}

// rootDigest is the digest of a stack. That of one layer is the layer's own, as it was
// before there were stacks: disks and snapshots go by it.
func rootDigest(layers []Layer) string {
	if len(layers) == 1 {
		return layers[0].SHA256
	}
	h := sha256.New()
	for _, l := range layers {
		fmt.Fprintln(h, l.SHA256)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Paths are those of the layers, lowest first.
func (t Template) Paths() []string {
	var paths []string
	for _, l := range t.Layers {
		paths = append(paths, l.Path)
	}
	return paths
}

// Bytes is the size of all layers' disks.
func (t Template) Bytes() (bytes int64) {
	for _, l := range t.Layers {
		bytes += l.Size
	}
	return bytes
}
