package server

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// shownUsers is how many sandboxes an error names.
	shownUsers = 10
	// keepUnused is how long what can be made again is kept after its last use.
	keepUnused = 7 * 24 * time.Hour
)

// Builds is what the calls need of the engine that makes templates; *build.Engine is one.
type Builds interface {
	Start(ctx context.Context, spec build.Spec) error
	Cancel(ctx context.Context, template, build string) error
	Watch(ctx context.Context, template, build string, from int, fn func(build.Entry) error) error
	Upload(project, hash string) (present bool, err error)
	Put(ctx context.Context, project, hash string, r io.Reader) error
	Prune(ctx context.Context, p build.Pruning) ([]build.Item, error)
	Progress(template, build string) (build.Progress, bool)
	Forget(template string) error
}

// Images is what the calls need of the images that templates are made of; *image.Store is
// one.
type Images interface {
	Prune(ctx context.Context, keep image.Keep) (freed int64, err error)
}

// templates answers the calls of TemplateService.
type templates struct {
	store   *template.Store
	builds  Builds // nil where no template is built
	images  Images // nil with builds
	manager *sandbox.Manager
	diskMiB int
	export  Export // nil with builds
	keys    *auth.Store
	log     *slog.Logger
}

var _ hostagentv1connect.TemplateServiceHandler = (*templates)(nil)

var errNoBuilds = errdefs.Unsupported.Errorf("this host agent builds no templates")

// lookup returns the template that a text names to the caller. One that commands the host
// names those of all projects, by id or as project/name.
func (s *templates) lookup(ctx context.Context, text string) (template.Info, template.Reference, error) {
	all, err := s.store.List()
	if err != nil {
		return template.Info{}, template.Reference{}, err
	}
	own, host := project(ctx)
	t, ref, err := template.Lookup(all, own, text)
	if err == nil || !host || errdefs.ClassOf(err) != errdefs.NotFound {
		return t, ref, err
	}
	for _, other := range all {
		named := ref.Project == other.Project && slices.Contains(other.Names, ref.Name)
		if ref.Project == "" && other.ID == ref.Name || ref.Project != "" && named {
			return other, ref, nil
		}
	}
	return t, ref, err
}

// own is lookup of a template that the caller may change. tagged says whether the text may
// have a tag.
func (s *templates) own(ctx context.Context, text string, tagged bool) (template.Info, template.Reference, error) {
	t, ref, err := s.lookup(ctx, text)
	if err != nil {
		return t, ref, err
	}
	name, host := project(ctx)
	switch {
	case !t.Is(ref.Name): // another stands in for it, which is not meant
		err = errdefs.NotFound.Errorf("template %.140q not found", text)
	case !host && t.Project != name:
		err = errdefs.Denied.Errorf("template '%s' is not of your project", t.Name())
	case t.Source != "":
		err = errdefs.WrongState.Errorf("'%s' is a snapshot: the calls of snapshots change it", t.Name())
	case ref.Tag != "" && !tagged:
		err = errdefs.InvalidArgument.Errorf("template %.140q has a tag; want an id or a name", text)
	}
	return t, ref, err
}

// buildOf returns the build that a reference leads to: without a tag that of the default
// one, or the newest that is ready, or the newest.
func buildOf(t template.Info, tag string) (template.Build, error) {
	if b, ok := t.BuildOf(tag); ok {
		return b, nil
	}
	if tag != "" {
		return template.Build{}, errdefs.NotFound.Errorf("tag '%.140s' does not exist for template '%s'", tag, t.Name())
	}
	i := slices.IndexFunc(t.Builds, func(b template.Build) bool { return b.Status == template.StatusReady })
	return t.Builds[max(0, i)], nil
}

func (s *templates) ListTemplates(ctx context.Context, _ *request[pb.ListTemplatesRequest]) (*response[pb.ListTemplatesResponse], error) {
	all, err := s.store.List()
	if err != nil {
		return nil, err
	}
	own, host := project(ctx)
	all = slices.DeleteFunc(all, func(t template.Info) bool { return t.Source != "" || !host && !t.Visible(own) })
	slices.SortFunc(all, func(a, b template.Info) int {
		return cmp.Or(cmp.Compare(a.Project, b.Project), cmp.Compare(a.Name(), b.Name()), cmp.Compare(a.ID, b.ID))
	})
	resp := &pb.ListTemplatesResponse{}
	users := s.users(ctx)
	for _, t := range all {
		resp.Templates = append(resp.Templates, s.template(ctx, t, users))
	}
	return connect.NewResponse(resp), nil
}

