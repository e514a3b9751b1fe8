// Package host knows what a machine needs to run sandboxes: it checks for it and
// says how to mend it.
package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/digest"
	"git.omukk.dev/wrenn/sandbox/internal/diskfree"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/setup"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Level says what a check that is not OK means.
type Level string

const (
	// Required: no sandbox runs without it.
	Required Level = "required"
	// Optional: it works without, but slower or less contained.
	Optional Level = "optional"
)

// Check is one thing that a host needs, and how it is here.
type Check struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Level Level  `json:"level"`
	// Unknown: it could not be looked at, Found says why; OK is then false.
	Unknown bool `json:"unknown,omitempty"`
	// Found is what is there.
	Found string `json:"found"`
	// Why it matters.
	Why string `json:"why"`
	// Fix is the command that mends it, with a remark behind a #; empty when
	// it is OK or when no command can.
	Fix string `json:"fix,omitempty"`
}

// Options of Doctor.
type Options struct {
	// StateDir is looked at, never changed.
	StateDir string
	// Envd is the path of the envd that the initrd should hold; empty leaves
	// that comparison out.
	Envd string
	// Drivers are asked whether they can run VMs here, in the order of
	// preference.
	Drivers []vmm.Driver
	// VMM is the name of the one to be used; empty for AutoVMM.
	VMM string
	// Plan says which links are ours.
	Plan network.Plan
}

// Doctor looks at all that this host needs, in the order in which it is best
// mended. It changes nothing but what a driver's own Check caches, and runs
// unprivileged too: what it cannot look at then is Unknown.
func Doctor(ctx context.Context, o Options) []Check {
	m := machine{
		fsRoot:  "/",
		root:    os.Geteuid() == 0,
		missing: setup.Missing,
		probe:   probeNetwork,
		statfs:  freeMiB,

		resolvers: network.HostResolvers,
		obstacles: func(resolvers []netip.Addr) ([]network.Obstacle, error) { return o.Plan.Obstacles(resolvers) },
	}
	return m.doctor(ctx, o)
}

// wants says whether a driver that may be used needs something.
func (o Options) wants(needed func(vmm.Needs) bool) bool {
	return slices.ContainsFunc(o.Drivers, func(d vmm.Driver) bool {
		return (o.VMM == "" || o.VMM == AutoVMM || o.VMM == d.Name()) && needed(d.Needs())
	})
}

// machine is the host, or the one that a test describes.
type machine struct {
	fsRoot  string // where /proc, /sys and /dev are found
	root    bool
	missing func() []setup.Package
	probe   func() networkProbe
	statfs  func(path string) (freeMiB int64, err error)

	resolvers func() []netip.Addr
	obstacles func(resolvers []netip.Addr) ([]network.Obstacle, error)
}

// networkProbe is what an attempt in a network namespace came to.
type networkProbe struct {
	netns error // of making the namespace
	nft   error // of nftables with NAT in it; nil if netns is not
}

func (m machine) doctor(ctx context.Context, o Options) []Check {
	checks := []Check{m.packages()}
	checks = append(checks, m.drivers(ctx, o)...)
	if o.wants(func(n vmm.Needs) bool { return n.Link == vmm.Tap }) {
		checks = append(checks, m.tun())
	}
	checks = append(checks, m.network()...)
	checks = append(checks, m.forwarding(), m.firewall(), m.dns())
	checks = append(checks, m.store(o)...)
	return append(checks, m.disk(o.StateDir), m.memory(), m.cgroups())
}

// Ready says whether nothing that is required is missing.
func Ready(checks []Check) bool {
	return !slices.ContainsFunc(checks, func(c Check) bool { return c.Level == Required && !c.OK })
}

func (m machine) packages() Check {
	c := Check{Name: "packages", Level: Required, Why: "these programs run microVMs and make their disks"}
	want := m.missing()
	if len(want) == 0 {
		c.OK, c.Found = true, "all installed"
		return c
	}
	var why []string
	for _, p := range want {
		why = append(why, p.Name+" ("+p.Why+")")
	}
	c.Found = "missing: " + strings.Join(why, ", ")
	c.Fix = "sudo " + setup.InstallCommand(want)
	return c
}

