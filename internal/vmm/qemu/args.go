package qemu

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// What runs the guest's code, as Report.Accel names it.
const (
	accelKVM = "kvm"
	accelTCG = "tcg"
)

// The descriptors that QEMU inherits.
const (
	qmpFD   = 3 // the listening QMP socket
	stateFD = 4 // the device state to restore
)

// machine holds all that the argument vector depends on.
type machine struct {
	binary  string
	version string
	accel   string
	cpu     string // QEMU's -cpu
	spec    vmm.Spec
	// memory is the memory file of a snapshot to restore; empty to boot.
	memory string
}

// argv renders QEMU's argument vector. The order and the PCI addresses of the
// devices are part of a snapshot's format.
func argv(m machine) []string {
	return slices.Concat(
		[]string{m.binary, "-name", "wrenn-" + m.spec.ID},
		board(m), control(), sandboxed(m), source(m),
		[]string{"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,addr=0x2"},
		card(m.spec.Link), disks(m.spec),
	)
}

// board renders CPU, memory and chipset.
func board(m machine) []string {
	// By itself TCG keeps up to 1 GiB of translated code. 64 MiB fit into the
	// VMM's memory limit beside the guest.
	accel := "tcg,thread=multi,tb-size=64"
	if m.accel == accelKVM {
		accel = "kvm"
	}
	// The memory of a booted VM is a file in memory, and a snapshot a copy of
	// that file. Restored VMs share the pages of one snapshot's file until they
	// write to them.
	ram := "memory-backend-memfd,share=on"
	if m.memory != "" {
		ram = "memory-backend-file,share=off,mem-path=" + value(m.memory)
	}
	return []string{
		"-no-user-config", "-nodefaults", "-display", "none",
		"-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,suppress-vmdesc=on,memory-backend=ram",
		"-accel", accel,
		"-cpu", m.cpu,
		"-smp", strconv.Itoa(m.spec.VCPUs),
		"-m", fmt.Sprintf("%dM", m.spec.MemMiB),
		"-object", fmt.Sprintf("%s,id=ram,size=%dM", ram, m.spec.MemMiB),
		// A snapshot is device state alone, without a migration's preamble.
		"-global", "migration.send-configuration=off",
		// No switch has to learn where a restored guest is: its link is new.
		"-global", "migration.announce-rounds=0",
		// A guest that powers off, reboots or panics ends its VMM.
		"-no-reboot",
	}
}

// control renders the control socket and the console. The guest's console is
// standard output, the VMM's own messages are standard error; there is no input.
func control() []string {
	return []string{
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", qmpFD),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
	}
}

// sandboxed renders what QEMU gives up once it has opened everything: it runs on
// in an empty directory, as a user without rights.
func sandboxed(m machine) []string {
	// QEMU's filter of system calls comes before its change of user, which the
	// filter must allow. Afterwards these calls gain no privilege any more.
	elevate := "deny"
	if m.spec.UID != 0 || m.spec.GID != 0 {
		elevate = "allow"
	}
	return append([]string{
		"-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny,elevateprivileges=" + elevate,
	}, confine(m)...)
}

// source renders what the machine starts from: a kernel, or a snapshot's devices.
func source(m machine) []string {
	if m.memory != "" {
		return []string{"-S", "-incoming", fmt.Sprintf("fd:%d", stateFD)}
	}
	// A pause of the guest is no lockup (nowatchdog). The clock of an emulated
	// CPU is the host's, and its watchdog would only wake the guest, as the
	// averages of pressure do. Mitigations guard against the speculation of a
	// CPU, which translated code does not have.
	words := "console=ttyS0 reboot=k panic=-1 nowatchdog"
	if m.accel == accelTCG {
		words += " tsc=nowatchdog psi=0 mitigations=off"
	}
	args := []string{"-kernel", m.spec.Kernel.Image, "-append", m.spec.Cmdline(words)}
	if m.spec.Kernel.Initrd != "" {
		args = append(args, "-initrd", m.spec.Kernel.Initrd)
	}
	return args
}

// card renders the network card.
func card(l *vmm.Link) []string {
	if l == nil {
		return nil
	}
	return []string{
		"-netdev", "tap,id=net,script=no,downscript=no,vhost=off,ifname=" + l.Name,
		"-device", "virtio-net-pci,netdev=net,romfile=,guest_announce=off,addr=0x3,mac=" + l.MAC,
	}
}

// disks renders the layers of the root file system.
func disks(s vmm.Spec) (args []string) {
	file := "driver=raw,file.driver=file,file.filename="
	if s.Limits.DiskBytes > 0 || s.Limits.DiskOps > 0 {
		args = append(args, "-object",
			fmt.Sprintf("throttle-group,id=disks,x-bps-total=%d,x-iops-total=%d", s.Limits.DiskBytes, s.Limits.DiskOps))
		file = "driver=throttle,throttle-group=disks,file.driver=raw,file.file.driver=file,file.file.filename="
	}
	for i, d := range s.Root.Disks() {
		mode := "read-only=off,discard=unmap"
		if d.ReadOnly {
			mode = "read-only=on"
		}
		// werror=stop: a write that the host does not take stops the VM, and is
		// tried again when the VM goes on. A guest that is told of an error loses
		// data.
		args = append(args,
			"-blockdev", fmt.Sprintf("node-name=disk%d,%s,%s%s", i, mode, file, value(d.Path)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,werror=stop,addr=0x%x", i, 0x10+i))
	}
	return args
}

// confine renders the change of root directory and user, whose options were
// renamed in 8.1 and 9.1.
func confine(m machine) []string {
	root, user := jail(m.spec.RunDir), fmt.Sprintf("%d:%d", m.spec.UID, m.spec.GID)
	drop := m.spec.UID != 0 || m.spec.GID != 0
	var args []string
	switch {
	case drop && launch.AtLeast(m.version, 9, 1):
		return []string{"-run-with", "chroot=" + value(root) + ",user=" + user}
	case launch.AtLeast(m.version, 8, 1):
		args = []string{"-run-with", "chroot=" + value(root)}
	default:
		args = []string{"-chroot", root}
	}
	if drop {
		args = append(args, "-runas", user)
	}
	return args
}

// value quotes a value of QEMU's key=value lists.
func value(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func qmpSocket(runDir string) string { return filepath.Join(runDir, "qmp.sock") }
func jail(runDir string) string      { return filepath.Join(runDir, "empty") }
