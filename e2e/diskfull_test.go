package e2e_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// small is a file system of the test's own, with a ballast file that fills it.
type small struct {
	t       *testing.T
	dir     string
	ballast *os.File
}

// onSmallDisk starts an agent whose sandboxes live on a file system of a size.
func onSmallDisk(t *testing.T, size string, args ...string) (*agent, *small) {
	t.Helper()
	prepared := testenv.StateDir(t)
	a, err := newAgent(prepared, binDir(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, marker := range a.markers() {
		testenv.NoLeaks(t, marker)
	}
	if err := a.prepare(prepared); err != nil {
		t.Fatal(err)
	}
	disk := &small{t: t, dir: filepath.Join(a.stateDir, "sandboxes")}
	if err := os.Mkdir(disk.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk.dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	if disk.ballast, err = os.Create(filepath.Join(disk.dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		disk.ballast.Close()
		if a.running() {
			if err := a.signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
		if err := syscall.Unmount(disk.dir, 0); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(a.stateDir); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.log.String())
		}
	})
	if err := a.start(append(args, "--on-shutdown=destroy")...); err != nil {
		t.Fatal(err)
	}
	return a, disk
}

func (d *small) free() int64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		d.t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// leave lets the ballast take all but so many bytes.
func (d *small) leave(bytes int64) {
	d.t.Helper()
	info, err := d.ballast.Stat()
	if err != nil {
		d.t.Fatal(err)
	}
	if more := d.free() - bytes; more > 0 {
		err = unix.Fallocate(int(d.ballast.Fd()), 0, info.Size(), more)
	} else {
		err = d.ballast.Truncate(info.Size() + more)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// drop frees what the ballast takes.
func (d *small) drop() {
	d.t.Helper()
	if err := d.ballast.Truncate(0); err != nil {
		d.t.Fatal(err)
	}
}

// content is what a sandbox writes, so many MiB that each line differs from the next.
func content(mib int) string { return fmt.Sprintf("seq 1000000 99999999 | head -c %dM", mib) }

// writes lets a sandbox write a file of so many MiB behind the test's back.
func (b *sandbox) writes(mib int) {
	b.t.Helper()
	b.sh("setsid sh -c '" + content(mib) + " >/root/big; sync; touch /root/done' >/dev/null 2>&1 </dev/null &")
}

// wrote waits for the file and compares it, with the page cache dropped before:
// what counts is what the disk has.
func (b *sandbox) wrote(mib int) {
	b.t.Helper()
	waitFor(b.t, "the file to be written", func() bool {
		resp, err := b.exec("test", "-e", "/root/done")
		return err == nil && resp.ExitCode == 0
	})
	b.sh("rm /root/done; echo 3 >/proc/sys/vm/drop_caches; " + content(mib) + " | cmp - /root/big")
}

// waitReason waits until the sandbox runs and is marked with a reason.
func (b *sandbox) waitReason(reason string) {
	b.t.Helper()
	waitFor(b.t, fmt.Sprintf("the sandbox to run with the reason %q", reason), func() bool {
		info := b.info()
		return info != nil && info.Status == "running" && info.Reason == reason
	})
}

// metrics is the text of the agent's metrics.
func (a *agent) metrics(t testing.TB) string {
	t.Helper()
	resp, err := http.Get(a.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// reasons are those of a sandbox's events while it ran.
func (b *sandbox) reasons() (list []string) {
	b.t.Helper()
	stream, err := b.a.WatchEvents(b.t.Context(), connect.NewRequest(&hostagentv1.WatchEventsRequest{SandboxId: b.id, NoFollow: true}))
	if err != nil {
		b.t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if e := stream.Msg().Event; e != nil && e.Kind == "" && e.From == "running" && e.To == "running" {
			list = append(list, e.Reason)
		}
	}
	return list
}

// TestFastWriter: a sandbox that fills the host's disk stands still before it is
// full. Its neighbour goes on writing, nothing new is made, and with room it goes
// on by itself with all that it wrote.
func TestFastWriter(t *testing.T) {
	a, disk := onSmallDisk(t, "800m", "--keep-free=96")
	req := func() *hostagentv1.CreateSandboxRequest { return &hostagentv1.CreateSandboxRequest{MemoryMb: 256} }
	writer, neighbour := a.create(t, req()), a.create(t, req())
	const mib = 96
	disk.leave(110 << 20)
	writer.writes(mib)
	writer.waitReason("disk_full")

	_, err := writer.exec("true")
	wantCode(t, err, connect.CodeResourceExhausted, "the host's disk is full", "goes on when there is room")
	for n := range 20 {
		if got := neighbour.sh(fmt.Sprintf("head -c 100000 /dev/zero >/root/%d; sync; cat /root/* | wc -c", n)); got != fmt.Sprint((n+1)*100000) {
			t.Errorf("the neighbour has written %s", got)
		}
	}
	if info := neighbour.info(); info.Reason != "" {
		t.Errorf("the neighbour is %s (%s)", info.Status, info.Reason)
	}
	wantCode(t, writer.hibernate(), connect.CodeResourceExhausted, "the host's disk is full")
	_, err = writer.snapshot("no-room")
	wantCode(t, err, connect.CodeResourceExhausted, "the host's disk is full")
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(req()))
	wantCode(t, err, connect.CodeResourceExhausted, "must remain")
	wantCode(t, neighbour.hibernate(), connect.CodeResourceExhausted, "must remain")
	for _, line := range []string{
		`wrenn_sandboxes_marked{reason="disk_full"} 1`, `wrenn_disk_bytes{what="kept"} 1.00663296e+08`, `wrenn_sandboxes{state="running"} 2`,
	} {
		if text := a.metrics(t); !strings.Contains(text, line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
	// A pause is a pause, and a resume says why not.
	if err := writer.pause(); err != nil {
		t.Fatal(err)
	}
	if info := writer.info(); info.Status != "paused" || info.Reason != "" {
		t.Errorf("it is %s (%s)", info.Status, info.Reason)
	}
	wantCode(t, writer.resume(), connect.CodeResourceExhausted, "the host's disk is full")
	if free := disk.free(); free == 0 {
		t.Error("the disk is full")
	}

	disk.drop()
	waitFor(t, "the sandbox to be resumed", func() bool { return writer.resume() == nil })
	disk.leave(100 << 20) // for another round, in which it goes on by itself
	writer.waitReason("disk_full")
	disk.drop()
	writer.waitReason("")
	writer.wrote(mib)
	if off, known := writer.clockError(); off.Abs()+known > 50e6 {
		t.Errorf("its clock is off by %s (± %s)", off, known)
	}
	if got := strings.Join(writer.reasons(), " "); got != "disk_full disk_full " {
		t.Errorf("the events tell %q", got)
	}
	for _, b := range []*sandbox{writer, neighbour} {
		if err := b.destroy(); err != nil {
			t.Error(err)
		}
	}
	a.buildsOnAFullDisk(t, disk)
}

// buildsOnAFullDisk builds what the disk has no room for.
func (a *agent) buildsOnAFullDisk(t *testing.T, disk *small) {
	t.Helper()
	disk.leave(160 << 20)
	dir := contextDir(t, "FROM minimal\nRUN echo it writes; head -c 300M /dev/urandom >/srv/big; sync\n")
	out, err := a.cli(t, "template", "build", "--progress", "plain", "-t", "too-large", dir)
	if err == nil || !strings.Contains(out, "it writes") || !strings.Contains(out, "the host's disk is full") {
		t.Errorf("a build on a full disk: %v\n%s", err, out)
	}
	disk.drop()
	if out, err = a.cli(t, "create", "too-large"); err == nil {
		t.Errorf("it made a template: %s", out)
	}
	for _, pattern := range []string{"builds/work/*", "builds/cache/*", "templates/.build*", "sandboxes/sb-*"} {
		if left, _ := filepath.Glob(filepath.Join(a.stateDir, pattern)); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// TestFullDisk: where something else fills the disk to the last byte, the VMs that
// write stand still. An agent that is killed and started again finds them so, and
// with room they go on by themselves with all that they wrote.
func TestFullDisk(t *testing.T) {
	a, disk := onSmallDisk(t, "800m", "--keep-free=64")
	const mib = 32
	b, c := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256}), a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	disk.leave(0)
	b.writes(mib)
	b.waitReason("disk_full")
	if info := b.info(); !strings.Contains(info.Detail, "what it writes waits") {
		t.Errorf("it says %q", info.Detail)
	}
	_, err := b.exec("true")
	wantCode(t, err, connect.CodeResourceExhausted, "the host's disk is full")
	// Not even the record of a pause has room: then it is none.
	wantCode(t, b.pause(), connect.CodeResourceExhausted, "the host's disk is full")
	b.waitReason("disk_full")
	if got := c.sh("echo one that does not write goes on"); got == "" {
		t.Error("the neighbour says nothing")
	}

	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--keep-free=64", "--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	b.waitReason("disk_full")
	if got := c.sh("echo still"); got != "still" {
		t.Errorf("the neighbour says %q", got)
	}
	disk.drop()
	b.waitReason("")
	b.wrote(mib)

	// Paused with a write that waits, hibernated, and resumed from disk.
	disk.leave(0)
	b.writes(mib + 16)
	b.waitReason("disk_full")
	disk.leave(1 << 20) // for the record
	if err := b.pause(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, b.resume(), connect.CodeResourceExhausted, "the host's disk is full")
	wantCode(t, b.hibernate(), connect.CodeResourceExhausted, "must remain")
	disk.drop()
	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	b.wrote(mib + 16)
}
