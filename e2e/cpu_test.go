package e2e_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// What the levels of the x86-64 psABI add, and programs built for v3 demand besides, as
// /proc/cpuinfo names it.
var (
	flagsV2 = []string{"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
	flagsV3 = []string{"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave", "aes", "pclmulqdq"}
)

// lacks returns those of want that /proc/cpuinfo of a sandbox does not have.
func (b *sandbox) lacks(want []string) []string {
	b.t.Helper()
	flags := strings.Fields(b.sh("grep -m1 ^flags /proc/cpuinfo"))
	return slices.DeleteFunc(slices.Clone(want), func(f string) bool { return slices.Contains(flags, f) })
}

// underKVM says whether guests see the host's CPU.
func (b *sandbox) underKVM() bool { return b.info().Cpu == "host" }

func TestGuestCPU(t *testing.T) {
	b := sharedBox(t)
	want := slices.Concat(flagsV2, flagsV3)
	if b.underKVM() {
		host, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			t.Fatal(err)
		}
		want = slices.DeleteFunc(want, func(f string) bool { return !slices.Contains(strings.Fields(string(host)), f) })
	} else if cpu := b.info().Cpu; cpu != "x86-64-v3" {
		t.Errorf("the CPU is %q", cpu)
	}
	if lacks := b.lacks(want); len(lacks) > 0 {
		t.Errorf("the guest lacks %v", lacks)
	}
	out, err := b.a.cli(t, "inspect", b.id)
	var shown struct{ CPU string }
	if err == nil {
		err = json.Unmarshal([]byte(out), &shown)
	}
	if err != nil || shown.CPU != b.info().Cpu {
		t.Errorf("inspect shows %q, %v", shown.CPU, err)
	}
}

// A sandbox keeps its CPU when the agent is told another for new ones.
func TestCPUOfTheAgent(t *testing.T) {
	a := startAgent(t, "--cpu=x86-64-v1", "--on-shutdown=leave")
	old := a.create(t, nil)
	if old.underKVM() {
		t.Skip("with KVM guests see the host's CPU")
	}
	if lacks := old.lacks([]string{"ssse3"}); old.info().Cpu != "x86-64-v1" || len(lacks) != 1 {
		t.Errorf("%v lacks %v", old.info(), lacks)
	}
	if err := old.hibernate(); err != nil {
		t.Fatal(err)
	}
	if cpu := old.info().Cpu; cpu != "" {
		t.Errorf("hibernated it has the CPU %q", cpu)
	}
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if err := old.resume(); err != nil {
		t.Fatal(err)
	}
	forked, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: old.id}))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []*sandbox{old, {t, a, forked.Msg.Sandboxes[0].SandboxId}} {
		if cpu := b.info().Cpu; cpu != "x86-64-v1" || b.sh("echo works") != "works" {
			t.Errorf("%s has the CPU %q", b.id, cpu)
		}
	}
	if b := a.create(t, nil); b.info().Cpu != "x86-64-v3" || len(b.lacks(flagsV2)) > 0 {
		t.Errorf("a new one: %v", b.info())
	}
}

// numpy is built for x86-64-v2 and has code for v3, which it takes where the CPU says
// that it can.
func TestGuestRunsNumpy(t *testing.T) {
	testenv.Program(t, "pip3")
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "pip3", "download", "--no-deps", "--only-binary=:all:", "--python-version=3.11",
		"--platform=manylinux_2_27_x86_64", "--platform=manylinux_2_28_x86_64", "--dest", dir, "numpy==2.4.6").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(wheels) != 1 {
		t.Fatal(wheels, err)
	}
	b := sharedAgent(t).create(t, nil)
	if out, err := b.a.cli(t, "cp", wheels[0], b.id+":/root/numpy.whl"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	resp, err := b.a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
		SandboxId: b.id, Cmd: "sh", TimeoutSec: 120, Args: []string{"-c", `cd /root && python3 -m zipfile -e numpy.whl site &&
PYTHONPATH=site python3 -c 'import numpy as n; a = n.arange(4096.0).reshape(64, 64); print(n.__version__, int((a @ a.T).sum()))'`},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(resp.Msg.Stdout); resp.Msg.ExitCode != 0 || got != "2.4.6 1099064279040\n" {
		t.Errorf("%q, status %d: %s", got, resp.Msg.ExitCode, resp.Msg.Stderr)
	}
}
