package template

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// making is what the tests' builds are made with.
func making() Making {
	return Making{Recipe: "test", Defaults: Defaults{VCPUs: 2, MemMiB: 1024, OverlayMiB: 4096}}
}

// begin adds a build to a template and begins to make it.
func begin(t *testing.T, s *Store, n NewBuild) (Info, Build, *BuildStage) {
	t.Helper()
	info, b, err := s.NewBuild(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusBuilding, nil); err != nil {
		t.Fatal(err)
	}
	stage, err := s.StageBuild(t.Context(), info.ID, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stage.Discard)
	return info, b, stage
}

// layer adds a layer of the contents.
func layer(t *testing.T, stage *BuildStage, content string) {
	t.Helper()
	path := filepath.Join(stage.Dir(), "a file")
	write(t, path, content)
	if err := stage.AddLayer(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the file is still in Dir: %v", err)
	}
}

// made makes a build of layers of these contents, on those of another template unless
// that is empty.
func made(t *testing.T, s *Store, n NewBuild, from string, contents ...string) (Info, Build) {
	t.Helper()
	info, b, stage := begin(t, s, n)
	if from != "" {
		tmpl, err := s.Get(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := stage.Inherit(tmpl); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range contents {
		layer(t, stage, c)
	}
	if _, _, err := stage.Publish(t.Context(), making()); err != nil {
		t.Fatal(err)
	}
	if err := s.Finish(t.Context(), info.ID, b.ID, nil); err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	info, b, err := s.Resolve(n.Project, info.ID+":"+b.ID)
	if err != nil {
		t.Fatal(err)
	}
	return info, b
}

// holds demands that a template has layers of these contents, lowest first.
func holds(t *testing.T, tmpl Template, contents ...string) {
	t.Helper()
	var got []string
	for _, path := range tmpl.Paths() {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		got = append(got, string(data))
	}
	if !slices.Equal(got, contents) {
		t.Errorf("layers %q, want %q", got, contents)
	}
}

func TestBuildBecomesReady(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	info, b, err := s.NewBuild(t.Context(),
		NewBuild{Project: "p", Name: "mine", Tags: []string{"v1", "default", "v1"}, VCPUs: 4, DiskMiB: 512})
	if err != nil {
		t.Fatal(err)
	}
	if b.Status != StatusWaiting || !slices.Equal(b.Wants, []string{"default", "v1"}) || b.VCPUs != 4 || info.Project != "p" {
		t.Errorf("new: %+v of %+v", b, info)
	}
	s.wantUnfinished(t, info, b)
	stage, err := s.StageBuild(t.Context(), info.ID, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	if _, err := stage.Root(t.Context()); err == nil {
		t.Error("a root of no layers")
	}
	minimal, err := s.Get("minimal")
	if err != nil {
		t.Fatal(err)
	}
	if err := stage.Inherit(minimal); err != nil {
		t.Fatal(err)
	}
	layer(t, stage, "second")
	soFar, err := stage.Root(t.Context())
	if err != nil || soFar.Kernel == "" {
		t.Fatal(soFar, err)
	}
	holds(t, soFar, "image", "second")
	if _, _, err := stage.Publish(t.Context(), making()); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("published while waiting: %v", err)
	}
	if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusBuilding, nil); err != nil {
		t.Fatal(err)
	}
	about := making()
	about.Start = Program{Start: "serve", Ready: "curl", Login: Login{User: "user"}}
	about.History = []HistoryEntry{{CreatedBy: "RUN true", Empty: true}}
	if _, b, err = stage.Publish(t.Context(), about); err != nil || b.Status != StatusBuilding || b.VCPUs != 2 || b.Base != soFar.RootSHA256 {
		t.Fatalf("published as %+v, %v", b, err)
	}
	if _, _, err := s.Resolve("p", "mine:v1"); err == nil {
		t.Error("a tag leads to a build that is not finished")
	}
	if prepared, err := s.Root(info, b); err != nil || prepared.Start.Start != "serve" {
		t.Errorf("to be prepared: %+v, %v", prepared, err)
	}
	if again, err := stage.Root(t.Context()); err != nil {
		t.Error(err)
	} else {
		holds(t, again, "image", "second")
	}
	if err := s.Finish(t.Context(), info.ID, b.ID, nil); err != nil {
		t.Fatal(err)
	}
	stage.Discard()
	s.wantReady(t, info.ID, b.ID)
	noDots(t, s)
}

// wantUnfinished demands that a waiting build is of no use.
func (s *Store) wantUnfinished(t *testing.T, info Info, b Build) {
	t.Helper()
	if err := s.Finish(t.Context(), info.ID, b.ID, nil); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("finished while waiting: %v", err)
	}
	if _, _, err := s.Resolve("p", "mine"); !errors.Is(err, errdefs.NotFound) && !errors.Is(err, errdefs.WrongState) {
		t.Errorf("a template without a build that is ready: %v", err)
	}
	if _, err := s.Root(info, b); !errors.Is(err, errdefs.WrongState) || !strings.Contains(err.Error(), "waiting") {
		t.Errorf("root of a waiting build: %v", err)
	}
}

