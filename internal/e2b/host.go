package e2b

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

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
	diskMiB   int
}

// hostTemplates is Templates over the templates of this host.
type hostTemplates struct {
	store   *template.Store
	diskMiB int
}

// OfHost returns what the handlers need of the sandboxes and templates of this host.
// diskMiB is the size of a sandbox's disk.
func OfHost(sandboxes *sandbox.Manager, templates *template.Store, diskMiB int) (Manager, Templates) {
	t := hostTemplates{templates, diskMiB}
	return ofHost{sandboxes, t, diskMiB}, t
}

// notYet is the error of what this host cannot do yet.
func notYet(what string) error { return errdefs.Unsupported.Errorf("this host has no %s yet", what) }

func (h ofHost) NewID() sandbox.ID { return h.sandboxes.NewID() }

func (h ofHost) Create(ctx context.Context, r CreateRequest) (Sandbox, error) {
	name, err := h.templates.name(r.Template)
	if err != nil {
		return Sandbox{}, err
	}
	created, err := h.sandboxes.Create(ctx, sandbox.CreateRequest{
		ID: r.ID, Template: name, Life: r.Timeout, OnEnd: r.OnEnd, AutoResume: r.AutoResume,
		Network: sandbox.Policy{Egress: r.Egress}, Ingress: r.Ingress, Login: sandbox.Login{Env: r.Env},
		Labels: sandbox.Labels{Project: r.Project, Metadata: r.Metadata},
	})
	return h.sandbox(created.Info), err
}

// sandbox converts what the host knows of a sandbox.
func (h ofHost) sandbox(i sandbox.Info) Sandbox {
	return Sandbox{
		ID: i.ID, Project: i.Labels.Project, State: i.State, Template: templateID(i.Template), Alias: i.Template,
		VCPUs: i.VCPUs, MemMiB: i.MemMiB, DiskMiB: h.diskMiB, EnvdVersion: i.EnvdVersion,
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

func (h ofHost) Snapshot(context.Context, sandbox.ID, SnapshotRequest) (Template, error) {
	return Template{}, notYet("snapshots")
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
				ID: e.Cursor, At: e.Time, Type: kind, Sandbox: e.ID, Template: templateID(e.Template), Data: eventData(kind, e),
			})
		}
	}
	return events, nil
}

// eventType is empty for a change that clients do not know.
func eventType(e sandbox.Event) string {
	switch {
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

// templateID is the id of the host's template of a name.
func templateID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:10])
}

// name returns the name of the template of an id.
func (t hostTemplates) name(id string) (string, error) {
	all, err := t.store.List()
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(all, func(have template.Template) bool { return templateID(have.Name) == id })
	if i < 0 {
		return "", errdefs.NotFound.Errorf("template %s does not exist", id)
	}
	return all[i].Name, nil
}

func (t hostTemplates) List() ([]Template, error) {
	all, err := t.store.List()
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []Template
	for _, have := range all {
		sum := sha256.Sum256([]byte(have.BaseSHA256))
		x := hex.EncodeToString(sum[:16])
		build := fmt.Sprintf("%s-%s-4%s-8%s-%s", x[:8], x[8:12], x[13:16], x[17:20], x[20:])
		list = append(list, Template{
			ID: templateID(have.Name), Names: []string{have.Name}, VCPUs: max(1, have.Defaults.VCPUs),
			MemMiB: have.Defaults.MemMiB, DiskMiB: t.diskMiB, EnvdVersion: guestapi.E2BVersion,
			Builds: []Build{{ID: build, Status: "ready"}}, Tags: []Tag{{Name: defaultTag, Build: build}},
		})
	}
	return list, nil
}

var errHostTemplate = errdefs.Unsupported.Errorf("the templates of this host cannot be changed yet")

func (hostTemplates) Delete(context.Context, string, string) error { return errHostTemplate }

func (hostTemplates) SetPublic(context.Context, string, bool) error { return errHostTemplate }

func (hostTemplates) Tag(context.Context, string, string, []string) error { return errHostTemplate }

func (hostTemplates) Untag(context.Context, string, []string) error { return errHostTemplate }
