package host

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/setup"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// driver answers Check as it is told; nothing else of it is ever called.
type driver struct {
	vmm.Driver
	name   string
	report vmm.Report
	err    error
}

func (d driver) Name() string                              { return d.name }
func (d driver) Check(context.Context) (vmm.Report, error) { return d.report, d.err }

func (d driver) Needs() vmm.Needs {
	switch d.name {
	case "sentry":
		return vmm.Needs{Link: vmm.Packet}
	case "firecracker":
		return vmm.Needs{Kernel: true, KVM: true, Link: vmm.Tap, Install: "sudo install firecracker /usr/local/bin/"}
	}
	return vmm.Needs{Kernel: true, Link: vmm.Tap, Install: "sudo apt-get install qemu"}
}

var (
	qemuTCG = driver{name: "qemu", report: vmm.Report{Version: "7.2.22", Accel: "tcg", CPU: "x86-64-v3", Speed: vmm.Emulated,
		Isolation: vmm.Emulation, Why: "the CPU shows neither vmx nor svm"}}
	qemuKVM = driver{name: "qemu", report: vmm.Report{Version: "7.2.22", Accel: "kvm", Speed: vmm.Native, Why: "a probe guest booted"}}
	sentry  = driver{name: "sentry", report: vmm.Report{Version: "1", Accel: "systrap",
		Isolation: vmm.UserSpaceKernel, Speed: vmm.NearNative, Why: "it needs nothing"}}
	noQEMU   = driver{name: "qemu", err: errdefs.Unavailable.Errorf("qemu-system-x86_64 is not installed")}
	noKVM    = driver{name: "firecracker", err: errdefs.Unsupported.Errorf("firecracker needs KVM")}
	unjailed = driver{name: "firecracker", report: vmm.Report{Version: "1.12.1", Accel: "kvm", CPU: "host", Speed: vmm.Native,
		Why: "a probe guest booted", Warning: "there is no jailer"}}
	firecracker = driver{name: "firecracker", err: errdefs.Unavailable.Errorf("firecracker is not installed")}
)

// goodFiles are the /proc, /sys and /dev of a host that lacks nothing.
func goodFiles() map[string]string {
	return map[string]string{
		"dev/kvm":                          "",
		"dev/net/tun":                      "",
		"proc/cpuinfo":                     "processor\t: 0\nflags\t\t: fpu vme vmx sse\n\n",
		"proc/sys/net/ipv4/ip_forward":     "1\n",
		"proc/meminfo":                     "MemTotal:  8000000 kB\nMemAvailable:  4194304 kB\n",
		"proc/self/mounts":                 "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
		"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
	}
}

// host is a machine on which everything is well, as root.
func host(t *testing.T, files map[string]string) machine {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return machine{
		fsRoot:  dir,
		root:    true,
		missing: func() []setup.Package { return nil },
		probe:   func() networkProbe { return networkProbe{} },
		statfs:  func(string) (int64, error) { return 50000, nil },

		resolvers: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("192.0.2.53")} },
		obstacles: func([]netip.Addr) ([]network.Obstacle, error) { return nil, nil },
	}
}

func find(t *testing.T, checks []Check, name string) Check {
	t.Helper()
	for _, c := range checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no check %q", name)
	return Check{}
}

// slow is what doctor says of QEMU without KVM.
const slow = "7.2.22 with tcg, CPU x86-64-v3; guests run emulated, 10 to 50 times slower than the host, isolated by emulation and a jail"

