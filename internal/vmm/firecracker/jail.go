package firecracker

import (
	"path/filepath"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// programs are the two that come with a release of Firecracker.
type programs struct {
	firecracker string
	jailer      string // empty to do without
	version     string
	// devices are those of /dev that the VMM opens; the jailer makes its own.
	devices []string
}

// place is where a VM's files are on the host.
type place struct{ runDir string }

// socketDir is the directory of the API's socket, the one thing that both the
// VMM and the agent see.
func (p place) socketDir() string { return filepath.Join(p.runDir, "api") }
func (p place) socket() string    { return filepath.Join(p.socketDir(), "sock") }

// jails is the directory that the VMM's root is made in. On the host it stays empty:
// only the VMM sees what is mounted on it.
func (p place) jails() string { return filepath.Join(p.runDir, "jail") }

// program renders a VMM's process. The files that it needs appear under fixed names
// in a root of its own, a file system in memory that ends with it; it can write only
// to what the guest may write to. With the jailer that root is where the jailer
// expects it. Without the jailer the launcher changes root and user itself.
//
// The launcher starts the process in its network namespace and its cgroup, because
// it frees the cgroup later, and handles both versions of cgroups. So the jailer's
// options for these are not used, nor those by which it would leave the session or
// become another process.
func program(bin programs, s vmm.Spec, from string) launch.Program {
	at := place{s.RunDir}
	args := []string{"--api-sock", apiPath + "/sock", "--level", "Error"}
	p := launch.ProgramOf(s)
	root := at.jails()
	if bin.jailer != "" {
		root = filepath.Join(at.jails(), filepath.Base(bin.firecracker), s.ID, "root")
		p.Args = append([]string{
			bin.jailer, "--id", s.ID, "--exec-file", bin.firecracker,
			"--uid", strconv.Itoa(s.UID), "--gid", strconv.Itoa(s.GID),
			"--chroot-base-dir", at.jails(),
			"--resource-limit", "no-file=" + strconv.Itoa(launch.MaxFiles), // the jailer would raise the limit
			"--",
		}, args...)
	} else {
		p.Args = append([]string{"/firecracker", "--id", s.ID}, args...)
		p.Root, p.UID, p.GID = root, s.UID, s.GID
	}

	p.Mounts = []launch.Mount{{Target: at.jails()}}
	add := func(source, name string, readOnly bool) {
		p.Mounts = append(p.Mounts, launch.Mount{
			Source: source, Target: filepath.Join(root, name), ReadOnly: readOnly, UID: s.UID, GID: s.GID,
		})
	}
	if bin.jailer == "" { // the jailer would do this itself
		p.Mounts = append(p.Mounts, launch.Mount{Source: bin.firecracker, Target: filepath.Join(root, "firecracker"), ReadOnly: true})
		for _, device := range bin.devices {
			add(device, device, false)
		}
	}
	// The socket's directory belongs to the VMM's user on disk too: the file system
	// of /run may have no idmapped mounts.
	p.Mounts = append(p.Mounts,
		launch.Mount{Source: at.socketDir(), Target: filepath.Join(root, apiPath)},
		// The directory of a snapshot is mounted over this empty one.
		launch.Mount{Target: filepath.Join(root, snapshotPath)})
	if from == "" {
		add(s.Kernel.Image, kernelPath, true)
		if s.Kernel.Initrd != "" {
			add(s.Kernel.Initrd, initrdPath, true)
		}
	} else {
		add(filepath.Join(from, snapfile.MemoryName), memoryPath, true)
		add(filepath.Join(from, snapfile.StateName), statePath, true)
	}
	for i, d := range s.Root.Disks() {
		add(d.Path, diskPath(i), d.ReadOnly)
	}
	return p
}
