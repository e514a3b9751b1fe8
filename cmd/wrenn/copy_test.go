package main

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestParsePlace(t *testing.T) {
	for in, want := range map[string]place{
		"3fa:/root/x": {"3fa", "/root/x"},
		"sb-3fa:x":    {"sb-3fa", "x"},
		"3fa:":        {"3fa", ""},
		"3fa:a:b":     {"3fa", "a:b"},
		"file":        {"", "file"},
		"./a:b":       {"", "./a:b"},
		"/a:b":        {"", "/a:b"},
		"a.b:c":       {"", "a.b:c"},
		":x":          {"", ":x"},
		"-":           {"", "-"},
	} {
		if got := parsePlace(in); got != want {
			t.Errorf("%q: %+v, want %+v", in, got, want)
		}
	}
}

func TestLocalName(t *testing.T) {
	for in, want := range map[string]string{
		"a/b": "b", "a/b/": "b", "a/.": "", ".": "", "/": "", "a/..": filepath.Base(mustWd(t)),
	} {
		if got := localName(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func mustWd(t *testing.T) string {
	t.Helper()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return wd
}

// A guest's archive is the guest's word: whatever it says, nothing is written
// outside the target, and no right is lent.
func TestUnpackHostile(t *testing.T) {
	file := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o6777} }
	link := func(kind byte, name, to string) tar.Header {
		return tar.Header{Name: name, Typeflag: kind, Linkname: to, Mode: 0o777}
	}
	for name, headers := range map[string][]tar.Header{
		"dots":                   {file("../../outside/x")},
		"absolute":               {file("/outside/x")},
		"through a link":         {link(tar.TypeSymlink, "l", "../outside"), file("l/x")},
		"over a link":            {link(tar.TypeSymlink, "x", "../outside/x"), file("x")},
		"a directory's link":     {link(tar.TypeSymlink, "l", "../outside"), {Name: "l/", Typeflag: tar.TypeDir, Mode: 0o777}, file("l/x")},
		"a hard link out":        {link(tar.TypeLink, "x", "../outside/kept"), file("x")},
		"hard link through link": {link(tar.TypeSymlink, "l", "../outside"), link(tar.TypeLink, "x", "l/kept"), file("x")},
		"device":                 {{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, {Name: "pipe", Typeflag: tar.TypeFifo}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, d := range []string{"outside", "target"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			kept := filepath.Join(dir, "outside", "kept")
			if err := os.WriteFile(kept, []byte("kept"), 0o600); err != nil {
				t.Fatal(err)
			}
			var archive bytes.Buffer
			w := tar.NewWriter(&archive)
			for _, h := range headers {
				if h.Typeflag == tar.TypeReg {
					h.Size = 3
				}
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
				if h.Typeflag == tar.TypeReg {
					_, _ = w.Write([]byte("bad"))
				}
			}
			w.Close()
			root, err := os.OpenRoot(filepath.Join(dir, "target"))
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			p := startMeter(-1)
			t.Logf("unpack: %v", unpack(&archive, root, p))
			p.stop()
			if data, err := os.ReadFile(kept); err != nil || string(data) != "kept" {
				t.Errorf("outside: %q, %v", data, err)
			}
			if there, _ := os.ReadDir(filepath.Join(dir, "outside")); len(there) != 1 {
				t.Errorf("outside: %v", there)
			}
			err = filepath.WalkDir(filepath.Join(dir, "target"), func(name string, e fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := e.Info()
				if err == nil && (info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeDevice|fs.ModeNamedPipe) != 0) {
					t.Errorf("%s is %v", name, info.Mode())
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
