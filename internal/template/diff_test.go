package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// disk makes a file of size bytes with these blocks, each filled with its byte.
func disk(t testing.TB, size int64, blocks map[int64]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for n, with := range blocks {
		at := n * diffBlock
		if _, err := f.WriteAt(bytes.Repeat([]byte{with}, int(min(diffBlock, size-at))), at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// taken is what a file takes on the disk.
func taken(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestDiff(t *testing.T) {
	const mib = 1 << 20
	for name, c := range map[string]struct {
		oldSize, newSize int64
		older, newer     map[int64]byte
		atMost           int64 // bytes of the difference
	}{
		"nothing":              {8 * mib, 8 * mib, nil, nil, 100},
		"the same":             {8 * mib, 8 * mib, map[int64]byte{3: 1, 900: 2}, map[int64]byte{3: 1, 900: 2}, 100},
		"one block":            {8 * mib, 8 * mib, map[int64]byte{3: 1, 900: 2}, map[int64]byte{3: 1, 900: 3}, 4300},
		"one more":             {8 * mib, 8 * mib, map[int64]byte{3: 1}, map[int64]byte{3: 1, 4: 1}, 4300},
		"one zeroed":           {8 * mib, 8 * mib, map[int64]byte{3: 1, 900: 2}, map[int64]byte{3: 1, 900: 0}, 100},
		"one a hole":           {8 * mib, 8 * mib, map[int64]byte{3: 1, 900: 2}, map[int64]byte{3: 1}, 100},
		"zeros in a hole":      {8 * mib, 8 * mib, map[int64]byte{3: 1}, map[int64]byte{3: 1, 900: 0}, 100},
		"first and last":       {8 * mib, 8 * mib, nil, map[int64]byte{0: 1, 2047: 2}, 8400},
		"zeroed beside filled": {8 * mib, 8 * mib, map[int64]byte{5: 1, 6: 1, 7: 1}, map[int64]byte{5: 2, 6: 0, 7: 3}, 8500},
		"grown":                {mib, 8 * mib, map[int64]byte{3: 1}, map[int64]byte{3: 1, 1000: 1}, 4300},
		"cut":                  {8 * mib, mib, map[int64]byte{3: 1, 1000: 1}, map[int64]byte{3: 1}, 100},
		"an odd end":           {mib + 700, mib + 700, nil, map[int64]byte{256: 9}, 1000},
		"an odd end zeroed":    {mib + 700, mib + 700, map[int64]byte{256: 9}, nil, 100},
		"to nothing":           {mib, 0, map[int64]byte{3: 1}, nil, 100},
		"far apart":            {maxDiffFile, maxDiffFile, map[int64]byte{1 << 27: 1}, map[int64]byte{1<<27 + 5: 1}, 4400},
	} {
		t.Run(name, func(t *testing.T) {
			older, newer := disk(t, c.oldSize, c.older), disk(t, c.newSize, c.newer)
			diff := filepath.Join(t.TempDir(), "diff")
			if err := Diff(t.Context(), diff, older, newer); err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Stat(diff); err != nil || fi.Size() > c.atMost {
				t.Errorf("the difference: %d bytes, %v", fi.Size(), err)
			}
			if err := Patch(t.Context(), older, diff); err != nil {
				t.Fatal(err)
			}
			same(t, older, newer)
			if a, b := taken(t, older), taken(t, newer); a > b+64<<10 {
				t.Errorf("it takes %d bytes, the original %d", a, b)
			}
		})
	}
}

// same demands that two files, which may be mostly holes, have the same contents.
func same(t *testing.T, got, want string) {
	t.Helper()
	rest := filepath.Join(t.TempDir(), "rest")
	if err := Diff(t.Context(), rest, got, want); err != nil {
		t.Fatal(err)
	}
	a, b := must(os.Stat(got)), must(os.Stat(want))
	if left := must(os.Stat(rest)); left.Size() != int64(diffHeader+diffRun+sha256.Size) || a.Size() != b.Size() {
		t.Errorf("%d and %d bytes, with a difference of %d", a.Size(), b.Size(), left.Size())
	}
	if b.Size() <= 64<<20 && !bytes.Equal(must(os.ReadFile(got)), must(os.ReadFile(want))) {
		t.Error("the contents differ")
	}
}

// A chain of differences leads from nothing to the last file, as the cache of a build's
// steps does.
func TestDiffChain(t *testing.T) {
	const blocks = 1024
	random := rand.New(rand.NewPCG(1, 2))
	state := map[int64]byte{}
	size := int64(blocks * diffBlock)
	older, built := "", filepath.Join(t.TempDir(), "built")
	for range 12 {
		for range 50 {
			at := random.Int64N(blocks)
			switch run := random.Int64N(20); random.IntN(4) {
			case 0:
				delete(state, at)
			case 1:
				state[at] = 0
			default:
				for i := at; i < min(at+run, blocks); i++ {
					state[i] = byte(1 + random.IntN(255))
				}
			}
		}
		newer := disk(t, size, state)
		diff := filepath.Join(t.TempDir(), "diff")
		if err := Diff(t.Context(), diff, older, newer); err != nil {
			t.Fatal(err)
		}
		if err := Patch(t.Context(), built, diff); err != nil {
			t.Fatal(err)
		}
		same(t, built, newer)
		older = newer
	}
}

func TestDiffThatEnds(t *testing.T) {
	older, newer := disk(t, 8<<20, nil), disk(t, 8<<20, map[int64]byte{7: 1})
	dir := t.TempDir()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	dst := filepath.Join(dir, "diff")
	if err := Diff(ended, dst, older, newer); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := Diff(t.Context(), dst, older, filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if err := Diff(t.Context(), dst, older, dir); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("of a directory: %v", err)
	}
	if _, err := os.Lstat(dst); !os.IsNotExist(err) {
		t.Errorf("it left something: %v", err)
	}
	if err := Diff(t.Context(), dst, older, newer); err != nil {
		t.Fatal(err)
	}
	if err := Diff(t.Context(), dst, older, newer); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another: %v", err)
	}
	if err := Patch(ended, older, dst); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := Patch(t.Context(), disk(t, 4<<20, nil), dst); !errors.Is(err, errdefs.Corrupt) {
		t.Errorf("of a file of another size: %v", err)
	}
}

// No damage of a difference changes what it is applied to.
func TestPatchOfDamage(t *testing.T) {
	older, newer := disk(t, 1<<20, map[int64]byte{1: 1, 9: 9}), disk(t, 1<<20, map[int64]byte{1: 2, 30: 3})
	diff := filepath.Join(t.TempDir(), "diff")
	if err := Diff(t.Context(), diff, older, newer); err != nil {
		t.Fatal(err)
	}
	whole, before := must(os.ReadFile(diff)), must(os.ReadFile(older))
	bad := map[string][]byte{"empty": nil, "longer": append(bytes.Clone(whole), 0)}
	for _, n := range []int{1, 8, diffHeader - 1, diffHeader, diffHeader + 7, diffHeader + diffRun + 5, len(whole) - 33, len(whole) - 1} {
		bad["cut at "+string(rune('a'+len(bad)))] = whole[:n]
	}
	for at := 0; at < len(whole); at += 1 + at/16 {
		flipped := bytes.Clone(whole)
		flipped[at] ^= 0x40
		bad["flipped "+string(rune('a'+len(bad)))] = flipped
	}
	for name, data := range bad {
		if err := os.WriteFile(diff, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Patch(t.Context(), older, diff); !errors.Is(err, errdefs.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(must(os.ReadFile(older)), before) {
			t.Fatalf("%s: it changed the file", name)
		}
	}
}

// A full disk ends both with a sentence.
func TestDiffWithoutRoom(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	blocks := map[int64]byte{}
	for i := range int64(100) {
		blocks[i*2] = byte(i + 1)
	}
	newer, diff := disk(t, 1<<20, blocks), filepath.Join(t.TempDir(), "diff")
	full := filepath.Join(dir, "diff")
	err := Diff(t.Context(), full, "", newer)
	if !errors.Is(err, errdefs.Exhausted) || strings.Contains(err.Error(), dir) {
		t.Errorf("compare: %v", err)
	}
	if _, err := os.Lstat(full); !os.IsNotExist(err) {
		t.Errorf("it left something: %v", err)
	}
	if err := Diff(t.Context(), diff, "", newer); err != nil {
		t.Fatal(err)
	}
	if err := Patch(t.Context(), filepath.Join(dir, "disk"), diff); !errors.Is(err, errdefs.Exhausted) {
		t.Errorf("patch: %v", err)
	}
}

// sealedDiff makes a difference of arbitrary runs whose checksums are right.
func sealedDiff(older, newer uint64, runs []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte(diffMagic), older)
	b = binary.LittleEndian.AppendUint64(b, newer)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	b = append(b, runs...)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func FuzzPatch(f *testing.F) {
	run := func(at, length uint64, data ...byte) []byte {
		return append(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, at), length), data...)
	}
	end := run(0, 0)
	f.Add(uint64(0), uint64(8192), append(run(4096, 5, 1, 2, 3, 4, 5), end...), true)
	f.Add(uint64(8192), uint64(8192), append(run(0, diffZeros|4096), end...), true)
	f.Add(uint64(8192), uint64(1<<40), append(run(1<<39, diffZeros|1<<38), end...), true)
	f.Add(uint64(8192), uint64(4096), append(run(4096, 1<<62), end...), true)
	f.Add(uint64(8192), uint64(4096), end, false)
	f.Fuzz(func(t *testing.T, older, newer uint64, runs []byte, sealed bool) {
		dir := t.TempDir()
		dst, diff := filepath.Join(dir, "dst"), filepath.Join(dir, "diff")
		data := runs
		if sealed {
			data = sealedDiff(older, newer, runs)
		}
		before := bytes.Repeat([]byte("8 bytes."), 1024)
		if err := errors.Join(os.WriteFile(dst, before, 0o600), os.WriteFile(diff, data, 0o600)); err != nil {
			t.Fatal(err)
		}
		err := Patch(t.Context(), dst, diff)
		fi, e := os.Stat(dst)
		if e != nil {
			t.Fatal(e)
		}
		switch {
		case err == nil && (fi.Size() != int64(newer) || newer > uint64(maxDiffFile) || older != uint64(len(before))):
			t.Fatalf("from %d to %d: %d bytes", older, newer, fi.Size())
		case err != nil && !errors.Is(err, errdefs.Corrupt):
			t.Fatalf("%v has no class", err)
		case err != nil && !bytes.Equal(must(os.ReadFile(dst)), before):
			t.Fatalf("%v, and yet it changed the file", err)
		}
	})
}
