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
	full.NIC = &vmm.NIC{Tap: "tap0", MAC: "02:FC:00:00:00:05"}

	for name, m := range map[string]machine{
		"small-tcg": {binary: "/usr/bin/qemu-system-x86_64", accel: "tcg", spec: small},
		"full-tcg":  {binary: "/usr/bin/qemu-system-x86_64", accel: "tcg", spec: full},
		"full-kvm":  {binary: "/usr/bin/qemu-system-x86_64", accel: "kvm", spec: full},
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
