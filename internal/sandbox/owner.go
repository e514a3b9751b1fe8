package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

var ownerKeyPattern = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,255}$`)

// owner is what an owner key belongs to: each project has its own.
type owner struct{ project, key string }

func (l Labels) owner() owner { return owner{l.Project, l.OwnerKey} }

// owners lets one create at a time go on for each owner key. It is safe for concurrent
// use.
type owners struct {
	mu   sync.Mutex
	busy map[owner]chan struct{} // closed when the create ends
}

func newOwners() *owners { return &owners{busy: map[owner]chan struct{}{}} }

// hold waits, within ctx, until no other create goes on for the key; done lets the next
// go on.
func (o *owners) hold(ctx context.Context, of owner) (done func(), err error) {
	for {
		free, wait := o.tryHold(of)
		if free != nil {
			return free, nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, errdefs.Busy.Errorf("a sandbox with the owner_key %s is being created", of.key)
		}
	}
}

func (o *owners) tryHold(of owner) (done func(), wait <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if wait, busy := o.busy[of]; busy {
		return nil, wait
	}
	ended := make(chan struct{})
	o.busy[of] = ended
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.busy, of)
		close(ended)
	}, nil
}

// createOwned is Create with an owner key: the sandbox that the same request made
// before, or a new one. The record says what the key belongs to, from the moment at
// which the sandbox runs until it is forgotten.
func (m *Manager) createOwned(ctx context.Context, req CreateRequest) (Created, error) {
	of := req.Labels.owner()
	if !ownerKeyPattern.MatchString(of.key) {
		return Created{}, errdefs.InvalidArgument.Errorf("owner_key %.40q is not 1 to 255 of A-Z, a-z, 0-9, '_', '.', '-'", of.key)
	}
	done, err := m.owners.hold(ctx, of)
	if err != nil {
		return Created{}, err
	}
	defer done()
	if req.digest, err = req.sum(); err != nil {
		return Created{}, err
	}
	b := m.ownedBy(of)
	if b == nil {
		return m.createNew(ctx, req)
	}
	switch rec := b.record(); {
	case rec.State == Unknown:
		return Created{}, errdefs.Unavailable.Errorf("owner_key %s belongs to sandbox %s, which is unknown: %s", of.key, b.id, rec.Reason)
	case rec.RequestDigest != req.digest:
		return Created{}, errdefs.AlreadyExists.Errorf("owner_key %s belongs to sandbox %s, which another request made", of.key, b.id)
	}
	return Created{Info: b.info()}, nil
}

// sum is a digest of what the request asks for. A field that later versions add leaves
// it as it is while it is not set.
func (r CreateRequest) sum() (string, error) {
	r.EndAt = asEnd(r.EndAt)
	data, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("digest request: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

// ownedBy returns the sandbox that an owner key belongs to; nil if there is none. It
// reads the records: there is no index that could differ from them.
func (r *registry) ownedBy(of owner) *box {
	for _, b := range r.all() {
		labels, state := b.ownership()
		if state == Unknown { // the events know more than its record
			last, _ := r.events.lastOf(b.id)
			labels = last.Labels
		}
		if labels.owner() == of {
			return b
		}
	}
	return nil
}

// ownership returns the labels that the sandbox has an owner key by: none if it does
// not run yet, or never did.
func (b *box) ownership() (Labels, State) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := &b.mu.rec
	if rec.State.hidden() || rec.State == Creating || rec.Reason == CreateFailed {
		return Labels{}, rec.State
	}
	return rec.Labels, rec.State
}
