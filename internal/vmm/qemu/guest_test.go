package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/kvm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// guestInitrd builds testdata/guest once and packs it as an initrd.
var guestInitrd = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmmtest-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/init", "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	init, err := os.ReadFile(dir + "/init")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, f := range []struct {
		name string
		mode uint32
		data []byte
	}{{"dev", 0o40755, nil}, {"proc", 0o40755, nil}, {"init", 0o100755, init}, {"TRAILER!!!", 0, nil}} {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 0, f.mode, 0, 0, 1, 0, len(f.data), 0, 0, 0, 0, len(f.name)+1, 0)
		b.WriteString(f.name + "\x00")
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(f.data)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	return b.Bytes(), nil
})

// withGuest gives the subject's VM a userland.
func withGuest(t testing.TB, s *vmmtest.Subject, cmdline string) {
	t.Helper()
	data, err := guestInitrd()
	if err != nil {
		t.Fatal(err)
	}
	s.Spec.Kernel.Initrd = filepath.Join(t.TempDir(), "initrd.img")
	if err := os.WriteFile(s.Spec.Kernel.Initrd, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Spec.Kernel.Args = "quiet " + cmdline
	bare := s.Clone
	s.Clone = func() vmm.Spec {
		clone := bare()
		clone.Kernel = s.Spec.Kernel
		return clone
	}
}

// until polls a file until it matches.
func until(t testing.TB, path, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if m := re.FindStringSubmatch(string(data)); m != nil {
			return m
		}
	}
	data, _ := os.ReadFile(path)
	t.Fatalf("no %q on the console of %d bytes:\n%.300s\n...", pattern, len(data), data)
	return nil
}

var tick = regexp.MustCompile(`tick (\d+) ([0-9a-f]{8})\r?\n`)

// lastTicks is ticks of a paused guest, whose last words may still be on their way
// through the console's pipe.
func lastTicks(t testing.TB, console string) (counts []int, sums map[string]bool) {
	t.Helper()
	time.Sleep(200 * time.Millisecond)
	return ticks(t, console)
}

// ticks returns the numbers that the guest has counted, and the sums of its
// memory.
func ticks(t testing.TB, path string) (counts []int, sums map[string]bool) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sums = map[string]bool{}
	for _, m := range tick.FindAllStringSubmatch(string(data), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		counts = append(counts, n)
		sums[m[2]] = true
	}
	return counts, sums
}

func TestPauseStopsTheGuest(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "")
	v := start(t, s)
	until(t, s.Spec.Console, `tick 3 `)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, _ := lastTicks(t, s.Spec.Console)
	time.Sleep(300 * time.Millisecond)
	after, _ := ticks(t, s.Spec.Console)
	if len(after) != len(before) {
		t.Errorf("a paused guest counted from %d to %d", len(before), len(after))
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, s.Spec.Console, fmt.Sprintf(`tick %d `, len(after)+3))
}

// A guest restored from a snapshot goes on where it was, twice and again, each
// by itself; its memory holds what it held.
func TestGuestGoesOn(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "")
	const uid = 871234
	s.Spec.UID, s.Spec.GID = uid, uid
	v := start(t, s)
	until(t, s.Spec.Console, `tick 3 `)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	counts, sums := lastTicks(t, s.Spec.Console)
	last := counts[len(counts)-1]
	first := t.TempDir()
	if err := v.Snapshot(t.Context(), first); err != nil {
		t.Fatal(err)
	}

	goOn := func(dir string, last int) (*vm, vmm.Spec) {
		t.Helper()
		spec := s.Clone()
		spec.UID, spec.GID = uid, uid
		restored, err := s.Driver.(*Driver).Restore(t.Context(), spec, dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { restored.Kill(t.Context()) })
		if counts, _ := ticks(t, spec.Console); len(counts) != 0 {
			t.Errorf("it ran before its resume: %v", counts)
		}
		if err := restored.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		until(t, spec.Console, fmt.Sprintf(`tick %d `, last+4))
		counts, sumsNow := ticks(t, spec.Console)
		// The line that was being printed may have begun on the other console.
		if counts[0] > last+2 {
			t.Errorf("it went on with %d after %d", counts[0], last)
		}
		for sum := range sumsNow {
			if !sums[sum] {
				t.Errorf("memory sums up to %s, was %v", sum, sums)
			}
		}
		return restored.(*vm), spec
	}
	child, _ := goOn(first, last)
	goOn(first, last)
	if err := child.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	counts, _ = ticks(t, child.Process.Ref().Console)
	second := t.TempDir()
	if err := child.Snapshot(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(first); err != nil {
		t.Fatal(err)
	}
	goOn(second, counts[len(counts)-1])
	if err := child.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, child.Process.Ref().Console, fmt.Sprintf(`tick %d `, counts[len(counts)-1]+4))
}

