package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

func TestGuestMounts(t *testing.T) {
	b := sharedBox(t)
	types := map[string]string{}
	for line := range strings.Lines(b.sh("cat /proc/mounts")) {
		f := strings.Fields(line)
		types[f[1]] = f[2]
	}
	for path, want := range map[string]string{
		"/": "overlay", "/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs", "/dev/pts": "devpts",
		"/dev/shm": "tmpfs", "/run": "tmpfs", "/sys/fs/cgroup": "cgroup2",
	} {
		if types[path] != want {
			t.Errorf("%s is %q, want %s", path, types[path], want)
		}
	}
	if got := b.sh("stat -c '%a %U' /tmp /dev/shm"); got != "1777 root\n1777 root" {
		t.Errorf("/tmp and /dev/shm are %q", got)
	}
	b.sh("for f in null zero full random urandom tty ptmx fd stdin stdout stderr; do test -e /dev/$f || exit 1; done; test -e /dev/fd/0")
	b.sh("echo x >/dev/null; echo x >/dev/shm/f && rm /dev/shm/f; python3 -c 'import os; os.openpty()'")
}

func TestGuestIdentity(t *testing.T) {
	b := sharedBox(t)
	for what, script := range map[string]string{
		"the kernel": "uname -n", "/etc/hostname": "cat /etc/hostname", "python": "python3 -c 'import socket; print(socket.gethostname())'",
		"its own address's name": "getent hosts 169.254.0.21 | awk '{print $2}'", "the environment": "echo $E2B_SANDBOX_ID",
	} {
		if got := b.sh(script); got != b.id {
			t.Errorf("%s says %q, want %s", what, got, b.id)
		}
	}
	if got := b.sh(`id -un; echo $HOME $USER; pwd; tr '\0' ' ' </proc/1/cmdline; cat /proc/1/comm`); !strings.HasPrefix(got,
		"root\n/root root\n/root\n") {
		t.Errorf("commands run as %q", got)
	}
	if got := b.sh("cat /proc/1/oom_score_adj"); got != "-1000" {
		t.Errorf("envd's oom_score_adj is %s", got)
	}
	if got := b.sh("cat /proc/self/oom_score_adj"); got == "-1000" {
		t.Error("commands cannot be killed when memory is short")
	}
}

func TestGuestClock(t *testing.T) {
	b := sharedBox(t)
	check := func(when string) {
		t.Helper()
		before := time.Now()
		seconds, err := strconv.ParseFloat(b.sh("python3 -c 'import time; print(time.time())'"), 64)
		after := time.Now()
		if err != nil {
			t.Fatal(err)
		}
		if at := time.UnixMilli(int64(seconds * 1000)); at.Before(before.Add(-time.Second)) || at.After(after.Add(time.Second)) {
			t.Errorf("%s the guest's clock says %s, the host's %s to %s", when, at, before, after)
		}
	}
	check("at first")
	if err := b.pause(); err != nil {
		t.Fatal(err)
	}
	paused := time.Now()
	waitFor(t, "time to pass", func() bool { return time.Since(paused) > 2500*time.Millisecond })
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	check("after a pause")
}

func TestGuestNetworkSetUp(t *testing.T) {
	b := sharedBox(t)
	if got := b.sh("ls /sys/class/net"); strings.Join(strings.Fields(got), " ") != "eth0 lo" {
		t.Errorf("links are %q", got)
	}
	if got := b.sh("cat /proc/net/if_inet6"); strings.Contains(got, "eth0") || !strings.Contains(got, "lo") {
		t.Errorf("IPv6 addresses are %q, want the loopback's alone", got)
	}
	var servers []netip.Addr
	for line := range strings.Lines(b.sh("cat /etc/resolv.conf")) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
			servers = append(servers, netip.MustParseAddr(f[1]))
		}
	}
	if want := network.Resolvers(); len(want) > 0 && !slices.Equal(servers, want) || len(servers) == 0 {
		t.Errorf("the guest asks %v for names, want %v", servers, want)
	}
	if got := b.sh(`python3 - <<'END'
import socket
l = socket.socket(); l.bind(("127.0.0.1", 0)); l.listen()
c = socket.create_connection(("localhost", l.getsockname()[1]), 2)
l.accept()[0].sendall(b"over loopback")
print(c.recv(99).decode())
END`); got != "over loopback" {
		t.Errorf("loopback: %q", got)
	}
}

