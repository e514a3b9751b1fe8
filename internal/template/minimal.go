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
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The recipe of the template "minimal".
const minimalSuite = "bookworm"

// minimalPackages are added to minbase, which has bash and coreutils.
var minimalPackages = []string{
	"ca-certificates", "curl", "git", "iproute2", "netbase", "procps", "python-is-python3", "python3", "sudo",
}

// minimalDpkg keeps out what nobody reads in a sandbox; licences stay.
var minimalDpkg = []string{
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/locale/*",
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright",
	"path-exclude=/usr/share/lintian/*",
}

// minimalUser is the account that clients of E2B's protocol expect. It may
// become root without a password, for the sandbox is all its own.
const minimalUser = `chroot "$1" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$1/etc/sudoers.d/user"
chmod 0440 "$1/etc/sudoers.d/user"`

// recipeFormat is raised when this file changes what the image holds.
const recipeFormat = "2"

func minimalRecipe() string {
	h := sha256.New()
	for _, part := range slices.Concat([]string{recipeFormat, minimalSuite, minimalUser}, minimalPackages, minimalDpkg) {
		fmt.Fprintf(h, "%q\n", part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// setupMinimal makes templates/minimal unless one of this recipe is there.
func (s *Store) setupMinimal(ctx context.Context, progress Progress) error {
	st := progress.begin("template " + DefaultName)
	lock, err := lockFor(ctx, s.templates(), st)
	if err != nil {
		return err
	}
	defer lock.unlock()
	dst := filepath.Join(s.templates(), DefaultName)
	var have templateManifest
	err = readManifest(dst, "template.json", &have, &have.manifest)
	if err == nil && have.Recipe == minimalRecipe() {
		st.kept("%d MiB", have.Files["base.ext4"].Size>>20)
		return nil
	}
	if errdefs.CannotRead(err) { // what was made from it needs this one
		return unreadable("the template", err)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("template is made again", "template", DefaultName, "error", err)
	}
	if os.Geteuid() != 0 {
		return errdefs.Denied.Errorf("making a root file system needs root: run sudo wrenn setup")
	}
	if err := needSpace(s.dir, 1024, "the template"); err != nil {
		return err
	}
	tmp, err := tempDir(s.templates(), DefaultName)
	if err != nil {
		return err
	}
	defer removeTree(tmp)
	root := filepath.Join(tmp, "root")
	if err := bootstrap(ctx, root, st); err != nil {
		return err
	}
	st.detail("making the image")
	if err := packImage(ctx, filepath.Join(tmp, "base.ext4"), root); err != nil {
		return err
	}
	if err := removeTree(root); err != nil {
		return err
	}
	m := templateManifest{
		Recipe:   minimalRecipe(),
		Defaults: Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: DefaultOverlayMiB, Login: Login{User: "root"}},
	}
	if err := publish(tmp, dst, "template.json", &m, &m.manifest); err != nil {
		return err
	}
	st.did("%d MiB", m.Files["base.ext4"].Size>>20)
	return nil
}

// bootstrap installs the system into the new directory root.
func bootstrap(ctx context.Context, root string, st step) error {
	sources, err := hostSources(ctx, minimalSuite)
	if err != nil {
		return err
	}
	options, err := hostAptOptions(ctx)
	if err != nil {
		return err
	}
	args := []string{
		"--mode=root", "--variant=minbase", "--format=directory", "--architectures=amd64",
		"--include=" + strings.Join(minimalPackages, ","),
		"--aptopt=APT::Sandbox::User \"root\"",
	}
	for _, o := range options {
		args = append(args, "--aptopt="+o)
	}
	for _, o := range minimalDpkg {
		args = append(args, "--dpkgopt="+o)
	}
	args = append(args, "--customize-hook="+minimalUser, minimalSuite, root)
	args = append(args, sources...)
	err = command{
		name: "mmdebstrap",
		args: args,
		env:  []string{"SOURCE_DATE_EPOCH=" + fakeTime, "TMPDIR=" + filepath.Dir(root)},
		onLine: func(line string) {
			text, ok := strings.CutPrefix(line, "I: ")
			switch {
			case !ok || strings.HasPrefix(text, "success"):
			case strings.HasPrefix(text, "running --customize-hook"):
				st.detail("adding the user")
			default:
				st.detail(strings.TrimSuffix(text, "..."))
			}
		},
	}.run(ctx)
	if err != nil {
		if errors.Is(err, errdefs.Exhausted) || ctx.Err() != nil {
			return err
		}
		return fmt.Errorf("install Debian (check the network and apt's sources, then run wrenn setup again): %w", err)
	}
	// What belongs to the host or must be each sandbox's own. Links inside
	// the tree that lead out of it are not followed.
	tree, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, f := range []string{"etc/resolv.conf", "etc/hostname", "etc/apt/apt.conf.d/99mmdebstrap", "var/lib/dbus/machine-id"} {
		if err := tree.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("clean %s: %w", f, err)
		}
	}
	if err := tree.WriteFile("etc/machine-id", nil, 0o444); err != nil {
		return fmt.Errorf("clean etc/machine-id: %w", err)
	}
	return nil
}

// hostSources returns the host's own apt sources of that Debian release, as
// lines of sources.list, so that its mirrors are used. None means that the
// tool shall use its default.
func hostSources(ctx context.Context, suite string) ([]string, error) {
	const format = "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
	list := command{name: "apt-get", args: []string{"indextargets", "--format", format, "Created-By: Packages"}}
	for refreshed := false; ; refreshed = true {
		out, err := list.output(ctx)
		if err != nil {
			return nil, fmt.Errorf("list apt's sources: %w", err)
		}
		sources := sourcesFrom(out, suite)
		if len(sources) > 0 || refreshed {
			return sources, nil
		}
		// Without package lists apt does not know whose its sources are.
		if err := (command{name: "apt-get", args: []string{"-q", "update"}}).run(ctx); err != nil {
			return nil, errdefs.Unavailable.Errorf("refresh apt's package lists (check the network and apt's sources, then run wrenn setup again): %w", err)
		}
	}
}

func sourcesFrom(targets, suite string) []string {
	var lines []string
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 5 || f[0] != "Debian" || f[4] != "main" {
			continue
		}
		if f[1] != suite && f[1] != suite+"-updates" && f[1] != suite+"-security" {
			continue
		}
		uri := f[2]
		if list, ok := strings.CutPrefix(uri, "mirror+file:"); ok {
			uri = firstMirror(list)
		}
		if !strings.HasPrefix(uri, "http://") && !strings.HasPrefix(uri, "https://") {
			continue // a path or a drive of the host's means nothing in the guest
		}
		if l := "deb " + uri + " " + f[3] + " main"; !slices.Contains(lines, l) {
			lines = append(lines, l)
		}
	}
	return lines
}

// firstMirror returns the first address in a mirror list, or "".
func firstMirror(path string) string {
	b, err := os.ReadFile(strings.TrimSuffix(path, "/"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && !strings.HasPrefix(f[0], "#") {
			return f[0]
		}
	}
	return ""
}

// hostAptOptions returns the host's proxies, which the tool does not look for
// in apt's configuration. They do not stay in the image.
func hostAptOptions(ctx context.Context) ([]string, error) {
	out, err := command{name: "apt-config", args: []string{"dump"}}.output(ctx)
	if err != nil {
		return nil, fmt.Errorf("read apt's configuration: %w", err)
	}
	var options []string
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		key, value, ok := strings.Cut(line, " ")
		if !ok || value == `""` {
			continue
		}
		k := strings.ToLower(key)
		if strings.HasPrefix(k, "acquire::http::proxy") || strings.HasPrefix(k, "acquire::https::proxy") {
			options = append(options, line)
		}
	}
	return options, nil
}

// packImage makes file an ext4 that holds root and little more.
func packImage(ctx context.Context, file, root string) error {
	var blocks, inodes int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		inodes++
		blocks += (fi.Size() + 4095) / 4096
		if d.IsDir() {
			blocks++
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("measure root: %w", err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// Room for the inode tables and what an estimate forgets; resize2fs then
	// takes back what is free.
	inodes += inodes/16 + 64
	size := (blocks*4096 + inodes*256) / 100 * 115
	size = (size + 16<<20) &^ 4095
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := formatExt4(ctx, file, inodes, root); err != nil {
		return err
	}
	err = command{name: "resize2fs", args: []string{"-M", file}, env: []string{"E2FSPROGS_FAKE_TIME=" + fakeTime}}.run(ctx)
	if err != nil {
		return err
	}
	return f.Sync()
}
