package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Bounds of a sandbox's size. A host's Capacity may be narrower.
const (
	MaxVCPUs   = 32
	MinMemMiB  = 128
	MaxMemMiB  = 256 << 10
	MaxTimeout = 365 * 24 * time.Hour
)

// CreateRequest describes a new sandbox; zero values take the defaults. As JSON it is
// what an owner key stands for.
type CreateRequest struct {
	// ID is from NewID; one is made up when empty. No waiting guest can become a sandbox
	// whose id is given.
	ID ID `json:"-"`
	// Template is what template.Resolve takes of the project: an id, a name, or either with
	// a tag or a build's id; "minimal" when empty.
	Template string `json:",omitzero"`
	// VCPUs is the template's when zero.
	VCPUs int `json:",omitzero"`
	// MemMiB is the template's when zero.
	MemMiB int `json:",omitzero"`
	// DiskMiB is the size of its disk: the snapshot's or Config.OverlayMiB when zero.
	DiskMiB int `json:",omitzero"`
	// Timeout is the inactivity after which the sandbox expires; 0 is never.
	Timeout time.Duration `json:",omitzero"`
	// OnTimeout is what happens then; destroy when empty.
	OnTimeout OnTimeout `json:",omitzero"`
	// EndAt is when the sandbox ends, whatever happens in it; zero is never.
	EndAt time.Time `json:",omitzero"`
	// OnEnd is what happens then; destroy when empty.
	OnEnd OnTimeout `json:",omitzero"`
	// Life, in place of EndAt, is the time from the moment at which the sandbox runs until
	// it ends; 0 is none. Wake gives it the same again.
	Life time.Duration `json:",omitzero"`
	// AutoResume lets Wake resume the sandbox.
	AutoResume bool `json:",omitzero"`
	// VMM is the name of the driver that is to run the sandbox; the best that can, or the
	// snapshot's, when empty.
	VMM string `json:",omitzero"`
	// Isolation is what must stand between the guest and the host; anything when empty.
	Isolation Isolation `json:",omitzero"`
	// Network is what the sandbox may reach.
	Network Policy `json:",omitzero"`
	// Ingress is how its servers are reached.
	Ingress Ingress `json:",omitzero"`
	// Login is what its programs begin with; what it does not say is the
	// template's or the snapshot's.
	Login Login `json:",omitzero"`
	// Busy is what counts as activity beside calls and connections.
	Busy Busy `json:",omitzero"`
	// Publish are ports that the host listens for. A fork has none.
	Publish []Publish `json:",omitzero"`
	// Labels are kept as they are. Those of a snapshot's source are not the sandbox's.
	Labels Labels `json:",omitzero"`

	// snapshot is what the snapshot is called that the state comes from.
	snapshot string
	// bootKey, if not empty, makes a waiting guest from the boot snapshot with that key.
	bootKey string
	// build makes a build sandbox.
	build bool
	// digest is of the request that has an owner key.
	digest string
}

// Created is what came of a Create.
type Created struct {
	Info
	// From says what the sandbox started from, Why why it had to boot.
	From, Why string
	// Phases are what the time went into, in this order, some of it at the same
	// time.
	Phases []Phase
}