// Clones take memory for what they write, not for what they are.
func TestClonesShareMemory(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "")
	v := start(t, s)
	until(t, s.Spec.Console, `tick 3 `)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, snapfile.MemoryName), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > st.Size*9/10 {
		t.Errorf("the memory file takes %d of %d bytes: not sparse", st.Blocks*512, st.Size)
	}
	restored, err := s.Driver.(*Driver).Restore(t.Context(), s.Clone(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { restored.Kill(t.Context()) })
	if err := restored.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	console := restored.(*vm).Process.Ref().Console
	until(t, console, `(?s)tick.*tick.*tick.*tick`)
	private := anonymous(t, restored.(*vm), st.Ino)
	t.Logf("memory %d MiB, in the snapshot %d MiB, written by a clone in its first ticks %d KiB",
		st.Size>>20, st.Blocks*512>>20, private>>10)
	if private > st.Size/4 {
		t.Errorf("a fresh clone has %d bytes of its own", private)
	}
}

// Whoever has taken over a restored VM's QEMU cannot change the memory that
// others start from: neither through what it has open nor as its user.
func TestSnapshotCannotBeWritten(t *testing.T) {
	s := subject(t)
	v := start(t, s)
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	const uid = 871234
	spec := s.Clone()
	spec.UID, spec.GID = uid, uid
	restored, err := s.Driver.(*Driver).Restore(t.Context(), spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { restored.Kill(t.Context()) })
	path := filepath.Join(dir, snapfile.MemoryName)
	if err := os.Chmod(path, 0o444); err != nil { // as published ones are
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	digest := func() [sha256.Size]byte {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(data)
	}
	before := digest()
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		t.Fatal(err)
	}

	pid := restored.(*vm).state.Process.PID
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range fds {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0) // its own, not another of the file
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fd), "of qemu")
		defer file.Close()
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Ino != want.Ino || st.Dev != want.Dev {
			continue
		}
		found++
		if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
			t.Error("it can be written to")
		}
		if unix.Ftruncate(fd, 0) == nil || unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, pageSize) == nil {
			t.Error("it can be cut")
		}
		if _, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Error("it can be mapped for writing")
		}
		// As its user, with its descriptor, and in no jail.
		cmd := exec.Command("/bin/sh", "-c", "cat <&3 >/dev/null && echo reads; echo x >/proc/self/fd/3 || echo x >&3")
		cmd.ExtraFiles = []*os.File{file}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if out, err := cmd.Output(); err == nil || string(out) != "reads\n" {
			t.Errorf("as its user: %q, %v", out, err)
		}
	}
	if found == 0 {
		t.Error("it has no descriptor of its memory")
	}
	if digest() != before {
		t.Error("the memory is not what was written")
	}
}

// anonymous returns how many bytes of its mapping of an inode a VMM has for
// itself.
func anonymous(t testing.TB, v *vm, inode uint64) (n int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(v.state.Process.PID) + "/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) >= 5 && strings.Contains(f[0], "-") {
			inside = f[4] == strconv.FormatUint(inode, 10)
		}
		if inside && f[0] == "Anonymous:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			n += kib << 10
		}
	}
	return n
}

func TestIdleGuest(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "test=idle")
	v := start(t, s)
	until(t, s.Spec.Console, `idle`)
	for deadline := time.Now().Add(20 * time.Second); ; {
		before := cpuTime(t, v)
		time.Sleep(time.Second)
		used := cpuTime(t, v) - before
		if used <= 50*time.Millisecond {
			t.Logf("%s of CPU in a second", used)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("an idle guest uses %s of CPU in a second", used)
		}
	}
}

func TestConsoleIsBounded(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "test=flood")
	// A guest takes long to write as much as there may be.
	full := bytes.Repeat([]byte("of an earlier life\n"), vmm.MaxConsoleBytes/19)
	if err := os.WriteFile(s.Spec.Console, full, 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, s)
	size := func() int64 {
		info, err := os.Stat(s.Spec.Console)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	deadline := time.Now().Add(time.Minute)
	wait := func(what string, done func() bool) {
		t.Helper()
		for ; !done(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the console of %d bytes is not %s", size(), what)
			}
		}
	}
	wait("cut", func() bool { return size() < vmm.MaxConsoleBytes*3/4 })
	wait("marked as cut", func() bool {
		data, err := os.ReadFile(s.Spec.Console)
		return err == nil && bytes.Contains(data, []byte("[earlier output was cut]\n"))
	})
	cut := size()
	wait("written after the cut", func() bool { return size() > cut })
}

