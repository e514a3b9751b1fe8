package template

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// stageNamed makes all of a snapshot but its name.
func stageNamed(t *testing.T, s *Store, name string) SnapshotStage {
	t.Helper()
	return staged(t, s, Naming{Name: name})
}

func staged(t *testing.T, s *Store, n Naming) SnapshotStage {
	t.Helper()
	stage, err := s.StageSnapshot(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stage.Discard)
	disk := filepath.Join(t.TempDir(), "disk")
	write(t, disk, "disk of "+n.Name)
	write(t, filepath.Join(stage.Dir, "mem"), "memory")
	if err := stage.AddOverlay(t.Context(), disk); err != nil {
		t.Fatal(err)
	}
	return stage
}

func namedMeta(at time.Time) Meta {
	return Meta{Key: "k", Shape: Shape{"qemu", 1, 512, 4096}, Source: &Source{
		Sandbox: "sb-1", Template: "minimal", Base: "b", CloneKey: "secret", Synced: true, CreatedAt: at,
	}}
}

// named makes a snapshot.
func named(t *testing.T, s *Store, n Naming, at time.Time) (Info, Build) {
	t.Helper()
	stage := staged(t, s, n)
	b := Build{VCPUs: 1, MemMiB: 512, DiskMiB: 4096, Over: HostID("minimal"), Base: "b"}
	info, b, err := stage.Publish(t.Context(), namedMeta(at), b)
	if err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	return info, b
}

func TestSnapshots(t *testing.T) {
	s := readyStore(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	stage := stageNamed(t, s, "snap")
	if _, _, err := s.Resolve("", "snap"); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("an unfinished one is there: %v", err)
	}
	info, b, err := stage.Publish(t.Context(), namedMeta(at), Build{VCPUs: 1, Over: HostID("minimal")})
	if err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	got, gotBuild, err := View(s.Dir(), s.log).Resolve("", "snap")
	if err != nil || got.ID != info.ID || gotBuild.ID != b.ID || got.Source != "sb-1" ||
		gotBuild.Status != StatusReady || gotBuild.FinishedAt.IsZero() || got.CreatedAt.IsZero() {
		t.Errorf("another process sees %+v, %+v, %v", got, gotBuild, err)
	}
	snap, err := View(s.Dir(), s.log).Snapshot(t.Context(), info.ID, b.ID) // which reads it all
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(snap.Source, namedMeta(at).Source) || snap.Shape != namedMeta(at).Shape || snap.Key != "k" {
		t.Errorf("it says %+v", snap.Meta)
	}
	if data, err := os.ReadFile(snap.Overlay); err != nil || string(data) != "disk of snap" {
		t.Errorf("its disk is %q, %v", data, err)
	}
	if fi, err := os.Stat(filepath.Join(snap.Dir, manifestFile)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("others may read its key: %v, %v", fi.Mode(), err)
	}
	if s.Bytes(info.ID, b.ID) == 0 {
		t.Error("it takes no space")
	}
	if err := s.Delete(t.Context(), info.ID, "", nil); err != nil {
		t.Error(err)
	}
	if err := s.Delete(t.Context(), info.ID, "", nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if _, err := s.Snapshot(t.Context(), info.ID, b.ID); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("deleted: %v", err)
	}
	for _, id := range []string{"", "..", "lock", "../kernels", "minimal"} {
		if _, err := s.Snapshot(t.Context(), id, b.ID); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("id %q: %v", id, err)
		}
		if err := s.Delete(t.Context(), id, "", nil); err == nil {
			t.Errorf("deleted %q", id)
		}
	}
	wantTemplates(t, s, 1)
}

