package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// theFake builds testdata/fake once: a program by itself, for it has to run in
// a root directory with nothing else in it.
var theFake = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmmtest-fake-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/fake", "./testdata/fake")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(dir + "/fake")
})

// fakeSettings are what the fake reads behind the end of its own file.
type fakeSettings struct {
	Version string `json:"version"`
	Fault   string `json:"fault,omitempty"`
	Call    int    `json:"call,omitempty"`
}

// install puts a fake Firecracker, and with jailed its jailer, into a directory
// and returns a driver's settings for it.
func install(t testing.TB, set fakeSettings, jailed bool) Config {
	t.Helper()
	program, err := theFake()
	if err != nil {
		t.Fatal(err)
	}
	if set.Version == "" {
		set.Version = "1.12.1"
	}
	text, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg := Config{Binary: dir + "/firecracker-fake", Jailer: "none"}
	names := []string{cfg.Binary}
	if jailed {
		cfg.Jailer = dir + "/jailer-fake"
		names = append(names, cfg.Jailer)
	}
	for _, name := range names {
		if err := os.WriteFile(name, append(bytes.Clone(program), "\nFAKE-SETTINGS "+string(text)...), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// driver is one for which KVM works.
func driver(cfg Config) *Driver {
	d := New(cfg)
	d.kvm = func(context.Context, string, string, func(context.Context, vmm.Spec) (vmm.VM, error)) (kvm.Verdict, error) {
		return kvm.Verdict{Works: true, Why: "a test says so", Final: true}, nil
	}
	return d
}

const uid, gid = 871234, 871235

// subject is a driver with a fake, and a VM for it.
func subject(t testing.TB, cfg Config) vmmtest.Subject {
	t.Helper()
	s := bareSubject(t)
	s.Driver = driver(cfg)
	s.Again = func() vmm.Driver { return driver(cfg) }
	s.Exiting = func(s *vmm.Spec) { s.Kernel.Args += " fake.exit" }
	return s
}

// bareSubject is a VM without a driver. Its files are root's alone; the VMM is
// somebody else.
func bareSubject(t testing.TB) vmmtest.Subject {
	t.Helper()
	testenv.Root(t)
	testenv.NoLeaks(t, "vmmtest-")
	top, err := os.MkdirTemp("/run", "vmmtest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	files := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(files, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.Chmod(files, 0o700); err != nil {
		t.Fatal(err)
	}
	id := filepath.Base(top)
	spec := vmm.Spec{
		ID: id, VCPUs: 1, MemMiB: 128,
		Kernel: vmm.Kernel{Image: file("vmlinux", "\x7fELF and more"), Initrd: file("initrd.img", "0707"), Args: "quiet"},
		UID:    uid, GID: gid,
	}
	n := 0
	place := func(spec vmm.Spec) vmm.Spec {
		spec.RunDir = filepath.Join(top, strconv.Itoa(n))
		spec.Console = filepath.Join(files, fmt.Sprintf("console-%d.log", n))
		spec.Root = vmm.Root{Layers: []string{spec.Kernel.Initrd}, Overlay: file(fmt.Sprintf("overlay-%d", n), "overlay")}
		if err := os.Mkdir(spec.RunDir, 0o700); err != nil {
			t.Fatal(err)
		}
		return spec
	}
	spec = place(spec)
	return vmmtest.Subject{
		Spec: spec,
		Clone: func() vmm.Spec {
			n++
			clone := spec
			clone.ID = fmt.Sprintf("%s-%d", id, n)
			return place(clone)
		},
		Live: func() int { return len(processes(t, id)) },
	}
}

// processes returns the ids of the VMM processes of a VM and its clones.
func processes(t testing.TB, id string) []int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, f := range all {
		cmdline, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(cmdline, []byte("firecracker")) || !bytes.Contains(cmdline, []byte("--id\x00"+id)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, pid)
	}
	return found
}

func boot(t testing.TB, s vmmtest.Subject) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	v, err := s.Driver.Start(ctx, s.Spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return v.(*vm)
}

// bothWays runs a test with the jailer and without.
func bothWays(t *testing.T, f func(*testing.T, bool)) {
	t.Run("jailed", func(t *testing.T) { f(t, true) })
	t.Run("plain", func(t *testing.T) { f(t, false) })
}

func TestContract(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		vmmtest.Run(t, func(t *testing.T) vmmtest.Subject { return subject(t, install(t, fakeSettings{}, jailed)) })
	})
}

