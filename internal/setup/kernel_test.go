package setup

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// fakeVmlinux begins like a kernel and compresses a little.
func fakeVmlinux(size int) []byte {
	block := make([]byte, 4096)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range block {
		block[i] = byte(rnd.IntN(16))
	}
	b := bytes.Repeat(block, size/len(block))
	copy(b, elfMagic)
	return b
}

// bzImage wraps a compressed kernel as the build does.
func bzImage(payload []byte, size int, appendSize bool) []byte {
	if appendSize {
		payload = binary.LittleEndian.AppendUint32(payload, uint32(size))
	}
	const sects, offset = 3, 0x123
	b := make([]byte, (sects+1)*512+offset)
	b[offSetupSects] = sects
	copy(b[offMagic:], "HdrS")
	binary.LittleEndian.PutUint16(b[offVersion:], 0x20f)
	binary.LittleEndian.PutUint32(b[offPayload:], offset)
	binary.LittleEndian.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	b = append(b, payload...)
	return append(b, "what follows the payload"...)
}

func lz4Legacy(t *testing.T, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := lz4.NewWriter(&buf)
	if err := w.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestWriteVmlinux(t *testing.T) {
	want := fakeVmlinux(9 << 20) // more than one block of lz4's
	var gz bytes.Buffer
	zw := gzip.NewWriter(&gz)
	zw.Write(want)
	zw.Close()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	images := map[string][]byte{
		"vmlinux": want,
		"lz4":     bzImage(lz4Legacy(t, want), len(want), true),
		"gzip":    bzImage(gz.Bytes(), len(want), false), // its trailer is the size
		"zstd":    bzImage(enc.EncodeAll(want, nil), len(want), true),
	}
	dir := t.TempDir()
	for name, image := range images {
		src, dst := filepath.Join(dir, name), filepath.Join(dir, name+".out")
		write(t, src, string(image))
		if err := writeVmlinux(dst, src); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: unpacked %d bytes (%v), not what went in", name, len(got), err)
		}
	}
}

func TestWriteVmlinuxRefuses(t *testing.T) {
	good := bzImage(lz4Legacy(t, fakeVmlinux(1<<16)), 1<<16, true)
	with := func(change func(b []byte)) []byte {
		b := slices.Clone(good)
		change(b)
		return b
	}
	cases := map[string][]byte{
		"empty":        {},
		"text":         []byte(strings.Repeat("no kernel ", 100)),
		"old protocol": with(func(b []byte) { b[offVersion] = 0x07 }),
		"far payload":  with(func(b []byte) { binary.LittleEndian.PutUint32(b[offPayload:], 1<<31) }),
		"long payload": with(func(b []byte) { binary.LittleEndian.PutUint32(b[offPayloadLength:], 0xffffffff) }),
		"xz":           bzImage(append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, make([]byte, 64)...), 4096, true),
		"huge":         bzImage(lz4Legacy(t, fakeVmlinux(1<<16)), 1<<31, true),
		"no elf":       bzImage(lz4Legacy(t, bytes.Repeat([]byte("abcd"), 1000)), 4000, true),
		"cut":          good[:len(good)/2],
	}
	dir := t.TempDir()
	for name, image := range cases {
		src := filepath.Join(dir, name)
		write(t, src, string(image))
		if err := writeVmlinux(src+".out", src); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
}

func FuzzOpenVmlinux(f *testing.F) {
	f.Add([]byte("\x7fELF"))
	f.Add(bzImage([]byte{0x02, 0x21, 0x4c, 0x18, 9, 0, 0, 0, 1, 2, 3, 4}, 100, true))
	f.Add(bzImage([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, 100, true))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, size, err := openVmlinux(b)
		if err == nil {
			io.CopyN(io.Discard, r, min(size, 1<<20)) // must not panic
		}
	})
}

