package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// kernelPackage is the Debian package that depends on the newest cloud
// kernel.
const kernelPackage = "linux-image-cloud-amd64"

// setupKernel makes kernels/default: the kernel, and the initrd made of its
// modules and envd. A newer envd over the same kernel is a new directory that
// shares the kernel's files.
func (s *Store) setupKernel(ctx context.Context, o Options, progress Progress) error {
	st := progress.begin("guest kernel")
	lock, err := lockFor(ctx, s.kernels(), st)
	if err != nil {
		return err
	}
	defer lock.unlock()
	envd, err := hashFile(o.Envd)
	if err != nil {
		return fmt.Errorf("read envd: %w", err)
	}

	dst := filepath.Join(s.kernels(), kernelName)
	have, err := s.kernelManifest()
	if errdefs.CannotRead(err) {
		return unreadable("the guest kernel", err)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("guest kernel is made again", "error", err)
	}
	usable := err == nil
	brought := o.Kernel != "" && o.Kernel != DebianKernel
	source := ""
	if brought {
		if source, err = broughtSource(o); err != nil {
			return err
		}
	}
	keep := usable && (o.Kernel == "" || brought && have.Source == source ||
		o.Kernel == DebianKernel && strings.HasPrefix(have.Source, kernelPackagePrefix))
	if keep && have.EnvdSHA256 == envd.SHA256 && have.InitrdFormat == initrdFormat {
		st.kept("%s", have.describe())
		progress.begin("initrd").kept("with this envd")
		return nil
	}

	tmp, err := tempDir(s.kernels(), kernelName)
	if err != nil {
		return err
	}
	defer removeTree(tmp) // after the exchange it is the old one
	m := kernelManifest{EnvdSHA256: envd.SHA256, InitrdFormat: initrdFormat}
	if err := os.Mkdir(filepath.Join(tmp, "modules"), 0o700); err != nil {
		return err
	}
	switch {
	case keep:
		m.Release, m.Source, m.Modules = have.Release, have.Source, have.Modules
		for name := range have.Files {
			if name == "initrd.img" {
				continue
			}
			if err := os.Link(filepath.Join(dst, name), filepath.Join(tmp, name)); err != nil {
				return fmt.Errorf("keep kernel: %w", err)
			}
		}
		st.kept("%s", have.describe())
	case brought:
		st.detail("unpacking")
		if err := importKernel(tmp, o.Kernel, o.Modules, &m); err != nil {
			return err
		}
		m.Source = source
		st.did("%s", m.describe())
	default:
		if err := fetchKernel(ctx, tmp, &m, st); err != nil {
			return err
		}
		st.did("%s", m.describe())
	}

	st = progress.begin("initrd")
	initrd := filepath.Join(tmp, "initrd.img")
	if err := writeInitrd(initrd, o.Envd, filepath.Join(tmp, "modules"), m.Modules); err != nil {
		return err
	}
	if err := publish(tmp, dst, "kernel.json", &m, &m.manifest); err != nil {
		return err
	}
	st.did("%.1f MiB, %d modules", float64(m.Files["initrd.img"].Size)/(1<<20), len(m.Modules))
	return nil
}

const kernelPackagePrefix = "package "

func (m *kernelManifest) describe() string {
	if m.Release == "" {
		return m.Source
	}
	return m.Release
}

// broughtSource names a kernel that the user brought by the digest of it and
// of where its modules are.
func broughtSource(o Options) (string, error) {
	f, err := hashFile(o.Kernel)
	if errors.Is(err, fs.ErrNotExist) {
		return "", errdefs.InvalidArgument.Errorf("kernel %s does not exist", o.Kernel)
	}
	if err != nil {
		return "", fmt.Errorf("read kernel: %w", err)
	}
	src := "file sha256:" + f.SHA256
	if o.Modules != "" {
		sum := sha256.Sum256([]byte(o.Modules))
		src += " modules:" + hex.EncodeToString(sum[:4])
	}
	return src, nil
}

// importKernel puts vmlinux and the modules into tmp and notes them in m.
func importKernel(tmp, kernel, modules string, m *kernelManifest) error {
	if err := writeVmlinux(filepath.Join(tmp, "vmlinux"), kernel); err != nil {
		return err
	}
	if modules == "" {
		return nil
	}
	m.Release = filepath.Base(modules)
	mods, err := resolveModules(modules, guestModules)
	if err != nil {
		return err
	}
	for _, mod := range mods {
		name := mod.name + ".ko"
		if err := os.WriteFile(filepath.Join(tmp, "modules", name), mod.image, 0o600); err != nil {
			return fmt.Errorf("write module: %w", err)
		}
		m.Modules = append(m.Modules, name)
	}
	return nil
}