// The same against the real one, wherever it can run: on a machine with KVM that
// boots guests. Nobody is expected to have that, CI included.
func TestContractOfTheRealOne(t *testing.T) {
	if _, err := New(Config{}).programs(t.Context()); err != nil {
		t.Skip(err)
	}
	kernel := filepath.Join(testenv.StateDir(t), "kernels", "default")
	bothWays(t, func(t *testing.T, jailed bool) {
		cfg := Config{Jailer: "none", Probe: kvm.Probe{
			Kernel: filepath.Join(kernel, "vmlinux"), Initrd: filepath.Join(kernel, "initrd.img"), UID: uid, GID: gid,
		}}
		if jailed {
			cfg.Jailer = "jailer"
		}
		first := New(cfg)
		report, err := first.Check(t.Context())
		if err != nil {
			t.Skip(err)
		}
		// One probe guest is enough for all of the contract.
		known := func() vmm.Driver {
			d := New(cfg)
			d.kvm = func(context.Context, string, string, func(context.Context, vmm.Spec) (vmm.VM, error)) (kvm.Verdict, error) {
				return kvm.Verdict{Works: true, Why: report.Why, Final: true}, nil
			}
			return d
		}
		vmmtest.Run(t, func(t *testing.T) vmmtest.Subject {
			s := bareSubject(t)
			s.Driver, s.Again = known(), known
			// A kernel alone: it finds no root file system and panics.
			s.Spec.Kernel = vmm.Kernel{Image: filepath.Join(kernel, "vmlinux"), Args: "quiet panic=0"}
			s.Exiting = func(s *vmm.Spec) { s.Kernel.Args += " panic=-1" }
			bare := s.Clone
			s.Clone = func() vmm.Spec {
				clone := bare()
				clone.Kernel = s.Spec.Kernel
				return clone
			}
			return s
		})
	})
}

// A version is more than three numbers.
func TestVersionOfABuild(t *testing.T) {
	s := subject(t, install(t, fakeSettings{Version: "1.17.0-dev"}, true))
	v := boot(t, s)
	if h := v.Handle(); h.Version != "1.17.0-dev" {
		t.Errorf("handle of version %q", h.Version)
	}
}

func TestOddVCPUs(t *testing.T) {
	s := subject(t, install(t, fakeSettings{}, true))
	for _, n := range []int{3, 5, 31, 33, 64} {
		s.Spec.VCPUs = n
		_, err := s.Driver.Start(t.Context(), s.Spec)
		if !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), "1 or an even number, at most 32") {
			t.Errorf("%d vCPUs: %v", n, err)
		}
	}
	for _, n := range []int{2, 32} {
		s.Spec.VCPUs = n
		v := boot(t, s)
		if err := v.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConsoleReachesItsFile(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{}, jailed))
		v := boot(t, s)
		text, err := vmm.Tail(s.Spec.Console, 4<<10)
		if err != nil || !strings.Contains(string(text), "Command line: console=ttyS0 reboot=k panic=-1 pci=off") || !strings.Contains(string(text), " quiet wrenn.base=vda wrenn.overlay=vdb ") {
			t.Errorf("console: %q, %v", text, err)
		}
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := v.Snapshot(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		clone := s.Clone()
		c, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Kill(context.Background())
		if text, err := vmm.Tail(clone.Console, 4<<10); err != nil || !strings.Contains(string(text), "restored") {
			t.Errorf("console of the clone: %q, %v", text, err)
		}
	})
}

// The VMM uses files that are root's, and they stay so.
func TestFilesStayRoots(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{}, jailed))
		v := boot(t, s)
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := v.Snapshot(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		files := []string{s.Spec.Kernel.Image, s.Spec.Kernel.Initrd, s.Spec.Console, s.Spec.Root.Overlay}
		for _, name := range []string{snapfile.MemoryName, snapfile.StateName, snapfile.ManifestName} {
			files = append(files, filepath.Join(dir, name))
		}
		for _, path := range files {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil || st.Uid != 0 || st.Gid != 0 || st.Mode&0o7777 != 0o600 {
				t.Errorf("%s belongs to %d:%d with mode %o, %v", filepath.Base(path), st.Uid, st.Gid, st.Mode&0o7777, err)
			}
		}
		// Nor can the VMM put another socket in the place of its own.
		var st unix.Stat_t
		if err := unix.Stat(filepath.Dir(v.state.Socket), &st); err != nil || st.Uid != 0 || st.Mode&0o7777 != 0o700 {
			t.Errorf("the socket's directory belongs to %d with mode %o, %v", st.Uid, st.Mode&0o7777, err)
		}
		// The snapshot's directory was the VMM's to see for as long as it took.
		if left, err := os.ReadDir(fmt.Sprintf("/proc/%d/root%s", v.state.Process.PID, snapshotPath)); err != nil || len(left) != 0 {
			t.Errorf("the VMM still sees %v, %v", left, err)
		}
		// The host sees nothing of the VMM's root.
		if left, err := os.ReadDir(place{s.Spec.RunDir}.jails()); err != nil || len(left) != 0 {
			t.Errorf("the host sees %v, %v", left, err)
		}
	})
}

