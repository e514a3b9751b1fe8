package e2b

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// fake is a Manager and Templates without guests: it keeps what it is told.
type fake struct {
	mu  sync.Mutex // over all fields
	ids int
	// quota is how many sandboxes a project may have; 0 is any number.
	quota     int
	boxes     map[sandbox.ID]*Sandbox
	requests  map[sandbox.ID]CreateRequest
	templates []Template
	metrics   []Metric
	lines     []LogLine
	log       []Event
	// fail, if there is one for the name of a method, is what it returns.
	fail map[string]error
	// held, if it is not nil, is told by Create that it waits for hold.
	held, hold chan struct{}
	// calls are the names of the methods that changed something.
	calls []string
	// destroyer is who asked for the last Destroy.
	destroyer sandbox.Actor
}

const (
	baseID     = "basetemplate00000000"
	baseBuild  = "11111111-1111-4111-8111-111111111111"
	otherBuild = "22222222-2222-4222-8222-222222222222"
)

func newFake() *fake {
	return &fake{
		boxes: map[sandbox.ID]*Sandbox{}, requests: map[sandbox.ID]CreateRequest{}, fail: map[string]error{},
		templates: []Template{{
			ID: baseID, Names: []string{"minimal"}, CreatedAt: time.Unix(1000, 0), UpdatedAt: time.Unix(1000, 0),
			Builds: []Build{{
				ID: baseBuild, Status: "ready", CreatedAt: time.Unix(1000, 0), UpdatedAt: time.Unix(1000, 0),
				VCPUs: 1, MemMiB: 512, DiskMiB: 4096, EnvdVersion: "0.6.4",
			}},
		}},
	}
}

func missing(id sandbox.ID) error { return errdefs.NotFound.Errorf("sandbox %s does not exist", id) }

// begin takes the lock, notes a call, and returns the sandbox of an id. The caller
// unlocks.
func (f *fake) begin(call string, id sandbox.ID) (*Sandbox, error) {
	f.mu.Lock()
	f.calls = append(f.calls, call)
	if err := f.fail[call]; err != nil {
		return nil, err
	}
	if sb := f.boxes[id]; sb != nil {
		return sb, nil
	}
	return nil, missing(id)
}

func (f *fake) NewID() sandbox.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids++
	return sandbox.ID(fmt.Sprintf("sb-%016x", f.ids))
}

func (f *fake) Create(_ context.Context, r CreateRequest) (Sandbox, error) {
	if r.ID == "" {
		r.ID = f.NewID()
	}
	if f.hold != nil {
		f.held <- struct{}{}
		<-f.hold
	}
	if _, err := f.begin("create", r.ID); errdefs.ClassOf(err) != errdefs.NotFound || f.fail["create"] != nil {
		f.mu.Unlock()
		return Sandbox{}, err
	}
	defer f.mu.Unlock()
	n := 0
	for _, sb := range f.boxes {
		if sb.Project == r.Project {
			n++
		}
	}
	if f.quota > 0 && n >= f.quota {
		return Sandbox{}, errdefs.Exhausted.Errorf("project %s has %d sandboxes already", r.Project, n)
	}
	i := slices.IndexFunc(f.templates, func(t Template) bool { return t.ID == r.Template })
	t := f.templates[i]
	b := t.Builds[0]
	now := time.Now()
	sb := Sandbox{
		ID: r.ID, Project: r.Project, State: sandbox.Running, Template: t.ID, VCPUs: b.VCPUs,
		Alias: strings.Join(t.Names[:min(1, len(t.Names))], ""), MemMiB: b.MemMiB, DiskMiB: b.DiskMiB, EnvdVersion: b.EnvdVersion,
		StartedAt: now, EndAt: now.Add(r.Timeout), OnEnd: r.OnEnd,
		AutoResume: r.AutoResume, Metadata: maps.Clone(r.Metadata), Egress: r.Egress, Ingress: r.Ingress,
	}
	f.boxes[r.ID], f.requests[r.ID] = &sb, r
	return sb, nil
}

func (f *fake) Get(id sandbox.ID) (Sandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if sb := f.boxes[id]; sb != nil {
		return *sb, nil
	}
	return Sandbox{}, missing(id)
}

func (f *fake) List(project string) []Sandbox {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Sandbox
	for _, sb := range f.boxes {
		if sb.Project == project {
			all = append(all, *sb)
		}
	}
	return all
}

func (f *fake) Tokens(id sandbox.ID) (Tokens, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	sb := f.boxes[id]
	if sb == nil {
		return Tokens{}, missing(id)
	}
	t := Tokens{Envd: "token-of-" + string(id)}
	if sb.Ingress.Public != nil && !*sb.Ingress.Public {
		t.Traffic = "traffic-of-" + string(id)
	}
	return t, nil
}

func (f *fake) Destroy(ctx context.Context, id sandbox.ID) error {
	defer f.mu.Unlock()
	if _, err := f.begin("destroy", id); err != nil {
		return err
	}
	f.destroyer = sandbox.ActorOf(ctx)
	delete(f.boxes, id)
	return nil
}

func (f *fake) Pause(_ context.Context, id sandbox.ID, r PauseRequest) error {
	defer f.mu.Unlock()
	sb, err := f.begin("pause", id)
	if err != nil {
		return err
	}
	if sb.State != sandbox.Running {
		return errdefs.WrongState.Errorf("sandbox %s is %s", id, sb.State)
	}
	sb.State, sb.PausedAt, sb.FilesOnly = sandbox.Hibernated, time.Now(), r.FilesOnly
	return nil
}