func TestSnapshotNames(t *testing.T) {
	s := readyStore(t)
	now := time.Now()
	first, _ := named(t, s, Naming{Name: "snap"}, now)
	for name, c := range map[string]struct {
		naming Naming
		want   *errdefs.Class
	}{
		"a template's":            {Naming{Name: "minimal"}, errdefs.AlreadyExists},
		"the host's template's":   {Naming{Project: "p", Name: "minimal"}, errdefs.AlreadyExists},
		"an id":                   {Naming{Name: first.ID}, errdefs.AlreadyExists},
		"another's id":            {Naming{Project: "p", Name: first.ID}, errdefs.AlreadyExists},
		"one that must be new":    {Naming{Name: "snap", New: true}, errdefs.AlreadyExists},
		"..":                      {Naming{Name: ".."}, errdefs.InvalidArgument},
		"a path":                  {Naming{Name: "../x"}, errdefs.InvalidArgument},
		"upper case":              {Naming{Name: "A"}, errdefs.InvalidArgument},
		"a dot first":             {Naming{Name: ".hidden"}, errdefs.InvalidArgument},
		"zero":                    {Naming{Name: "a\x00b"}, errdefs.InvalidArgument},
		"a tag in the name":       {Naming{Name: "a:b"}, errdefs.InvalidArgument},
		"a tag that is a build":   {Naming{Name: "a", Tag: newUUID()}, errdefs.InvalidArgument},
		"a tag in upper case":     {Naming{Name: "a", Tag: "A"}, errdefs.InvalidArgument},
		"a tag that is a path":    {Naming{Name: "a", Tag: "../x"}, errdefs.InvalidArgument},
		"another tag, to be new":  {Naming{Name: "snap", Tag: "v2", New: true}, nil},
		"another project's name":  {Naming{Project: "p", Name: "snap", New: true}, nil},
		"the name of a lock file": {Naming{Name: "lock", New: true}, nil},
	} {
		stage, err := s.StageSnapshot(t.Context(), c.naming)
		if got := errdefs.ClassOf(err); got != c.want || (err != nil) != (c.want != nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil {
			stage.Discard()
		}
	}

	// Two projects may have the same name; each gets its own.
	ours, _ := named(t, s, Naming{Project: "p", Name: "snap"}, now)
	theirs, _ := named(t, s, Naming{Project: "q", Name: "snap"}, now)
	for project, want := range map[string]string{"": first.ID, "p": ours.ID, "q": theirs.ID, "r": first.ID} {
		if got, _, err := s.Resolve(project, "snap"); err != nil || got.ID != want {
			t.Errorf("project %q gets %s, %v; want %s", project, got.ID, err, want)
		}
	}
	if got, _, err := s.Resolve("p", theirs.ID); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("another's by its id: %+v, %v", got, err)
	}
	// Without a name it is known by its id.
	unnamed, b := named(t, s, Naming{Project: "p"}, now)
	if got, gotBuild, err := s.Resolve("p", unnamed.ID+":default"); err != nil || len(got.Names) > 0 || gotBuild.ID != b.ID {
		t.Errorf("unnamed: %+v, %+v, %v", got, gotBuild, err)
	}
}

// TestNextBuild: a snapshot under a name that there is becomes its next build when it is
// complete; the build before goes with its last tag.
func TestNextBuild(t *testing.T) {
	s := readyStore(t)
	at := time.Now()
	info, first := named(t, s, Naming{Project: "p", Name: "snap"}, at)
	if err := s.Tag(info.ID, first.ID, []string{"v1", "old"}); err != nil {
		t.Fatal(err)
	}
	stage, err := s.StageSnapshot(t.Context(), Naming{Project: "p", Name: "snap"})
	if err != nil {
		t.Fatal(err)
	}
	if _, b, err := s.Resolve("p", "snap"); err != nil || b.ID != first.ID {
		t.Errorf("before the next is complete: %+v, %v", b, err)
	}
	stage.Discard()
	again, second := named(t, s, Naming{Project: "p", Name: "snap"}, at.Add(time.Second))
	if again.ID != info.ID || len(again.Builds) != 2 || again.Builds[0].ID != second.ID {
		t.Errorf("the template is %+v", again)
	}
	for tag, want := range map[string]string{"": second.ID, ":default": second.ID, ":v1": first.ID, ":" + first.ID: first.ID} {
		if _, b, err := s.Resolve("p", "snap"+tag); err != nil || b.ID != want {
			t.Errorf("snap%s is %s, %v; want %s", tag, b.ID, err, want)
		}
	}
	_, _, err = s.Resolve("p", "snap:v3")
	if errdefs.ClassOf(err) != errdefs.NotFound || err.Error() != "tag 'v3' does not exist for template 'snap:v3'" {
		t.Errorf("no such tag: %v", err)
	}
	dir := filepath.Join(s.templateDir(info.ID), first.ID)
	if err := s.Untag(info.ID, []string{"v1", "never"}); err != nil || missing(dir) {
		t.Errorf("untagged: %v, gone: %v", err, missing(dir))
	}
	if err := s.Untag(info.ID, []string{"old"}); err != nil || !missing(dir) {
		t.Errorf("the last tag: %v, gone: %v", err, missing(dir))
	}
	if _, _, err := s.Resolve("p", "snap:"+first.ID); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("a build without a tag: %v", err)
	}
	if err := s.Untag(info.ID, []string{"default"}); errdefs.ClassOf(err) != errdefs.InvalidArgument {
		t.Errorf("default: %v", err)
	}
	// A tag that moves takes the last one of the build before.
	if err := s.Tag(info.ID, second.ID, []string{"v2"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), info.ID, "default", nil); err != nil {
		t.Fatal(err)
	}
	if _, b, err := s.Resolve("p", "snap:v2"); err != nil || b.ID != second.ID {
		t.Errorf("one tag is deleted: %+v, %v", b, err)
	}
	if err := s.Delete(t.Context(), info.ID, "default", nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("a tag that is gone: %v", err)
	}
	if err := s.Delete(t.Context(), info.ID, "v2", nil); err != nil {
		t.Fatal(err)
	}
	wantTemplates(t, s, 1)
	if err := s.Tag(info.ID, second.ID, []string{"x"}); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("tag what is gone: %v", err)
	}
}

