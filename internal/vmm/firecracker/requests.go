package firecracker

import (
	"fmt"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

// The names of the files inside the VMM's root. They are the same for every VM,
// for a snapshot's state has them in it.
const (
	kernelPath   = "/kernel"
	initrdPath   = "/initrd"
	memoryPath   = "/memory" // of the snapshot that is restored
	statePath    = "/state"
	snapshotPath = "/snapshot" // where the directory of a snapshot appears
	apiPath      = "/api"      // the directory of the socket
)

func diskPath(i int) string { return fmt.Sprintf("/disk%d", i) }

// nicID is the API's name for the one network interface.
const nicID = "eth0"

type machineConfig struct {
	VCPUs  int `json:"vcpu_count"`
	MemMiB int `json:"mem_size_mib"`
}

type bootSource struct {
	Kernel  string `json:"kernel_image_path"`
	Initrd  string `json:"initrd_path,omitempty"`
	Cmdline string `json:"boot_args"`
}

type drive struct {
	ID       string `json:"drive_id"`
	Path     string `json:"path_on_host"`
	Root     bool   `json:"is_root_device"`
	ReadOnly bool   `json:"is_read_only"`
	// Limiter bounds what passes; a snapshot has it, too.
	Limiter *limiter `json:"rate_limiter,omitempty"`
}

type limiter struct {
	Bytes *bucket `json:"bandwidth,omitempty"`
	Ops   *bucket `json:"ops,omitempty"`
}

// bucket is full of Size tokens, and is filled again in RefillMS.
type bucket struct {
	Size     int64 `json:"size"`
	RefillMS int64 `json:"refill_time"`
}

// limiterOf is the limiter of each disk, or nil.
func limiterOf(l vmm.Limits) *limiter {
	perSecond := func(n int64) *bucket {
		if n == 0 {
			return nil
		}
		return &bucket{Size: n, RefillMS: 1000}
	}
	if l.DiskBytes == 0 && l.DiskOps == 0 {
		return nil
	}
	return &limiter{perSecond(l.DiskBytes), perSecond(l.DiskOps)}
}

type networkInterface struct {
	ID  string `json:"iface_id"`
	Tap string `json:"host_dev_name"`
	MAC string `json:"guest_mac"`
}

type entropy struct{}

type action struct {
	Type string `json:"action_type"`
}

type vmState struct {
	State string `json:"state"`
}

type snapshotCreate struct {
	Type   string `json:"snapshot_type"`
	State  string `json:"snapshot_path"`
	Memory string `json:"mem_file_path"`
}

type snapshotLoad struct {
	State     string            `json:"snapshot_path"`
	Memory    memoryBackend     `json:"mem_backend"`
	Resume    bool              `json:"resume_vm"`
	Overrides []networkOverride `json:"network_overrides,omitempty"`
}

type memoryBackend struct {
	Type string `json:"backend_type"`
	Path string `json:"backend_path"`
}

type networkOverride struct {
	ID  string `json:"iface_id"`
	Tap string `json:"host_dev_name"`
}

// configure renders the calls that describe a VM to a fresh process. Their order
// is that of the devices, and with it part of a snapshot's format.
func configure(s vmm.Spec) []request {
	put := func(path string, body any) request { return request{http.MethodPut, path, body} }
	boot := bootSource{Kernel: kernelPath, Cmdline: s.Cmdline(machineWords)}
	if s.Kernel.Initrd != "" {
		boot.Initrd = initrdPath
	}
	calls := []request{
		put("/machine-config", machineConfig{VCPUs: s.VCPUs, MemMiB: s.MemMiB}),
		put("/boot-source", boot),
	}
	for i, d := range s.Root.Disks() {
		// None is a root device: that would add to the command line. What the
		// guest flushes goes as far as the host's page cache, because a VM does
		// not outlive its host. The agent flushes the disks that it keeps.
		calls = append(calls, put("/drives/"+d.Name, drive{ID: d.Name, Path: diskPath(i), ReadOnly: d.ReadOnly, Limiter: limiterOf(s.Limits)}))
	}
	if l := s.Link; l != nil {
		calls = append(calls, put("/network-interfaces/"+nicID, networkInterface{ID: nicID, Tap: l.Name, MAC: l.MAC}))
	}
	return append(calls, put("/entropy", entropy{}))
}

// start renders the call that boots a configured VM.
func start() request {
	return request{http.MethodPut, "/actions", action{"InstanceStart"}}
}

// load renders the call that makes a fresh process the VM of a snapshot, paused.
// Its disks are where they were, by name; its tap may be another.
func load(s vmm.Spec, version string) request {
	body := snapshotLoad{
		State:  statePath,
		Memory: memoryBackend{Type: "File", Path: memoryPath},
	}
	if s.Link != nil && launch.AtLeast(version, overridesMajor, overridesMinor) {
		body.Overrides = []networkOverride{{ID: nicID, Tap: s.Link.Name}}
	}
	return request{http.MethodPut, "/snapshot/load", body}
}

// create renders the call that writes a paused VM.
func create() request {
	return request{http.MethodPut, "/snapshot/create", snapshotCreate{
		Type: "Full", State: snapshotPath + "/" + snapfile.StateName, Memory: snapshotPath + "/" + snapfile.MemoryName,
	}}
}

// turn renders the call that stops the vCPUs or lets them run.
func turn(state string) request {
	return request{http.MethodPatch, "/vm", vmState{state}}
}

// machineWords are what this machine needs on a kernel's command line. A guest that
// restarts or panics ends its VMM through the reset of the keyboard controller, the
// only way that this machine has. It has no PCI bus and no keyboard to look for.
const machineWords = "console=ttyS0 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
