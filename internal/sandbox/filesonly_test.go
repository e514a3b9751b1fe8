package sandbox

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

var filesOnly = Hibernation{FilesOnly: true}

// snapshotFiles are the names of the files in a hibernated sandbox's snapshot.
func (r *rig) snapshotFiles(id ID) (names []string) {
	r.t.Helper()
	entries, err := os.ReadDir(r.store.snapshot(id))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// writeDisk gives a sandbox a disk with this content.
func (r *rig) writeDisk(id ID, content string) {
	r.t.Helper()
	if err := os.WriteFile(r.store.overlay(id), []byte(content), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wantDisk(id ID, content string) {
	r.t.Helper()
	if got, err := os.ReadFile(r.store.overlay(id)); err != nil || string(got) != content {
		r.t.Errorf("the disk of %s has %q, %v; want %q", id, got, err, content)
	}
}

// coldBoot boots a hibernated sandbox from its disk, though it may have memory.
func (r *rig) coldBoot(id ID) error {
	_, resumed, err := r.Connect(r.t.Context(), id, ConnectRequest{FilesOnly: true})
	if err == nil && !resumed {
		err = errors.New("it was not resumed")
	}
	return err
}

// TestFilesOnly: no memory is written, and the host has nothing of the sandbox but its
// disk, over the deaths of the agent and of the host.
func TestFilesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		before := r.taken()
		r.writeDisk(id, "what the guest wrote")
		snapshots := r.driver.Calls(vmmtest.OpSnapshot)
		if err := r.Hibernate(t.Context(), id, filesOnly); err != nil {
			t.Fatal(err)
		}
		if info := r.wantState(id, Hibernated); !info.FilesOnly || info.Detail != "" {
			t.Errorf("it is %+v", info)
		}
		if got, want := r.snapshotFiles(id), []string{snapshotManifest, snapshotOverlay}; !slices.Equal(got, want) {
			t.Errorf("its snapshot has %v, want %v", got, want)
		}
		if want := (Resources{Sandboxes: 1, DiskMiB: before.DiskMiB}); r.taken() != want {
			t.Errorf("it takes %+v, want %+v", r.taken(), want)
		}
		if r.driver.Calls(vmmtest.OpSnapshot) != snapshots {
			t.Error("its memory was written")
		}
		wantClass(t, r.Hibernate(t.Context(), id, filesOnly), errdefs.WrongState)

		r.die()
		r.host.Reboot()
		clear(r.net.open)
		r.start()
		if info := r.wantState(id, Hibernated); !info.FilesOnly {
			t.Errorf("it is %+v", info)
		}
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if info := r.wantState(id, Running); info.FilesOnly || r.taken() != before || r.snapshotFiles(id) != nil {
			t.Errorf("it is %+v, takes %+v, and has files %v", info, r.taken(), r.snapshotFiles(id))
		}
		if r.driver.Calls(vmmtest.OpRestore) != 0 {
			t.Error("it was restored")
		}
		r.wantDisk(id, "what the guest wrote")
		// With memory, and again without.
		if err := errors.Join(
			r.Hibernate(t.Context(), id, Hibernation{}), r.Resume(t.Context(), id), r.Pause(t.Context(), id),
			r.Hibernate(t.Context(), id, filesOnly), r.Resume(t.Context(), id), r.Hibernate(t.Context(), id, filesOnly),
		); err != nil {
			t.Fatal(err)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}

// TestFilesOnlyKeepsIdentity: the guest that boots is told what the one before was told,
// and has the same network policy.
func TestFilesOnlyKeepsIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var told []guest.Init
		var shown string
		r.told = func(token string, in guest.Init) { told, shown = append(told, in), token }
		made, err := r.Create(t.Context(), CreateRequest{
			Timeout: time.Hour, Network: closed(),
			Login:  Login{User: "user", Env: map[string]string{"A": "1"}},
			Labels: Labels{Metadata: map[string]string{"k": "v"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		id, was := made.ID, r.lookup(made.ID).record()
		if err := errors.Join(r.Hibernate(t.Context(), id, filesOnly), r.Resume(t.Context(), id)); err != nil {
			t.Fatal(err)
		}
		first, last := told[0], told[len(told)-1]
		if bytes.Equal(first.Entropy, last.Entropy) {
			t.Error("its random numbers come again")
		}
		first.Entropy, last.Entropy = nil, nil
		if !reflect.DeepEqual(first, last) || shown != was.Token || last.AccessToken != was.Token || last.Restored {
			t.Errorf("its guest was told %+v, then %+v", first, last)
		}
		is := r.lookup(id).record()
		if is.Token != was.Token || is.Restored || is.Timeout != was.Timeout || is.Metadata["k"] != "v" || is.CloneKey != was.CloneKey {
			t.Errorf("its record is another")
		}
		r.wantNetwork(id, closed())
	})
}

// TestFilesOnlyNeedsASync: the disk is synced before the VM stops, for which a paused
// sandbox runs.
func TestFilesOnlyNeedsASync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		steps := []string{"guest.ready", "guest.freeze", "guest.quiesce", "pause", "resume", "snapshot", "guest.init", "kill"}
		want := func(what string, do func() error, want ...string) {
			t.Helper()
			before := len(r.faults.order)
			if err := do(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			var seen []string
			for _, step := range r.faults.order[before:] {
				if slices.Contains(steps, step) {
					seen = append(seen, step)
				}
			}
			if !slices.Equal(seen, want) {
				t.Errorf("%s: steps %v, want %v", what, seen, want)
			}
		}
		id := r.create()
		hibernate := func(what Hibernation) func() error {
			return func() error { return r.Hibernate(t.Context(), id, what) }
		}
		resume := func() {
			t.Helper()
			if err := r.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		want("running", hibernate(filesOnly), "guest.freeze", "pause", "kill")
		resume()
		if err := r.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		want("paused", hibernate(filesOnly), "resume", "guest.freeze", "pause", "kill")
		resume()
		r.faults.on("guest.freeze", func(context.Context) error { return errFault })
		want("a program that cannot be stopped", hibernate(filesOnly), "guest.freeze", "guest.quiesce", "pause", "kill")
		if info := r.wantState(id, Hibernated); info.Detail != "" {
			t.Errorf("detail %q", info.Detail)
		}
		resume()
		want("healthy", hibernate(Hibernation{HealthyGuest: true}), "guest.ready", "guest.freeze", "guest.quiesce", "pause", "snapshot", "kill")
	})
}

// TestSilentGuest: one that does not answer is hibernated all the same, unless the caller
// wants it healthy; then nothing changes.
func TestSilentGuest(t *testing.T) {
	deaf := []string{"guest.ready", "guest.freeze", "guest.quiesce"}
	for _, silent := range [][]string{deaf, deaf[1:]} {
		for _, state := range []State{Running, Paused} {
			for _, only := range []bool{false, true} {
				synctest.Test(t, func(t *testing.T) { testSilentGuest(newRig(t), silent, state, only) })
			}
		}
	}
}

func testSilentGuest(r *rig, silent []string, state State, only bool) {
	t, id := r.t, r.create()
	if state == Paused {
		if err := r.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range silent {
		r.faults.on(step, hang)
	}
	err := r.Hibernate(t.Context(), id, Hibernation{FilesOnly: only, HealthyGuest: true})
	wantClass(t, err, errdefs.WrongState)
	if info := r.wantState(id, state); !errors.Is(err, ErrGuestSilent) || info.Reason != "" || r.snapshotFiles(id) != nil {
		t.Errorf("%v; it is %+v, with files %v", err, info, r.snapshotFiles(id))
	}
	r.wantConsistent()
	if err := r.Hibernate(t.Context(), id, Hibernation{FilesOnly: only}); err != nil {
		t.Fatal(err)
	}
	if info := r.wantState(id, Hibernated); strings.Contains(info.Detail, "files may lack") != only {
		t.Errorf("detail %q", info.Detail)
	}
	for _, step := range silent {
		r.faults.on(step, nil)
	}
	if err := r.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	r.wantState(id, Running)
}

// TestColdBoot of a sandbox that was hibernated with its memory: the memory is dropped
// when the guest is up, and not before.
func TestColdBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		r.writeDisk(id, "what the guest wrote")
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		files := r.snapshotFiles(id)
		for _, step := range []string{"start", "guest.ready", "guest.init", "record save running"} {
			r.faults.on(step, func(context.Context) error { return errFault })
			if err := r.coldBoot(id); err == nil {
				t.Errorf("it booted though %s failed", step)
			}
			r.faults.on(step, nil)
			if info := r.wantState(id, Hibernated); info.FilesOnly || !slices.Equal(r.snapshotFiles(id), files) {
				t.Errorf("after %s: %+v with %v", step, info, r.snapshotFiles(id))
			}
			r.wantConsistent()
		}
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		for _, name := range r.snapshotFiles(id) { // of the memory, one bit is lost
			if name != snapshotManifest && name != snapshotOverlay {
				flipBit(t, filepath.Join(r.store.snapshot(id), name))
			}
		}
		wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
		if err := r.coldBoot(id); err != nil {
			t.Fatal(err)
		}
		if info := r.wantState(id, Running); info.FilesOnly || r.snapshotFiles(id) != nil {
			t.Errorf("it is %+v with %v", info, r.snapshotFiles(id))
		}
		r.wantDisk(id, "what the guest wrote")
	})
}

// TestDamagedDiskIsNotBooted: neither is one that is gone.
func TestDamagedDiskIsNotBooted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		r.writeDisk(id, "what the guest wrote")
		if err := r.Hibernate(t.Context(), id, filesOnly); err != nil {
			t.Fatal(err)
		}
		verify := func() (problem error) {
			if err := r.Verify(t.Context(), []string{string(id)}, func(v Verified) error { problem = v.Err; return nil }); err != nil {
				t.Fatal(err)
			}
			return problem
		}
		if err := verify(); err != nil {
			t.Error(err)
		}
		path := filepath.Join(r.store.snapshot(id), snapshotOverlay)
		starts := r.driver.Calls(vmmtest.OpStart)
		flipBit(t, path)
		wantClass(t, verify(), errdefs.Corrupt)
		wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
		flipBit(t, path)
		if err := os.Rename(path, path+".aside"); err != nil {
			t.Fatal(err)
		}
		wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
		if err := os.Rename(path+".aside", path); err != nil {
			t.Fatal(err)
		}
		r.wantState(id, Hibernated)
		if n := r.driver.Calls(vmmtest.OpStart) - starts; n != 0 {
			t.Errorf("%d vms were started", n)
		}
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantDisk(id, "what the guest wrote")
	})
}

