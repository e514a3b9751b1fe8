package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// TestTemplateOfASandbox: a sandbox knows the ids of the template that its disk is over,
// whatever happens to it, and so do its forks and what is made from its snapshots.
func TestTemplateOfASandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		want := func(what string, id ID, build string) {
			t.Helper()
			info, err := r.Get(id)
			if err != nil || info.Template != "minimal" || info.TemplateID != minimal.ID || info.Build != build {
				t.Errorf("%s: template %q, %q, build %q, %v", what, info.Template, info.TemplateID, info.Build, err)
			}
		}
		build := minimal.Builds[0].ID
		id, _ := snapshotted(r, CreateRequest{Template: minimal.ID + ":" + build}, "snap")
		want("created", id, build)
		forked, err := r.Fork(t.Context(), id, ForkRequest{Count: 1})
		if err != nil {
			t.Fatal(err)
		}
		fork := forked.Sandboxes[0].ID
		want("fork", fork, build)
		copied, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
		if err != nil {
			t.Fatal(err)
		}
		want("from the snapshot", copied.ID, build)
		for _, what := range []Hibernation{{}, {FilesOnly: true}} {
			if err := errors.Join(r.Pause(t.Context(), id), r.Resume(t.Context(), id), r.Hibernate(t.Context(), id, what)); err != nil {
				t.Fatal(err)
			}
			want("hibernated", id, build)
			if err := r.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			want("resumed", id, build)
		}
		r.die()
		r.start()
		for _, id := range []ID{id, fork, copied.ID} {
			want("adopted", id, build)
		}
		// A record of an earlier version names the template alone.
		b, err := r.find(id)
		if err == nil {
			err = r.save(b, func(rec *Record) { rec.TemplateID, rec.Build = "", "" })
		}
		if err := errors.Join(err, r.Hibernate(t.Context(), id, Hibernation{}), r.Resume(t.Context(), id)); err != nil {
			t.Fatal(err)
		}
		want("of an earlier version", id, "")
		if err := r.Events(t.Context(), 0, false, func(e Event) error {
			if e.ID == fork && (e.TemplateID != minimal.ID || e.Build != build) {
				t.Errorf("event %+v", e)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
}

// TestTemplateInUse: a template is needed as long as a sandbox exists whose disk is over
// it, and a snapshot by none.
func TestTemplateInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		if err := r.usersOf(minimal); err != nil {
			t.Errorf("without sandboxes: %v", err)
		}
		id, made := snapshotted(r, CreateRequest{}, "snap")
		from, err := r.Create(t.Context(), CreateRequest{Template: "snap"})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Destroy(t.Context(), from.ID); err != nil {
			t.Fatal(err)
		}
		says := func(how string) {
			t.Helper()
			err := r.usersOf(minimal)
			wantClass(t, err, errdefs.WrongState)
			want := "cannot delete template '" + minimal.ID + "' because there are " + how + " sandboxes using it: " + string(id)
			if err == nil || err.Error() != want {
				t.Errorf("it says %v, want %s", err, want)
			}
		}
		says("running")
		for _, change := range []func() error{
			func() error { return r.Pause(t.Context(), id) },
			func() error { return r.Hibernate(t.Context(), id, Hibernation{}) },
		} {
			if err := change(); err != nil {
				t.Fatal(err)
			}
			says("paused")
		}
		if err := r.usersOf(template.Info{ID: template.HostID("other")}); err != nil {
			t.Errorf("another template: %v", err)
		}
		r.die()
		r.spoil(id, func(d []byte) []byte { return d[:len(d)-20] })
		r.host.Die(string(id))
		os.Remove(filepath.Join(r.store.dir, string(id), "record.prev.json"))
		r.start()
		r.wantState(id, Unknown)
		if err := r.usersOf(minimal); errdefs.ClassOf(err) != errdefs.WrongState || !strings.Contains(err.Error(), "unknown") {
			t.Errorf("with an unknown sandbox: %v", err)
		}
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := r.usersOf(minimal); err != nil {
			t.Errorf("after the last sandbox: %v", err)
		}
		if err := r.DeleteTemplate(t.Context(), made.TemplateID, ""); err != nil {
			t.Errorf("a snapshot: %v", err)
		}
		r.wantNothing()
	})
}

