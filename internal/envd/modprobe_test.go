package envd

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFindModules(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"modules.dep": "kernel/net/netfilter/nft_nat.ko.xz: kernel/net/netfilter/nf_tables.ko.xz kernel/lib/libcrc32c.ko.xz\n" +
			"kernel/drivers/net/tun.ko.xz:\nkernel/crypto/x86-aes.ko.xz:\nkernel/crypto/aes.ko.xz:\n",
		"modules.builtin": "kernel/fs/ext4/ext4.ko\n",
		"modules.alias": "# Aliases\nalias char-major-10-200 tun\nalias devname:net/tun tun\nalias nft-expr-nat nft_nat\n" +
			"alias crypto-aes x86_aes\nalias crypto-aes aes\nalias cpu:type:x86,ven*:feature:*0099* x86_aes\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nat := []string{"kernel/lib/libcrc32c.ko.xz", "kernel/net/netfilter/nf_tables.ko.xz", "kernel/net/netfilter/nft_nat.ko.xz"}
	tun := []string{"kernel/drivers/net/tun.ko.xz"}
	for name, want := range map[string][][]string{
		"tun": {tun}, "char-major-10-200": {tun}, "devname:net/tun": {tun}, "nft-nat": {nat}, "nft-expr-nat": {nat},
		"crypto-aes":                       {{"kernel/crypto/x86-aes.ko.xz"}, {"kernel/crypto/aes.ko.xz"}},
		"cpu:type:x86,ven1:feature:,0099,": {{"kernel/crypto/x86-aes.ko.xz"}},
		"ext4":                             nil,
	} {
		if got, err := findModules(dir, name); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, want)
		}
	}
	for _, name := range []string{"nosuch", "", "../tun", "*"} {
		if got, err := findModules(dir, name); err == nil {
			t.Errorf("%q is %v", name, got)
		}
	}
}

func TestParseModprobe(t *testing.T) {
	for args, want := range map[string]modprobe{
		"tun":                   {names: []string{"tun"}},
		"-q -- net-pf-16":       {quiet: true, names: []string{"net-pf-16"}},
		"dummy numdummies=2 a=": {names: []string{"dummy"}, params: "numdummies=2 a="},
		"-a tun dummy":          {names: []string{"tun", "dummy"}},
		"-r tun dummy":          {remove: true, names: []string{"tun", "dummy"}},
	} {
		if got, err := parseModprobe(strings.Fields(args)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v, want %+v", args, got, err, want)
		}
	}
	for _, args := range []string{"", "-q", "--show-depends tun"} {
		if got, err := parseModprobe(strings.Fields(args)); err == nil {
			t.Errorf("%q is %+v", args, got)
		}
	}
}

// No kernel has a module of that name.
func TestModprobeOfNothing(t *testing.T) {
	var out bytes.Buffer
	if status := Modprobe([]string{"no-such-module"}, &out); status != 1 || !strings.HasPrefix(out.String(), "modprobe: ") {
		t.Errorf("status %d, %q", status, out.String())
	}
	out.Reset()
	if status := Modprobe([]string{"-q", "no-such-module"}, &out); status != 1 || out.Len() > 0 {
		t.Errorf("quiet: status %d, %q", status, out.String())
	}
}

func TestDeviceFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("device files need root")
	}
	dir, dev := t.TempDir(), t.TempDir()
	list := "# Device nodes\nfuse fuse c10:229\nloop loop-control c10:237\ntun net/tun c10:200\nbad ../x c1:1\nbad\n"
	if err := os.WriteFile(filepath.Join(dir, "modules.devname"), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // files that are there stay
		if err := deviceFiles(dir, dev); err != nil {
			t.Skipf("device files cannot be made here: %v", err)
		}
	}
	for name, want := range map[string]struct {
		mode uint32
		dev  uint64
	}{
		"fuse":         {unix.S_IFCHR | 0o666, unix.Mkdev(10, 229)},
		"net/tun":      {unix.S_IFCHR | 0o666, unix.Mkdev(10, 200)},
		"loop-control": {unix.S_IFCHR | 0o600, unix.Mkdev(10, 237)},
		"loop7":        {unix.S_IFBLK | 0o600, unix.Mkdev(7, 7)},
	} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dev, name), &st); err != nil || st.Mode != want.mode || st.Rdev != want.dev {
			t.Errorf("%s: mode %o, device %x, %v, want %o, %x", name, st.Mode, st.Rdev, err, want.mode, want.dev)
		}
	}
	if _, err := os.Lstat(filepath.Join(dev, "../x")); err == nil {
		t.Error("a name led out of the directory")
	}
}