// wantReady demands that the build of "mine" can be used and says how it was made.
func (s *Store) wantReady(t *testing.T, id, build string) {
	t.Helper()
	for _, name := range []string{"mine", "mine:v1", "p/mine"} {
		info, b, err := s.Resolve("p", name)
		if err != nil || b.Wants != nil || b.Owner != 0 || b.FinishedAt.IsZero() {
			t.Fatalf("%s: %+v, %v", name, b, err)
		}
		got, err := s.Root(info, b)
		if err != nil {
			t.Fatal(err)
		}
		holds(t, got, "image", "second")
		if old, err := s.RootOf(info.ID, got.RootSHA256); err != nil || old.Build != b.ID {
			t.Errorf("by its digest: %+v, %v", old, err)
		}
	}
	how, err := s.Inspect(id, build)
	if err != nil || len(how.Layers) != 2 || how.History[0].CreatedBy != "RUN true" {
		t.Errorf("inspect: %+v, %v", how, err)
	}
	if err := s.SetBuild(t.Context(), id, build, StatusError, nil); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("a ready build becomes an error: %v", err)
	}
}

// noDots demands that nothing half-made is left.
func noDots(t *testing.T, s *Store) {
	t.Helper()
	_ = filepath.WalkDir(s.templates(), func(path string, _ os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(filepath.Base(path), ".") {
			t.Errorf("left %s", path)
		}
		return err
	})
}

func TestLayersAreShared(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", strings.Repeat("image ", 5000))
	first, firstBuild := made(t, s, NewBuild{Name: "first"}, "minimal", strings.Repeat("a", 9000))
	_, one := s.Sizes(first.ID, "")
	if own, shared := s.Sizes(first.ID, firstBuild.ID); shared != one || own < 9000 || own > 40000 || shared < 30000 || shared > 40000 {
		t.Errorf("first has %d own and %d shared", own, shared)
	}
	second, _ := made(t, s, NewBuild{Name: "second"}, "first", "b")
	tmpl, err := s.Get("second")
	if err != nil {
		t.Fatal(err)
	}
	holds(t, tmpl, strings.Repeat("image ", 5000), strings.Repeat("a", 9000), "b")
	if own, shared := s.Sizes(second.ID, ""); own > 20000 || shared < 39000 {
		t.Errorf("second has %d own and %d shared", own, shared)
	}
	// What stands on it does not need it.
	if err := s.Delete(t.Context(), first.ID, "", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("second"); err != nil {
		t.Error(err)
	}
	if own, shared := s.Sizes(second.ID, ""); own < 9000 || shared < 30000 {
		t.Errorf("second then has %d own and %d shared", own, shared)
	}
	if err := s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error { return v.Err }); err != nil {
		t.Error(err)
	}
	// Damage in a shared layer shows in both.
	if err := os.Chmod(tmpl.Layers[0].Path, 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, tmpl.Layers[0].Path, strings.Repeat("imagE ", 5000))
	var damaged []string
	err = s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error {
		if errors.Is(v.Err, errdefs.Corrupt) {
			damaged = append(damaged, v.Name)
		}
		return nil
	})
	if slices.Sort(damaged); err != nil || !slices.Equal(damaged, []string{"minimal", "second"}) {
		t.Errorf("damaged %q, %v", damaged, err)
	}
}

