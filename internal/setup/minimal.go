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
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// The recipe of the template "minimal".
const minimalSuite = "bookworm"

// minimalPackages are added to minbase, which has bash and coreutils.
var minimalPackages = []string{
	"ca-certificates", "curl", "git", "iproute2", "netbase", "procps", "python-is-python3", "python3", "sudo",
}

// minimalDpkg leaves out manuals and translations; licences stay.
var minimalDpkg = []string{
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/locale/*",
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright",
	"path-exclude=/usr/share/lintian/*",
}

// minimalUser makes the account that clients of E2B's protocol expect. It may
// become root without a password.
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

// setupMinimal makes the template "minimal" unless there is one of this recipe, with its root
// as an ext4 and as an EROFS.
func setupMinimal(ctx context.Context, s *template.Store, report progress.Func) error {
	st := report.Begin("template " + template.DefaultName)
	stage, err := s.StageTemplate(ctx, template.DefaultName, waiting(st))
	if err != nil {
		return err
	}
	defer stage.Discard()
	if stage.Have != nil && stage.Have.Recipe == minimalRecipe() && stage.HaveEROFS {
		st.Kept("%d MiB", stage.HaveBytes>>20)
		return nil
	}
	if os.Geteuid() != 0 {
		return errdefs.Denied.Errorf("making a root file system needs root: run sudo wrenn setup")
	}
	if err := needSpace(s.Dir(), 1280, "the template"); err != nil {
		return err
	}
	root := filepath.Join(stage.Dir, "root")
	if err := bootstrap(ctx, root, st); err != nil {
		return err
	}
	st.Detail("making the image")
	image := filepath.Join(stage.Dir, "base.ext4")
	if err := template.PackImage(ctx, image, root); err != nil {
		return err
	}
	erofs := filepath.Join(stage.Dir, "root.erofs")
	if err := template.PackEROFS(ctx, erofs, root); err != nil {
		return err
	}
	if err := stage.Remove("root"); err != nil {
		return err
	}
	size, err := os.Stat(image)
	if err != nil {
		return err
	}
	about := template.Making{Recipe: minimalRecipe(), Defaults: template.Defaults{
		VCPUs: 1, MemMiB: 512, OverlayMiB: template.DefaultOverlayMiB, Login: template.Login{User: "root"},
	}}
	_, _, err = s.MakeBuild(ctx, template.NewBuild{Name: template.DefaultName}, about, func(b *template.BuildStage) error {
		if err := b.AddLayer(ctx, image); err != nil {
			return err
		}
		return b.SetEROFS(ctx, erofs)
	})
	if err != nil {
		return err
	}
	st.Did("%d MiB", size.Size()>>20)
	return nil
}

// bootstrap installs the system into the new directory root.
func bootstrap(ctx context.Context, root string, st progress.Step) error {
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
	err = tool.Command{
		Name: "mmdebstrap",
		Args: args,
		Env:  []string{"SOURCE_DATE_EPOCH=" + template.BuildTime, "TMPDIR=" + filepath.Dir(root)},
		OnLine: func(line string) {
			text, ok := strings.CutPrefix(line, "I: ")
			switch {
			case !ok || strings.HasPrefix(text, "success"):
			case strings.HasPrefix(text, "running --customize-hook"):
				st.Detail("adding the user")
			default:
				st.Detail(strings.TrimSuffix(text, "..."))
			}
		},
	}.Run(ctx)
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
	list := tool.Command{Name: "apt-get", Args: []string{"indextargets", "--format", format, "Created-By: Packages"}}
	for refreshed := false; ; refreshed = true {
		out, err := list.Output(ctx)
		if err != nil {
			return nil, fmt.Errorf("list apt's sources: %w", err)
		}
		sources := sourcesFrom(out, suite)
		if len(sources) > 0 || refreshed {
			return sources, nil
		}
		// Without package lists apt does not know whose its sources are.
		if err := refreshLists(ctx); err != nil {
			return nil, err
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
	out, err := tool.Command{Name: "apt-config", Args: []string{"dump"}}.Output(ctx)
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
