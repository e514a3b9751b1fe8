package client

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// entriesOf is what an archive holds.
func entriesOf(t *testing.T, archive []byte) map[string]string {
	t.Helper()
	got := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatalf("read the archive: %v", err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("read %s: %v", h.Name, err)
		}
		got[h.Name] = fmt.Sprintf("%c %s%s", h.Typeflag, h.Linkname, content)
	}
}

// hook calls do when an archive has come to a name.
type hook struct {
	bytes.Buffer
	at string
	do func()
}

func (h *hook) Write(p []byte) (int, error) {
	n, err := h.Buffer.Write(p)
	if h.do != nil && bytes.HasPrefix(p, []byte(h.at)) {
		h.do()
		h.do = nil
	}
	return n, err
}

// What is copied into a sandbox is what stood below the source, whatever is put
// there while it is read.
func TestPackWhatChanges(t *testing.T) {
	const large = 200 << 10
	for name, c := range map[string]struct {
		at   string // the name after whose header it happens
		do   func(t *testing.T, dir string)
		want string // of the error
		got  map[string]string
	}{
		"nothing happens": {got: map[string]string{"a": "0 a", "d": "5 ", "d/x": "0 x", "l": "2 a", "z": "0 " + strings.Repeat("z", large)}},
		"a file becomes a link": {at: "a", do: func(t *testing.T, dir string) { swapLink(t, dir, "d/x", "../../secret") },
			got: map[string]string{"a": "0 a", "d": "5 ", "d/x": "2 ../../secret", "l": "2 a", "z": "0 " + strings.Repeat("z", large)}},
		"a directory becomes a link": {at: "d", do: func(t *testing.T, dir string) { swapLink(t, dir, "d", "../elsewhere") },
			want: "escapes"},
		"a directory becomes a link inside": {at: "d", do: func(t *testing.T, dir string) { swapLink(t, dir, "d", "other") },
			want: "replaced"},
		"a file becomes shorter": {at: "z", do: func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "z"), 1000); err != nil {
				t.Error(err)
			}
		}, want: "became shorter"},
		"a file becomes longer": {at: "z", do: func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, "z"), os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			if _, err := f.WriteString("more"); err != nil {
				t.Error(err)
			}
		}, got: map[string]string{"a": "0 a", "d": "5 ", "d/x": "0 x", "l": "2 a", "z": "0 " + strings.Repeat("z", large)}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newSource(t, large)
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			out := &hook{at: c.at}
			if c.do != nil {
				out.do = func() { c.do(t, dir) }
			}
			err = newPacker(out, &Copy{}).all(root)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if diff := gocmp.Diff(c.got, entriesOf(t, out.Bytes())); diff != "" {
					t.Error(diff)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if bytes.Contains(out.Bytes(), []byte("secret\x00")) && c.got["d/x"] != "2 ../../secret" {
				t.Error("what is outside was read")
			}
		})
	}
}

// newSource makes a directory to be packed, with a file of some size among others.
func newSource(t *testing.T, size int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "source")
	for file, content := range map[string]string{
		"a": "a", "d/x": "x", "z": strings.Repeat("z", size), "../secret": "secret", "../elsewhere/x": "secret",
	} {
		file = filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("a", filepath.Join(dir, "l")), syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// swapLink puts a link in the place of name. What was a directory is moved to
// "other".
func swapLink(t *testing.T, dir, name, to string) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := errors.Join(os.Rename(name, filepath.Join(dir, "other")), os.Symlink(to, name)); err != nil {
		t.Error(err)
	}
}

// What takes a file's place between a look and the opening is neither read nor
// waited for.
func TestOpenSame(t *testing.T) {
	dir := t.TempDir()
	for name, put := range map[string]func(path string) error{
		"itself":            func(string) error { return nil },
		"a link outside":    func(path string) error { return os.Symlink("/etc/passwd", path) },
		"a link inside":     func(path string) error { return os.Symlink("other", path) },
		"a pipe":            func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"another file":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"nothing":           func(string) error { return errors.ErrUnsupported },
		"a directory":       func(path string) error { return os.Mkdir(path, 0o700) },
		"a link to nothing": func(path string) error { return os.Symlink("none", path) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(dir, name)
			path := filepath.Join(dir, "x")
			if err := errors.Join(
				os.Mkdir(dir, 0o700), os.WriteFile(path, []byte("x"), 0o600), os.WriteFile(filepath.Join(dir, "other"), nil, 0o600),
			); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			seen, err := root.Lstat("x")
			if err != nil {
				t.Fatal(err)
			}
			if name != "itself" {
				if err := os.Rename(path, path+"away"); err != nil {
					t.Fatal(err)
				}
				if err := put(path); err != nil && !errors.Is(err, errors.ErrUnsupported) {
					t.Fatal(err)
				}
			}
			f, err := openSame(root, "x", seen)
			if err == nil {
				f.Close()
			}
			if (err == nil) != (name == "itself") {
				t.Errorf("opened: %v", err)
			}
		})
	}
}

// Sources that are not plainly a file or a directory.
func TestCopyIn(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.MkdirAll(path("real/sub"), 0o755), os.WriteFile(path("real/sub/file"), []byte("content"), 0o644),
		os.Symlink("real", path("link")), os.Symlink("real/sub/file", path("filelink")), os.Symlink("none", path("dangling")),
		syscall.Mkfifo(path("pipe"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ from, want, sent string }{
		"a link to a directory": {from: path("link")},
		"its content":           {from: path("link") + "/."},
		"a link to a file":      {from: path("filelink"), sent: "content"},
		"a link to nothing":     {from: path("dangling"), want: "no such file"},
		"a pipe":                {from: path("pipe"), want: "is a pipe"},
		"a device":              {from: "/dev/null", want: "is a device"},
		"a file without a size": {from: "/proc/self/comm", sent: "client.test\n"},
	} {
		t.Run(name, func(t *testing.T) {
			h := &clienttest.Agent{}
			h.Entry = clienttest.Dir("/x")
			err := cp(t, h.Serve(t), c.from, clienttest.ID+":/x")
			switch {
			case c.want != "":
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
			case err != nil:
				t.Error(err)
			case c.sent != "":
				if string(h.Received) != c.sent {
					t.Errorf("sent %q, want %q", h.Received, c.sent)
				}
			default:
				want := map[string]string{"sub": "5 ", "sub/file": "0 content"}
				if diff := gocmp.Diff(want, entriesOf(t, h.Received)); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}
