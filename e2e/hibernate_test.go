package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func (b *sandbox) hibernate() error {
	_, err := b.a.PauseSandbox(b.t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id, ToDisk: true}))
	return err
}

// count starts a process that counts in its memory alone and tells on demand.
func (b *sandbox) count() {
	b.t.Helper()
	b.sh(`mkfifo /tmp/ask /tmp/tell
cat >/tmp/counter <<'END'
n=0
while read line </tmp/ask; do n=$((n+1)); echo $n >/tmp/tell; done
END
setsid sh /tmp/counter >/dev/null 2>&1 </dev/null &`)
}

func (b *sandbox) next() int {
	b.t.Helper()
	n, err := strconv.Atoi(b.sh("echo >/tmp/ask; cat /tmp/tell"))
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// blocksOf is what a file takes of the disk, in bytes.
func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestHibernateOutlivesTheHost: memory and disk go on where they were after
// every process and namespace of ours is gone.
func TestHibernateOutlivesTheHost(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.count()
	for want := 1; want <= 3; want++ {
		if n := b.next(); n != want {
			t.Fatalf("the counter is at %d, want %d", n, want)
		}
	}
	b.sh("head -c 5000000 /dev/urandom >/root/data; sha256sum /root/data >/root/sum; echo $RANDOM-unsynced >/root/late")
	late := b.sh("cat /root/late")
	b.sh("head -c 80000000 /dev/urandom >/root/big; sync; rm /root/big")
	overlay := filepath.Join(a.stateDir, "sandboxes", b.id, "overlay.ext4")
	before := blocksOf(t, overlay)

	for round := range 2 { // the second time it was restored itself
		began := time.Now()
		if err := b.hibernate(); err != nil {
			t.Fatal(err)
		}
		t.Logf("hibernate took %s", time.Since(began).Round(time.Millisecond))
		if after := blocksOf(t, filepath.Join(a.stateDir, "sandboxes", b.id, "snapshot", "overlay.ext4")); after > before-60e6 {
			t.Errorf("the disk has %d bytes, and had %d before 80 MB were deleted", after, before)
		}
		info := b.info()
		if info.Status != "hibernated" || info.HostIp != "" {
			t.Fatalf("it is %s at %q", info.Status, info.HostIp)
		}
		left, err := testenv.Take(b.id)
		if err != nil || len(left) > 0 {
			t.Errorf("a hibernated sandbox has %q, %v", left.Lines(), err)
		}
		other := a.create(t, nil) // dies with the host, and takes the old slot
		if err := a.signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		a.reboot(t)
		if err := a.start("--on-shutdown=destroy"); err != nil {
			t.Fatal(err)
		}
		if _, err := other.exec("true"); err == nil {
			t.Error("the other sandbox lives")
		}
		began = time.Now()
		if err := b.resume(); err != nil {
			t.Fatal(err)
		}
		t.Logf("resume from disk took %s", time.Since(began).Round(time.Millisecond))
		if n := b.next(); n != 4+round {
			t.Errorf("the counter is at %d, want %d", n, 4+round)
		}
		b.sh("sha256sum -c /root/sum")
		if got := b.sh("cat /root/late"); got != late {
			t.Errorf("the file says %q, want %q", got, late)
		}
		if off, known := b.clockError(); off.Abs()+known > 50*time.Millisecond {
			t.Errorf("clock is off by %s (± %s)", off, known)
		}
		if name := b.sh("hostname"); name != b.id {
			t.Errorf("host name is %q", name)
		}
	}
}

// reboot removes what a restart of the host would: every process and every
// namespace of the agent's, which is dead.
func (a *agent) reboot(t *testing.T) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		data, err := os.ReadFile(p)
		pid, aerr := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil || aerr != nil || !strings.Contains(string(data), a.stateDir) || pid == os.Getpid() {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(patience); syscall.Kill(pid, 0) == nil && time.Now().Before(deadline); {
			time.Sleep(pollEvery)
		}
	}
	spaces, err := filepath.Glob("/run/netns/" + a.instance() + "-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range spaces {
		if err := netns.DeleteNamed(filepath.Base(path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll("/run/" + a.instance()); err != nil {
		t.Fatal(err)
	}
}

// TestDrain: a drained host has hibernated what ran and has no agent; the next one resumes
// it.
func TestDrain(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.count()
	b.next()
	if out, err := a.cli(t, "drain", "--hibernate"); err != nil || strings.TrimSpace(string(out)) != "drained" {
		t.Fatalf("drain: %v: %s", err, out)
	}
	select {
	case <-a.gone:
	case <-time.After(stopLimit):
		t.Fatal("the agent goes on")
	}
	if a.err != nil {
		t.Errorf("the agent ended with %v", a.err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	if n := b.next(); n != 2 {
		t.Errorf("the counter is at %d, want 2", n)
	}
}

func TestHibernateWhenIdle(t *testing.T) {
	a := sharedAgent(t)
	b := a.create(t, &hostagentv1.CreateSandboxRequest{TimeoutSec: 1, OnTimeout: "hibernate"})
	waitFor(t, "the sandbox to hibernate", func() bool { return b.info().GetStatus() == "hibernated" })
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	b.sh("true")
}

// TestFlippedPageIsTold: one flipped bit in the memory of a hibernated sandbox is
// found by a resume and by `wrenn verify`, and costs nothing once it is mended.
func TestFlippedPageIsTold(t *testing.T) {
	a := sharedAgent(t)
	b := a.create(t, nil)
	b.count()
	if n := b.next(); n != 1 {
		t.Fatalf("the counter is at %d", n)
	}
	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	mem, err := os.OpenFile(filepath.Join(a.stateDir, "sandboxes", b.id, "snapshot", "mem"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	at, err := mem.Seek(64<<20, unix.SEEK_DATA)
	if err != nil {
		t.Fatal(err)
	}
	flip := func() {
		t.Helper()
		var one [1]byte
		_, err := mem.ReadAt(one[:], at)
		if err == nil {
			one[0] ^= 0x10
			_, err = mem.WriteAt(one[:], at)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	flip()
	if err := b.resume(); connect.CodeOf(err) != connect.CodeDataLoss {
		t.Errorf("resumed from a flipped page: %v", err)
	}
	if status := b.info().Status; status != "hibernated" {
		t.Fatalf("it is %s", status)
	}
	verify := func(names ...string) (string, error) {
		out, err := exec.Command(filepath.Join(a.bin, "wrenn"), append([]string{"--host", a.url, "verify"}, names...)...).CombinedOutput()
		return string(out), err
	}
	if out, err := verify(b.id); err == nil || !strings.Contains(out, "mem is not what was written") {
		t.Errorf("wrenn verify: %v\n%s", err, out)
	}
	flip()
	if out, err := verify(); err != nil || !strings.Contains(out, b.id) || !strings.Contains(out, "boot snapshot") {
		t.Errorf("wrenn verify of all: %v\n%s", err, out)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	if n := b.next(); n != 2 {
		t.Errorf("the counter is at %d", n)
	}
}

// TestHibernateWithoutMemory: the files, the token and the variables are kept, and the
// programs are gone with the memory, of which the host's disk has nothing.
func TestHibernateWithoutMemory(t *testing.T) {
	a := sharedAgent(t)
	b := a.create(t, &hostagentv1.CreateSandboxRequest{Envs: map[string]string{"KEPT": "as told"}})
	b.count()
	if n := b.next(); n != 1 {
		t.Fatalf("the counter is at %d", n)
	}
	b.sh("echo $RANDOM-unsynced >/root/late")
	late, boot, token := b.sh("cat /root/late"), b.sh("cat /proc/sys/kernel/random/boot_id"), b.token()
	_, err := a.PauseSandbox(t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id, FilesOnly: true}))
	if err != nil {
		t.Fatal(err)
	}
	if info := b.info(); info.Status != "hibernated" || !info.FilesOnly || info.Detail != "" {
		t.Errorf("it is %v", info)
	}
	if left, err := testenv.Take(b.id); err != nil || len(left) > 0 {
		t.Errorf("it has %q, %v", left.Lines(), err)
	}
	names, taken := filesOf(t, filepath.Join(a.stateDir, "sandboxes", b.id))
	t.Logf("on the host's disk are %d KiB in %q", taken>>10, names)
	if want := []string{"manifest.json", "overlay.ext4"}; !slices.Equal(names["snapshot"], want) || taken > 40<<20 {
		t.Errorf("its snapshot has %q, want %q; %d bytes are on the disk", names["snapshot"], want, taken)
	}
	began := time.Now()
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	t.Logf("it boots in %s", time.Since(began).Round(time.Millisecond))
	if got := b.sh("cat /root/late"); got != late {
		t.Errorf("the file says %q, want %q", got, late)
	}
	if now := b.sh("cat /proc/sys/kernel/random/boot_id"); now == boot || len(now) != len(boot) {
		t.Errorf("boot id %q, was %q", now, boot)
	}
	if got := b.sh("pgrep -f '[/]tmp/counter' || echo gone; echo $KEPT; hostname"); got != "gone\nas told\n"+b.id {
		t.Errorf("it says %q", got)
	}
	if b.token() != token {
		t.Error("it has another token")
	}
	if info := b.info(); info.FilesOnly || info.EnvdVersion == "" {
		t.Errorf("it is %v", info)
	}
}

// filesOf returns the files below dir, by directory, and what they take on the disk. A
// file with two names is counted once.
func filesOf(t *testing.T, dir string) (names map[string][]string, taken int64) {
	t.Helper()
	names = map[string][]string{}
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		names[filepath.Dir(rel)] = append(names[filepath.Dir(rel)], filepath.Base(rel))
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil || seen[st.Ino] {
			return err
		}
		seen[st.Ino] = true
		taken += st.Blocks * 512
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names, taken
}
