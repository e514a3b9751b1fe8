package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// script makes archives of bytes: four say what an entry is, what it is called and where
// it leads. Names are few, so that entries meet.
func script(t testing.TB, outside string, code []byte) (layers [][]byte) {
	parts := []string{
		"a", "b", "c", "..", ".", "", "a/b", "c/a", "/a", "a/..", ".wh.a", ".wh.", ".wh..wh..opq", "b/c", "../..", outside,
	}
	targets := []string{
		"a", "b", "c", "/", "..", "../outside", outside, "/a", "a/b", "b/c/..", ".", "/b/..", "../../..", "c/a", "", "a/../../..",
	}
	var entries []entry
	for ; len(code) >= 4 && len(entries) < 200; code = code[4:] {
		e := entry{
			name: parts[code[1]&15] + "/" + parts[code[1]>>4] + "/" + parts[code[2]&15],
			link: targets[code[3]&15], mode: int64(code[2]) << 4,
		}
		switch code[0] % 8 {
		case 0:
			e.kind, e.link, e.text = tar.TypeReg, "", string(code[:4])
		case 1:
			e.kind, e.link = tar.TypeDir, ""
		case 2:
			e.kind = tar.TypeSymlink
		case 3:
			e.kind = tar.TypeLink
		case 4:
			e.kind, e.link = tar.TypeFifo, ""
		case 5:
			e.kind, e.link = tar.TypeChar, "" // 0:0 hides what is there
		case 6:
			e.kind, e.link, e.name = tar.TypeReg, "", parts[code[1]&15]
		default:
			layers, entries = append(layers, archiveOf(t, entries...)), nil
			continue
		}
		if e.name = strings.TrimRight(e.name, "/"); e.name == "" {
			e.name = "."
		}
		entries = append(entries, e)
	}
	return append(layers, archiveOf(t, entries...))
}

// FuzzUnpack: no archive writes outside of the tree, whatever it has, and each error that
// it causes has a class.
func FuzzUnpack(f *testing.F) {
	testenv.Root(f)
	f.Add(archiveOf(f, everything()...), []byte{})
	f.Add(gzipped(archiveOf(f, everything()...)), []byte{0, 0, 0, 0, 2, 1, 4, 6, 0, 1, 0, 0})
	f.Add(zstded(archiveOf(f)), []byte{1, 0, 0x45, 0, 7, 0, 0, 0, 2, 0, 0x45, 5, 0, 0x10, 5, 0, 3, 2, 5, 8})
	f.Add([]byte("no archive"), []byte{2, 0, 4, 6, 1, 0x10, 4, 0, 7, 0, 0, 0, 6, 10, 0, 0, 1, 0, 4, 0})
	f.Add(raw("../outside/x", "", tar.TypeReg), bytes.Repeat([]byte{2, 1, 4, 5, 0, 0x21, 4, 0}, 4))
	base := "/dev/shm" // many small trees
	if _, err := os.Stat(base); err != nil {
		base = f.TempDir()
	}
	f.Fuzz(func(t *testing.T, archive, code []byte) {
		dir, err := os.MkdirTemp(base, "fuzz-image-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		tree, outside := filepath.Join(dir, "tree"), filepath.Join(dir, "outside")
		if err := os.Mkdir(tree, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(outside, 0o700); err != nil {
			t.Fatal(err)
		}
		layers := script(t, outside, code)
		// The archive is last, so that what the others made is there.
		for _, all := range [][][]byte{layers, append(layers, archive)} {
			if err := unpack(t.Context(), tree, sources(all...), small, nil); err != nil && errdefs.ClassOf(err) == nil {
				t.Errorf("without a class: %v", err)
			}
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 2 {
				t.Fatalf("beside the tree: %v, %v", entries, err)
			}
			if entries, err = os.ReadDir(outside); err != nil || len(entries) != 0 {
				t.Fatalf("outside: %v, %v", entries, err)
			}
		}
	})
}
