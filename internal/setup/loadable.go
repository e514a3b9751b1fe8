package setup

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// loadableFormat is raised when this file changes what guests can load, so that a kernel
// that was fetched before is fetched again.
const loadableFormat = 1

// loadableFile is the archive of modules that a guest loads on demand. It is a part of
// the initrd: a guest has the modules of the kernel that it runs, in its memory, also when
// it is restored after a newer kernel was set up.
const loadableFile = "loadable.cpio"

// loadableModules are what guests can load on demand, below /lib/modules/RELEASE/kernel:
// patterns of path.Match, where one that ends with a slash stands for all below. What
// these need comes with them. Drivers of hardware are left out, and so are file systems of
// 1 MiB and more which no one mounts from a network.
var loadableModules = []string{
	"net/802/", "net/8021q/", "net/9p/", "net/bridge/", "net/core/", "net/dns_resolver/", "net/ife/",
	"net/ipv4/", "net/ipv6/", "net/key/", "net/l2tp/", "net/llc/", "net/mpls/", "net/netfilter/",
	"net/netlink/", "net/nsh/", "net/packet/", "net/psample/", "net/sched/",
	"net/sctp/", "net/sunrpc/*.ko*", "net/sunrpc/auth_gss/", "net/tls/", "net/unix/", "net/vmw_vsock/vsock*",
	"net/vmw_vsock/vmw_vsock_virtio*", "net/xfrm/",
	"drivers/net/dummy.ko*", "drivers/net/geneve.ko*", "drivers/net/ifb.ko*",
	"drivers/net/ipvlan/", "drivers/net/macvlan.ko*", "drivers/net/macvtap.ko*", "drivers/net/nlmon.ko*",
	"drivers/net/ppp/", "drivers/net/tap.ko*", "drivers/net/tun.ko*", "drivers/net/veth.ko*",
	"drivers/net/vrf.ko*", "drivers/net/vxlan/", "drivers/net/wireguard/",
	"drivers/block/brd.ko*", "drivers/block/loop.ko*", "drivers/block/nbd.ko*", "drivers/block/zram/",
	"drivers/md/dm-*",
	"fs/9p/", "fs/autofs/", "fs/binfmt_misc.ko*", "fs/erofs/", "fs/exfat/", "fs/fat/", "fs/fuse/", "fs/isofs/",
	"fs/lockd/", "fs/nfs/", "fs/nfs_common/", "fs/nls/nls_ascii*", "fs/nls/nls_cp437*", "fs/nls/nls_iso8859-1.*",
	"fs/nls/nls_utf8*", "fs/overlayfs/", "fs/smb/client/", "fs/squashfs/",
	"crypto/", "arch/x86/crypto/",
}

// unwantedModules are left out of them: tests, and what is large and rarely used.
var unwantedModules = []string{
	"crypto/tcrypt.ko*", "crypto/zstd.ko*", "drivers/md/dm-raid.ko*", "drivers/md/dm-zoned.ko*", "drivers/md/dm-cache*",
	"drivers/md/dm-zero.ko*", "net/netfilter/nf_conntrack_h323*", "net/ipv4/netfilter/nf_nat_h323*",
}

// writeLoadable writes the new archive path of the loadable modules in dir, such as
// /lib/modules/RELEASE, each packed, with the lists that modprobe reads.
func writeLoadable(ctx context.Context, path, dir, release string) error {
	err := packLoadable(ctx, path, dir, release)
	if err != nil {
		return fmt.Errorf("pack loadable modules: %w", err)
	}
	return nil
}

func packLoadable(ctx context.Context, path, dir, release string) error {
	work, err := os.MkdirTemp(filepath.Dir(path), ".loadable-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	at := filepath.Join(work, "lib", "modules", release)
	modules, err := copyLoadable(dir, at)
	if err != nil || len(modules) == 0 {
		return err
	}
	if err := packAll(ctx, modules); err != nil {
		return err
	}
	for _, list := range []string{"modules.order", "modules.builtin", "modules.builtin.modinfo"} {
		b, err := os.ReadFile(filepath.Join(dir, list))
		if err == nil {
			err = os.WriteFile(filepath.Join(at, list), b, 0o600)
		}
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	if err := (tool.Command{Name: "depmod", Args: []string{"-b", work, release}}).Run(ctx); err != nil {
		return err
	}
	// Only depmod itself reads these.
	for _, list := range []string{"modules.order", "modules.builtin.modinfo", "modules.symbols", "modules.symbols.bin"} {
		_ = os.Remove(filepath.Join(at, list))
	}
	return writeTree(path, work)
}

// wanted says whether a guest can load the module at name, a path below kernel/.
func wanted(name string) bool {
	matches := func(pattern string) bool {
		if strings.HasSuffix(pattern, "/") {
			return strings.HasPrefix(name, pattern)
		}
		ok, _ := path.Match(pattern, name)
		return ok
	}
	return slices.ContainsFunc(loadableModules, matches) && !slices.ContainsFunc(unwantedModules, matches)
}

// copyLoadable writes what a guest can load, and what that needs, unpacked into the same
// places below to, and returns the paths.
func copyLoadable(dir, to string) ([]string, error) {
	places := map[string]string{} // by name
	var roots []string
	kernel := filepath.Join(dir, "kernel")
	err := filepath.WalkDir(kernel, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base, _, ok := strings.Cut(d.Name(), ".ko")
		if !ok || !d.Type().IsRegular() {
			return nil
		}
		name, err := filepath.Rel(kernel, file)
		if err != nil {
			return err
		}
		places[moduleName(base)] = filepath.Join("kernel", filepath.Dir(name), base+".ko")
		if wanted(name) {
			roots = append(roots, base)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	modules, err := resolveModules(dir, roots)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, m := range modules {
		file := filepath.Join(to, places[m.name])
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return nil, err
		}
		if err := os.WriteFile(file, m.image, 0o600); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// packAll compresses each file on its own, on all CPUs. Of the formats that modprobe
// reads, xz is the one that all its builds know.
func packAll(ctx context.Context, files []string) error {
	n := runtime.NumCPU()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var mine []string
			for j := i; j < len(files); j += n {
				mine = append(mine, files[j])
			}
			if len(mine) > 0 {
				errs[i] = tool.Command{Name: "xz", Args: append([]string{"--check=crc32", "--threads=1", "--"}, mine...)}.Run(ctx)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