func (f *fake) Connect(_ context.Context, id sandbox.ID, r ConnectRequest) (Sandbox, bool, error) {
	defer f.mu.Unlock()
	sb, err := f.begin("connect", id)
	if err != nil {
		return Sandbox{}, false, err
	}
	until := time.Now().Add(r.Timeout)
	if sb.State == sandbox.Running {
		if until.After(sb.EndAt) {
			sb.EndAt = until
		}
		return *sb, false, nil
	}
	sb.State, sb.StartedAt, sb.EndAt = sandbox.Running, time.Now(), until
	if r.OnEnd != "" {
		sb.OnEnd = r.OnEnd
	}
	return *sb, true, nil
}

func (f *fake) SetEnd(_ context.Context, id sandbox.ID, end time.Time, extend bool) error {
	defer f.mu.Unlock()
	sb, err := f.begin("set end", id)
	if err == nil && (!extend || end.After(sb.EndAt)) {
		sb.EndAt = end
	}
	return err
}

func (f *fake) UpdateNetwork(_ context.Context, id sandbox.ID, e Egress) error {
	defer f.mu.Unlock()
	sb, err := f.begin("network", id)
	if err == nil {
		sb.Egress = e
	}
	return err
}

func (f *fake) Fork(ctx context.Context, id sandbox.ID, count int, timeout time.Duration) ([]Sandbox, error) {
	f.mu.Lock()
	r, err := f.requests[id], f.fail["fork"]
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var forks []Sandbox
	for range count {
		r.ID, r.Timeout = f.NewID(), timeout
		sb, err := f.Create(ctx, r)
		if err != nil {
			return nil, err
		}
		forks = append(forks, sb)
	}
	return forks, nil
}

func (f *fake) Snapshot(_ context.Context, id sandbox.ID, r SnapshotRequest) (Template, error) {
	defer f.mu.Unlock()
	sb, err := f.begin("snapshot", id)
	if err != nil {
		return Template{}, err
	}
	f.ids++
	build := fmt.Sprintf("33333333-3333-4333-8333-%012x", f.ids)
	at := time.Unix(int64(2000+f.ids), 0)
	t := Template{ID: fmt.Sprintf("snapshot%012x", f.ids), Project: r.Project, Source: string(id), CreatedAt: at}
	if r.Name != "" {
		t.Names = []string{r.Name}
	}
	i := slices.IndexFunc(f.templates, func(have Template) bool {
		return r.Name != "" && have.Project == r.Project && slices.Contains(have.Names, r.Name)
	})
	if i < 0 {
		i = len(f.templates)
		f.templates = append(f.templates, t)
	}
	have := &f.templates[i]
	have.Builds = append([]Build{{ID: build, Status: "ready", CreatedAt: at, VCPUs: sb.VCPUs}}, have.Builds...)
	have.Tags = slices.DeleteFunc(have.Tags, func(tag Tag) bool { return tag.Name == r.Tag })
	have.Tags = append(have.Tags, Tag{Name: r.Tag, Build: build, CreatedAt: at})
	return *have, nil
}

func (f *fake) Metrics(_ sandbox.ID, start, end time.Time) ([]Metric, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.metrics), func(m Metric) bool {
		return !start.IsZero() && m.At.Before(start) || !end.IsZero() && m.At.After(end)
	}), f.fail["metrics"]
}

func (f *fake) Logs(sandbox.ID) ([]LogLine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.lines), f.fail["logs"]
}

func (f *fake) Events(project string, id sandbox.ID) ([]Event, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.log), func(e Event) bool {
		return e.Data["project"] != project || id != "" && e.Sandbox != id
	}), f.fail["events"]
}

// fakeTemplates is the same fake as Templates: both have a List.
type fakeTemplates struct{ *fake }

func (f fakeTemplates) List() ([]Template, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.templates), f.fail["templates"]
}

// change calls fn on a template.
func (f fakeTemplates) change(call, id string, fn func(*Template)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, call)
	if err := f.fail[call]; err != nil {
		return err
	}
	i := slices.IndexFunc(f.templates, func(t Template) bool { return t.ID == id })
	fn(&f.templates[i])
	return nil
}

func (f fakeTemplates) Delete(_ context.Context, id, tag string) error {
	err := f.change("delete template", id, func(t *Template) {
		t.Tags = slices.DeleteFunc(t.Tags, func(have Tag) bool { return tag == "" || have.Name == tag })
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.templates = slices.DeleteFunc(f.templates, func(t Template) bool { return err == nil && t.ID == id && len(t.Tags) == 0 })
	return err
}

func (f fakeTemplates) SetPublic(_ context.Context, id string, public bool) error {
	return f.change("set public", id, func(t *Template) { t.Public = public })
}

func (f fakeTemplates) Tag(_ context.Context, id, build string, tags []string) error {
	return f.change("tag", id, func(t *Template) {
		for _, tag := range tags {
			t.Tags = slices.DeleteFunc(t.Tags, func(have Tag) bool { return have.Name == tag })
			t.Tags = append(t.Tags, Tag{Name: tag, Build: build, CreatedAt: time.Unix(3000, 0)})
		}
	})
}

func (f fakeTemplates) Untag(_ context.Context, id string, tags []string) error {
	return f.change("untag", id, func(t *Template) {
		t.Tags = slices.DeleteFunc(t.Tags, func(have Tag) bool { return slices.Contains(tags, have.Name) })
	})
}