// drivers reports each VMM, whether one of them has KVM, and which one is used.
func (m machine) drivers(ctx context.Context, o Options) []Check {
	kvm := Check{
		Name: "kvm", Level: Optional,
		Why: "with hardware virtualisation a machine runs about as fast as the host; without it a machine is emulated, and many times slower",
	}
	if o.VMM != "" && o.VMM != AutoVMM && o.wants(func(n vmm.Needs) bool { return n.KVM }) {
		kvm.Level = Required
	}
	var list []Check
	var notes []string
	works := false
	for _, d := range o.Drivers {
		report, err := d.Check(ctx)
		list = append(list, m.driver(d, report, err))
		if err != nil {
			continue
		}
		works = true
		kvm.OK = kvm.OK || report.Accel == "kvm"
		if report.Why != "" && d.Needs().Kernel { // a machine, which KVM would run
			notes = append(notes, d.Name()+": "+report.Why)
		}
	}
	if works {
		for i := range list {
			if !list[i].OK {
				list[i].Level = Optional
			}
		}
	}
	kvm.Found = strings.Join(append([]string{m.kvmFacts()}, notes...), "; ")
	if !kvm.OK {
		kvm.Unknown = !works && !m.root
		kvm.Fix = m.kvmFix()
	}
	used := m.used(ctx, o, works)
	if !used.OK {
		used.Unknown = !m.root && slices.ContainsFunc(list, func(c Check) bool { return c.Unknown })
	}
	return append(append([]Check{kvm}, list...), used)
}

// driver reports what a driver's own check came to.
func (m machine) driver(d vmm.Driver, report vmm.Report, err error) Check {
	c := Check{Name: "vmm " + d.Name(), Level: Required, Why: "a program that runs sandboxes; one is enough"}
	switch {
	case err == nil:
		c.OK = true
		c.Found = report.Version + " with " + report.Accel + ", CPU " + report.CPU
		if report.Warning != "" {
			c.Found += "; " + report.Warning
		}
		c.Found += fmt.Sprintf("; guests run %s, isolated by %s and a jail", report.Speed, report.Isolation)
	case !m.root && errors.Is(err, fs.ErrPermission):
		// Without the right to look it is not known whether something is missing.
		c.Found, c.Unknown, c.Fix = err.Error(), true, "sudo wrenn doctor"
	default:
		c.Found = err.Error()
		if !errors.Is(err, errdefs.Unsupported) { // whose text says what is needed
			c.Fix = d.Needs().Install
		}
	}
	return c
}

// used reports which VMM sandboxes are started with.
func (m machine) used(ctx context.Context, o Options, works bool) Check {
	c := Check{Name: "vmm in use", Level: Required, Why: "what sandboxes are started with that name none; --vmm of serve chooses another"}
	name := cmp.Or(o.VMM, AutoVMM)
	choice, err := Choose(ctx, name, o.Drivers)
	if err != nil {
		c.Found = err.Error()
		if name != AutoVMM && works {
			c.Fix = "# use --vmm auto"
		}
		return c
	}
	c.OK, c.Found = true, fmt.Sprintf("%s with %s: %s", choice.First().Driver.Name(), choice.First().Report.Accel, choice.Why)
	if len(choice.Usable) > 1 {
		var also []string
		for _, u := range choice.Usable[1:] {
			also = append(also, u.Driver.Name())
		}
		c.Found += "; a sandbox may name " + strings.Join(also, ", ") + " instead"
	}
	return c
}

// kvmFacts is what can be seen without booting anything. A device that opens
// proves nothing: only a guest that boots does.
func (m machine) kvmFacts() string {
	device := "no /dev/kvm"
	if _, err := os.Stat(m.path("dev/kvm")); err == nil {
		device = "/dev/kvm is there"
		if err := m.openKVM(); err != nil {
			device += " but does not open (" + errnoText(err) + ")"
		}
	}
	if flag := m.cpuFlag(); flag != "" {
		return device + ", the CPU has " + flag
	}
	return device + ", the CPU shows neither vmx nor svm"
}