// Each case breaks one thing of a good host and says what becomes of it.
func TestDoctor(t *testing.T) {
	type verdict struct {
		OK, Unknown bool
		Level       Level
	}
	var (
		ok      = verdict{OK: true, Level: Required}
		okOpt   = verdict{OK: true, Level: Optional}
		bad     = verdict{Level: Required}
		badOpt  = verdict{Level: Optional}
		unknown = verdict{Level: Required, Unknown: true}
	)
	cases := []struct {
		name    string
		change  func(files map[string]string)
		machine func(m *machine)
		drivers []vmm.Driver
		check   string
		want    verdict
		found   string // in Check.Found
		fix     string // in Check.Fix
	}{
		{check: "packages", want: ok},
		{check: "packages", want: bad, found: "mmdebstrap (makes", fix: "apt-get install -y --no-install-recommends mmdebstrap",
			machine: func(m *machine) {
				m.missing = func() []setup.Package {
					return []setup.Package{{Name: "mmdebstrap", File: "mmdebstrap", Why: "makes roots"}}
				}
			}},
		{check: "kvm", want: okOpt, found: "/dev/kvm is there, the CPU has vmx; qemu: a probe guest booted"},
		{check: "kvm", want: badOpt, drivers: []vmm.Driver{qemuTCG}, found: "qemu: ", fix: "do not come up in time with this host's KVM"},
		{check: "kvm", want: badOpt, drivers: []vmm.Driver{qemuTCG}, found: "no /dev/kvm, the CPU has vmx", fix: "modprobe kvm_intel",
			change: func(f map[string]string) { delete(f, "dev/kvm") }},
		{check: "kvm", want: badOpt, drivers: []vmm.Driver{qemuTCG}, found: "no /dev/kvm", fix: "firmware",
			change: func(f map[string]string) { delete(f, "dev/kvm"); f["proc/cpuinfo"] = "flags : fpu\n" }},
		{check: "kvm", want: badOpt, drivers: []vmm.Driver{qemuTCG}, fix: "modprobe kvm_amd",
			change: func(f map[string]string) { delete(f, "dev/kvm"); f["proc/cpuinfo"] = "flags : svm\n" }},
		{check: "vmm qemu", want: ok, found: "7.2.22 with kvm"},
		{check: "vmm qemu", want: ok, drivers: []vmm.Driver{qemuTCG, firecracker}, found: slow},
		{check: "vmm firecracker", want: badOpt, drivers: []vmm.Driver{qemuTCG, firecracker}, found: "not installed", fix: "/usr/local/bin"},
		{check: "vmm qemu", want: bad, drivers: []vmm.Driver{noQEMU, firecracker}, fix: "apt-get install"},
		{check: "vmm firecracker", want: bad, drivers: []vmm.Driver{noQEMU, firecracker}},
		{check: "vmm firecracker", want: badOpt, drivers: []vmm.Driver{noKVM, qemuTCG}, found: "needs KVM"},
		{check: "vmm firecracker", want: ok, drivers: []vmm.Driver{unjailed, qemuTCG}, found: "1.12.1 with kvm, CPU host; there is no jailer"},
		{check: "vmm in use", want: ok, drivers: []vmm.Driver{noKVM, qemuTCG}, found: "qemu with tcg: it works without KVM; firecracker needs KVM; qemu: the CPU"},
		{check: "vmm in use", want: bad, drivers: []vmm.Driver{firecracker, noQEMU}, found: "firecracker is not installed; qemu-system-x86_64 is not installed"},
		{check: "tun", want: ok},
		{check: "tun", want: bad, found: "no such file", fix: "modprobe tun", change: func(f map[string]string) { delete(f, "dev/net/tun") }},
		{check: "network namespaces", want: ok},
		{check: "network namespaces", want: bad, found: "permission denied", fix: "CAP_SYS_ADMIN",
			machine: func(m *machine) { m.probe = func() networkProbe { return networkProbe{netns: fs.ErrPermission} } }},
		{check: "nftables", want: unknown,
			machine: func(m *machine) { m.probe = func() networkProbe { return networkProbe{netns: fs.ErrPermission} } }},
		{check: "nftables", want: ok},
		{check: "nftables", want: bad, found: "no such", fix: "modprobe -a nf_tables",
			machine: func(m *machine) {
				m.probe = func() networkProbe { return networkProbe{nft: errors.New("add a table with NAT: no such file")} }
			}},
		{check: "nftables", want: unknown, fix: "sudo wrenn doctor", machine: func(m *machine) { m.root = false }},
		{check: "network namespaces", want: unknown, machine: func(m *machine) { m.root = false }},
		{check: "ip forwarding", want: okOpt, found: "on"},
		{check: "ip forwarding", want: badOpt, found: "off", fix: "sysctl", change: func(f map[string]string) { f["proc/sys/net/ipv4/ip_forward"] = "0\n" }},
		{check: "ip forwarding", want: verdict{Level: Optional, Unknown: true}, change: func(f map[string]string) { delete(f, "proc/sys/net/ipv4/ip_forward") }},
		{check: "firewall", want: okOpt},
		{check: "firewall", want: badOpt, found: "dropped by ip filter FORWARD, inet x y",
			fix: "sudo iptables -I DOCKER-USER -i wrenn-+ -j ACCEPT && sudo nft insert rule inet x y iifname 'wrenn-*' accept #",
			machine: func(m *machine) {
				m.obstacles = func(resolvers []netip.Addr) ([]network.Obstacle, error) {
					if len(resolvers) != 1 {
						t.Errorf("resolvers = %v", resolvers)
					}
					return []network.Obstacle{
						{Chain: "ip filter FORWARD", Mend: [][]string{{"iptables", "-I", "DOCKER-USER", "-i", "wrenn-+", "-j", "ACCEPT"}}},
						{Chain: "inet x y", Mend: [][]string{{"nft", "insert", "rule", "inet", "x", "y", "iifname", "wrenn-*", "accept"}}},
					}, nil
				}
			}},
		{check: "firewall", want: verdict{Level: Optional, Unknown: true}, found: "boom", machine: func(m *machine) {
			m.obstacles = func([]netip.Addr) ([]network.Obstacle, error) { return nil, errors.New("boom") }
		}},
		{check: "firewall", want: verdict{Level: Optional, Unknown: true}, fix: "sudo wrenn doctor", machine: func(m *machine) { m.root = false }},
		{check: "resolvers", want: okOpt, found: "192.0.2.53"},
		{check: "resolvers", want: badOpt, found: "guests ask 1.1.1.1", fix: "--dns", machine: func(m *machine) {
			m.resolvers = func() []netip.Addr { return nil }
		}},
		{check: "guest kernel", want: bad, found: "no guest kernel yet", fix: "wrenn setup --state-dir"},
		{check: "initrd", want: bad, fix: "wrenn setup"},
		{check: "template minimal", want: bad, fix: "wrenn setup"},
		{check: "disk space", want: ok, found: "50000 MiB free"},
		{check: "disk space", want: bad, found: "want 2048", fix: "--state-dir", machine: func(m *machine) { m.statfs = func(string) (int64, error) { return 100, nil } }},
		{check: "disk space", want: ok, found: "in /",
			machine: func(m *machine) {
				m.statfs = func(p string) (int64, error) {
					if p != "/" {
						return 0, &fs.PathError{Op: "statfs", Path: p, Err: fs.ErrNotExist}
					}
					return 9000, nil
				}
			}},
		{check: "memory", want: ok, found: "4096 MiB available"},
		{check: "memory", want: bad, found: "97 MiB", change: func(f map[string]string) { f["proc/meminfo"] = "MemAvailable: 100000 kB\n" }},
		{check: "memory", want: unknown, change: func(f map[string]string) { f["proc/meminfo"] = "nonsense\n" }},
		{check: "cgroups", want: okOpt, found: "version 2 with cpuset, cpu, io, memory, pids"},
		{check: "cgroups", want: okOpt, found: "version 1 with cpu, memory, pids",
			change: func(f map[string]string) {
				f["proc/self/mounts"] = "cgroup /c/cpu cgroup rw,cpu,cpuacct 0 0\ncgroup /c/m cgroup rw,memory 0 0\ncgroup /c/p cgroup rw,pids 0 0\ncgroup2 /u cgroup2 rw 0 0\n"
			}},
		{check: "cgroups", want: badOpt, found: "lacks memory", fix: "cgroup_enable=memory",
			change: func(f map[string]string) { f["sys/fs/cgroup/cgroup.controllers"] = "cpu pids\n" }},
		{check: "cgroups", want: badOpt, found: "none mounted", fix: "mount -t cgroup2", change: func(f map[string]string) { f["proc/self/mounts"] = "" }},
	}
	for _, c := range cases {
		t.Run(strings.TrimSpace(c.check+" "+c.found+c.fix), func(t *testing.T) {
			files := goodFiles()
			if c.change != nil {
				c.change(files)
			}
			m := host(t, files)
			if c.machine != nil {
				c.machine(&m)
			}
			drivers := c.drivers
			if drivers == nil {
				drivers = []vmm.Driver{qemuKVM}
			}
			checks := m.doctor(context.Background(), Options{StateDir: filepath.Join(t.TempDir(), "state"), Drivers: drivers})
			got := find(t, checks, c.check)
			if diff := cmp.Diff(c.want, verdict{got.OK, got.Unknown, got.Level}); diff != "" {
				t.Errorf("verdict (-want +got):\n%s%+v", diff, got)
			}
			if !strings.Contains(got.Found, c.found) || !strings.Contains(got.Fix, c.fix) {
				t.Errorf("found %q, want %q in it; fix %q, want %q in it", got.Found, c.found, got.Fix, c.fix)
			}
			for _, c := range checks {
				if c.Found == "" || c.Why == "" {
					t.Errorf("%s says nothing: %+v", c.Name, c)
				}
				if c.OK && (c.Fix != "" || c.Unknown) {
					t.Errorf("%s is fine and wants mending: %+v", c.Name, c)
				}
			}
		})
	}
}

