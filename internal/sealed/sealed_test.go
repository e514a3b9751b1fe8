package sealed_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

type object struct {
	Text string `json:"text"`
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file.json")
	var got object
	if err := sealed.Read(path, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("read of a missing file: %v", err)
	}
	for _, text := range []string{"a", "größer \"and\" longer", ""} {
		if err := sealed.Write(path, object{text}); err != nil {
			t.Fatal(err)
		}
		if err := sealed.Read(path, &got); err != nil || got.Text != text {
			t.Fatalf("got %q, %v", got.Text, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("%d files are left", len(entries))
	}
}

// TestEveryFlippedBitIsSeen also cuts the file at every length.
func TestEveryFlippedBitIsSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file.json")
	if err := sealed.Write(path, object{"text"}); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var bad [][]byte
	for i := range good {
		bad = append(bad, good[:i])
		for bit := range 8 {
			flipped := append([]byte(nil), good...)
			flipped[i] ^= 1 << bit
			if flipped[i]|0x20 == good[i]|0x20 && i >= 8 && i < 16 {
				continue // a checksum's digit in upper case is the same digit
			}
			bad = append(bad, flipped)
		}
	}
	for _, data := range bad {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		var got object
		if err := sealed.Read(path, &got); !errors.Is(err, errdefs.Corrupt) {
			t.Fatalf("%q: %v", data, err)
		}
	}
}

func TestFailedWriteKeepsTheOldContent(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file.json")
	if err := sealed.Write(path, object{"old"}); err != nil {
		t.Fatal(err)
	}
	if err := sealed.Write(path, func() {}); err == nil {
		t.Error("a function was written")
	}
	var got object
	if err := sealed.Read(path, &got); err != nil || got.Text != "old" {
		t.Errorf("got %q, %v", got.Text, err)
	}
}
