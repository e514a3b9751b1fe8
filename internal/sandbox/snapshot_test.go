package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// snapshotted makes a sandbox and a snapshot of it.
func snapshotted(r *rig, req CreateRequest, name string) (ID, Snapshotted) {
	r.t.Helper()
	source, err := r.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	made, err := r.Snapshot(r.t.Context(), source.ID, SnapshotRequest{Name: name, New: true})
	if err != nil {
		r.t.Fatal(err)
	}
	return source.ID, made
}

// TestNamedSnapshot: sandboxes start from a snapshot when its source and the
// agent that made it are gone, as often as one likes, and go on when it is.
func TestNamedSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		source, made := snapshotted(r, CreateRequest{VCPUs: 2, MemMiB: 256}, "snap")
		r.wantState(source, Running)
		if made.Name != "snap" || made.Source != source || made.Template != "minimal" || made.VCPUs != 2 || made.MemMiB != 256 || made.Bytes == 0 || made.CreatedAt.IsZero() {
			t.Errorf("it says %+v", made)
		}
		if err := r.Destroy(t.Context(), source); err != nil {
			t.Fatal(err)
		}
		r.die()
		r.host.Reboot()
		clear(r.net.open)
		r.start()
		list, err := r.Snapshots("")
		if err != nil || len(list) != 1 || list[0] != made.Snapshot {
			t.Fatalf("list: %+v, %v; want %+v", list, err, made.Snapshot)
		}

		var inits []guest.Init
		var shown []string
		r.told = func(token string, in guest.Init) { inits, shown = append(inits, in), append(shown, token) }
		var ids []ID
		for range 2 {
			created, err := r.Create(t.Context(), CreateRequest{Template: "snap", Timeout: time.Hour, OnTimeout: HibernateOnTimeout})
			if err != nil {
				t.Fatal(err)
			}
			if created.From != FromSnapshot || created.Why != "" || created.VCPUs != 2 || created.MemMiB != 256 || created.Timeout != time.Hour || created.Template != "minimal" {
				t.Errorf("created %+v", created)
			}
			ids = append(ids, created.ID)
		}
		// Its guest is told who it is, as nobody else is, and shown what is no
		// sandbox's token.
		seen := map[string]bool{}
		for i, in := range inits {
			if in.SandboxID != string(ids[i]) || !in.Restored || !in.NewBootID || in.Env == nil || len(in.Entropy) == 0 {
				t.Errorf("told: %+v", in)
			}
			for _, secret := range []string{in.AccessToken, in.CloneKey} {
				if secret == "" || seen[secret] || secret == shown[i] {
					t.Errorf("a secret comes again: %q", secret)
				}
				seen[secret] = true
			}
		}
		if len(inits) != 2 || shown[0] != shown[1] {
			t.Errorf("%d guests were told, shown %q", len(inits), shown)
		}
		r.told = nil

		if err := r.DeleteSnapshot(r.t.Context(), "", "snap"); err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			r.wantState(id, Running)
			if err := errors.Join(r.Hibernate(t.Context(), id, Hibernation{}), r.Resume(t.Context(), id)); err != nil {
				t.Error(err)
			}
			if _, err := r.Fork(t.Context(), id, ForkRequest{Count: 1}); err != nil {
				t.Error(err)
			}
			if _, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: "of-a-clone-" + string(id), New: true}); err != nil {
				t.Error(err)
			}
		}
		r.die() // records of clones are taken up as others are
		r.start()
		for _, id := range ids {
			r.wantState(id, Running)
		}
		for _, info := range r.List(true) {
			if err := r.Destroy(t.Context(), info.ID); err != nil {
				t.Error(err)
			}
		}
		r.wantNothing()
	})
}

// TestSandboxNamesItsSnapshot: a sandbox, and its forks, say which snapshot they come
// from, also when that is deleted and another agent runs.
func TestSandboxNamesItsSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		source, _ := snapshotted(r, CreateRequest{}, "snap")
		created, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.DeleteSnapshot(r.t.Context(), "", "snap"); err != nil {
			t.Fatal(err)
		}
		forked, err := r.Fork(t.Context(), created.ID, ForkRequest{Count: 1})
		if err != nil {
			t.Fatal(err)
		}
		r.die()
		r.start()
		for id, want := range map[ID]string{source: "", created.ID: "snap", forked.Sandboxes[0].ID: "snap"} {
			if info, err := r.Get(id); err != nil || info.Snapshot != want || info.Template != "minimal" {
				t.Errorf("%s is of template %q and snapshot %q, %v", id, info.Template, info.Snapshot, err)
			}
		}
	})
}

func TestSnapshotNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id, _ := snapshotted(r, CreateRequest{}, "snap")
		for name, want := range map[string]*errdefs.Class{
			"snap": errdefs.AlreadyExists, "minimal": errdefs.AlreadyExists,
			"../x": errdefs.InvalidArgument, "A": errdefs.InvalidArgument, ".x": errdefs.InvalidArgument,
		} {
			_, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: name, New: true})
			wantClass(t, err, want)
			r.wantState(id, Running)
		}
		made, err := r.Snapshot(t.Context(), id, SnapshotRequest{})
		if err != nil || made.Name != made.TemplateID || made.Tag != "default" {
			t.Errorf("without a name: %+v, %v", made, err)
		}
		_, err = r.Snapshot(t.Context(), "sb-0123456789abcdef", SnapshotRequest{Name: "other", New: true})
		wantClass(t, err, errdefs.NotFound)
		_, err = r.Create(t.Context(), CreateRequest{Template: "none"})
		wantClass(t, err, errdefs.NotFound)
		if text := err.Error(); text != "template 'none' not found" {
			t.Errorf("it says %q", text)
		}
		wantClass(t, r.DeleteSnapshot(r.t.Context(), "", "none"), errdefs.NotFound)
		// Of an agent that did not know of snapshots.
		b, err := r.find(r.create())
		if err == nil {
			err = r.save(b, func(rec *Record) { rec.CloneKey = "" })
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Snapshot(t.Context(), b.id, SnapshotRequest{Name: "other", New: true})
		wantClass(t, err, errdefs.Unsupported)
		wantClass(t, r.DeleteSnapshot(r.t.Context(), "", "../sandboxes"), errdefs.InvalidArgument)
		// Its size is its own.
		for _, req := range []CreateRequest{{VCPUs: 2}, {MemMiB: 1024}, {MemMiB: 1}} {
			req.Template = "snap"
			_, err := r.Create(t.Context(), req)
			wantClass(t, err, errdefs.InvalidArgument)
		}
		if _, err := r.Create(t.Context(), CreateRequest{Template: "snap", VCPUs: 1, MemMiB: 512}); err != nil {
			t.Error(err)
		}
	})
}

// TestReadAhead: an agent reads the default ready snapshot before it is asked.
func TestReadAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.create()
		r.die()
		r.start()
		synctest.Wait()
		if n := r.tmpl.found.Load(); n != 1 {
			t.Errorf("it looked at %d ready snapshots", n)
		}
	})
}

// snapshotDir is where the files of a snapshot are.
func (r *rig) snapshotDir(name string) string {
	r.t.Helper()
	t, b, err := r.tmpl.Resolve("", name)
	if err != nil {
		r.t.Fatal(err)
	}
	return filepath.Join(r.tmpl.Dir(), "templates", t.ID, b.ID)
}

