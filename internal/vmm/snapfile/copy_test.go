package snapfile

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// randomFile makes a file of holes, written zeros and data, whose borders are
// anywhere.
func randomFile(t *testing.T, rnd *rand.Rand, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := rnd.Int64N(6*PieceBytes) + 1
	if rnd.IntN(2) == 0 {
		size = (size/PageBytes + 1) * PageBytes
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range rnd.IntN(40) {
		at := rnd.Int64N(size)
		data := make([]byte, min(size-at, rnd.Int64N(3*PageBytes)+1))
		if rnd.IntN(3) > 0 {
			for i := range data {
				data[i] = byte(rnd.Uint32())
			}
		}
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCopy: a copy has the bytes of its source, the digest that a reader of either
// computes, and no more data than it needs.
func TestCopy(t *testing.T) {
	dir := t.TempDir()
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		randomFile(t, rnd, src)
		want := digestOf(t, src)
		got, err := CopyToKeep(t.Context(), dst, src)
		if err != nil {
			t.Fatal(err)
		}
		plain := filepath.Join(dir, "plain")
		if err := Copy(t.Context(), plain, src); err != nil {
			t.Fatal(err)
		}
		if of := digestOf(t, plain); of != want {
			t.Errorf("seed %d: the plain copy's digest is %+v, want %+v", seed, of, want)
		}
		os.Remove(plain)
		if got != want && got != (File{}) { // a clone has none
			t.Errorf("seed %d: copied with digest %+v, want %+v", seed, got, want)
		}
		if of := digestOf(t, dst); of != want {
			t.Errorf("seed %d: the copy's digest is %+v, want %+v", seed, of, want)
		}
		a, errA := os.ReadFile(src)
		b, errB := os.ReadFile(dst)
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("seed %d: the copy differs: %v, %v", seed, errA, errB)
		}
		var stA, stB unix.Stat_t
		if err := errors.Join(unix.Stat(src, &stA), unix.Stat(dst, &stB)); err != nil {
			t.Fatal(err)
		}
		if stB.Blocks > stA.Blocks {
			t.Errorf("seed %d: the copy takes %d blocks, its source %d", seed, stB.Blocks, stA.Blocks)
		}
		// Dug out, the source has the same contents and is no larger than the copy.
		if dug, err := Dig(t.Context(), src); err != nil || dug != want {
			t.Errorf("seed %d: dug: %+v, %v", seed, dug, err)
		}
		if c, err := os.ReadFile(src); err != nil || !bytes.Equal(a, c) {
			t.Errorf("seed %d: digging has changed the contents, %v", seed, err)
		}
		os.Remove(dst)
	}
}

// TestCopyLeavesNothing: a copy that fails leaves no file, wherever it fails.
func TestCopyLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := os.WriteFile(src, bytes.Repeat([]byte{1}, 8*PieceBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if err := Copy(ctx, dst, src); !errors.Is(err, gone) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cancelled: the copy is there: %v", err)
	}
	if err := os.WriteFile(dst, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Copy(t.Context(), dst, src); !errors.Is(err, os.ErrExist) {
		t.Errorf("there is a file: %v", err)
	}
	if b, err := os.ReadFile(dst); string(b) != "mine" {
		t.Errorf("the file that was there: %q, %v", b, err)
	}
}

// TestWriteIsCancelled in the middle of the source, and returns an error of the
// source.
func TestWriteIsCancelled(t *testing.T) {
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	source := Source{Size: 64 * PieceBytes, ReadAt: func(p []byte, at int64) (bool, error) {
		if at == 20*PieceBytes {
			cancel(gone)
		}
		return false, nil
	}}
	for n := range int64(64) {
		source.Pieces = append(source.Pieces, n)
	}
	write := func(ctx context.Context) error {
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, err = Write(ctx, f, source)
		return err
	}
	if err := write(ctx); !errors.Is(err, gone) {
		t.Errorf("cancelled: %v", err)
	}
	source.ReadAt = func([]byte, int64) (bool, error) { return false, gone }
	if err := write(t.Context()); !errors.Is(err, gone) {
		t.Errorf("a source that cannot be read: %v", err)
	}
}

// TestCopyToFullDisk leaves nothing and says that the disk is full.
func TestCopyToFullDisk(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("needs to mount a small file system: %v", err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(small, "dst")
	if err := os.WriteFile(src, bytes.Repeat([]byte{1}, 8*PieceBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, err := CopyToKeep(t.Context(), dst, src); !errdefs.IsDiskFull(err) {
			t.Errorf("full disk: %v", err)
		}
		if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the copy is there: %v", err)
		}
		// The removed file holds no room: nothing has it open.
		var fs unix.Statfs_t
		if err := unix.Statfs(small, &fs); err != nil || fs.Bfree != fs.Blocks {
			t.Fatalf("%d of %d blocks are free: %v", fs.Bfree, fs.Blocks, err)
		}
	}
}
