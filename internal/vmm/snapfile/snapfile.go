// Package snapfile reads and writes the files of a snapshot: the manifest that
// each driver writes last, the copies of memory and disks without their holes, and
// the digests of them.
package snapfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The files of a snapshot that a driver writes. ManifestName is written last and
// says what the others are.
const (
	MemoryName   = "mem"
	StateName    = "state"
	ManifestName = "vm.json"
)

// Names are all files of a snapshot that a driver writes.
func Names() []string { return []string{MemoryName, StateName, ManifestName} }

// Manifest is the contents of a snapshot's ManifestName. S is the driver's own
// description of a VM that the snapshot fits.
type Manifest[S comparable] struct {
	// Driver is the driver's name, Version the version of its VMM.
	Driver, Version string
	Shape           S
	// Memory has a digest if the driver computed one while it wrote the memory.
	Memory File
	// State has a digest of its whole contents.
	State File
}

// contents is how a manifest is written, beside the VMM's version, whose key has
// the driver's name in it.
type contents[S comparable] struct {
	Shape        S      `json:"shape"`
	MemoryBytes  int64  `json:"memory_bytes"`
	MemoryPieces string `json:"memory_sha256_pieces,omitempty"`
	StateBytes   int64  `json:"state_bytes"`
	StateSHA256  string `json:"state_sha256"`
}

func versionKey(driver string) string { return driver + "_version" }

// Write writes the manifest of the snapshot in dir, whose other files are there.
func (m Manifest[S]) Write(dir string) error {
	data, err := json.Marshal(contents[S]{m.Shape, m.Memory.Size, m.Memory.Pieces, m.State.Size, m.State.SHA256})
	if err != nil {
		return err
	}
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &all); err != nil {
		return err
	}
	if all[versionKey(m.Driver)], err = json.Marshal(m.Version); err != nil {
		return err
	}
	if data, err = json.MarshalIndent(all, "", "  "); err != nil {
		return err
	}
	// The caller brings the directory to the disk and publishes it as a whole.
	return os.WriteFile(filepath.Join(dir, ManifestName), append(data, '\n'), 0o600)
}

// read reads the manifest of a driver's snapshot; Version is empty if another
// driver wrote it.
func read[S comparable](dir, driver string) (m Manifest[S], err error) {
	data, err := os.ReadFile(filepath.Join(dir, ManifestName))
	if errors.Is(err, os.ErrNotExist) {
		return m, errdefs.Corrupt.Errorf("snapshot is incomplete: it has no %s", ManifestName)
	}
	if err != nil {
		return m, err
	}
	var c contents[S]
	var all map[string]json.RawMessage
	err = errors.Join(json.Unmarshal(data, &c), json.Unmarshal(data, &all))
	if version, ok := all[versionKey(driver)]; ok && err == nil {
		err = json.Unmarshal(version, &m.Version)
	}
	if err != nil {
		return m, errdefs.Corrupt.Errorf("snapshot's %s: %w", ManifestName, err)
	}
	m.Driver, m.Shape = driver, c.Shape
	m.Memory = File{Size: c.MemoryBytes, Pieces: c.MemoryPieces}
	m.State = File{Size: c.StateBytes, SHA256: c.StateSHA256}
	return m, nil
}

// Shape reads the description of the VM in the manifest of the snapshot in dir. What
// it says of another driver's snapshot means nothing.
func Shape[S comparable](dir string) (S, error) {
	m, err := read[S](dir, "")
	return m.Shape, err
}

// Open checks that the snapshot in dir is complete and was written by this version
// of the driver's VMM of a VM with the shape want. It returns the devices' state,
// whose digest has been checked. The memory's has not: that takes too long on the
// way to a guest that is to answer in milliseconds. forget, if not nil, makes equal
// what may differ between the shapes.
func Open[S comparable](dir, driver, version string, want S, forget func(*S)) (state *os.File, err error) {
	corrupt := errdefs.Corrupt.Errorf
	m, err := read[S](dir, driver)
	if err != nil {
		return nil, err
	}
	if m.Version != version {
		was := driver + " " + m.Version
		if m.Version == "" {
			was = "another VMM"
		}
		return nil, errdefs.Unsupported.Errorf("snapshot is of %s, here is %s %s", was, driver, version)
	}
	if forget != nil {
		forget(&m.Shape)
		forget(&want)
	}
	if m.Shape != want {
		return nil, errdefs.InvalidArgument.Errorf("snapshot is of a vm with %+v, not %+v", m.Shape, want)
	}
	if !IsFile(filepath.Join(dir, MemoryName), m.Memory.Size) {
		return nil, corrupt("snapshot's memory is not %d bytes long", m.Memory.Size)
	}
	state, err = openFile(dir, StateName)
	if errors.Is(err, os.ErrNotExist) {
		return nil, corrupt("snapshot has no device state")
	}
	if err != nil {
		return nil, err
	}
	size, sum, err := digest.Reader(state)
	if err == nil && (size != m.State.Size || sum != m.State.SHA256) {
		err = corrupt("snapshot's device state is not what was written")
	}
	if err == nil {
		_, err = state.Seek(0, 0)
	}
	if err != nil {
		return nil, errors.Join(err, state.Close())
	}
	return state, nil
}

// IsFile reports whether a regular file of that size is at path, and no link.
func IsFile(path string, size int64) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular() && info.Size() == size
}

// StateFile returns size and digest of the devices' state that a VMM wrote to dir.
func StateFile(dir string) (File, error) {
	f, err := openFile(dir, StateName)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	size, sum, err := digest.Reader(f)
	return File{Size: size, SHA256: sum}, err
}

// openFile opens a regular file; the VMM that wrote it may have left a link.
func openFile(dir, name string) (*os.File, error) {
	path := filepath.Join(dir, name)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	return os.Open(path)
}

// MemoryDigest returns the digest of the memory file that its driver computed while
// it wrote the snapshot in dir, if it did.
func MemoryDigest(dir string) (_ File, ok bool) {
	m, err := read[struct{}](dir, "")
	if err != nil || m.Memory.Pieces == "" || !IsFile(filepath.Join(dir, MemoryName), m.Memory.Size) {
		return File{}, false
	}
	return m.Memory, true
}
