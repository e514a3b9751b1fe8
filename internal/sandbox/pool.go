package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// poolCalm is how long no sandbox must have been started before a guest is
	// made ahead: neither a create nor the first command of the sandbox just
	// made has to share the CPUs with it.
	poolCalm = time.Second
	// poolLook is how often the pool is looked at when nothing happens: a
	// guest of another kernel or envd than today's is of no use.
	poolLook = 30 * time.Second
)

// WarmAuto, as Config.Warm, is a number that the host's free memory and CPUs decide. It is 0
// unless the driver of the default kind is flat: an idle guest of such takes 23 MiB and no
// CPU, and one more takes a CPU for a sixth of a second to make.
const WarmAuto = -1

const (
	// warmPerStart waiting guests there are for each VM that may start at a time: so many
	// creates come faster than guests are made to take their places. warmMost is for hosts
	// with many CPUs.
	warmPerStart = 2
	warmMost     = 16
	// warmGuest is what a waiting guest takes of the memory that is available, and 1/warmShare
	// of that is the most that all of them take.
	warmGuest = 32 << 20
	warmShare = 20
	// flatCalm is poolCalm where a first command does not take long.
	flatCalm = poolCalm / 4
)

// errMakeWay ends the making of a guest whose room a sandbox needs.
var errMakeWay = errdefs.Busy.Errorf("a sandbox needs the room")

// pool holds restored guests that have no identity yet; each has a record in state
// waiting, so that a restart frees it. It is safe for concurrent use.
type pool struct {
	// woken has an element when there is something to look at.
	woken chan struct{}

	mu sync.Mutex
	// wanted is how many guests are to wait, calm how long no sandbox must have been
	// started before one is made.
	wanted int
	calm   time.Duration
	guests []*box // the oldest first
	// making is closed when no more guest is on its way into the pool, nil if
	// none is; stop ends its making.
	making chan struct{}
	stop   context.CancelCauseFunc
	// startedAt is when a sandbox was last started.
	startedAt time.Time
	// closed: Shutdown ends the guests.
	closed bool
}

func newPool() *pool { return &pool{calm: poolCalm, woken: make(chan struct{}, 1)} }

// want sets how many guests are to wait, and how long no sandbox must have been started
// before one is made.
func (p *pool) want(guests int, calm time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted, p.calm = guests, calm
}

// wants is how many guests are to wait.
func (p *pool) wants() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wanted
}

// wake has the pool looked at.
func (p *pool) wake() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// stir notes that a sandbox is being started, or has been.
func (p *pool) stir() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.startedAt = time.Now()
	p.wake()
}

// untilCalm is how long to wait before the CPUs may be taken for a guest that
// is not needed yet.
func (p *pool) untilCalm() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.startedAt.Add(p.calm))
}

// holds says whether a guest waits for its sandbox.
func (p *pool) holds(b *box) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.guests, b)
}

// size is how many guests wait.
func (p *pool) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.guests)
}

// put adds a guest, unless the pool is closed or the guest's making has been ended.
func (p *pool) put(ctx context.Context, b *box) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if p.closed {
		return errShutDown
	}
	p.guests = append(p.guests, b)
	return nil
}

// drop takes a guest out, if it is in the pool.
func (p *pool) drop(b *box) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guests = slices.DeleteFunc(p.guests, func(w *box) bool { return w == b })
}

// close lets no more guest be taken out or put in.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
}

// takeOut takes the oldest guest that fits out of the pool, its op lock
// held; nil if there is none.
func (p *pool) takeOut(doing string, abort context.CancelCauseFunc, fits func(Record) bool) *box {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	for i, b := range p.guests {
		// A guest whose op lock is taken has lost its VM.
		if !fits(b.record()) || !b.tryHold(doing) {
			continue
		}
		p.guests = slices.Delete(p.guests, i, i+1)
		b.setAbort(abort)
		return b
	}
	return nil
}

// begin notes that a guest is being made; done ends that.
func (p *pool) begin(stop context.CancelCauseFunc) (done func()) {
	making := make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.making, p.stop = making, stop
	return func() {
		p.mu.Lock()
		p.making = nil
		p.mu.Unlock()
		close(making)
	}
}

// stopMaking ends the making of a guest and waits for that. It says whether one was
// being made.
func (p *pool) stopMaking(ctx context.Context) (stopped bool, err error) {
	p.mu.Lock()
	making, stop := p.making, p.stop
	p.mu.Unlock()
	if making == nil {
		return false, nil
	}
	stop(errMakeWay)
	select {
	case <-making:
		return true, nil
	case <-ctx.Done():
		return true, context.Cause(ctx)
	}
}

// keeper makes waiting guests, keeps the pool full of them, and makes sandboxes of them.
type keeper struct{ *holdings }