// users are the sandboxes that the caller may know of and that have not ended.
func (s *templates) users(ctx context.Context) []sandbox.Info {
	filter := sandbox.Filter{}
	if own, host := project(ctx); !host {
		filter.Project = &own
	}
	return s.manager.Select(filter)
}

// template converts what is known of a template.
func (s *templates) template(ctx context.Context, t template.Info, users []sandbox.Info) *pb.Template {
	out := &pb.Template{
		TemplateId: t.ID, Project: t.Project, Names: t.Names, Public: t.Public || t.Project == "", Spawned: t.Spawned,
		CreatedAt: timestamppb.New(t.CreatedAt), UpdatedAt: timestamppb.New(t.UpdatedAt),
	}
	if own, _ := project(ctx); t.Project == own {
		out.Project = ""
	}
	for _, tag := range slices.SortedFunc(slices.Values(t.Tags), func(a, b template.Tag) int { return cmp.Compare(a.Name, b.Name) }) {
		out.Tags = append(out.Tags, &pb.TemplateTag{Name: tag.Name, Build: tag.Build, CreatedAt: timestamppb.New(tag.CreatedAt)})
	}
	out.OwnBytes, out.SharedBytes = s.store.Sizes(t.ID, "")
	for _, u := range users {
		if u.TemplateID == t.ID {
			out.Sandboxes = append(out.Sandboxes, string(u.ID))
		}
	}
	for _, b := range t.Builds {
		out.Builds = append(out.Builds, s.build(t, b, users))
	}
	return out
}

func (s *templates) build(t template.Info, b template.Build, users []sandbox.Info) *pb.TemplateBuild {
	out := &pb.TemplateBuild{
		Build: b.ID, Status: b.Status, CreatedAt: timestamppb.New(b.CreatedAt),
		Vcpus: int32(b.VCPUs), MemoryMb: int32(b.MemMiB), DiskMb: int32(b.DiskMiB),
	}
	if b.Reason != nil {
		out.Reason, out.FailedStep = validText(b.Reason.Message), validText(b.Reason.Step)
	}
	if !b.FinishedAt.IsZero() {
		out.FinishedAt = timestamppb.New(b.FinishedAt)
	}
	if b.Status == template.StatusReady {
		out.OwnBytes, out.SharedBytes = s.store.Sizes(t.ID, b.ID)
	}
	for _, u := range users {
		if u.TemplateID == t.ID && u.Build == b.ID {
			out.Sandboxes = append(out.Sandboxes, string(u.ID))
		}
	}
	return out
}

func (s *templates) GetTemplate(ctx context.Context, req *request[pb.GetTemplateRequest]) (*response[pb.GetTemplateResponse], error) {
	t, ref, err := s.lookup(ctx, req.Msg.Template)
	if err != nil {
		return nil, err
	}
	b, err := buildOf(t, ref.Tag)
	if err != nil {
		return nil, err
	}
	about, err := s.about(ctx, t, b)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(about), nil
}

// about says what a build is.
func (s *templates) about(ctx context.Context, t template.Info, b template.Build) (*pb.GetTemplateResponse, error) {
	out := &pb.GetTemplateResponse{Template: s.template(ctx, t, s.users(ctx)), Build: b.ID}
	if b.Status != template.StatusReady || t.Source != "" {
		return out, nil
	}
	made, err := s.store.Inspect(t.ID, b.ID)
	if err != nil {
		return nil, err
	}
	out.User, out.Workdir, out.Envs = made.Defaults.User, made.Defaults.Workdir, made.Defaults.Env
	out.StartCommand, out.ReadyCommand = made.Start.Start, made.Start.Ready
	out.Image, out.From, out.Digest, out.Layers = made.Image, made.From, b.Base, int32(len(made.Layers))
	for _, h := range made.History {
		entry := &pb.HistoryEntry{CreatedBy: validText(h.CreatedBy), Bytes: h.Bytes}
		if !h.CreatedAt.IsZero() {
			entry.CreatedAt = timestamppb.New(h.CreatedAt)
		}
		out.History = append(out.History, entry)
	}
	return out, nil
}

