package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// TestHibernated: a hibernated sandbox has nothing of the host but its disk, and
// goes on after the agent's death and the host's.
func TestHibernated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		before := r.taken()
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		info := r.wantState(id, Hibernated)
		if info.HostIP.IsValid() || len(r.host.Live()) > 0 || len(r.net.taken)+len(r.net.open) > 0 {
			t.Errorf("it has address %s, vms %v, slots %v", info.HostIP, r.host.Live(), r.net.taken)
		}
		if want := (Resources{Sandboxes: 1, DiskMiB: before.DiskMiB}); r.taken() != want {
			t.Errorf("it takes %+v, want %+v", r.taken(), want)
		}
		if _, err := r.Lease(t.Context(), id); errdefs.ClassOf(err) != errdefs.WrongState {
			t.Errorf("lease: %v", err)
		}
		wantClass(t, r.Hibernate(t.Context(), id, Hibernation{}), errdefs.WrongState)

		r.die()
		r.host.Reboot()
		clear(r.net.open)
		r.start()
		r.wantState(id, Hibernated)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		info = r.wantState(id, Running)
		if !info.HostIP.IsValid() || r.taken() != before {
			t.Errorf("it has address %s and takes %+v, want %+v", info.HostIP, r.taken(), before)
		}
		if _, err := os.Stat(r.store.snapshot(id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the used snapshot is still there: %v", err)
		}
		// And again, without an agent's death between.
		if err := errors.Join(r.Hibernate(t.Context(), id, Hibernation{}), r.Resume(t.Context(), id)); err != nil {
			t.Fatal(err)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}

// TestFailedResumeKeepsTheSnapshot, whatever fails, and however often.
func TestFailedResumeKeepsTheSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		for _, fault := range []vmmtest.Fault{{Err: errFault}, {Die: true, Err: errFault}} {
			r.driver.Inject(vmmtest.OpRestore, 1, fault)
			if err := r.Resume(t.Context(), id); err == nil {
				t.Error("resumed")
			}
			r.wantState(id, Hibernated)
			r.wantConsistent()
		}
		// It wakes, changes its disk, and dies before it answers.
		r.driver.Inject(vmmtest.OpResume, 1, vmmtest.Fault{After: true, Die: true, Err: errFault})
		if err := r.Resume(t.Context(), id); err == nil {
			t.Error("resumed")
		}
		r.wantState(id, Hibernated)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantState(id, Running)
	})
}

func TestIncompleteSnapshotIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(r.store.snapshot(id), snapshotManifest)); err != nil {
			t.Fatal(err)
		}
		wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
		r.wantState(id, Hibernated)
		r.die()
		r.start()
		r.wantState(id, Hibernated)
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantNothing()
	})
}

// TestDamagedSnapshotIsRefused: one flipped bit anywhere in memory, devices or
// disk of a hibernated sandbox is told, and the sandbox stays as it is. With the
// bit flipped back it goes on.
func TestDamagedSnapshotIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		if err := os.WriteFile(r.store.overlay(id), []byte("what the guest wrote"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(r.store.snapshot(id))
		if err != nil {
			t.Fatal(err)
		}
		verify := func() (problem error) {
			err := r.Verify(t.Context(), []string{string(id)}, func(v Verified) error {
				problem = v.Err
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			return problem
		}
		for _, e := range entries {
			path := filepath.Join(r.store.snapshot(id), e.Name())
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if e.Name() == snapshotManifest || len(data) == 0 {
				continue
			}
			damaged := bytes.Clone(data)
			damaged[len(damaged)/2] ^= 4
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			wantClass(t, verify(), errdefs.Corrupt)
			wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
			r.wantState(id, Hibernated)
			r.wantConsistent()
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := verify(); err != nil {
			t.Error(err)
		}
		wantClass(t, r.Verify(t.Context(), []string{"nothing"}, nil), errdefs.NotFound)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantState(id, Running)
	})
}

// TestSnapshotWithoutDigests is one that an earlier version wrote. It is resumed
// as it was then, by its sizes.
func TestSnapshotWithoutDigests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		if err := os.WriteFile(r.store.overlay(id), []byte("what the guest wrote"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		old := sizesManifest{Version: 1, Sizes: map[string]int64{}}
		entries, err := os.ReadDir(r.store.snapshot(id))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if e.Name() != snapshotManifest {
				old.Sizes[e.Name()] = info.Size()
			}
		}
		data, err := json.Marshal(old)
		if err == nil {
			err = os.WriteFile(filepath.Join(r.store.snapshot(id), snapshotManifest), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		overlay := filepath.Join(r.store.snapshot(id), snapshotOverlay)
		if err := os.Truncate(overlay, 3); err != nil {
			t.Fatal(err)
		}
		wantClass(t, r.Resume(t.Context(), id), errdefs.Corrupt)
		if err := os.Truncate(overlay, old.Sizes[snapshotOverlay]); err != nil {
			t.Fatal(err)
		}
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		r.wantState(id, Running)
	})
}

func TestHibernateOnTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		info, err := r.Create(t.Context(), CreateRequest{Timeout: 10 * time.Second, OnTimeout: HibernateOnTimeout})
		if err != nil {
			t.Fatal(err)
		}
		r.driver.Inject(vmmtest.OpSnapshot, 1, vmmtest.Fault{Err: errFault})
		for before := r.driver.Calls(vmmtest.OpSnapshot); r.driver.Calls(vmmtest.OpSnapshot) == before; synctest.Wait() {
			time.Sleep(100 * time.Millisecond)
		}
		r.wantState(info.ID, Running) // a failure costs nothing and is not the end
		time.Sleep(3 * time.Second)
		synctest.Wait()
		r.wantState(info.ID, Hibernated)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		r.wantState(info.ID, Hibernated)
		if err := r.Resume(t.Context(), info.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		r.wantState(info.ID, Running)

		_, err = r.Create(t.Context(), CreateRequest{OnTimeout: "explode"})
		wantClass(t, err, errdefs.InvalidArgument)
	})
}