func TestGuestReapsOrphans(t *testing.T) {
	b := sharedBox(t)
	b.sh("mkfifo /tmp/gate")
	defer b.sh("rm /tmp/gate")
	count := func(stat string) int {
		t.Helper()
		resp, err := b.exec("sh", "-c", `exec grep -ls '`+stat+`' /proc/[0-9]*/stat`)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(resp.Stdout, []byte("\n"))
	}
	// They wait at the gate until their parent has gone, then all end at once.
	for range 4 {
		b.sh("i=0; while [ $i -lt 250 ]; do (: </tmp/gate) & i=$((i+1)); done")
		if n := count("^[0-9]* (sh) S 1 "); n != 250 {
			t.Fatalf("%d of 250 orphans are there", n)
		}
		b.sh(": >/tmp/gate")
		waitFor(t, "the orphans to end and be reaped", func() bool { return count("^[0-9]* (sh) . 1 ") == 0 })
	}
	if n := count("^[0-9]* (.*) Z"); n != 0 {
		t.Errorf("%d processes are defunct", n)
	}
}

func TestGuestPython(t *testing.T) {
	b := sharedBox(t)
	const script = `import sys, json, ssl, hashlib, subprocess; print(json.dumps({"six by seven": 6*7}))`
	if got := b.sh(`python3 -c '` + script + `'`); got != `{"six by seven": 42}` {
		t.Errorf("python3 says %q", got)
	}
}

