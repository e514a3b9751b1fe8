package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// imported brings an image of archives into a store.
func imported(t testing.TB, s *Store, archives ...[]byte) Image {
	t.Helper()
	img := makeImage(t, v1.Config{}, archives...)
	out := Image{Layers: img.layers}
	for digest, blob := range img.blobs {
		if err := os.WriteFile(s.blob(digest), blob, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func rootPrograms(t testing.TB) {
	t.Helper()
	testenv.Root(t)
	testenv.Program(t, "mke2fs", "resize2fs", "debugfs", "e2fsck")
}

// inExt4 asks debugfs about a file of an ext4.
func inExt4(t testing.TB, file, request string) string {
	t.Helper()
	out, err := execOutput(t, "debugfs", "-R", request, file)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// stat is debugfs's view of a file in the words of listing.
func stat(t testing.TB, file, name string) string {
	t.Helper()
	out := inExt4(t, file, fmt.Sprintf("stat \"%s\"", name))
	m := regexp.MustCompile(`(?s)Type: (.*?) +Mode: +(\d+).*?User: +(\d+) +Group: +(\d+).*?` +
		`Links: (\d+).*? mtime: 0x([0-9a-f]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("%s: %s", name, out)
	}
	line := strings.Join(m[1:], " ")
	if dev := regexp.MustCompile(`Device major/minor number: (\S+)`).FindStringSubmatch(out); dev != nil {
		line += " " + dev[1]
	}
	return line
}

// All that a tree has is in the ext4.
func TestRootEveryKind(t *testing.T) {
	rootPrograms(t)
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	s := open(t, dir)
	path, err := s.Root(t.Context(), imported(t, s, archiveOf(t, everything()...)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := execOutput(t, "e2fsck", "-f", "-n", path); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	for name, want := range map[string]string{
		"/":           "directory 0755 0 0 11 6553f100", // mke2fs gives it its own time
		"/etc":        "directory 0750 3 4 2 5f5e1000",
		"/etc/passwd": "regular 0640 1 100000 1 5f5e1000",
		"/bin/su":     "regular 04755 0 0 2 5f5e1000",
		"/bin/hard":   "regular 04755 0 0 2 5f5e1000",
		"/bin/ping":   "regular 0755 0 0 1 5f5e1000",
		"/lib":        "symlink 0777 0 0 1 5f5e1000",
		"/tmp":        "directory 01777 0 0 2 5f5e1000",
		"/srv":        "directory 02775 0 50 2 5f5e1000",
		"/dev/null":   "character special 0666 0 0 1 5f5e1000 01:03",
		"/dev/sda":    "block special 0660 0 6 1 5f5e1000 08:1024",
		"/run/fifo":   "FIFO 0600 0 0 1 5f5e1000",
		"/old":        "regular 0644 0 0 1 fffffffb",
	} {
		if got := stat(t, path, name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	for name, want := range map[string]string{"/etc/passwd": "root\n", "/lost+found/x": "found"} {
		if got := inExt4(t, path, "cat "+name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	for _, name := range []string{"security.capability (20)", "user.note (1)"} {
		if got := inExt4(t, path, "ea_list /bin/ping"); !strings.Contains(got, name) {
			t.Errorf("attributes: %s", got)
		}
	}
	long := "/" + strings.Repeat("d", 200) + "/" + strings.Repeat("e", 120) + "/file"
	if got := inExt4(t, path, "cat "+long); got != "deep" {
		t.Errorf("long name: %q", got)
	}
	if names := left(t, s.dir); len(names) != 3 { // blob, its DiffID, root layer
		t.Errorf("left %v", names)
	}
}

// A root layer is made once for the same layers, however they are compressed, at the same
// time too.
func TestRootIsMadeOnce(t *testing.T) {
	rootPrograms(t)
	s := open(t, t.TempDir())
	plainImage := imported(t, s, archiveOf(t, everything()...))
	other := imported(t, s, zstded(archiveOf(t, everything()...)))
	var wg sync.WaitGroup
	paths := make([]string, 4)
	for i := range paths {
		wg.Go(func() {
			var err error
			if paths[i], err = s.Root(t.Context(), plainImage, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	before, err := os.Stat(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	path, err := s.Root(t.Context(), other, nil)
	after, statErr := os.Stat(path)
	if err != nil || statErr != nil || paths[0] != paths[3] || path != paths[0] || !os.SameFile(before, after) {
		t.Errorf("%v and %s: %v, %v", paths, path, err, statErr)
	}
}

// A stored blob that the disk has changed is found out and brought again.
func TestRootOfDamagedBlob(t *testing.T) {
	rootPrograms(t)
	s := open(t, t.TempDir())
	img := imported(t, s, archiveOf(t, entry{name: "a", text: "some text"}))
	blob := s.blob(img.Layers[0].Digest)
	b, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 0x55
	if err := os.WriteFile(blob, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Root(t.Context(), img, nil); errdefs.ClassOf(err) != errdefs.Corrupt {
		t.Errorf("got %v", err)
	}
	if names := left(t, s.dir); len(names) != 0 {
		t.Errorf("left %v", names)
	}
	if _, err := s.Root(t.Context(), img, nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("without the blob: %v", err)
	}
}

func TestRootCancelled(t *testing.T) {
	rootPrograms(t)
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	s := open(t, dir)
	img := imported(t, s, archiveOf(t, entry{name: "big", text: strings.Repeat("0123456789", 4<<20)}))
	for _, stage := range []string{Unpacking, Packing} {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := s.Root(ctx, img, func(p Progress) {
			if p.Stage == stage {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", stage, err)
		}
		for _, n := range left(t, s.dir) {
			if n[0] == '.' {
				t.Errorf("%s: left %s", stage, n)
			}
		}
	}
}

// A full disk ends the work with a sentence, and what was made is freed.
func TestRootDiskFull(t *testing.T) {
	rootPrograms(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := open(t, dir)
	for _, size := range []int{32 << 20, 14 << 20} { // too much to unpack, too much to pack
		img := imported(t, s, archiveOf(t, entry{name: "big", text: strings.Repeat("0123456789abcdef", size/16)}))
		_, err := s.Root(t.Context(), img, nil)
		if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(say(err), "disk is full") || strings.Contains(say(err), dir) {
			t.Errorf("%d bytes: %v", size, err)
		}
		for _, n := range left(t, dir) {
			if n[0] == '.' {
				t.Errorf("left %s", n)
			}
		}
	}
}

// A pull for which there is no room is refused before it begins, and one whose room is
// taken by something else while it goes on ends.
func TestPullDiskFull(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s, reg, img := open(t, dir), newRegistry(t), bigImage(t, 30<<20)
	_, err := s.Pull(t.Context(), reg.push(t, "i", "v1", img), Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(say(err), "room") || len(left(t, dir)) != 0 {
		t.Errorf("got %v, left %v", err, left(t, dir))
	}
	img = bigImage(t, 16<<20)
	ref := reg.push(t, "i", "v2", img)
	reg.meddle(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, img.layers[0].Digest) {
			if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 20<<20), 0o600); err != nil {
				t.Error(err)
			}
		}
		return false
	})
	_, err = s.Pull(t.Context(), ref, Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(say(err), "disk is full") || len(left(t, dir)) != 0 {
		t.Errorf("got %v, left %v", err, left(t, dir))
	}
	if n := len(reg.requests("GET /v2/i/blobs/" + img.layers[0].Digest)); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestFromTar(t *testing.T) {
	rootPrograms(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "root.ext4")
	if err := FromTar(t.Context(), file, bytes.NewReader(gzipped(archiveOf(t, everything()...))), Limits{}); err != nil {
		t.Fatal(err)
	}
	if got := inExt4(t, file, "cat /etc/passwd"); got != "root\n" {
		t.Errorf("passwd: %q", got)
	}
	bad := filepath.Join(dir, "bad.ext4")
	if err := FromTar(t.Context(), bad, strings.NewReader("no tar"), Limits{}); errdefs.ClassOf(err) != errdefs.InvalidArgument {
		t.Errorf("got %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}

// inMemory is a directory in memory: a hundred thousand files take minutes on some disks.
func inMemory(t testing.TB) string {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// An image of 100,000 files is possible. All of them in one directory are not, because
// mke2fs would take an hour.
func TestRootOfManyFiles(t *testing.T) {
	rootPrograms(t)
	s := open(t, inMemory(t))
	path, err := s.Root(t.Context(), imported(t, s, archiveOf(t, many(100_000, func(i int) entry {
		return entry{name: fmt.Sprintf("usr/%d/%d", i/1000, i), text: "x"}
	})...)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := inExt4(t, path, "cat /usr/99/99999"); got != "x" {
		t.Errorf("the last file has %q", got)
	}
	_, err = s.Root(t.Context(), imported(t, s, archiveOf(t, many(64_000, func(i int) entry {
		return entry{name: fmt.Sprintf("one/%d", i)}
	})...)), nil)
	if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(say(err), "too many entries") {
		t.Errorf("in one directory: %v", err)
	}
	if u, err := s.Usage(); err != nil || u.Working != 0 {
		t.Errorf("left %+v, %v", u, err)
	}
}

// The EROFS of an image is made of the tree that the ext4 is made of, once, and before the
// ext4 or after it.
func TestFlat(t *testing.T) {
	rootPrograms(t)
	testenv.Program(t, "mkfs.erofs", "fsck.erofs")
	for _, rootFirst := range []bool{false, true} {
		s := open(t, t.TempDir())
		img := imported(t, s, archiveOf(t, everything()...))
		stages := 0
		count := func(p Progress) {
			if p.Stage == Unpacking && p.Done == 0 {
				stages++
			}
		}
		file := func(of func(context.Context, Image, func(Progress)) (string, error)) (string, os.FileInfo) {
			t.Helper()
			path, err := of(t.Context(), img, count)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			return path, info
		}
		var before os.FileInfo
		if rootFirst {
			_, before = file(s.Root)
			stages = 0
		}
		flat, info := file(s.Flat)
		_, ext4 := file(s.Root)
		if rootFirst && !os.SameFile(before, ext4) {
			t.Error("the ext4 was made again")
		}
		if again, _ := file(s.Flat); again != flat || stages != 1 {
			t.Errorf("%s, then %s; unpacked %d times", flat, again, stages)
		}
		flatHolds(t, flat)
		if names := left(t, s.dir); len(names) != 3 { // blob, its DiffID, the directory of both roots
			t.Errorf("left %v", names)
		}
		if u, err := s.Usage(); err != nil || u.Roots < info.Size() || u.Roots > ext4.Size()+info.Size()+1<<16 {
			t.Errorf("usage %+v, %v", u, err)
		}
	}
}

// flatHolds demands that an EROFS holds files of everything.
func flatHolds(t *testing.T, flat string) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	if said, err := execOutput(t, "fsck.erofs", "--extract="+out, flat); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	long := strings.Repeat("d", 200) + "/" + strings.Repeat("e", 120) + "/file"
	for name, want := range map[string]string{"etc/passwd": "root\n", long: "deep"} {
		if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// A root goes with both of its files.
func TestPruneFlat(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s.dir, "roots/r1/root.erofs", time.Hour)
	put(t, s.dir, "roots/r1/root.ext4", time.Hour)
	if freed, err := s.Prune(t.Context(), Keep{}); err != nil || freed != 8192 || len(left(t, s.dir)) != 0 {
		t.Errorf("freed %d, %v, left %v", freed, err, left(t, s.dir))
	}
}
