package vmm

import (
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestCauseOf(t *testing.T) {
	const panicked = "[    3.1] Kernel panic - not syncing: sysrq triggered crash\n[    3.2] reboot: machine restart\n"
	for _, tt := range []struct {
		exit    Exit
		oom     bool
		console string
		want    Cause
		text    string
	}{
		{Exit{Code: 0}, false, "", Unknown, "exited with status 0"},
		{Exit{Code: 0}, false, panicked, GuestPanicked, "exited with status 0: the guest panicked"},
		{Exit{Code: 0}, false, "[ 9.1] reboot: Power down\n", GuestPoweredOff, "exited with status 0: the guest powered off"},
		{Exit{Code: 0}, false, "level=INFO msg=\"powering off\" signal=terminated\n[ 9.1] reboot: Restarting system\n", GuestPoweredOff, "exited with status 0: the guest powered off"},
		{Exit{Code: 0}, false, "[ 9.1] reboot: Restarting system\n", GuestRebooted, "exited with status 0: the guest rebooted"},
		{Exit{Code: -1}, false, "[ 9.1] reboot: Power down\n", GuestPoweredOff, "exited with unknown status: the guest powered off"},
		{Exit{Code: 0, Detail: "2026-11-26T10:00:00 [vm:fc_vcpu 0:ERROR:src/vmm] Unexpected exit reason on vcpu run: InternalError"}, false, "booting\n", VMMFailed, "exited with status 0: the VMM failed"},
		{Exit{Code: 0, Detail: "[vm:main:ERROR:net] Failed to write to tap"}, false, "[ 9.1] reboot: Power down\n", GuestPoweredOff, "exited with status 0: the guest powered off"},
		{Exit{Code: 1}, false, panicked, VMMFailed, "exited with status 1"},
		{Exit{Code: -1, Signal: 9}, false, panicked, Killed, "killed by signal 9"},
		{Exit{Code: -1, Signal: 9}, true, "", OutOfMemory, "killed by signal 9: the VMM was out of memory"},
		{Exit{Code: -1, Signal: 11}, true, "", Killed, "killed by signal 11"},
		{Exit{Code: -1}, true, "", OutOfMemory, "exited with unknown status: the VMM was out of memory"},
		{Exit{Code: 0}, true, panicked, GuestPanicked, "exited with status 0: the guest panicked"},
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
		want   Cause
	}{
		"too much":      {"exec tail /dev/zero", OutOfMemory},
		"killed":        {"kill -KILL $$", Killed},
		"guest's words": {"echo '[ 1.0] reboot: Power down'", GuestPoweredOff},
	} {
		t.Run(name, func(t *testing.T) {
			p := sh(c.script)
			p.Cgroup, p.Limits = cgroupMark+"-test-oom", Limits{MemMiB: 32}
			p.Console, p.ConsoleOnStdout = filepath.Join(t.TempDir(), "console"), true
			process, err := Launch(p)
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
