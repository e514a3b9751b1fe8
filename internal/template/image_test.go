package template

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

func TestPackImage(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	write(t, filepath.Join(root, "etc", "hello"), "from the tree")
	write(t, filepath.Join(root, "big"), strings.Repeat("x", 3<<20))
	if err := os.Symlink("hello", filepath.Join(root, "etc", "link")); err != nil {
		t.Fatal(err)
	}
	images := []string{filepath.Join(dir, "one.ext4"), filepath.Join(dir, "two.ext4")}
	var sums []string
	for _, image := range images {
		if err := PackImage(t.Context(), image, root); err != nil {
			t.Fatal(err)
		}
		f, err := hashFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if f.Size < 3<<20 || f.Size > 8<<20 {
			t.Errorf("%d bytes for a tree of 3 MiB", f.Size)
		}
		sums = append(sums, f.SHA256)
	}
	if sums[0] != sums[1] {
		t.Error("one tree makes two different images")
	}
	if err := (tool.Command{Name: "e2fsck", Args: []string{"-fn", images[0]}}).Run(t.Context()); err != nil {
		t.Error(err)
	}
	for command, want := range map[string]string{"cat /etc/hello": "from the tree", "stat /etc/link": `"hello"`} {
		out, err := tool.Command{Name: "debugfs", Args: []string{"-R", command, images[0]}}.Output(t.Context())
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%s: %q, %v", command, out, err)
		}
	}
	// An image is never written over.
	if err := PackImage(t.Context(), images[0], root); !os.IsExist(err) {
		t.Errorf("over an image: %v", err)
	}
}

// Holes and further names of a file take no room.
func TestPackImageMeasures(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	write(t, filepath.Join(root, "file"), strings.Repeat("x", 1<<20))
	for i := range 50 {
		if err := os.Link(filepath.Join(root, "file"), filepath.Join(root, fmt.Sprint("name", i))); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "sparse"), "start")
	if err := os.Truncate(filepath.Join(root, "sparse"), 15<<40); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "root.ext4")
	if err := PackImage(t.Context(), image, root); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(image); err != nil || fi.Size() > 16<<20 {
		t.Errorf("%d bytes, %v", fi.Size(), err)
	}
}

// Attributes take more room than there is for what an estimate forgets.
func TestPackImageWithAttributes(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil { // thousands of files take long on some disks
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	root := filepath.Join(dir, "root")
	for i := range 5000 {
		name := filepath.Join(root, fmt.Sprint("attr", i))
		write(t, name, "")
		if err := unix.Setxattr(name, "trusted.note", []byte(strings.Repeat(fmt.Sprintf("%08d", i), 100)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := PackImage(t.Context(), filepath.Join(dir, "root.ext4"), root); err != nil {
		t.Error(err)
	}
}
