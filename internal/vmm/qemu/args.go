package qemu

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// The descriptors that QEMU inherits.
const (
	qmpFD   = 3 // the listening QMP socket
	stateFD = 4 // the device state to restore
)

// machine is all that the argument vector depends on.
type machine struct {
	binary  string
	version string
	accel   string // kvm or tcg
	spec    vmm.Spec
	// memory is the file of a snapshot to restore, empty to boot.
	memory string
}

// argv renders QEMU's argument vector. The order and the PCI addresses of the
// devices are part of a snapshot's format.
func argv(m machine) []string {
	s := m.spec
	// What TCG keeps of translated code, in MiB, has to fit the VMM's memory
	// limit beside the guest: by itself it would take 1 GiB in the end.
	accel, cpu := "tcg,thread=multi,tb-size=64", "qemu64" // boots faster than max
	if m.accel == "kvm" {
		accel, cpu = "kvm", "host"
	}
	// The filter comes before the change of user, which it must let pass.
	// After that there is no privilege left to be gained with those calls.
	elevate := "deny"
	if s.UID != 0 || s.GID != 0 {
		elevate = "allow"
	}
	// A booted VM's memory is a file in memory, of which a snapshot is a copy.
	// Restored VMs share the pages of one snapshot's file until they write.
	ram := "memory-backend-memfd,share=on"
	if m.memory != "" {
		ram = "memory-backend-file,share=off,mem-path=" + value(m.memory)
	}
	// The spec's own command line comes last and may overrule this. Time that
	// passed while a guest did not run is no lockup, and the clock of an
	// emulated CPU is the host's: watching over either wakes the guest for
	// nothing, as do the averages of who waits for what. What guards against
	// the speculation of a CPU guards nothing where code is translated.
	own := "console=ttyS0 reboot=k panic=-1 nowatchdog"
	if m.accel == "tcg" {
		own += " tsc=nowatchdog psi=0 mitigations=off"
	}
	args := []string{
		m.binary,
		"-name", "wrenn-" + s.ID,
		"-no-user-config", "-nodefaults", "-display", "none",
		"-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,suppress-vmdesc=on,memory-backend=ram",
		"-accel", accel,
		"-cpu", cpu,
		"-smp", strconv.Itoa(s.VCPUs),
		"-m", fmt.Sprintf("%dM", s.MemMiB),
		"-object", fmt.Sprintf("%s,id=ram,size=%dM", ram, s.MemMiB),
		// A snapshot is device state alone, without a migration's preamble.
		"-global", "migration.send-configuration=off",
		// Nobody has to learn where a restored guest is now: its link is new.
		"-global", "migration.announce-rounds=0",
		// Once everything is open, QEMU lives in an empty directory as
		// somebody who may do nothing.
		"-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny,elevateprivileges=" + elevate,
		// A guest that powers off, reboots or panics ends its VMM.
		"-no-reboot",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", qmpFD),
		"-mon", "chardev=qmp,mode=control",
		// The guest's console is standard output, the VMM's own words are
		// standard error. Nothing is to be read.
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
	}
	args = append(args, confine(m)...)
	if m.memory != "" {
		args = append(args, "-S", "-incoming", fmt.Sprintf("fd:%d", stateFD))
	} else {
		args = append(args, "-kernel", s.Kernel, "-append", strings.TrimSpace(own+" "+s.Cmdline))
		if s.Initrd != "" {
			args = append(args, "-initrd", s.Initrd)
		}
	}
	args = append(args,
		"-object", "rng-builtin,id=rng",
		"-device", "virtio-rng-pci,rng=rng,addr=0x2")
	if n := s.NIC; n != nil {
		args = append(args,
			"-netdev", "tap,id=net,script=no,downscript=no,vhost=off,ifname="+n.Tap,
			"-device", "virtio-net-pci,netdev=net,romfile=,guest_announce=off,addr=0x3,mac="+n.MAC)
	}
	file := "driver=raw,file.driver=file,file.filename="
	if s.Limits.DiskBytes > 0 || s.Limits.DiskOps > 0 {
		args = append(args, "-object",
			fmt.Sprintf("throttle-group,id=disks,x-bps-total=%d,x-iops-total=%d", s.Limits.DiskBytes, s.Limits.DiskOps))
		file = "driver=throttle,throttle-group=disks,file.driver=raw,file.file.driver=file,file.file.filename="
	}
	for i, d := range s.Disks {
		// A write that the host does not take stops the VM, and is tried again
		// when it goes on: a guest that is told of an error loses data.
		mode := "read-only=off,discard=unmap"
		if d.ReadOnly {
			mode = "read-only=on"
		}
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
	case drop && since(m.version, 9, 1):
		return []string{"-run-with", "chroot=" + value(root) + ",user=" + user}
	case since(m.version, 8, 1):
		args = []string{"-run-with", "chroot=" + value(root)}
	default:
		args = []string{"-chroot", root}
	}
	if drop {
		args = append(args, "-runas", user)
	}
	return args
}

// since reports whether a version is the given one or later.
func since(version string, major, minor int) bool {
	var x, y int
	fmt.Sscanf(version, "%d.%d", &x, &y)
	return x > major || x == major && y >= minor
}

// value quotes a value of QEMU's key=value lists.
func value(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func qmpSocket(runDir string) string { return filepath.Join(runDir, "qmp.sock") }
func jail(runDir string) string      { return filepath.Join(runDir, "empty") }
func vmmLog(runDir string) string    { return filepath.Join(runDir, launch.LogName) }