func flipBit(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil && len(data) > 0 {
		data[len(data)/2] ^= 4
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestEnvdVersion: it is that of the guest that runs, which may be older than the host and
// is another after a boot. What an earlier agent did not ask for, the next one does.
func TestEnvdVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := warmRig(t, 1)
		want := func(what string, id ID, version string) {
			t.Helper()
			if info, err := r.Get(id); err != nil || info.EnvdVersion != version {
				t.Errorf("%s: %q, %v; want %q", what, info.EnvdVersion, err, version)
			}
		}
		silent := r.create()
		want("a guest that states none", silent, guestapi.E2BVersion)
		r.restartWith("0.6.5")
		want("adopted", silent, "0.6.5")
		r.fillPool()
		warm := r.create()
		want("warm", warm, "0.6.5")
		r.restartWith("")
		want("adopted, and states none", warm, "0.6.5")
		r.restartWith("0.7.0")
		cold, err := r.Create(t.Context(), CreateRequest{MemMiB: 256})
		if err != nil {
			t.Fatal(err)
		}
		want("cold", cold.ID, "0.7.0")
		forked, err := r.Fork(t.Context(), cold.ID, ForkRequest{Count: 1})
		if err != nil {
			t.Fatal(err)
		}
		want("fork", forked.Sandboxes[0].ID, "0.7.0")
		if err := r.Hibernate(t.Context(), cold.ID, filesOnly); err != nil {
			t.Fatal(err)
		}
		r.restartWith("0.8.0")
		want("hibernated", cold.ID, "0.7.0")
		if err := r.Resume(t.Context(), cold.ID); err != nil {
			t.Fatal(err)
		}
		want("booted", cold.ID, "0.8.0")
	})
}

