package template

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

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
