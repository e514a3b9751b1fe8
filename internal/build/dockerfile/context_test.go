package dockerfile

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// tree writes files; a content that begins with "->" is a link, a name that ends in a
// slash a directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		to := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(to), 0o755)
		target, link := strings.CutPrefix(content, "->")
		switch {
		case strings.HasSuffix(name, "/"):
			err = errors.Join(err, os.MkdirAll(to, 0o755))
		case link:
			err = errors.Join(err, os.Symlink(target, to))
		default:
			err = errors.Join(err, os.WriteFile(to, []byte(content), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// archives returns the archives of a Dockerfile with these instructions.
func archives(t *testing.T, dir, ignore string, instructions ...string) (*File, []Archive, error) {
	t.Helper()
	f := parse(t, "FROM x\n"+strings.Join(instructions, "\n")+"\n", Options{})
	c, err := OpenContext(dir, []byte(ignore))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	all, err := f.Archives(c)
	return f, all, err
}

// members lists an archive: names, with contents or targets.
func members(t *testing.T, a Archive) map[string]string {
	t.Helper()
	var buf bytes.Buffer
	if err := a.Write(&buf); err != nil {
		t.Fatal(err)
	}
	zip, err := gzip.NewReader(&buf)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for in := tar.NewReader(zip); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = string(text)
		if h.Linkname != "" {
			got[h.Name] = "->" + h.Linkname
		}
	}
}

// TestArchives: a COPY takes what it names, without what .dockerignore leaves out.
func TestArchives(t *testing.T) {
	dir := tree(t, map[string]string{
		"a.py": "A", "b.py": "B", "c.txt": "C", "lib/x": "X", "lib/deep/y": "Y", "lib/secret": "S",
		"link": "->lib/x", "dir": "->lib/deep", "out": "->/../../etc", "gone": "->nothing", "empty/": "",
		"node_modules/m": "M", "node_modules/keep": "K", ".git/config": "G",
	})
	const ignore = "# a comment\n.git\n**/secret\nnode_modules\n!node_modules/keep\n"
	for line, want := range map[string]map[string]string{
		"COPY *.py /":                {"a.py": "A", "b.py": "B"},
		"COPY lib /lib":              {"lib/": "", "lib/x": "X", "lib/deep/": "", "lib/deep/y": "Y"},
		"COPY /lib/deep/ /":          {"lib/deep/": "", "lib/deep/y": "Y"},
		"COPY l*/x c.txt /":          {"lib/x": "X", "c.txt": "C"},
		"COPY link /l":               {"link": "X"},
		"COPY dir /d":                {"dir/": "", "dir/y": "Y"},
		"COPY dir/y /d":              {"dir/y": "Y"},
		"COPY empty /e":              {"empty/": ""},
		"COPY node_modules /":        {"node_modules/keep": "K"},
		"COPY <<X <<Y /\n1\nX\n2\nY": {"X": "1\n", "Y": "2\n"},
		"COPY . /": {"./": "", "a.py": "A", "b.py": "B", "c.txt": "C", "lib/": "", "lib/x": "X", "lib/deep/": "", "lib/deep/y": "Y",
			"link": "->lib/x", "dir": "->lib/deep", "out": "->/../../etc", "gone": "->nothing", "empty/": "", "node_modules/keep": "K"},
	} {
		_, all, err := archives(t, dir, ignore, line)
		if err != nil || len(all) != 1 {
			t.Errorf("%s: %d archives, %v", line, len(all), err)
			continue
		}
		if d := cmp.Diff(want, members(t, all[0])); d != "" {
			t.Errorf("%s: %s", line, d)
		}
	}
	for line, want := range map[string]string{
		"COPY nothing /":    "Dockerfile:2: COPY: nothing is not in the context",
		"COPY lib/secret /": "is not in the context, or .dockerignore leaves it out",
		"COPY out /":        "out leads out of the context",
		"COPY gone /":       "is not in the context",
		"COPY *.none /":     "no file matches *.none",
	} {
		if _, _, err := archives(t, dir, ignore, line); !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", line, err, want)
		}
	}
}

// TestHash: the hash depends on names, modes and contents, and not on times.
func TestHash(t *testing.T) {
	dir := tree(t, map[string]string{"a": "1", "b": "2"})
	hash := func() string {
		f, _, err := archives(t, dir, "", "COPY a /")
		if err != nil {
			t.Fatal(err)
		}
		return f.Stages[0].Steps[0].Files
	}
	first := hash()
	path := filepath.Join(dir, "a")
	err := os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0))
	if err = errors.Join(err, os.WriteFile(filepath.Join(dir, "b"), []byte("other"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if got := hash(); got != first || len(first) != 64 {
		t.Errorf("another time, and another file that is not copied: %s, was %s", got, first)
	}
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if hash() == first {
		t.Error("another mode has the same hash")
	}
	_, all, err := archives(t, dir, "", "COPY a /", "COPY a /b", "COPY b /")
	if err != nil || len(all) != 2 {
		t.Fatalf("%d archives of two sets of files, %v", len(all), err)
	}
	if err := os.WriteFile(path, []byte("2"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := all[0].Write(io.Discard); !errors.Is(err, errdefs.Busy) {
		t.Errorf("a file that changed after it was hashed: %v", err)
	}
}

// TestAddUnpacks: ADD puts the content of an archive in its place, COPY does not.
func TestAddUnpacks(t *testing.T) {
	var buf bytes.Buffer
	zip := gzip.NewWriter(&buf)
	out := tar.NewWriter(zip)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "./bin/x", Typeflag: tar.TypeReg, Mode: 0o755, Uid: 7},
		{Name: "bin/y", Typeflag: tar.TypeLink, Linkname: "bin/x"}, {Name: "dev", Typeflag: tar.TypeChar},
	} {
		if err := out.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(out.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	dir := tree(t, map[string]string{"r.tgz": buf.String(), "x.xz": "\xfd7zXZ\x00"})
	f, all, err := archives(t, dir, "", "ADD r.tgz /", "COPY r.tgz /")
	if err != nil || len(all) != 2 {
		t.Fatalf("%d archives, %v", len(all), err)
	}
	if d := cmp.Diff(map[string]string{"r.tgz/": "", "r.tgz/bin/x": "", "r.tgz/bin/y": "->r.tgz/bin/x"}, members(t, all[0])); d != "" {
		t.Error(d)
	}
	if s := f.Stages[0].Steps; !s[0].Extract || s[1].Extract {
		t.Error("the steps do not say which archive is unpacked")
	}
	if _, _, err := archives(t, dir, "", "ADD x.xz /"); err == nil || !strings.Contains(err.Error(), "xz") {
		t.Errorf("xz: %v", err)
	}
}
