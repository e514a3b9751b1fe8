package snapfile

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

type testShape struct {
	VCPUs int    `json:"vcpus"`
	Tap   string `json:"tap"`
}

// fill makes a snapshot without its manifest.
func fill(t *testing.T, dir string) (memory, state File) {
	t.Helper()
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, MemoryName), []byte("memory"), 0o600),
		os.WriteFile(filepath.Join(dir, StateName), []byte("state"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	memory = digestOf(t, filepath.Join(dir, MemoryName))
	state, err = StateFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	return memory, state
}

func TestManifest(t *testing.T) {
	dir := t.TempDir()
	memory, state := fill(t, dir)
	m := Manifest[testShape]{Driver: "qemu", Version: "7.2", Shape: testShape{1, "tap0"}, Memory: memory, State: state}
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
	if got, ok := MemoryDigest(dir); !ok || got != memory {
		t.Errorf("memory: %+v, %t", got, ok)
	}
	open := func(driver, version string, want testShape) error {
		f, err := Open(dir, driver, version, want, func(s *testShape) { s.Tap = "" })
		if err != nil {
			return err
		}
		defer f.Close()
		if b, err := io.ReadAll(f); string(b) != "state" {
			t.Errorf("state: %q, %v", b, err)
		}
		return nil
	}
	wantClass := func(what string, err error, class *errdefs.Class) {
		t.Helper()
		if err == nil || errdefs.ClassOf(err) != class {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := open("qemu", "7.2", testShape{1, "tap1"}); err != nil {
		t.Error(err)
	}
	wantClass("another version", open("qemu", "8.0", testShape{1, ""}), errdefs.Unsupported)
	wantClass("another driver", open("firecracker", "7.2", testShape{1, ""}), errdefs.Unsupported)
	wantClass("another shape", open("qemu", "7.2", testShape{2, ""}), errdefs.InvalidArgument)
	for what, damage := range map[string]func() error{
		"longer memory":   func() error { return os.WriteFile(filepath.Join(dir, MemoryName), []byte("memory+"), 0o600) },
		"another state":   func() error { return os.WriteFile(filepath.Join(dir, StateName), []byte("State"), 0o600) },
		"no state":        func() error { return os.Remove(filepath.Join(dir, StateName)) },
		"no manifest":     func() error { return os.Remove(filepath.Join(dir, ManifestName)) },
		"a torn manifest": func() error { return os.Truncate(filepath.Join(dir, ManifestName), 40) },
		"an empty version": func() error {
			return os.WriteFile(filepath.Join(dir, ManifestName), []byte(`{"qemu_version":7}`), 0o600)
		},
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		wantClass(what, open("qemu", "7.2", testShape{1, ""}), errdefs.Corrupt)
		fill(t, dir)
		if err := m.Write(dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := open("qemu", "7.2", testShape{1, ""}); err != nil {
		t.Errorf("all is back: %v", err)
	}
}

// Manifests as earlier versions wrote them.
var earlier = map[string]string{
	"qemu": `{
  "qemu_version": "7.2.22",
  "shape": {
    "accel": "tcg",
    "vcpus": 1,
    "mem_mib": 512,
    "disks": "rw",
    "mac": "02:00:00:00:00:01"
  },
  "memory_bytes": 6,
  "state_bytes": 5,
  "state_sha256": "STATE"
}
`,
	"firecracker": `{
  "firecracker_version": "1.12.1",
  "shape": {
    "vcpus": 1,
    "mem_mib": 512,
    "disks": "rw",
    "mac": "02:00:00:00:00:01",
    "tap": "tap0"
  },
  "memory_bytes": 6,
  "state_bytes": 5,
  "state_sha256": "STATE"
}
`,
}

// TestManifestOfAnEarlierVersion is read; it has no digest of the memory.
func TestManifestOfAnEarlierVersion(t *testing.T) {
	for driver, text := range earlier {
		dir := t.TempDir()
		_, state := fill(t, dir)
		text = strings.Replace(text, "STATE", state.SHA256, 1)
		if err := os.WriteFile(filepath.Join(dir, ManifestName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		version := map[string]string{"qemu": "7.2.22", "firecracker": "1.12.1"}[driver]
		forget := func(s *testShape) { s.Tap = "" }
		f, err := Open(dir, driver, version, testShape{VCPUs: 1}, forget)
		if err != nil {
			t.Errorf("%s: %v", driver, err)
			continue
		}
		f.Close()
		if got, ok := MemoryDigest(dir); ok {
			t.Errorf("%s: a digest of the memory: %+v", driver, got)
		}
	}
}

// TestStateIsAFile: what a VMM wrote may be a link to a file of the host.
func TestStateIsAFile(t *testing.T) {
	dir := t.TempDir()
	fill(t, dir)
	path := filepath.Join(dir, StateName)
	if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
		t.Fatal(err)
	}
	if got, err := StateFile(dir); err == nil {
		t.Errorf("a link is read: %+v", got)
	}
	m := Manifest[testShape]{Driver: "qemu", Version: "7.2", Memory: File{Size: 6}}
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
	if f, err := Open(dir, "qemu", "7.2", testShape{}, nil); err == nil {
		f.Close()
		t.Error("a link is opened")
	}
}
