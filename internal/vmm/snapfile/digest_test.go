package snapfile

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func digestOf(t testing.TB, path string) File {
	t.Helper()
	f, err := Digest(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestDigest: the digest tells every change of a byte and of the size, and
// does not tell a hole from zeros.
func TestDigest(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, size int64, parts map[int64][]byte) string {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		for at, data := range parts {
			if _, err := f.WriteAt(data, at); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	page := bytes.Repeat([]byte{7}, PageBytes)
	zeros := make([]byte, 3*PieceBytes)
	seen := map[File]string{}
	for _, tt := range []struct {
		name string
		size int64
		at   map[int64][]byte
	}{
		{"empty", 0, nil},
		{"a hole", 8 * PieceBytes, nil},
		{"a longer hole", 8*PieceBytes + 1, nil},
		{"one byte", 1, map[int64][]byte{0: {1}}},
		{"the last byte", 8*PieceBytes + 1, map[int64][]byte{8 * PieceBytes: {1}}},
		{"a page", 8 * PieceBytes, map[int64][]byte{PageBytes: page}},
		{"the page after it", 8 * PieceBytes, map[int64][]byte{2 * PageBytes: page}},
		{"both", 8 * PieceBytes, map[int64][]byte{PageBytes: page, 2 * PageBytes: page}},
		{"the same page of the next piece", 8 * PieceBytes, map[int64][]byte{PieceBytes + PageBytes: page}},
		{"across two pieces", 8 * PieceBytes, map[int64][]byte{PieceBytes - PageBytes: append(page[:PageBytes:PageBytes], page...)}},
		{"a page with a gap", 8 * PieceBytes, map[int64][]byte{PageBytes: page, 3 * PageBytes: page}},
	} {
		got := digestOf(t, write("f", tt.size, tt.at))
		if got.Size != tt.size || got.SHA256 != "" || len(got.Pieces) != 64 {
			t.Errorf("%s: %+v", tt.name, got)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%s and %s have one digest", tt.name, other)
		}
		seen[got] = tt.name
		os.Remove(filepath.Join(dir, "f"))
	}
	holes := write("holes", 8*PieceBytes, map[int64][]byte{5 * PieceBytes: page})
	full := write("full", 8*PieceBytes, map[int64][]byte{0: zeros, 3*PieceBytes - 7: zeros[:PieceBytes], 5 * PieceBytes: page})
	if digestOf(t, holes) != digestOf(t, full) {
		t.Error("zeros that were written and a hole differ")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, err := Digest(ctx, full); !errors.Is(err, gone) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestDigestsOfEarlierVersions: the digests in manifests on disk are what an earlier
// version computed of the same file.
func TestDigestsOfEarlierVersions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	parts := map[int64][]byte{2 << 20: make([]byte, 8192)}
	for _, at := range []int64{0, 4095, 3 << 20, 3<<20 + 8192, 5<<20 + 99} {
		parts[at] = []byte("x")
	}
	for at, data := range parts {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	const size = 5<<20 + 100
	if got, want := digestOf(t, path),
		(File{Size: size, Pieces: "6cc8123c21add27e1c7f212acaaac0ca171152f4b04dc4275f999b7642a5d9ea"}); got != want {
		t.Errorf("of pieces: %+v, want %+v", got, want)
	}
	got, err := OldDigest(t.Context(), path)
	if want := (File{Size: size, SHA256: "a7bfce6be1bf7aa4adc981e4685a746d0b878b921963c2795aa8085de12b6a1a"}); err != nil || got != want {
		t.Errorf("of pages: %+v, %v, want %+v", got, err, want)
	}
}

func BenchmarkDigest(b *testing.B) {
	path := filepath.Join(b.TempDir(), "mem")
	data := make([]byte, 128<<20)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.Fatal(err)
	}
	for name, digest := range map[string]func(context.Context, string) (File, error){"pieces": Digest, "one after the other": OldDigest} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				if _, err := digest(b.Context(), path); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