func TestLayersThatAreRefused(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	info, b, stage := begin(t, s, NewBuild{Name: "mine"})
	outside := filepath.Join(s.Dir(), "outside")
	write(t, filepath.Join(stage.Dir(), "empty"), "")
	if err := os.Symlink("/etc/passwd", filepath.Join(stage.Dir(), "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"missing", "empty", "link", "."} {
		if err := stage.AddLayer(t.Context(), filepath.Join(stage.Dir(), path)); err == nil {
			t.Errorf("%s is a layer", path)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	write(t, outside, "outside")
	if err := stage.AddLayer(ended, outside); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, _, err := stage.Publish(t.Context(), making()); err == nil {
		t.Error("published without layers")
	}
	if err := stage.AddLayer(t.Context(), outside); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(outside); err != nil || string(data) != "outside" {
		t.Errorf("a file of others is gone: %q, %v", data, err)
	}
	minimal, err := s.Get("minimal")
	if err != nil {
		t.Fatal(err)
	}
	if err := stage.Inherit(minimal); err == nil {
		t.Error("inherited on top")
	}
	for i := 1; i < MaxLayers; i++ {
		layer(t, stage, strings.Repeat("x", i))
	}
	if err := stage.AddLayer(t.Context(), outside); !errors.Is(err, errdefs.Exhausted) {
		t.Errorf("one more than %d: %v", MaxLayers, err)
	}
	bad := making()
	bad.Defaults.MemMiB = 0
	if _, _, err := stage.Publish(t.Context(), bad); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("published without memory: %v", err)
	}
	if _, _, err := stage.Publish(t.Context(), making()); err != nil {
		t.Fatal(err)
	}
	if err := stage.AddLayer(t.Context(), outside); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("added to what is published: %v", err)
	}
	if err := s.Finish(t.Context(), info.ID, b.ID, nil); err != nil {
		t.Fatal(err)
	}
	tmpl, err := s.Get("mine")
	if err != nil || len(tmpl.Layers) != MaxLayers {
		t.Fatal(tmpl, err)
	}
	_, _, full := begin(t, s, NewBuild{Name: "more"})
	if err := full.Inherit(tmpl); err != nil {
		t.Fatal(err)
	}
	if err := full.AddLayer(t.Context(), outside); !errors.Is(err, errdefs.Exhausted) {
		t.Errorf("on top of a full stack: %v", err)
	}
	if err := s.Delete(t.Context(), info.ID, "", nil); err != nil {
		t.Fatal(err)
	}
	_, _, late := begin(t, s, NewBuild{Name: "late"})
	if err := late.Inherit(tmpl); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("from what was removed: %v", err)
	}
	layer(t, late, "and yet") // nothing of it is left
}

