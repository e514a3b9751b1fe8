package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// The oldest version that is used: the first one to describe its devices
	// by ACPI, without which a distribution's kernel does not find them.
	oldestMajor, oldestMinor = 1, 8
	// From here on a restored VM may have another tap than its snapshot's.
	overridesMajor, overridesMinor = 1, 12
)

// found is what Check came to.
type found struct {
	bin    programs
	report vmm.Report
	err    error
}

// Check implements vmm.Driver. Without Firecracker it is errdefs.Unavailable;
// with one that is too old, does not fit its jailer, or has no KVM that is
// proven to work, it is errdefs.Unsupported.
func (d *Driver) Check(ctx context.Context) (vmm.Report, error) {
	f, err := d.check(ctx)
	if err != nil {
		return vmm.Report{}, err
	}
	return f.report, f.err
}

func (d *Driver) check(ctx context.Context) (found, error) {
	select {
	case d.checking <- struct{}{}:
	case <-ctx.Done():
		return found{}, fmt.Errorf("check firecracker: %w", context.Cause(ctx))
	}
	defer func() { <-d.checking }()
	if d.checked != nil {
		return *d.checked, d.checked.err
	}
	bin, err := d.programs(ctx)
	if err != nil {
		return found{}, err
	}
	f := found{bin: bin, report: vmm.Report{Version: bin.version, Accel: "kvm"}}
	verdict, err := d.kvm(ctx, Name, bin.version, d.starter(bin))
	switch {
	case err != nil:
		return found{}, fmt.Errorf("check firecracker: %w", err)
	case !verdict.Works:
		f.err = errdefs.Unsupported.Errorf("firecracker %s needs KVM: %s", bin.version, verdict.Why)
	case bin.jailer == "":
		f.report.Why = verdict.Why
		f.report.Warning = "there is no jailer beside it, so the agent itself confines it: to a root, a user and namespaces of its own"
	default:
		f.report.Why = verdict.Why + ", confined by its jailer"
	}
	if verdict.Final {
		d.checked = &f
	}
	return f, f.err
}

// starter boots a probe guest with programs that nothing is known of yet.
func (d *Driver) starter(bin programs) func(context.Context, vmm.Spec) (vmm.VM, error) {
	return func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) { return d.launch(ctx, spec, bin, "") }
}

// programs finds Firecracker and its jailer and asks them for their versions.
func (d *Driver) programs(ctx context.Context) (bin programs, err error) {
	if bin.firecracker, err = find(d.cfg.Binary); err != nil {
		return bin, errdefs.Unavailable.Errorf("firecracker is not installed")
	}
	if bin.version, err = version(ctx, bin.firecracker, "Firecracker"); err != nil {
		return bin, err
	}
	if !since(bin.version, oldestMajor, oldestMinor) {
		return bin, errdefs.Unsupported.Errorf("firecracker is %s, and %d.%d or later is needed", bin.version, oldestMajor, oldestMinor)
	}
	switch d.cfg.Jailer {
	case "none":
	case "":
		bin.jailer, err = find("jailer")
		if err != nil && !errors.Is(err, exec.ErrNotFound) {
			return bin, fmt.Errorf("find jailer: %w", err)
		}
	default:
		if bin.jailer, err = find(d.cfg.Jailer); err != nil {
			return bin, errdefs.Unavailable.Errorf("the jailer is not where the settings say")
		}
	}
	if bin.jailer != "" {
		jailer, err := version(ctx, bin.jailer, "Jailer")
		if err != nil {
			return bin, err
		}
		if jailer != bin.version {
			return bin, errdefs.Unsupported.Errorf("firecracker is %s, its jailer %s: they must be of one release", bin.version, jailer)
		}
	}
	for _, device := range []string{"/dev/kvm", "/dev/net/tun"} {
		if _, err := os.Stat(device); err == nil {
			bin.devices = append(bin.devices, device)
		}
	}
	return bin, nil
}

// find returns a program's path without links: the jailer names the directory
// of its jails after the file that it finds behind them.
func find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

var versionLine = regexp.MustCompile(`^(\w+) v(\d+\.\d+\.\d+\S*)`)

func version(ctx context.Context, binary, name string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("check firecracker: %w", context.Cause(ctx))
	}
	if err != nil {
		return "", fmt.Errorf("check firecracker: %w", err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	match := versionLine.FindStringSubmatch(first)
	if match == nil || match[1] != name {
		return "", fmt.Errorf("check firecracker: no version of %s in %.200q", name, first)
	}
	return match[2], nil
}