func TestTags(t *testing.T) {
	s := readyStore(t)
	id, b := minimalOf(t, s)
	if err := s.Tag(id, b, []string{"v1"}); err != nil {
		t.Fatal(err)
	}
	for _, tags := range [][]string{{"Bad"}, {""}, {newUUID()}, {"ok", "a/b"}} {
		if err := s.Tag(id, b, tags); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("tags %q: %v", tags, err)
		}
	}
	for _, build := range []string{newUUID(), "v1", ""} {
		if err := s.Tag(id, build, []string{"x"}); errdefs.ClassOf(err) != errdefs.NotFound {
			t.Errorf("build %q: %v", build, err)
		}
	}
	if err := s.SetPublic(id, true); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "..", "x", newTemplateID()} {
		if err := s.SetPublic(id, true); err == nil {
			t.Errorf("id %q", id)
		}
	}
	put(t, s, "minimal", "another image")
	info, err := View(s.Dir(), s.log).List()
	if err != nil || len(info) != 1 || !info[0].Public || len(info[0].Builds) != 2 || len(info[0].Tags) != 2 {
		t.Fatalf("list: %+v, %v", info, err)
	}
	if _, got, err := s.Resolve("any", "minimal:v1"); err != nil || got.ID != b {
		t.Errorf("v1 is %+v, %v; want %s", got, err, b)
	}
	// A build of a template that has no tag stays while a sandbox may need it.
	if err := s.Untag(id, []string{"v1"}); err != nil {
		t.Fatal(err)
	}
	for _, needed := range []bool{true, false} {
		if err := s.Prune(t.Context(), func(_ Info, build Build) bool { return needed && build.ID == b }); err != nil {
			t.Fatal(err)
		}
		if s.Has(id, b) != needed {
			t.Errorf("needed %v: there %v", needed, s.Has(id, b))
		}
	}
	if _, err := s.Get("minimal"); err != nil {
		t.Error(err)
	}
}

// TestDeleteInUse: what says that a template is needed is asked before it is out of
// sight and again when it is, and is obeyed both times.
func TestDeleteInUse(t *testing.T) {
	s := readyStore(t)
	id, b := minimalOf(t, s)
	used := errdefs.WrongState.Errorf("it is used")
	for at := 1; at <= 2; at++ {
		asked := 0
		err := s.Delete(t.Context(), id, "", func(info Info) error {
			if asked++; s.Has(id, b) != (asked == 1) || info.ID != id {
				t.Errorf("asked for the %d. time of %s, it is there: %v", asked, info.ID, s.Has(id, b))
			}
			if asked == at {
				return used
			}
			return nil
		})
		if !errors.Is(err, used) || !s.Has(id, b) {
			t.Errorf("used at %d: %v, it is there: %v", at, err, s.Has(id, b))
		}
		wantTemplates(t, s, 1)
	}
	snap, _ := named(t, s, Naming{Name: "snap"}, time.Now())
	if err := s.Delete(t.Context(), id, "", nil); errdefs.ClassOf(err) != errdefs.WrongState || !strings.Contains(err.Error(), "snapshots") {
		t.Errorf("a snapshot needs it: %v", err)
	}
	if err := errors.Join(s.Delete(t.Context(), snap.ID, "", nil), s.Delete(t.Context(), id, "", nil)); err != nil {
		t.Error(err)
	}
	wantTemplates(t, s, 0)
}

