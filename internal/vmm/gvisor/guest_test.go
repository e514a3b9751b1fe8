package gvisor

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// diskMiB is the size of the guests' disks.
const diskMiB = 64

// baseImage is the file system of the template minimal as EROFS, made once.
var baseImage = sync.OnceValues(func() (string, error) {
	found, err := filepath.Glob(filepath.Join(os.Getenv(testenv.StateDirEnv), "templates", "*", "*", "base.ext4"))
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("no template: %w", err)
	}
	dir, err := os.MkdirTemp("", "vmmbase")
	if err != nil {
		return "", err
	}
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "base.erofs")
	for _, argv := range [][]string{
		{"mkdir", tree},
		{"mount", "-o", "ro,loop", found[0], tree},
		{"mkfs.erofs", "-E", "noinline_data", image, tree},
		{"umount", tree},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%q: %w: %s", argv, err, out)
		}
	}
	return image, nil
})

// made says that baseImage was called.
var made atomic.Bool

func TestMain(m *testing.M) {
	if text := os.Getenv(agentEnv); text != "" {
		fmt.Fprintln(os.Stderr, beAgent(text))
		os.Exit(1)
	}
	code := m.Run()
	if made.Load() {
		if image, err := baseImage(); err == nil {
			os.RemoveAll(filepath.Dir(image))
		}
	}
	os.Exit(code)
}

