package template

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// TestSealDigs: a sealed file keeps its bytes, and takes disk only for those that
// are not zero.
func TestSealDigs(t *testing.T) {
	// Data, zeros beyond the borders of pages and pieces, data, zeros at the end.
	data := make([]byte, 5*snapfile.PieceBytes+snapfile.PageBytes)
	for _, at := range []int{0, snapfile.PageBytes - 1, 3 * snapfile.PageBytes, snapfile.PieceBytes - 1, 3*snapfile.PieceBytes + 100} {
		data[at] = 0xaa
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "mem")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	digestOf := func() File {
		t.Helper()
		f, err := snapfile.Digest(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	before := digestOf()
	if err := SealState(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the content has changed, %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if kept := st.Blocks * 512; kept > 16*snapfile.PageBytes {
		t.Errorf("%d bytes are kept for 4 pages", kept)
	}
	if after := digestOf(); after != before {
		t.Errorf("the digest was %+v and is %+v", before, after)
	}
	if err := verifyState(t, dir); err != nil {
		t.Error(err)
	}
}

// TestStateIsVerified: a byte that is flipped anywhere in a sealed directory is
// found, and so is a file that is cut short, made longer or removed.
func TestStateIsVerified(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	dir := t.TempDir()
	names := []string{"mem", "overlay.ext4", "state"}
	for i, name := range names {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(int64(i+1) * 3 * snapfile.PieceBytes); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if _, err := f.WriteAt([]byte("something"), rnd.Int64N(3*snapfile.PieceBytes-9)); err != nil {
				t.Fatal(err)
			}
		}
		f.Close()
	}
	if err := SealState(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := verifyState(t, dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(names, manifestFile) {
		path := filepath.Join(dir, name)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for range 30 {
			at, bit := rnd.IntN(len(before)), byte(1)<<rnd.IntN(8)
			damaged := bytes.Clone(before)
			damaged[at] ^= bit
			wantDamage(t, dir, path, damaged, before, fmt.Sprintf("%s: bit %#x of byte %d", name, bit, at))
		}
		wantDamage(t, dir, path, before[:len(before)-1], before, name+" cut short")
		wantDamage(t, dir, path, append(bytes.Clone(before), 'x'), before, name+" longer")
	}
	if err := verifyState(t, dir); err != nil {
		t.Errorf("all is back: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, manifestFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(dir); errdefs.ClassOf(err) != errdefs.Corrupt {
		t.Errorf("no manifest: %v", err)
	}
}

// wantDamage puts damaged in place of a file for as long as it is looked at. A
// manifest may be damaged without harm: a name that nothing reads, a space.
func wantDamage(t *testing.T, dir, path string, damaged, before []byte, what string) {
	t.Helper()
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	err := verifyState(t, dir)
	harmless := filepath.Base(path) == manifestFile && err == nil
	if errdefs.ClassOf(err) != errdefs.Corrupt && !harmless {
		t.Errorf("%s: %v", what, err)
	}
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
}

func verifyState(t *testing.T, dir string) error {
	state, err := OpenState(dir)
	if err != nil {
		return err
	}
	return state.Verify(t.Context())
}

// TestStateIsVerifiedInPart: damage is told by those that read the damaged file.
func TestStateIsVerifiedInPart(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"mem", "disk"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("something"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := SealState(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "mem"), []byte("some-hing"), 0o600); err != nil {
		t.Fatal(err)
	}
	state, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := state.Verify(t.Context(), "disk"); err != nil {
		t.Error(err)
	}
	for _, names := range [][]string{nil, {"mem"}, {"disk", "mem"}, {"other"}, {manifestFile}} {
		if err := state.Verify(t.Context(), names...); errdefs.ClassOf(err) != errdefs.Corrupt {
			t.Errorf("%q: %v", names, err)
		}
	}
}
