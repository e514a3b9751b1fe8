package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

func run(text string) Step { return Step{Kind: Run, Args: []string{text}, Text: "RUN " + text} }

func from(steps ...Step) Spec {
	return Spec{Stages: []Stage{{From: Source{Image: "debian:12", Either: true}, Steps: steps}}, KeepEnv: true}
}

// TestBuildAndCache: a build runs its steps; the same build again runs nothing and boots
// nothing, and one with another last step runs that step only.
func TestBuildAndCache(t *testing.T) {
	r := newRig(t)
	r.images.config = image.Config{Env: []string{"PATH=/usr/bin:/bin", "LANG=C"}, User: "root", Workdir: "/"}
	hash := r.upload("a/x=content of x", "a/y=Y")
	steps := []Step{
		{Kind: Env, Args: []string{"A", `"1 $LANG"`}},
		{Kind: Workdir, Args: []string{"srv"}},
		run("echo $A > a; echo said"),
		{Kind: Copy, Files: hash, Src: []string{"a"}, Dst: "/srv/d", Text: "COPY a /srv/d"},
		{Kind: User, Args: []string{"app"}},
		run("cat d/x a > both; echo as $AS"),
		{Kind: Cmd, Args: []string{"serve"}},
	}
	spec, ran := r.made(from(steps...))
	if len(ran) != 2 || r.boxes.created != 1 || len(r.boxes.prepared) != 1 {
		t.Errorf("ran %q in %d build sandboxes, prepared %d", ran, r.boxes.created, len(r.boxes.prepared))
	}
	log := r.text(spec)
	for _, want := range []string{
		"[base] FROM debian:12", "[3/7] RUN echo $A > a; echo said [", "info 3 said\n", "info 6 as app\n", "Build finished, took",
		"[start] serve", "[ready] sleep 20", "info finalize [start] the program says hello",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	info, b, err := r.store.Resolve("p", "t")
	if err != nil || b.ID != spec.Build {
		t.Fatalf("the tag leads to %v, %v", b.ID, err)
	}
	made, err := r.store.Inspect(info.ID, b.ID)
	if err != nil || len(made.Layers) != 2 || made.Defaults.Env["A"] != "1 C" || made.Defaults.User != "app" || made.Start.Start != "serve" {
		t.Errorf("made %+v, %v", made, err)
	}
	if h := made.History; len(h) != 8 || h[3].Bytes == 0 || h[3].Empty || !h[1].Empty {
		t.Errorf("history %+v", h)
	}

	again, ran := r.made(from(steps...))
	if len(ran) != 0 || r.boxes.created != 1 {
		t.Errorf("the second build ran %q in %d build sandboxes", ran, r.boxes.created-1)
	}
	if log := r.text(again); strings.Count(log, "CACHED [") != 7 {
		t.Errorf("not all is CACHED:\n%s", log)
	}

	steps[5] = run("cat d/y")
	other, ran := r.made(from(steps...))
	if !slices.Equal(ran, []string{"cat d/y"}) || r.boxes.created != 2 {
		t.Errorf("with another last step it ran %q", ran)
	}
	if log := r.text(other); !strings.Contains(log, "info 6 Y\n") || strings.Count(log, "CACHED [") != 4 {
		t.Errorf("log:\n%s", log)
	}

	// Without the earlier builds the cache alone has all of it.
	results := filepath.Join(r.dir, "builds/results")
	if err := errors.Join(os.RemoveAll(results), os.Mkdir(results, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, ran := r.made(from(steps...)); len(ran) != 0 || r.boxes.created != 2 {
		t.Errorf("out of the cache it ran %q", ran)
	}
	spec = from(steps...)
	spec.Force = true
	if _, ran := r.made(spec); len(ran) != 2 {
		t.Errorf("forced, it ran %q", ran)
	}
	if _, ran := r.made(from(steps...)); len(ran) != 0 {
		t.Errorf("after it was forced it ran %q", ran)
	}
	steps[2].Force = true
	if _, ran := r.made(from(steps...)); len(ran) != 2 {
		t.Errorf("with a forced step it ran %q", ran)
	}
}

// TestFailures: a build that fails says why and at which step, moves no tag and leaves
// nothing.
func TestFailures(t *testing.T) {
	full := fmt.Errorf("copy: %w", syscall.ENOSPC)
	for name, c := range map[string]struct {
		spec Spec
		rig  func(*rig)
		want template.Reason
	}{
		"a failing RUN": {from(run("true"), run("echo out; exit 7")), nil,
			template.Reason{Message: "failed to run command 'echo out; exit 7': exit status 7", Step: "2"}},
		"no such image": {Spec{Stages: []Stage{{From: Source{Image: "none"}}}}, nil,
			template.Reason{Message: "image none not found", Step: "base"}},
		"no such account": {from(Step{Kind: Copy, Files: "up", Src: []string{"a"}, Dst: "/", Owner: "who"}), nil,
			template.Reason{Message: `the account "who" does not exist`, Step: "1"}},
		"nothing matches": {from(Step{Kind: Copy, Files: "up", Src: []string{"b*"}, Dst: "/"}), nil,
			template.Reason{Message: "COPY: nothing matches b*", Step: "1"}},
		"a full disk": {from(run("true"), run("x=1")), func(r *rig) { r.boxes.captureErr = errdefs.DiskFull(full) },
			template.Reason{Message: "keep the disk: the host's disk is full", Step: "1"}},
		"a full host": {from(run("true")), func(r *rig) { r.boxes.createErr = errdefs.Exhausted.Errorf("the host is full") },
			template.Reason{Message: "start a build sandbox: the host is full", Step: "base"}},
		"start fails": {from(run("true")), func(r *rig) { r.boxes.prepareErr = errdefs.WrongState.Errorf("start command failed: exit status 1") },
			template.Reason{Message: "start command failed: exit status 1", Step: "finalize"}},
		"a fault": {from(run("true")), func(r *rig) { r.boxes.captureErr = errors.New("open /secret/path") },
			template.Reason{Message: "the host could not go on with the build: its log says why", Step: "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			if c.rig != nil {
				c.rig(r)
			}
			for i := range c.spec.Stages[0].Steps {
				if s := &c.spec.Stages[0].Steps[i]; s.Files == "up" {
					s.Files = r.upload("a=A")
				}
			}
			spec := r.begin(c.spec)
			b := r.end(spec)
			if b.Status != template.StatusError || b.Reason == nil || *b.Reason != c.want {
				t.Errorf("build is %s: %+v, want %+v", b.Status, b.Reason, c.want)
			}
			if _, _, err := r.store.Resolve("p", "t"); err == nil {
				t.Error("a tag leads to it")
			}
			if left, _ := filepath.Glob(filepath.Join(r.dir, "templates", spec.Template, spec.Build)); len(left) != 0 {
				t.Errorf("its files are left: %v", left)
			}
			if log := r.text(spec); !strings.HasSuffix(log, "Build failed: "+c.want.Message+"\n") {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

// TestCancel: a build is cancelled by a newer one of the same template, by Cancel and by
// the agent's end.
func TestCancel(t *testing.T) {
	hang := func(r *rig) Spec {
		r.boxes.stuck = make(chan struct{})
		spec := r.begin(from(run("hang")))
		<-r.boxes.stuck
		return spec
	}
	cancelled := func(t *testing.T, r *rig, spec Spec, want string) {
		t.Helper()
		if b := r.end(spec); b.Status != template.StatusError || b.Reason.Message != want {
			t.Errorf("build is %s: %+v", b.Status, b.Reason)
		}
	}
	t.Run("by a newer build", func(t *testing.T) {
		r := newRig(t)
		old := hang(r)
		r.made(from(run("echo newer")))
		cancelled(t, r, old, "build was cancelled")
	})
	t.Run("by a call", func(t *testing.T) {
		r := newRig(t)
		spec := hang(r)
		if err := r.Cancel(t.Context(), spec.Template, spec.Build); err != nil {
			t.Fatal(err)
		}
		cancelled(t, r, spec, "build was cancelled")
		if err := r.Cancel(t.Context(), spec.Template, spec.Build); !errors.Is(err, errdefs.WrongState) {
			t.Errorf("cancelled again: %v", err)
		}
		if err := r.Cancel(t.Context(), spec.Template, "none"); !errors.Is(err, errdefs.NotFound) {
			t.Errorf("a build that is not there: %v", err)
		}
	})
	t.Run("by the agent's end", func(t *testing.T) {
		r := newRig(t)
		spec := hang(r)
		if err := r.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		cancelled(t, r, spec, "the host agent ends")
	})
}

// TestStages: a stage is run once, whether others stand on it or copy from it.
func TestStages(t *testing.T) {
	r := newRig(t)
	image := Source{Image: "debian:12"}
	spec := Spec{Stages: []Stage{
		{Name: "build", From: image, Steps: []Step{
			run("mkdir out; echo made > out/a; ln -s a out/l; echo one"), {Kind: Env, Args: []string{"E", "1"}},
		}},
		{Name: "test", From: Source{Stage: "build"}, Steps: []Step{run("cat out/a > tested$E")}},
		{From: Source{Image: "alpine"}, Steps: []Step{
			{Kind: Copy, FromStage: "build", Src: []string{"/out/*"}, Dst: "/app/"},
			{Kind: Copy, FromStage: "1", Src: []string{"/tested1"}, Dst: "/t", Owner: "app:staff", Mode: "0700"},
			{Kind: Copy, FromImage: "busybox", Src: []string{"/etc/group"}, Dst: "/g"},
			run("cat app/a app/l t g"),
		}},
	}}
	made, ran := r.made(spec)
	if len(ran) != 3 {
		t.Errorf("ran %q", ran)
	}
	if log := r.text(made); !strings.Contains(log, "info 7 made\n") || !strings.Contains(log, "[build 1/2] RUN") ||
		!strings.Contains(log, "[stage-2 4/4] RUN") || strings.Count(log, "staff:x:50:") != 1 {
		t.Errorf("log:\n%s", log)
	}
	if _, ran := r.made(spec); len(ran) != 0 {
		t.Errorf("the second build ran %q", ran)
	}
	spec.Stages[1].Steps[0] = run("cat out/a out/a > tested$E")
	if _, ran := r.made(spec); len(ran) != 2 {
		t.Errorf("with another step in a stage it ran %q", ran)
	}
}

// TestFromTemplate: a name in FROM is that of a template that the project sees, else of
// an image; its program and variables are inherited.
func TestFromTemplate(t *testing.T) {
	r := newRig(t)
	base := from(Step{Kind: Env, Args: []string{"A", "1"}}, run("echo base > b"), Step{Kind: Workdir, Args: []string{"/etc"}})
	base.Start, base.Ready, base.KeepEnv = "serve", "true", false
	parent, _ := r.made(base)
	pulls := r.images.pulls
	spec := Spec{Stages: []Stage{{From: Source{Image: "t", Either: true}, Steps: []Step{run("cat passwd; echo $A > c")}}}}
	made, _ := r.made(spec)
	if r.images.pulls != pulls {
		t.Error("an image was pulled")
	}
	m, err := r.store.Inspect(made.Template, made.Build)
	if err != nil || len(m.Layers) != 3 || m.Start.Start != "serve" || m.Start.Env["A"] != "1" || len(m.Defaults.Env) != 0 ||
		m.Defaults.Workdir != "/etc" || m.From != parent.Template+":"+parent.Build {
		t.Errorf("made %+v, %v", m, err)
	}
}

// TestSameAtOnce: builds of the same steps at once all become ready.
func TestSameAtOnce(t *testing.T) {
	r := newRig(t)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			info, b, err := r.store.NewBuild(t.Context(), template.NewBuild{
				Project: "p", Name: fmt.Sprint("t", i), VCPUs: 1, MemMiB: 256, DiskMiB: 64,
			})
			if err != nil {
				t.Error(err)
				return
			}
			spec := from(run("echo $$ > a"), run("cat a > b"))
			spec.Project, spec.Template, spec.Build = "p", info.ID, b.ID
			if err := r.Start(t.Context(), spec); err != nil {
				t.Error(err)
				return
			}
			if b := r.end(spec); b.Status != template.StatusReady {
				t.Errorf("build is %s: %+v", b.Status, b.Reason)
			}
		})
	}
	wg.Wait()
	if _, ran := r.made(from(run("echo $$ > a"), run("cat a > b"))); len(ran) != 0 {
		t.Errorf("afterwards it ran %q", ran)
	}
}

// TestRefused: what is wrong at the door changes nothing.
func TestRefused(t *testing.T) {
	r := newRig(t)
	hash := strings.Repeat("a", 64)
	for name, spec := range map[string]Spec{
		"no stage":            {},
		"two sources":         {Stages: []Stage{{From: Source{Image: "x", Scratch: true}}}},
		"no source":           {Stages: []Stage{{}}},
		"a later stage":       {Stages: []Stage{{From: Source{Stage: "1"}}, {From: Source{Image: "x"}}}},
		"files not uploaded":  from(Step{Kind: Copy, Files: hash, Src: []string{"a"}, Dst: "/"}),
		"no hash":             from(Step{Kind: Copy, Files: "../x", Src: []string{"a"}, Dst: "/"}),
		"two sources of COPY": from(Step{Kind: Copy, Files: hash, FromImage: "x", Src: []string{"a"}, Dst: "/"}),
		"no command":          from(Step{Kind: Run}),
		"half an ENV":         from(Step{Kind: Env, Args: []string{"A"}}),
		"no such kind":        from(Step{Kind: "VOLUME", Args: []string{"/x"}}),
		"CMD of E2B":          {E2B: true, Stages: []Stage{{From: Source{Image: "x"}, Steps: []Step{{Kind: Cmd, Args: []string{"x"}}}}}},
		"a zero byte":         from(run("a\x00b")),
		"a long text":         from(run(strings.Repeat("x", maxText+1))),
	} {
		info, b, err := r.store.NewBuild(t.Context(), template.NewBuild{Project: "p", Name: "t", VCPUs: 1, MemMiB: 256, DiskMiB: 64})
		if err != nil {
			t.Fatal(err)
		}
		spec.Project, spec.Template, spec.Build = "p", info.ID, b.ID
		if err := r.Start(t.Context(), spec); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
		if _, b, err := r.lookup(info.ID, b.ID); err != nil || b.Status != template.StatusWaiting {
			t.Errorf("%s: the build is %s, %v", name, b.Status, err)
		}
	}
	spec, _ := r.made(from(run("true")))
	if err := r.Start(t.Context(), spec); !errors.Is(err, errdefs.WrongState) {
		t.Errorf("started again: %v", err)
	}
	spec.Build = "00000000-0000-4000-8000-000000000000"
	if err := r.Start(t.Context(), spec); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("no such build: %v", err)
	}
}

// TestRestart: what an agent left half-made is removed by the next.
func TestRestart(t *testing.T) {
	r := newRig(t)
	for _, path := range []string{"work/build-1/disk-1", "cache/.entry-1/diff", "uploads/ab/.put-1", "uploads/ab/kept"} {
		path = filepath.Join(r.dir, "builds", path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := New(r.cfg); err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, pattern := range []string{"work/*", "cache/.*", "uploads/*/.*", "uploads/*/*"} {
		found, _ := filepath.Glob(filepath.Join(r.dir, "builds", pattern))
		left = append(left, found...)
	}
	if len(left) != 1 || filepath.Base(left[0]) != "kept" {
		t.Errorf("left: %v", left)
	}
}

// TestUploads: an archive is there whole or not at all, and is its project's.
func TestUploads(t *testing.T) {
	r := newRig(t)
	hash := r.upload("a=A")
	for project, want := range map[string]bool{"p": true, "other": false} {
		if got, err := r.Upload(project, hash); err != nil || got != want {
			t.Errorf("present for %s: %v, %v", project, got, err)
		}
	}
	for _, bad := range []string{"", "..", strings.ToUpper(hash), hash + "0"} {
		if err := r.Put(t.Context(), "p", bad, strings.NewReader("x")); !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("Put(%q): %v", bad, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCancelled)
	if err := r.Put(ctx, "q", hash, bytes.NewReader(make([]byte, 1<<20))); !errors.Is(err, errCancelled) {
		t.Errorf("a Put that is cancelled: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.dir, "builds/uploads/*/*")); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestPruneAndBound: Prune removes what no build uses; --max-template-disk frees the cache
// before it refuses.
func TestPruneAndBound(t *testing.T) {
	r := newRig(t)
	spec, _ := r.made(from(run("echo a > a"), run("echo b > b")))
	r.upload("a=A")
	items, err := r.Usage(t.Context())
	if err != nil || len(items) != 4 {
		t.Fatalf("usage %+v, %v", items, err)
	}
	would, err := r.Prune(t.Context(), Pruning{DryRun: true})
	if err != nil || len(would) != 3 { // the log's build is there
		t.Errorf("it would remove %+v, %v", would, err)
	}
	// An entry whose forerunner is gone is of no use.
	first := slices.IndexFunc(items, func(it Item) bool { return it.Name == "RUN echo a > a" })
	if gone, err := r.cache.remove(items[first].path); !gone || err != nil {
		t.Fatal(gone, err)
	}
	removed, err := r.Prune(t.Context(), Pruning{OlderThan: 1 << 60})
	if err != nil || len(removed) != 1 || removed[0].Name != "RUN echo b > b" {
		t.Errorf("removed %+v, %v", removed, err)
	}
	r.cfg.MaxDisk = 1
	if err := r.Put(t.Context(), "p", strings.Repeat("b", 64), strings.NewReader("x")); !errors.Is(err, errdefs.Exhausted) ||
		!strings.Contains(err.Error(), "--max-template-disk") {
		t.Errorf("over the bound: %v", err)
	}
	if items, err = r.Usage(t.Context()); err != nil || len(items) != 2 {
		t.Errorf("usage %+v, %v", items, err)
	}
	if err := errors.Join(r.Forget(spec.Template), r.store.Delete(t.Context(), spec.Template, "", nil)); err != nil {
		t.Fatal(err)
	}
	r.cfg.MaxDisk = 0
	if _, err := r.Prune(t.Context(), Pruning{}); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.dir, "builds/results/*")); len(left) != 0 {
		t.Errorf("results of builds that are gone: %v", left)
	}
	if text := r.text(spec); text != "" {
		t.Errorf("a forgotten log: %s", text)
	}
}

// TestKeyIsRevoked: a build ends with the key that asked for it, and says so.
func TestKeyIsRevoked(t *testing.T) {
	r := newRig(t)
	r.boxes.stuck = make(chan struct{})
	var revoked atomic.Bool
	spec := from(run("hang"))
	spec.Revoked = revoked.Load
	spec = r.begin(spec)
	<-r.boxes.stuck
	revoked.Store(true)
	if b := r.end(spec); b.Status != template.StatusError || b.Reason.Message != errRevoked.Error() || b.Reason.Step != "1" {
		t.Errorf("build is %s: %+v", b.Status, b.Reason)
	}
}

// TestManyLayers: builds on builds have as many layers as there can be, and no more: those
// that follow go on in a copy of the highest one. The cache knows their steps, too.
func TestManyLayers(t *testing.T) {
	r := newRig(t)
	on := func(i int, steps ...Step) Spec {
		if i == 0 {
			return from(steps...)
		}
		return Spec{Stages: []Stage{{From: Source{Template: "t"}, Steps: steps}}, KeepEnv: true}
	}
	layersOf := func(spec Spec) []template.Layer {
		t.Helper()
		made, err := r.store.Inspect(spec.Template, spec.Build)
		if err != nil {
			t.Fatal(err)
		}
		return made.Layers
	}
	var last []template.Layer
	for i := range 20 {
		was := last
		spec, _ := r.made(on(i, run(fmt.Sprintf("echo %d > f%d", i, i)), run(fmt.Sprintf("ls > l%d", i))))
		last = layersOf(spec)
		if want := min(i+2, template.MaxLayers); len(last) != want {
			t.Fatalf("build %d has %d layers, want %d", i, len(last), want)
		}
		for j := range min(len(was), template.MaxLayers-1) { // the lowest ones stay shared
			if was[j].SHA256 != last[j].SHA256 {
				t.Errorf("layer %d of build %d is another one", j, i)
			}
		}
	}
	// What such a guest of the fake sees is its disk: the highest layer.
	deep := on(1, run("test -e f7 && test -e f19 && test ! -e f5"))
	deep.Tags = []string{"deep"}
	r.made(deep)
	spec := Spec{Stages: []Stage{
		{Name: "a", From: Source{Template: "t:deep"}, Steps: []Step{run("echo a > a"), run("cat f19")}},
	}, KeepEnv: true}
	first, _ := r.made(spec)
	if _, ran := r.made(spec); len(ran) != 0 {
		t.Errorf("the same build again ran %q", ran)
	}
	results := filepath.Join(r.dir, "builds/results")
	if err := errors.Join(os.RemoveAll(results), os.Mkdir(results, 0o700)); err != nil {
		t.Fatal(err)
	}
	again, ran := r.made(spec)
	if one, two := layersOf(first), layersOf(again); len(ran) != 0 || one[7].SHA256 != two[7].SHA256 || one[7].Path == two[7].Path {
		t.Errorf("out of the cache it ran %q, and its highest layer is %s, not %s", ran, two[7].SHA256, one[7].SHA256)
	}
	spec.Stages[0].Steps[1] = run("cat a f19")
	if _, ran := r.made(spec); !slices.Equal(ran, []string{"cat a f19"}) {
		t.Errorf("with another last step it ran %q", ran)
	}
	// A stage that changes nothing has all layers, also if another one over them goes on.
	spec.Stages = append(spec.Stages, Stage{From: Source{Stage: "a"}})
	spec.Stages = append(spec.Stages, Stage{From: Source{Template: "t:deep"}, Steps: []Step{
		{Kind: Copy, FromStage: "a", Src: []string{"a"}, Dst: "/b"}, run("test ! -e a && cat b"),
	}})
	if _, ran := r.made(spec); !slices.Equal(ran, []string{"test ! -e a && cat b"}) {
		t.Errorf("with COPY it ran %q", ran)
	}
	plain, ran := r.made(Spec{Stages: []Stage{{From: Source{Template: "t:deep"}}}})
	if len(ran) != 0 || len(layersOf(plain)) != template.MaxLayers {
		t.Errorf("without steps it ran %q and has %d layers", ran, len(layersOf(plain)))
	}
}