// restartWith has an agent follow the one that dies, and guests state this version to it.
func (r *rig) restartWith(version string) {
	r.t.Helper()
	r.fillPool() // nothing is under way
	r.die()
	r.envd = version
	r.start()
}

// TestFilesOnlyInTheEnd: a sandbox whose idle timeout or deadline has passed keeps its
// files, each time again, and no failure costs more than time.
func TestFilesOnlyInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		idle, err := r.Create(t.Context(), CreateRequest{Timeout: 10 * time.Second, OnTimeout: HibernateFilesOnTimeout})
		if err != nil {
			t.Fatal(err)
		}
		ended := r.until(10*time.Second, CreateRequest{OnEnd: HibernateFilesOnTimeout})
		paused := r.until(10*time.Second, CreateRequest{OnEnd: HibernateFilesOnTimeout})
		if err := r.Pause(t.Context(), paused); err != nil {
			t.Fatal(err)
		}
		lives := map[ID]time.Duration{idle.ID: 0, ended: 10 * time.Second, paused: 10 * time.Second}
		written := r.driver.Calls(vmmtest.OpSnapshot)
		for range 2 {
			r.faults.on("record snapshot", func(context.Context) error { return errFault })
			pass(11 * time.Second)
			for id := range lives {
				if info, err := r.Get(id); err != nil || info.State != Running && info.State != Paused {
					t.Errorf("a failure ended it: %+v, %v", info, err)
				}
			}
			r.faults.on("record snapshot", nil)
			pass(10 * time.Second)
			for id, life := range lives {
				if info := r.wantState(id, Hibernated); !info.FilesOnly {
					t.Errorf("it is %+v", info)
				}
				if _, _, err := r.Connect(t.Context(), id, ConnectRequest{Timeout: life}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n := r.driver.Calls(vmmtest.OpSnapshot) - written; n != 0 {
			t.Errorf("memory was written %d times", n)
		}
	})
}

