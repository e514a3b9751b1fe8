package e2e_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func (b *sandbox) snapshot(name string) (*hostagentv1.SnapshotSandboxResponse, error) {
	resp, err := b.a.SnapshotSandbox(b.t.Context(), connect.NewRequest(&hostagentv1.SnapshotSandboxRequest{SandboxId: b.id, Name: name}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func (a *agent) snapshots(t testing.TB) []*hostagentv1.Snapshot {
	t.Helper()
	resp, err := a.ListSnapshots(t.Context(), connect.NewRequest(&hostagentv1.ListSnapshotsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.Snapshots
}

func (a *agent) deleteSnapshot(t testing.TB, name string) error {
	_, err := a.DeleteSnapshot(t.Context(), connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Name: name}))
	return err
}

// from makes a sandbox that must have started in the way named.
func (a *agent) from(t testing.TB, snapshot, startedFrom string) (*sandbox, string) {
	t.Helper()
	resp, err := a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: snapshot}))
	if err != nil {
		t.Fatalf("create from %s: %v", snapshot, err)
	}
	if resp.Msg.StartedFrom != startedFrom {
		t.Errorf("it started from %q (%s), want %q", resp.Msg.StartedFrom, resp.Msg.Why, startedFrom)
	}
	return &sandbox{t, a, resp.Msg.SandboxId}, resp.Msg.Why
}

// TestSnapshot: sandboxes go on from a snapshot after its source, and the agent
// that made it, are gone; each has its own identity.
func TestSnapshot(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	b.count()
	b.next()
	b.sh("echo before >/root/file; head -c 1000000 /dev/urandom >/root/data; sha256sum /root/data >/root/sum")
	boot := b.sh("cat /proc/sys/kernel/random/boot_id")
	secret := b.record().Token
	made, err := b.snapshot("prepared")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the snapshot took %d ms and %d MiB, the source stood still for %d ms", made.TookMs, made.Snapshot.SizeBytes>>20, made.PausedMs)
	if s := made.Snapshot; s.Name != "prepared" || s.SandboxId != b.id || s.Template != "minimal" || s.Vcpus != 1 ||
		s.MemoryMb != 256 || s.CreatedAtUnix == 0 || s.SizeBytes < 10<<20 {
		t.Errorf("it says %v", s)
	}
	if got := b.next(); got != 2 { // it goes on
		t.Errorf("the source counts %d, want 2", got)
	}
	b.sh("echo after >/root/file")
	manifest, err := os.ReadFile(filepath.Join(a.buildDir(t, "prepared"), "manifest.json"))
	if err != nil || strings.Contains(string(manifest), secret) {
		t.Errorf("the manifest holds the source's token: %v", err)
	}

	_, err = b.snapshot("prepared")
	wantCode(t, err, connect.CodeAlreadyExists, "prepared")
	_, err = b.snapshot("minimal")
	wantCode(t, err, connect.CodeAlreadyExists, "minimal", "template")
	for _, name := range []string{"../x", "A", ".x", strings.Repeat("a", 129)} {
		_, err = b.snapshot(name)
		wantCode(t, err, connect.CodeInvalidArgument, "snapshot name")
	}
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: "prepared", MemoryMb: 512}))
	wantCode(t, err, connect.CodeInvalidArgument, "256 MiB")
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: "nothing"}))
	wantCode(t, err, connect.CodeNotFound, "template 'nothing' not found")

	if err := b.destroy(); err != nil {
		t.Fatal(err)
	}
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if list := a.snapshots(t); len(list) != 1 || list[0].Name != "prepared" || list[0].SizeBytes != made.Snapshot.SizeBytes {
		t.Fatalf("the list is %v", list)
	}
	x, _ := a.from(t, "prepared", "snapshot")
	y, _ := a.from(t, "prepared", "snapshot")
	seen := map[string]string{boot: b.id}
	for _, z := range []*sandbox{x, y} {
		if got := z.next(); got != 2 {
			t.Errorf("%s counts %d, want 2", z.id, got)
		}
		if got := z.sh("cat /root/file; sha256sum -c --quiet /root/sum"); got != "before" {
			t.Errorf("the file says %q", got)
		}
		for _, script := range []string{
			"hostname", "cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id", "cat /proc/sys/kernel/random/uuid",
			"head -c 32 /dev/urandom | sha256sum", "head -c 32 /dev/random | sha256sum", "echo $E2B_SANDBOX_ID",
		} {
			out := z.sh(script)
			if was, again := seen[out]; again && was != z.id {
				t.Errorf("%s: %s in %s and %s", script, out, was, z.id)
			}
			seen[out] = z.id
		}
		if token := z.record().Token; seen[token] != "" || token == secret || token == "" {
			t.Error("a token comes again")
		} else {
			seen[token] = z.id
		}
		if name := z.sh("hostname"); name != z.id {
			t.Errorf("host name of %s is %q", z.id, name)
		}
		if off, known := z.clockError(); off.Abs()+known > 50e6 {
			t.Errorf("clock of %s is off by %s (± %s)", z.id, off, known)
		}
		if info := z.info(); info.MemoryMb != 256 || info.Template != "minimal" {
			t.Errorf("it is %v", info)
		}
	}
	x.sh("echo mine >/root/file")
	if got := y.sh("cat /root/file"); got != "before" {
		t.Errorf("the disk is shared: %q", got)
	}

	// They go on without it, as any sandbox does.
	if err := a.deleteSnapshot(t, "prepared"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, a.deleteSnapshot(t, "prepared"), connect.CodeNotFound, "prepared")
	wantCode(t, a.deleteSnapshot(t, "../sandboxes"), connect.CodeInvalidArgument)
	if got := x.next(); got != 3 {
		t.Errorf("it counts %d, want 3", got)
	}
	if err := x.pause(); err != nil {
		t.Fatal(err)
	}
	if made, err = x.snapshot(""); err != nil || made.PausedMs == 0 {
		t.Fatalf("of a paused clone: %v, %v", made, err)
	}
	if info := x.info(); info.Status != "paused" {
		t.Errorf("the source is %s", info.Status)
	}
	z, _ := a.from(t, made.Snapshot.Name, "snapshot")
	if got := z.next(); got != 4 {
		t.Errorf("it counts %d, want 4", got)
	}
	if got := z.sh("cat /root/file"); got != "mine" {
		t.Errorf("the file says %q", got)
	}
}

