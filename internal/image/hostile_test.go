package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// small are limits that a test can reach.
var small = Limits{
	Layers: 4, Entries: 3000, NameBytes: 3072, LinkBytes: 4095, FileBytes: 8 << 20, TotalBytes: 16 << 20, BlobBytes: 8 << 20,
	Ratio: 50, RatioFrom: 1 << 20,
}

// raw is an archive of one header whose fields are as given, which archive/tar would not write.
func raw(name, link string, kind byte) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        ")
	b[156] = kind
	copy(b[157:], link)
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(b, make([]byte, 1024)...)
}

func many(n int, name func(i int) entry) (out []entry) {
	for i := range n {
		out = append(out, name(i))
	}
	return out
}

// Each hostile image ends with a sentence, and nothing of it stays, neither in the store
// nor beside it.
func TestHostileImages(t *testing.T) {
	testenv.Root(t)
	outside := filepath.Join(t.TempDir(), "outside") // where escapes would lead to
	symlink := func(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeSymlink} }
	hard := func(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeLink} }
	up := strings.Repeat("../", 30)
	one := func(e ...entry) [][]byte { return [][]byte{archiveOf(t, e...)} }
	part := strings.Repeat("p", 250)
	zeros := strings.Repeat("\x00", 6<<20)
	for _, c := range []struct {
		name   string
		layers [][]byte
		class  *errdefs.Class
		text   string
	}{
		{"name with ..", one(entry{name: up + outside}), errdefs.InvalidArgument, "leads out"},
		{"absolute name with ..", one(entry{name: "/a/../../" + outside}), errdefs.InvalidArgument, "leads out"},
		{"only ..", one(entry{name: ".."}), errdefs.InvalidArgument, "leads out"},
		{"link with ..", one(symlink("d", up+outside), entry{name: "d/f"}), errdefs.InvalidArgument, "leads out"},
		{"hard link with ..", one(hard("d", up+"etc/passwd")), errdefs.InvalidArgument, "leads out"},
		{"hard link to the host", one(hard("d", "/etc/passwd")), errdefs.InvalidArgument, "not there"},
		{"hard link through a link", one(symlink("l", "/etc"), hard("d", "l/passwd")), errdefs.InvalidArgument, "not there"},
		{"hard link to a directory", one(entry{name: "d/"}, hard("l", "d")), errdefs.InvalidArgument, "directory"},
		{"links in a circle", one(symlink("a", "b"), symlink("b", "a"), entry{name: "a/f"}), errdefs.InvalidArgument, "loop"},
		{"below a file", one(entry{name: "a"}, entry{name: "a/f"}), errdefs.InvalidArgument, "no directory"},
		{"link to nothing", one(symlink("l", outside), entry{name: "l/f"}), errdefs.InvalidArgument, "link to nothing"},
		{"whiteout of the directory", one(entry{name: "d/.wh.."}), errdefs.InvalidArgument, "whiteout"},
		{"whiteout of the parent", one(entry{name: "d/.wh..."}), errdefs.InvalidArgument, "whiteout"},
		{"whiteout of nothing", one(entry{name: "d/.wh."}), errdefs.InvalidArgument, "whiteout"},
		{"below a whiteout", one(entry{name: "d/.wh.x/f"}), errdefs.InvalidArgument, "whiteout"},
		{"root that is a file", one(entry{name: "."}), errdefs.InvalidArgument, "root"},
		{"unknown type", [][]byte{raw("a", "", 'Z')}, errdefs.InvalidArgument, "type"},
		{"link to no name", [][]byte{raw("a", "", tar.TypeSymlink)}, errdefs.InvalidArgument, "0 bytes"},
		{"negative owner", one(entry{name: "a", uid: -2}), errdefs.InvalidArgument, "owner"},
		{"owner out of range", one(entry{name: "a", gid: 1<<32 - 1}), errdefs.InvalidArgument, "owner"},
		{"device out of range", one(entry{name: "a", kind: tar.TypeChar, major: 1 << 13}), errdefs.InvalidArgument, "device"},
		{"giant name", one(entry{name: strings.Repeat("n/", 2000)}), errdefs.InvalidArgument, "name of 4000 bytes"},
		{"giant part of a name", one(entry{name: strings.Repeat("n", 256)}), errdefs.InvalidArgument, "too long"},
		{"giant link", one(symlink("l", strings.Repeat("n", 5000))), errdefs.InvalidArgument, "5000 bytes"},
		{"path that links make too long", one(symlink("l", strings.Repeat(part+"/", 10)),
			entry{name: strings.Repeat(part+"/", 10)}, entry{name: "l/" + strings.Repeat(part+"/", 5)}), errdefs.InvalidArgument, "too long"},
		{"deep directories", one(entry{name: strings.Repeat("n/", 400)}, symlink("l", strings.Repeat("n/", 400)),
			entry{name: "l/" + strings.Repeat("n/", 101)}), errdefs.InvalidArgument, "nested"},
		{"lost+found that is a file", one(entry{name: "lost+found"}), errdefs.InvalidArgument, "lost+found"},
		{"giant attributes", one(entry{name: "a", xattrs: map[string]string{"user.a": strings.Repeat("x", 5000)}}),
			errdefs.InvalidArgument, "attributes"},
		{"attribute without a meaning", one(entry{name: "a", xattrs: map[string]string{"security.capability": "xx"}}),
			errdefs.InvalidArgument, "security.capability"},
		{"many entries", one(many(3100, func(i int) entry { return entry{name: fmt.Sprint("d/", i)} })...), errdefs.Exhausted, "3000 entries"},
		{"many directories", one(many(16, func(i int) entry { return entry{name: fmt.Sprint(i, strings.Repeat("/d", 200), "/f")} })...),
			errdefs.Exhausted, "3000 entries"},
		{"large file", one(entry{name: "f", text: strings.Repeat("x", 9<<20)}), errdefs.Exhausted, "a file of"},
		{"large files", one(entry{name: "f", text: zeros}, entry{name: "g", text: zeros}, entry{name: "h", text: zeros}),
			errdefs.Exhausted, "files have"},
		{"bomb of sparse files", [][]byte{sparse(t, 3, 7<<20)}, errdefs.Exhausted, "files have"},
		{"many bombs", [][]byte{archiveOf(t, entry{name: "a", text: noise(7 << 20)}), archiveOf(t, entry{name: "a", text: noise(7 << 20)}),
			archiveOf(t, entry{name: "a", text: noise(7 << 20)})}, errdefs.Exhausted, "have more than"},
		{"bomb of gzip", [][]byte{gzipped(make([]byte, 12<<20))}, errdefs.Exhausted, "times larger"},
		{"bomb of zstd", [][]byte{zstded(make([]byte, 12<<20))}, errdefs.Exhausted, "times larger"},
		{"no archive", [][]byte{[]byte(strings.Repeat("text ", 1000))}, errdefs.InvalidArgument, "tar"},
		{"damaged gzip", [][]byte{damaged(gzipped(archiveOf(t, entry{name: "a", text: noise(1 << 20)})))}, errdefs.InvalidArgument, "damaged"},
		{"cut off", [][]byte{gzipped(archiveOf(t, entry{name: "a", text: "1"}))[:60]}, errdefs.InvalidArgument, "damaged"},
		{"cut off archive", [][]byte{archiveOf(t, entry{name: "a", text: noise(4096)})[:2000]}, errdefs.InvalidArgument, "complete"},
		{"xz", [][]byte{[]byte("\xfd7zXZ\x00 and more")}, errdefs.Unsupported, "xz"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			testenv.NoLeaks(t, dir)
			checkHostile(t, dir, c.layers, c.class, c.text)
			if _, err := os.Lstat(outside); !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("something is outside: %v", err)
			}
		})
	}
}