func TestProbe(t *testing.T) {
	s := subject(t)
	withGuest(t, &s, "")
	p := kvm.Probe{Kernel: s.Spec.Kernel.Image, Initrd: s.Spec.Kernel.Initrd}
	took, err := p.Boot(t.Context(), func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
		return New(Config{}).launch(ctx, spec, vmm.Report{Version: "7.2.0", Accel: "tcg", CPU: DefaultCPU}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the probe guest came up in %s", took)
}

// A VMM in its namespace opens its tap there and nowhere else.
func TestTap(t *testing.T) {
	s := subject(t)
	ns := tapNamespace(t, "tap0")
	s.Spec.NetNS = ns
	s.Spec.Link = &vmm.Link{Kind: vmm.Tap, Name: "tap0", MAC: "02:FC:00:00:00:05"}
	s.Spec.UID, s.Spec.GID = 871234, 871234
	overlay := func() string {
		path := filepath.Join(t.TempDir(), "overlay")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s.Spec.Root = vmm.Root{Layers: []string{s.Spec.Kernel.Image}, Overlay: overlay()}
	v := start(t, s)
	want, err := os.Readlink(ns)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.Readlink("/proc/" + strconv.Itoa(v.state.Process.PID) + "/ns/net"); err != nil || got != want {
		t.Errorf("network namespace %s, %v, want %s", got, err, want)
	}
	// Snapshot and restore with a network device, and disks.
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := v.Snapshot(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := v.Kill(t.Context()); err != nil { // one QEMU per tap
		t.Fatal(err)
	}
	clone := s.Clone()
	clone.NetNS, clone.Link, clone.UID, clone.GID = s.Spec.NetNS, s.Spec.Link, s.Spec.UID, s.Spec.GID
	clone.Root = vmm.Root{Layers: s.Spec.Root.Layers, Overlay: overlay()}
	restored, err := s.Driver.(*Driver).Restore(t.Context(), clone, dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := restored.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	if err := restored.Kill(t.Context()); err != nil {
		t.Error(err)
	}
}

// tapNamespace makes a network namespace with a tap, which lasts as long as
// the test, and returns its path.
func tapNamespace(t *testing.T, tap string) string {
	t.Helper()
	testenv.Root(t)
	path, end := make(chan string, 1), make(chan struct{})
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the namespace dies with the thread
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = netlink.LinkAdd(&netlink.Tuntap{
				LinkAttrs: netlink.LinkAttrs{Name: tap}, Mode: netlink.TUNTAP_MODE_TAP,
				Flags: netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_VNET_HDR, NonPersist: false,
			})
		}
		errc <- err
		path <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		<-end
	}()
	t.Cleanup(func() { close(end) })
	if err := <-errc; err != nil {
		t.Fatal(err)
	}
	return <-path
}

func BenchmarkColdStart(b *testing.B) {
	s := subject(b)
	withGuest(b, &s, "")
	for b.Loop() {
		v := start(b, s)
		until(b, s.Spec.Console, `tick 0`)
		if err := v.Kill(b.Context()); err != nil {
			b.Fatal(err)
		}
		os.Remove(s.Spec.Console)
	}
}

func BenchmarkSnapshotCycle(b *testing.B) {
	s := subject(b)
	withGuest(b, &s, "")
	v := start(b, s)
	until(b, s.Spec.Console, `tick 3`)
	if err := v.Pause(b.Context()); err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	if err := v.Snapshot(b.Context(), dir); err != nil {
		b.Fatal(err)
	}
	b.Run("snapshot", func(b *testing.B) {
		for b.Loop() {
			again := b.TempDir()
			if err := v.Snapshot(b.Context(), again); err != nil {
				b.Fatal(err)
			}
			os.RemoveAll(again)
		}
	})
	b.Run("pause+resume", func(b *testing.B) {
		for b.Loop() {
			if err := v.Resume(b.Context()); err != nil {
				b.Fatal(err)
			}
			if err := v.Pause(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	// The floor: the same program with the same arguments, and nothing else.
	b.Run("bare restore", func(b *testing.B) {
		d := s.Driver.(*Driver)
		report, err := d.Check(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		binary, err := d.binary()
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			spec := s.Clone()
			if err := os.Mkdir(jail(spec.RunDir), 0o700); err != nil {
				b.Fatal(err)
			}
			socket, err := listen(qmpSocket(spec.RunDir))
			if err != nil {
				b.Fatal(err)
			}
			state, err := os.Open(filepath.Join(dir, snapfile.StateName))
			if err != nil {
				b.Fatal(err)
			}
			args := argv(machine{binary: binary, version: report.Version, accel: report.Accel, cpu: model(report), spec: spec, memory: filepath.Join(dir, snapfile.MemoryName)})
			cmd := exec.Command(args[0], args[1:]...)
			cmd.ExtraFiles = []*os.File{socket, state}
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			socket.Close()
			state.Close()
			m, err := dial(b.Context(), qmpSocket(spec.RunDir))
			if err != nil {
				b.Fatal(err)
			}
			if err := m.call("cont", nil, nil); err != nil {
				b.Fatal(err)
			}
			m.close()
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	for name, ran := range map[string]bool{"restore": false, "restore+first-tick": true} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				spec := s.Clone()
				restored, err := s.Driver.(*Driver).Restore(b.Context(), spec, dir)
				if err != nil {
					b.Fatal(err)
				}
				if err := restored.Resume(b.Context()); err != nil {
					b.Fatal(err)
				}
				if ran {
					until(b, spec.Console, `tick`)
				}
				if err := restored.Kill(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