// koFile is the smallest ELF file with a .modinfo section.
func koFile(modinfo string) []byte {
	names := "\x00.modinfo\x00.shstrtab\x00"
	const headerSize, sectionSize = 64, 64
	infoOff := uint64(headerSize)
	namesOff := infoOff + uint64(len(modinfo))
	shOff := (namesOff + uint64(len(names)) + 7) &^ 7
	var b bytes.Buffer
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff: shOff, Ehsize: headerSize, Shentsize: sectionSize, Shnum: 3, Shstrndx: 2,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	binary.Write(&b, binary.LittleEndian, h)
	b.WriteString(modinfo)
	b.WriteString(names)
	b.Write(make([]byte, shOff-uint64(b.Len())))
	binary.Write(&b, binary.LittleEndian, []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: infoOff, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesOff, Size: uint64(len(names))},
	})
	return b.Bytes()
}

// moduleTree makes a directory like /lib/modules/RELEASE with all that the
// guest wants.
func moduleTree(t *testing.T, dir string) {
	t.Helper()
	ko := func(path, depends string) {
		write(t, filepath.Join(dir, "kernel", path), string(koFile("license=GPL\x00depends="+depends+"\x00name=x\x00")))
	}
	ko("drivers/virtio/virtio_ring.ko", "")
	ko("drivers/virtio/virtio.ko", "virtio_ring")
	ko("drivers/virtio/virtio_pci.ko", "virtio,virtio_ring")
	ko("drivers/virtio/virtio_mmio.ko", "virtio,virtio_ring")
	ko("drivers/virtio/virtio_balloon.ko", "virtio,virtio_ring")
	ko("drivers/net/net_failover.ko", "failover")
	ko("net/core/failover.ko", "")
	ko("drivers/net/virtio_net.ko", "net_failover,virtio")
	ko("drivers/char/hw_random/virtio-rng.ko", "virtio,rng-core")
	ko("fs/overlayfs/overlay.ko", "")
	ko("drivers/unwanted.ko", "nowhere")
	write(t, filepath.Join(dir, "modules.builtin"),
		"kernel/fs/ext4/ext4.ko\nkernel/drivers/char/hw_random/rng-core.ko\n")
	// One that is compressed.
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "kernel/drivers/block/virtio_blk.ko.zst"),
		string(enc.EncodeAll(koFile("depends=virtio\x00"), nil)))
}

var wantOrder = []string{
	"virtio_ring", "virtio", "virtio_pci", "virtio_mmio", "virtio_blk", "failover", "net_failover",
	"virtio_net", "virtio_rng", "virtio_balloon", "overlay",
}

func TestResolveModules(t *testing.T) {
	dir := t.TempDir()
	moduleTree(t, dir)
	mods, err := resolveModules(dir, guestModules)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range mods {
		got = append(got, m.name)
		if !bytes.HasPrefix(m.image, elfMagic) {
			t.Errorf("%s is not unpacked", m.name)
		}
	}
	if diff := cmp.Diff(wantOrder, got); diff != "" {
		t.Errorf("load order (-want +got):\n%s", diff)
	}
}

func TestResolveModulesRefuses(t *testing.T) {
	cases := []struct {
		name, module, depends string
		class                 *errdefs.Class
	}{
		{"missing dependency", "overlay.ko", "nowhere", errdefs.NotFound},
		{"cycle", "overlay.ko", "virtio_net,overlay", errdefs.Corrupt},
		{"unreadable compression", "overlay.ko.xz", "", errdefs.Unsupported},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			moduleTree(t, dir)
			if err := os.Remove(filepath.Join(dir, "kernel/fs/overlayfs/overlay.ko")); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "kernel/fs/overlayfs", c.module), string(koFile("depends="+c.depends+"\x00")))
			if _, err := resolveModules(dir, guestModules); !errors.Is(err, c.class) {
				t.Errorf("resolveModules = %v, want %v", err, c.class)
			}
		})
	}
}