func (m machine) openKVM() error {
	f, err := os.OpenFile(m.path("dev/kvm"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m machine) kvmFix() string {
	if m.openKVM() == nil {
		return "# nothing to install: guests do not come up in time with this host's KVM, and run without it"
	}
	switch flag := m.cpuFlag(); {
	case flag == "vmx":
		return "sudo modprobe kvm_intel"
	case flag == "svm":
		return "sudo modprobe kvm_amd"
	}
	return "# enable virtualisation in the firmware, or nested virtualisation for this VM; no command here can"
}

// cpuFlag is vmx or svm if the CPU shows one, else empty.
func (m machine) cpuFlag() string {
	b, _ := os.ReadFile(m.path("proc/cpuinfo"))
	for line := range strings.Lines(string(b)) {
		key, flags, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(key) != "flags" {
			continue
		}
		for _, f := range strings.Fields(flags) {
			if f == "vmx" || f == "svm" {
				return f
			}
		}
		break // the CPUs are alike
	}
	return ""
}

func (m machine) tun() Check {
	c := Check{Name: "tun", Level: Required, Why: "each guest's network card is a tap device"}
	f, err := os.OpenFile(m.path("dev/net/tun"), os.O_RDWR, 0)
	switch {
	case err == nil:
		f.Close()
		c.OK, c.Found = true, "/dev/net/tun opens"
	case errors.Is(err, fs.ErrPermission) && !m.root:
		c.Unknown, c.Found, c.Fix = true, "/dev/net/tun opens for root only", "sudo wrenn doctor"
	default:
		c.Found, c.Fix = "/dev/net/tun does not open ("+errnoText(err)+")", "sudo modprobe tun"
	}
	return c
}

func (m machine) network() []Check {
	netns := Check{Name: "network namespaces", Level: Required, Why: "each sandbox has a network of its own"}
	nft := Check{Name: "nftables", Level: Required, Why: "the kernel translates and filters the sandboxes' traffic"}
	if !m.root {
		for _, c := range []*Check{&netns, &nft} {
			c.Unknown, c.Found, c.Fix = true, "only root can try", "sudo wrenn doctor"
		}
		return []Check{netns, nft}
	}
	p := m.probe()
	if p.netns != nil {
		netns.Found = p.netns.Error()
		netns.Fix = "# run with the capability CAP_SYS_ADMIN on a kernel with CONFIG_NET_NS (in a container: --privileged)"
		nft.Unknown, nft.Found = true, "could not be tried without a network namespace"
		return []Check{netns, nft}
	}
	netns.OK, netns.Found = true, "made one"
	if p.nft != nil {
		nft.Found = p.nft.Error()
		nft.Fix = "sudo modprobe -a nf_tables nft_chain_nat nft_nat nft_masq"
		return []Check{netns, nft}
	}
	nft.OK, nft.Found = true, "the kernel took a table with NAT"
	return []Check{netns, nft}
}

func (m machine) forwarding() Check {
	c := Check{Name: "ip forwarding", Level: Optional, Why: "sandboxes reach the internet through this host; wrenn serve turns it on when it may"}
	b, err := os.ReadFile(m.path("proc/sys/net/ipv4/ip_forward"))
	switch v := strings.TrimSpace(string(b)); {
	case err != nil:
		c.Unknown, c.Found = true, "cannot read net.ipv4.ip_forward ("+errnoText(err)+")"
	case v == "1":
		c.OK, c.Found = true, "on"
	default:
		c.Found = "off"
	}
	if !c.OK {
		c.Fix = "sudo sysctl -w net.ipv4.ip_forward=1"
	}
	return c
}

// firewall looks for what others on this host forbid the sandboxes.
func (m machine) firewall() Check {
	c := Check{Name: "firewall", Level: Optional, Why: "a packet passes only if every firewall of this host lets it: Docker's and others' drop what they do not know"}
	if !m.root {
		c.Unknown, c.Found, c.Fix = true, "only root can look", "sudo wrenn doctor"
		return c
	}
	found, err := m.obstacles(m.resolvers())
	if err != nil {
		c.Unknown, c.Found = true, err.Error()
		return c
	}
	if len(found) == 0 {
		c.OK, c.Found = true, "no other one stands in the way"
		return c
	}
	var chains, fixes []string
	for _, o := range found {
		chains, fixes = append(chains, o.Chain), append(fixes, o.String())
	}
	c.Found = "the sandboxes' packets are dropped by " + strings.Join(chains, ", ")
	c.Fix = strings.Join(fixes, " && ") + " # until it is started anew: make it part of its own rules"
	return c
}

func (m machine) dns() Check {
	c := Check{Name: "resolvers", Level: Optional, Why: "guests ask the host's name servers; they cannot reach one that listens on the host's loopback only"}
	var list []string
	for _, a := range m.resolvers() {
		list = append(list, a.String())
	}
	if c.OK = len(list) > 0; c.OK {
		c.Found = strings.Join(list, ", ")
		return c
	}
	list = nil
	for _, a := range network.FallbackResolvers() {
		list = append(list, a.String())
	}
	c.Found = "the host names none that a guest can reach; guests ask " + strings.Join(list, ", ")
	c.Fix = "# start the agent with --dns ADDRESS to choose others"
	return c
}

// store looks at what setup makes.
func (m machine) store(o Options) []Check {
	setup := "sudo wrenn setup --state-dir " + o.StateDir
	kernel := Check{Name: "guest kernel", Level: Required, Why: "what a microVM boots", Fix: setup}
	initrd := Check{Name: "initrd", Level: Required, Why: "carries the guest daemon, which must be of this version", Fix: setup}
	tmpl := Check{Name: "template " + template.DefaultName, Level: Required, Why: "the root file system of a sandbox whose creator names none", Fix: setup}
	all := func() []Check {
		for _, c := range []*Check{&kernel, &initrd, &tmpl} {
			if c.OK {
				c.Fix = ""
			}
		}
		return []Check{kernel, initrd, tmpl}
	}
	// A directory that we may not enter looks empty to the store.
	if _, err := os.ReadDir(o.StateDir); errors.Is(err, fs.ErrPermission) {
		for _, c := range []*Check{&kernel, &initrd, &tmpl} {
			c.Unknown, c.Found, c.Fix = true, "only root may look into "+o.StateDir, "sudo wrenn doctor --state-dir "+o.StateDir
		}
		return all()
	}
	s := template.View(o.StateDir, slog.New(slog.DiscardHandler))
	boot, err := s.Boot()
	if err != nil {
		kernel.Found, initrd.Found, tmpl.Found = err.Error(), "none without a kernel", "not usable without a kernel"
		return all()
	}
	kernel.OK, kernel.Found = true, strings.TrimSpace(boot.Release+" from "+boot.Source)
	switch _, sum, err := digest.File(o.Envd); {
	case o.Envd == "":
		initrd.OK, initrd.Found = true, "there"
	case err != nil:
		initrd.Unknown, initrd.Found, initrd.Fix = true, "cannot read envd to compare ("+errnoText(err)+")", "make build"
	case sum != boot.EnvdSHA256:
		initrd.Found = "holds another envd than this version's"
	default:
		initrd.OK, initrd.Found = true, "holds this version's envd"
	}
	t, err := s.Get(template.DefaultName)
	if err != nil {
		tmpl.Found = err.Error()
		return all()
	}
	tmpl.OK, tmpl.Found = true, fmt.Sprintf("%d MiB", t.Bytes()>>20)
	if t.EROFS.Path == "" || boot.InitImage == "" {
		tmpl.Found += ", not for gVisor: run wrenn setup again"
	}
	return all()
}

const (
	// wantDiskMiB leaves room for setup and the first overlays.
	wantDiskMiB = 2048
	// wantMemMiB is one sandbox of the default size with its VMM.
	wantMemMiB = 768
)

func (m machine) disk(dir string) Check {
	c := Check{Name: "disk space", Level: Required, Why: "templates, the sandboxes' overlay disks and snapshots live there"}
	// Before setup the state directory is not there: its parent will hold it.
	at := dir
	free, err := m.statfs(at)
	for errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		free, err = m.statfs(at)
	}
	if err != nil {
		c.Unknown, c.Found = true, "cannot look at "+at+" ("+errnoText(err)+")"
		return c
	}
	c.Found = fmt.Sprintf("%d MiB free in %s", free, at)
	if c.OK = free >= wantDiskMiB; !c.OK {
		c.Found += fmt.Sprintf(", want %d", wantDiskMiB)
		c.Fix = "sudo apt-get clean # or free space otherwise, or choose another --state-dir"
	}
	return c
}

func (m machine) memory() Check {
	c := Check{Name: "memory", Level: Required, Why: "a guest's memory is the host's"}
	b, err := os.ReadFile(m.path("proc/meminfo"))
	if err != nil {
		c.Unknown, c.Found = true, "cannot read /proc/meminfo ("+errnoText(err)+")"
		return c
	}
	mib := int64(-1)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "MemAvailable:" {
			if kib, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				mib = kib >> 10
			}
		}
	}
	if mib < 0 {
		c.Unknown, c.Found = true, "/proc/meminfo does not say what is available"
		return c
	}
	c.Found = fmt.Sprintf("%d MiB available", mib)
	if c.OK = mib >= wantMemMiB; !c.OK {
		c.Found += fmt.Sprintf(", want %d for one sandbox of the default size", wantMemMiB)
		c.Fix = "# end other programs, or run smaller sandboxes (--memory 128)"
	}
	return c
}

