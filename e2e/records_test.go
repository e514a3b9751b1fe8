package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// cli runs wrenn against the agent and returns what it prints.
func (a *agent) cli(t testing.TB, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(a.bin, "wrenn"), append([]string{"--host", a.url}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestStandingVMMOutlivesTheAgent: a VMM that stands still while an agent starts,
// for longer than that waits, is kept, and goes on.
func TestStandingVMMOutlivesTheAgent(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	b, well := a.create(t, nil), a.create(t, nil)
	b.count()
	if n := b.next(); n != 1 {
		t.Fatalf("the counter is at %d", n)
	}
	pid := b.vmmPID()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stood := time.Now()
	defer syscall.Kill(pid, syscall.SIGCONT)
	if err := b.pause(); err == nil {
		t.Error("a VM that stands still was paused")
	}
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := a.start("--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	t.Logf("the agent served after %s", time.Since(began).Round(time.Millisecond))
	if s := b.info(); s == nil || s.Status != "running" || s.Reason != "unreachable" || s.Detail == "" {
		t.Fatalf("it is %v", s)
	}
	if s := well.info(); s.Status != "running" || s.Reason != "" {
		t.Errorf("the other is %v", s)
	}
	well.sh("true")
	wantCode(t, b.pause(), connect.CodeUnavailable, "does not answer")
	_, err := b.exec("true")
	wantCode(t, err, connect.CodeUnavailable, "does not answer")
	time.Sleep(time.Until(stood.Add(16 * time.Second)))
	if b.vmmPID() != pid {
		t.Fatal("its VMM was killed")
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if out, err := a.cli(t, "recover", b.id); err != nil {
		t.Fatalf("recover: %v: %s", err, out)
	}
	if s := b.info(); s.Status != "running" || s.Reason != "" {
		t.Errorf("it is %v", s)
	}
	if n := b.next(); n != 2 {
		t.Errorf("the counter is at %d, want 2", n)
	}
}

// TestGuestsOutOfReachOutliveTheAgent: a guest that took its network down and a
// route on the host that leads elsewhere end nothing at an agent's start. That the
// fault is the host's is said once, and what can be reached again goes on.
func TestGuestsOutOfReachOutliveTheAgent(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "--on-shutdown=leave")
	down, astray := a.create(t, nil), a.create(t, nil)
	astray.count()
	if n := astray.next(); n != 1 {
		t.Fatalf("the counter is at %d", n)
	}
	pids := []int{down.vmmPID(), astray.vmmPID()}
	down.exec("sh", "-c", "(sleep 0.2; ip link set eth0 down) >/dev/null 2>&1 &")
	time.Sleep(500 * time.Millisecond)
	addr, err := netip.ParseAddr(astray.info().HostIp)
	if err != nil {
		t.Fatal(err)
	}
	// A rule: an agent refuses to start where a route leads elsewhere.
	rule := netlink.NewRule()
	rule.Dst = &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(32, 32)}
	rule.Type, rule.Priority = unix.FR_ACT_BLACKHOLE, 99
	if err := netlink.RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	mended := false
	defer func() {
		if !mended {
			_ = netlink.RuleDel(rule)
		}
	}()
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	for i, b := range []*sandbox{down, astray} {
		if s := b.info(); s == nil || s.Status != "running" || s.Reason != "unreachable" || b.vmmPID() != pids[i] {
			t.Errorf("it is %v", s)
		}
	}
	resp, err := http.Get(a.url + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(text), "none of the 2 guests can be reached") {
		t.Errorf("readyz: %s %s", resp.Status, text)
	}
	if err := netlink.RuleDel(rule); err != nil {
		t.Fatal(err)
	}
	mended = true
	if out, err := a.cli(t, "recover", astray.id); err != nil {
		t.Fatalf("recover: %v: %s", err, out)
	}
	if n := astray.next(); n != 2 {
		t.Errorf("the counter is at %d, want 2", n)
	}
	if s := down.info(); s.Status != "running" || s.Reason != "unreachable" {
		t.Errorf("the one without a network is %v", s)
	}
	if _, err := a.DestroySandbox(t.Context(), connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: down.id})); err != nil {
		t.Error(err)
	}
}

// TestUnusableRecords: sandboxes with records that an agent cannot use run on,
// until a user ends or recovers them.
func TestUnusableRecords(t *testing.T) {
	a := startAgent(t, "--on-shutdown=leave")
	newer, torn := a.create(t, nil), a.create(t, nil)
	newer.count()
	newer.next()
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	file := func(b *sandbox, name string) string { return filepath.Join(a.stateDir, "sandboxes", b.id, name) }
	good, err := os.ReadFile(file(newer, "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(good, []byte(",")) // without its checksum
	other := append([]byte("{"), bytes.Replace(rest, []byte(`"version": 1`), []byte(`"version": 7`), 1)...)
	for path, data := range map[string][]byte{file(newer, "record.json"): other, file(torn, "record.json"): good[:100],
		file(torn, "record.prev.json"): nil} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pids := map[*sandbox]int{newer: newer.vmmPID(), torn: torn.vmmPID()}
	for range 2 {
		if err := a.start("--on-shutdown=destroy"); err != nil {
			t.Fatal(err)
		}
		out, err := a.cli(t, "ps")
		if err != nil || strings.Count(out, "unknown (not_understood)") != 2 {
			t.Errorf("ps: %v\n%s", err, out)
		}
		if s := newer.info(); s == nil || s.Detail != "record version 7 is newer than this agent's 1" {
			t.Errorf("it is %v", s)
		}
		for b, pid := range pids {
			if b.vmmPID() != pid {
				t.Errorf("the VMM %d of %s is gone", pid, b.id)
			}
			if _, err := os.Stat(file(b, "overlay.ext4")); err != nil {
				t.Error(err)
			}
		}
		fresh := a.create(t, nil)
		fresh.sh("true")
		if err := a.signal(syscall.SIGTERM); err != nil { // which destroys what is known
			t.Fatal(err)
		}
	}
	if err := a.start("--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	if out, err := a.cli(t, "rm", torn.id); err != nil {
		t.Fatalf("rm: %v: %s", err, out)
	}
	if left, err := testenv.Take(torn.id); err != nil || len(left) > 0 {
		t.Errorf("left of the one that was destroyed: %q, %v", left.Lines(), err)
	}
	spaces, _ := filepath.Glob(fmt.Sprintf("/run/netns/%s-*", a.instance()))
	if len(spaces) != 1 {
		t.Errorf("the network namespaces %q are there, want that of the other", spaces)
	}
	if out, err := a.cli(t, "recover", newer.id); err == nil {
		t.Errorf("recovered from a record of a newer version: %s", out)
	}
	if err := os.WriteFile(file(newer, "record.json"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := a.cli(t, "recover", newer.id); err != nil {
		t.Fatalf("recover: %v: %s", err, out)
	}
	if n := newer.next(); n != 2 {
		t.Errorf("the counter is at %d, want 2", n)
	}
	resp, err := a.GetSandbox(t.Context(), connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: newer.id}))
	if err != nil || resp.Msg.Sandbox.Status != "running" {
		t.Errorf("it is %v, %v", resp, err)
	}
}
