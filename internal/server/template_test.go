package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// builder is an engine whose builds have one layer without content, at once.
type builder struct {
	store *template.Store

	mu       sync.Mutex
	specs    []build.Spec
	uploads  map[string]string // by project and hash
	wait     chan struct{}     // builds are under way until it is closed, if not nil
	canceled []string
	pruned   []build.Pruning
}

func newBuilder(store *template.Store) *builder {
	return &builder{store: store, uploads: map[string]string{}}
}

func (b *builder) Start(ctx context.Context, spec build.Spec) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.specs = append(b.specs, spec)
	if spec.Stages[0].From.Image == "unreachable" {
		return errdefs.Unavailable.Errorf("no registry answers")
	}
	if err := b.store.SetBuild(ctx, spec.Template, spec.Build, template.StatusBuilding, nil); err != nil {
		return err
	}
	if b.wait != nil {
		return nil
	}
	if spec.Stages[0].From.Image == "broken" {
		reason := &template.Reason{Message: "it does not work", Step: "2"}
		return b.store.SetBuild(ctx, spec.Template, spec.Build, template.StatusError, reason)
	}
	return b.finish(ctx, spec)
}

func (b *builder) finish(ctx context.Context, spec build.Spec) error {
	stage, err := b.store.StageBuild(ctx, spec.Template, spec.Build)
	if err != nil {
		return err
	}
	defer stage.Discard()
	layer := filepath.Join(stage.Dir(), "layer")
	if err := os.WriteFile(layer, bytes.Repeat([]byte(spec.Build), 4096), 0o600); err != nil {
		return err
	}
	if err := stage.AddLayer(ctx, layer); err != nil {
		return err
	}
	making := template.Making{
		Recipe: "test", Image: spec.Stages[0].From.Image, History: []template.HistoryEntry{{CreatedBy: "RUN true", Bytes: 7}},
		Defaults: template.Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 1024, Login: template.Login{User: "me"}},
		Start:    template.Program{Start: spec.Start, Ready: spec.Ready},
	}
	if _, _, err := stage.Publish(ctx, making); err != nil {
		return err
	}
	return b.store.Finish(ctx, spec.Template, spec.Build, nil)
}

func (b *builder) Cancel(ctx context.Context, id, build string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wait == nil {
		return errdefs.NotFound.Errorf("no such build")
	}
	b.canceled = append(b.canceled, build)
	return b.store.SetBuild(ctx, id, build, template.StatusError, &template.Reason{Message: "the build was cancelled"})
}

