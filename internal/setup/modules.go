package setup

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// guestModules are what the guest needs before it can reach its root and its
// network; what these need in turn is read from the modules themselves.
var guestModules = []string{
	"virtio_pci",
	"virtio_mmio",
	"virtio_blk",
	"virtio_net",
	"virtio_rng",
	"virtio_balloon",
	"ext4",
	"overlay",
}

// module is one loadable module, unpacked.
type module struct {
	name  string // as modprobe spells it, with underscores
	image []byte
}

// resolveModules returns the modules among roots, and all that they depend
// on, in load order, from a directory such as /lib/modules/RELEASE. What the
// kernel has built in is left out. A module that is neither there nor built
// in is errdefs.NotFound.
func resolveModules(dir string, roots []string) ([]module, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if base, _, ok := strings.Cut(d.Name(), ".ko"); ok && d.Type().IsRegular() {
			paths[moduleName(base)] = path
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find modules: %w", err)
	}
	builtin, err := builtinModules(dir)
	if err != nil {
		return nil, fmt.Errorf("find modules: %w", err)
	}

	var order []module
	state := map[string]int{} // 1 while its dependencies are walked, 2 when placed
	var visit func(name, neededBy string) error
	visit = func(name, neededBy string) error {
		if state[name] == 2 || builtin[name] {
			return nil
		}
		if state[name] == 1 {
			return errdefs.Corrupt.Errorf("module %s depends on itself", name)
		}
		path, ok := paths[name]
		if !ok {
			return errdefs.NotFound.Errorf("the kernel has no module %s, which %s needs", name, neededBy)
		}
		state[name] = 1
		image, err := readModule(path)
		if err != nil {
			return fmt.Errorf("read module %s: %w", name, err)
		}
		deps, err := moduleDepends(image)
		if err != nil {
			return fmt.Errorf("read module %s: %w", name, err)
		}
		for _, d := range deps {
			if err := visit(moduleName(d), name); err != nil {
				return err
			}
		}
		state[name] = 2
		order = append(order, module{name, image})
		return nil
	}
	for _, r := range roots {
		if err := visit(moduleName(r), "the guest"); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func builtinModules(dir string) (map[string]bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		base, _, _ := strings.Cut(filepath.Base(strings.TrimSpace(line)), ".ko")
		names[moduleName(base)] = true
	}
	return names, nil
}

// readModule returns the module's ELF image, unpacked: finit_module in a
// guest without kmod takes nothing else for granted.
func readModule(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	switch filepath.Ext(path) {
	case ".ko":
		return b, nil
	case ".gz":
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case ".zst":
		r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	return nil, errdefs.Unsupported.Errorf("%s: only plain, .gz and .zst modules can be read: unpack it first", filepath.Base(path))
}

// moduleDepends reads the depends= entry of a module's .modinfo section.
func moduleDepends(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := sec.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
