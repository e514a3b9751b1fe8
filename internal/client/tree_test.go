package client

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// makeTree makes a directory with every kind of entry that a copy keeps.
func makeTree(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	path := func(name string) string { return filepath.Join(dir, name) }
	var errs []error
	for name, mode := range map[string]fs.FileMode{
		"plain": 0o644, "private": 0o600, "program": 0o755, "open": 0o666,
		"setuid": 0o755 | fs.ModeSetuid, "setgid": 0o755 | fs.ModeSetgid,
		"read only": 0o444, "sub/deep/file": 0o640, "sub/ünï": 0o644, "sub/" + strings.Repeat("long", 50): 0o644, "locked/file": 0o400,
	} {
		errs = append(errs, os.MkdirAll(filepath.Dir(path(name)), 0o755),
			os.WriteFile(path(name), []byte(name), 0o600), os.Chmod(path(name), mode))
	}
	holes, err := os.Create(path("holes"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = holes.WriteAt([]byte("middle"), 1<<20)
	errs = append(errs, err, holes.Truncate(4<<20), holes.Close(),
		os.WriteFile(path("empty"), nil, 0o644), os.WriteFile(path("zeros"), make([]byte, 10), 0o644),
		os.Mkdir(path("nothing"), 0o700), os.Mkdir(path("sticky"), 0o755), os.Chmod(path("sticky"), 0o777|fs.ModeSticky),
		os.Symlink("plain", path("link")), os.Symlink("none", path("dangling")), os.Symlink("sub", path("dirlink")),
		os.Link(path("plain"), path("sub/second name")), os.Link(path("setuid"), path("setuid too")))
	when := time.Date(2001, 2, 3, 4, 5, 6, 789_000_000, time.UTC)
	for _, name := range []string{"plain", "setuid", "holes", "sub/deep/file", "sub/deep", "sub", "locked", "nothing", "."} {
		errs = append(errs, os.Chtimes(path(name), when, when))
		when = when.Add(time.Hour)
	}
	locked := path("locked")
	errs = append(errs, os.Chmod(locked, 0o555))
	t.Cleanup(func() { os.Chmod(locked, 0o755) })
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return dir
}

// describe says of everything below a directory what a copy keeps: of files with
// several names also which they are.
func describe(t *testing.T, dir string, all bool) map[string]string {
	t.Helper()
	seen, first := map[string]string{}, map[inode]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		what := info.Mode().String()
		if !all {
			what = (info.Mode() &^ (fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)).String()
		}
		switch {
		case info.Mode().Type() == fs.ModeSymlink:
			link, err := os.Readlink(path)
			seen[name] = "-> " + link
			return err
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %d %q", len(data), bytes.Trim(data, "\x00"))
			if isSparse(info) {
				what += " sparse"
			}
			if info.Sys().(*syscall.Stat_t).Nlink > 1 {
				if first[inodeOf(info)] == "" {
					first[inodeOf(info)] = name
				}
				what += " as " + first[inodeOf(info)]
			}
		}
		if all {
			what += " " + info.ModTime().UTC().Format(time.RFC3339Nano)
		}
		seen[name] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

// What is packed here and unpacked here is what it was.
func TestTreeIsKept(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o022))
	for _, all := range []bool{true, false} {
		t.Run(fmt.Sprintf("preserve %v", all), func(t *testing.T) {
			from, to := makeTree(t), filepath.Join(t.TempDir(), "copy")
			if err := os.Mkdir(to, 0o755); err != nil {
				t.Fatal(err)
			}
			source, err := os.OpenRoot(from)
			if err != nil {
				t.Fatal(err)
			}
			defer source.Close()
			target, err := os.OpenRoot(to)
			if err != nil {
				t.Fatal(err)
			}
			defer target.Close()
			t.Cleanup(func() { os.Chmod(filepath.Join(to, "locked"), 0o755) })
			c := &Copy{Preserve: all, Note: func(text string) { t.Errorf("noted: %s", text) }}
			var archive bytes.Buffer
			p := newPacker(&archive, c)
			if err := p.all(source); err != nil {
				t.Fatal(err)
			}
			if err := unpack(&archive, target, "", c); err != nil {
				t.Fatal(err)
			}
			want, got := describe(t, from, all), describe(t, to, all)
			if !all {
				// The umask takes bits, and a directory stays one that its owner can write.
				want["open"] = strings.Replace(want["open"], "-rw-rw-rw-", "-rw-r--r--", 1)
				want["read only"] = strings.Replace(want["read only"], "-r--r--r--", "-rw-r--r--", 1)
				want["locked/file"] = strings.Replace(want["locked/file"], "-r--------", "-rw-------", 1)
				want["locked"], want["sticky"] = "drwxr-xr-x", "drwxr-xr-x"
			}
			if diff := gocmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if len(p.holes) != 1 || p.holes[0] != "holes" {
				t.Errorf("holes are noted in %q", p.holes)
			}
		})
	}
}

// A file whose archive is to hold one file gets the name that the caller chose, and
// nothing else is made.
func TestUnpackOne(t *testing.T) {
	for name, c := range map[string]struct {
		archive []byte
		want    string
	}{
		"one file":      {archive: clienttest.Archive(t, fileHeader("other"))},
		"two files":     {archive: clienttest.Archive(t, fileHeader("a"), fileHeader("b")), want: "does not hold one file"},
		"a directory":   {archive: clienttest.Archive(t, dirHeader("chosen")), want: "does not hold one file"},
		"a link":        {archive: clienttest.Archive(t, linkHeader(tar.TypeSymlink, "chosen", "../x")), want: "does not hold one file"},
		"a file around": {archive: clienttest.Archive(t, fileHeader("../chosen"))},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			err = unpack(bytes.NewReader(c.archive), root, "chosen", &Copy{Preserve: true})
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) || c.want == "" && err != nil {
				t.Errorf("got %v, want %q", err, c.want)
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e.Name() != "chosen" || !e.Type().IsRegular() {
					t.Errorf("%v was made", e)
				}
			}
		})
	}
}
