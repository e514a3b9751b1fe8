package client

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

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

// contents is all that is below a directory except skip: what each thing is and
// holds.
func contents(t *testing.T, dir, skip string) map[string]string {
	t.Helper()
	seen := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name == skip {
			return fs.SkipDir
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		seen[name] = fmt.Sprint(info.Mode(), st.Ino, st.Nlink, st.Uid, st.Rdev)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			seen[name] += fmt.Sprintf(" %q", data)
		case info.Mode().Type() == fs.ModeSymlink:
			to, err := os.Readlink(name)
			if err != nil {
				return err
			}
			seen[name] += " -> " + to
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

// ground is a directory with a target for copies, in which all kinds of things
// lead out, and what lies outside of it.
type ground struct {
	dir, target string
	pipe        *os.File // its other end
}

func newGround(t *testing.T) *ground {
	t.Helper()
	g := &ground{dir: t.TempDir()}
	g.target = filepath.Join(g.dir, "target")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(g.dir, "outside/deep"), 0o755))
	check(os.Mkdir(g.target, 0o755))
	check(os.WriteFile(filepath.Join(g.dir, "outside/kept"), []byte("kept"), 0o600))
	check(os.WriteFile(filepath.Join(g.target, "private"), []byte("private"), 0o600))
	check(os.Mkdir(filepath.Join(g.target, "dir"), 0o755))
	check(os.WriteFile(filepath.Join(g.target, "dir/own"), []byte("own"), 0o600))
	for name, to := range map[string]string{
		"link": "../outside/kept", "dirlink": "../outside", "dangling": "../outside/new", "inside": "private",
		"insidedir": "dir", "absolute": filepath.Join(g.dir, "outside/kept"), "loop": "loop",
	} {
		check(os.Symlink(to, filepath.Join(g.target, name)))
	}
	check(syscall.Mkfifo(filepath.Join(g.dir, "outside/pipe"), 0o600))
	check(os.Link(filepath.Join(g.dir, "outside/pipe"), filepath.Join(g.target, "pipe")))
	check(os.Link(filepath.Join(g.dir, "outside/kept"), filepath.Join(g.target, "hard")))
	if os.Geteuid() == 0 {
		check(syscall.Mknod(filepath.Join(g.target, "device"), syscall.S_IFCHR|0o600, 1<<8|3))
	}
	// With a reader, a write into the pipe would not even wait.
	var err error
	g.pipe, err = os.OpenFile(filepath.Join(g.target, "pipe"), os.O_RDWR|syscall.O_NONBLOCK, 0)
	check(err)
	t.Cleanup(func() { g.pipe.Close() })
	return g
}

// outside is what no copy may change. How many names a file has is left out:
// the target has some of them, which may go.
func (g *ground) outside(t *testing.T) map[string]string {
	t.Helper()
	seen := contents(t, g.dir, g.target)
	for name, what := range seen {
		f := strings.Fields(what)
		seen[name] = strings.Join(append(f[:2:2], f[3:]...), " ")
	}
	delete(seen, g.dir) // the target's own name
	_ = g.pipe.SetReadDeadline(time.Now())
	if n, _ := g.pipe.Read(make([]byte, 10)); n > 0 {
		seen["pipe"] = fmt.Sprintf("%d bytes were written to it", n)
	}
	return seen
}

// cp copies into or out of the sandbox of an agent, whichever of the two paths
// begins with its ID.
func cp(t *testing.T, agent, from, to string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s := sandboxOf(t, agent)
	if path, ok := strings.CutPrefix(from, s.ID+":"); ok {
		return s.CopyOut(ctx, Copy{}, path, to)
	}
	return s.CopyIn(ctx, Copy{}, from, strings.TrimPrefix(to, s.ID+":"))
}

// sandboxOf is the sandbox of an agent.
func sandboxOf(t *testing.T, agent string) *Sandbox {
	t.Helper()
	h, err := New(agent, "")
	if err != nil {
		t.Fatal(err)
	}
	return h.Sandbox(clienttest.ID)
}

func dirHeader(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o7777}
}

func fileHeader(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o6777}
}

