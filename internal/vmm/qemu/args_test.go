package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestArgv(t *testing.T) {
	small := vmm.Spec{
		ID: "sb1", RunDir: "/run/wrenn/sb1", VCPUs: 1, MemMiB: 128,
		Kernel: "/k/vmlinux", Console: "/s/sb1/console.log",
	}
	full := small
	full.VCPUs, full.MemMiB = 4, 2048
	full.Initrd = "/k/initrd.img"
	full.Cmdline = "quiet wrenn.ip=169.254.0.21/30 panic=0"
	full.Disks = []vmm.Disk{{Path: "/t/base.ext4", ReadOnly: true}, {Path: "/s/a,b=c/overlay.ext4"}}
	full.UID, full.GID = 20001, 20002
	full.Limits = vmm.Limits{DiskBytes: 256 << 20, DiskOps: 16384}
	full.NIC = &vmm.NIC{Tap: "tap0", MAC: "02:FC:00:00:00:05"}

	const binary = "/usr/bin/qemu-system-x86_64"
	for name, m := range map[string]machine{
		"small-tcg":    {binary: binary, version: "7.2.22", accel: "tcg", spec: small},
		"full-tcg":     {binary: binary, version: "7.2.22", accel: "tcg", spec: full},
		"full-kvm":     {binary: binary, version: "8.2.0", accel: "kvm", spec: full},
		"full-restore": {binary: binary, version: "10.0.0", accel: "tcg", spec: full, memory: "/t/ready/1/mem"},
	} {
		got := render(argv(m))
		golden := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (run with -update to accept):\n%s", name, diff)
		}
	}
}

func TestSince(t *testing.T) {
	for _, c := range []struct {
		version string
		want    bool // since 8.1
	}{{"7.2.22", false}, {"8.0.9", false}, {"8.1.0", true}, {"8.10.0", true}, {"9.0.0", true}, {"10.0.0", true}, {"", false}} {
		if got := since(c.version, 8, 1); got != c.want {
			t.Errorf("%q: %v", c.version, got)
		}
	}
}

// render puts an option and its value on a line.
func render(args []string) string {
	var b strings.Builder
	for i, arg := range args {
		switch {
		case i == 0:
		case strings.HasPrefix(arg, "-"):
			b.WriteByte('\n')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(arg)
	}
	return b.String() + "\n"
}
