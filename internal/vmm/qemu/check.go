package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// probeTimeout is what a guest under KVM gets to reach its userland; it
	// needs a fraction of it.
	probeTimeout = 10 * time.Second
	probeMark    = "wrenn-probe-ok"
	probeMemMiB  = 128
	// probePoll is how often the probe guest's console is read.
	probePoll = 5 * time.Millisecond
)

// Check implements vmm.Driver. Without QEMU it is errdefs.Unavailable. A
// /dev/kvm that opens proves nothing: there are hosts whose kernel offers one
// on which no ordinary guest ever boots. So KVM is used when the CPU has the
// extension and a guest of ours has come up with it.
func (d *Driver) Check(ctx context.Context) (vmm.Report, error) {
	select {
	case d.checking <- struct{}{}:
	case <-ctx.Done():
		return vmm.Report{}, fmt.Errorf("check qemu: %w", context.Cause(ctx))
	}
	defer func() { <-d.checking }()
	if d.checked != nil {
		return *d.checked, nil
	}
	version, err := d.version(ctx)
	if err != nil {
		return vmm.Report{}, err
	}
	report := vmm.Report{Version: version, Accel: "tcg"}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return vmm.Report{}, fmt.Errorf("check qemu: %w", err)
	}
	if obstacle := kvmObstacle(openKVM(), string(cpuinfo)); obstacle != "" {
		report.Why = obstacle
	} else if !there(d.cfg.ProbeKernel) || !there(d.cfg.ProbeInitrd) {
		// Not remembered: setup may be under way.
		report.Why = "/dev/kvm opens, but there is no guest kernel and initrd yet to prove that it boots guests"
		return report, nil
	} else if report.Accel, report.Why, err = d.probed(ctx, version); err != nil {
		return vmm.Report{}, err
	}
	d.checked = &report
	return report, nil
}

// openKVM tells why /dev/kvm does not open, if it does not.
func openKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

var virtFlag = regexp.MustCompile(`(?m)^flags\s*:.*\s(vmx|svm)(\s|$)`)

// kvmObstacle says in a sentence why KVM cannot work here, or nothing.
func kvmObstacle(open error, cpuinfo string) string {
	switch {
	case errors.Is(open, os.ErrNotExist):
		return "there is no /dev/kvm"
	case open != nil:
		return fmt.Sprintf("/dev/kvm does not open: %v", errors.Unwrap(open))
	case !virtFlag.MatchString(cpuinfo):
		return "/dev/kvm opens but the CPU shows neither vmx nor svm"
	}
	return ""
}

// verdict is what a probe guest has shown, as the cache file keeps it.
type verdict struct {
	HostKernel string `json:"host_kernel"`
	Version    string `json:"qemu_version"`
	Accel      string `json:"accel"`
	Why        string `json:"why"`
}

// probed boots the probe guest under KVM, or remembers what it showed under
// the same host kernel and QEMU.
func (d *Driver) probed(ctx context.Context, version string) (accel, why string, err error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", "", fmt.Errorf("check qemu: %w", err)
	}
	now := verdict{HostKernel: unix.ByteSliceToString(uts.Release[:]), Version: version}
	var known verdict
	if data, err := os.ReadFile(d.cfg.CacheFile); err == nil && json.Unmarshal(data, &known) == nil {
		if known.HostKernel == now.HostKernel && known.Version == now.Version {
			return known.Accel, known.Why, nil
		}
	}
	took, err := d.probe(ctx, vmm.Report{Version: version, Accel: "kvm"})
	if ctx.Err() != nil {
		return "", "", fmt.Errorf("check qemu: %w", context.Cause(ctx))
	}
	if err != nil {
		now.Accel, now.Why = "tcg", fmt.Sprintf("/dev/kvm opens but a probe guest does not come up with it: %v", err)
	} else {
		now.Accel, now.Why = "kvm", fmt.Sprintf("a probe guest came up under KVM in %s", took.Round(time.Millisecond))
	}
	if d.cfg.CacheFile != "" {
		if err := save(d.cfg.CacheFile, now); err != nil {
			return "", "", fmt.Errorf("check qemu: %w", err)
		}
	}
	return now.Accel, now.Why, nil
}

// probe boots the probe guest and waits for its sign of life.
func (d *Driver) probe(ctx context.Context, report vmm.Report) (took time.Duration, err error) {
	dir, err := os.MkdirTemp("", "wrenn-probe-")
	if err != nil {
		return 0, err
	}
	var steps undo.Stack
	defer func() { err = errors.Join(err, steps.Unwind(ctx)) }()
	steps.Push("remove probe directory", func(context.Context) error { return os.RemoveAll(dir) })

	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("nothing after %s", probeTimeout))
	defer cancel()
	began := time.Now()
	console := filepath.Join(dir, "console.log")
	v, err := d.launch(ctx, vmm.Spec{
		ID: "probe", RunDir: dir, VCPUs: 1, MemMiB: probeMemMiB,
		Kernel: d.cfg.ProbeKernel, Initrd: d.cfg.ProbeInitrd, Cmdline: "quiet wrenn.probe=1",
		Console: console,
	}, report, nil)
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
		if bytes.Contains(text, []byte(probeMark)) {
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

func there(path string) bool {
	_, err := os.Stat(path)
	return path != "" && err == nil
}

// save replaces the file at once, so that nobody ever reads half of it.
func save(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func (d *Driver) binary() (string, error) {
	path, err := exec.LookPath(d.cfg.Binary)
	if err != nil {
		return "", errdefs.Unavailable.Errorf("qemu is not installed")
	}
	return filepath.Abs(path)
}

var versionLine = regexp.MustCompile(`version (\d+\.\d+\.\d+)`)

func (d *Driver) version(ctx context.Context) (string, error) {
	binary, err := d.binary()
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("check qemu: %w", context.Cause(ctx))
	}
	if err != nil {
		return "", fmt.Errorf("check qemu: %w", err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	match := versionLine.FindStringSubmatch(first)
	if match == nil {
		return "", fmt.Errorf("check qemu: no version in %q", first)
	}
	return match[1], nil
}
