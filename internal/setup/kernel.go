package setup

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

	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// kernelPackage is the Debian package that depends on the newest cloud
// kernel.
const kernelPackage = "linux-image-cloud-amd64"

// setupKernel makes the guest kernel: the kernel itself, the initrd made of its modules and
// envd, and the image with envd alone for drivers that have a kernel of their own. A newer
// envd over the same kernel is a new directory that shares the kernel's files.
func setupKernel(ctx context.Context, s *template.Store, o Options, report progress.Func) error {
	st := report.Begin("guest kernel")
	_, envd, err := digest.File(o.Envd)
	if err != nil {
		return fmt.Errorf("read envd: %w", err)
	}
	stage, err := s.StageKernel(ctx, waiting(st))
	if err != nil {
		return err
	}
	defer stage.Discard()
	brought := o.Kernel != "" && o.Kernel != DebianKernel
	source := ""
	if brought {
		if source, err = broughtSource(o); err != nil {
			return err
		}
	}
	have := stage.Have
	current := have != nil && have.EnvdSHA256 == envd && have.InitrdFormat == initrdFormat && stage.HasInit()
	keep := keeps(have, o, source)
	if keep && current {
		st.Kept("%s", describe(have))
		report.Begin("initrd").Kept("with this envd")
		return nil
	}

	k := template.Kernel{}
	switch {
	case keep:
		k.Release, k.Source, k.Modules, k.LoadableFormat = have.Release, have.Source, have.Modules, have.LoadableFormat
		if err := stage.Keep(); err != nil {
			return err
		}
		st.Kept("%s", describe(have))
	case brought:
		st.Detail("unpacking")
		if err := importKernel(ctx, stage.Dir, o.Kernel, o.Modules, &k); err != nil {
			return err
		}
		k.Source = source
		st.Did("%s", describe(&k))
	default:
		if err := fetchKernel(ctx, stage.Dir, &k, st); err != nil {
			return err
		}
		st.Did("%s", describe(&k))
	}

	st = report.Begin("initrd")
	initrd := filepath.Join(stage.Dir, "initrd.img")
	if err := writeInitrd(initrd, o.Envd, stage.Dir, k.Modules); err != nil {
		return err
	}
	if err := writeInit(ctx, filepath.Join(stage.Dir, "init.erofs"), filepath.Join(stage.Dir, "init"), o.Envd); err != nil {
		return err
	}
	size, err := os.Stat(initrd)
	if err != nil {
		return err
	}
	k.EnvdSHA256, k.InitrdFormat = envd, initrdFormat
	if err := stage.Publish(k); err != nil {
		return err
	}
	st.Did("%.1f MiB, %d modules", float64(size.Size())/(1<<20), len(k.Modules))
	return nil
}

const kernelPackagePrefix = "package "

// keeps says whether the published kernel is what o asks for; source is Kernel.Source of
// one that the user brings.
func keeps(have *template.Kernel, o Options, source string) bool {
	if have == nil {
		return false
	}
	packaged := strings.HasPrefix(have.Source, kernelPackagePrefix)
	// A kernel that the user brought once cannot be fetched for its modules.
	if have.LoadableFormat != loadableFormat && (packaged || source != "") {
		return false
	}
	return o.Kernel == "" || have.Source == source || o.Kernel == DebianKernel && packaged
}

func describe(m *template.Kernel) string {
	if m.Release == "" {
		return m.Source
	}
	return m.Release
}

// broughtSource returns Kernel.Source for a kernel that the user brought: the
// digests of the file and of the path of its modules.
func broughtSource(o Options) (string, error) {
	_, kernel, err := digest.File(o.Kernel)
	if errors.Is(err, fs.ErrNotExist) {
		return "", errdefs.InvalidArgument.Errorf("kernel %s does not exist", o.Kernel)
	}
	if err != nil {
		return "", fmt.Errorf("read kernel: %w", err)
	}
	src := "file sha256:" + kernel
	if o.Modules != "" {
		sum := sha256.Sum256([]byte(o.Modules))
		src += " modules:" + hex.EncodeToString(sum[:4])
	}
	return src, nil
}

