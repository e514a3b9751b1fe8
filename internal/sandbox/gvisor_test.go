package sandbox_test

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/gvisor"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/launch"
)

// real is a manager of real sandboxes, with gVisor's driver and a network of its own.
type real struct {
	*testing.T
	*sandbox.Manager
	cfg sandbox.Config
	net func() *network.Network
}

// newReal returns such a manager over what setup has prepared.
func newReal(t *testing.T, change ...func(*sandbox.Config)) *real {
	t.Helper()
	prepared := testenv.StateDir(t)
	testenv.NoLeaks(t, "wrennmg")
	bin := os.Getenv("WRENN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	testenv.Program(t, filepath.Join(bin, "sentry"))
	dir := filepath.Join(filepath.Dir(prepared), "wrenn-manager-"+strings.ToLower(rand.Text()[:8]))
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, part := range []string{"kernels", "templates", "seeds"} {
		link(t, filepath.Join(prepared, part), filepath.Join(dir, part))
	}
	store, err := template.Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if tmpl, err := store.Get("minimal"); err != nil || tmpl.EROFS.Path == "" || tmpl.InitImage == "" {
		t.Skipf("the prepared state has no images for gVisor, run `wrenn setup` with it again: %v", err)
	}
	plan := network.DefaultPlan()
	plan.Instance = "wrennmg"
	plan.Hosts, plan.Veths = netip.MustParsePrefix("10.177.0.0/16"), netip.MustParsePrefix("10.178.0.0/16")
	const uids = 1_900_400_000 // no agent's
	r := &real{T: t, cfg: sandbox.Config{
		StateDir: dir, RunDir: "/run/" + plan.Instance,
		Drivers:    []vmm.Driver{gvisor.New(gvisor.Config{Sentry: filepath.Join(bin, "sentry"), UID: uids, GID: uids})},
		Templates:  store,
		KillStrays: launch.KillStrays, NetNSOf: launch.NetNSOf,
		Guests: func(a netip.Addr, token string) sandbox.Guest {
			return guest.New(netip.AddrPortFrom(a, guestapi.Port), token)
		},
		Capacity: sandbox.Capacity{
			Resources: sandbox.Resources{Sandboxes: 50, VCPUs: 50, MemMiB: 1 << 20}, Starts: 2, StartQueue: time.Minute,
		},
		OverlayMiB: 256, BaseUID: uids, BootTimeout: time.Minute, KeepStopped: time.Hour,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}}
	for _, f := range change {
		f(&r.cfg)
	}
	r.net = func() *network.Network {
		return network.New(plan, network.Options{BaseUID: uids, Egress: network.Public})
	}
	r.open()
	t.Cleanup(func() {
		r.shutdown(true)
		if err := r.cfg.Network.(*network.Network).Teardown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return r
}

// open is the start of an agent.
func (r *real) open() sandbox.Recovery {
	r.Helper()
	r.cfg.Network = r.net()
	m, found, err := sandbox.Open(r.Context(), r.cfg)
	if err != nil {
		r.Fatal(err)
	}
	r.Manager = m
	return found
}

func (r *real) shutdown(destroy bool) {
	r.Helper()
	if err := r.Shutdown(context.Background(), destroy); err != nil {
		r.Error(err)
	}
}

// link makes hard links of the files below from, but of those with locks.
func link(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(from, path)
		switch {
		case err != nil || rerr != nil:
			return errors.Join(err, rerr)
		case e.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		case strings.HasSuffix(e.Name(), "lock"):
			return nil
		}
		return os.Link(path, filepath.Join(to, rel))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// sh runs a command in a sandbox and returns what it printed.
func (r *real) sh(id sandbox.ID, text string) string {
	r.Helper()
	result, err := r.Exec(r.Context(), id, guest.Command{Cmd: "/bin/sh", Args: []string{"-c", text}, Timeout: 30 * time.Second})
	if err != nil {
		r.Fatalf("%s: %v", text, err)
	}
	return strings.TrimSpace(string(result.Stdout) + string(result.Stderr))
}

func (r *real) make(req sandbox.CreateRequest, from string) sandbox.ID {
	r.Helper()
	made, err := r.Create(r.Context(), req)
	if err != nil {
		r.Fatal(err)
	}
	if made.VMM != gvisor.Name || made.Isolation != vmm.UserSpaceKernel || made.From != from {
		r.Errorf("made with %s (%s) from %s, want %s: %s", made.VMM, made.Isolation, made.From, from, made.Why)
	}
	return made.ID
}

// TestLifeUnderGVisor: what a sandbox may be asked for works with gVisor's driver, whose
// disk is in the memory.
func TestLifeUnderGVisor(t *testing.T) {
	r := newReal(t)
	ctx := t.Context()
	first := r.make(sandbox.CreateRequest{MemMiB: 256}, sandbox.FromBoot)
	id := r.make(sandbox.CreateRequest{MemMiB: 256}, sandbox.FromReady)
	bootID := "cat /proc/sys/kernel/random/boot_id"
	if one, other := r.sh(first, bootID), r.sh(id, bootID); len(one) != 36 || one == other {
		t.Errorf("boot ids %q and %q", one, other)
	}
	want := func(what string, id sandbox.ID, count string) {
		t.Helper()
		got := r.sh(id, "hostname; sha256sum /root/data | cut -c1-8; cat /tmp/count")
		if got != string(id)+"\n"+r.sh(id, "cat /root/sum")+"\n"+count {
			t.Errorf("%s: %q, want count %s", what, got, count)
		}
	}
	r.sh(id, "head -c 5000000 /dev/urandom >/root/data; sha256sum /root/data | cut -c1-8 >/root/sum; echo 1 >/tmp/count")
	want("new", id, "1")
	if err := errors.Join(r.Pause(ctx, id), r.Resume(ctx, id)); err != nil {
		t.Fatal(err)
	}
	want("resumed", id, "1")

	if err := r.Hibernate(ctx, id, sandbox.Hibernation{}); err != nil {
		t.Fatal(err)
	}
	// The next agent finds the one and resumes the other, with another guest daemon prepared.
	r.shutdown(false)
	if found := r.open(); !slices.Contains(found.Adopted, first) {
		t.Errorf("found %+v, want %s adopted", found, first)
	}
	if got := r.sh(first, "hostname"); got != string(first) {
		t.Errorf("adopted: %q", got)
	}
	if err := r.Resume(ctx, id); err != nil {
		t.Fatal(err)
	}
	want("resumed from disk", id, "1")
	r.sh(id, "echo 2 >/tmp/count")

	forked, err := r.Fork(ctx, id, sandbox.ForkRequest{Count: 2})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range forked.Sandboxes {
		want("forked", f.ID, "2")
		r.sh(f.ID, "echo 3 >/tmp/count")
	}
	want("source", id, "2")

	if err := r.Pause(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Snapshot(ctx, id, sandbox.SnapshotRequest{Name: "kept"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Destroy(ctx, id), r.Destroy(ctx, first)); err != nil {
		t.Fatal(err)
	}
	clone := r.make(sandbox.CreateRequest{Template: "kept"}, sandbox.FromSnapshot)
	want("from a snapshot", clone, "2")
	if err := r.Hibernate(ctx, clone, sandbox.Hibernation{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.DeleteSnapshot(ctx, "", "kept"), r.Resume(ctx, clone)); err != nil {
		t.Fatal(err)
	}
	want("resumed without its snapshot", clone, "2")
}

// TestWaitingGuestUnderGVisor: guests wait by default, and a sandbox is made of one. A program
// that takes all memory ends, and nothing else does.
func TestWaitingGuestUnderGVisor(t *testing.T) {
	r := newReal(t, func(c *sandbox.Config) { c.Warm = sandbox.WarmAuto })
	if err := r.Destroy(t.Context(), r.make(sandbox.CreateRequest{}, sandbox.FromBoot)); err != nil {
		t.Fatal(err)
	}
	for s := r.Stats(); s.Warm == 0 || s.Warm < s.WarmWanted; s = r.Stats() {
		if s.WarmWanted == 0 || t.Context().Err() != nil {
			t.Fatalf("%+v", s)
		}
		time.Sleep(20 * time.Millisecond)
	}
	id, other := r.make(sandbox.CreateRequest{}, sandbox.FromWarm), r.make(sandbox.CreateRequest{}, sandbox.FromWarm)
	if got := r.sh(id, "hostname"); got != string(id) {
		t.Errorf("%q", got)
	}
	bootID := "cat /proc/sys/kernel/random/boot_id"
	if one, two := r.sh(id, bootID), r.sh(other, bootID); len(one) != 36 || one == two {
		t.Errorf("boot ids %q and %q", one, two)
	}
	if got := r.sh(id, "sleep 60 & tail /dev/zero; echo $?; kill -0 $! && echo lives; kill $!"); !strings.HasPrefix(got, "137\nlives") {
		t.Errorf("out of memory: %q", got)
	}
	if info, err := r.Get(id); err != nil || info.State != sandbox.Running {
		t.Errorf("%+v, %v", info, err)
	}
}