// withEnvd gives the subject's VM a root file system, envd and a network.
func withEnvd(t testing.TB, s *vmmtest.Subject) {
	t.Helper()
	testenv.StateDir(t)
	testenv.Program(t, "mkfs.erofs", "mount", "umount")
	made.Store(true)
	base, err := baseImage()
	if err != nil {
		t.Fatal(err)
	}
	envd, err := os.ReadFile(filepath.Join(filepath.Dir(sentry(t)), "envd"))
	if err != nil {
		t.Fatal(err)
	}
	init := filepath.Join(filepath.Dir(s.Spec.RunDir), "envd.erofs")
	if err := os.WriteFile(init, image(envd), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	furnish := func(spec vmm.Spec) vmm.Spec {
		spec.MemMiB, spec.Init = 256, init
		spec.Root = vmm.Root{Layers: []string{base}, Overlay: filepath.Join(spec.RunDir, "disk")}
		if err := os.WriteFile(spec.Root.Overlay, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(spec.Root.Overlay, diskMiB<<20); err != nil {
			t.Fatal(err)
		}
		spec.Boot, spec.Link = veth(t, n)
		n++
		return spec
	}
	s.Spec = furnish(s.Spec)
	bare := s.Clone
	s.Clone = func() vmm.Spec { return furnish(bare()) }
}

// veth makes a link, whose one end has the guest's gateway's address, and the other is
// for the VM.
func veth(t testing.TB, n int) (guestapi.Boot, *vmm.Link) {
	t.Helper()
	name := fmt.Sprintf("vmmtest-%d", n)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: fmt.Sprintf("vmmgv%d", n)}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	const first = 77 << 8 // 169.254.77.0
	address := func(n int) string { return fmt.Sprintf("169.254.%d.%d", (first+n)>>8, (first+n)&0xff) }
	addr, err := netlink.ParseAddr(address(4*n+1) + "/30")
	if err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName(link.PeerName)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{netlink.AddrAdd(link, addr), netlink.LinkSetUp(link), netlink.LinkSetARPOff(peer), netlink.LinkSetUp(peer)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return guestapi.Boot{
		Addr:    netip.MustParsePrefix(address(4*n+2) + "/30"),
		Gateway: netip.MustParseAddr(address(4*n + 1)), Hostname: "vmmtest",
	}, &vmm.Link{Kind: vmm.Packet, Name: link.PeerName, MAC: "02:fc:00:00:00:05"}
}

const token = "token-of-the-test"

// ready waits for the guest's envd and initialises it.
func ready(t testing.TB, spec vmm.Spec, in guest.Init) *guest.Client {
	t.Helper()
	c := guest.New(netip.AddrPortFrom(spec.Boot.Addr.Addr(), guestapi.Port), token)
	t.Cleanup(c.Close)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatalf("%v; console:\n%s", err, console(spec))
	}
	in.Time, in.AccessToken, in.Hostname, in.SandboxID, in.Entropy = time.Now(), token, "sb-"+spec.ID[:10], spec.ID, make([]byte, 64)
	if _, err := c.Init(ctx, in); err != nil {
		t.Fatalf("%v; console:\n%s", err, console(spec))
	}
	return c
}

func console(spec vmm.Spec) []byte {
	text, _ := vmm.Tail(spec.Console, 4<<10)
	return text
}

// run runs a shell's command in the guest and returns what it printed.
func run(t testing.TB, c *guest.Client, script string) string {
	t.Helper()
	r, err := c.Exec(t.Context(), guest.Command{Cmd: "/bin/sh", Args: []string{"-c", script}, Timeout: soon})
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("%q: %v, %d, %s%s", script, err, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// soon bounds what a guest does at once, on a machine that is busy.
const soon = 20 * time.Second

func start(t testing.TB, s vmmtest.Subject) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	v, err := s.Driver.Start(ctx, s.Spec)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, v)
	return v.(*vm)
}

// ended ends a VM with the test.
func ended(t testing.TB, v vmm.VM) {
	t.Cleanup(func() {
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// TestGuest: envd boots in a guest of gVisor without a complaint and does all of its
// work: commands, their cgroups, files on a disk of the size asked for, a freeze, a
// snapshot whose copies go on where it was, and its own end.
func TestGuest(t *testing.T) {
	s := subject(t)
	withEnvd(t, &s)
	v := start(t, s)
	c := ready(t, s.Spec, guest.Init{CloneKey: "key"})
	for script, want := range map[string]string{
		"echo hello":                  "hello",
		"cat /proc/1/comm":            "init",
		"hostname":                    "sb-" + s.Spec.ID[:10],
		"stat -f -c %T /tmp":          "overlayfs",
		"ls -A /run/wrenn 2>&1; true": "ls: cannot access '/run/wrenn': No such file or directory",
		"cat /sys/devices/virtual/dmi/id/product_name":                                              product,
		"df -BM --output=size / | tail -1":                                                          fmt.Sprintf("%dM", diskMiB),
		"dd if=/dev/zero of=/big bs=1M count=100 2>&1 | grep -o 'No space left on device'; rm /big": "No space left on device",
		"cut -d: -f3 /proc/self/cgroup":                                                             "/user/p",
	} {
		if got := run(t, c, script); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if text := console(s.Spec); bytes.Contains(text, []byte("WARN")) || bytes.Contains(text, []byte("ERROR")) {
		t.Errorf("console:\n%s", text)
	}
	run(t, c, "echo kept >/kept; cd /; (while :; do date +%s%N >/new; mv /new /count; sleep 0.05; done) >/dev/null 2>&1 &")
	if _, err := c.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		spec := s.Clone()
		clone, err := s.Driver.(vmm.Restorer).Restore(t.Context(), spec, dir)
		if err != nil {
			t.Fatal(err)
		}
		ended(t, clone)
		if err := clone.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		k := guest.New(netip.AddrPortFrom(spec.Boot.Addr.Addr(), guestapi.Port), "key")
		defer k.Close()
		in := guest.Init{Time: time.Now(), AccessToken: token, Restored: true, Hostname: "sb-clone", SandboxID: "clone"}
		if _, err := k.Init(t.Context(), in); err != nil {
			t.Fatal(err)
		}
		k = guest.New(netip.AddrPortFrom(spec.Boot.Addr.Addr(), guestapi.Port), token)
		defer k.Close()
		got := run(t, k, "cat /kept; hostname; a=$(cat /count); sleep 0.3; [ $a != $(cat /count) ] && echo goes on")
		if got != "kept\nsb-clone\ngoes on" {
			t.Errorf("clone: %q", got)
		}
		if at := run(t, k, "date +%s"); at < fmt.Sprint(time.Now().Unix()-2) {
			t.Errorf("clone's clock: %s", at)
		}
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	ready(t, s.Spec, guest.Init{Restored: true})
	if err := unix.Kill(v.state.Process.PID, unix.SIGTERM); err != nil { // the sentry passes it on
		t.Fatal(err)
	}
	select {
	case <-v.Done():
	case <-time.After(soon):
		t.Fatalf("it does not end; console:\n%s", console(s.Spec))
	}
	if e := v.Exit(); e.Code != 0 || e.Cause != vmm.GuestPoweredOff {
		t.Errorf("exit %+v", e)
	}
}

// TestOutOfMemory: processes that want more memory than there is end, whether one wants
// all of it or many want some, and the guest lives on; the command that they belonged to
// says why. If the sentry itself dies of it, so does the VM, and says so.
func TestOutOfMemory(t *testing.T) {
	s := subject(t)
	withEnvd(t, &s)
	s.Spec.Cgroup = "wrenn-vmmtest/" + s.Spec.ID
	s.Spec.Limits = vmm.Limits{CPUMilli: 2250, MemMiB: s.Spec.MemMiB + 128 + s.Spec.MemMiB/16, PIDs: 64 + 2*2*s.Spec.MemMiB}
	v := start(t, s)
	c := ready(t, s.Spec, guest.Init{})
	const hog = "tail /dev/zero >/dev/null"
	for _, script := range []string{
		hog,
		hog, // a second time
		"for i in $(seq 30); do " + hog + " & done; wait",
		"i=0; while [ $i -lt 400 ]; do " + hog + " & i=$((i+1)); done; wait",
	} {
		r, err := c.Exec(t.Context(), guest.Command{Cmd: "/bin/sh", Args: []string{"-c", script}, Timeout: soon})
		if err != nil || !r.OutOfMemory {
			t.Fatalf("%s: %v, %+v; %v, console:\n%s", script, err, r, v.Exit(), console(s.Spec))
		}
		if got := run(t, c, "echo alive"); got != "alive" {
			t.Errorf("%s: the guest says %q", script, got)
		}
	}
	if r, err := c.Exec(t.Context(), guest.Command{Cmd: "true", Timeout: soon}); err != nil || r.OutOfMemory {
		t.Errorf("a command that takes nothing: %+v, %v", r, err)
	}
	// What is no process's is not given back by one's end.
	_, _ = c.Exec(t.Context(), guest.Command{Cmd: "/bin/sh", Args: []string{"-c",
		"mount -t tmpfs -o size=1g none /mnt && dd if=/dev/zero of=/mnt/all bs=1M"}, Timeout: soon})
	select {
	case <-v.Done():
		if e := v.Exit(); e.Cause != vmm.OutOfMemory {
			t.Errorf("exit %+v", e)
		}
	case <-time.After(time.Second): // what wrote it was ended in time, and there is no room for another program
		if err := c.WaitReady(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
