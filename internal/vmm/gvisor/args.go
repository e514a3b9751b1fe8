package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// initDir is where the guest finds the image of its init, below its root. envd
	// covers /run when it has started.
	initDir = "/run/wrenn"
	// minCPUs: with one CPU systrap's fast way for system calls is off. The cgroup's
	// quota bounds what a guest gets, not the number of CPUs that it sees.
	minCPUs = 2
	// product is what the guest reads as the machine's name; else it is the host's.
	product = "Wrenn"
)

// machine is a sentry and what it is started with.
type machine struct {
	spec vmm.Spec
	// diskBytes bounds the files that the guest writes; 0 for a guest without overlay,
	// which writes to memory.
	diskBytes int64
}

// layer is the read-only layer of the machine's root, empty for none. The sentry can
// lay the overlay over one alone.
func (m machine) layer() string {
	if len(m.spec.Root.Layers) == 0 {
		return ""
	}
	return m.spec.Root.Layers[0]
}

// The descriptors of a sentry: the first ones are always there.
const (
	fdSync = 3 + iota
	fdControl
	fdSpec
	fdStdin
	fdInit
	fdBase    // with a root only
	fdOverlay // with an overlay only
)

// argv is the command line of the machine's sentry.
func argv(m machine, binary string) []string {
	args := []string{
		binary,
		"--platform=systrap",
		"--network=sandbox",
		"--net-raw=true", // what passes its link is the host's to decide
		"--allow-connected-on-save=true",
		"--in-sandbox-cgroup=v2",
		"--directfs=false", // it opens no file of the host
		"--overlay2=none",
		"--restore-spec-validation=ignore", // the manifest of a snapshot is compared
		"boot",
		"--bundle=/",
		"--apply-caps",
		"--setup-root",
		"--product-name=" + product,
		"--cpu-num=" + strconv.Itoa(max(minCPUs, m.spec.VCPUs)),
		"--total-memory=" + strconv.FormatInt(int64(m.spec.MemMiB)<<20, 10),
		"--total-host-memory=" + strconv.FormatInt(int64(m.spec.MemMiB)<<20, 10),
		fmt.Sprintf("--start-sync-fd=%d", fdSync),
		fmt.Sprintf("--controller-fd=%d", fdControl),
		fmt.Sprintf("--spec-fd=%d", fdSpec),
	}
	images, confs, last := []int{fdInit}, []string{"erofs:memory"}, fdInit
	if m.layer() != "" {
		images, confs, last = []int{fdBase, fdInit}, []string{"erofs:memory", "erofs:none"}, fdBase
	}
	if m.spec.Root.Overlay != "" {
		confs[0], last = fmt.Sprintf("erofs:anon:size=%d", m.diskBytes), last+1
		args = append(args, fmt.Sprintf("--gofer-filestore-fds=%d", last))
	}
	for _, fd := range images {
		args = append(args, fmt.Sprintf("--io-fds=%d", fd))
	}
	return append(args,
		"--gofer-mount-confs="+strings.Join(confs, ","),
		// The guest's output goes where the sentry's standard output does.
		fmt.Sprintf("--stdio-fds=%d,%d,%d", fdStdin, last+1, last+2),
		m.spec.ID)
}

// stdouts is how many descriptors of the standard output argv counts on.
const stdouts = 2

// spec is the part of an OCI runtime specification that the sentry needs.
type (
	ociSpec struct {
		Version  string     `json:"ociVersion"`
		Process  ociProcess `json:"process"`
		Root     ociRoot    `json:"root"`
		Hostname string     `json:"hostname,omitempty"`
		Mounts   []ociMount `json:"mounts"`
		Linux    struct{}   `json:"linux"`
	}
	ociProcess struct {
		User         struct{}            `json:"user"`
		Args         []string            `json:"args"`
		Env          []string            `json:"env"`
		Cwd          string              `json:"cwd"`
		Capabilities map[string][]string `json:"capabilities"`
	}
	ociRoot struct {
		Path string `json:"path"`
	}
	ociMount struct {
		Destination string   `json:"destination"`
		Type        string   `json:"type"`
		Source      string   `json:"source"`
		Options     []string `json:"options,omitempty"`
	}
)

// oci describes the guest to its sentry. The boot facts are the arguments of init.
func oci(m machine) ociSpec {
	s := ociSpec{
		Version: "1.1.0",
		Process: ociProcess{
			Cwd: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Capabilities: map[string][]string{},
		},
		Root:     ociRoot{Path: "/"},
		Hostname: m.spec.Boot.Hostname,
		Mounts:   []ociMount{{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup"}},
	}
	dir := "/"
	if m.layer() != "" {
		dir = initDir
		s.Mounts = append(s.Mounts, ociMount{Destination: initDir, Type: "erofs", Source: "init", Options: []string{"ro"}})
	}
	s.Process.Args = append([]string{path.Join(dir, "init")}, strings.Fields(guestapi.Cmdline(m.spec.Boot, guestapi.Disks{}))...)
	for _, set := range []string{"bounding", "effective", "permitted"} {
		s.Process.Capabilities[set] = capabilities
	}
	return s
}

// capabilities are those of a guest's root, in the guest.
var capabilities = func() []string {
	var all []string
	for _, name := range strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
		LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
		SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE
		AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ`) {
		all = append(all, "CAP_"+name)
	}
	return all
}()

// specFile returns the guest's description in a file without a name.
func specFile(m machine) (*os.File, error) {
	data, err := json.Marshal(oci(m))
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("spec", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "spec")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
