package qemu

import (
	"context"
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

// Check implements vmm.Driver. Without QEMU the error is errdefs.Unavailable. QEMU
// uses KVM where a probe guest has shown that KVM works.
func (d *Driver) Check(ctx context.Context) (vmm.Report, error) {
	report, err := d.checked.Get(ctx, func() (vmm.Report, bool, error) {
		binary, err := d.binary()
		if err != nil {
			return vmm.Report{}, false, err
		}
		version, err := launch.Version(ctx, binary, "QEMU", versionLine)
		if err != nil {
			return vmm.Report{}, false, err
		}
		verdict, err := d.cfg.Probe.KVM(ctx, Name, version, func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
			return d.launch(ctx, spec, vmm.Report{Version: version, Accel: accelKVM, CPU: vmm.HostCPU}, nil)
		})
		if err != nil {
			return vmm.Report{}, false, err
		}
		report := vmm.Report{Version: version, Why: verdict.Why}
		if verdict.Works {
			report.Accel, report.CPU, report.Isolation, report.Speed = accelKVM, vmm.HostCPU, kvm.Isolation(), vmm.Native
		} else {
			report.Accel, report.CPU, report.Isolation, report.Speed = accelTCG, d.cfg.CPU, vmm.Emulation, vmm.Emulated
		}
		return report, verdict.Final, nil
	})
	// Errors that a person can act on say all that is needed.
	if err != nil && errdefs.ClassOf(err) == nil {
		return vmm.Report{}, fmt.Errorf("check qemu: %w", err)
	}
	return report, err
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