// Looking does not make the state directory.
func TestDoctorChangesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	host(t, goodFiles()).doctor(context.Background(), Options{StateDir: dir})
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("doctor made %s: %v", dir, err)
	}
}

func TestReady(t *testing.T) {
	for _, c := range []struct {
		check Check
		want  bool
	}{
		{Check{OK: true, Level: Required}, true},
		{Check{Level: Optional}, true},
		{Check{Level: Required}, false},
		{Check{Level: Required, Unknown: true}, false},
	} {
		if got := Ready([]Check{{OK: true, Level: Required}, c.check}); got != c.want {
			t.Errorf("Ready(%+v) = %v", c.check, got)
		}
	}
}

// The kernel of the machine that runs the tests, for real.
func TestDoctorHere(t *testing.T) {
	testenv.Root(t)
	dir := testenv.StateDir(t)
	testenv.NoLeaks(t, "wrenn-doctor")
	checks := Doctor(context.Background(), Options{StateDir: dir, Drivers: []vmm.Driver{qemuTCG}})
	for _, c := range checks {
		t.Logf("%-20s ok=%-5v %-8s %s | %s", c.Name, c.OK, c.Level, c.Found, c.Fix)
	}
	if !Ready(checks) {
		t.Error("this machine is not ready")
	}
	// This program is not the envd in the initrd.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	got := find(t, Doctor(context.Background(), Options{StateDir: dir, Envd: self}), "initrd")
	if got.OK || !strings.Contains(got.Found, "another envd") || !strings.Contains(got.Fix, "wrenn setup") {
		t.Errorf("an initrd with another envd: %+v", got)
	}
}