// snap keeps the state of a sandbox for a project.
func (r *rig) snap(id ID, project, name, tag string) Snapshotted {
	r.t.Helper()
	made, err := r.Snapshot(r.t.Context(), id, SnapshotRequest{Project: project, Name: name, Tag: tag})
	if err != nil {
		r.t.Fatal(err)
	}
	return made
}

// createFor makes a sandbox of a project.
func (r *rig) createFor(project, text string) (Created, error) {
	return r.Create(r.t.Context(), CreateRequest{Template: text, Labels: Labels{Project: project}})
}

// TestSnapshotsOfProjects: names are a project's own, and what is used is counted.
func TestSnapshotsOfProjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		p, q, unnamed := r.snap(id, "p", "snap", ""), r.snap(id, "q", "snap", ""), r.snap(id, "p", "", "")
		if p.TemplateID == q.TemplateID || unnamed.Name != unnamed.TemplateID || p.Name != "snap" || p.Tag != "default" {
			t.Errorf("made %+v, %+v, %+v", p, q, unnamed)
		}
		for _, c := range []struct {
			project, text string
			want          bool
		}{
			{"p", "snap", true}, {"p", "snap:default", true}, {"p", "p/snap", true}, {"p", p.TemplateID, true},
			{"p", unnamed.Name + ":default", true}, {"p", q.TemplateID, false}, {"p", "q/snap", false},
			{"q", "snap", true}, {"q", "q/snap", true}, {"q", "p/snap", false}, {"q", unnamed.Name, false},
			{"q", p.TemplateID + ":" + p.Build, false},
			{"", "snap", false}, {"", "p/snap", false}, {"", p.TemplateID, false},
		} {
			created, err := r.createFor(c.project, c.text)
			if (err == nil) != c.want || err != nil && errdefs.ClassOf(err) != errdefs.NotFound || created.Labels.Project != c.project && c.want {
				t.Errorf("project %q from %s: %+v, %v, want %v", c.project, c.text, created.Labels, err, c.want)
			}
		}
		all, err := r.tmpl.List()
		if err != nil {
			t.Fatal(err)
		}
		spawned := map[string]int64{p.TemplateID: 4, q.TemplateID: 2, unnamed.TemplateID: 1}
		for _, info := range all {
			if want, ok := spawned[info.ID]; ok && info.Spawned != want {
				t.Errorf("%s was used %d times, want %d", info.Name(), info.Spawned, want)
			}
		}
		wantClass(t, r.DeleteSnapshot(t.Context(), "", "snap"), errdefs.NotFound)
		wantClass(t, r.DeleteSnapshot(t.Context(), "q", p.TemplateID), errdefs.NotFound)
		if err := r.DeleteSnapshot(t.Context(), "p", unnamed.Name); err != nil {
			t.Error(err)
		}
		for _, project := range []string{"p", "q"} {
			if list, err := r.Snapshots(project); err != nil || len(list) != 1 {
				t.Errorf("left of project %s: %+v, %v", project, list, err)
			}
		}
	})
}

// TestNextSnapshotOfAName is the next build of the same template.
func TestNextSnapshotOfAName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		first, again, tagged := r.snap(id, "p", "snap", ""), r.snap(id, "p", "snap", ""), r.snap(id, "p", "snap", "v2")
		if again.TemplateID != first.TemplateID || again.Build == first.Build || tagged.Name != "snap:v2" || tagged.Build == again.Build {
			t.Errorf("the next builds are %+v, %+v", again, tagged)
		}
		_, err := r.createFor("p", "snap:"+first.Build) // which has no tag any more
		wantClass(t, err, errdefs.NotFound)
		if created, err := r.createFor("p", "snap:v2"); err != nil || created.Snapshot != "p/snap:v2" {
			t.Errorf("from a tag: %+v, %v", created, err)
		}
		_, err = r.Snapshot(t.Context(), id, SnapshotRequest{Project: "p", Name: "snap", New: true})
		wantClass(t, err, errdefs.AlreadyExists)
		wantClass(t, r.DeleteSnapshot(t.Context(), "p", "snap:v3"), errdefs.NotFound)
		if err := r.DeleteSnapshot(t.Context(), "p", "snap:v2"); err != nil {
			t.Error(err)
		}
		if list, err := r.Snapshots("p"); err != nil || len(list) != 1 || list[0] != again.Snapshot {
			t.Errorf("left: %+v, %v", list, err)
		}
	})
}
