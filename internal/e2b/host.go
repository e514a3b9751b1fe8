package e2b

import (
	"cmp"
	"context"
	"slices"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// ofHost is Manager over the sandboxes of this host. It converts between the words of
// the two packages and decides nothing.
type ofHost struct {
	sandboxes *sandbox.Manager
	templates hostTemplates
}

// hostTemplates is Templates over the templates of this host.
type hostTemplates struct {
	sandboxes *sandbox.Manager
	store     *template.Store
	diskMiB   int
}

// OfHost returns what the handlers need of the sandboxes and templates of this host.
// diskMiB is the size of a new sandbox's disk.
func OfHost(sandboxes *sandbox.Manager, templates *template.Store, diskMiB int) (Manager, Templates) {
	t := hostTemplates{sandboxes, templates, diskMiB}
	return ofHost{sandboxes, t}, t
}

// hostBuilds is Builds over the engine of this host.
type hostBuilds struct {
	*build.Engine
	store *template.Store
}

// BuildsOf returns what the handlers need of the engine that makes this host's templates.
func BuildsOf(engine *build.Engine, templates *template.Store) Builds {
	return hostBuilds{engine, templates}
}

func (b hostBuilds) New(ctx context.Context, n NewBuild) (Template, Build, error) {
	return b.store.NewBuild(ctx, n)
}

func (h ofHost) NewID() sandbox.ID { return h.sandboxes.NewID() }

func (h ofHost) Create(ctx context.Context, r CreateRequest) (Sandbox, error) {
	created, err := h.sandboxes.Create(ctx, sandbox.CreateRequest{
		ID: r.ID, Template: r.Template + ":" + r.Build, Life: r.Timeout, OnEnd: r.OnEnd, AutoResume: r.AutoResume,
		Network: sandbox.Policy{Egress: r.Egress}, Ingress: r.Ingress, Login: sandbox.Login{User: r.User, Env: r.Env},
		Labels: sandbox.Labels{Project: r.Project, Metadata: r.Metadata},
	})
	return h.sandbox(created.Info), err
}

// sandbox converts what the host knows of a sandbox.
func (h ofHost) sandbox(i sandbox.Info) Sandbox {
	return Sandbox{
		ID: i.ID, Project: i.Labels.Project, State: i.State, Template: i.TemplateID, Alias: i.Template,
		VCPUs: i.VCPUs, MemMiB: i.MemMiB, DiskMiB: i.DiskMiB, EnvdVersion: i.EnvdVersion,
		StartedAt: i.StartedAt, EndAt: i.EndAt, PausedAt: i.PausedAt, Pausing: i.Pausing, OnEnd: i.OnEnd, AutoResume: i.AutoResume,
		FilesOnly: i.FilesOnly, Metadata: i.Labels.Metadata, Egress: i.Network.Egress, Ingress: i.Ingress,
	}
}

func (h ofHost) Get(id sandbox.ID) (Sandbox, error) {
	info, err := h.sandboxes.Get(id)
	return h.sandbox(info), err
}

func (h ofHost) List(project string) []Sandbox {
	var list []Sandbox
	for _, info := range h.sandboxes.Select(sandbox.Filter{Project: &project}) {
		list = append(list, h.sandbox(info))
	}
	return list
}

func (h ofHost) Tokens(id sandbox.ID) (Tokens, error) { return h.sandboxes.Tokens(id) }

func (h ofHost) Destroy(ctx context.Context, id sandbox.ID) error {
	return h.sandboxes.Destroy(ctx, id)
}

func (h ofHost) Pause(ctx context.Context, id sandbox.ID, r PauseRequest) error {
	return h.sandboxes.Hibernate(ctx, id, r)
}

func (h ofHost) Connect(ctx context.Context, id sandbox.ID, r ConnectRequest) (Sandbox, bool, error) {
	info, resumed, err := h.sandboxes.Connect(ctx, id, r)
	return h.sandbox(info), resumed, err
}

func (h ofHost) SetEnd(ctx context.Context, id sandbox.ID, end time.Time, extend bool) error {
	return h.sandboxes.SetEnd(ctx, id, end, extend)
}

func (h ofHost) UpdateNetwork(ctx context.Context, id sandbox.ID, e Egress) error {
	return h.sandboxes.UpdateNetwork(ctx, id, e, nil)
}

func (h ofHost) Fork(ctx context.Context, id sandbox.ID, count int, timeout time.Duration) ([]Sandbox, error) {
	forked, err := h.sandboxes.Fork(ctx, id, sandbox.ForkRequest{Count: count, Life: timeout})
	var forks []Sandbox
	for _, info := range forked.Sandboxes {
		forks = append(forks, h.sandbox(info))
	}
	return forks, err
}

func (h ofHost) Snapshot(ctx context.Context, id sandbox.ID, r SnapshotRequest) (Template, error) {
	made, err := h.sandboxes.Snapshot(ctx, id, sandbox.SnapshotRequest{
		Project: r.Project, Name: r.Name, Tag: r.Tag, FilesOnly: r.FilesOnly,
	})
	if err != nil {
		return Template{}, err
	}
	all, err := h.templates.List()
	if err != nil {
		return Template{}, err
	}
	i := slices.IndexFunc(all, func(t Template) bool { return t.ID == made.TemplateID })
	if i < 0 {
		return Template{}, errdefs.NotFound.Errorf("the snapshot was deleted when it was made")
	}
	return all[i], nil
}

func (h ofHost) Metrics(id sandbox.ID, start, end time.Time) ([]Metric, error) {
	return h.sandboxes.Metrics(id, start, end)
}

func (h ofHost) Logs(id sandbox.ID) ([]LogLine, error) {
	logs, err := h.sandboxes.Logs(id)
	lines := make([]LogLine, 0, len(logs))
	for _, l := range logs {
		lines = append(lines, LogLine{At: l.At, Level: l.Level, Message: l.Message, Fields: map[string]string{"logger": l.Source}})
	}
	return lines, err
}

func (h ofHost) Events(project string, id sandbox.ID) ([]Event, error) {
	var events []Event
	for _, e := range h.sandboxes.History(project, id) {
		if kind := eventType(e); kind != "" {
			events = append(events, Event{
				ID: e.Cursor, At: e.Time, Type: kind, Sandbox: e.ID, Template: e.TemplateID, Build: e.Build, Data: eventData(kind, e),
			})
		}
	}
	return events, nil
}

// eventType is empty for a change that clients do not know.
func eventType(e sandbox.Event) string {
	switch {
	case e.Kind == sandbox.EgressDenied:
		return ""
	case e.Kind != "":
		return string(e.Kind)
	case e.From == e.To: // a mark
		return ""
	case e.From == sandbox.Creating && e.To == sandbox.Running:
		return "created"
	case e.From == sandbox.Running && (e.To == sandbox.Hibernated || e.To == sandbox.Paused):
		return "paused"
	case e.To == sandbox.Running && e.From != sandbox.Unknown:
		return "resumed"
	case e.To == sandbox.Stopped:
		return "killed"
	}
	return ""
}

// eventData is what an event says beside its type.
func eventData(kind string, e sandbox.Event) map[string]any {
	switch {
	case kind == "created" && e.Metadata != nil:
		return map[string]any{"sandbox_metadata": e.Metadata}
	case kind == "updated" && !e.EndAt.IsZero():
		return map[string]any{"set_timeout": e.EndAt}
	case (kind == "paused" || kind == "killed") && !e.StartedAt.IsZero():
		return map[string]any{"execution": map[string]any{
			"started_at": e.StartedAt, "vcpu_count": e.VCPUs, "memory_mb": e.MemMiB, "execution_time": e.Time.Sub(e.StartedAt).Milliseconds(),
		}}
	}
	return nil
}

// List fills in what depends on the host: its sandboxes' disk, and the guest daemon that
// what boots will have.
func (t hostTemplates) List() ([]Template, error) {
	all, err := t.store.List()
	for i, have := range all {
		all[i].Builds = slices.Clone(have.Builds)
		for n := range all[i].Builds {
			b := &all[i].Builds[n]
			b.VCPUs, b.EnvdVersion = max(1, b.VCPUs), cmp.Or(b.EnvdVersion, guestapi.E2BVersion)
			if have.Source == "" {
				b.DiskMiB = t.diskMiB
			}
		}
	}
	return all, err
}

func (t hostTemplates) Delete(ctx context.Context, id, tag string) error {
	return t.sandboxes.DeleteTemplate(ctx, id, tag)
}

func (t hostTemplates) SetPublic(_ context.Context, id string, public bool) error {
	return t.store.SetPublic(id, public)
}

func (t hostTemplates) Tag(_ context.Context, id, build string, tags []string) error {
	return t.store.Tag(id, build, tags)
}

func (t hostTemplates) Untag(_ context.Context, id string, tags []string) error {
	return t.store.Untag(id, tags)
}
