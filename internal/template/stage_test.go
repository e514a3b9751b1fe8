package template

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

var someDefaults = Defaults{VCPUs: 2, MemMiB: 768, OverlayMiB: 1024, Login: Login{User: "user", Env: map[string]string{"A": "1"}}}

// build stages, fills and publishes a template.
func build(t *testing.T, s *Store, name, image string) {
	t.Helper()
	stage, err := s.StageTemplate(t.Context(), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	write(t, filepath.Join(stage.Dir, "base.ext4"), image)
	if err := stage.publish(t.Context(), Making{Recipe: image, Defaults: someDefaults}); err != nil {
		t.Fatal(err)
	}
}

// publish makes what is staged a build of the template.
func (t *TemplateStage) publish(ctx context.Context, about Making) error {
	_, _, err := t.store.MakeBuild(ctx, NewBuild{Name: t.name}, about, func(b *BuildStage) error {
		return b.AddLayer(ctx, filepath.Join(t.Dir, "base.ext4"))
	})
	return err
}

// wantTemplates demands that a store holds so many templates, and nothing else.
func wantTemplates(t *testing.T, s *Store, want int) {
	t.Helper()
	names := slices.DeleteFunc(left(t, s.templates()), func(name string) bool { return name == "lock" || name == indexLock })
	list, err := s.List()
	if err != nil || len(list) != want || len(names) != want {
		t.Errorf("%d templates in %v, %v; want %d", len(list), names, err, want)
	}
}

func left(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestStageTemplate(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "minimal", "the default one") // and a kernel
	build(t, s, "mine", "first")
	got, err := s.Get("mine")
	if err != nil || !reflect.DeepEqual(got.Defaults, someDefaults) {
		t.Fatalf("got %+v, %v", got, err)
	}
	// The next one sees the present one, and takes its place.
	stage, err := s.StageTemplate(t.Context(), "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	if stage.Have == nil || stage.Have.Recipe != "first" || stage.HaveBytes != int64(len("first")) {
		t.Errorf("have %+v, %d bytes", stage.Have, stage.HaveBytes)
	}
	write(t, filepath.Join(stage.Dir, "root", "etc", "passwd"), "")
	stage.Discard()
	if again, err := s.Get("mine"); err != nil || again.RootSHA256 != got.RootSHA256 {
		t.Errorf("a discarded one changed the template: %+v, %v", again, err)
	}
	build(t, s, "mine", "second")
	if again, err := s.Get("mine"); err != nil || again.RootSHA256 == got.RootSHA256 {
		t.Errorf("got %+v, %v", again, err)
	}
	wantTemplates(t, s, 2)
}

func TestStageTemplateRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	taken := stageNamed(t, s, "taken")
	if _, _, err := taken.Publish(t.Context(), namedMeta(time.Now()), Build{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.StageTemplate(t.Context(), "../x", nil); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a bad name: %v", err)
	}
	if _, err := s.StageTemplate(t.Context(), "taken", nil); !errors.Is(err, errdefs.AlreadyExists) {
		t.Errorf("a snapshot's name: %v", err)
	}
	stage, err := s.StageTemplate(t.Context(), "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Discard()
	if err := stage.publish(t.Context(), Making{Defaults: someDefaults}); err == nil {
		t.Error("a template without an image was published")
	}
	write(t, filepath.Join(stage.Dir, "base.ext4"), "x")
	if err := stage.publish(t.Context(), Making{}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("without defaults: %v", err)
	}
	if _, err := s.Get("mine"); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("a build that failed can be used: %v", err)
	}
}

// TestStagesTakeTurns: one of a name is made at a time, those of other names go
// on, and Open removes nothing from under them.
func TestStagesTakeTurns(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "minimal", "x")
	first, err := s.StageTemplate(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	build(t, s, "b", "at the same time")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	waited := false
	if _, err := s.StageTemplate(ctx, "a", func() { waited = true }); !errors.Is(err, context.DeadlineExceeded) || !waited {
		t.Errorf("a second one of the name: %v, waited: %v", err, waited)
	}
	open(t, dir)
	write(t, filepath.Join(first.Dir, "base.ext4"), "first")

	// Many wait for the same name: each finds its own directory whole.
	const waiting = 8
	next := func() error {
		stage, err := s.StageTemplate(t.Context(), "a", nil)
		if err != nil {
			return err
		}
		defer stage.Discard()
		if stage.Have == nil {
			err = errors.New("it does not see the one before it")
		}
		err = errors.Join(err, os.WriteFile(filepath.Join(stage.Dir, "base.ext4"), []byte("next"), 0o600))
		return errors.Join(err, stage.publish(t.Context(), Making{Recipe: "next", Defaults: someDefaults}))
	}
	done := make(chan error, waiting)
	for range waiting {
		go func() { done <- next() }()
	}
	if err := first.publish(t.Context(), Making{Recipe: "first", Defaults: someDefaults}); err != nil {
		t.Error(err)
	}
	first.Discard()
	for range waiting {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	wantTemplates(t, s, 3)
}

// What a killed process left is no hindrance to the next one.
func TestStageTemplateAfterOneThatWasKilled(t *testing.T) {
	s := open(t, t.TempDir())
	write(t, filepath.Join(s.templates(), ".making-a", "new", "base.ext4"), "half")
	write(t, filepath.Join(s.templates(), ".making-a", "lock"), "")
	stage, err := s.StageTemplate(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := left(t, stage.Dir); len(got) > 0 {
		t.Errorf("it begins with %v", got)
	}
	stage.Discard()
	wantTemplates(t, s, 0)
}

// TestKernelOfAnEarlierVersion is read as that version wrote it.
func TestKernelOfAnEarlierVersion(t *testing.T) {
	s := open(t, t.TempDir())
	writeEarlier(t, s.dir)
	s = open(t, s.dir)
	k, err := s.StageKernel(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Discard()
	if k.Have == nil || k.Have.InitrdFormat != 1 || !reflect.DeepEqual(k.Have.Modules, []string{"virtio.ko"}) {
		t.Errorf("the kernel is %+v", k.Have)
	}
	if err := k.Keep(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(left(t, k.Dir), " "); got != "modules vmlinux" {
		t.Errorf("kept %s", got)
	}
}
