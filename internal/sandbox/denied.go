package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

const (
	// deniedEvery is how often what policies refused is looked at.
	deniedEvery = 10 * time.Second
	// deniedPause is how long a name or address that was refused is not told again.
	deniedPause = time.Minute
	// deniedBurst bounds the events of what one sandbox was refused, which are this many
	// at once and one in a deniedPause: it may not push others out of the log.
	deniedBurst = 10
)

// Denied returns what the network policy refused a sandbox of late, the newest first;
// nothing while it has no network. It never waits for an operation.
func (m *Manager) Denied(ctx context.Context, id ID) ([]network.Denial, error) {
	b, err := m.find(id)
	if err != nil {
		return nil, err
	}
	denied, err := m.denied(ctx, b)
	if err != nil {
		return nil, fmt.Errorf("what sandbox %s was refused: %w", id, err)
	}
	return denied, nil
}

func (m *Manager) denied(ctx context.Context, b *box) ([]network.Denial, error) {
	rec := b.record()
	if !hasNetwork(rec) {
		return nil, nil
	}
	policy, err := m.policy(rec.Network)
	if err != nil {
		policy = network.Policy{Mode: network.None} // see policyInForce
	}
	denied, err := m.cfg.Network.Denied(ctx, rec.Slot, policy)
	// The slot may have become another sandbox's since.
	if now := b.record(); errors.Is(err, errdefs.NotFound) || !hasNetwork(now) || now.Slot != rec.Slot {
		return nil, nil
	}
	return denied, err
}

func hasNetwork(rec Record) bool {
	return rec.Slot != 0 && (rec.State == Running || rec.State == Paused)
}

// teller puts what network policies refuse into the events.
type teller struct {
	*Manager
	began time.Time
	// told is of each sandbox that was refused something.
	told map[ID]*told
}

// told is what has been told of a sandbox.
type told struct {
	// until is the time of the newest denial that was looked at.
	until time.Time
	// last is when each name or address was told.
	last map[string]time.Time
	// left is how many events may be told at once, as of at.
	left float64
	at   time.Time
}

func newTeller(m *Manager) *teller {
	return &teller{Manager: m, began: time.Now(), told: map[ID]*told{}}
}

// run does so until the manager's life ends.
func (t *teller) run() {
	tick := time.NewTicker(deniedEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.tellAll(time.Now())
		case <-t.life.Done():
			return
		}
	}
}

func (t *teller) tellAll(now time.Time) {
	there := map[ID]bool{}
	for _, b := range t.all() {
		if b.hidden() || t.life.Err() != nil {
			continue
		}
		there[b.id] = true
		denied, err := t.denied(t.life, b)
		if err != nil {
			t.log.Debug("what a sandbox was refused is not known", "sandbox", b.id, "err", err)
		}
		for _, d := range t.news(b.id, denied, now) {
			state := b.state()
			t.tell(b, Event{Time: now.UTC(), Kind: EgressDenied, From: state, To: state, Detail: detailOf(d)})
		}
	}
	for id := range t.told {
		if !there[id] {
			delete(t.told, id)
		}
	}
}

// news are the denials to tell of a sandbox, the oldest first; denied has the newest
// first.
func (t *teller) news(id ID, denied []network.Denial, now time.Time) (news []network.Denial) {
	if len(denied) == 0 {
		return nil
	}
	of := t.told[id]
	if of == nil {
		of = &told{until: t.began, last: map[string]time.Time{}, left: deniedBurst, at: now}
		t.told[id] = of
	}
	of.left = min(deniedBurst, of.left+float64(now.Sub(of.at))/float64(deniedPause))
	of.at = now
	for what, at := range of.last {
		if now.Sub(at) >= deniedPause {
			delete(of.last, what)
		}
	}
	until := of.until
	for i := len(denied) - 1; i >= 0; i-- {
		d := denied[i]
		if !d.Time.After(until) {
			continue
		}
		of.until = d.Time
		what := targetOf(d)
		if _, again := of.last[what]; again || of.left < 1 {
			continue
		}
		of.left--
		of.last[what] = now
		news = append(news, d)
	}
	return news
}

// targetOf is what a guest wanted: a name, or else an address.
func targetOf(d network.Denial) string {
	if d.Name != "" {
		return d.Name
	}
	return d.Addr.Addr().String()
}

// detailOf says in a line what was refused and why.
func detailOf(d network.Denial) string {
	what := targetOf(d)
	if d.Addr != (netip.AddrPort{}) && d.Addr.Port() != 0 {
		what = fmt.Sprintf("%s port %d", what, d.Addr.Port())
	}
	return d.Kind + " " + what + ": " + d.Rule
}