// TestColdBootWithoutItsUser: a disk from which the sandbox's user was removed boots all
// the same.
func TestColdBootWithoutItsUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made, err := r.Create(t.Context(), CreateRequest{Login: Login{User: "user", Workdir: "/w", Env: map[string]string{"A": "1"}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), made.ID, filesOnly); err != nil {
			t.Fatal(err)
		}
		var last guest.Init
		r.faults.on("guest.init", func(context.Context) error {
			if last.DefaultUser != "root" {
				return errdefs.NotFound.Errorf("it has no such user")
			}
			return nil
		})
		r.told = func(_ string, in guest.Init) { last = in }
		if err := r.Resume(t.Context(), made.ID); err != nil {
			t.Fatal(err)
		}
		if r.wantState(made.ID, Running); last.DefaultWorkdir != "" || last.Env["A"] != "1" {
			t.Errorf("its guest was told %+v", last)
		}
	})
}

// TestSlowColdBoot: a small sandbox has as much time to boot as a new one.
func TestSlowColdBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.BootTimeout = 3 * time.Minute })
		made, err := r.Create(t.Context(), CreateRequest{MemMiB: MinMemMiB})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), made.ID, filesOnly); err != nil {
			t.Fatal(err)
		}
		r.faults.on("guest.ready", func(ctx context.Context) error {
			select {
			case <-time.After(170 * time.Second):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
		if err := r.Resume(t.Context(), made.ID); err != nil {
			t.Error(err)
		}
		if err := r.Hibernate(t.Context(), made.ID, filesOnly); err != nil {
			t.Fatal(err)
		}
		if err := r.coldBoot(made.ID); err != nil {
			t.Error(err)
		}
	})
}