// importKernel puts vmlinux and the modules into tmp and notes them in m.
func importKernel(ctx context.Context, tmp, kernel, modules string, m *template.Kernel) error {
	m.LoadableFormat = loadableFormat
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
	if err := os.Mkdir(filepath.Join(tmp, "modules"), 0o700); err != nil {
		return err
	}
	for _, mod := range mods {
		name := mod.name + ".ko"
		if err := os.WriteFile(filepath.Join(tmp, "modules", name), mod.image, 0o600); err != nil {
			return fmt.Errorf("write module: %w", err)
		}
		m.Modules = append(m.Modules, name)
	}
	return writeLoadable(ctx, filepath.Join(tmp, loadableFile), modules, m.Release)
}

// fetchKernel downloads Debian's cloud kernel with the host's apt, without
// installing it, and puts its parts into tmp.
func fetchKernel(ctx context.Context, tmp string, m *template.Kernel, st progress.Step) error {
	if err := needSpace(tmp, 400, "the guest kernel"); err != nil {
		return err
	}
	work := filepath.Join(tmp, "work")
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(work)

	st.Detail("asking apt")
	pkg, err := kernelDependency(ctx)
	if err == nil {
		err = downloadPackage(ctx, work, pkg, st)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, errdefs.Exhausted) {
		// apt's lists are missing, or older than the archive.
		st.Detail("refreshing apt's package lists")
		if err := refreshLists(ctx); err != nil {
			return err
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
	version, err := tool.Command{Name: "dpkg-deb", Args: []string{"--field", debs[0], "Version"}}.Output(ctx)
	if err != nil {
		return err
	}
	m.Source = kernelPackagePrefix + pkg + " " + strings.TrimSpace(version)
	st.Detail("unpacking " + pkg)
	root := filepath.Join(work, "root")
	if err := (tool.Command{Name: "dpkg-deb", Args: []string{"--extract", debs[0], root}}).Run(ctx); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return errdefs.Corrupt.Errorf("package %s holds %d kernels", pkg, len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	// Packages of later releases have it in /usr/lib.
	modules := filepath.Join(root, "lib", "modules", release)
	if _, err := os.Stat(modules); err != nil {
		modules = filepath.Join(root, "usr", "lib", "modules", release)
	}
	if err := importKernel(ctx, tmp, images[0], modules, m); err != nil {
		return err
	}
	// The configuration says which options the kernel has.
	return os.Rename(filepath.Join(root, "boot", "config-"+release), filepath.Join(tmp, "config"))
}

// refreshLists makes apt fetch its lists of packages.
func refreshLists(ctx context.Context) error {
	if err := (tool.Command{Name: "apt-get", Args: []string{"-q", "update"}}).Run(ctx); err != nil {
		return errdefs.Unavailable.Errorf(
			"refresh apt's package lists (check the network and apt's sources, then run wrenn setup again): %w", err)
	}
	return nil
}

// kernelDependency finds the concrete package behind kernelPackage.
func kernelDependency(ctx context.Context) (string, error) {
	out, err := tool.Command{Name: "apt-cache", Args: []string{"depends", "--important", kernelPackage}}.Output(ctx)
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
func downloadPackage(ctx context.Context, dir, pkg string, st progress.Step) error {
	out, err := tool.Command{Name: "apt-get", Args: []string{"-q", "download", "--print-uris", pkg}, Dir: dir}.Output(ctx)
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
	st.Bytes(text, 0, total)
	err = tool.Command{
		Name: "apt-get",
		// apt's own user cannot write into the directory.
		Args: []string{"-q", "-o", "APT::Sandbox::User=root", "-o", "APT::Status-Fd=3", "download", pkg},
		Dir:  dir,
		OnStatus: func(line string) {
			// dlstatus:1:42.1:Retrieving file 1 of 1
			f := strings.SplitN(line, ":", 4)
			if len(f) < 3 || f[0] != "dlstatus" {
				return
			}
			if pct, err := strconv.ParseFloat(f[2], 64); err == nil {
				st.Bytes(text, int64(pct/100*float64(total)), total)
			}
		},
	}.Run(ctx)
	if err != nil && !errors.Is(err, errdefs.Exhausted) && ctx.Err() == nil {
		return errdefs.Unavailable.Errorf("download %s (check the network and apt's sources, then run wrenn setup again): %w", pkg, err)
	}
	return err
}