// doctor changes what a snapshot's manifest says.
func doctor(t *testing.T, dir string, change func(map[string]any)) {
	t.Helper()
	path := filepath.Join(dir, "manifest.json")
	data, err := os.ReadFile(path)
	var m map[string]any
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err == nil {
		change(m)
		data, err = json.Marshal(m)
	}
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotThatDoesNotFit boots from its disk, where that is up to date, and
// says so; over another base image it does not.
func TestSnapshotThatDoesNotFit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id, _ := snapshotted(r, CreateRequest{}, "snap")
		if _, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: "unsynced", New: true}); err != nil {
			t.Fatal(err)
		}
		// Of a sandbox that was paused, as older agents made them.
		doctor(t, r.snapshotDir("unsynced"), func(m map[string]any) {
			m["source"].(map[string]any)["synced"] = false
		})
		create := func(name string) (Created, error) {
			return r.Create(t.Context(), CreateRequest{Template: name})
		}
		for _, name := range []string{"snap", "unsynced"} {
			if created, err := create(name); err != nil || created.From != FromSnapshot {
				t.Errorf("%s: %+v, %v", name, created, err)
			}
		}

		// The driver turns out to be another, after the fact.
		r.driver.Inject(vmmtest.OpRestore, 1, vmmtest.Fault{Err: errdefs.Unsupported.Errorf("snapshot is of another version")})
		created, err := create("snap")
		if err != nil || created.From != FromBoot || !strings.Contains(created.Why, "another version") {
			t.Errorf("created %+v, %v", created, err)
		}
		r.driver.Inject(vmmtest.OpRestore, 1, vmmtest.Fault{Err: errdefs.Unsupported.Errorf("snapshot is of another version")})
		_, err = create("unsynced")
		wantClass(t, err, errdefs.Unsupported)
		// What has nothing to do with that is no reason to lose the memory.
		r.driver.Inject(vmmtest.OpRestore, 1, vmmtest.Fault{Err: errFault})
		if _, err := create("snap"); !errors.Is(err, errFault) {
			t.Errorf("created: %v", err)
		}
		r.wantConsistent()

		for name, change := range map[string]func(map[string]any){
			"version": func(m map[string]any) { m["key"] = "of another version" },
			"driver":  func(m map[string]any) { m["shape"].(map[string]any)["driver"] = "other" },
		} {
			for _, snap := range []string{"snap", "unsynced"} {
				dir := r.snapshotDir(snap)
				data, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
				if err != nil {
					t.Fatal(err)
				}
				doctor(t, dir, change)
				created, err := create(snap)
				if snap == "unsynced" {
					wantClass(t, err, errdefs.Unsupported)
				} else if err != nil || created.From != FromBoot || created.Why == "" {
					t.Errorf("%s: %+v, %v", name, created, err)
				}
				if err := os.WriteFile(filepath.Join(dir, "manifest.json"), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}

		r.tmpl.base = "another"
		_, err = create("snap")
		wantClass(t, err, errdefs.Unsupported)
		if err == nil || !strings.Contains(err.Error(), "base image") {
			t.Errorf("it says %v", err)
		}
		r.tmpl.base = ""
		for _, info := range r.List(true) {
			if err := r.Destroy(t.Context(), info.ID); err != nil {
				t.Error(err)
			}
		}
		r.wantNothing()
	})
}

// TestSnapshotDeletedMeanwhile: a create from what somebody deletes says so and
// leaves nothing.
func TestSnapshotDeletedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, step := range []string{"overlay clone", "overlay clone done", "restore"} {
			r := newRig(t)
			id, _ := snapshotted(r, CreateRequest{}, "snap")
			if err := r.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			r.faults.on(step, func(context.Context) error {
				if err := r.DeleteSnapshot(r.t.Context(), "", "snap"); err != nil {
					t.Error(err)
				}
				r.faults.on(step, nil)
				return nil
			})
			_, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
			wantClass(t, err, errdefs.NotFound)
			for _, info := range r.List(true) {
				if err := r.Destroy(t.Context(), info.ID); err != nil {
					t.Error(err)
				}
			}
			r.wantNothing()
		}
	})
}

func TestSnapshotNeedsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, free := diskRig(t)
		id := r.create()
		free.Store((testKeepMiB + 1) << 20)
		_, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: "snap", New: true})
		wantClass(t, err, errdefs.Exhausted)
		r.wantState(id, Running)
		// And on the way.
		free.Store(100 << 30)
		full := &os.PathError{Op: "write", Path: "mem", Err: syscall.ENOSPC}
		for _, step := range []string{"snapshot", "snapshot.overlay"} {
			r.faults.on(step, func(context.Context) error { return full })
			_, err = r.Snapshot(t.Context(), id, SnapshotRequest{Name: "snap", New: true})
			wantClass(t, err, errdefs.Exhausted)
			if err != nil && strings.Contains(err.Error(), "mem") {
				t.Errorf("a client would read a path of the host: %v", err)
			}
			r.faults.on(step, nil)
			r.wantState(id, Running)
			r.wantConsistent()
		}
		if list, err := r.Snapshots(""); err != nil || len(list) != 0 {
			t.Errorf("listed: %v, %v", list, err)
		}
		if _, err := r.Snapshot(t.Context(), id, SnapshotRequest{Name: "snap", New: true}); err != nil {
			t.Error(err)
		}
	})
}