// TestSnapshotThatDoesNotFit boots from the snapshot's disk, and one that is
// damaged is refused.
func TestSnapshotThatDoesNotFit(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.sh("echo kept >/root/file; echo 1 >/dev/shm/in-memory; head -c 1000000 /dev/zero | tr '\\0' x >/root/data")
	id, boot := b.sh("cat /etc/machine-id"), b.sh("cat /proc/sys/kernel/random/boot_id")
	for _, name := range []string{"old", "damaged"} {
		if _, err := b.snapshot(name); err != nil {
			t.Fatal(err)
		}
	}
	manifest := filepath.Join(a.buildDir(t, "old"), "manifest.json")
	data, err := os.ReadFile(manifest)
	var m map[string]any
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err == nil {
		m["key"] = "of another vmm"
		data, err = json.Marshal(m)
	}
	if err == nil {
		err = os.WriteFile(manifest, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c, why := a.from(t, "old", "cold boot")
	if why == "" || c.record().Restored {
		t.Errorf("it does not say why it booted: %q", why)
	}
	if got := c.sh("cat /root/file; wc -c </root/data; ls /dev/shm"); got != "kept\n1000000" {
		t.Errorf("it has %q", got)
	}
	if c.sh("cat /etc/machine-id") == id || c.sh("cat /proc/sys/kernel/random/boot_id") == boot || c.sh("hostname") != c.id {
		t.Error("it takes itself for its source")
	}

	mem := filepath.Join(a.buildDir(t, "damaged"), "mem")
	f, err := os.OpenFile(mem, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), 123456); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := a.signal(syscall.SIGKILL); err != nil { // it knows what it wrote
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: "damaged"}))
	wantCode(t, err, connect.CodeDataLoss, `snapshot "damaged"`, "damaged: mem is not what was written")
	if strings.Contains(err.Error(), a.stateDir) {
		t.Errorf("a client reads a path of the host: %v", err)
	}
	if err := a.deleteSnapshot(t, "damaged"); err != nil {
		t.Error(err)
	}
}

// smallTemplates puts the templates of the agent on a file system of 8 MiB. The build of
// "minimal" is where it was. restore takes that back.
func (a *agent) smallTemplates(t *testing.T) (restore func()) {
	t.Helper()
	build := a.buildDir(t, "minimal")
	info, err := os.ReadFile(filepath.Join(filepath.Dir(build), "template.json"))
	if err != nil {
		t.Fatal(err)
	}
	dir, aside := filepath.Join(a.stateDir, "templates"), filepath.Join(a.stateDir, "aside")
	if err := errors.Join(os.Rename(dir, aside), os.Mkdir(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	err = os.MkdirAll(build, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(filepath.Dir(build), "template.json"), info, 0o600)
	}
	if err == nil {
		err = syscall.Mount(filepath.Join(aside, strings.TrimPrefix(build, dir)), build, "", syscall.MS_BIND, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(build, syscall.MNT_DETACH) })
	return func() {
		t.Helper()
		err := errors.Join(syscall.Unmount(build, syscall.MNT_DETACH), syscall.Unmount(dir, syscall.MNT_DETACH))
		err = errors.Join(err, os.Remove(dir), os.Rename(aside, dir))
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestSnapshotOnAFullDisk says so, leaves nothing, and the source goes on.
func TestSnapshotOnAFullDisk(t *testing.T) {
	a := startAgent(t)
	b := a.create(t, nil)
	b.count()
	restore := a.smallTemplates(t)
	for n := range 2 { // with what is left of the first, the second would say more
		_, err := b.snapshot("big")
		wantCode(t, err, connect.CodeResourceExhausted, "the host's disk is full")
		if strings.Contains(err.Error(), a.stateDir) {
			t.Errorf("a client reads a path of the host: %v", err)
		}
		left, err := filepath.Glob(filepath.Join(a.stateDir, "templates", ".*"))
		if all := a.snapshots(t); err != nil || len(left) > 0 || len(all) > 0 {
			t.Errorf("left: %q, %v, %v", left, all, err)
		}
		if got := b.next(); got != n+1 {
			t.Errorf("the source counts %d, want %d", got, n+1)
		}
	}
	restore()
	if _, err := b.snapshot("big"); err != nil {
		t.Error(err)
	}
}