func TestInitrdReadsBack(t *testing.T) {
	dir := t.TempDir()
	envd := filepath.Join(dir, "envd")
	write(t, envd, "the guest daemon")
	write(t, filepath.Join(dir, "modules/b.ko"), "bb")
	write(t, filepath.Join(dir, "modules/a.ko"), "aaa")
	path := filepath.Join(dir, "initrd.img")
	if err := writeInitrd(path, envd, dir, []string{"b.ko", "a.ko"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	type entry struct {
		Mode cpio.FileMode
		Body string
	}
	got := map[string]entry{}
	inodes := map[int64]bool{}
	r := cpio.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if inodes[h.Inode] || !h.ModTime.Equal(h.ModTime.Truncate(0)) || h.Uid != 0 || h.Guid != 0 {
			t.Errorf("%s: inode %d, owner %d:%d", h.Name, h.Inode, h.Uid, h.Guid)
		}
		inodes[h.Inode] = true
		got[h.Name] = entry{h.Mode, string(body)}
	}
	want := map[string]entry{
		"init":         {cpio.TypeReg | 0o755, "the guest daemon"},
		"modules/list": {cpio.TypeReg | 0o644, "b.ko\na.ko\n"},
		"modules/a.ko": {cpio.TypeReg | 0o644, "aaa"},
		"modules/b.ko": {cpio.TypeReg | 0o644, "bb"},
		"dev/console":  {cpio.TypeChar | 0o600, ""},
		"dev/null":     {cpio.TypeChar | 0o666, ""},
	}
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "base", "overlay", "newroot", "modules"} {
		want[d] = entry{cpio.TypeDir | 0o755, ""}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("initrd (-want +got):\n%s", diff)
	}
	// The reader above does not tell a device's numbers: 5, 1 is the console.
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(raw, []byte("dev/console\x00"))
	if at < 110 || string(raw[at-110+78:at-110+94]) != "0000000500000001" {
		t.Errorf("/dev/console is not device 5, 1")
	}

	again := filepath.Join(dir, "again.img")
	if err := writeInitrd(again, envd, dir, []string{"b.ko", "a.ko"}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(again); err != nil || !bytes.Equal(b, raw) {
		t.Error("equal parts make different initrds")
	}
}

func TestInitImageReadsBack(t *testing.T) {
	dir := t.TempDir()
	envd := filepath.Join(dir, "envd")
	write(t, envd, "the guest daemon")
	var sums []string
	for _, name := range []string{"one", "two"} {
		path := filepath.Join(dir, name)
		if err := writeInit(t.Context(), path, filepath.Join(dir, "work"), envd); err != nil {
			t.Fatal(err)
		}
		_, sum, err := digest.File(path)
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, sum)
	}
	if sums[0] != sums[1] {
		t.Error("equal parts make different images")
	}
	out := filepath.Join(dir, "out")
	if err := (tool.Command{Name: "fsck.erofs", Args: []string{"--extract=" + out, filepath.Join(dir, "one")}}).Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(out + "/*")
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	info, err := os.Stat(names[0])
	if err != nil || info.Name() != "init" || info.Mode() != 0o755 {
		t.Errorf("%s %s, %v", info.Name(), info.Mode(), err)
	}
	if text, err := os.ReadFile(names[0]); err != nil || string(text) != "the guest daemon" {
		t.Errorf("%q, %v", text, err)
	}
}

