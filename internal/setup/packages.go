package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
	"git.omukk.dev/wrenn/sandbox/internal/tool"
)

// Package is a Debian package that the host agent or its setup uses.
type Package struct {
	// Name as apt knows it.
	Name string
	// File shows that it is installed: a program's name, or a path.
	File string
	// Why it is needed, in a few words.
	Why string
}

// Packages returns all that a machine needs, in the order of installation.
func Packages() []Package {
	return []Package{
		{"qemu-system-x86", "qemu-system-x86_64", "runs the microVMs"},
		{"mmdebstrap", "mmdebstrap", "makes the root file system of templates"},
		{"e2fsprogs", "mke2fs", "makes images and overlay disks"},
		{"e2fsprogs", "resize2fs", "trims images"},
		{"erofs-utils", "mkfs.erofs", "makes images for gVisor"},
		{"dpkg", "dpkg-deb", "unpacks the guest's kernel"},
		{"kmod", "depmod", "lists the modules of the guest's kernel"},
		{"xz-utils", "xz", "packs the modules of the guest's kernel"},
		{"debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg", "proves that packages are Debian's"},
	}
}

// Missing returns the packages that are not installed, each once.
func Missing() []Package { return missing(Packages(), installed) }

func missing(all []Package, installed func(file string) bool) []Package {
	var out []Package
	seen := map[string]bool{}
	for _, p := range all {
		if !seen[p.Name] && !installed(p.File) {
			seen[p.Name] = true
			out = append(out, p)
		}
	}
	return out
}

func installed(file string) bool {
	if filepath.IsAbs(file) {
		_, err := os.Stat(file)
		return err == nil
	}
	_, err := tool.Find(file)
	return err == nil
}

// InstallMissing installs with apt-get what is missing, and only that. It is
// quick when nothing is. Without root it is errdefs.Denied, without apt
// errdefs.Unsupported; both name what to do by hand.
func InstallMissing(ctx context.Context, report progress.Func) error {
	return apt{root: os.Geteuid() == 0, find: tool.Find}.install(ctx, Missing(), report)
}

// apt is the host's package manager, or what a test puts in its place.
type apt struct {
	root bool
	find func(tool string) (string, error)
}

func (a apt) install(ctx context.Context, want []Package, report progress.Func) error {
	st := report.Begin("packages")
	if len(want) == 0 {
		st.Kept("all installed")
		return nil
	}
	byHand := InstallCommand(want)
	aptGet, err := a.find("apt-get")
	if err != nil {
		return errdefs.Unsupported.Errorf("install packages: this machine has no apt-get; install what provides %s by its own means", files(want))
	}
	if !a.root {
		return errdefs.Denied.Errorf("install packages: not root; run: sudo %s", byHand)
	}
	st.Detail("apt-get update")
	// Old lists may do: what is wrong shows in the installation.
	updateErr := runApt(ctx, aptGet, []string{"-q", "update"}, nil)
	if ctx.Err() == nil {
		args := []string{"-q", "-y", "--no-install-recommends", "install"}
		for _, p := range want {
			args = append(args, p.Name)
		}
		err = runApt(ctx, aptGet, args, st.Detail)
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("install packages: %w", context.Cause(ctx))
	case err != nil && updateErr != nil:
		return errdefs.Unavailable.Errorf("install packages (check the network and apt's sources, then run: sudo %s): %w",
			byHand, errors.Join(updateErr, err))
	case err != nil:
		return errdefs.Unavailable.Errorf("install packages (to see more run: sudo %s): %w", byHand, err)
	}
	st.Did("%s", names(want))
	return nil
}

// InstallCommand is what a person would type to install packages.
func InstallCommand(want []Package) string {
	return "apt-get install -y --no-install-recommends " + names(want)
}

func names(want []Package) string {
	var b []string
	for _, p := range want {
		b = append(b, p.Name)
	}
	return strings.Join(b, " ")
}

func files(want []Package) string {
	var b []string
	for _, p := range want {
		b = append(b, p.File)
	}
	return strings.Join(b, ", ")
}

// runApt runs apt-get. A cancelled ctx asks it to stop rather than killing
// it: half-configured packages are worse than a few seconds of waiting.
func runApt(ctx context.Context, path string, args []string, onLine func(string)) error {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH="+tool.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's ^C is for us, we pass it on
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 30 * time.Second
	out := &tail{onLine: onLine}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("apt-get %s: %w: %s", args[len(args)-1], err, out)
	}
	return nil
}

// tail passes lines on and keeps the last of them.
type tail struct {
	mu     sync.Mutex
	onLine func(string)
	part   []byte
	last   []string
}

var _ io.Writer = (*tail)(nil)

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.part = append(t.part, b...)
	for {
		line, rest, ok := bytes.Cut(t.part, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		t.part = append([]byte(nil), rest...)
		s := strings.TrimSpace(string(line))
		if s == "" {
			continue
		}
		if t.last = append(t.last, s); len(t.last) > 6 {
			t.last = t.last[1:]
		}
		if t.onLine != nil {
			t.onLine(s)
		}
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.last, "; ")
}
