package clienttest

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
)

// Build is the id of the one build that an agent makes, of the one template that it has.
const Build = "01234567-89ab-4cde-8f01-23456789abcd"

// TemplateID is the id of that template.
const TemplateID = "abcdefghij0123456789"

// templates are the calls of an agent about its templates.
type templates struct {
	hostagentv1connect.UnimplementedTemplateServiceHandler
	*Agent
}

// Built are the builds that were asked for.
func (a *Agent) Built() []*v1.BuildTemplateRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.built
}

// Uploads are the archives that were brought, by hash.
func (a *Agent) Uploads() map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.uploads
}

func (t templates) template() *v1.Template {
	name := t.Text
	if name == "" {
		name = "app"
	}
	return &v1.Template{
		TemplateId: TemplateID, Names: []string{name}, Sandboxes: []string{ID},
		Tags: []*v1.TemplateTag{{Name: "default", Build: Build}, {Name: "v1", Build: Build}},
		Builds: []*v1.TemplateBuild{{
			Build: Build, Status: "ready", OwnBytes: 3 << 20, SharedBytes: 258 << 20, CreatedAt: timestamppb.Now(), Sandboxes: []string{ID},
		}},
	}
}

func (t templates) ListTemplates(context.Context, request[v1.ListTemplatesRequest]) (response[v1.ListTemplatesResponse], error) {
	return connect.NewResponse(&v1.ListTemplatesResponse{Templates: []*v1.Template{t.template()}}), nil
}

func (t templates) about() *v1.GetTemplateResponse {
	return &v1.GetTemplateResponse{
		Template: t.template(), Build: Build, User: "me", Workdir: "/srv", Envs: map[string]string{"A": "1", "B": t.Text},
		StartCommand: "serve", Image: t.Text,
		History: []*v1.HistoryEntry{{CreatedBy: "FROM base"}, {CreatedBy: "RUN make " + t.Text, Bytes: 5 << 20}},
	}
}

func (t templates) GetTemplate(
	_ context.Context, r request[v1.GetTemplateRequest],
) (response[v1.GetTemplateResponse], error) {
	if strings.HasPrefix(r.Msg.Template, "never") {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("template 'never' not found"))
	}
	return connect.NewResponse(t.about()), nil
}

func (t templates) BuildTemplate(
	_ context.Context, r request[v1.BuildTemplateRequest],
) (response[v1.BuildTemplateResponse], error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.built = append(t.built, r.Msg)
	return connect.NewResponse(&v1.BuildTemplateResponse{TemplateId: TemplateID, Build: Build}), nil
}

// WatchBuild tells of two steps. With "watch" among Silent it waits then; with a Text the
// build fails by it.
func (t templates) WatchBuild(ctx context.Context, _ request[v1.WatchBuildRequest], s sender[v1.WatchBuildResponse]) error {
	progress := &v1.BuildProgress{Stage: "pull", Done: 1 << 20, Total: 4 << 20, Detail: t.Text}
	messages := []*v1.WatchBuildResponse{{}, {Progress: progress}}
	for _, text := range []string{"CACHED [1/2] RUN one", "[2/2] RUN two", "output " + t.Text} {
		messages = append(messages, &v1.WatchBuildResponse{Entry: &v1.BuildLogEntry{Level: "info", Step: "1", Message: text}})
	}
	end := &v1.BuildEnd{Status: "ready", OwnBytes: 3 << 20, SharedBytes: 258 << 20}
	if t.Text != "" {
		end = &v1.BuildEnd{Status: "error", Reason: t.Text, FailedStep: "2"}
	}
	for _, m := range messages {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	for _, silent := range t.Silent {
		if silent == "watch" {
			<-ctx.Done()
			return context.Cause(ctx)
		}
	}
	return s.Send(&v1.WatchBuildResponse{End: end})
}

func (t templates) CancelBuild(context.Context, request[v1.CancelBuildRequest]) (response[v1.CancelBuildResponse], error) {
	return connect.NewResponse(&v1.CancelBuildResponse{}), nil
}

func (t templates) GetUpload(_ context.Context, r request[v1.GetUploadRequest]) (response[v1.GetUploadResponse], error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.uploads[r.Msg.Hash]
	return connect.NewResponse(&v1.GetUploadResponse{Present: ok}), nil
}

func (t templates) PutUpload(_ context.Context, s *connect.ClientStream[v1.PutUploadRequest]) (response[v1.PutUploadResponse], error) {
	var hash string
	var data []byte
	for s.Receive() {
		if s.Msg().Hash != "" {
			hash = s.Msg().Hash
		}
		data = append(data, s.Msg().Data...)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uploads == nil {
		t.uploads = map[string]string{}
	}
	t.uploads[hash] = string(data)
	return connect.NewResponse(&v1.PutUploadResponse{}), nil
}

func (t templates) DeleteTemplate(
	context.Context, request[v1.DeleteTemplateRequest],
) (response[v1.DeleteTemplateResponse], error) {
	if t.Text != "" {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New(t.Text))
	}
	return connect.NewResponse(&v1.DeleteTemplateResponse{FreedBytes: 3 << 20}), nil
}

func (t templates) TagTemplate(context.Context, request[v1.TagTemplateRequest]) (response[v1.TagTemplateResponse], error) {
	return connect.NewResponse(&v1.TagTemplateResponse{Build: Build}), nil
}

func (t templates) UntagTemplate(context.Context, request[v1.UntagTemplateRequest]) (response[v1.UntagTemplateResponse], error) {
	return connect.NewResponse(&v1.UntagTemplateResponse{}), nil
}

// ExportTemplate sends Archive.
func (t templates) ExportTemplate(
	_ context.Context, _ request[v1.ExportTemplateRequest], s sender[v1.ExportTemplateResponse],
) error {
	if err := s.Send(&v1.ExportTemplateResponse{About: t.about()}); err != nil {
		return err
	}
	return s.Send(&v1.ExportTemplateResponse{Data: t.Archive})
}

func (t templates) garbage() []*v1.Garbage {
	return []*v1.Garbage{{Kind: "build", Name: "app " + t.Text, Bytes: 3 << 20}, {Kind: "cache", Name: "RUN one", Bytes: 1 << 20}}
}

func (t templates) PruneTemplates(context.Context, request[v1.PruneTemplatesRequest]) (response[v1.PruneTemplatesResponse], error) {
	return connect.NewResponse(&v1.PruneTemplatesResponse{Removed: t.garbage()}), nil
}

func (t templates) CollectGarbage(context.Context, request[v1.CollectGarbageRequest]) (response[v1.CollectGarbageResponse], error) {
	return connect.NewResponse(&v1.CollectGarbageResponse{Removed: t.garbage()}), nil
}