// fetchKernel downloads Debian's cloud kernel with the host's apt, without
// installing it, and puts its parts into tmp.
func fetchKernel(ctx context.Context, tmp string, m *kernelManifest, st step) error {
	if err := needSpace(tmp, 400, "the guest kernel"); err != nil {
		return err
	}
	work := filepath.Join(tmp, "work")
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(work)

	st.detail("asking apt")
	pkg, err := kernelDependency(ctx)
	if err == nil {
		err = downloadPackage(ctx, work, pkg, st)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, errdefs.Exhausted) {
		// Lists that are missing or older than the archive: once more with
		// new ones.
		st.detail("refreshing apt's package lists")
		if uerr := (command{name: "apt-get", args: []string{"-q", "update"}}).run(ctx); uerr != nil {
			return errdefs.Unavailable.Errorf("refresh apt's package lists (check the network and apt's sources, then run wrenn setup again): %w", uerr)
		}
		if pkg, err = kernelDependency(ctx); err == nil {
			err = downloadPackage(ctx, work, pkg, st)
		}
	}
	if err != nil {
		return err
	}

	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("download %s: got %d files (%v)", pkg, len(debs), err)
	}
	version, err := command{name: "dpkg-deb", args: []string{"--field", debs[0], "Version"}}.output(ctx)
	if err != nil {
		return err
	}
	m.Source = kernelPackagePrefix + pkg + " " + strings.TrimSpace(version)
	st.detail("unpacking " + pkg)
	root := filepath.Join(work, "root")
	if err := (command{name: "dpkg-deb", args: []string{"--extract", debs[0], root}}).run(ctx); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return errdefs.Corrupt.Errorf("package %s holds %d kernels", pkg, len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	// /usr/lib in the packages of later releases.
	modules := filepath.Join(root, "lib", "modules", release)
	if _, err := os.Stat(modules); err != nil {
		modules = filepath.Join(root, "usr", "lib", "modules", release)
	}
	if err := importKernel(tmp, images[0], modules, m); err != nil {
		return err
	}
	// Which options the kernel has is asked as soon as something is missing.
	return os.Rename(filepath.Join(root, "boot", "config-"+release), filepath.Join(tmp, "config"))
}

// kernelDependency finds the concrete package behind kernelPackage.
func kernelDependency(ctx context.Context) (string, error) {
	out, err := command{name: "apt-cache", args: []string{"depends", "--important", kernelPackage}}.output(ctx)
	if err != nil {
		return "", errdefs.Unavailable.Errorf("apt does not know %s (bring a kernel of your own with --kernel): %w", kernelPackage, err)
	}
	for line := range strings.Lines(out) {
		if dep, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(dep, "linux-image-") {
			return dep, nil
		}
	}
	return "", errdefs.Unavailable.Errorf("%s depends on no kernel: bring a kernel of your own with --kernel", kernelPackage)
}

// downloadPackage fetches pkg's .deb into dir; apt checks its digest.
func downloadPackage(ctx context.Context, dir, pkg string, st step) error {
	out, err := command{name: "apt-get", args: []string{"-q", "download", "--print-uris", pkg}, dir: dir}.output(ctx)
	if err != nil {
		return fmt.Errorf("find %s: %w", pkg, err)
	}
	var total int64
	if fields := strings.Fields(out); len(fields) >= 3 { // 'uri' file size digest
		total, _ = strconv.ParseInt(fields[2], 10, 64)
	}
	if free := total * 8 >> 20; free > 0 {
		if err := needSpace(dir, free, "the guest kernel"); err != nil {
			return err
		}
	}
	text := "downloading " + pkg
	st.bytes(text, 0, total)
	err = command{
		name: "apt-get",
		// The directory is ours alone, so apt's own user could not write there.
		args: []string{"-q", "-o", "APT::Sandbox::User=root", "-o", "APT::Status-Fd=3", "download", pkg},
		dir:  dir,
		onStatus: func(line string) {
			// dlstatus:1:42.1:Retrieving file 1 of 1
			f := strings.SplitN(line, ":", 4)
			if len(f) < 3 || f[0] != "dlstatus" {
				return
			}
			if pct, err := strconv.ParseFloat(f[2], 64); err == nil {
				st.bytes(text, int64(pct/100*float64(total)), total)
			}
		},
	}.run(ctx)
	if err != nil && !errors.Is(err, errdefs.Exhausted) && ctx.Err() == nil {
		return errdefs.Unavailable.Errorf("download %s (check the network and apt's sources, then run wrenn setup again): %w", pkg, err)
	}
	return err
}