func linkHeader(kind byte, name, to string) tar.Header {
	return tar.Header{Name: name, Typeflag: kind, Linkname: to, Mode: 0o777}
}

// obstacles are names in a ground's target.
func obstacles() []string {
	return []string{"link", "dirlink", "dangling", "inside", "insidedir", "absolute", "loop", "pipe", "hard", "private", "dir"}
}

// hostileArchives has every kind of entry that leads out, and what becomes of
// some in the target.
func hostileArchives() map[string][]tar.Header {
	all := map[string][]tar.Header{
		"dots":                  {fileHeader("../outside/x")},
		"dots in the middle":    {fileHeader("dir/../../outside/x")},
		"absolute":              {fileHeader("/outside/x")},
		"through a link":        {linkHeader(tar.TypeSymlink, "l", "../outside"), fileHeader("l/x")},
		"over a link":           {linkHeader(tar.TypeSymlink, "x", "../outside/x"), fileHeader("x")},
		"over a link to a file": {linkHeader(tar.TypeSymlink, "x", "../outside/kept"), fileHeader("x")},
		"a directory's link":    {linkHeader(tar.TypeSymlink, "l", "../outside"), dirHeader("l/"), fileHeader("l/x")},
		"link to the parent":    {linkHeader(tar.TypeSymlink, "l", ".."), fileHeader("l/outside/kept")},
		"links in a row": {
			linkHeader(tar.TypeSymlink, "a", "."), linkHeader(tar.TypeSymlink, "a/b", ".."), fileHeader("a/b/outside/kept"),
		},
		"a hard link out":        {linkHeader(tar.TypeLink, "x", "../outside/kept"), fileHeader("x")},
		"a hard link, absolute":  {linkHeader(tar.TypeLink, "x", "/outside/kept"), fileHeader("x")},
		"hard link through link": {linkHeader(tar.TypeSymlink, "l", "../outside"), linkHeader(tar.TypeLink, "x", "l/kept"), fileHeader("x")},
		"hard link to a link":    {linkHeader(tar.TypeSymlink, "l", "../outside/kept"), linkHeader(tar.TypeLink, "x", "l"), fileHeader("x")},
		"hard link to what was":  {linkHeader(tar.TypeLink, "x", "private")},
		"hard link to itself":    {fileHeader("x"), linkHeader(tar.TypeLink, "x", "x")},
		"device and pipe": {
			{Name: "dev", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3},
			{Name: "block", Typeflag: tar.TypeBlock, Mode: 0o666}, {Name: "p", Typeflag: tar.TypeFifo, Mode: 0o666},
		},
		"file twice":          {fileHeader("x"), fileHeader("x")},
		"file, then dir":      {fileHeader("x"), dirHeader("x"), fileHeader("x/y")},
		"dir, then link":      {dirHeader("x"), linkHeader(tar.TypeSymlink, "x", "../outside"), fileHeader("x/y")},
		"dir with files":      {fileHeader("x/y"), linkHeader(tar.TypeSymlink, "x", "../outside"), fileHeader("x/y")},
		"link to nothing":     {linkHeader(tar.TypeSymlink, "x", "")},
		"the top as a file":   {fileHeader("."), fileHeader("./.")},
		"the top as a link":   {linkHeader(tar.TypeSymlink, "./", "../outside"), fileHeader("kept")},
		"a long name":         {fileHeader(strings.Repeat("x", 300))},
		"a long path":         {fileHeader(strings.Repeat("x/", 3000) + "x")},
		"a long link":         {linkHeader(tar.TypeSymlink, "x", strings.Repeat("y", 5000))},
		"names of part files": {linkHeader(tar.TypeSymlink, fmt.Sprintf(".x.%d.part", os.Getpid()), "../outside/kept"), fileHeader("x")},
	}
	for _, there := range append(obstacles(), "device") {
		all["file over "+there] = []tar.Header{fileHeader(there)}
		all["directory over "+there] = []tar.Header{dirHeader(there)}
		all["file below "+there] = []tar.Header{fileHeader(there + "/kept")}
		all["link over "+there] = []tar.Header{linkHeader(tar.TypeSymlink, there, "../outside/kept"), fileHeader(there)}
		all["hard link over "+there] = []tar.Header{fileHeader("y"), linkHeader(tar.TypeLink, there, "y")}
		all["hard link to "+there] = []tar.Header{linkHeader(tar.TypeLink, "z", there), fileHeader("z")}
	}
	return all
}

