package envd

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// tarOf is a tar stream of entries; what an entry does not say is a regular file's.
func tarOf(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.Size = int64(len(e.content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type tarEntry struct {
	tar.Header
	content string
}

func file(name, content string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeReg}, content}
}

func dir(name string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

func link(kind byte, name, to string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: kind, Linkname: to}, ""}
}

// unpackInto sends an archive to a server.
func unpackInto(t *testing.T, s *Server, dest, owner string, body []byte) (int, string) {
	t.Helper()
	q := url.Values{guestapi.QueryPath: {dest}}
	if owner != "" {
		q.Set(guestapi.QueryOwner, owner)
	}
	r := httptest.NewRequest("POST", guestapi.PathUnpack+"?"+q.Encode(), bytes.NewReader(body))
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Code == http.StatusNoContent {
		return w.Code, ""
	}
	return w.Code, message(t, w)
}

// packed returns the entries of what a server packs.
func packed(t *testing.T, s *Server, path string) (map[string]tarEntry, []byte) {
	t.Helper()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest("GET", guestapi.PathPack+"?"+url.Values{guestapi.QueryPath: {path}}.Encode(), nil))
	if w.Code != http.StatusOK {
		t.Fatalf("pack %s: %d %s", path, w.Code, w.Body)
	}
	stream := bytes.Clone(w.Body.Bytes())
	entries := map[string]tarEntry{}
	for in := tar.NewReader(w.Body); ; {
		h, err := in.Next()
		if err == io.EOF {
			return entries, stream
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		entries[h.Name] = tarEntry{*h, string(content)}
	}
}

func archiver(t *testing.T) *Server {
	t.Helper()
	testenv.Root(t)
	s := New(Config{Log: quiet()})
	t.Cleanup(s.Close)
	return s
}

// TestUnpackAndPack: what is unpacked has all that its entries say, and what is packed
// of that says the same again.
func TestUnpackAndPack(t *testing.T) {
	s := archiver(t)
	dest := filepath.Join(t.TempDir(), "made", "dest")
	at := time.Date(2024, 2, 3, 4, 5, 6, 789_000_000, time.UTC)
	entry := func(kind byte, name string, mode int64, content string) tarEntry {
		return tarEntry{tar.Header{
			Name: name, Typeflag: kind, Mode: mode, Uid: 1234, Gid: 77, ModTime: at, Format: tar.FormatPAX,
		}, content}
	}
	sparse := "begin" + strings.Repeat("\x00", 1<<20) + "end"
	setuid := entry(tar.TypeReg, "bin/setuid", 0o4755, "#!")
	setuid.PAXRecords = map[string]string{xattrRecord + "user.colour": "grün", xattrRecord + overlayXattr + "opaque": "y"}
	device := entry(tar.TypeChar, "dev/null", 0o666, "")
	device.Devmajor, device.Devminor = 1, 3
	symlink := entry(tar.TypeSymlink, "bin/link", 0o777, "")
	symlink.Linkname = "../nowhere"
	hard := entry(tar.TypeLink, "hard", 0o4755, "")
	hard.Linkname = "bin/setuid"
	want := []tarEntry{
		entry(tar.TypeDir, "./", 0o750, ""), entry(tar.TypeDir, "bin/", 0o2711, ""), symlink, setuid,
		entry(tar.TypeDir, "dev/", 0o755, ""), device, entry(tar.TypeFifo, "fifo", 0o600, ""), hard,
		entry(tar.TypeReg, "sparse", 0o600, sparse), entry(tar.TypeReg, "ü/"+strings.Repeat("n", 200), 0o444, "x"),
	}
	if code, text := unpackInto(t, s, dest, "", tarOf(t, want...)); code != http.StatusNoContent {
		t.Fatalf("unpack: %d %s", code, text)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dest, "sparse"), &st); err != nil || st.Size != int64(len(sparse)) || st.Blocks*512 > 1<<19 {
		t.Errorf("sparse file: %v, %d bytes, %d taken", err, st.Size, st.Blocks*512)
	}
	got, _ := packed(t, s, dest)
	delete(want[3].PAXRecords, xattrRecord+overlayXattr+"opaque")
	for _, w := range want {
		if w.Name != "./" {
			w.Name = strings.TrimPrefix(w.Name, "./")
		}
		g, ok := got[w.Name]
		if !ok {
			t.Errorf("%s was not packed; there is %q", w.Name, slices.Sorted(maps.Keys(got)))
			continue
		}
		if g.Typeflag != w.Typeflag || g.Linkname != w.Linkname || g.Uid != w.Uid || g.Gid != w.Gid || g.content != w.content ||
			w.Typeflag != tar.TypeSymlink && g.Mode != w.Mode || !g.ModTime.Equal(at) || g.Devminor != w.Devminor {
			t.Errorf("%s: got %+v, want %+v", w.Name, g.Header, w.Header)
		}
		for key, value := range w.PAXRecords {
			if strings.HasPrefix(key, xattrRecord) && g.PAXRecords[key] != value {
				t.Errorf("%s: attribute %s is %q, want %q", w.Name, key, g.PAXRecords[key], value)
			}
		}
	}
	if len(got) != len(want)+1 { // the directory ü, which no entry named
		t.Errorf("packed: %q", slices.Sorted(maps.Keys(got)))
	}
}