// TestSnapshotWithoutMemory: its source goes on with all that it has, and sandboxes from
// it boot from its disk as new ones, when the source and the agent are gone, too.
func TestSnapshotWithoutMemory(t *testing.T) {
	for _, state := range []State{Running, Paused} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			source := r.until(time.Hour, CreateRequest{Login: Login{User: "user", Env: map[string]string{"A": "1"}}})
			if state == Paused {
				if err := r.Pause(t.Context(), source); err != nil {
					t.Fatal(err)
				}
			}
			before := r.lookup(source).record()
			r.writeDisk(source, "what the guest wrote")
			written := r.driver.Calls(vmmtest.OpSnapshot)
			made, err := r.Snapshot(t.Context(), source, SnapshotRequest{Name: "snap", New: true, FilesOnly: true})
			if err != nil || made.Bytes == 0 || made.Bytes > 1<<20 || r.driver.Calls(vmmtest.OpSnapshot) != written {
				t.Errorf("it takes %d bytes, %v, or has memory", made.Bytes, err)
			}
			if info := r.wantState(source, state); !info.EndAt.Equal(before.EndAt) {
				t.Errorf("its source is %+v", info)
			}
			r.wantConsistent()
			if err := r.Destroy(t.Context(), source); err != nil {
				t.Fatal(err)
			}
			r.die()
			r.start()
			if err := r.Verify(t.Context(), []string{"snap"}, func(v Verified) error { return v.Err }); err != nil {
				t.Error(err)
			}
			r.wantBootedFrom("snap", "what the guest wrote", before)
		})
	}
}

// wantBootedFrom makes a sandbox from a snapshot without memory, whose source had a
// record, and ends both.
func (r *rig) wantBootedFrom(name, disk string, source Record) {
	r.t.Helper()
	var last guest.Init
	var shown string
	r.told = func(token string, in guest.Init) { last, shown = in, token }
	made, err := r.Create(r.t.Context(), CreateRequest{Template: name})
	if err != nil {
		r.t.Fatal(err)
	}
	if made.From != FromBoot || made.Why == "" || made.User != source.user() || !made.EndAt.IsZero() {
		r.t.Errorf("created %+v", made)
	}
	r.wantDisk(made.ID, disk)
	if last.SandboxID != string(made.ID) || last.Restored || !maps.Equal(last.Env, source.Login.Env) ||
		last.AccessToken == source.Token || shown != last.AccessToken {
		r.t.Errorf("its guest was told %+v", last)
	}
	if err := errors.Join(r.DeleteSnapshot(r.t.Context(), "", name), r.Destroy(r.t.Context(), made.ID)); err != nil {
		r.t.Error(err)
	}
	r.wantNothing()
}

// TestGuestCA: each start of a guest tells it which certificates to trust.
func TestGuestCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.GuestCA = "certificates" })
		var told []guest.Init
		r.told = func(_ string, in guest.Init) { told = append(told, in) }
		made, err := r.Create(t.Context(), CreateRequest{Timeout: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		for _, how := range []func() error{
			func() error { return r.Hibernate(t.Context(), made.ID, filesOnly) },
			func() error { return r.Resume(t.Context(), made.ID) },
			func() error { _, err := r.Fork(t.Context(), made.ID, ForkRequest{Count: 1}); return err },
		} {
			if err := how(); err != nil {
				t.Fatal(err)
			}
		}
		if len(told) < 3 {
			t.Errorf("guests were told of %d starts", len(told))
		}
		for _, in := range told {
			// One that goes on where it stood is told the time alone.
			if in.CABundle != "certificates" && in.Time.IsZero() {
				t.Errorf("a guest was told %+v", in)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { warmOne(c); c.GuestCA = "certificates" })
		r.create()
		r.fillPool()
		bundle := ""
		r.told = func(_ string, in guest.Init) { bundle = in.CABundle }
		made, err := r.Create(t.Context(), CreateRequest{})
		if err != nil || made.From != FromWarm || bundle != "certificates" {
			t.Errorf("a waiting guest (from %s, %v) was told %q", made.From, err, bundle)
		}
	})
}