func (b *builder) Watch(ctx context.Context, _, _ string, from int, fn func(build.Entry) error) error {
	for i, text := range []string{"[1/2] RUN a", "[2/2] RUN b"} {
		if i < from {
			continue
		}
		if err := fn(build.Entry{At: time.Now(), Level: build.Info, Step: fmt.Sprint(i + 1), Message: text}); err != nil {
			return err
		}
	}
	if b.wait == nil {
		return nil
	}
	select {
	case <-b.wait:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (b *builder) Progress(string, string) (build.Progress, bool) {
	return build.Progress{Stage: "pull", Done: 1, Total: 2}, true
}

func (b *builder) Upload(project, hash string) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.uploads[project+"/"+hash]
	return ok, nil
}

func (b *builder) Put(_ context.Context, project, hash string, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.uploads[project+"/"+hash] = string(data)
	return nil
}

func (b *builder) Forget(string) error { return nil }

// Prune removes nothing.
func (b *builder) Prune(_ context.Context, p build.Pruning) ([]build.Item, error) {
	b.pruned = append(b.pruned, p)
	return []build.Item{{Kind: "cache", Name: "RUN true", Bytes: 100}}, nil
}

// images are those of a builder.
type images struct{ kept []image.Keep }

func (i *images) Prune(_ context.Context, keep image.Keep) (int64, error) {
	i.kept = append(i.kept, keep)
	return 50, nil
}

// templatesOf is a client with a key, or without one.
func (p *plane) templatesOf(secret string) hostagentv1connect.TemplateServiceClient {
	client := http.DefaultClient
	if secret != "" {
		client = &http.Client{Transport: withKey{secret, http.DefaultTransport}}
	}
	return hostagentv1connect.NewTemplateServiceClient(client, p.url)
}

// do makes a call that has one answer.
func do[Req, Resp any](
	p *plane, method func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), req *Req,
) (*Resp, error) {
	p.Helper()
	resp, err := method(p.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// built builds a template of an image and returns it.
func (p *plane) built(c hostagentv1connect.TemplateServiceClient, name, image string, tags ...string) *pb.BuildTemplateResponse {
	p.Helper()
	made, err := do(p, c.BuildTemplate, &pb.BuildTemplateRequest{
		Name: name, Tags: tags, StartCommand: "serve", Stages: []*pb.BuildStage{{From: &pb.BuildSource{Image: image}}},
	})
	if err != nil {
		p.Fatal(err)
	}
	return made
}

// code is the code of an error, 0 without one.
func code(err error) connect.Code {
	if err == nil {
		return 0
	}
	return connect.CodeOf(err)
}

// TestTemplateLife: built, watched, listed, tagged, used, refused, removed.
func TestTemplateLife(t *testing.T) {
	p := newPlane(t)
	c := p.templatesOf("")
	first := p.built(c, "app", "python:3", "v1")
	second := p.built(c, "app", "python:3", "v2", "default")
	if first.TemplateId != second.TemplateId || p.builds.specs[0].Stages[0].From != (build.Source{Image: "python:3", Either: true}) {
		t.Errorf("%v, %v, %+v", first, second, p.builds.specs)
	}
	list, err := do(p, c.ListTemplates, &pb.ListTemplatesRequest{})
	if err != nil || len(list.Templates) != 2 || list.Templates[0].Names[0] != "app" || len(list.Templates[0].Builds) != 2 ||
		len(list.Templates[0].Tags) != 3 || list.Templates[0].Builds[0].OwnBytes < 36*4096 {
		t.Fatalf("%v, %v", list, err)
	}
	got, err := do(p, c.GetTemplate, &pb.GetTemplateRequest{Template: "app:v1"})
	if err != nil || got.Build != first.Build || got.Image != "python:3" || got.User != "me" || got.StartCommand != "serve" ||
		got.Layers != 1 || got.History[0].CreatedBy != "RUN true" || got.History[0].Bytes != 7 {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := do(p, c.GetTemplate, &pb.GetTemplateRequest{Template: "app:v3"}); code(err) != connect.CodeNotFound {
		t.Errorf("a tag that is not there: %v", err)
	}
	tagged, err := do(p, c.TagTemplate, &pb.TagTemplateRequest{Template: "app:v1", Tags: []string{"stable", "default"}})
	if err != nil || tagged.Build != first.Build {
		t.Errorf("%v, %v", tagged, err)
	}
	if _, err := do(p, c.UntagTemplate, &pb.UntagTemplateRequest{Template: "app", Tags: []string{"v2"}}); err != nil {
		t.Error(err)
	}
	if _, err := do(p, c.UntagTemplate, &pb.UntagTemplateRequest{Template: "app", Tags: []string{"v2"}}); code(err) != connect.CodeNotFound {
		t.Errorf("a tag that is gone: %v", err)
	}
	made, err := p.manager.Create(t.Context(), sandbox.CreateRequest{Template: "app:stable"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = do(p, c.DeleteTemplate, &pb.DeleteTemplateRequest{Template: "app"})
	if code(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), string(made.ID)) {
		t.Errorf("one that is used: %v", err)
	}
	got, err = do(p, c.GetTemplate, &pb.GetTemplateRequest{Template: "app"})
	if err != nil || !slices.Equal(got.Template.Sandboxes, []string{string(made.ID)}) {
		t.Errorf("its sandboxes: %v, %v", got, err)
	}
	if err := p.manager.Destroy(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}
	gone, err := do(p, c.DeleteTemplate, &pb.DeleteTemplateRequest{Template: first.TemplateId})
	if err != nil || gone.FreedBytes < 2*36*4096 {
		t.Errorf("%v, %v", gone, err)
	}
	if _, err := do(p, c.GetTemplate, &pb.GetTemplateRequest{Template: "app"}); code(err) != connect.CodeNotFound {
		t.Errorf("one that is gone: %v", err)
	}
	if _, err := do(p, c.DeleteTemplate, &pb.DeleteTemplateRequest{Template: "minimal"}); code(err) != connect.CodeFailedPrecondition {
		t.Errorf("the default template: %v", err)
	}
	// "base" leads to it, and is not what is changed by that name.
	if _, err := do(p, c.TagTemplate, &pb.TagTemplateRequest{Template: "base", Tags: []string{"x"}}); code(err) != connect.CodeNotFound {
		t.Errorf("a tag of what base leads to: %v", err)
	}
	if _, err := do(p, c.DeleteTemplate, &pb.DeleteTemplateRequest{Template: "base"}); code(err) != connect.CodeNotFound {
		t.Errorf("what base leads to: %v", err)
	}
}

// watched returns the messages of a build.
func (p *plane) watched(
	c hostagentv1connect.TemplateServiceClient, made *pb.BuildTemplateResponse, from int32,
) []*pb.WatchBuildResponse {
	p.Helper()
	stream, err := c.WatchBuild(p.Context(), connect.NewRequest(
		&pb.WatchBuildRequest{Template: made.TemplateId, Build: made.Build, From: from}))
	if err != nil {
		p.Fatal(err)
	}
	defer stream.Close()
	var all []*pb.WatchBuildResponse
	for stream.Receive() {
		if m := stream.Msg(); m.Entry != nil || m.Progress != nil || m.End != nil {
			all = append(all, m)
		}
	}
	if err := stream.Err(); err != nil {
		p.Error(err)
	}
	return all
}

func TestWatchBuild(t *testing.T) {
	p := newPlane(t)
	c := p.templatesOf("")
	got := p.watched(c, p.built(c, "app", "python"), 1)
	if len(got) != 2 || got[0].Entry.Message != "[2/2] RUN b" || got[1].End.Status != "ready" || got[1].End.OwnBytes == 0 {
		t.Errorf("%v", got)
	}
	broken := p.built(c, "app", "broken")
	got = p.watched(c, broken, 0)
	if len(got) != 3 || got[2].End.Status != "error" || got[2].End.Reason != "it does not work" || got[2].End.FailedStep != "2" {
		t.Errorf("%v", got)
	}
	p.builds.wait = make(chan struct{})
	under := p.built(c, "app", "python")
	done := make(chan []*pb.WatchBuildResponse)
	go func() { done <- p.watched(c, under, 0) }()
	time.Sleep(2 * progressEach)
	if _, err := do(p, c.CancelBuild, &pb.CancelBuildRequest{Template: "app", Build: under.Build}); err != nil {
		t.Error(err)
	}
	close(p.builds.wait)
	got = <-done
	progress := slices.IndexFunc(got, func(m *pb.WatchBuildResponse) bool { return m.Progress.GetTotal() == 2 })
	if end := got[len(got)-1].End; progress < 0 || end.GetReason() != "the build was cancelled" {
		t.Errorf("%v", got)
	}
	p.builds.wait = nil
	_, err := do(p, c.CancelBuild, &pb.CancelBuildRequest{Template: "app", Build: under.Build})
	if code(err) != connect.CodeFailedPrecondition {
		t.Errorf("one that has ended: %v", err)
	}
	_, err = do(p, c.CancelBuild, &pb.CancelBuildRequest{Template: "app", Build: "00000000-0000-4000-8000-000000000000"})
	if code(err) != connect.CodeNotFound {
		t.Errorf("one that never was: %v", err)
	}
	stages := []*pb.BuildStage{{From: &pb.BuildSource{Image: "unreachable"}}}
	_, err = do(p, c.BuildTemplate, &pb.BuildTemplateRequest{Name: "new", Stages: stages})
	if code(err) != connect.CodeUnavailable {
		t.Errorf("one that cannot start: %v", err)
	}
	if got, err := do(p, c.GetTemplate, &pb.GetTemplateRequest{Template: "new"}); err != nil || got.Template.Builds[0].Status != "error" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestExport(t *testing.T) {
	p := newPlane(t)
	c := p.templatesOf("")
	p.built(c, "app", "python")
	stream, err := c.ExportTemplate(t.Context(), connect.NewRequest(&pb.ExportTemplateRequest{Template: "app"}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var data []byte
	var about *pb.GetTemplateResponse
	for stream.Receive() {
		data = append(data, stream.Msg().Data...)
		if a := stream.Msg().About; a != nil {
			about = a
		}
	}
	if err := stream.Err(); err != nil || len(data) != 3<<20 || about.GetUser() != "me" {
		t.Errorf("%d bytes, %v, %v", len(data), about, err)
	}
}

// exportOf stands for what reads a template in a guest.
func exportOf(_ context.Context, _ string, root template.Template, w io.Writer) error {
	if len(root.Layers) == 0 {
		return errdefs.Corrupt.Errorf("no layers")
	}
	_, err := w.Write(make([]byte, 3<<20))
	return err
}

// TestTemplatesOfProjects: a key's templates are its project's own. Others do not see,
// use or change them; the host's own are for all and changed by none of them.
func TestTemplatesOfProjects(t *testing.T) {
	p := newPlane(t)
	secrets := map[string]string{}
	ids := map[string]*pb.BuildTemplateResponse{}
	for _, name := range []string{"blue", "red"} {
		secret, _, err := p.keys.CreateKey(name, "")
		if err != nil {
			t.Fatal(err)
		}
		secrets[name] = secret
		ids[name] = p.built(p.templatesOf(secret), "app", "python")
		list, err := do(p, p.templatesOf(secret).ListTemplates, &pb.ListTemplatesRequest{})
		if err != nil || len(list.Templates) != 2 { // and minimal
			t.Errorf("%s lists %v, %v", name, list, err)
		}
	}
	before := p.state()
	for _, m := range methods() {
		if m.Parent().Name() == "TemplateService" && m.Input().Fields().ByName("template") != nil {
			p.apart(secrets["blue"], m, ids["red"])
		}
	}
	if diff := cmp.Diff(before, p.state()); diff != "" {
		t.Errorf("refused calls have changed something:\n%s", diff)
	}
	red := ids["red"]
	local := `{"name":"x","stages":[{"from":{"image":"localhost:5000/x","pull":true}}]}`
	if code, message := p.callAs(secrets["blue"], "BuildTemplate", local); code != "permission_denied" {
		t.Errorf("an image from the host itself: %s, %s", code, message)
	}
	if code, _ := p.callAs(secrets["blue"], "CreateSandbox", fmt.Sprintf(`{"template":%q}`, red.TemplateId)); code != "not_found" {
		t.Errorf("a sandbox of it: %s", code)
	}
	for _, hash := range []string{strings.Repeat("ab", 32)} {
		p.upload(secrets["red"], hash, "abc", "def")
		for name, want := range map[string]bool{"blue": false, "red": true} {
			got, err := do(p, p.templatesOf(secrets[name]).GetUpload, &pb.GetUploadRequest{Hash: hash})
			if err != nil || got.Present != want {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
		if got := p.builds.uploads["red/"+hash]; got != "abcdef" {
			t.Errorf("uploaded: %q", got)
		}
	}
}

// apart checks that a key does nothing by a call with another project's template, which is
// the same to it as one that never was, and nothing to the host's own.
func (p *plane) apart(secret string, m protoreflect.MethodDescriptor, theirs *pb.BuildTemplateResponse) {
	p.Helper()
	rpc, more := string(m.Name()), ""
	if m.Input().Fields().ByName("build") != nil {
		more = fmt.Sprintf(`,"build":%q`, theirs.Build)
	}
	if m.Input().Fields().ByName("tags") != nil {
		more = `,"tags":["x"]`
	}
	for _, text := range []string{theirs.TemplateId, "red/app", "never"} {
		code, message := p.callAs(secret, rpc, fmt.Sprintf(`{"template":%q%s}`, text, more))
		if code != "not_found" || message != fmt.Sprintf("template '%s' not found", text) {
			p.Errorf("%s of %s: %s, %s", rpc, text, code, message)
		}
	}
	want := "permission_denied"
	if rpc == "GetTemplate" || rpc == "ExportTemplate" {
		want = ""
	}
	if code, message := p.callAs(secret, rpc, fmt.Sprintf(`{"template":"minimal"%s}`, more)); code != want {
		p.Errorf("%s of the host's own: %s, %s", rpc, code, message)
	}
}

// upload brings parts of an archive.
func (p *plane) upload(secret, hash string, parts ...string) {
	p.Helper()
	stream := p.templatesOf(secret).PutUpload(p.Context())
	err := stream.Send(&pb.PutUploadRequest{Hash: hash})
	for _, part := range parts {
		if err == nil {
			err = stream.Send(&pb.PutUploadRequest{Data: []byte(part)})
		}
	}
	if _, answer := stream.CloseAndReceive(); err != nil || answer != nil {
		p.Errorf("upload: %v, %v", err, answer)
	}
}

// An upload that breaks off, changes its hash or has too large a message is none.
func TestUploadBreaks(t *testing.T) {
	p := newPlane(t)
	hash := strings.Repeat("0", 64)
	for name, second := range map[string]*pb.PutUploadRequest{
		"another hash": {Hash: strings.Repeat("1", 64), Data: []byte("x")},
		"too large":    {Data: make([]byte, maxUploadPart+1)},
	} {
		stream := p.templatesOf("").PutUpload(t.Context())
		_ = stream.Send(&pb.PutUploadRequest{Hash: hash, Data: []byte("a")})
		_ = stream.Send(second)
		if _, err := stream.CloseAndReceive(); code(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	stream := p.templatesOf("").PutUpload(ctx)
	_ = stream.Send(&pb.PutUploadRequest{Hash: hash, Data: []byte("a")})
	cancel()
	if _, err := stream.CloseAndReceive(); err == nil {
		t.Error("a cancelled upload succeeds")
	}
	if has, err := p.builds.Upload("", hash); has || err != nil {
		t.Errorf("half an upload is kept: %v, %v", has, err)
	}
}

func TestPruneAndGarbage(t *testing.T) {
	p := newPlane(t)
	c := p.templatesOf("")
	secret, _, err := p.keys.CreateKey("blue", "")
	if err != nil {
		t.Fatal(err)
	}
	old := p.built(p.templatesOf(secret), "app", "python")
	p.built(p.templatesOf(secret), "app", "python") // takes the tag
	names := func(removed []*pb.Garbage) (all []string) {
		for _, g := range removed {
			if g.Kind != "cache" && g.Kind != "image" && g.Bytes <= 0 && g.Kind != "sandbox" {
				t.Errorf("%v frees nothing", g)
			}
			all = append(all, g.Kind+" "+g.Name)
		}
		slices.Sort(all)
		return all
	}
	prune := func(c hostagentv1connect.TemplateServiceClient, all, dry bool, want ...string) {
		t.Helper()
		got, err := do(p, c.PruneTemplates, &pb.PruneTemplatesRequest{All: all, DryRun: dry})
		if err != nil || !slices.Equal(names(got.GetRemoved()), want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	blue := p.templatesOf(secret)
	before := p.state()
	prune(blue, false, true, "build app:"+old.Build)
	prune(blue, true, true, "template app")
	if diff := cmp.Diff(before, p.state()); diff != "" {
		t.Errorf("a dry run has changed something:\n%s", diff)
	}
	prune(blue, false, false, "build app:"+old.Build)
	prune(blue, false, false)
	made, err := p.manager.Create(t.Context(), sandbox.CreateRequest{Template: "app", Labels: sandbox.Labels{Project: "blue"}})
	if err != nil {
		t.Fatal(err)
	}
	prune(blue, true, false) // it is used
	if err := p.manager.Destroy(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}
	p.secret = ""
	if _, err := p.keys.RemoveKey(strings.TrimSpace(p.keyOf("blue"))); err != nil {
		t.Fatal(err)
	}
	prune(c, true, false) // the host's own alone, and minimal stays
	got, err := do(p, c.CollectGarbage, &pb.CollectGarbageRequest{DryRun: true})
	if err != nil || !slices.Equal(names(got.GetRemoved()), []string{"cache RUN true", "image layers"}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := do(p, c.CollectGarbage, &pb.CollectGarbageRequest{All: true}); err != nil {
		t.Error(err)
	}
	if want := []build.Pruning{{OlderThan: keepUnused, DryRun: true}, {}}; !slices.Equal(p.builds.pruned, want) {
		t.Errorf("%v", p.builds.pruned)
	}
}

// keyOf is the id of a project's key.
func (p *plane) keyOf(project string) string {
	p.Helper()
	keys, err := p.keys.Keys()
	if err != nil {
		p.Fatal(err)
	}
	for _, k := range keys {
		if k.Project == project {
			return k.ID
		}
	}
	p.Fatalf("%s has no key", project)
	return ""
}