func (r *CreateRequest) check() error {
	if r.Template == "" {
		r.Template = "minimal"
	}
	if r.VCPUs == 0 {
		r.VCPUs = 1
	}
	if r.MemMiB == 0 {
		r.MemMiB = 512
	}
	var errs []error
	if r.VCPUs < 1 || r.VCPUs > MaxVCPUs {
		errs = append(errs, fmt.Errorf("vcpus is %d, must be 1 to %d", r.VCPUs, MaxVCPUs))
	}
	if r.MemMiB < MinMemMiB || r.MemMiB > MaxMemMiB {
		errs = append(errs, fmt.Errorf("memory is %d MiB, must be %d to %d", r.MemMiB, MinMemMiB, MaxMemMiB))
	}
	if r.DiskMiB != 0 && (r.DiskMiB < template.MinOverlayMiB || r.DiskMiB > template.MaxOverlayMiB) {
		errs = append(errs, fmt.Errorf("disk is %d MiB, must be %d to %d", r.DiskMiB, template.MinOverlayMiB, template.MaxOverlayMiB))
	}
	errs = append(errs, checkName(r.Labels.Name), r.Isolation.check(), r.checkLife(), checkTimeout(r.Timeout),
		r.OnTimeout.check("on_timeout"), r.checkEnd(), r.OnEnd.check("on_deadline"),
		CheckUser(r.Login.User), checkWorkdir(r.Login.Workdir), CheckEnv(r.Login.Env), r.checkPublish(), r.Busy.check(),
		CheckMetadata(r.Labels.Metadata))
	if err := errors.Join(errs...); err != nil {
		return errdefs.InvalidArgument.Errorf("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

// checkEnd is of a create, which must not be too late.
func (r *CreateRequest) checkEnd() error {
	now := time.Now()
	if passed(r.EndAt, now) {
		return fmt.Errorf("deadline %s has passed", r.EndAt.UTC().Format(time.RFC3339))
	}
	return checkEnd(r.EndAt, now)
}

// checkLife is of what says when the sandbox ends, and what happens then.
func (r *CreateRequest) checkLife() error {
	switch {
	case r.Life < 0 || r.Life > MaxTimeout:
		return fmt.Errorf("life is %d s, must be 0 (none) to %d", r.Life/time.Second, MaxTimeout/time.Second)
	case r.Life > 0 && !r.EndAt.IsZero():
		return errors.New("life and deadline exclude each other")
	case r.AutoResume && r.OnEnd == HibernateFilesOnTimeout:
		return errors.New("a sandbox that is hibernated without its memory is not resumed by traffic")
	case r.ID != "" && !idPattern.MatchString(string(r.ID)):
		return fmt.Errorf("id %.40q is malformed", r.ID)
	}
	return nil
}

func checkTimeout(d time.Duration) error {
	if d < 0 || d > MaxTimeout {
		return fmt.Errorf("timeout is %d s, must be 0 (never) to %d", d/time.Second, MaxTimeout/time.Second)
	}
	return nil
}

var errDestroyed = errdefs.Busy.Errorf("the sandbox was destroyed during the operation")

// destroyed is errDestroyed with the context of the destroy.
type destroyed struct {
	error
	by context.Context
}

func (d destroyed) Unwrap() error { return d.error }

// Create makes a sandbox and returns when commands can run in it. ctx bounds
// the making only: the sandbox outlives it. On error nothing is left. A request with an
// owner key makes one sandbox, however often it comes, and gets that one, whatever its
// state is; another request with the key is errdefs.AlreadyExists. The key is free when
// the sandbox is forgotten. So is a name that a sandbox of the project has which has not
// ended.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (Created, error) {
	if req.Labels.OwnerKey != "" {
		return m.createOwned(ctx, req)
	}
	return m.createNew(ctx, req)
}

func (m *Manager) createNew(ctx context.Context, req CreateRequest) (Created, error) {
	asked := req
	if err := req.check(); err != nil {
		return Created{}, err
	}
	if err := m.checkPolicy(req.Network); err != nil {
		return Created{}, err
	}
	if name := req.Labels.Name; name != "" {
		done, err := m.holdName(req.Labels.Project, name)
		if err != nil {
			return Created{}, err
		}
		defer done()
	}
	t, build, err := m.cfg.Templates.Resolve(req.Labels.Project, req.Template)
	if err != nil {
		return Created{}, err
	}
	var created Created
	if t.Source != "" {
		created, err = m.createFromSnapshot(ctx, asked, t, build)
	} else {
		req.VCPUs = cmp.Or(asked.VCPUs, build.VCPUs, req.VCPUs)
		req.MemMiB = cmp.Or(asked.MemMiB, build.MemMiB, req.MemMiB)
		created, err = m.createFromTemplate(ctx, req, t, build)
	}
	if err == nil {
		m.cfg.Templates.CountSpawn(t.ID)
	}
	return created, err
}

// createFromTemplate is Create from a build that no sandbox was.
func (m *Manager) createFromTemplate(ctx context.Context, req CreateRequest, t template.Info, build template.Build) (Created, error) {
	tmpl, err := m.cfg.Templates.Root(t, build)
	if err != nil {
		return Created{}, err
	}
	req.Login = req.Login.Over(tmpl.Defaults.Login)
	if req.VMM, err = m.choose(ctx, req, canRun(req, tmpl)); err != nil {
		return Created{}, err
	}
	if _, err := m.disk.reserve(0); err != nil {
		return Created{}, fmt.Errorf("create sandbox: %w", err)
	}
	if created, ok, err := m.keeper.createWaiting(ctx, req, tmpl); ok || err != nil {
		return created, err
	}
	return m.create(ctx, req, tmpl, m.bootSource)
}

// sourceOf returns what a sandbox with that record starts from.
type sourceOf func(context.Context, Record, template.Template) source

// create makes a sandbox that starts from a source; on error nothing is left.
func (m *Manager) create(ctx context.Context, req CreateRequest, tmpl template.Template, find sourceOf) (Created, error) {
	ctx, took := withPhases(ctx)
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	end := phase(ctx, "reserve")
	b, err := m.reserve(ctx, req, tmpl, abort)
	if err != nil {
		return Created{}, fmt.Errorf("create sandbox: %w", err)
	}
	defer b.unhold()
	end()
	if !m.cfg.Templates.Has(tmpl.ID, tmpl.Build) { // its delete did not see the record yet
		return Created{}, m.createFailed(ctx, b, errdefs.NotFound.Errorf("template %q was deleted before the sandbox had started", tmpl.Name))
	}
	src := find(ctx, b.record(), tmpl)
	if req.EndAt.IsZero() { // a fork has both
		src.life = req.Life
	}
	defer src.close()
	src, err = m.start(ctx, b, tmpl, src)
	if err != nil {
		return Created{}, m.createFailed(ctx, b, err)
	}
	return m.created(b, src, took), nil
}

// createFailed frees a sandbox whose create failed, and says why. Called with the op
// lock held.
func (h *holdings) createFailed(ctx context.Context, b *box, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	err = errdefs.DiskFull(err)
	reason := CreateFailed
	var end destroyed
	if errors.As(err, &end) {
		reason = Destroyed
		b.actFor(end.by)
	}
	detail := err.Error()
	if errors.Is(err, context.Canceled) {
		detail = "the caller left while the sandbox was being created"
	}
	_ = h.release(b, reason, detail) // the janitor tries again
	return fmt.Errorf("create sandbox %s: %w", b.id, err)
}

// created logs how a sandbox started, and is what its creator learns.
func (v *vms) created(b *box, src source, took *phases) Created {
	how := []any{"sandbox", b.id, "from", src.from}
	if src.why != "" {
		how = append(how, "why", src.why)
	}
	v.log.Info("sandbox started", append(how, took.attrs()...)...)
	return Created{Info: b.info(), From: src.from, Why: src.why, Phases: took.done()}
}

// making lets waiting guests make way for a sandbox that needs so much, one at a time;
// false if none can.
type making func(ctx context.Context, need Resources) bool

// admit admits a sandbox of a project that needs so much more than it takes. Waiting
// guests make way.
func (h *holdings) admit(ctx context.Context, id ID, project string, more Resources, makeWay making) error {
	var over overQuota
	for {
		if h.Draining() {
			return errShutDown
		}
		err := h.ledger.take(id, project, h.quotaOf(project), more)
		if !errors.Is(err, errdefs.Exhausted) || errors.As(err, &over) || !makeWay(ctx, more) {
			return err
		}
	}
}

// acquireSlot acquires an address slot with a link for a driver. Waiting guests make way.
func (h *holdings) acquireSlot(ctx context.Context, d vmm.Driver, makeWay making) (network.Slot, error) {
	for {
		slot, err := h.cfg.Network.Acquire(ctx, d.Needs().Link)
		if !errors.Is(err, errdefs.Exhausted) || !makeWay(ctx, Resources{}) {
			return slot, err
		}
	}
}

// reserve takes capacity, a slot and an ID, and commits to them by writing the
// record. The box comes back with its op lock held.
func (h *holdings) reserve(
	ctx context.Context, req CreateRequest, tmpl template.Template, abort context.CancelCauseFunc,
) (_ *box, err error) {
	var temp undo.Stack
	defer func() { err = errors.Join(err, temp.Unwind(ctx)) }()

	id, state, makeWay := req.ID, Creating, h.makeWay
	if id == "" {
		id = h.NewID()
	}
	switch {
	case req.bootKey != "": // no waiting guest makes way for another
		state, makeWay = Waiting, func(context.Context, Resources) bool { return false }
	case req.build:
		state = Building
	}
	diskMiB := cmp.Or(req.DiskMiB, h.cfg.OverlayMiB)
	if err := h.reserveID(id); err != nil {
		return nil, err
	}
	temp.Push("record", func(context.Context) error { return h.store.forget(id) })
	if err := h.admit(ctx, id, req.Labels.Project, need(req.VCPUs, req.MemMiB, diskMiB), makeWay); err != nil {
		return nil, err
	}
	temp.Push("admission", func(context.Context) error { h.ledger.give(id); return nil })
	driver := h.driverOf(Record{VMM: req.VMM})
	slot, err := h.acquireSlot(ctx, driver, makeWay)
	if err != nil {
		return nil, err
	}
	temp.Push("slot", func(context.Context) error { return h.cfg.Network.Release(slot) })

	now := time.Now().UTC()
	b := newBox(Record{
		Version: recordVersion, ID: id, State: state,
		Template: tmpl.Name, TemplateID: tmpl.ID, Build: tmpl.Build, Snapshot: req.snapshot,
		VCPUs: req.VCPUs, MemMiB: req.MemMiB, DiskMiB: diskMiB, Timeout: req.Timeout,
		OnTimeout: req.OnTimeout, EndAt: asEnd(req.EndAt), OnEnd: req.OnEnd, Life: req.Life, AutoResume: req.AutoResume, Base: tmpl.RootSHA256,
		Network: req.Network.clone(), Ingress: req.Ingress.clone(), Login: req.Login, Labels: req.Labels.clone(), RequestDigest: req.digest,
		Slot: slot, HostIP: h.cfg.Network.Plan().Addrs(slot).HostIP, Token: newToken(), CloneKey: newToken(),
		TrafficToken: req.Ingress.newTrafficToken(),
		BootKey:      req.bootKey, VMM: driver.Name(), RootImage: rootImage(driver, tmpl),
		Publish: slices.Clone(req.Publish), Busy: req.Busy,
		CreatedAt: now, StateAt: now, LastActiveAt: now,
	})
	b.setAbort(abort)
	if err := h.store.save(b.record()); err != nil {
		return nil, err
	}
	b.tryHold("created")
	b.actFor(ctx)
	if err := h.add(b); err != nil { // a shutdown that began does not see this box
		return nil, err
	}
	temp.Keep()
	if state == Creating {
		h.tell(b, Event{Time: now, To: Creating, Actor: ActorOf(ctx)})
	}
	return b, nil
}

// NewID returns an id that no sandbox has or had: 64 random bits. Create decides whether
// it is new.
func (*registry) NewID() ID { return newID() }

// reserveID takes an id for a sandbox that is being made: errdefs.AlreadyExists if a
// sandbox has it, is being made with it, or had it as far as the events go back.
func (r *registry) reserveID(id ID) error {
	err := r.store.reserve(id)
	if errors.Is(err, fs.ErrExist) {
		return errdefs.AlreadyExists.Errorf("sandbox %s exists", id)
	}
	if err != nil {
		return fmt.Errorf("reserve id: %w", errdefs.DiskFull(err))
	}
	if _, existed := r.events.lastOf(id); existed {
		return errors.Join(errdefs.AlreadyExists.Errorf("sandbox %s has existed", id), r.store.forget(id))
	}
	return nil
}

// Ran says whether a sandbox has ever run, as far as its record and the events tell. A
// create of which an earlier agent told nothing was carried out if it did.
func (r *registry) Ran(id ID) bool {
	if b := r.lookup(id); b != nil && !b.hidden() {
		rec := b.record()
		return rec.State != Creating && rec.Reason != CreateFailed
	}
	return r.events.ran(id)
}

func newID() ID { return ID("sb-" + randomHex(8)) }

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func newToken() string { return rand.Text() }

// entropy is the seed that a guest gets from its host.
func entropy() []byte {
	b := make([]byte, 64)
	rand.Read(b)
	return b
}

// fromSnapshot returns what a sandbox starts from that gets the state of another.
func fromSnapshot(src source) sourceOf {
	src.from, src.tell, src.state, src.gone = FromSnapshot, tellClone, true, errSnapshotDeleted
	if src.boot != nil {
		src.boot.gone = errSnapshotDeleted
	}
	return func(context.Context, Record, template.Template) source { return src }
}

// fromSnapshotDisk returns what a sandbox starts from that gets only the disk of
// another.
func fromSnapshotDisk(src source) sourceOf {
	src.gone = errSnapshotDeleted
	return func(context.Context, Record, template.Template) source { return src }
}

var errSnapshotDeleted = errdefs.NotFound.Errorf("the snapshot was deleted before the sandbox had started")
