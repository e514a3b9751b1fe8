package sandbox

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The directories below testdata/records are those of sandboxes, one in each state,
// as an agent wrote them whose waiting guests were in creating, with a mark.
const writtenRecords = "testdata/records"

// plant copies the directories of testdata/records into the rig's state directory,
// and gives each sandbox the VM and the network that its record names.
func (r *rig) plant() map[string]ID {
	r.t.Helper()
	entries, err := os.ReadDir(writtenRecords)
	if err != nil {
		r.t.Fatal(err)
	}
	ids := map[string]ID{}
	vms := map[int]ID{}
	for _, e := range entries {
		from := filepath.Join(writtenRecords, e.Name())
		data, _, err := readRecord(filepath.Join(from, "record.json"))
		if err != nil {
			r.t.Fatal(err)
		}
		rec, err := decodeRecord(data)
		if err != nil {
			r.t.Fatalf("record of the sandbox that is %s: %v", e.Name(), err)
		}
		ids[e.Name()] = rec.ID
		if err := os.CopyFS(filepath.Join(r.dir, "state", "sandboxes", string(rec.ID)), os.DirFS(from)); err != nil {
			r.t.Fatal(err)
		}
		if rec.VM == nil {
			continue
		}
		var state struct{ PID int }
		if err := json.Unmarshal(rec.VM.State, &state); err != nil {
			r.t.Fatal(err)
		}
		vms[state.PID] = rec.ID
		r.net.open[rec.Slot] = true
	}
	for pid := 1; len(vms) > 0; pid++ { // the fake host numbers its VMs
		id, ok := vms[pid]
		if !ok {
			id = "gone"
		}
		vm, err := r.driver.Start(r.t.Context(), vmm.Spec{ID: string(id), Kernel: vmm.Kernel{Image: "/vmlinux"}, Link: &vmm.Link{Kind: vmm.Tap}})
		if err == nil && !ok {
			err = vm.Kill(r.t.Context())
		}
		if err != nil {
			r.t.Fatal(err)
		}
		delete(vms, pid)
	}
	return ids
}

// TestRecordsOfEarlierAgents: a record of each state is read and handled.
func TestRecordsOfEarlierAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.die()
		ids := r.plant()
		r.start()

		running := r.wantState(ids["running"], Running)
		if running.Template != "minimal" || running.VCPUs != 1 || running.MemMiB != 256 || running.OnTimeout != HibernateOnTimeout ||
			running.User != "user" || running.HostIP != addr("10.11.0.1") || *running.Network.AllowInternet ||
			!slices.Equal(running.Network.Allow, []string{"example.com"}) || running.ExpiresAt.IsZero() {
			t.Errorf("what runs is %+v", running)
		}
		if p := r.net.policies[1]; !slices.Equal(p.AllowNames, []string{"example.com"}) {
			t.Errorf("its policy is %+v", p)
		}
		r.wantState(ids["paused"], Paused)
		r.wantState(ids["hibernated"], Hibernated)
		if info := r.wantState(ids["stopped"], Stopped); info.Reason != VMExited || info.Detail == "" {
			t.Errorf("what is stopped is %+v", info)
		}
		if want := []ID{ids["creating"], ids["stopping"], ids["waiting"]}; !sameIDs(r.found.Freed, want) {
			t.Errorf("freed %v, want %v", r.found.Freed, want)
		}
		for _, free := range []ID{ids["stopping"], ids["waiting"]} {
			if info, err := r.Get(free); err == nil {
				t.Errorf("it is not forgotten: %+v", info)
			}
		}
		if info := r.wantState(ids["creating"], Stopped); info.Reason != CreateFailed {
			t.Errorf("what was being created is %+v", info)
		}
		if e, ok := r.Manager.events.lastOf(ids["waiting"]); ok {
			t.Errorf("an event tells of the guest that waited: %+v", e)
		}
		r.wantConsistent()
		r.wantGoOn(ids)
	})
}

// wantGoOn resumes what was paused or hibernated, and ends all.
func (r *rig) wantGoOn(ids map[string]ID) {
	r.t.Helper()
	for _, id := range []ID{ids["paused"], ids["hibernated"]} {
		if err := r.Resume(r.t.Context(), id); err != nil {
			r.t.Error(err)
		}
	}
	if disk, err := os.ReadFile(r.store.overlay(ids["hibernated"])); err != nil || string(disk) != "what the guest wrote\n" {
		r.t.Errorf("the disk of what was hibernated: %q, %v", disk, err)
	}
	for _, info := range r.List(true) {
		if err := r.Destroy(r.t.Context(), info.ID); err != nil {
			r.t.Error(err)
		}
	}
	r.wantNothing()
}

func sameIDs(a, b []ID) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}