func TestBuildThatFails(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	info, b, stage := begin(t, s, NewBuild{Name: "mine"})
	layer(t, stage, "x")
	if _, _, err := stage.Publish(t.Context(), making()); err != nil {
		t.Fatal(err)
	}
	if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusError, &Reason{Message: "exit status 1", Step: "2"}); err != nil {
		t.Fatal(err)
	}
	if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusError, &Reason{Message: "later"}); err != nil {
		t.Errorf("failed twice: %v", err)
	}
	for name, err := range map[string]error{
		"finish": s.Finish(t.Context(), info.ID, b.ID, nil),
		"build":  s.SetBuild(t.Context(), info.ID, b.ID, StatusBuilding, nil),
	} {
		if !errors.Is(err, errdefs.WrongState) {
			t.Errorf("%s of a failed build: %v", name, err)
		}
	}
	got, _, err := Lookup(must(s.List()), "", "mine")
	if err != nil {
		t.Fatal(err)
	}
	if f := got.Builds[0]; f.Status != StatusError || *f.Reason != (Reason{"exit status 1", "2"}) || f.FinishedAt.IsZero() || f.Base != "" {
		t.Errorf("failed: %+v", f)
	}
	if s.Has(info.ID, b.ID) {
		t.Error("its files are there")
	}
	stage.Discard()
	noDots(t, s)
	if err := s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error { return v.Err }); err != nil {
		t.Error(err)
	}
	// A template none of whose builds is ready is still one, and can become ready.
	if _, _, err := s.Resolve("", "mine"); err == nil {
		t.Error("a failed build is used")
	}
	made(t, s, NewBuild{Name: "mine"}, "", "y")
	if _, _, err := s.Resolve("", "mine"); err != nil {
		t.Error(err)
	}
	for range maxFailed + 5 {
		info, b, err := s.NewBuild(t.Context(), NewBuild{Name: "mine"})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusError, nil); err != nil {
			t.Fatal(err)
		}
	}
	if got, _, _ = Lookup(must(s.List()), "", "mine"); len(got.Builds) > maxFailed+2 {
		t.Errorf("%d builds are listed", len(got.Builds))
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestNewBuildNames(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	snap, _ := snapshotOf(t, s, "snap")
	first, waiting, err := s.NewBuild(t.Context(), NewBuild{Project: "p", Name: "mine", Tags: []string{"a", "b"}})
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := s.NewBuild(t.Context(), NewBuild{Project: "q", Name: "mine"})
	if err != nil || other.ID == first.ID {
		t.Errorf("another project's: %+v, %v", other, err)
	}
	byID, _, err := s.NewBuild(t.Context(), NewBuild{Project: "p", Name: first.ID, Tags: []string{"c"}})
	if err != nil || byID.ID != first.ID || len(byID.Builds) != 2 {
		t.Errorf("by its id: %+v, %v", byID, err)
	}
	again, _, err := s.NewBuild(t.Context(), NewBuild{Project: "p", Name: "mine", Tags: []string{"b"}})
	if err != nil || len(again.Builds) != 3 {
		t.Fatalf("%+v, %v", again, err)
	}
	if old, _ := again.BuildOf(waiting.ID); old.Status != StatusError || !strings.Contains(old.Reason.Message, "superseded") {
		t.Errorf("superseded: %+v", old)
	}
	if still := again.Builds[1]; still.Status != StatusWaiting {
		t.Errorf("one of another tag: %+v", still)
	}
	shadow, _, err := s.NewBuild(t.Context(), NewBuild{Project: "p", Name: "minimal"})
	if err != nil || shadow.ID == HostID("minimal") {
		t.Errorf("a project's own minimal: %+v, %v", shadow, err)
	}
	if _, _, err := s.Resolve("q", "minimal"); err != nil {
		t.Errorf("another project's minimal: %v", err)
	}
	for name, c := range map[string]struct {
		n    NewBuild
		want *errdefs.Class
	}{
		"no name":      {NewBuild{}, errdefs.InvalidArgument},
		"bad name":     {NewBuild{Name: "../x"}, errdefs.InvalidArgument},
		"bad tag":      {NewBuild{Name: "x", Tags: []string{"a:b"}}, errdefs.InvalidArgument},
		"a snapshot":   {NewBuild{Name: "snap"}, errdefs.WrongState},
		"another's id": {NewBuild{Project: "q", Name: first.ID}, errdefs.AlreadyExists},
		"snapshot id":  {NewBuild{Name: snap.ID}, errdefs.AlreadyExists},
	} {
		if _, _, err := s.NewBuild(t.Context(), c.n); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	noDots(t, s)
}

// snapshotOf publishes a snapshot of a sandbox under a name of the host's.
func snapshotOf(t *testing.T, s *Store, name string) (Info, Build) {
	t.Helper()
	stage, err := s.StageSnapshot(t.Context(), Naming{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	write(t, filepath.Join(stage.Dir, "mem"), "memory")
	info, b, err := stage.Publish(t.Context(), Meta{Key: "k", Source: &Source{Sandbox: "sb-0123456789abcdef"}}, Build{})
	if err != nil {
		t.Fatal(err)
	}
	return info, b
}

// The process that makes a build ends: the next one finds an error with a sentence, and
// nothing of the files.
func TestBuildsOfADeadProcess(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "minimal", "image")
	info, waiting, err := s.NewBuild(t.Context(), NewBuild{Name: "mine", Tags: []string{"later"}})
	if err != nil {
		t.Fatal(err)
	}
	_, building, stage := begin(t, s, NewBuild{Name: "mine"})
	layer(t, stage, "x")
	if _, _, err := stage.Publish(t.Context(), making()); err != nil {
		t.Fatal(err)
	}
	_, half, interrupted := begin(t, s, NewBuild{Name: "mine", Tags: []string{"half"}})
	layer(t, interrupted, "y")

	// Another process opens the store while they are made.
	status := func(s *Store, want ...string) {
		t.Helper()
		got, _, err := Lookup(must(s.List()), "", "mine")
		if err != nil {
			t.Fatal(err)
		}
		for i, id := range []string{waiting.ID, building.ID, half.ID} {
			if b, _ := got.BuildOf(id); b.Status != want[i] || (b.Reason == nil) != (want[i] != StatusError) {
				t.Errorf("build %d is %+v, want %s", i, b, want[i])
			}
		}
	}
	status(open(t, dir), StatusWaiting, StatusBuilding, StatusBuilding)
	if _, err := os.Stat(interrupted.Dir()); err != nil {
		t.Errorf("what is being made is gone: %v", err)
	}

	// The process ends, and with it its locks.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	interrupted.lock.unlock()
	stage.lock.unlock()
	next := open(t, dir)
	status(next, StatusError, StatusError, StatusError)
	if next.Has(info.ID, building.ID) {
		t.Error("the files of an interrupted build are there")
	}
	noDots(t, next)
	if err := next.SetBuild(t.Context(), info.ID, half.ID, StatusBuilding, nil); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("it goes on: %v", err)
	}
	made(t, next, NewBuild{Name: "mine"}, "minimal", "z")
}

func TestBuildOfWhatIsDeleted(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	info, b, stage := begin(t, s, NewBuild{Name: "mine"})
	layer(t, stage, "x")
	if err := s.Delete(t.Context(), info.ID, "", nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := stage.Publish(t.Context(), making()); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("publish: %v", err)
	}
	if err := s.SetBuild(t.Context(), info.ID, b.ID, StatusError, nil); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("set: %v", err)
	}
	if _, err := s.StageBuild(t.Context(), info.ID, b.ID); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("stage: %v", err)
	}
	stage.Discard()
	noDots(t, s)
}

