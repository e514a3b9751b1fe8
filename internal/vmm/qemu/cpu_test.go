package qemu

import (
	"errors"
	"os"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// A VM restored from a snapshot has the CPU that the snapshot's VM had, and snapshots
// of earlier agents, which name no CPU, had qemu64.
func TestSnapshotsKeepTheirCPU(t *testing.T) {
	spec := vmm.Spec{VCPUs: 1, MemMiB: 128}
	here := vmm.Report{Version: "7.2.22", Accel: accelTCG, CPU: DefaultCPU}
	for _, cpu := range CPUs() {
		then := here
		then.CPU = cpu
		was := shapeOf(spec, then)
		if (was.CPU == "") != (cpu == cpuV1) {
			t.Errorf("shape of %s: %+v", cpu, was)
		}
		got, err := withCPUOf(here, was)
		if err != nil || got.CPU != cpu || model(got) != models[cpu] || shapeOf(spec, got) != was {
			t.Errorf("restored %s: %+v, %v", cpu, got, err)
		}
	}
	if _, err := withCPUOf(here, shape{Accel: accelTCG, CPU: "x86-64-v9"}); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("a CPU of a later agent: %v", err)
	}
	native := vmm.Report{Accel: accelKVM, CPU: vmm.HostCPU}
	if got, err := withCPUOf(native, shape{Accel: accelTCG, CPU: DefaultCPU}); err != nil || got != native || model(got) != "host" {
		t.Errorf("under KVM: %+v, %v", got, err)
	}
	if was := shapeOf(spec, native); was.CPU != "" {
		t.Errorf("shape under KVM: %+v", was)
	}
}

func TestSnapshotKeyNamesTheCPU(t *testing.T) {
	testenv.Program(t, "qemu-system-x86_64")
	keys := map[string]string{}
	for _, cpu := range CPUs() {
		key, err := New(Config{CPU: cpu}).SnapshotKey(t.Context(), vmm.Spec{VCPUs: 1, MemMiB: 128})
		if other, ok := keys[key]; ok || err != nil {
			t.Errorf("%s has the key of %q, %v", cpu, other, err)
		}
		keys[key] = cpu
	}
}

// The script boots the machine that sandboxes get.
func TestDebugScriptHasTheDefaultCPU(t *testing.T) {
	script, err := os.ReadFile("../../../scripts/debug-guest.sh")
	if err != nil {
		t.Fatal(err)
	}
	if want := "cpu=" + models[DefaultCPU] + " accel="; !strings.Contains(string(script), want) {
		t.Errorf("debug-guest.sh lacks %q", want)
	}
}
