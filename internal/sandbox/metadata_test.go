package sandbox

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// wantLabels compares what the list, the record on disk and the last event say of a
// sandbox's labels.
func (r *rig) wantLabels(what string, id ID, want Labels) {
	r.t.Helper()
	info, err := r.Get(id)
	if err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	rec, err := r.store.load(id)
	if err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	last, _ := r.events.lastOf(id)
	for where, got := range map[string]Labels{"list": info.Labels, "record": rec.Labels, "event": last.Labels} {
		if diff := cmp.Diff(want, got); diff != "" {
			r.t.Errorf("%s: the %s has other labels:\n%s", what, where, diff)
		}
	}
}

// Labels are there in each way to make a sandbox, and stay whatever becomes of it.
func TestLabels(t *testing.T) {
	for name, metadata := range map[string]map[string]string{
		"none": nil, "empty": {}, "some": {"user": "ü & <b>", " a=b ": "", "\x00": "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testLabels(t, Labels{Project: "blue", Metadata: metadata}) })
		})
	}
}

func testLabels(t *testing.T, labels Labels) {
	r := warmRig(t, 1)
	given := labels.clone()
	create := func(from string, req CreateRequest) ID {
		t.Helper()
		req.Labels = given
		made, err := r.Create(t.Context(), req)
		if err != nil || made.From != from {
			t.Fatalf("create from %s: from %s, %v", from, made.From, err)
		}
		r.wantLabels(from, made.ID, labels)
		return made.ID
	}
	id := create(FromBoot, CreateRequest{})
	r.fillPool()
	create(FromWarm, CreateRequest{})
	create(FromReady, CreateRequest{MemMiB: r.wantState(id, Running).MemMiB})
	if given.Metadata != nil {
		given.Metadata["changed"] = "afterwards"
		r.wantLabels("caller changes its map", id, labels)
	}
	if info, _ := r.Get(id); info.Labels.Metadata != nil {
		info.Labels.Metadata["changed"] = "in a copy"
	}
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		r.wantLabels(what, id, labels)
	}
	step("pause", r.Pause(t.Context(), id))
	step("resume", r.Resume(t.Context(), id))
	step("hibernate", r.Hibernate(t.Context(), id, Hibernation{}))
	r.die()
	r.start()
	step("restart while hibernated", nil)
	step("resume from disk", r.Resume(t.Context(), id))
	_, err := r.SetTimeout(t.Context(), id, time.Hour)
	step("timeout", err)
	r.die()
	r.start()
	step("adoption", nil)
	forked, err := r.Fork(t.Context(), id, ForkRequest{Count: 2})
	step("fork", err)
	for _, fork := range forked.Sandboxes {
		r.wantLabels("the fork", fork.ID, labels)
	}
	_, err = r.Snapshot(t.Context(), id, SnapshotRequest{Name: "snap", New: true})
	step("snapshot", err)
	made, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
	if err != nil {
		t.Fatal(err)
	}
	r.wantLabels("sandbox from the snapshot", made.ID, Labels{})
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if last, _ := r.events.lastOf(id); last.To != Stopped || !cmp.Equal(last.Labels, labels) {
		t.Errorf("the last event is %+v", last)
	}
}

// An unknown sandbox has no record to take labels from: its event has those of before.
func TestLabelsOfAnUnknownSandbox(t *testing.T) {
	r := newRig(t)
	labels := Labels{Project: "blue", Metadata: map[string]string{"a": "b"}}
	made, err := r.Create(t.Context(), CreateRequest{Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	r.die()
	r.spoil(made.ID, func(data []byte) []byte { return data[:len(data)/2] })
	if err := os.RemoveAll(r.store.previous(made.ID)); err != nil {
		t.Fatal(err)
	}
	r.start()
	if last, _ := r.events.lastOf(made.ID); last.To != Unknown || !cmp.Equal(last.Labels, labels) {
		t.Errorf("the last event is %+v", last)
	}
}

func TestSelect(t *testing.T) {
	r := newRig(t)
	ids := map[string]ID{}
	for name, metadata := range map[string]map[string]string{
		"none": nil, "a": {"a": "1"}, "ab": {"a": "1", "b": ""}, "other": {"a": "2", "b": ""},
	} {
		made, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Metadata: metadata}})
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = made.ID
	}
	for _, c := range []struct {
		want   string
		filter map[string]string
	}{
		{"none a ab other", nil},
		{"none a ab other", map[string]string{}},
		{"a ab", map[string]string{"a": "1"}},
		{"ab", map[string]string{"a": "1", "b": ""}},
		{"ab other", map[string]string{"b": ""}},
		{"", map[string]string{"c": ""}},
		{"", map[string]string{"a": ""}},
	} {
		want, got := map[ID]bool{}, map[ID]bool{}
		for _, name := range strings.Fields(c.want) {
			want[ids[name]] = true
		}
		for _, info := range r.Select(Filter{Metadata: c.filter}) {
			got[info.ID] = true
		}
		if !maps.Equal(got, want) {
			t.Errorf("%v: %v, want %v", c.filter, got, want)
		}
	}
}

