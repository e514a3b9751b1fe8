package template

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

func TestPackEROFS(t *testing.T) {
	testenv.Program(t, "mkfs.erofs", "fsck.erofs", "dump.erofs")
	dir := t.TempDir()
	first, second := time.Unix(1_600_000_000, 0), time.Unix(1_790_000_000, 5)
	// Two trees that were made in another order.
	for _, order := range [][]string{{"a", "b", "c"}, {"c", "b", "a"}} {
		root := filepath.Join(dir, "root-"+order[0])
		for _, name := range order {
			write(t, filepath.Join(root, "d", name), strings.Repeat(name, 5000))
		}
		errs := []error{
			os.Link(filepath.Join(root, "d", "a"), filepath.Join(root, "linked")),
			os.Symlink("/no/where", filepath.Join(root, "link")),
			os.Chmod(filepath.Join(root, "d", "b"), 0o4711|os.ModeSetuid),
			unix.Setxattr(filepath.Join(root, "d", "c"), "user.mine", []byte("value"), 0),
			os.Chtimes(filepath.Join(root, "d", "a"), first, first),
		}
		for _, name := range []string{"d/b", "d/c", "d", "."} {
			errs = append(errs, os.Chtimes(filepath.Join(root, name), second, second))
		}
		at := []unix.Timespec{{Sec: 1}, {Sec: 1}}
		errs = append(errs, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(root, "link"), at, unix.AT_SYMLINK_NOFOLLOW))
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	image, again := filepath.Join(dir, "image"), filepath.Join(dir, "again")
	for file, root := range map[string]string{image: "root-a", again: "root-c"} {
		if err := PackEROFS(t.Context(), file, filepath.Join(dir, root)); err != nil {
			t.Fatal(err)
		}
	}
	f, err := hashFile(image)
	if g, e := hashFile(again); err != nil || e != nil || f != g {
		t.Errorf("equal trees make %+v and %+v, %v", f, g, errors.Join(err, e))
	}
	if err := PackEROFS(t.Context(), image, dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}

	out := filepath.Join(dir, "out")
	if err := (tool.Command{Name: "fsck.erofs", Args: []string{"--extract=" + out, image}}).Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"d/a", "d/b", "d/c", "linked"} {
		want := strings.Repeat(strings.ReplaceAll(filepath.Base(name), "linked", "a"), 5000)
		if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(got) != want {
			t.Errorf("%s has %d bytes, %v", name, len(got), err)
		}
	}
	if to, err := os.Readlink(filepath.Join(out, "link")); err != nil || to != "/no/where" {
		t.Errorf("link leads to %q, %v", to, err)
	}
	if mode := modeIn(t, image, "/d/b"); mode != unix.S_IFREG|0o4711 {
		t.Errorf("mode of a program with setuid: %o", mode)
	}
	// An inode with data beside it or with attributes is one that gVisor does not open.
	for path, want := range map[string]string{
		"/d/a": "2020-09-13 12:26:40", "/d/b": "Access: 0711", "/d/c": "2026-09-21",
	} {
		said, err := tool.Command{Name: "dump.erofs", Args: []string{"--path=" + path, image}, Env: []string{"TZ=UTC"}}.Output(t.Context())
		if err != nil || !strings.Contains(said, want) || !strings.Contains(said, "Layout: 0 ") || !strings.Contains(said, "Xattr size: 0") {
			t.Errorf("%s, want %s: %s, %v", path, want, said, err)
		}
	}
}

// modeIn is the mode of a file as its inode has it, which no tool shows in full.
func modeIn(t *testing.T, image, path string) uint16 {
	t.Helper()
	said, err := tool.Command{Name: "dump.erofs", Args: []string{"--path=" + path, image}}.Output(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var nid int
	if _, after, ok := strings.Cut(said, "NID:"); !ok {
		t.Fatal(said)
	} else if _, err := fmt.Sscan(after, &nid); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint16(data[nid*32+4:])
}

func TestPackEROFSRefuses(t *testing.T) {
	dir := t.TempDir()
	root, image := filepath.Join(dir, "root"), filepath.Join(dir, "image")
	write(t, filepath.Join(root, "sparse"), "x")
	if err := os.Truncate(filepath.Join(root, "sparse"), 2<<30); err != nil {
		t.Fatal(err)
	}
	if err := PackEROFS(t.Context(), image, root); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("a file of holes: %v", err)
	}
	if err := PackEROFS(t.Context(), image, filepath.Join(dir, "missing")); err == nil {
		t.Error("no tree: no error")
	}
	if names := left(t, dir); len(names) != 1 {
		t.Errorf("left %v", names)
	}
}

// setEROFS gives a build an EROFS of the contents.
func setEROFS(t *testing.T, stage *BuildStage, content string) {
	t.Helper()
	path := filepath.Join(stage.Dir(), "flat")
	write(t, path, content)
	if err := stage.SetEROFS(t.Context(), path); err != nil {
		t.Fatal(err)
	}
}

