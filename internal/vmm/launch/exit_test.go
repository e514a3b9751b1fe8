package launch

import (
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestCauseOf(t *testing.T) {
	const panicked = "[    3.1] Kernel panic - not syncing: sysrq triggered crash\n[    3.2] reboot: machine restart\n"
	for _, tt := range []struct {
		exit    vmm.Exit
		oom     bool
		console string
		want    vmm.Cause
		text    string
	}{
		{vmm.Exit{Code: 0}, false, "", vmm.Unknown, "exited with status 0"},
		{vmm.Exit{Code: 0}, false, panicked, vmm.GuestPanicked, "exited with status 0: the guest panicked"},
		{vmm.Exit{Code: 0}, false, "[ 9.1] reboot: Power down\n", vmm.GuestPoweredOff, "exited with status 0: the guest powered off"},
		{vmm.Exit{Code: 0}, false, "level=INFO msg=\"powering off\" signal=terminated\n[ 9.1] reboot: Restarting system\n", vmm.GuestPoweredOff, "exited with status 0: the guest powered off"},
		{vmm.Exit{Code: 0}, false, "[ 9.1] reboot: Restarting system\n", vmm.GuestRebooted, "exited with status 0: the guest rebooted"},
		{vmm.Exit{Code: -1}, false, "[ 9.1] reboot: Power down\n", vmm.GuestPoweredOff, "exited with unknown status: the guest powered off"},
		{vmm.Exit{Code: 0, Detail: "2026-11-26T10:00:00 [vm:fc_vcpu 0:ERROR:src/vmm] Unexpected exit reason on vcpu run: InternalError"}, false, "booting\n", vmm.VMMFailed, "exited with status 0: the VMM failed"},
		{vmm.Exit{Code: 0, Detail: "[vm:main:ERROR:net] Failed to write to tap"}, false, "[ 9.1] reboot: Power down\n", vmm.GuestPoweredOff, "exited with status 0: the guest powered off"},
		{vmm.Exit{Code: 1}, false, panicked, vmm.VMMFailed, "exited with status 1"},
		{vmm.Exit{Code: -1, Signal: 9}, false, panicked, vmm.Killed, "killed by signal 9"},
		{vmm.Exit{Code: -1, Signal: 9}, true, "", vmm.OutOfMemory, "killed by signal 9: the VMM was out of memory"},
		{vmm.Exit{Code: -1, Signal: 11}, true, "", vmm.Killed, "killed by signal 11"},
		{vmm.Exit{Code: -1}, true, "", vmm.OutOfMemory, "exited with unknown status: the VMM was out of memory"},
		{vmm.Exit{Code: 0}, true, panicked, vmm.GuestPanicked, "exited with status 0: the guest panicked"},
	} {
		e := tt.exit
		if e.Cause = causeOf(e, tt.oom, []byte(tt.console)); e.Cause != tt.want || e.String() != tt.text {
			t.Errorf("%+v, %v, %q: %q, %q; want %q, %q", tt.exit, tt.oom, tt.console, e.Cause, e, tt.want, tt.text)
		}
	}
}

// TestOutOfMemory: what the kernel kills because its cgroup is full is told apart
// from what a signal kills.
func TestOutOfMemory(t *testing.T) {
	testenv.Root(t)
	for name, c := range map[string]struct {
		script string
		want   vmm.Cause
	}{
		"too much":      {"exec tail /dev/zero", vmm.OutOfMemory},
		"killed":        {"kill -KILL $$", vmm.Killed},
		"guest's words": {"echo '[ 1.0] reboot: Power down'", vmm.GuestPoweredOff},
	} {
		t.Run(name, func(t *testing.T) {
			p := sh(c.script)
			p.Cgroup, p.Limits = cgroupMark+"-test-oom", vmm.Limits{MemMiB: 32}
			p.Console = filepath.Join(t.TempDir(), "console")
			process, err := Start(p)
			if err != nil {
				t.Fatal(err)
			}
			<-process.Done()
			if exit := process.Exit(); exit.Cause != c.want {
				t.Errorf("%s (%q), want %q", exit, exit.Cause, c.want)
			}
		})
	}
}