// A sandbox writes to its own disk, never to the image that all share.
func TestDisk(t *testing.T) {
	b := sharedBox(t)
	b.sh("head -c 50000000 /dev/urandom >/root/big; echo changed >>/etc/passwd; rm /usr/bin/apt* ; mkdir -p /opt/x; sync")
	defer b.sh("rm -r /root/big /opt/x; sed -i '/^changed$/d' /etc/passwd")
	f := strings.Fields(b.sh("df -Pk / | tail -1"))
	size, _ := strconv.Atoi(f[1])
	used, _ := strconv.Atoi(f[2])
	if size < 3500<<10 || size > 4096<<10 || used < 47<<10 || used > 500<<10 {
		t.Errorf("df says %v, want about 4 GiB with some 50 MB used", f)
	}

	// What the disk takes on the host is what was written, about.
	info, err := os.Stat(filepath.Join(b.a.stateDir, "sandboxes", b.id, "overlay.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	if taken := info.Sys().(*syscall.Stat_t).Blocks * 512; taken < 40<<20 || taken > 400<<20 || info.Size() != 4<<30 {
		t.Errorf("the overlay is %d bytes long and takes %d", info.Size(), taken)
	}
	checkBase(t, b.a)
}

// checkBase compares the base image with what setup wrote down of it.
func checkBase(t *testing.T, a *agent) {
	t.Helper()
	dir := a.buildDir(t, "minimal")
	var manifest struct{ Files map[string]snapfile.File }
	data, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err == nil {
		err = json.Unmarshal(data, &manifest)
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := snapfile.Digest(t.Context(), filepath.Join(dir, "base.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	if want := manifest.Files["base.ext4"]; got != want {
		t.Errorf("the base image is %v, was made as %v", got, want)
	}
}

func TestSize(t *testing.T) {
	b := sharedAgent(t).create(t, &hostagentv1.CreateSandboxRequest{Vcpus: 2, MemoryMb: 256})
	if got := b.sh("nproc"); got != "2" {
		t.Errorf("nproc says %s, want 2", got)
	}
	kib, err := strconv.Atoi(b.sh("awk '/MemTotal/ {print $2}' /proc/meminfo"))
	if err != nil || kib < 180<<10 || kib > 256<<10 {
		t.Errorf("the guest has %d KiB, want a little less than 256 MiB (%v)", kib, err)
	}
	if s := b.info(); s.Vcpus != 2 || s.MemoryMb != 256 {
		t.Errorf("listed as %v", s)
	}
}

// Two sandboxes have the same address inside and do not notice each other.
func TestTwoSandboxes(t *testing.T) {
	a := sharedAgent(t)
	one := sharedBox(t)
	two := a.create(t, nil)

	both := func(script string) (string, string) {
		t.Helper()
		var wg sync.WaitGroup
		var first string
		wg.Go(func() { first = one.sh(script) })
		second := two.sh(script)
		wg.Wait()
		return first, second
	}
	if x, y := both("cat /etc/hostname"); x != one.id || y != two.id {
		t.Errorf("they are called %s and %s", x, y)
	}
	if x, y := both("cat /proc/sys/kernel/random/boot_id"); x == y {
		t.Errorf("they share a boot id: %s", x)
	}
	const address = `python3 -c 'import fcntl, socket, struct; s = socket.socket()
print(socket.inet_ntoa(fcntl.ioctl(s, 0x8915, struct.pack("256s", b"eth0"))[20:24]))'`
	if x, y := both(address); x != "169.254.0.21" || y != x {
		t.Errorf("their addresses are %s and %s", x, y)
	}
	if x, y := both("head -c 32 /dev/urandom | base64"); x == y {
		t.Errorf("they share random bytes: %s", x)
	}
	one.sh("echo one >/root/who")
	two.sh("echo two >/root/who")
	if x, y := both("cat /root/who"); x != "one" || y != "two" {
		t.Errorf("their files hold %s and %s", x, y)
	}
	one.sh("rm /root/who")

	// Traffic of one is not seen by the other.
	countOne, countTwo := tapBytes(t, one), tapBytes(t, two)
	two.sh("head -c 4000000 /dev/urandom")
	if d := tapBytes(t, two) - countTwo; d < 4_000_000 {
		t.Errorf("4 MB out of a sandbox are %d bytes on its tap", d)
	}
	if d := tapBytes(t, one) - countOne; d > 100_000 {
		t.Errorf("%d bytes passed the other's tap", d)
	}
}

// addrs are the names and addresses of a sandbox's slot.
func (b *sandbox) addrs() network.Addrs {
	b.t.Helper()
	plan := network.Plan{
		Instance: b.a.instance(),
		Hosts:    netip.MustParsePrefix(b.a.hostRange()),
		Veths:    netip.MustParsePrefix(b.a.linkRange()),
	}
	ip, err := netip.ParseAddr(b.info().HostIp)
	if err != nil {
		b.t.Fatal(err)
	}
	bytes := ip.As4()
	addrs := plan.Addrs(network.Slot(int(bytes[2])<<8 | int(bytes[3])))
	if addrs.HostIP != ip {
		b.t.Fatalf("host ip %s is not in the plan", ip)
	}
	return addrs
}

// tapBytes is how many bytes a sandbox has sent.
func tapBytes(t *testing.T, b *sandbox) uint64 {
	t.Helper()
	ns, err := netns.GetFromPath(b.addrs().NetNSPath)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	tap, err := h.LinkByName(network.Tap)
	if err != nil {
		t.Fatal(err)
	}
	return tap.Attrs().Statistics.RxBytes
}

// From a guest nothing of the host and no other sandbox can be reached, by
// whatever address.
func TestGuestCannotReachHost(t *testing.T) {
	a := sharedAgent(t)
	b := sharedBox(t)
	other := a.create(t, nil)
	other.sh("nohup python3 -m http.server 8000 >/dev/null 2>&1 &")

	// A service of the host on every address that it has.
	service, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	hits := make(chan net.Addr, 100)
	go func() {
		for {
			conn, err := service.Accept()
			if err != nil {
				return
			}
			hits <- conn.RemoteAddr()
			conn.Close()
		}
	}()
	port := service.Addr().(*net.TCPAddr).Port
	_, agentPort, _ := net.SplitHostPort(a.addr)

	mine, theirs := b.addrs(), other.addrs()
	hosts := []string{
		mine.HostVeth.Addr().String(), theirs.HostVeth.Addr().String(), network.GuestGateway.String(),
		mine.NSVeth.Addr().String(), theirs.NSVeth.Addr().String(), mine.HostIP.String(), theirs.HostIP.String(), "169.254.169.254",
	}
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range list {
		if ip := addr.(*net.IPNet).IP; ip.To4() != nil && !ip.IsLoopback() {
			hosts = append(hosts, ip.String())
			// The test means something: from the host it can be reached.
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip.String(), strconv.Itoa(port)), time.Second)
			if err != nil {
				t.Fatalf("the host does not reach itself: %v", err)
			}
			conn.Close()
			<-hits
		}
	}
	conn, err := net.DialTimeout("tcp", theirs.HostIP.String()+":8000", 2*time.Second)
	for deadline := time.Now().Add(patience); err != nil && time.Now().Before(deadline); time.Sleep(pollEvery) {
		conn, err = net.DialTimeout("tcp", theirs.HostIP.String()+":8000", 2*time.Second)
	}
	if err != nil {
		t.Fatalf("the host does not reach the other sandbox: %v", err)
	}
	conn.Close()

	slices.Sort(hosts)
	hosts = slices.Compact(hosts)
	got := b.sh(fmt.Sprintf(`python3 - <<'END'
import socket, threading
reached = []
def attempt(host, port):
    try:
        s = socket.create_connection((host, port), 1.5)
        reached.append(f"{host}:{port}")
        s.close()
    except OSError:
        pass
threads = [threading.Thread(target=attempt, args=(h, p)) for h in "%s".split() for p in (%d, %s, 49983, 8000, 22)]
for t in threads: t.start()
for t in threads: t.join()
print(" ".join(sorted(reached)))
END`, strings.Join(hosts, " "), port, agentPort))
	// Nothing but oneself: envd through one's own host-side address would be
	// an answer of the guest, but even that does not pass.
	if got != "" {
		t.Errorf("the guest reached %s", got)
	}
	select {
	case from := <-hits:
		t.Errorf("%s reached a service of the host", from)
	default:
	}
}