func (s *templates) DeleteTemplate(
	ctx context.Context, req *request[pb.DeleteTemplateRequest],
) (*response[pb.DeleteTemplateResponse], error) {
	t, _, err := s.own(ctx, req.Msg.Template, false)
	if err != nil {
		return nil, err
	}
	if t.ID == template.HostID(template.DefaultName) {
		return nil, errdefs.WrongState.Errorf("'%s' is what sandboxes are made from if their creators name no template; it stays", t.Name())
	}
	if err := s.unused(t); err != nil {
		return nil, err
	}
	if err := s.cancelAll(ctx, t); err != nil {
		return nil, err
	}
	freed, _ := s.store.Sizes(t.ID, "")
	if err := s.manager.DeleteTemplate(ctx, t.ID, ""); err != nil {
		return nil, err
	}
	s.forget(t.ID)
	return connect.NewResponse(&pb.DeleteTemplateResponse{FreedBytes: freed}), nil
}

// unused names the sandboxes for which a template is not removed. All of them are the
// caller's to know: those of another project hold a template that is not the caller's.
func (s *templates) unused(t template.Info) error {
	var ids []string
	for _, u := range s.manager.Select(sandbox.Filter{}) {
		if u.TemplateID == t.ID {
			ids = append(ids, string(u.ID))
		}
	}
	if len(ids) == 0 {
		return nil
	}
	named := strings.Join(ids[:min(len(ids), shownUsers)], " ")
	if more := len(ids) - shownUsers; more > 0 {
		named += fmt.Sprintf(" and %d more", more)
	}
	return errdefs.WrongState.Errorf("template '%s' is used by %s: destroy them first", t.Name(), named)
}

// cancelAll cancels the builds of a template that are under way.
func (s *templates) cancelAll(ctx context.Context, t template.Info) error {
	for _, b := range t.Builds {
		if s.builds == nil || b.Status != template.StatusWaiting && b.Status != template.StatusBuilding {
			continue
		}
		if err := s.builds.Cancel(ctx, t.ID, b.ID); err != nil && errdefs.ClassOf(err) != errdefs.NotFound {
			return err
		}
	}
	return nil
}

// forget removes what is remembered of the builds of a template that is gone.
func (s *templates) forget(id string) {
	if s.builds == nil {
		return
	}
	if err := s.builds.Forget(id); err != nil {
		s.log.Warn("logs of a template's builds not removed", "template", id, "err", err)
	}
}

// maxTags bounds the tags of one request.
const maxTags = 32

// tagsOf are the tags of a request, which has one at least.
func tagsOf(tags []string) ([]string, error) {
	if len(tags) == 0 || len(tags) > maxTags {
		return nil, errdefs.InvalidArgument.Errorf("%d tags, must be 1 to %d", len(tags), maxTags)
	}
	for _, tag := range tags {
		if _, err := template.ParseTag(tag); err != nil {
			return nil, err
		}
	}
	return tags, nil
}

func (s *templates) TagTemplate(ctx context.Context, req *request[pb.TagTemplateRequest]) (*response[pb.TagTemplateResponse], error) {
	tags, err := tagsOf(req.Msg.Tags)
	if err != nil {
		return nil, err
	}
	t, ref, err := s.own(ctx, req.Msg.Template, true)
	if err != nil {
		return nil, err
	}
	b, err := buildOf(t, ref.Tag)
	if err != nil {
		return nil, err
	}
	if b.Status != template.StatusReady {
		return nil, errdefs.WrongState.Errorf("build %s of template '%s' is %s; tags lead to builds that are ready", b.ID, t.Name(), b.Status)
	}
	return connect.NewResponse(&pb.TagTemplateResponse{Build: b.ID}), s.store.Tag(t.ID, b.ID, tags)
}

func (s *templates) UntagTemplate(
	ctx context.Context, req *request[pb.UntagTemplateRequest],
) (*response[pb.UntagTemplateResponse], error) {
	tags, err := tagsOf(req.Msg.Tags)
	if err != nil {
		return nil, err
	}
	t, _, err := s.own(ctx, req.Msg.Template, false)
	if err != nil {
		return nil, err
	}
	for _, tag := range tags {
		if _, ok := t.BuildOf(tag); !ok {
			return nil, errdefs.NotFound.Errorf("tag '%s' does not exist for template '%s'", tag, t.Name())
		}
	}
	return connect.NewResponse(&pb.UntagTemplateResponse{}), s.store.Untag(t.ID, tags)
}