func TestBadMetadata(t *testing.T) {
	r := newRig(t)
	many := map[string]string{}
	for i := range MaxMetadata + 1 {
		many[fmt.Sprint(i)] = ""
	}
	large := map[string]string{}
	for i := range 5 {
		large[fmt.Sprint(i)] = strings.Repeat("x", MaxMetadataValue-1)
	}
	for name, metadata := range map[string]map[string]string{
		"many pairs": many, "much together": large, "empty key": {"": "x"},
		"long key":   {strings.Repeat("x", MaxMetadataKey+1): ""},
		"long value": {"a": strings.Repeat("x", MaxMetadataValue+1)},
		"no UTF-8":   {"a": "\xff"},
	} {
		_, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Metadata: metadata}})
		if errdefs.ClassOf(err) != errdefs.InvalidArgument || !strings.Contains(err.Error(), "metadata") {
			t.Errorf("%s: %v", name, err)
		}
	}
	delete(many, "0")
	if _, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Metadata: many}}); err != nil {
		t.Error(err)
	}
}

// The file of the event log has the labels of a sandbox once, however often it is
// written anew, and is not written anew for each event if they are large.
func TestLabelsInTheEventLog(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	path := filepath.Join(dir, "events.jsonl")
	labels := Labels{Project: "blue", Metadata: map[string]string{}}
	for i := range 3 { // each byte becomes six
		labels.Metadata[fmt.Sprint(i)] = strings.Repeat("<", MaxMetadataValue)
	}
	const sandboxes = 200 // more than maxEventBytes
	id := func(i int) ID { return ID(fmt.Sprintf("sb-%016x", i)) }
	for i := range sandboxes {
		if err := l.add(Event{ID: id(i), To: Creating, Labels: labels}); err != nil {
			t.Fatal(err)
		}
	}
	l = openLog(t, dir)
	before, err := os.Stat(path)
	if err != nil || before.Size() < maxEventBytes {
		t.Fatalf("the file has %d bytes, %v", before.Size(), err)
	}
	for i := range sandboxes {
		if err := l.add(Event{ID: id(i), From: Creating, To: Running, Labels: labels}); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.Stat(path)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the file was written anew, %v", err)
	}
	if grown := after.Size() - before.Size(); grown > sandboxes*maxPlainLine {
		t.Errorf("%d events take %d bytes", sandboxes, grown)
	}
	l = openLog(t, dir)
	events, _, err := l.after(0)
	if err != nil || len(events) != 2*sandboxes {
		t.Fatalf("%d events, %v", len(events), err)
	}
	for _, e := range events {
		if !cmp.Equal(e.Labels, labels) {
			t.Fatalf("event %d has labels of %s", e.Cursor, e.Labels.Project)
		}
	}
}

// maxPlainLine is more than an event without metadata takes.
const maxPlainLine = 400

// Absent and empty differ on disk.
func TestLabelsOnDisk(t *testing.T) {
	for want, labels := range map[string]Labels{
		`{}`:                 {},
		`{"metadata":{}}`:    {Metadata: map[string]string{}},
		`{"project":"blue"}`: {Project: "blue"},
	} {
		data, err := json.Marshal(labels)
		if err != nil || string(data) != want {
			t.Errorf("%s, want %s (%v)", data, want, err)
		}
	}
}

// A list of a project has the sandboxes of the project alone; no project is one, too.
func TestListOfAProject(t *testing.T) {
	r := newRig(t)
	ids := map[string]ID{}
	for _, project := range []string{"blue", "red", ""} {
		made, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Project: project, Metadata: map[string]string{"a": "b"}}})
		if err != nil {
			t.Fatal(err)
		}
		ids[project] = made.ID
	}
	for project, id := range ids {
		for _, metadata := range []map[string]string{nil, {"a": "b"}} {
			if got := r.Select(Filter{Project: &project, Metadata: metadata}); len(got) != 1 || got[0].ID != id {
				t.Errorf("project %q, metadata %v: %+v", project, metadata, got)
			}
		}
		if got := r.Select(Filter{Project: &project, Metadata: map[string]string{"a": "c"}}); len(got) != 0 {
			t.Errorf("project %q with other metadata: %+v", project, got)
		}
	}
	if got := r.Select(Filter{}); len(got) != 3 {
		t.Errorf("all: %+v", got)
	}
}
