package qemu

import (
	"flag"
	"net/netip"
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
		Kernel: vmm.Kernel{Image: "/k/vmlinux"}, Console: "/s/sb1/console.log",
	}
	full := small
	full.VCPUs, full.MemMiB = 4, 2048
	full.Kernel.Initrd, full.Kernel.Args = "/k/initrd.img", "quiet panic=0"
	full.Boot.Addr = netip.MustParsePrefix("169.254.0.21/30")
	full.Root = vmm.Root{Layers: []string{"/t/base.ext4"}, Overlay: "/s/a,b=c/overlay.ext4"}
	full.UID, full.GID = 20001, 20002
	full.Limits = vmm.Limits{DiskBytes: 256 << 20, DiskOps: 16384}
	full.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap0", MAC: "02:FC:00:00:00:05"}

	stack := full
	stack.Root.Layers = []string{"/t/base.ext4", "/t/layer-2.ext4", "/t/layer-3.ext4"}

	const binary = "/usr/bin/qemu-system-x86_64"
	for name, m := range map[string]machine{
		"small-tcg": {binary: binary, version: "7.2.22", accel: "tcg", cpu: models[DefaultCPU], spec: small},
		"full-tcg":  {binary: binary, version: "7.2.22", accel: "tcg", cpu: models[cpuV1], spec: full},
		"full-kvm":  {binary: binary, version: "8.2.0", accel: "kvm", cpu: "host", spec: full},
		"stack-tcg": {binary: binary, version: "7.2.22", accel: "tcg", cpu: models[DefaultCPU], spec: stack},
		// What the keys of snapshots are made of: those of earlier agents must stay valid.
		"key":          {version: "7.2.22", accel: "tcg", cpu: models[DefaultCPU], spec: full.Machine()},
		"full-restore": {binary: binary, version: "10.0.0", accel: "tcg", cpu: models["max"], spec: full, memory: "/t/ready/1/mem"},
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