// createWaiting makes a sandbox of a waiting guest with the same boot key. ok is false
// if there is none, or none that still answers.
func (k keeper) createWaiting(ctx context.Context, req CreateRequest, tmpl template.Template) (_ Created, ok bool, err error) {
	if k.pool.wants() == 0 || req.ID != "" {
		return Created{}, false, nil
	}
	ctx, took := withPhases(ctx)
	end := phase(ctx, "reserve")
	began := time.Now().UTC()
	key, err := k.bootKeyOf(ctx, req, tmpl)
	if err != nil {
		return Created{}, false, nil // the create from scratch says why
	}
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	k.pool.stir()
	defer k.pool.stir()
	for {
		b := k.pool.takeOut("created", abort, func(r Record) bool { return r.BootKey == key && r.TemplateID == tmpl.ID })
		if b == nil {
			return Created{}, false, nil
		}
		end()
		if err := k.ledger.assign(b.id, req.Labels.Project, k.quotaOf(req.Labels.Project)); err != nil {
			k.putBack(ctx, b)
			return Created{}, false, fmt.Errorf("create sandbox: %w", err)
		}
		err := k.handOut(ctx, b, req, began)
		if err == nil {
			return k.created(b, source{from: FromWarm}, took), true, nil
		}
		if cause := context.Cause(ctx); cause != nil {
			return Created{}, false, fmt.Errorf("create sandbox: %w", cause)
		}
		if errdefs.ClassOf(err) == errdefs.NotFound { // no guest has that user
			return Created{}, false, fmt.Errorf("create sandbox: %w", err)
		}
		k.log.Warn("waiting guest of no use", "sandbox", b.id, "err", err)
	}
}

// putBack puts a waiting guest back that takeOut took out. It gives the op lock back.
func (k keeper) putBack(ctx context.Context, b *box) {
	if err := k.pool.put(ctx, b); err != nil {
		_ = k.release(b, Destroyed, err.Error()) // the janitor tries again
	}
	b.unhold()
}

// handOut tells a waiting guest what it is, and makes a sandbox of its
// record. Until then it is no sandbox, on disk too. Called with the op
// lock held, which it gives back; on error nothing is left of the guest.
func (k keeper) handOut(ctx context.Context, b *box, req CreateRequest, began time.Time) (err error) {
	defer func() {
		if err != nil {
			_ = k.release(b, CreateFailed, err.Error()) // the janitor tries again
		}
		b.unhold()
	}()
	b.actFor(ctx)
	ctx, cancel := b.while(ctx)
	defer cancel()
	// The network is in place before the first of the user's code, which comes after Init.
	rec := b.record()
	if rec.Network = req.Network.clone(); !k.hasHostPolicy(rec) {
		end := phase(ctx, "network")
		if err := k.setNetwork(ctx, rec); err != nil {
			return err
		}
		end()
	}
	wake, cancelWake := context.WithTimeoutCause(ctx, wakeTimeout,
		errdefs.Unavailable.Errorf("the waiting guest did not answer within %s", wakeTimeout))
	defer cancelWake()
	rec.Login = req.Login
	end := phase(ctx, "init")
	g, in := b.op.guest, k.identity(rec, true)
	in.NewBootID = rec.flat() // its kernel has drawn one
	if b.op.opens != "" {
		g, in.NewBootID = k.cfg.Guests(rec.HostIP, b.op.opens), true
		defer g.Close()
	}
	if err := b.init(wake, g, in); err != nil {
		return k.bootFailed(b, "initialise guest", err)
	}
	end()
	defer phase(ctx, "commit")()
	return k.move(b, Running, func(r *Record) {
		r.BootKey, r.CreatedAt = "", began
		r.Timeout, r.OnTimeout, r.Network, r.Login = req.Timeout, req.OnTimeout, rec.Network, rec.Login
		r.EndAt, r.OnEnd, r.Labels = asEnd(req.EndAt), req.OnEnd, req.Labels.clone()
		r.Ingress, r.TrafficToken = req.Ingress.clone(), req.Ingress.newTrafficToken()
		r.RequestDigest, r.EnvdVersion = req.digest, b.op.envd
		r.Life, r.AutoResume, r.Publish = req.Life, req.AutoResume, slices.Clone(req.Publish)
		r.Busy = req.Busy
		lifetime{life: req.Life}.begin(r)
	})
}

// makeWay ends a waiting guest, the oldest first, so that a sandbox has
// the room that it needs; false if there is none, or if all of them together
// would not do.
func (h *holdings) makeWay(ctx context.Context, need Resources) bool {
	h.pool.stir()
	var waiting []ID
	for _, b := range h.all() {
		if b.waits() {
			waiting = append(waiting, b.id)
		}
	}
	fits := h.ledger.fits(need, waiting)
	if stopped, err := h.pool.stopMaking(ctx); stopped { // it takes room as well
		return err == nil
	}
	if !fits {
		return false
	}
	b := h.pool.takeOut("given up", nil, func(Record) bool { return true })
	if b == nil {
		return false
	}
	defer b.unhold()
	return h.release(b, Destroyed, "a sandbox needs the room") == nil
}