// Builds at once, of one template too, do not disturb each other.
func TestManyBuilds(t *testing.T) {
	dir := t.TempDir()
	s, other := open(t, dir), open(t, dir)
	put(t, s, "minimal", "image")
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			n := NewBuild{Name: []string{"a", "b"}[i/4], Tags: []string{"v" + string(rune('0'+i))}}
			made(t, []*Store{s, other}[i%2], n, "minimal", strings.Repeat("x", i+1))
		})
	}
	all.Wait()
	for i := range 8 {
		tmpl, err := s.Get([]string{"a", "b"}[i/4] + ":v" + string(rune('0'+i)))
		if err != nil {
			t.Error(err)
			continue
		}
		holds(t, tmpl, "image", strings.Repeat("x", i+1))
	}
	noDots(t, s)
}

// A second build of the same stack has the boot snapshots of the first one, and reads
// nothing again.
func TestTheSameStackAgain(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "image")
	info, b := made(t, s, NewBuild{Name: "mine"}, "minimal", "x")
	ready := publishReady(t, s, info.ID, b.ID)
	tmpl, err := s.Get("mine")
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"", "layer", "program"} {
		_, next, stage := begin(t, s, NewBuild{Name: "mine"})
		if err := stage.Inherit(tmpl); err != nil {
			t.Fatal(err)
		}
		about := making()
		about.Start.Env = map[string]string{}
		switch other {
		case "layer":
			layer(t, stage, "more")
		case "program":
			about.Start.Start = "serve"
		}
		if _, _, err := stage.Publish(t.Context(), about); err != nil {
			t.Fatal(err)
		}
		if err := s.Finish(t.Context(), info.ID, next.ID, nil); err != nil {
			t.Fatal(err)
		}
		got, err := s.Ready(t.Context(), info.ID, next.ID, ready)
		if other != "" {
			if !errors.Is(err, errdefs.NotFound) {
				t.Errorf("the boot snapshot of another %s: %v", other, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		var was, is unix.Stat_t
		first := must(s.Ready(t.Context(), info.ID, b.ID, ready))
		if err := errors.Join(unix.Stat(first.Overlay, &was), unix.Stat(got.Overlay, &is)); err != nil || was.Ino != is.Ino {
			t.Errorf("it was copied: %v", err)
		}
		if c := s.checkOf(got.Dir); c.manifest == nil {
			t.Error("it is to be read again")
		}
	}
	if _, loose := must(s.readInfo(info.ID)).tagged(); len(loose) != 3 {
		t.Errorf("untagged: %q", loose)
	}
	unused, err := s.Unused(func(Info, Build) bool { return false })
	if err != nil || len(unused) != 3 {
		t.Errorf("unused: %+v, %v", unused, err)
	}
	if err := s.Prune(t.Context(), func(Info, Build) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if got := must(s.readInfo(info.ID)); len(got.Builds) != 1 {
		t.Errorf("after prune: %+v", got.Builds)
	}
	if err := s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error { return v.Err }); err != nil {
		t.Error(err)
	}
}

func TestNewRoot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root")
	if err := NewRoot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != emptyRootBytes {
		t.Error(fi, err)
	}
	if err := NewRoot(t.Context(), path); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another: %v", err)
	}
}