// What /proc says of a VMM: it is somebody who may do nothing, in a room with
// its own files and no others.
func TestHardening(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{}, jailed))
		s.Spec.Cgroup = "wrenn-vmmtest/" + s.Spec.ID
		s.Spec.Limits = vmm.Limits{CPUMilli: 1000, MemMiB: 512, PIDs: 64, DiskBytes: 1 << 26, DiskOps: 1000}
		v := boot(t, s)
		proc := "/proc/" + strconv.Itoa(v.state.Process.PID)
		tasks, err := filepath.Glob(proc + "/task/*/status")
		if err != nil || len(tasks) < 2 {
			t.Fatal(tasks, err)
		}
		for _, task := range tasks {
			status := fields(t, task)
			for name, want := range map[string]string{
				"Uid": "871234 871234 871234 871234", "Gid": "871235 871235 871235 871235", "Groups": "",
				"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
				"NoNewPrivs": "1",
			} {
				if got := status[name]; got != want {
					t.Errorf("%s: %s is %q, want %q", task, name, got, want)
				}
			}
		}
		var names []string
		inside, err := os.ReadDir(proc + "/root")
		for _, e := range inside {
			names = append(names, e.Name())
		}
		want := "api dev disk0 disk1 firecracker initrd kernel snapshot"
		if jailed {
			want = "api dev disk0 disk1 firecracker-fake initrd kernel run snapshot"
		}
		if got := strings.Join(names, " "); err != nil || got != want {
			t.Errorf("the VMM sees %q, %v, want %q", got, err, want)
		}
		for _, kind := range []string{"mnt", "pid", "ipc", "uts"} {
			mine, _ := os.Readlink("/proc/self/ns/" + kind)
			if ns, err := os.Readlink(proc + "/ns/" + kind); err != nil || ns == mine {
				t.Errorf("namespace %q, %v: ours", ns, err)
			}
		}
		mounts, err := os.ReadFile(proc + "/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(mounts)) {
			f := strings.Fields(line)
			target, options := f[4], f[5]
			if _, name, _ := strings.Cut(target, s.Spec.ID); !jailed && name == target {
				continue // beyond its root
			}
			writable := map[string]bool{"disk1": true, "api": true, "snapshot": true}[filepath.Base(target)]
			switch filepath.Base(target) {
			case "kernel", "initrd", "disk0", "disk1":
				if got := strings.HasPrefix(options, "rw"); got != writable || !strings.Contains(options, "nosuid") || !strings.Contains(options, "nodev") {
					t.Errorf("%s is mounted %s", target, options)
				}
			}
		}
		limits, err := os.ReadFile(proc + "/limits")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"Max core file size 0 0 bytes", "Max open files 1024 1024 files", fmt.Sprintf("Max file size %[1]d %[1]d bytes", s.Spec.MaxFile())} {
			if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), want) {
				t.Errorf("limits lack %q:\n%s", want, limits)
			}
		}
		if environ, err := os.ReadFile(proc + "/environ"); err != nil || jailed && len(environ) != 0 {
			t.Errorf("environment %q, %v", environ, err)
		}
		groups, err := os.ReadFile(proc + "/cgroup")
		if err != nil || !strings.Contains(string(groups), "/"+s.Spec.Cgroup+"\n") {
			t.Errorf("cgroups: %s, %v", groups, err)
		}
		if sid, err := unix.Getsid(v.state.Process.PID); err != nil || sid != v.state.Process.PID {
			t.Errorf("session %d, %v, want its own", sid, err)
		}
	})
}

// fields reads a /proc file of "name: value" lines.
func fields(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, line := range strings.Split(string(data), "\n") {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.Join(strings.Fields(value), " ")
	}
	return out
}

