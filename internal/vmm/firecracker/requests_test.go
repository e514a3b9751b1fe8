package firecracker

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// specs are a VM with little and one with everything.
func specs() (small, full vmm.Spec) {
	small = vmm.Spec{
		ID: "sb-1", RunDir: "/run/wrenn/sb-1", VCPUs: 1, MemMiB: 128,
		Kernel: vmm.Kernel{Image: "/k/vmlinux"}, Console: "/s/sb-1/console.log",
	}
	full = small
	full.VCPUs, full.MemMiB = 4, 2048
	full.Kernel.Initrd, full.Kernel.Args = "/k/initrd.img", "quiet panic=0"
	full.Boot.Addr = netip.MustParsePrefix("169.254.0.21/30")
	full.Root = vmm.Root{Layers: []string{"/t/base.ext4"}, Overlay: "/s/sb-1/overlay.ext4"}
	full.UID, full.GID = 20001, 20002
	full.NetNS = "/run/netns/wrenn-1"
	full.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap0", MAC: "02:FC:00:00:00:05"}
	full.Cgroup = "wrenn/sb-1"
	full.Limits = vmm.Limits{CPUMilli: 4250, MemMiB: 2176, PIDs: 64}
	return small, full
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (run with -update to accept):\n%s", name, diff)
	}
}

func TestRequests(t *testing.T) {
	small, full := specs()
	stack := full
	stack.Root.Layers = []string{"/t/base.ext4", "/t/layer-2.ext4", "/t/layer-3.ext4"}
	for name, calls := range map[string][]request{
		"boot-small": append(configure(small), start()),
		"boot-full":  append(configure(full), start()),
		"boot-stack": append(configure(stack), start()),
		// What the keys of snapshots are made of: those of earlier agents must stay valid.
		"key":          configure(full.Machine()),
		"restore":      {load(full, "1.12.0"), turn("Resumed")},
		"restore-old":  {load(full, "1.11.3")},
		"restore-bare": {load(small, "1.14.0")},
		"snapshot":     {turn("Paused"), create()},
	} {
		var b strings.Builder
		for _, r := range calls {
			body, err := r.encode()
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, "%s %s %s\n", r.method, r.path, body)
		}
		golden(t, name, b.String())
	}
}

func TestProgram(t *testing.T) {
	small, full := specs()
	jailed := programs{firecracker: "/opt/firecracker-v1.12.1", jailer: "/opt/jailer", version: "1.12.1", devices: []string{"/dev/kvm", "/dev/net/tun"}}
	plain := jailed
	plain.jailer = ""
	for name, p := range map[string]launch.Program{
		"program-jailed":         program(jailed, full, ""),
		"program-jailed-restore": program(jailed, full, "/t/ready/1"),
		"program-plain":          program(plain, full, ""),
		"program-plain-small":    program(plain, small, ""),
	} {
		var b strings.Builder
		fmt.Fprintf(&b, "args     %s\nroot     %s\nuser     %d:%d\nnetns    %s\nrun dir  %s\nlog      %s\nconsole  %s\ncgroup   %s %+v\n",
			strings.Join(p.Args, " "), p.Root, p.UID, p.GID, p.NetNS, p.RunDir, p.Log, p.Console, p.Cgroup, p.Limits)
		for _, m := range p.Mounts {
			source, mode := m.Source, "rw"
			if source == "" {
				source = "(memory)"
			}
			if m.ReadOnly {
				mode = "ro"
			}
			fmt.Fprintf(&b, "mount    %s %s on %s for %d:%d\n", mode, source, m.Target, m.UID, m.GID)
		}
		golden(t, name, b.String())
	}
}

func TestSince(t *testing.T) {
	for _, c := range []struct {
		version string
		want    bool // since 1.12
	}{{"1.8.0", false}, {"1.11.9", false}, {"1.12.0", true}, {"1.12.1", true}, {"1.17.0", true}, {"2.0.0", true}, {"", false}} {
		if got := launch.AtLeast(c.version, 1, 12); got != c.want {
			t.Errorf("%q: %v", c.version, got)
		}
	}
}

// Whoever mends a snapshot's key mends what it depends on.
func TestSnapshotKey(t *testing.T) {
	_, full := specs()
	key := func(version string, change func(*vmm.Spec)) string {
		t.Helper()
		spec := full
		link := *full.Link
		spec.Link = &link
		change(&spec)
		k, err := driver(install(t, fakeSettings{Version: version}, true)).SnapshotKey(t.Context(), spec)
		if err != nil || len(k) != 64 {
			t.Fatal(k, err)
		}
		return k
	}
	same := key("1.12.1", func(*vmm.Spec) {})
	for name, change := range map[string]func(*vmm.Spec){
		"another id":      func(s *vmm.Spec) { s.ID = "sb-2" },
		"another place":   func(s *vmm.Spec) { s.RunDir, s.Console, s.NetNS, s.Cgroup = "/a", "/b", "/c", "d" },
		"another user":    func(s *vmm.Spec) { s.UID, s.GID = 1, 2 },
		"another overlay": func(s *vmm.Spec) { s.Root.Overlay = "/elsewhere" },
		"another tap":     func(s *vmm.Spec) { s.Link.Name = "tap7" },
		"another kernel":  func(s *vmm.Spec) { s.Kernel = vmm.Kernel{Image: "/x", Initrd: "/y", Args: "z"} },
	} {
		if key("1.12.1", change) != same {
			t.Errorf("%s changes the key", name)
		}
	}
	for name, change := range map[string]func(*vmm.Spec){
		"vCPUs":       func(s *vmm.Spec) { s.VCPUs = 2 },
		"memory":      func(s *vmm.Spec) { s.MemMiB = 256 },
		"no overlay":  func(s *vmm.Spec) { s.Root.Overlay = "" },
		"no base":     func(s *vmm.Spec) { s.Root.Layers = nil },
		"more layers": func(s *vmm.Spec) { s.Root.Layers = append(s.Root.Layers, "/t/layer-2.ext4") },
		"no network":  func(s *vmm.Spec) { s.Link = nil },
		"another MAC": func(s *vmm.Spec) { s.Link.MAC = "02:FC:00:00:00:06" },
	} {
		if key("1.12.1", change) == same {
			t.Errorf("%s does not change the key", name)
		}
	}
	if key("1.12.2", func(*vmm.Spec) {}) == same {
		t.Error("another version does not change the key")
	}
	if key("1.11.0", func(*vmm.Spec) {}) == key("1.11.0", func(s *vmm.Spec) { s.Link.Name = "tap7" }) {
		t.Error("another tap does not change the key of a version that cannot replace it")
	}
}
