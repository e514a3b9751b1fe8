package setup

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/ulikunitz/xz"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

func needTools(t *testing.T) {
	t.Helper()
	for _, name := range []string{"depmod", "xz"} {
		if _, err := tool.Find(name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
}

// An archive holds what guests load on demand, what that needs, and the lists of both.
func TestLoadable(t *testing.T) {
	needTools(t)
	dir := filepath.Join(t.TempDir(), "6.1.0-test")
	moduleTree(t, dir)
	ko := func(file, depends, alias string) string {
		image := string(koFile("license=GPL\x00alias=" + alias + "\x00depends=" + depends + "\x00name=x\x00"))
		write(t, filepath.Join(dir, "kernel", file), image)
		return image
	}
	tun := ko("drivers/net/tun.ko", "", "char-major-10-200\x00alias=devname:net/tun")
	ko("net/netfilter/nf_tables.ko", "libcrc32c", "nfnetlink-subsys-10")
	ko("lib/libcrc32c.ko", "", "none")
	ko("crypto/tcrypt.ko", "", "none")
	ko("drivers/net/ethernet/e1000.ko", "", "none")

	file := filepath.Join(t.TempDir(), "loadable.cpio")
	if err := writeLoadable(t.Context(), file, dir, "6.1.0-test"); err != nil {
		t.Fatal(err)
	}
	got := readArchive(t, file)
	var modules []string
	for name := range got {
		if strings.HasSuffix(name, ".ko.xz") {
			modules = append(modules, strings.TrimPrefix(name, "lib/modules/6.1.0-test/kernel/"))
		}
	}
	slices.Sort(modules)
	want := []string{"drivers/net/tun.ko.xz", "fs/overlayfs/overlay.ko.xz", "lib/libcrc32c.ko.xz", "net/core/failover.ko.xz",
		"net/netfilter/nf_tables.ko.xz"}
	if !slices.Equal(modules, want) {
		t.Errorf("modules %q, want %q", modules, want)
	}
	r, err := xz.NewReader(strings.NewReader(got["lib/modules/6.1.0-test/kernel/drivers/net/tun.ko.xz"]))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != tun {
		t.Errorf("tun is packed as %d bytes, %v, want %d", len(b), err, len(tun))
	}
	for list, line := range map[string]string{
		"modules.devname": "tun net/tun c10:200", "modules.alias": "alias nfnetlink-subsys-10 nf_tables",
		"modules.dep": "kernel/net/core/failover.ko.xz:",
	} {
		if !strings.Contains(got["lib/modules/6.1.0-test/"+list], line) {
			t.Errorf("%s has no %q: %q", list, line, got["lib/modules/6.1.0-test/"+list])
		}
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(file), ".*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}

	// The initrd is both archives.
	envd := filepath.Join(t.TempDir(), "envd")
	write(t, envd, "the guest daemon")
	initrd := envd + ".img"
	if err := writeInitrd(initrd, envd, filepath.Dir(file), nil); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(initrd)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if at := bytes.Index(whole, second); at < 0 || at%4 != 0 || at+len(second) > len(whole) {
		t.Errorf("the initrd has the archive at %d", at)
	}
}

func TestLoadableOfNothing(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "kernel/drivers/unwanted.ko"), string(koFile("depends=\x00")))
	file := filepath.Join(t.TempDir(), "loadable.cpio")
	if err := writeLoadable(t.Context(), file, dir, "6.1.0-test"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("there is an archive of nothing")
	}
}

func TestLoadableFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "kernel/drivers/net/tun.ko"), string(koFile("depends=nowhere\x00")))
	file := filepath.Join(t.TempDir(), "loadable.cpio")
	if err := writeLoadable(t.Context(), file, dir, "6.1.0-test"); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("got %v, want not found", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(file)); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// A kernel of before is made again where what it came from is at hand.
func TestSetupBringsLoadableModules(t *testing.T) {
	needTools(t)
	s := open(t, t.TempDir())
	o := brought(t)
	phases(t, s, o)
	manifest := filepath.Join(s.Dir(), "kernels", "default", "kernel.json")
	b, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	older := bytes.Replace(b, []byte(`"loadable_format": 1`), []byte(`"loadable_format": 0`), 1)
	if bytes.Equal(older, b) {
		t.Fatalf("the manifest says nothing of loadable modules: %s", b)
	}
	if err := os.WriteFile(manifest, older, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := phases(t, s, Options{Envd: o.Envd}); !slices.Equal(got, []string{"guest kernel kept", "initrd kept"}) {
		t.Errorf("without the kernel's file: %q", got)
	}
	if got := phases(t, s, o); !slices.Equal(got, []string{"guest kernel made", "initrd made"}) {
		t.Errorf("with it: %q", got)
	}
	boot, err := s.Boot()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(boot.Initrd); err != nil || !bytes.Contains(b, []byte("overlay.ko.xz")) {
		t.Errorf("the initrd has no loadable modules, %v", err)
	}
}

// readArchive returns the contents of the files in an archive, by name.
func readArchive(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := map[string]string{}
	for r := cpio.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = string(b)
	}
}