// Firecracker was replaced under a running agent: what it knows of the old one
// no longer holds.
func TestReplacedBinary(t *testing.T) {
	cfg := install(t, fakeSettings{}, true)
	s := subject(t, cfg)
	if _, err := s.Driver.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	newer := install(t, fakeSettings{Version: "1.12.2"}, true)
	if err := os.Rename(newer.Binary, cfg.Binary); err != nil {
		t.Fatal(err)
	}
	_, err := s.Driver.Start(t.Context(), s.Spec)
	if !errors.Is(err, errdefs.Unavailable) || !strings.Contains(err.Error(), "firecracker has become 1.12.2, and was 1.12.1") {
		t.Errorf("start: %v", err)
	}
}

// A VMM that no handle leads to is found, though the jailer has wiped the mark.
func TestStraysAreFound(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{}, jailed))
		stray := boot(t, s)
		kept := s
		kept.Spec = s.Clone()
		other := boot(t, kept)
		root := filepath.Dir(s.Spec.RunDir)
		gone, err := launch.KillStrays(t.Context(), root, "wrenn-vmmtest-none", func(name string) bool { return name == filepath.Base(kept.Spec.RunDir) })
		if err != nil || len(gone) != 1 || gone[0] != filepath.Base(s.Spec.RunDir) {
			t.Errorf("killed %v, %v", gone, err)
		}
		select {
		case <-stray.Done():
		case <-time.After(10 * time.Second):
			t.Error("the stray lives on")
		}
		select {
		case <-other.Done():
			t.Error("the other VM was ended, too")
		default:
		}
	})
}

// The VMM opens the tap of its namespace, which belongs to its user; of another
// user's tap, or of none, the answer is Firecracker's own.
func TestTap(t *testing.T) {
	bothWays(t, func(t *testing.T, jailed bool) {
		s := subject(t, install(t, fakeSettings{}, jailed))
		s.Spec.NetNS = tapNamespace(t, "tap0", uid)
		s.Spec.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap0", MAC: "02:FC:00:00:00:05"}
		v := boot(t, s)
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := v.Snapshot(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		// A clone lives in another namespace, and its tap may have another name.
		clone := s.Clone()
		clone.NetNS = tapNamespace(t, "tap1", uid)
		clone.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap1", MAC: "02:fc:00:00:00:05"}
		again, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestTapOfAnother(t *testing.T) {
	for name, c := range map[string]struct {
		tap   string
		owner int
	}{"another user's": {"tap0", uid + 1}, "nobody's": {"tap7", uid}} {
		s := subject(t, install(t, fakeSettings{}, true))
		s.Spec.NetNS = tapNamespace(t, "tap0", c.owner)
		s.Spec.Link = &vmm.Link{Kind: vmm.Tap, Name: c.tap, MAC: "02:FC:00:00:00:05"}
		v, err := s.Driver.Start(t.Context(), s.Spec)
		if err == nil {
			v.Kill(t.Context())
		}
		if err == nil || !strings.Contains(err.Error(), "Open tap device failed") || errdefs.ClassOf(err) != nil {
			t.Errorf("%s tap: %v", name, err)
		}
	}
}

// Before 1.12 a restored VM has its snapshot's tap, by name.
func TestTapOfAnOldVersion(t *testing.T) {
	s := subject(t, install(t, fakeSettings{Version: "1.10.1"}, true))
	s.Spec.NetNS = tapNamespace(t, "tap0", uid)
	s.Spec.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap0", MAC: "02:FC:00:00:00:05"}
	v := boot(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	clone := s.Clone()
	clone.NetNS, clone.Link = tapNamespace(t, "tap0", uid), s.Spec.Link
	again, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	clone.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap1", MAC: clone.Link.MAC}
	if _, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("with another tap: %v, want invalid argument", err)
	}
	// A snapshot is for its own version.
	newer := driver(install(t, fakeSettings{Version: "1.11.0"}, true))
	if _, err := newer.Restore(t.Context(), s.Clone(), dir); !errors.Is(err, errdefs.Unsupported) {
		t.Errorf("by a newer one: %v, want unsupported", err)
	}
}

// tapNamespace makes a network namespace with a tap that belongs to a user, and
// returns its path.
func tapNamespace(t testing.TB, tap string, owner int) string {
	t.Helper()
	testenv.Program(t, "ip")
	hold := exec.Command("unshare", "-n", "cat")
	in, err := hold.StdinPipe()
	if err == nil {
		err = hold.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); hold.Wait() })
	path := fmt.Sprintf("/proc/%d/ns/net", hold.Process.Pid)
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if ns, err := os.Readlink(path); err == nil && ns != mine {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no namespace")
		}
	}
	if out, err := exec.Command("nsenter", "--net="+path, "ip", "tuntap", "add", tap, "mode", "tap", "vnet_hdr", "user", strconv.Itoa(owner)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}
