package e2b

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// defaultTag is the tag of a reference that has none.
const defaultTag = template.DefaultTag

// snapshotName is what clients may call a snapshot.
var snapshotName = regexp.MustCompile(`^[a-z0-9_-]{1,128}$`)

func noTemplate(text string) error {
	return refuse(http.StatusNotFound, "template '%.140s' not found", text)
}

// visible returns the templates that the caller may use.
func (s *server) visible(ctx context.Context) ([]Template, error) {
	all, err := s.Templates.List()
	if err != nil {
		return nil, err
	}
	project := projectOf(ctx)
	return slices.DeleteFunc(slices.Clone(all), func(t Template) bool { return !t.Visible(project) }), nil
}

// lookup returns the template that a text names to the caller.
func (s *server) lookup(ctx context.Context, text string) (Template, template.Reference, error) {
	all, err := s.Templates.List()
	if err != nil {
		return Template{}, template.Reference{}, err
	}
	return template.Lookup(all, projectOf(ctx), text)
}

func orDefault(tag string) string { return cmp.Or(tag, defaultTag) }

// resolve returns the template and the build that a sandbox is made from.
func (s *server) resolve(ctx context.Context, text string) (Template, string, error) {
	all, err := s.Templates.List()
	if err != nil {
		return Template{}, "", err
	}
	t, b, err := template.Resolve(all, projectOf(ctx), text)
	return t, b.ID, wrongStateAs(http.StatusBadRequest, err)
}

// templateFilter returns the id of the template that a list is restricted to, which
// is empty for one that does not exist.
func (s *server) templateFilter(ctx context.Context, text string) (string, error) {
	if strings.Contains(text, ":") {
		return "", refuse(http.StatusBadRequest, "template %.140q has a tag; want an id or a name", text)
	}
	t, _, err := s.lookup(ctx, text)
	if isNotFound(err) {
		return "", nil
	}
	return t.ID, err
}

func isNotFound(err error) bool {
	var own *refusal
	return errors.Is(err, errdefs.NotFound) || errors.As(err, &own) && own.status == http.StatusNotFound
}

// own returns a template that the caller may change.
func (s *server) own(ctx context.Context, text string) (Template, template.Reference, error) {
	t, ref, err := s.lookup(ctx, text)
	if err == nil && t.Project != projectOf(ctx) {
		err = refuse(http.StatusForbidden, "template '%.140s' is not of your project", text)
	}
	return t, ref, err
}

func names(t Template) []string {
	full := []string{}
	for _, name := range t.Names {
		if t.Project != "" {
			name = t.Project + "/" + name
		}
		full = append(full, name)
	}
	return full
}

func (s *server) template(t Template) api.Template {
	isDefault := t.Project == "" && slices.Contains(t.Names, s.DefaultTemplate)
	newest := t.Builds[0]
	out := api.Template{
		TemplateID: t.ID, CpuCount: newest.VCPUs, MemoryMB: newest.MemMiB, DiskSizeMB: newest.DiskMiB, Public: t.Public || t.Project == "",
		Aliases: append([]string{}, t.Names...), Names: names(t), CreatedAt: api.At(t.CreatedAt), UpdatedAt: api.At(t.UpdatedAt),
		SpawnCount: t.Spawned, BuildCount: len(t.Builds), EnvdVersion: newest.EnvdVersion,
		BuildID: newest.ID, BuildStatus: api.BuildState(newest.Status), IsDefault: some(isDefault),
	}
	if !t.SpawnedAt.IsZero() {
		at := api.At(t.SpawnedAt)
		out.LastSpawnedAt = &at
	}
	return out
}

// pageOf returns one page of the templates that keep wants.
func (s *server) pageOf(ctx context.Context, p page, keep func(Template) bool) ([]api.Template, *string, error) {
	all, err := s.visible(ctx)
	if err != nil {
		return nil, nil, err
	}
	all = slices.DeleteFunc(all, func(t Template) bool { return t.Source != "" || !keep(t) })
	onPage, next := cut(p, all, func(t Template) (time.Time, string) { return t.CreatedAt, t.ID })
	out := []api.Template{}
	for _, t := range onPage {
		out = append(out, s.template(t))
	}
	return out, next, nil
}