func checkHostile(t *testing.T, dir string, layers [][]byte, class *errdefs.Class, text string) {
	t.Helper()
	s, err := Open(dir, quiet(), small)
	if err != nil {
		t.Fatal(err)
	}
	var img Image
	for _, l := range layers {
		layer := Layer{Digest: digestOf(l), DiffID: digestOf(l), Size: int64(len(l))}
		if err := os.WriteFile(s.blob(layer.Digest), l, 0o600); err != nil {
			t.Fatal(err)
		}
		img.Layers = append(img.Layers, layer)
	}
	_, err = s.Root(t.Context(), img, nil)
	if errdefs.ClassOf(err) != class || !strings.Contains(say(err), text) || !strings.Contains(say(err), "layer") || len(say(err)) > 1000 {
		t.Errorf("got %v, %v", errdefs.ClassOf(err), err)
	}
	if u, err := s.Usage(); err != nil || u.Working != 0 || u.Roots != 0 {
		t.Errorf("left %+v, %v", u, err)
	}
	if _, err := s.Prune(t.Context(), Keep{}); err != nil || len(left(t, s.dir)) != 0 {
		t.Errorf("left %v, %v", left(t, s.dir), err)
	}
}

// sparse is an archive of files without data.
func sparse(t *testing.T, files int, size int64) []byte {
	t.Helper()
	testenv.Program(t, "tar")
	dir := t.TempDir()
	for i := range files {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600),
			os.Truncate(filepath.Join(dir, fmt.Sprint(i)), size)); err != nil {
			t.Fatal(err)
		}
	}
	out, err := execOutput(t, "tar", "-C", dir, "--sparse", "-cf", "-", ".")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// noise does not compress.
func noise(size int) string {
	b := make([]byte, size)
	rand.New(rand.NewSource(1)).Read(b)
	return string(b)
}

func damaged(b []byte) []byte {
	b = bytes.Clone(b)
	for i := len(b) / 2; i < len(b)/2+100; i++ {
		b[i] ^= 0x55
	}
	return b
}