// publishReady makes a boot snapshot of a build and returns its key.
func publishReady(t *testing.T, s *Store, id, build string) string {
	t.Helper()
	stage, err := s.StageReady(t.Context(), id, build)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	write(t, filepath.Join(stage.Dir, "mem"), "memory")
	disk := filepath.Join(t.TempDir(), "disk")
	write(t, disk, "disk")
	if err := stage.AddOverlay(t.Context(), disk); err != nil {
		t.Fatal(err)
	}
	const key = "0123456789abcdef"
	if err := stage.Publish(t.Context(), Meta{Key: key, BootToken: "secret"}); err != nil {
		t.Fatal(err)
	}
	return key
}

// What versions without stacks published is a stack of one layer: its digest is the one
// that records and snapshots have, and other templates can be built on it.
func TestTemplateOfBeforeLayers(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "other", "kernel") // for a kernel
	const build, sum = "00000000-0000-4000-8000-000000000001", "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"
	id := HostID("minimal")
	write(t, filepath.Join(s.templateDir(id), build, "base.ext4"), "image")
	write(t, filepath.Join(s.templateDir(id), build, manifestFile), `{"format": 1, "files": {"base.ext4": {"size": 5, "sha256": "`+sum+`"}},
  "recipe": "ff", "defaults": {"vcpus": 1, "mem_mib": 512, "overlay_mib": 4096, "user": "root"}}`)
	at := "2026-11-01T00:00:00Z"
	err := sealed.Write(filepath.Join(s.templateDir(id), infoFile), map[string]any{
		"id": id, "names": []string{"minimal"}, "created_at": at, "updated_at": at,
		"tags": []any{map[string]any{"name": "default", "build": build, "created_at": at}},
		"builds": []any{map[string]any{
			"id": build, "status": "ready", "created_at": at, "updated_at": at, "finished_at": at,
			"vcpus": 1, "mem_mib": 512, "disk_mib": 4096, "base": sum,
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	tmpl, err := s.Get("minimal")
	if err != nil || tmpl.RootSHA256 != sum || tmpl.Layers[0].SHA256 != sum || tmpl.Start.Start != "" || tmpl.Defaults.User != "root" {
		t.Fatalf("%+v, %v", tmpl, err)
	}
	holds(t, tmpl, "image")
	if old, err := s.RootOf("minimal", sum); err != nil || old.Build != build {
		t.Errorf("by its digest: %+v, %v", old, err)
	}
	made(t, s, NewBuild{Name: "minimal"}, "minimal", "more")
	if tmpl, err = s.Get("minimal"); err != nil || tmpl.RootSHA256 == sum {
		t.Fatalf("%+v, %v", tmpl, err)
	}
	holds(t, tmpl, "image", "more")
	// What was made of the build before still finds it.
	if old, err := s.RootOf(id, sum); err != nil || old.Build != build {
		t.Errorf("by its digest, later: %+v, %v", old, err)
	}
	if err := s.Verify(t.Context(), func(Kind, string) bool { return true }, func(v Verified) error { return v.Err }); err != nil {
		t.Error(err)
	}
}
