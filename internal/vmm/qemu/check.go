package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Check implements vmm.Driver. Without QEMU it is errdefs.Unavailable. KVM is
// used where it is proven to work.
func (d *Driver) Check(ctx context.Context) (vmm.Report, error) {
	select {
	case d.checking <- struct{}{}:
	case <-ctx.Done():
		return vmm.Report{}, fmt.Errorf("check qemu: %w", context.Cause(ctx))
	}
	defer func() { <-d.checking }()
	if d.checked != nil {
		return *d.checked, nil
	}
	version, err := d.version(ctx)
	if err != nil {
		return vmm.Report{}, err
	}
	report := vmm.Report{Version: version, Accel: "tcg"}
	verdict, err := d.cfg.Probe.KVM(ctx, Name, version, func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
		return d.launch(ctx, spec, vmm.Report{Version: version, Accel: "kvm"}, nil)
	})
	if err != nil {
		return vmm.Report{}, fmt.Errorf("check qemu: %w", err)
	}
	report.Why = verdict.Why
	if verdict.Works {
		report.Accel = "kvm"
	}
	if verdict.Final {
		d.checked = &report
	}
	return report, nil
}

func there(path string) bool {
	_, err := os.Stat(path)
	return path != "" && err == nil
}

func (d *Driver) binary() (string, error) {
	path, err := exec.LookPath(d.cfg.Binary)
	if err != nil {
		return "", errdefs.Unavailable.Errorf("qemu is not installed")
	}
	return filepath.Abs(path)
}

var versionLine = regexp.MustCompile(`version (\d+\.\d+\.\d+)`)

func (d *Driver) version(ctx context.Context) (string, error) {
	binary, err := d.binary()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("check qemu: %w", context.Cause(ctx))
	}
	if err != nil {
		return "", fmt.Errorf("check qemu: %w", err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	match := versionLine.FindStringSubmatch(first)
	if match == nil {
		return "", fmt.Errorf("check qemu: no version in %q", first)
	}
	return match[1], nil
}