func open(t *testing.T, dir string) *template.Store {
	t.Helper()
	s, err := template.Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// brought is a kernel of the user's own, so that no network is needed.
func brought(t *testing.T) Options {
	t.Helper()
	dir := t.TempDir()
	o := Options{
		Envd:    filepath.Join(dir, "envd"),
		Kernel:  filepath.Join(dir, "bzImage"),
		Modules: filepath.Join(dir, "6.1.0-test"),
	}
	write(t, o.Envd, "envd 1")
	write(t, o.Kernel, string(bzImage(lz4Legacy(t, fakeVmlinux(1<<16)), 1<<16, true)))
	moduleTree(t, o.Modules)
	return o
}

func phases(t *testing.T, s *template.Store, o Options) []string {
	t.Helper()
	var got []string
	err := setupKernel(context.Background(), s, o, func(e progress.Event) {
		switch e.Phase {
		case progress.Did:
			got = append(got, e.Step+" made")
		case progress.Kept:
			got = append(got, e.Step+" kept")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// asEarlier makes a kernel one that a setup without init images made.
func asEarlier(t *testing.T, b template.Boot) {
	t.Helper()
	without := filepath.Join(filepath.Dir(b.InitImage), "kernel.json")
	text, err := os.ReadFile(without)
	if err != nil {
		t.Fatal(err)
	}
	older := regexp.MustCompile(`(?s)"init.erofs": \{.*?\},\s*`).ReplaceAll(text, nil)
	if err := os.WriteFile(without, older, 0o600); err != nil || len(older) == len(text) {
		t.Fatal("no earlier setup's manifest", err)
	}
	if err := os.Remove(b.InitImage); err != nil {
		t.Fatal(err)
	}
}

func TestSetupKernel(t *testing.T) {
	s := open(t, t.TempDir())
	o := brought(t)
	inode := func() uint64 {
		t.Helper()
		b, err := s.Boot()
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(b.Kernel)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Ino
	}
	check := func(what string, o Options, want ...string) template.Boot {
		t.Helper()
		if diff := cmp.Diff(want, phases(t, s, o)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
		b, err := s.Boot()
		if err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(filepath.Join(s.Dir(), "kernels"))
		if err != nil || len(entries) != 2 { // default and lock
			t.Errorf("%s: leaves %v, %v", what, entries, err)
		}
		return b
	}
	first := check("first", o, "guest kernel made", "initrd made")
	if first.Release != "6.1.0-test" {
		t.Errorf("release %q", first.Release)
	}
	check("second", o, "guest kernel kept", "initrd kept")
	check("no kernel named", Options{Envd: o.Envd}, "guest kernel kept", "initrd kept")

	ino := inode()
	write(t, o.Envd, "envd 2, newer")
	newer := check("newer envd", o, "guest kernel kept", "initrd made")
	if inode() != ino {
		t.Error("a newer envd copied the kernel")
	}
	if newer.InitSHA256 == first.InitSHA256 || newer.InitSHA256 == "" {
		t.Errorf("init images: %q, then %q", first.InitSHA256, newer.InitSHA256)
	}
	if newer.InitrdSHA256 == first.InitrdSHA256 || newer.KernelSHA256 != first.KernelSHA256 || newer.EnvdSHA256 == first.EnvdSHA256 {
		t.Errorf("digests: %+v, then %+v", first, newer)
	}
	b, err := os.ReadFile(newer.Initrd)
	if err != nil || !bytes.Contains(b, []byte("envd 2, newer")) {
		t.Errorf("the initrd holds the old envd (%v)", err)
	}

	asEarlier(t, newer)
	if b, err := s.Boot(); err != nil || b.InitImage != "" {
		t.Errorf("an earlier setup's: %+v, %v", b, err)
	}
	if again := check("earlier setup", o, "guest kernel kept", "initrd made"); again != newer {
		t.Errorf("made again: %+v, want %+v", again, newer)
	}

	if err := os.Truncate(newer.Kernel, 7); err != nil {
		t.Fatal(err)
	}
	check("damaged", o, "guest kernel made", "initrd made")

	write(t, o.Kernel, string(fakeVmlinux(1<<15)))
	other := check("other kernel", o, "guest kernel made", "initrd made")
	if other.KernelSHA256 == first.KernelSHA256 {
		t.Error("the other kernel is the same")
	}
}

// Whatever fails, what was there stays in use and nothing is left beside it.
func TestSetupKernelFailureKeepsTheOld(t *testing.T) {
	s := open(t, t.TempDir())
	o := brought(t)
	phases(t, s, o)
	before, err := s.Boot()
	if err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(*Options){
		"no envd":    func(o *Options) { o.Envd += "-missing" },
		"no kernel":  func(o *Options) { o.Kernel += "-missing" },
		"bad kernel": func(o *Options) { o.Kernel = o.Envd },
		"no modules": func(o *Options) { o.Modules = filepath.Dir(o.Modules) + "/none" },
	} {
		bad := o
		breakIt(&bad)
		if err := setupKernel(context.Background(), s, bad, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
		if after, err := s.Boot(); err != nil || after != before {
			t.Errorf("%s: boots %+v, %v", name, after, err)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Join(s.Dir(), "kernels"), ".*")); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	if err := Run(context.Background(), s, Options{Envd: o.Envd, Modules: o.Modules}, nil); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("modules without a kernel: %v", err)
	}
	if _, err := os.Stat(o.Kernel); errors.Is(err, fs.ErrNotExist) {
		t.Error("the user's kernel is gone")
	}
}