// Whatever a guest's archive says, and whatever an earlier copy has left in the
// target, nothing outside of it is touched, and no right is lent.
func TestCopyStaysInItsTarget(t *testing.T) {
	for name, entries := range hostileArchives() {
		t.Run(name, func(t *testing.T) {
			g := newGround(t)
			before := g.outside(t)
			own := contents(t, g.target, "")
			h := &clienttest.Agent{Archive: clienttest.Archive(t, entries...)}
			h.Entry = clienttest.Dir("/x")
			host := h.Serve(t)
			for range 2 {
				t.Logf("cp: %v", cp(t, host, clienttest.ID+":/x/.", g.target))
				if diff := gocmp.Diff(before, g.outside(t)); diff != "" {
					t.Fatalf("outside of the target: %s", diff)
				}
			}
			for path, what := range contents(t, g.target, "") {
				mode := strings.Fields(what)[0]
				if own[path] == "" && strings.ContainsAny(mode, "ugtpDcS") {
					t.Errorf("%s was made as %s", path, mode)
				}
				if strings.HasSuffix(path, ".part") && !strings.Contains(name, "part") {
					t.Errorf("%s was left", path)
				}
			}
			for _, kept := range []string{"private", "dir/own"} {
				path := filepath.Join(g.target, kept)
				if got := contents(t, g.target, "")[path]; !strings.Contains(name, kept) && got != own[path] {
					t.Errorf("%s was %s and is %s", kept, own[path], got)
				}
			}
		})
	}
}

// The same for one file, under a name of the caller's or inside a directory.
func TestCopyOfAFileStaysInItsTarget(t *testing.T) {
	const refused, replaced = false, true
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		// What a name inside of the target leads to is not followed, but replaced.
		{"link", "", replaced}, {"dangling", "", replaced}, {"inside", "", replaced}, {"absolute", "", replaced}, {"loop", "", replaced},
		{"dirlink", "", replaced}, {"insidedir", "", replaced}, {"pipe", "", replaced}, {"hard", "", replaced}, {"device", "", replaced},
		{"private", "", replaced}, {"new", "", replaced}, {"dir", "", refused},
		// What the caller names itself is replaced if it is a file.
		{"x", "hard", replaced}, {"x", "private", replaced}, {"x", "new", replaced}, {"x", "none/new", refused},
		{"x", "link", refused}, {"x", "dangling", refused}, {"x", "inside", refused}, {"x", "absolute", refused},
		{"x", "loop", refused}, {"x", "pipe", refused}, {"x", "device", refused}, {"x", "private/", refused},
		// A link to a directory that the caller names is a directory.
		{"x", "insidedir", replaced}, {"x", "dir/", replaced},
	} {
		t.Run(c.from+" to "+c.to, func(t *testing.T) { copyAFile(t, c.from, c.to, c.want) })
	}
}