// TestUnpackOwner: with an owner all that is made is his, directories included that no
// entry names.
func TestUnpackOwner(t *testing.T) {
	s := archiver(t)
	etc := t.TempDir()
	s.accounts.etc = etc
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("passwd", "root:x:0:0::/root:/bin/sh\nann:x:1001:1002::/:/bin/sh\n")
	write("group", "staff:x:50:\n")
	for text, want := range map[string]owner{
		"ann": {1001, 1002}, "ann:staff": {1001, 50}, "0:0": {0, 0}, "4000": {4000, 4000}, "ann:7": {1001, 7}, "4000:staff": {4000, 50},
	} {
		dest := filepath.Join(t.TempDir(), "new")
		if code, msg := unpackInto(t, s, dest, text, tarOf(t, file("d/f", "x"))); code != http.StatusNoContent {
			t.Errorf("owner %s: %d %s", text, code, msg)
			continue
		}
		for _, path := range []string{dest, dest + "/d", dest + "/d/f"} {
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil || (owner{int(st.Uid), int(st.Gid)}) != want {
				t.Errorf("owner %s: %s is of %d:%d (%v)", text, path, st.Uid, st.Gid, err)
			}
		}
	}
	for _, text := range []string{"bob", "ann:none", ":", "ann:"} {
		dest := filepath.Join(t.TempDir(), "new")
		if code, msg := unpackInto(t, s, dest, text, tarOf(t, file("f", "x"))); code != http.StatusBadRequest {
			t.Errorf("owner %q: %d %s", text, code, msg)
		}
		if _, err := os.Lstat(dest); err == nil {
			t.Errorf("owner %q: the directory was made all the same", text)
		}
	}
}

// TestUnpackRefusals: what cannot be meant is refused by name, and nothing outside of
// the directory changes.
func TestUnpackRefusals(t *testing.T) {
	s := archiver(t)
	device := tarEntry{tar.Header{Name: "d", Typeflag: tar.TypeBlock, Devmajor: 1 << 30}, ""}
	for name, c := range map[string]struct {
		body []byte
		says string
	}{
		"dots":            {tarOf(t, file("a/../../outside", "x")), "'..'"},
		"absolute":        {tarOf(t, file("/outside", "x")), "absolute"},
		"hard link out":   {tarOf(t, link(tar.TypeLink, "l", "../secret")), "not in the archive"},
		"hard link abs":   {tarOf(t, link(tar.TypeLink, "l", "/secret")), "not in the archive"},
		"hard link void":  {tarOf(t, link(tar.TypeLink, "l", "nothing")), "not there"},
		"hard link dir":   {tarOf(t, dir("d"), link(tar.TypeLink, "l", "d")), "a directory"},
		"file is dir":     {tarOf(t, dir("d"), file("d", "x")), "a directory is in its place"},
		"below a file":    {tarOf(t, file("f", "x"), file("f/g", "x")), "not a directory"},
		"root is file":    {tarOf(t, file(".", "x")), "the directory itself"},
		"device":          {tarOf(t, device), "impossible number"},
		"deep":            {tarOf(t, file(strings.Repeat("d/", 300)+"f", "x")), "more than 255 parts"},
		"no tar":          {[]byte(strings.Repeat("no tar", 200)), "read the archive"},
		"cut":             {tarOf(t, file("f", strings.Repeat("x", 4000)))[:1500], "shorter than it says"},
		"link to nothing": {tarOf(t, file("g", "x"), link(tar.TypeSymlink, "l", strings.Repeat("x", 5000))), "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			secret := filepath.Join(base, "secret")
			if err := os.WriteFile(secret, []byte("s"), 0o600); err != nil {
				t.Fatal(err)
			}
			code, text := unpackInto(t, s, filepath.Join(base, "dest"), "", c.body)
			if code != http.StatusBadRequest || !strings.Contains(text, c.says) || strings.Contains(text, "/proc/") {
				t.Errorf("got %d %q, want 400 %q", code, text, c.says)
			}
			entries, err := os.ReadDir(base)
			if err != nil || len(entries) != 2 {
				t.Errorf("outside of the directory: %v %v", entries, err)
			}
			var st unix.Stat_t
			if err := unix.Stat(secret, &st); err != nil || st.Nlink != 1 {
				t.Errorf("the file outside has %d names, %v", st.Nlink, err)
			}
		})
	}
	for _, dest := range []string{"", "relative", "../x"} {
		if code, _ := unpackInto(t, s, dest, "", tarOf(t)); code != http.StatusBadRequest {
			t.Errorf("unpack into %q: %d", dest, code)
		}
	}
}