func TestCountSpawn(t *testing.T) {
	s := readyStore(t)
	id, _ := minimalOf(t, s)
	for range 12 {
		s.CountSpawn(id)
	}
	s.CountSpawn(newTemplateID())
	for _, s := range []*Store{s, open(t, s.Dir())} {
		if list, err := s.List(); err != nil || list[0].Spawned != 12 || time.Since(list[0].SpawnedAt) > time.Hour {
			t.Errorf("list: %+v, %v", list, err)
		}
	}
	if err := s.SetPublic(id, true); err != nil { // which reads all again
		t.Fatal(err)
	}
	s.CountSpawn(id)
	if list, err := s.List(); err != nil || list[0].Spawned != 13 {
		t.Errorf("list: %+v, %v", list, err)
	}
	if err := os.WriteFile(filepath.Join(s.templateDir(id), spawnedFile), []byte(`{"count":1`), 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err := open(t, s.Dir()).List(); err != nil || list[0].Spawned != 0 {
		t.Errorf("after a torn write: %+v, %v", list, err)
	}
}

// TestUnfinishedBuild is garbage at the next start, at each step of its publishing, unless
// it is still being made.
func TestUnfinishedBuild(t *testing.T) {
	s := readyStore(t)
	info, b := named(t, s, Naming{Name: "snap"}, time.Now())
	stage := stageNamed(t, s, "half")
	garbage := []string{
		filepath.Join(s.templates(), ".snapshot-dead", "mem"),                               // being written
		filepath.Join(s.templates(), ".new-dead", newUUID(), "mem"),                         // not listed
		filepath.Join(s.templates(), ".old-dead", newTemplateID(), "template.json"),         // deleted
		filepath.Join(s.templateDir(info.ID), newUUID(), "mem"),                             // in its place, not listed
		filepath.Join(s.templateDir(info.ID), ".old-dead", "mem"),                           // being removed
		filepath.Join(s.templateDir(HostID("minimal")), newUUID(), "base.ext4"),             // likewise of a template
		filepath.Join(s.templateDir(info.ID), ".template.json123456"),                       // being listed
		filepath.Join(s.templateDir(HostID("minimal")), ".old-dead2", "ready", keyA, "mem"), //
	}
	for _, path := range garbage {
		write(t, path, "half")
	}
	open(t, s.Dir())
	if missing(stage.Dir) {
		t.Error("another process removed what is being made")
	}
	stage.Discard()
	s = open(t, s.Dir())
	for _, path := range garbage {
		if !missing(path) {
			t.Errorf("garbage is kept: %s", path)
		}
	}
	wantTemplates(t, s, 2)
	if _, err := s.Snapshot(t.Context(), info.ID, b.ID); err != nil {
		t.Error(err)
	}
}

// TestPublishThatFails leaves nothing, and the build before in its place.
func TestPublishThatFails(t *testing.T) {
	s := readyStore(t)
	_, before := named(t, s, Naming{Name: "snap"}, time.Now())
	stage := stageNamed(t, s, "snap")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := stage.Publish(ctx, namedMeta(time.Now()), Build{}); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller has left: %v", err)
	}
	stage.Discard()
	if _, b, err := s.Resolve("", "snap"); err != nil || b.ID != before.ID {
		t.Errorf("it is %+v, %v", b, err)
	}
	// Another one has taken the name.
	stage = stageNamed(t, s, "mine")
	build(t, s, "mine", "image")
	if _, _, err := stage.Publish(t.Context(), namedMeta(time.Now()), Build{}); errdefs.ClassOf(err) != errdefs.AlreadyExists {
		t.Errorf("the name is taken: %v", err)
	}
	stage.Discard()
	wantTemplates(t, s, 3)
}