// copyAFile copies a file named from into a ground's target, or to a name in it.
func copyAFile(t *testing.T, from, to string, want bool) {
	g := newGround(t)
	if _, err := os.Lstat(filepath.Join(g.target, "device")); err != nil && (from == "device" || to == "device") {
		t.Skip("only root makes devices")
	}
	before := g.outside(t)
	host := (&clienttest.Agent{File: []byte("bad"), Entry: clienttest.File(0o6755)}).Serve(t)
	target, made := g.target, filepath.Join(g.target, from)
	if to != "" {
		target += "/" + to
		made = filepath.Join(g.target, to)
	}
	if strings.Contains(to, "dir") {
		made = filepath.Join(made, from)
	}
	for range 2 {
		if err := cp(t, host, clienttest.ID+":/srv/"+from, target); (err == nil) != want {
			t.Errorf("cp: %v", err)
		}
		if diff := gocmp.Diff(before, g.outside(t)); diff != "" {
			t.Fatalf("outside of the target: %s", diff)
		}
		if info, err := os.Lstat(made); want && (err != nil || info.Mode() != 0o755) {
			t.Errorf("%v, %v", info, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(g.target, ".*.part")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A directory goes into the target under its name, where a link of that name
// may lead out.
func TestCopyOfADirectoryStaysInItsTarget(t *testing.T) {
	for _, name := range append(obstacles(), "new") {
		t.Run(name, func(t *testing.T) {
			g := newGround(t)
			before := g.outside(t)
			h := &clienttest.Agent{Archive: clienttest.Archive(t, fileHeader("kept"))}
			h.Entry = clienttest.Dir("/x")
			host := h.Serve(t)
			for range 2 {
				if err := cp(t, host, clienttest.ID+":/srv/"+name, g.target); (err == nil) != (name == "dir" || name == "new") {
					t.Errorf("cp: %v", err)
				}
				if diff := gocmp.Diff(before, g.outside(t)); diff != "" {
					t.Fatalf("outside of the target: %s", diff)
				}
			}
		})
	}
}

// An archive that goes on for ever, or says more than it holds, ends with an
// error and not with a full disk.
func TestCopyOfAnEndlessArchive(t *testing.T) {
	whole := clienttest.Archive(t, fileHeader("x"))
	inPAX := clienttest.Archive(t, tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: map[string]string{
		"GNU:sparse.major": "0", "GNU:sparse.minor": "1", "GNU:sparse.size": "8589934591",
		"GNU:sparse.numblocks": "1", "GNU:sparse.map": "8589934588,3",
	}})
	for name, c := range map[string]struct {
		archive []byte
		want    string
	}{
		"padding for ever": {append(slices.Clone(whole), make([]byte, 3<<20)...), "goes on"},
		"a size of 8 GiB":  {append(patched(whole, 124, "77777777777\x00"), make([]byte, 1<<20)...), "EOF"},
		"a size below 0":   {patched(whole, 124, strings.Repeat("\xff", 12)), "archive"},
		"no archive":       {bytes.Repeat([]byte("not one "), 1000), "archive"},
		"cut":              {whole[:513], "EOF"},
		"too deep":         {clienttest.Archive(t, dirHeader(strings.Repeat("x/", maxDepth)+"x")), "deep"},
		// Of nothing but a size, 8 GiB of zeros.
		"a sparse file": {
			patched(whole, 156, "S", 257, "ustar  \x00", 386, "77777777777\x0000000000000\x00",
				483, "77777777777\x00", 124, "00000000000\x00"),
			"sparse",
		},
		"a sparse file in PAX": {bytes.ReplaceAll(inPAX, []byte("GNU:"), []byte("GNU.")), "sparse"},
	} {
		t.Run(name, func(t *testing.T) {
			h := &clienttest.Agent{Archive: c.archive}
			h.Entry = clienttest.Dir("/x")
			target := t.TempDir()
			err := cp(t, h.Serve(t), clienttest.ID+":/x/.", target)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("cp: %v, want %q", err, c.want)
			}
			if left, _ := filepath.Glob(filepath.Join(target, ".*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// repeated is one block, again and again.
type repeated []byte

func (r repeated) Read(p []byte) (int, error) { return copy(p, r), nil }

func TestUnpackTooMany(t *testing.T) {
	top, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	r := repeated(clienttest.Archive(t, dirHeader("./"))[:512])
	if err := (&tree{top: top, most: 100, copy: &Copy{}}).layAll(r); err == nil || !strings.Contains(err.Error(), "more than 100 entries") {
		t.Errorf("got %v", err)
	}
}

// patched is an archive whose first header has other text at some offsets, and
// the checksum that belongs to it.
func patched(archive []byte, at ...any) []byte {
	archive = slices.Clone(archive)
	for i := 0; i < len(at); i += 2 {
		copy(archive[at[i].(int):], at[i+1].(string))
	}
	copy(archive[148:156], "        ")
	sum := 0
	for _, b := range archive[:512] {
		sum += int(b)
	}
	copy(archive[148:], fmt.Sprintf("%06o\x00 ", sum))
	return archive
}
