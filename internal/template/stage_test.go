package template

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
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
	if err := stage.Publish(Making{Recipe: image, Defaults: someDefaults}); err != nil {
		t.Fatal(err)
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
	if again, err := s.Get("mine"); err != nil || again.BaseSHA256 != got.BaseSHA256 {
		t.Errorf("a discarded one changed the template: %+v, %v", again, err)
	}
	build(t, s, "mine", "second")
	if again, err := s.Get("mine"); err != nil || again.BaseSHA256 == got.BaseSHA256 {
		t.Errorf("got %+v, %v", again, err)
	}
	if got := strings.Join(left(t, s.templates()), " "); got != "lock mine minimal" {
		t.Errorf("left %s", got)
	}
}

func TestStageTemplateRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	if err := os.Mkdir(s.snapshotDir("taken"), 0o700); err != nil {
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
	if err := stage.Publish(Making{Defaults: someDefaults}); err == nil {
		t.Error("a template without an image was published")
	}
	write(t, filepath.Join(stage.Dir, "base.ext4"), "x")
	if err := stage.Publish(Making{}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("without defaults: %v", err)
	}
	if _, err := s.Get("mine"); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("it is there: %v", err)
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
		return errors.Join(err, stage.Publish(Making{Recipe: "next", Defaults: someDefaults}))
	}
	done := make(chan error, waiting)
	for range waiting {
		go func() { done <- next() }()
	}
	if err := first.Publish(Making{Recipe: "first", Defaults: someDefaults}); err != nil {
		t.Error(err)
	}
	first.Discard()
	for range waiting {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if got := strings.Join(left(t, s.templates()), " "); got != "a b lock minimal" {
		t.Errorf("left %s", got)
	}
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
	if got := strings.Join(left(t, s.templates()), " "); got != "lock" {
		t.Errorf("left %s", got)
	}
}

// TestReadsWhatAnEarlierVersionMade holds manifests as version 0.6 wrote them.
func TestReadsWhatAnEarlierVersionMade(t *testing.T) {
	s := open(t, t.TempDir())
	kernel, tmpl := filepath.Join(s.kernels(), "default"), filepath.Join(s.templates(), "minimal")
	for name, text := range map[string]string{
		kernel + "/vmlinux":           "kernel",
		kernel + "/initrd.img":        "initrd",
		kernel + "/modules/virtio.ko": "mod",
		kernel + "/kernel.json": `{"format": 1, "files": {"vmlinux": {"size": 6, "sha256": "aa"}, "initrd.img": {"size": 6, "sha256": "bb"},
			"modules/virtio.ko": {"size": 3, "sha256": "cc"}}, "release": "6.1.0-56-cloud-amd64",
			"source": "package linux-image-6.1.0-56-cloud-amd64 6.1.192-2", "envd_sha256": "dd", "modules": ["virtio.ko"], "initrd_format": 1}`,
		tmpl + "/base.ext4": "image",
		tmpl + "/template.json": `{"format": 1, "files": {"base.ext4": {"size": 5, "sha256": "ee"}}, "recipe": "ff",
			"defaults": {"vcpus": 1, "mem_mib": 512, "overlay_mib": 4096, "user": "root"}}`,
	} {
		write(t, name, text)
	}
	got, err := s.Get("minimal")
	want := Template{
		Name: "minimal", Base: tmpl + "/base.ext4", BaseSHA256: "ee",
		Boot: Boot{
			Kernel: kernel + "/vmlinux", Initrd: kernel + "/initrd.img", Release: "6.1.0-56-cloud-amd64",
			Source: "package linux-image-6.1.0-56-cloud-amd64 6.1.192-2", KernelSHA256: "aa", InitrdSHA256: "bb", EnvdSHA256: "dd",
		},
		Defaults: Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096, Login: Login{User: "root"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
	}
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