// publishAs makes what is staged a ready build and returns it.
func publishAs(t *testing.T, s *Store, info Info, b Build, stage *BuildStage) Template {
	t.Helper()
	if _, _, err := stage.Publish(t.Context(), making()); err != nil {
		t.Fatal(err)
	}
	if err := s.Finish(t.Context(), info.ID, b.ID, nil); err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	tmpl, err := s.Get(info.ID + ":" + b.ID)
	if err != nil {
		t.Fatal(err)
	}
	return tmpl
}

// A build has its root as one EROFS, which those on the same stack share and those on a
// higher one do not have.
func TestBuildWithEROFS(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	if tmpl, err := s.Get("minimal"); err != nil || tmpl.EROFS.Path != "" || tmpl.InitImage != "" {
		t.Errorf("without: %+v, %v", tmpl, err)
	}
	info, b, stage := begin(t, s, NewBuild{Name: "flat"})
	layer(t, stage, "lowest")
	setEROFS(t, stage, "of another stack")
	layer(t, stage, "highest")
	if stage.EROFS() {
		t.Error("the EROFS is there without the layer above it")
	}
	setEROFS(t, stage, "all")
	flat := publishAs(t, s, info, b, stage)
	holds(t, flat, "lowest", "highest")
	if got, err := os.ReadFile(flat.EROFS.Path); err != nil || string(got) != "all" || flat.EROFS.SHA256 == "" || flat.EROFS.Size != 3 {
		t.Errorf("EROFS %+v: %q, %v", flat.EROFS, got, err)
	}
	if flat.RootSHA256 != rootDigest(flat.Layers) || b.Base != "" && b.Base != flat.RootSHA256 {
		t.Error("the EROFS is a part of the root's digest")
	}

	info2, b2, heir := begin(t, s, NewBuild{Name: "heir"})
	if err := heir.Inherit(flat); err != nil || !heir.EROFS() {
		t.Fatal("not inherited", err)
	}
	soFar, err := heir.Root(t.Context())
	if err != nil || soFar.EROFS.SHA256 != flat.EROFS.SHA256 {
		t.Errorf("root so far: %+v, %v", soFar.EROFS, err)
	}
	same := publishAs(t, s, info2, b2, heir)
	var st, st2 unix.Stat_t
	if err := errors.Join(unix.Stat(flat.EROFS.Path, &st), unix.Stat(same.EROFS.Path, &st2)); err != nil || st.Ino != st2.Ino {
		t.Errorf("not shared, %v", err)
	}
	if path := s.EROFSOf(flat.RootSHA256); path != flat.EROFS.Path && path != same.EROFS.Path {
		t.Errorf("found %q", path)
	}
	if path := s.EROFSOf("no such digest"); path != "" {
		t.Errorf("found %q", path)
	}
	if own, shared := s.Sizes(info2.ID, b2.ID); shared < 3*st.Blocks*512 {
		t.Errorf("sizes %d and %d", own, shared)
	}

	info3, b3, above := begin(t, s, NewBuild{Name: "above"})
	if err := above.Inherit(flat); err != nil {
		t.Fatal(err)
	}
	layer(t, above, "more")
	if tmpl := publishAs(t, s, info3, b3, above); tmpl.EROFS.Path != "" {
		t.Errorf("above: %+v", tmpl.EROFS)
	}

	if err := os.Chmod(same.EROFS.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(same.EROFS.Path, []byte("ill"), 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := map[string]bool{}
	err = s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error {
		damaged[v.Name] = errors.Is(v.Err, errdefs.Corrupt)
		return nil
	})
	if err != nil || !damaged["flat"] || !damaged["heir"] || damaged["above"] {
		t.Errorf("damaged: %v, %v", damaged, err)
	}
	// One that is missing makes the build a damaged one, as a layer would.
	if err := os.Remove(same.EROFS.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("heir"); !errors.Is(err, errdefs.Corrupt) {
		t.Errorf("without its EROFS: %v", err)
	}
}

func TestNewDisk(t *testing.T) {
	s := open(t, t.TempDir())
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	if err := s.NewDisk(t.Context(), path, 64); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Size != 64<<20 || st.Blocks != 0 || st.Mode&0o777 != 0o600 {
		t.Errorf("disk %+v, %v", st, err)
	}
	if err := s.NewDisk(t.Context(), path, 64); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a disk: %v", err)
	}
	for _, size := range []int{0, MinOverlayMiB - 1, MaxOverlayMiB + 1} {
		if err := s.NewDisk(t.Context(), filepath.Join(dir, "other"), size); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%d MiB: %v", size, err)
		}
	}
	if names := left(t, dir); len(names) != 1 {
		t.Errorf("left %v", names)
	}
}
