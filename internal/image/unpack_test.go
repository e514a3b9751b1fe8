package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

var day = time.Unix(1_600_000_000, 0)

// entry is one of an archive. Mode 0 is 0644, or 0755 of a directory.
type entry struct {
	name, link, text string
	kind             byte
	mode             int64
	uid, gid         int
	major, minor     int64
	xattrs           map[string]string
	when             time.Time
}

func archiveOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: e.mode, Size: int64(len(e.text)), Uid: e.uid, Gid: e.gid,
			Devmajor: e.major, Devminor: e.minor, ModTime: e.when,
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = day
		}
		if len(e.xattrs) > 0 {
			h.PAXRecords = map[string]string{}
			for k, v := range e.xattrs {
				h.PAXRecords[paxXattr+k] = v
			}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		if _, err := io.WriteString(w, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zstded(b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

func sources(layers ...[]byte) (out []source) {
	for i, l := range layers {
		out = append(out, source{name: fmt.Sprint("layer ", i+1), open: func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(l)), nil
		}})
	}
	return out
}

// unpacked unpacks layers into a directory and lists what is there, a line for each name.
func unpacked(t testing.TB, layers ...[]byte) (dir string, lines []string) {
	t.Helper()
	testenv.Root(t)
	dir = filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unpack(t.Context(), dir, sources(layers...), DefaultLimits, nil); err != nil {
		t.Fatal(err)
	}
	return dir, listing(t, dir)
}

// listing lists a tree: name, type and mode, owner, time, and what it holds or leads to.
// The first name of a file with several stands for it.
func listing(t testing.TB, dir string) (lines []string) {
	t.Helper()
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if at, ok := first[st.Ino]; ok {
			lines = append(lines, rel+" = "+at)
			return nil
		}
		if !d.IsDir() {
			first[st.Ino] = rel
		}
		line := fmt.Sprintf("%s %06o %d:%d %d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(b) > 64 {
				line += fmt.Sprintf(" %d bytes", len(b))
			} else {
				line += fmt.Sprintf(" %q", b)
			}
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		lines = append(lines, line+xattrsOf(t, path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func xattrsOf(t testing.TB, path string) string {
	t.Helper()
	var names, value [4096]byte
	n, err := unix.Llistxattr(path, names[:])
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name != "" {
			m, err := unix.Lgetxattr(path, name, value[:])
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf(" %s=%q", name, value[:m]))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "")
}

// capability is cap_net_raw=ep in the form that the kernel keeps.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// everything has an entry of each kind.
func everything() []entry {
	long := strings.Repeat("d", 200) + "/" + strings.Repeat("e", 120) + "/"
	return []entry{
		{name: "./", mode: 0o755, when: day.Add(time.Hour)},
		{name: "etc/", mode: 0o750, uid: 3, gid: 4},
		{name: "etc/passwd", text: "root\n", mode: 0o640, uid: 1, gid: 100_000},
		{name: "/absolute", text: "a"},
		{name: "bin/su", text: "#!", mode: 0o4755},
		{name: "bin/ping", text: "x", mode: 0o755, xattrs: map[string]string{"security.capability": capability, "user.note": "n"}},
		{name: "bin/sh", link: "su", kind: tar.TypeSymlink},
		{name: "bin/hard", link: "bin/su", kind: tar.TypeLink},
		{name: "lib", link: "/usr/lib", kind: tar.TypeSymlink},
		{name: "usr/lib/", mode: 0o755},
		{name: "lib/through", text: "link"},
		{name: "tmp/", mode: 0o1777},
		{name: "srv/", mode: 0o2775, gid: 50,
			xattrs: map[string]string{"user.dir": "d", "security.selinux": "s", "trusted.overlay.opaque": "y"}},
		{name: "srv/f", text: ""},
		{name: "dev/null", kind: tar.TypeChar, mode: 0o666, major: 1, minor: 3},
		{name: "dev/sda", kind: tar.TypeBlock, mode: 0o660, gid: 6, major: 8, minor: 1 << 10},
		{name: "run/fifo", kind: tar.TypeFifo, mode: 0o600},
		{name: "old", text: "o", when: time.Unix(-5, 0)},
		{name: long + "file", text: "deep"},
		{name: "link", link: strings.Repeat("t", 4095), kind: tar.TypeSymlink},
		{name: "lost+found/", mode: 0o700},
		{name: "lost+found/x", text: "found"},
		{name: "ünïcode \n", text: "u", uid: 1<<32 - 2},
	}
}

func TestUnpackEveryKind(t *testing.T) {
	long := strings.Repeat("d", 200)
	longer := long + "/" + strings.Repeat("e", 120)
	want := []string{
		". 040755 0:0 1600003600",
		`absolute 100644 0:0 1600000000 "a"`,
		"bin 040755 0:0 1700000000",
		`bin/hard 104755 0:0 1600000000 "#!"`,
		`bin/ping 100755 0:0 1600000000 "x" security.capability="\x01\x00\x00\x02\x00 ` + strings.Repeat(`\x00`, 14) + `" user.note="n"`,
		"bin/sh 120777 0:0 1600000000 -> su",
		"bin/su = bin/hard",
		"dev 040755 0:0 1700000000",
		"dev/null 020666 0:0 1600000000 1,3",
		"dev/sda 060660 0:6 1600000000 8,1024",
		"etc 040750 3:4 1600000000",
		`etc/passwd 100640 1:100000 1600000000 "root\n"`,
		"lib 120777 0:0 1600000000 -> /usr/lib",
		"link 120777 0:0 1600000000 -> " + strings.Repeat("t", 4095),
		"lost+found 040700 0:0 1600000000",
		`lost+found/x 100644 0:0 1600000000 "found"`,
		`old 100644 0:0 -5 "o"`,
		"run 040755 0:0 1700000000",
		"run/fifo 010600 0:0 1600000000",
		`srv 042775 0:50 1600000000 user.dir="d"`,
		`srv/f 100644 0:0 1600000000 ""`,
		"tmp 041777 0:0 1600000000",
		"usr 040755 0:0 1700000000",
		"usr/lib 040755 0:0 1600000000",
		`usr/lib/through 100644 0:0 1600000000 "link"`,
		long + " 040755 0:0 1700000000",
		longer + " 040755 0:0 1600000000",
		longer + `/file 100644 0:0 1600000000 "deep"`,
		"ünïcode \n" + ` 100644 4294967294:0 1600000000 "u"`,
	}
	want[slices.Index(want, longer+" 040755 0:0 1600000000")] = longer + " 040755 0:0 1700000000"
	slices.Sort(want)
	defer syscall.Umask(syscall.Umask(0o077))
	plain := archiveOf(t, everything()...)
	for name, layer := range map[string][]byte{"plain": plain, "gzip": gzipped(plain), "zstd": zstded(plain)} {
		_, got := unpacked(t, layer)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// What upper layers do to lower ones.
func TestUnpackLayers(t *testing.T) {
	dir := func(name string) entry { return entry{name: name + "/"} }
	file := func(name, text string) entry { return entry{name: name, text: text} }
	link := func(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeSymlink} }
	hard := func(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeLink} }
	gone := func(name string) entry { return file(name, "") }
	for _, c := range []struct {
		name   string
		layers [][]entry
		want   string // names, and the text of files
	}{
		{"replaced", [][]entry{{file("a", "1")}, {file("a", "2")}}, "a=2"},
		{"twice in a layer", [][]entry{{file("a", "1"), file("a", "2")}}, "a=2"},
		{"whiteout", [][]entry{{file("a", "1"), file("b", "1")}, {gone(".wh.a")}}, "b=1"},
		{"whiteout of a directory", [][]entry{{file("d/e/f", "1"), file("x", "")}, {gone(".wh.d")}}, "x="},
		{"whiteout of nothing", [][]entry{{file("a", "1")}, {gone(".wh.z"), gone("no/such/.wh.z"), gone("a/.wh.b")}}, "a=1"},
		{"whiteout after its own layer's entry", [][]entry{{file("a", "1")}, {file("a", "2"), gone(".wh.a")}}, "a=2"},
		{"whiteout before it", [][]entry{{file("a", "1")}, {gone(".wh.a"), file("a", "2")}}, "a=2"},
		{"opaque", [][]entry{{file("d/a", "1"), file("d/s/b", "1")}, {dir("d"), gone("d/.wh..wh..opq"), file("d/c", "2")}}, "d/ d/c=2"},
		{"opaque last", [][]entry{{file("d/a", "1"), file("d/s/b", "1")}, {file("d/s/c", "2"), gone("d/.wh..wh..opq")}}, "d/ d/s/ d/s/c=2"},
		{"opaque of nothing", [][]entry{{file("a", "1")}, {gone("no/.wh..wh..opq")}}, "a=1"},
		{"opaque root", [][]entry{{file("a", "1"), file("b/c", "1")}, {gone(".wh..wh..opq"), file("z", "2")}}, "z=2"},
		{"old metadata", [][]entry{{file(".wh..wh.aufs", ""), file(".wh..wh.plnk/1.2", "x"), file("a", "1")}}, "a=1"},
		{"overlay's whiteout", [][]entry{{file("a", "1"), file("b", "1")}, {{name: "a", kind: tar.TypeChar}}}, "b=1"},
		{"file over directory", [][]entry{{file("d/a", "1")}, {file("d", "2")}}, "d=2"},
		{"directory over file", [][]entry{{file("d", "1")}, {dir("d"), file("d/a", "2")}}, "d/ d/a=2"},
		{"directory over directory", [][]entry{{file("d/a", "1")}, {dir("d"), file("d/b", "2")}}, "d/ d/a=1 d/b=2"},
		{"directory over link", [][]entry{{file("r/a", "1"), link("l", "r")}, {dir("l"), file("l/b", "2")}}, "l/ l/b=2 r/ r/a=1"},
		{"through a link", [][]entry{{file("r/a", "1"), link("l", "r")}, {file("l/b", "2")}}, "l@r r/ r/a=1 r/b=2"},
		{"link changes", [][]entry{{file("r/a", ""), file("s/a", ""), link("l", "r"), file("l/b", "1"), link("l", "s"), file("l/c", "2")}},
			"l@s r/ r/a= r/b=1 s/ s/a= s/c=2"},
		{"link becomes a directory", [][]entry{{dir("r"), link("l", "r"), file("l/b", "1")}, {gone(".wh.l"), file("l/b", "2")}},
			"l/ l/b=2 r/ r/b=1"},
		{"whiteout through a link", [][]entry{{file("r/a", "1"), link("l", "/r")}, {gone("l/.wh.a")}}, "l@/r r/"},
		{"hard link to a lower layer", [][]entry{{file("a", "1")}, {hard("b", "a")}}, "a=1 b=a"},
		{"hard link is cut by a new file", [][]entry{{file("a", "1"), hard("b", "a")}, {file("a", "2")}}, "a=2 b=1"},
		{"hard link over a file", [][]entry{{file("a", "1"), file("b", "2"), hard("b", "a")}}, "a=1 b=a"},
		{"hard link to itself", [][]entry{{file("a", "1"), hard("a", "a"), hard("b", "a"), hard("b", "/a"), hard("a", "b")}}, "a=1 b=a"},
		{"hard link to a link", [][]entry{{link("l", "no"), hard("m", "l")}}, "l@no m=l"},
		{"hard link through a link", [][]entry{{file("r/a", "1"), link("l", "r"), hard("b", "l/a")}}, "b=1 l@r r/ r/a=b"},
		{"link over its own target", [][]entry{{file("a", "1"), link("a", "a")}}, "a@a"},
		{"empty", [][]entry{{}}, ""},
		{"none", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, archiveOf(t, l...))
			}
			_, lines := unpacked(t, layers...)
			if got := names(lines); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// names shortens what listing says.
func names(lines []string) string {
	var out []string
	for _, l := range lines[1:] {
		f := strings.SplitN(l, " ", 5)
		switch {
		case f[1] == "=":
			out = append(out, f[0]+"="+f[2])
		case strings.HasPrefix(f[1], "04"):
			out = append(out, f[0]+"/")
		case strings.HasPrefix(f[1], "12"):
			out = append(out, f[0]+"@"+strings.TrimPrefix(f[4], "-> "))
		default:
			out = append(out, f[0]+"="+strings.Trim(f[4], `"`))
		}
	}
	return strings.Join(out, " ")
}

// A later entry for a directory replaces what an earlier one says of it.
func TestUnpackDirectoryAgain(t *testing.T) {
	_, got := unpacked(t,
		archiveOf(t, entry{name: "d/", mode: 0o700, uid: 1, xattrs: map[string]string{"user.a": "1", "user.b": "1"}}, entry{name: "d/f"}),
		archiveOf(t, entry{name: "d/", mode: 0o711, gid: 2, when: day.Add(time.Second), xattrs: map[string]string{"user.b": "2"}}))
	want := []string{". 040755 0:0 1700000000", `d 040711 0:2 1600000001 user.b="2"`, `d/f 100644 0:0 1600000000 ""`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A default ACL is set and does not change what the archive has below it.
func TestUnpackDefaultACL(t *testing.T) {
	// Version 2: user::rwx, group::rwx, mask::rwx, other::---.
	acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x07\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	with := entry{name: "d/", xattrs: map[string]string{defaultACL: acl}}
	dir, got := unpacked(t, archiveOf(t, with, entry{name: "d/f"}, entry{name: "d/e/g"}))
	for _, l := range got {
		if strings.Contains(l, "d/") && strings.Contains(l, "posix_acl") {
			t.Errorf("inherited: %s", l)
		}
	}
	if got := xattrsOf(t, filepath.Join(dir, "d")); !strings.Contains(got, defaultACL) {
		t.Errorf("the directory has %q", got)
	}
}

// Holes stay holes, and blocks of zeros become holes.
func TestUnpackSparse(t *testing.T) {
	testenv.Program(t, "tar")
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	const size = 64<<20 + 100
	err = errors.Join(f.Truncate(size), writeAt(f, "head", 0), writeAt(f, "middle", 5<<20+7), writeAt(f, "x", 40<<20-1), f.Close())
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"gnu", "pax"} {
		out, err := execOutput(t, "tar", "-C", dir, "--sparse", "--format="+format, "-cf", "-", "sparse")
		if err != nil {
			t.Fatal(err)
		}
		if len(out) > 1<<20 {
			t.Fatalf("%s: the archive has %d bytes", format, len(out))
		}
		checkSparse(t, format, out, size)
	}
	whole, err := os.ReadFile(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	checkSparse(t, "zeros", archiveOf(t, entry{name: "sparse", text: string(whole)}), size)
}

func writeAt(f *os.File, text string, off int64) error {
	_, err := f.WriteAt([]byte(text), off)
	return err
}

func checkSparse(t *testing.T, what string, layer []byte, size int) {
	t.Helper()
	dir, _ := unpacked(t, layer)
	path := filepath.Join(dir, "sparse")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want, "head")
	copy(want[5<<20+7:], "middle")
	want[40<<20-1] = 'x'
	if !bytes.Equal(b, want) {
		t.Errorf("%s: other contents", what)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > 64<<10 {
		t.Errorf("%s: takes %d bytes, %v", what, st.Blocks*512, err)
	}
}

func TestUnpackManyFiles(t *testing.T) {
	var entries []entry
	for i := range 10_000 {
		entries = append(entries, entry{name: fmt.Sprintf("usr/share/%d", i), text: fmt.Sprint(i)})
	}
	dir := inMemory(t)
	err := unpack(t.Context(), dir, sources(archiveOf(t, entries...), archiveOf(t, entry{name: "usr/share/.wh.77"})), DefaultLimits, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := listing(t, dir); len(got) != 3+9_999 {
		t.Errorf("%d names", len(got))
	}
}

// A cancelled unpacking ends soon, and no goroutine of it stays.
func TestUnpackCancelled(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	big := archiveOf(t, entry{name: "big", text: strings.Repeat("x", 32<<20)})
	err := unpack(ctx, dir, sources(big, big), DefaultLimits, func(int64) { cancel(stop) })
	if !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
}