// cgroups looks for the controllers that bound a VMM, in either version.
func (m machine) cgroups() Check {
	c := Check{Name: "cgroups", Level: Optional, Why: "they bound what a VMM may take of the host's CPU, memory and processes"}
	b, err := os.ReadFile(m.path("proc/self/mounts"))
	if err != nil {
		c.Unknown, c.Found = true, "cannot read /proc/self/mounts ("+errnoText(err)+")"
		return c
	}
	var v1, v2 []string
	unified := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		switch f[2] {
		case "cgroup2":
			unified = true
			list, _ := os.ReadFile(m.path(filepath.Join(f[1], "cgroup.controllers")))
			v2 = append(v2, strings.Fields(string(list))...)
		case "cgroup":
			for opt := range strings.SplitSeq(f[3], ",") {
				if slices.Contains(wantControllers, opt) {
					v1 = append(v1, opt)
				}
			}
		}
	}
	var lacks []string
	for _, w := range wantControllers {
		if !slices.Contains(v1, w) && !slices.Contains(v2, w) {
			lacks = append(lacks, w)
		}
	}
	var found []string
	if len(v2) > 0 {
		found = append(found, "version 2 with "+strings.Join(v2, ", "))
	} else if unified {
		found = append(found, "version 2 without controllers")
	}
	if len(v1) > 0 {
		found = append(found, "version 1 with "+strings.Join(v1, ", "))
	}
	if len(found) == 0 {
		found = append(found, "none mounted")
	}
	c.Found = strings.Join(found, "; ")
	if c.OK = len(lacks) == 0; !c.OK {
		c.Found += "; lacks " + strings.Join(lacks, ", ")
		c.Fix = "sudo mount -t cgroup2 none /sys/fs/cgroup"
		if len(found) > 0 && (unified || len(v1) > 0) {
			c.Fix = "# boot with systemd.unified_cgroup_hierarchy=1 cgroup_enable=memory"
		}
	}
	return c
}

var wantControllers = []string{"cpu", "memory", "pids"}

func (m machine) path(p string) string { return filepath.Join(m.fsRoot, p) }

func freeMiB(path string) (int64, error) {
	free, err := diskfree.Bytes(path)
	return free >> 20, err
}

// errnoText is an error's cause without the path that the sentence around it
// names already.
func errnoText(err error) string {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}
