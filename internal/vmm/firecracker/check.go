package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

const (
	// The oldest version that is used: the first one to describe its devices
	// by ACPI, without which a distribution's kernel does not find them.
	oldestMajor, oldestMinor = 1, 8
	// From here on a restored VM may have another tap than its snapshot's.
	overridesMajor, overridesMinor = 1, 12
)

// found is the result of a check.
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
	f, err := d.checked.Get(ctx, func() (found, bool, error) {
		bin, err := d.programs(ctx)
		if err != nil {
			return found{}, false, err
		}
		verdict, err := d.kvm(ctx, Name, bin.version, d.starter(bin))
		if err != nil {
			return found{}, false, err
		}
		f := found{bin: bin, report: vmm.Report{
			Version: bin.version, Accel: "kvm", CPU: vmm.HostCPU, Isolation: kvm.Isolation(), Speed: vmm.Native,
			Why: verdict.Why + ", confined by its jailer",
		}}
		if bin.jailer == "" {
			f.report.Why = verdict.Why
			f.report.Warning = "there is no jailer beside it, so the agent itself confines it: to a root, a user and namespaces of its own"
		}
		if !verdict.Works {
			f.err = errdefs.Unsupported.Errorf("firecracker %s needs KVM: %s", bin.version, verdict.Why)
		}
		return f, verdict.Final, nil
	})
	// Errors that a person can act on say all that is needed.
	if err != nil && errdefs.ClassOf(err) == nil {
		return found{}, fmt.Errorf("check firecracker: %w", err)
	}
	return f, errors.Join(err, f.err)
}

// starter returns a function that boots a probe guest with these programs.
func (d *Driver) starter(bin programs) func(context.Context, vmm.Spec) (vmm.VM, error) {
	return func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) { return d.launch(ctx, spec, bin, "") }
}

// programs finds Firecracker and its jailer and asks them for their versions.
func (d *Driver) programs(ctx context.Context) (bin programs, err error) {
	if bin.firecracker, err = find(d.cfg.Binary); err != nil {
		return bin, errdefs.Unavailable.Errorf("firecracker is not installed")
	}
	if bin.version, err = launch.Version(ctx, bin.firecracker, "Firecracker", versionLine("Firecracker")); err != nil {
		return bin, err
	}
	if !launch.AtLeast(bin.version, oldestMajor, oldestMinor) {
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
		jailer, err := launch.Version(ctx, bin.jailer, "Jailer", versionLine("Jailer"))
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

// find returns a program's path without symbolic links: the jailer names the
// directory of its jails after the file that they lead to.
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

// versionLine returns the pattern of what a program of that name says of itself.
func versionLine(name string) *regexp.Regexp {
	return regexp.MustCompile(`^` + name + ` v(\d+\.\d+\.\d+\S*)`)
}