// mine says whether a template is of the caller's own or of the host's.
func mine(ctx context.Context) func(Template) bool {
	project := projectOf(ctx)
	return func(t Template) bool { return t.Project == project || t.Project == "" }
}

func (s *server) ListTemplatesV1(ctx context.Context, r api.ListTemplatesV1RequestObject) (api.ListTemplatesV1ResponseObject, error) {
	if err := checkTeam(ctx, r.Params.TeamID); err != nil {
		return nil, err
	}
	all, _, err := s.pageOf(ctx, page{order: descending, limit: int(^uint(0) >> 1)}, mine(ctx))
	return api.ListTemplatesV1200JSONResponse(all), err
}

func (s *server) ListTemplatesV2(ctx context.Context, r api.ListTemplatesV2RequestObject) (api.ListTemplatesV2ResponseObject, error) {
	if err := checkTeam(ctx, r.Params.TeamID); err != nil {
		return nil, err
	}
	p, err := parsePage("templates", nil, r.Params.Limit, r.Params.NextToken)
	if err != nil {
		return nil, err
	}
	all, next, err := s.pageOf(ctx, p, mine(ctx))
	return api.ListTemplatesV2200JSONResponse{Body: all, Headers: api.ListTemplatesV2200ResponseHeaders{XNextToken: next}}, err
}

func (s *server) ListDefaultTemplates(ctx context.Context, r api.ListDefaultTemplatesRequestObject,
) (api.ListDefaultTemplatesResponseObject, error) {
	p, err := parsePage("default-templates", nil, r.Params.Limit, r.Params.NextToken)
	if err != nil {
		return nil, err
	}
	all, next, err := s.pageOf(ctx, p, func(t Template) bool { return t.Project == "" })
	return api.ListDefaultTemplates200JSONResponse{Body: all, Headers: api.ListDefaultTemplates200ResponseHeaders{XNextToken: next}}, err
}

