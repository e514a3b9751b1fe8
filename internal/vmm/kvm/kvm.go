// Package kvm finds out whether KVM runs guests on this host.
package kvm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// probeTimeout is the time that a guest under KVM has to reach its user space.
	// It needs a fraction of it. KVM on which it needs more gains nothing over
	// emulation.
	probeTimeout = 3 * time.Second
	probeMemMiB  = 128
	// probePoll is the time between two reads of the probe guest's console.
	probePoll = 5 * time.Millisecond
)

// Probe tells whether KVM runs guests. A /dev/kvm that opens proves nothing: on some
// hosts no ordinary guest boots with it, or only slowly. The flags of the CPU prove
// nothing either: a host that is a guest itself may lack them. So KVM works if a
// probe guest has booted with it in time.
type Probe struct {
	// CacheFile keeps the result for as long as the host's kernel, its kind of
	// KVM, the VMM, and the guest's kernel and initrd stay the same. It does not keep
	// that a guest was too slow: the host may only have been busy. Each driver
	// has its own file, whose directory exists; empty to keep nothing.
	CacheFile string
	// Kernel and Initrd are booted as guestapi.Boot.Probe says.
	Kernel, Initrd string
	// UID and GID are what the VMM runs as. They are no root's, as those of
	// sandboxes, so that the result holds for sandboxes.
	UID, GID int
}

// Verdict says whether KVM works on this host.
type Verdict struct {
	Works bool
	// Why gives the reason in a sentence.
	Why string
	// Final is false while there is no probe guest to boot, because setup has not
	// made it yet.
	Final bool
}

// KVM looks for obstacles, then boots a probe guest with start, unless the result of
// an earlier one is kept. The verdict holds for the VMM of that name and version.
func (p Probe) KVM(ctx context.Context, name, version string, start func(context.Context, vmm.Spec) (vmm.VM, error)) (Verdict, error) {
	if obstacle := kvmObstacle(openKVM()); obstacle != "" {
		return Verdict{Why: obstacle, Final: true}, nil
	}
	if !isFile(p.Kernel) || !isFile(p.Initrd) {
		return Verdict{Why: "/dev/kvm opens, but there is no guest kernel and initrd yet to prove that it boots guests"}, nil
	}
	return p.probed(ctx, name, version, start)
}

// openKVM returns the error of opening /dev/kvm.
func openKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// kvmObstacle says in a sentence why KVM cannot work here; empty if it might.
func kvmObstacle(open error) string {
	switch {
	case errors.Is(open, os.ErrNotExist):
		return "there is no /dev/kvm"
	case open != nil:
		return fmt.Sprintf("/dev/kvm does not open: %v", errors.Unwrap(open))
	}
	return ""
}

// probeRecord is the result of a probe guest, as the cache file keeps it.
type probeRecord struct {
	HostKernel string `json:"host_kernel"`
	KVM        string `json:"kvm"`
	VMM        string `json:"vmm"`
	Version    string `json:"version"`
	// Guest is the digest of its kernel and initrd.
	Guest string `json:"guest"`

	Works bool   `json:"works"`
	Why   string `json:"why"`
	// SlowAt was set by earlier agents if the guest was not up in time.
	SlowAt time.Time `json:"slow_at,omitzero"`
}

// on returns what the result depends on.
func (r probeRecord) on() probeRecord {
	r.Works, r.Why, r.SlowAt = false, "", time.Time{}
	return r
}

// probed returns the result of an earlier probe guest, or boots one under KVM.
func (p Probe) probed(ctx context.Context, name, version string, start func(context.Context, vmm.Spec) (vmm.VM, error)) (Verdict, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return Verdict{}, err
	}
	guest, err := digestOf(p.Kernel, p.Initrd)
	if err != nil {
		return Verdict{}, fmt.Errorf("look at the probe guest: %w", err)
	}
	now := probeRecord{HostKernel: unix.ByteSliceToString(uts.Release[:]), KVM: Kind(), VMM: name, Version: version, Guest: guest}
	var known probeRecord
	if data, err := os.ReadFile(p.CacheFile); err == nil && json.Unmarshal(data, &known) == nil &&
		known.on() == now && known.SlowAt.IsZero() {
		return Verdict{Works: known.Works, Why: known.Why, Final: true}, nil
	}
	within, cancel := context.WithTimeoutCause(ctx, probeTimeout, errSlow)
	defer cancel()
	took, err := p.Boot(within, start)
	if ctx.Err() != nil {
		return Verdict{}, context.Cause(ctx)
	}
	slow := errors.Is(err, errSlow)
	switch {
	case slow:
		now.Why = fmt.Sprintf("/dev/kvm opens but a probe guest does not come up with it: %v; each start of the agent tries again", err)
	case err != nil:
		now.Why = fmt.Sprintf("/dev/kvm opens but a probe guest does not come up with it: %v", err)
	default:
		now.Works, now.Why = true, fmt.Sprintf("a probe guest came up under KVM in %s", took.Round(time.Millisecond))
	}
	if p.CacheFile != "" && !slow {
		if err := atomicfile.WriteJSON(p.CacheFile, now); err != nil {
			return Verdict{}, err
		}
	}
	return Verdict{Works: now.Works, Why: now.Why, Final: true}, nil
}