func TestProbeNetworkHere(t *testing.T) {
	testenv.Root(t)
	testenv.NoLeaks(t, "wrenn-doctor")
	if p := probeNetwork(); p.netns != nil || p.nft != nil {
		t.Errorf("probe = %+v", p)
	}
}

func TestChoose(t *testing.T) {
	jailed := driver{name: "firecracker", report: vmm.Report{Version: "1.12.1", Accel: "kvm", Speed: vmm.Native, Why: "a probe guest booted"}}
	for _, c := range []struct {
		name    string
		drivers []vmm.Driver
		want    string // the driver's name and acceleration
		why     string
	}{
		{"auto", []vmm.Driver{jailed, qemuKVM}, "firecracker kvm", "the first choice that has KVM; firecracker: a probe guest booted"},
		{"auto", []vmm.Driver{noKVM, qemuKVM}, "qemu kvm", "the first choice that has KVM; firecracker needs KVM; qemu: a probe guest booted"},
		{"auto", []vmm.Driver{firecracker, qemuTCG}, "qemu tcg", "it works without KVM; firecracker is not installed; qemu: the CPU shows"},
		{"auto", []vmm.Driver{qemuTCG, jailed}, "firecracker kvm", "the first choice that has KVM"},
		{"auto", []vmm.Driver{noKVM, sentry, qemuTCG}, "qemu tcg", "it works without KVM; firecracker needs KVM; qemu: the CPU shows"},
		{"auto", []vmm.Driver{noKVM, noQEMU, sentry}, "sentry systrap", "no virtual machine can be used; firecracker needs KVM; qemu"},
		{"sentry", []vmm.Driver{qemuTCG, sentry}, "sentry systrap", "the settings say so; sentry: it needs"},
		{"auto", []vmm.Driver{sentry, qemuKVM}, "qemu kvm", "the first choice that has KVM; qemu: a probe"},
		{"qemu", []vmm.Driver{sentry, qemuTCG}, "qemu tcg", "the settings say so; qemu: the CPU"},
		{"qemu", []vmm.Driver{jailed, qemuTCG}, "qemu tcg", "the settings say so; qemu: the CPU"},
		{"firecracker", []vmm.Driver{jailed, qemuTCG}, "firecracker kvm", "the settings say so"},
		{"firecracker", []vmm.Driver{noKVM, qemuTCG}, "", "no VMM can be used: firecracker needs KVM"},
		{"auto", []vmm.Driver{noKVM, noQEMU}, "", "no VMM can be used: firecracker needs KVM; qemu-system-x86_64 is not installed"},
		{"xen", []vmm.Driver{noKVM, noQEMU}, "", "no vmm is called \"xen\""},
	} {
		got, err := Choose(t.Context(), c.name, c.drivers)
		if err != nil {
			if c.want != "" || err.Error() != c.why {
				t.Errorf("%s: %v, want %s: %s", c.name, err, c.want, c.why)
			}
			continue
		}
		first := got.First()
		if is := first.Driver.Name() + " " + first.Report.Accel; is != c.want || !strings.HasPrefix(got.Why, c.why) {
			t.Errorf("%s: %s: %s, want %s: %s", c.name, is, got.Why, c.want, c.why)
		}
		if len(got.Usable)+len(got.Others) != len(c.drivers) {
			t.Errorf("%s: usable %v, others %v", c.name, got.Usable, got.Others)
		}
		for _, other := range got.Others {
			if other.Err == nil || other.Driver.Name() == first.Driver.Name() {
				t.Errorf("%s: other %v", c.name, other)
			}
		}
	}
}

// What no driver needs is not asked for.
func TestDoctorOfADriverWithoutTap(t *testing.T) {
	for _, d := range []driver{sentry, qemuTCG} {
		checks := host(t, goodFiles()).doctor(t.Context(), Options{StateDir: t.TempDir(), Drivers: []vmm.Driver{d}})
		asked := slices.ContainsFunc(checks, func(c Check) bool { return c.Name == "tun" })
		if asked != (d.Needs().Link == vmm.Tap) {
			t.Errorf("%s: tun is asked for: %v", d.name, asked)
		}
	}
	checks := host(t, goodFiles()).doctor(t.Context(), Options{StateDir: t.TempDir(), VMM: "firecracker", Drivers: []vmm.Driver{noKVM, qemuTCG}})
	if c := find(t, checks, "kvm"); c.Level != Required {
		t.Errorf("with --vmm firecracker KVM is %s", c.Level)
	}
}