// run keeps the pool full until the manager's life ends. It makes one
// guest at a time, and only while no sandbox is started.
func (k keeper) run() {
	k.pool.wake()
	timer := time.NewTimer(poolLook)
	defer timer.Stop()
	failures, retryAt := 0, time.Time{}
	for {
		select {
		case <-k.life.Done():
			return
		case <-k.pool.woken:
		case <-timer.C:
		}
		calm := k.pool.untilCalm()
		if len(k.starts) > 0 { // their ends wake us
			calm = poolLook
		}
		if wait := max(calm, time.Until(retryAt)); wait > 0 {
			timer.Reset(wait)
			continue
		}
		made, err := k.refill()
		again := poolLook
		switch {
		case k.Draining():
			return
		case err == nil:
			failures, retryAt = 0, time.Time{}
			if made {
				k.pool.wake() // another may be wanted
			}
		case errors.Is(err, errdefs.Exhausted), errors.Is(err, errMakeWay):
			// Sandboxes need the room: wait until one gives some back, or for the next look.
			k.log.Debug("no room for a waiting guest", "err", err)
		default:
			failures++
			again = backOff(failures)
			retryAt = time.Now().Add(again)
			k.log.Warn("waiting guest not made", "failures", failures, "err", err)
		}
		timer.Reset(again)
	}
}

// decide returns how many guests of a driver are to wait, and how long no sandbox must have
// been started before one is made.
func (h *host) decide(d vmm.Driver) (guests int, calm time.Duration) {
	calm = poolCalm
	if d.Needs().Flat {
		calm = flatCalm
	}
	if h.cfg.poolCalm != 0 {
		calm = h.cfg.poolCalm
	}
	switch {
	case h.cfg.Warm != WarmAuto:
		return h.cfg.Warm, calm
	case !d.Needs().Flat:
		return 0, calm
	}
	free := h.cfg.freeMem
	if free == nil {
		free = availableMemory
	}
	return int(min(int64(h.cfg.Capacity.Starts*warmPerStart), warmMost, free()/warmShare/warmGuest)), calm
}

// availableMemory is what programs can have of the host's memory before it swaps, in bytes;
// 0 if that is not known.
func availableMemory() int64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}

// thin ends the waiting guests that are out of date, and those that are too many.
func (k keeper) thin(bootKey string) error {
	for {
		old, why := k.pool.takeOut("replaced", nil, func(r Record) bool { return r.BootKey != bootKey }), "it is out of date"
		if old == nil && k.pool.size() > k.pool.wants() {
			old, why = k.pool.takeOut("given up", nil, func(Record) bool { return true }), "the host's memory is scarce"
		}
		if old == nil {
			return nil
		}
		err := k.release(old, Destroyed, why)
		old.unhold()
		if err != nil {
			return err
		}
	}
}

// refill ends the guests in the pool that are out of date, and makes one if there
// are too few.
func (k keeper) refill() (made bool, err error) {
	ctx, abort := context.WithCancelCause(k.life)
	defer abort(nil)
	defer k.pool.begin(abort)()
	ctx, cancel := context.WithTimeoutCause(ctx, k.cfg.BootTimeout,
		errdefs.Unavailable.Errorf("the guest was not ready within %s", k.cfg.BootTimeout))
	defer cancel()
	var req CreateRequest
	if err := req.check(); err != nil {
		return false, err
	}
	tmpl, err := k.cfg.Templates.Get(req.Template)
	if err == nil {
		req.VMM, err = k.choose(ctx, req, canRun(req, tmpl))
	}
	if err == nil {
		req.bootKey, err = k.bootKeyOf(ctx, req, tmpl)
	}
	if err != nil {
		return false, err
	}
	k.pool.want(k.decide(k.driverOf(Record{VMM: req.VMM})))
	if err := k.thin(req.bootKey); err != nil || k.pool.size() >= k.pool.wants() {
		return false, err
	}
	ready, err := k.cfg.Templates.Ready(ctx, tmpl.ID, tmpl.Build, req.bootKey)
	if errors.Is(err, errdefs.NotFound) || errors.Is(err, errdefs.Corrupt) {
		return false, nil // the first create makes it, and wakes us
	}
	if err != nil {
		return false, err
	}
	src := k.fromBootSnapshot(req.bootKey, ready)
	src.tell, src.boot = tellNothing, nil
	if err := k.addWaiting(ctx, req, tmpl, src, abort); err != nil {
		return false, errdefs.DiskFull(err)
	}
	return true, nil
}

// addWaiting restores a guest and puts it into the pool.
func (k keeper) addWaiting(
	ctx context.Context, req CreateRequest, tmpl template.Template, src source, abort context.CancelCauseFunc,
) error {
	ctx, took := withPhases(ctx)
	end := phase(ctx, "reserve")
	b, err := k.reserve(ctx, req, tmpl, abort)
	if err != nil {
		return err
	}
	defer b.unhold()
	end()
	if _, err = k.start(ctx, b, tmpl, src); err == nil {
		ctx, cancel := b.while(ctx)
		defer cancel()
		err = k.pool.put(ctx, b)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		_ = k.release(b, CreateFailed, err.Error()) // the janitor tries again
		return err
	}
	k.log.Info("a guest waits for its sandbox", append([]any{"sandbox", b.id}, took.attrs()...)...)
	return nil
}