// TestUnpackThroughLinks: links that were there lead where they lead, those of the stream
// not out of the directory.
func TestUnpackThroughLinks(t *testing.T) {
	s := archiver(t)
	base := t.TempDir()
	dest, other := filepath.Join(base, "dest"), filepath.Join(base, "other")
	for _, d := range []string{dest, other} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(other, filepath.Join(dest, "data")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dest, "old"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(other, "target"), filepath.Join(dest, "filelink")); err != nil {
		t.Fatal(err)
	}
	code, text := unpackInto(t, s, dest, "", tarOf(t,
		dir("data"), file("data/f", "through the link"),
		dir("app/sub"), link(tar.TypeSymlink, "app/dlink", "sub"), file("app/dlink/b.sh", "inside"),
		link(tar.TypeSymlink, "app/out", other), file("app/out/evil", "not outside"),
		link(tar.TypeSymlink, "app/up", "../../other"), file("app/up/evil", "not outside"),
		link(tar.TypeSymlink, "app/gone", "nothing"), file("app/gone/x", "a directory now"),
		file("old", "new"), file("filelink", "in place of the link"),
		// The directory of the entry before is behind a link that is replaced.
		link(tar.TypeSymlink, "s", "app/sub"), file("s/one", "1"), link(tar.TypeSymlink, "s", "app"), file("s/two", "2"),
	))
	if code != http.StatusNoContent {
		t.Fatalf("unpack: %d %s", code, text)
	}
	for path, want := range map[string]string{
		"other/f": "through the link", "dest/app/sub/b.sh": "inside",
		"dest/app/out/evil": "not outside", "dest/app/up/evil": "not outside",
		"dest/app/gone/x": "a directory now", "dest/old": "new", "dest/filelink": "in place of the link",
		"dest/app/sub/one": "1", "dest/app/two": "2",
	} {
		if got, err := os.ReadFile(filepath.Join(base, path)); string(got) != want {
			t.Errorf("%s is %q, want %q (%v)", path, got, want, err)
		}
	}
	for _, path := range []string{"other/evil", "other/target", "dest/s/nothing"} {
		if _, err := os.Lstat(filepath.Join(base, path)); err == nil {
			t.Errorf("%s is there", path)
		}
	}
	if info, err := os.Stat(dest); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory that was there: %v %v", info, err)
	}
}

// TestPackFile: a file's name is the one that was asked for; what is no file and no
// directory, and what is not there, is refused.
func TestPackFile(t *testing.T) {
	s := archiver(t)
	base := t.TempDir()
	if err := os.WriteFile(filepath.Join(base, "real"), []byte("x"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if got, _ := packed(t, s, filepath.Join(base, "link")); len(got) != 1 || got["link"].content != "x" {
		t.Errorf("got %v", got)
	}
	for path, want := range map[string]int{base + "/nothing": 404, base + "/real/x": 404, "relative": 400, "/dev/null": 400} {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("GET", guestapi.PathPack+"?"+url.Values{guestapi.QueryPath: {path}}.Encode(), nil))
		if w.Code != want {
			t.Errorf("pack %s: %d, want %d", path, w.Code, want)
		}
	}
	// What is mounted below is not content of the path.
	mount := filepath.Join(base, "mount")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(mount, unix.MNT_DETACH) }()
	if err := os.WriteFile(filepath.Join(mount, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, _ := packed(t, s, base)
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, []string{"./", "link", "mount/", "real"}) {
		t.Errorf("got %q", names)
	}
}

// FuzzUnpack unpacks any stream: nothing outside of the directory changes.
func FuzzUnpack(f *testing.F) {
	testenv.Root(f)
	f.Add(tarOf(f, dir("a"), file("a/b", "c"), link(tar.TypeSymlink, "l", "../.."), file("l/x", "y"), link(tar.TypeLink, "h", "a/b")))
	f.Add(tarOf(f, link(tar.TypeSymlink, "l", "/"), dir("l/etc"), link(tar.TypeSymlink, "l", "../canary"), file("l", "x")))
	f.Add(tarOf(f, tarEntry{tar.Header{Name: "x", Format: tar.FormatPAX, PAXRecords: map[string]string{xattrRecord + "user.a": "b"}}, "x"}))
	s := New(Config{Log: quiet()})
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, body []byte) {
		base := t.TempDir()
		if err := os.WriteFile(filepath.Join(base, "canary"), []byte("sings"), 0o600); err != nil {
			t.Fatal(err)
		}
		q := url.Values{guestapi.QueryPath: {filepath.Join(base, "dest")}}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("POST", guestapi.PathUnpack+"?"+q.Encode(), bytes.NewReader(body)))
		entries, err := os.ReadDir(base)
		if err != nil || len(entries) > 2 {
			t.Fatalf("outside of the directory: %v %v", entries, err)
		}
		var st unix.Stat_t
		err = unix.Lstat(filepath.Join(base, "canary"), &st)
		if err != nil || st.Nlink != 1 || st.Size != 5 || st.Mode&unix.S_IFMT != unix.S_IFREG {
			t.Fatalf("the file outside: %+v %v", st, err)
		}
		if err := filepath.WalkDir(base, func(string, os.DirEntry, error) error { return nil }); err != nil {
			t.Fatal(fmt.Errorf("walk: %w", err))
		}
	})
}