// digestOf is one digest of the contents of files; "" as a path means no file.
func digestOf(paths ...string) (string, error) {
	all := sha256.New()
	for _, path := range paths {
		one := sha256.New()
		if path != "" {
			f, err := os.Open(path)
			if err != nil {
				return "", err
			}
			_, err = io.Copy(one, f)
			if err := errors.Join(err, f.Close()); err != nil {
				return "", err
			}
		}
		all.Write(one.Sum(nil))
	}
	return hex.EncodeToString(all.Sum(nil)), nil
}

// Kind names the modules that KVM consists of on this host, such as
// "kvm kvm_intel" or "kvm kvm_pvm". Memory that one kind wrote is not another's.
func Kind() string {
	paths, _ := filepath.Glob("/sys/module/kvm*") // a pattern that is right has no error
	var names []string
	for _, path := range paths {
		names = append(names, filepath.Base(path))
	}
	return strings.Join(names, " ")
}

// Isolation is what a guest under this host's KVM is isolated by.
func Isolation() vmm.Isolation {
	if strings.Contains(Kind(), "kvm_pvm") {
		return vmm.Paravirtual
	}
	return vmm.Hardware
}

// errSlow is the error of a probe guest that printed no sign in time.
var errSlow = fmt.Errorf("nothing after %s", probeTimeout)

// Boot boots the probe guest and waits, within ctx, for its sign of life.
func (p Probe) Boot(ctx context.Context, start func(context.Context, vmm.Spec) (vmm.VM, error)) (took time.Duration, err error) {
	dir, err := os.MkdirTemp("", "wrenn-probe-")
	if err != nil {
		return 0, err
	}
	var steps undo.Stack
	defer func() { err = errors.Join(err, steps.Unwind(ctx)) }()
	steps.Push("remove probe directory", func(context.Context) error { return os.RemoveAll(dir) })

	began := time.Now()
	console := filepath.Join(dir, "console.log")
	v, err := start(ctx, vmm.Spec{
		ID: "probe", RunDir: dir, VCPUs: 1, MemMiB: probeMemMiB,
		Kernel: vmm.Kernel{Image: p.Kernel, Initrd: p.Initrd, Args: "quiet"}, Boot: guestapi.Boot{Probe: true},
		Console: console, UID: p.UID, GID: p.GID,
	})
	if err != nil {
		return 0, err
	}
	steps.Push("kill probe guest", v.Kill)
	tick := time.NewTicker(probePoll)
	defer tick.Stop()
	for ended := false; ; {
		text, err := vmm.Tail(console, 64<<10)
		if err != nil {
			return 0, err
		}
		if bytes.Contains(text, []byte(guestapi.ProbeSign)) {
			return time.Since(began), nil
		}
		if ended {
			return 0, fmt.Errorf("it %s", v.Exit())
		}
		select {
		case <-tick.C:
		case <-v.Done():
			ended = true // its last words may still be unread
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// HostCPU is what guests under KVM can see of this host's first CPU, and the kind
// of KVM that shows it to them.
func HostCPU() (string, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("look at the host's CPU: %w", err)
	}
	seen := []string{Kind()}
	for line := range strings.Lines(string(info)) {
		name, _, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags":
			seen = append(seen, strings.TrimSpace(line))
		case "":
			return strings.Join(seen, "\n"), nil
		}
	}
	return strings.Join(seen, "\n"), nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && filepath.IsAbs(path) && !info.IsDir()
}