// TestDamagedInfo: what is known of a template is not believed if it is damaged, and a
// template that is made again takes its builds.
func TestDamagedInfo(t *testing.T) {
	s := readyStore(t)
	put(t, s, "box", "image") // and a kernel
	base := buildOf(t, s, "minimal")
	named(t, s, Naming{Name: "snap"}, time.Now())
	path := filepath.Join(s.templateDir(HostID("minimal")), infoFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	another, err := os.ReadFile(filepath.Join(s.templateDir(HostID("box")), infoFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"a flipped bit": bytes.Replace(good, []byte("minimal"), []byte("mininal"), 1),
		"empty":         nil, "torn": good[:len(good)/2],
		"of another": another,
	} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, s.Dir())
		_, err := s.Get("minimal")
		says := err != nil && strings.Contains(err.Error(), HostID("minimal")) && !strings.Contains(err.Error(), s.Dir())
		if errdefs.ClassOf(err) != errdefs.Corrupt || !says {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Get("box"); err != nil {
			t.Errorf("%s: another one: %v", name, err)
		}
		if _, _, err := s.Resolve("", "snap"); err != nil {
			t.Errorf("%s: a snapshot: %v", name, err)
		}
		var found []string
		err = s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error {
			if v.Err != nil {
				found = append(found, v.Name)
			}
			return nil
		})
		if err != nil || !slices.Contains(found, HostID("minimal")) {
			t.Errorf("%s: verify found %q, %v", name, found, err)
		}
		if missing(base) {
			t.Errorf("%s: its builds are gone", name)
		}
	}
	s = open(t, s.Dir())
	build(t, s, "minimal", "made again")
	info, _, err := s.Resolve("", "minimal")
	if err != nil || len(info.Builds) != 2 {
		t.Errorf("made again: %+v, %v", info, err)
	}
	open(t, s.Dir())
	if missing(base) {
		t.Error("the build before is gone")
	}
}

func TestDamagedSnapshot(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(dir string) error
		says   string
	}{
		"a bit of the memory": {func(dir string) error {
			if err := os.Remove(filepath.Join(dir, "mem")); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "mem"), []byte("mEmory"), 0o444)
		}, "mem is not what was written"},
		"a shorter disk": {func(dir string) error {
			return os.Truncate(filepath.Join(dir, readyOverlay), 1)
		}, "overlay.ext4 has 1 bytes, want 12"},
		"no memory":   {func(dir string) error { return os.Remove(filepath.Join(dir, "mem")) }, "mem is missing"},
		"no manifest": {func(dir string) error { return os.Remove(filepath.Join(dir, manifestFile)) }, "manifest.json is missing"},
		"a boot snapshot's manifest": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, manifestFile), []byte(`{"format":1,"files":{"mem":{"size":6}}}`), 0o600)
		}, "names no source"},
	} {
		t.Run(name, func(t *testing.T) {
			s := readyStore(t)
			info, b := named(t, s, Naming{Name: "snap"}, time.Now())
			if err := c.damage(filepath.Join(s.templateDir(info.ID), b.ID)); err != nil {
				t.Fatal(err)
			}
			_, err := View(s.Dir(), s.log).Snapshot(t.Context(), info.ID, b.ID)
			says := err != nil && strings.Contains(err.Error(), c.says) && !strings.Contains(err.Error(), s.Dir())
			if errdefs.ClassOf(err) != errdefs.Corrupt || !says {
				t.Errorf("it says %v, want corrupt: %s", err, c.says)
			}
			if err := s.Delete(t.Context(), info.ID, "", nil); err != nil {
				t.Errorf("it cannot be deleted: %v", err)
			}
		})
	}
}

// TestChangesAtOnce: what several processes change at the same time is all there, and
// each sees it.
func TestChangesAtOnce(t *testing.T) {
	s := readyStore(t)
	const each = 6
	stores := []*Store{s, open(t, s.Dir()), open(t, s.Dir())}
	id, b := minimalOf(t, s)
	var all sync.WaitGroup
	for i, store := range stores {
		all.Go(func() {
			for n := range each {
				if err := store.Tag(id, b, []string{fmt.Sprintf("v%d-%d", i, n)}); err != nil {
					t.Error(err)
				}
				if _, _, err := store.Resolve("", fmt.Sprintf("minimal:v%d-%d", i, n)); err != nil {
					t.Errorf("its own change: %v", err)
				}
			}
		})
		stage := stageNamed(t, store, "snap")
		all.Go(func() {
			if _, _, err := stage.Publish(t.Context(), namedMeta(time.Now()), Build{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, store := range append(stores, View(s.Dir(), s.log)) {
		list, err := store.List()
		if err != nil || len(list) != 2 {
			t.Fatalf("list: %+v, %v", list, err)
		}
		for _, info := range list {
			if want := 1 + each*len(stores); info.ID == id && len(info.Tags) != want {
				t.Errorf("%d tags, want %d", len(info.Tags), want)
			}
			if info.ID != id && (len(info.Builds) != 1 || len(info.Tags) != 1) {
				t.Errorf("the snapshot is %+v", info)
			}
		}
	}
}
