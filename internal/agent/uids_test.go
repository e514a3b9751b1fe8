package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// Each agent has users of its own, and keeps them while its claim is there.
func TestClaimUIDs(t *testing.T) {
	testenv.Root(t)
	claims := filepath.Join(t.TempDir(), "uids")
	claim := func(stateDir string) int {
		t.Helper()
		base, err := claimUIDs(claims, stateDir)
		if err != nil {
			t.Fatal(err)
		}
		if base <= probeUID || base+blockUIDs > 1<<31 || (base-probeUID)%blockUIDs != 0 {
			t.Errorf("%s has the users from %d on", stateDir, base)
		}
		return base
	}
	a, b := t.TempDir(), t.TempDir()
	forA := claim(a)
	if got := claim(a); got != forA {
		t.Errorf("the next agent has the users from %d on, want %d", got, forA)
	}
	// Another agent's block is left to it, whatever the digest says.
	if err := os.Rename(claimFile(claims, forA), filepath.Join(claims, "aside")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(claimFile(claims, forA), []byte(b), 0o600); err != nil {
		t.Fatal(err)
	}
	next := claim(a)
	if next == forA {
		t.Errorf("both have the users from %d on", forA)
	}
	if err := releaseUIDs(claims, next); err != nil {
		t.Fatal(err)
	}
	// An agent's whose directory is gone is free, but not while its VMM runs.
	if err := os.RemoveAll(b); err != nil {
		t.Fatal(err)
	}
	vmm := exec.Command("sleep", "60")
	vmm.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(forA + blockUIDs - 1), Gid: 0}}
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { vmm.Process.Kill(); vmm.Wait() }()
	if got := claim(a); got != next {
		t.Errorf("users from %d on, whose VMM runs, want %d", got, next)
	}
	if err := releaseUIDs(claims, next); err != nil {
		t.Fatal(err)
	}
	vmm.Process.Kill()
	vmm.Wait()
	if got := claim(a); got != forA {
		t.Errorf("users from %d on, want those that were left, from %d on", got, forA)
	}
	if err := os.Remove(filepath.Join(claims, "aside")); err != nil {
		t.Fatal(err)
	}
	if err := releaseUIDs(claims, forA); err != nil {
		t.Fatal(err)
	}
	if exists(claims) {
		t.Error("the directory of the claims is left")
	}
}
