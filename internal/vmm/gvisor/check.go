package gvisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

const (
	accelSystrap = "systrap"
	// probeTimeout is the time that a probe guest has. It needs a fifth of a second.
	probeTimeout = 15 * time.Second
	probeMemMiB  = 64
)

// facts are what the driver knows of its sentry.
type facts struct {
	report vmm.Report
	// digest of the program and cpu of the host are a part of each snapshot's key.
	digest, cpu string
}

// versionLine matches the version of the module that the program was built from.
var versionLine = regexp.MustCompile(`^runsc version (\S{1,100})$`)

// Check implements vmm.Driver. Without the program the error is errdefs.Unavailable; where
// the probe guest does not run, it says why.
func (d *Driver) Check(ctx context.Context) (vmm.Report, error) {
	f, err := d.check(ctx)
	return f.report, err
}

// check asks the sentry for its version and runs a guest with it, once for each program
// that is at the path.
func (d *Driver) check(ctx context.Context) (facts, error) {
	info, err := os.Stat(d.cfg.Sentry)
	if err != nil || info.IsDir() {
		return facts{}, errdefs.Unavailable.Errorf("gVisor's sentry is not installed: there is no bin/sentry beside wrenn")
	}
	f, err := d.memo(info).Get(ctx, func() (facts, bool, error) {
		f, err := d.examine(ctx)
		return f, err == nil, err
	})
	// Errors that a person can act on say all that is needed.
	if err != nil && errdefs.ClassOf(err) == nil {
		return facts{}, fmt.Errorf("check gvisor: %w", err)
	}
	return f, err
}

// memo returns the memo of the program that is at the path now: an upgrade replaces it
// while the agent runs.
func (d *Driver) memo(now os.FileInfo) *launch.Memo[facts] {
	d.mu.Lock()
	defer d.mu.Unlock()
	if was := d.program; was == nil || !os.SameFile(was, now) || was.Size() != now.Size() || !was.ModTime().Equal(now.ModTime()) {
		d.program, d.checked = now, launch.NewMemo[facts]()
	}
	return d.checked
}

func (d *Driver) examine(ctx context.Context) (f facts, err error) {
	version, err := launch.Version(ctx, d.cfg.Sentry, "the sentry", versionLine)
	if err != nil {
		return f, err
	}
	program, err := os.ReadFile(d.cfg.Sentry)
	if err != nil {
		return f, err
	}
	sum := sha256.Sum256(program)
	f.digest = hex.EncodeToString(sum[:])
	cpu, err := kvm.HostCPU()
	if err != nil {
		return f, err
	}
	sum = sha256.Sum256([]byte(cpu))
	f.cpu = hex.EncodeToString(sum[:])
	f.report = vmm.Report{
		Version: strings.TrimPrefix(version, "v0.0.0-"), Accel: accelSystrap, CPU: vmm.HostCPU,
		Isolation: vmm.UserSpaceKernel, Speed: vmm.NearNative,
	}
	if err := d.probe(ctx, f); err != nil {
		return f, err
	}
	f.report.Why = "a probe guest ran"
	return f, nil
}

// probe runs a guest that consists of one tiny program.
func (d *Driver) probe(ctx context.Context, f facts) (err error) {
	dir, err := os.MkdirTemp(d.cfg.Dir, "wrenn-probe-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	spec := vmm.Spec{
		ID: strings.ToLower(filepath.Base(dir)), RunDir: dir, VCPUs: 1, MemMiB: probeMemMiB,
		Init: filepath.Join(dir, "init"), Console: filepath.Join(dir, "console.log"), UID: d.cfg.UID, GID: d.cfg.GID,
	}
	if err := os.WriteFile(spec.Init, image(says(probeSign)), 0o600); err != nil {
		return err
	}
	slow := errdefs.Unavailable.Errorf("gVisor's probe guest did not end within %s", probeTimeout)
	within, cancel := context.WithTimeoutCause(ctx, probeTimeout, slow)
	defer cancel()
	v, err := d.boot(within, spec, f)
	if err != nil {
		return fmt.Errorf("run a probe guest: %w", vmm.Cancelled(ctx, err))
	}
	select {
	case <-v.Done():
	case <-within.Done():
		return errors.Join(context.Cause(within), v.Kill(context.WithoutCancel(ctx)))
	}
	text, err := vmm.Tail(spec.Console, 1<<10)
	if err != nil || !strings.Contains(string(text), probeSign) || v.Exit().Code != 0 {
		return errors.Join(err, fmt.Errorf("run a probe guest: the sentry %s: %s", v.Exit(), v.Exit().Detail))
	}
	return nil
}

// validate says whether the driver can take a spec.
func validate(spec vmm.Spec) error {
	if n := len(spec.Root.Layers); n > 1 {
		return errdefs.InvalidArgument.Errorf("%d layers: this driver takes a root file system of one", n)
	}
	return spec.Validate(needs)
}