func (s *server) GetTemplate(ctx context.Context, r api.GetTemplateRequestObject) (api.GetTemplateResponseObject, error) {
	p, err := parsePage("builds", nil, r.Params.Limit, r.Params.NextToken)
	if err != nil {
		return nil, err
	}
	t, _, err := s.lookup(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	onPage, next := cut(p, t.Builds, func(b Build) (time.Time, string) { return b.CreatedAt, b.ID })
	builds := []api.Build{}
	for _, b := range onPage {
		out := api.Build{
			BuildID: b.ID, Status: api.BuildState(b.Status), CreatedAt: api.At(b.CreatedAt), UpdatedAt: api.At(b.UpdatedAt),
			CpuCount: b.VCPUs, MemoryMB: b.MemMiB, DiskSizeMB: some(b.DiskMiB), EnvdVersion: some(b.EnvdVersion),
		}
		if !b.FinishedAt.IsZero() {
			at := api.At(b.FinishedAt)
			out.FinishedAt = &at
		}
		builds = append(builds, out)
	}
	f := s.template(t)
	return api.GetTemplate200JSONResponse{
		Headers: api.GetTemplate200ResponseHeaders{XNextToken: next},
		Body: api.TemplateWithBuilds{
			TemplateID: f.TemplateID, BuildID: f.BuildID, CpuCount: f.CpuCount, MemoryMB: f.MemoryMB, DiskSizeMB: f.DiskSizeMB,
			Public: f.Public, Aliases: f.Aliases, Names: f.Names, CreatedAt: f.CreatedAt, UpdatedAt: f.UpdatedAt,
			LastSpawnedAt: f.LastSpawnedAt, SpawnCount: f.SpawnCount, BuildCount: f.BuildCount, EnvdVersion: f.EnvdVersion,
			BuildStatus: f.BuildStatus, IsDefault: f.IsDefault, Builds: builds,
		},
	}, nil
}

func (s *server) GetTemplateAlias(ctx context.Context, r api.GetTemplateAliasRequestObject,
) (api.GetTemplateAliasResponseObject, error) {
	t, ref, err := s.lookup(ctx, r.Alias)
	if err != nil {
		return nil, err
	}
	if _, ok := t.BuildOf(ref.Tag); !ok && ref.Tag != "" {
		return nil, refuse(http.StatusNotFound, "tag '%s' does not exist for template '%.140s'", ref.Tag, r.Alias)
	}
	return api.GetTemplateAlias200JSONResponse{TemplateID: t.ID, Public: t.Public || t.Project == ""}, nil
}

// DeleteTemplate also deletes a snapshot, whose id is slug/name:tag or id:tag.
func (s *server) DeleteTemplate(ctx context.Context, r api.DeleteTemplateRequestObject) (api.DeleteTemplateResponseObject, error) {
	t, ref, err := s.own(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	if ref.Tag != "" {
		if _, ok := t.BuildOf(ref.Tag); !ok {
			return nil, noTemplate(r.TemplateID)
		}
		if t.Source == "" {
			return nil, refuse(http.StatusBadRequest, "template '%.140s' has a tag; DELETE /templates/tags removes tags", r.TemplateID)
		}
	}
	if err = s.Templates.Delete(ctx, t.ID, ref.Tag); err == nil {
		s.endBuilds(ctx, t)
	}
	return api.DeleteTemplate204Response{}, wrongStateAs(http.StatusBadRequest, err)
}

// publish makes a template public, or the caller's project's alone.
func (s *server) publish(ctx context.Context, text string, public *bool) (Template, error) {
	t, _, err := s.own(ctx, text)
	if err == nil && public != nil {
		err = s.Templates.SetPublic(ctx, t.ID, *public)
	}
	return t, err
}

func (s *server) UpdateTemplateV1(ctx context.Context, r api.UpdateTemplateV1RequestObject,
) (api.UpdateTemplateV1ResponseObject, error) {
	_, err := s.publish(ctx, r.TemplateID, r.Body.Public)
	return api.UpdateTemplateV1200JSONResponse{}, err
}

func (s *server) UpdateTemplateV2(ctx context.Context, r api.UpdateTemplateV2RequestObject,
) (api.UpdateTemplateV2ResponseObject, error) {
	t, err := s.publish(ctx, r.TemplateID, r.Body.Public)
	return api.UpdateTemplateV2200JSONResponse{Names: names(t)}, err
}

// checkTags refuses what no tag can be called.
func checkTags(tags []string) ([]string, error) {
	if len(tags) == 0 {
		return nil, refuse(http.StatusBadRequest, "tags are missing")
	}
	var clean []string
	for _, tag := range tags {
		tag, err := template.ParseTag(strings.ToLower(strings.TrimSpace(tag)))
		if err != nil {
			return nil, err
		}
		clean = append(clean, tag)
	}
	return clean, nil
}

func (s *server) AssignTags(ctx context.Context, r api.AssignTagsRequestObject) (api.AssignTagsResponseObject, error) {
	tags, err := checkTags(r.Body.Tags)
	if err != nil {
		return nil, err
	}
	t, ref, err := s.own(ctx, r.Body.Target)
	if err != nil {
		return nil, err
	}
	b, ok := t.BuildOf(ref.Tag)
	if !ok {
		return nil, refuse(http.StatusNotFound, "tag '%s' does not exist for template '%.140s'", orDefault(ref.Tag), r.Body.Target)
	}
	if b.Status != template.StatusReady {
		return nil, refuse(http.StatusBadRequest, "build %s of template '%.140s' is %s, not ready", b.ID, r.Body.Target, b.Status)
	}
	err = s.Templates.Tag(ctx, t.ID, b.ID, tags)
	return api.AssignTags201JSONResponse{Tags: tags, BuildID: b.ID}, err
}

func (s *server) RemoveTags(ctx context.Context, r api.RemoveTagsRequestObject) (api.RemoveTagsResponseObject, error) {
	tags, err := checkTags(r.Body.Tags)
	if err != nil {
		return nil, err
	}
	if strings.Contains(r.Body.Name, ":") {
		return nil, refuse(http.StatusBadRequest, "name %.140q has a tag", r.Body.Name)
	}
	if slices.Contains(tags, defaultTag) {
		return nil, refuse(http.StatusBadRequest, "the tag 'default' cannot be removed")
	}
	t, _, err := s.own(ctx, r.Body.Name)
	if err == nil {
		err = s.Templates.Untag(ctx, t.ID, tags)
	}
	return api.RemoveTags204Response{}, err
}

func (s *server) ListTags(ctx context.Context, r api.ListTagsRequestObject) (api.ListTagsResponseObject, error) {
	t, _, err := s.lookup(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	tags := api.ListTags200JSONResponse{}
	for _, tag := range t.Tags {
		tags = append(tags, api.Tag{Tag: tag.Name, BuildID: tag.Build, CreatedAt: api.At(tag.CreatedAt)})
	}
	return tags, nil
}

// buildOf returns a build of a template that text names; what is not there is a bad
// request, as E2B's server has it.
func buildOf(t Template, id, text string) (Build, error) {
	i := slices.IndexFunc(t.Builds, func(b Build) bool { return b.ID == id })
	if i < 0 {
		return Build{}, refuse(http.StatusBadRequest, "build %.70q of template '%.140s' does not exist", id, text)
	}
	return t.Builds[i], nil
}

// snapshotID is what clients use a snapshot by: name and tag, or id and tag.
func snapshotID(t Template, tag string) string {
	if full := names(t); len(full) > 0 {
		return full[0] + ":" + tag
	}
	return t.ID + ":" + tag
}

func (s *server) CreateSnapshot(ctx context.Context, r api.CreateSnapshotRequestObject) (api.CreateSnapshotResponseObject, error) {
	body := value(r.Body, api.SnapshotRequest{})
	project := projectOf(ctx)
	req := SnapshotRequest{Project: project, Tag: defaultTag, FilesOnly: !value(body.Memory, true)}
	if name := value(body.Name, ""); name != "" {
		ref, err := template.ParseReference(name)
		if err != nil {
			return nil, err
		}
		if ref.Project != "" && ref.Project != project {
			return nil, refuse(http.StatusBadRequest, "snapshot %.140q: the namespace of your names is %s", name, project)
		}
		if !snapshotName.MatchString(ref.Name) {
			return nil, refuse(http.StatusBadRequest, "snapshot %.140q: a name has up to 128 of a-z, 0-9, _ and -", name)
		}
		if _, err := template.ParseTag(orDefault(ref.Tag)); err != nil {
			return nil, err
		}
		req.Name, req.Tag = ref.Name, orDefault(ref.Tag)
	}
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	t, err := s.Manager.Snapshot(ctx, sb.ID, req)
	if err != nil {
		return nil, busyAs(http.StatusServiceUnavailable, err)
	}
	return api.CreateSnapshot201JSONResponse{SnapshotID: snapshotID(t, req.Tag), Names: names(t)}, nil
}

// snapshot is one entry of a list: a tag of a template that is a snapshot.
type snapshot struct {
	info api.SnapshotInfo
	at   time.Time
}

func (s *server) ListSnapshots(ctx context.Context, r api.ListSnapshotsRequestObject) (api.ListSnapshotsResponseObject, error) {
	p, err := parsePage("snapshots", nil, r.Params.Limit, r.Params.NextToken)
	if err != nil {
		return nil, err
	}
	entries, err := s.snapshots(ctx, value(r.Params.SandboxID, ""), value(r.Params.Name, ""))
	if err != nil {
		return nil, err
	}
	onPage, next := cut(p, entries, func(e snapshot) (time.Time, string) { return e.at, e.info.SnapshotID })
	answer := api.ListSnapshots200JSONResponse{
		Body: []api.SnapshotInfo{}, Headers: api.ListSnapshots200ResponseHeaders{XNextToken: next},
	}
	for _, e := range onPage {
		answer.Body = append(answer.Body, e.info)
	}
	return answer, nil
}

// snapshots returns the caller's snapshots of a sandbox and with a name; empty is
// any.
func (s *server) snapshots(ctx context.Context, source, name string) ([]snapshot, error) {
	all, err := s.Templates.List()
	if err != nil {
		return nil, err
	}
	var ref template.Reference
	if name != "" {
		if ref, err = template.ParseReference(name); err != nil {
			return nil, err
		}
	}
	from, known := sandbox.ParseLooseID(source)
	project := projectOf(ctx)
	var entries []snapshot
	for _, t := range all {
		foreign := t.Project != project || t.Source == "" || source != "" && (!known || t.Source != string(from))
		if foreign || name != "" && (ref.Project != "" && ref.Project != project || !slices.Contains(t.Names, ref.Name)) {
			continue
		}
		for _, tag := range t.Tags {
			if ref.Tag == "" || ref.Tag == tag.Name {
				entries = append(entries, snapshot{api.SnapshotInfo{SnapshotID: snapshotID(t, tag.Name), Names: names(t)}, tag.CreatedAt})
			}
		}
	}
	return entries, nil
}
