package qemu

import (
	"maps"
	"slices"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The CPUs of guests, as Config.CPU, Report.CPU and handles name them.
const (
	// DefaultCPU has all instructions of x86-64-v3, for which packages are built.
	DefaultCPU = "x86-64-v3"
	// cpuV1 is what guests of earlier agents have. Their snapshots name no CPU.
	cpuV1 = "x86-64-v1"
)

// The features that a level of the x86-64 psABI adds to qemu64; AES and PCLMULQDQ are
// in no level, but programs built for v3 demand them. QEMU translates all of them since
// 7.2; with enforce it refuses to start instead of leaving one out. With XSAVE but not
// XSAVEOPT the guest's kernel hangs when it sets up its FPU.
const (
	addsV2 = ",ssse3=on,sse4.1=on,sse4.2=on,popcnt=on,cx16=on,lahf-lm=on"
	addsV3 = addsV2 + ",xsave=on,xsaveopt=on,xgetbv1=on,avx=on,avx2=on,bmi1=on,bmi2=on,f16c=on,fma=on,abm=on,movbe=on,aes=on,pclmulqdq=on"
)

// models has QEMU's -cpu for each CPU that TCG emulates. max has features that cost
// each guest time, such as supervisor mode access prevention.
var models = map[string]string{
	cpuV1:       "qemu64",
	"x86-64-v2": "qemu64" + addsV2 + ",enforce=on",
	DefaultCPU:  "qemu64" + addsV3 + ",enforce=on",
	"max":       "max",
}

// CPUs are the names that Config.CPU may have.
func CPUs() []string { return slices.Sorted(maps.Keys(models)) }

// model is QEMU's -cpu for the CPU of a report.
func model(report vmm.Report) string {
	if report.Accel == accelKVM {
		return vmm.HostCPU
	}
	return models[report.CPU]
}

// shapeCPU is the CPU as a shape names it: empty under KVM and for cpuV1, as in the
// snapshots of earlier agents.
func shapeCPU(report vmm.Report) string {
	if report.Accel == accelKVM || report.CPU == cpuV1 {
		return ""
	}
	return report.CPU
}

// withCPUOf returns the report for a VM restored from a snapshot of that shape. Such
// a VM keeps the CPU that it was booted with, whatever new VMs get.
func withCPUOf(report vmm.Report, was shape) (vmm.Report, error) {
	if report.Accel == accelKVM || was.Accel != report.Accel {
		return report, nil
	}
	report.CPU = was.CPU
	if was.CPU == "" {
		report.CPU = cpuV1
	}
	if models[report.CPU] == "" {
		return report, errdefs.Unsupported.Errorf("snapshot is of a vm with the CPU %.40q, which is unknown here", was.CPU)
	}
	return report, nil
}
