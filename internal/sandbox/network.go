package sandbox

import (
	"context"
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/undo"
)

// Policy is what a sandbox may reach and how much of it, as its user said it. What
// it comes to depends on the host's own policy, too, so it is worked out anew by
// each agent. The zero value is the host's policy.
type Policy struct {
	Egress
	Limits network.Limits `json:"limits,omitzero"`
}

// Egress is what a sandbox may reach.
type Egress = network.Egress

// Ingress is how the servers in a sandbox are reached.
type Ingress struct {
	// Public is true if nil. False demands the traffic token of callers of all ports
	// except the guest daemon's.
	Public *bool `json:"public,omitzero"`
	// MaskHost is the Host that servers see, ${PORT} in it the port; if it is empty, the
	// caller's own.
	MaskHost string `json:"maskHost,omitzero"`
}

// NetworkLimits bound what passes between a sandbox and the host.
type NetworkLimits = network.Limits

// IsZero says whether the host's policy is all that counts.
func (p Policy) IsZero() bool { return p.Egress.IsZero() && p.Limits == network.Limits{} }

func (p Policy) clone() Policy {
	p.Egress = p.Egress.Clone()
	return p
}

func (i Ingress) clone() Ingress {
	if i.Public != nil {
		public := *i.Public
		i.Public = &public
	}
	return i
}

// newTrafficToken returns what callers of the ports show; empty if they are public.
func (i Ingress) newTrafficToken() string {
	if i.Public == nil || *i.Public {
		return ""
	}
	return newToken()
}

// policy is what a policy comes to on this host; errors are InvalidArgument.
func (h *host) policy(p Policy) (network.Policy, error) {
	policy, err := h.cfg.Network.ParsePolicy(p.Egress)
	return policy, errors.Join(err, p.Limits.Validate())
}

// errNames is in the words that clients know.
var errNames = errdefs.InvalidArgument.Errorf("When specifying allowed domains in allow out, " +
	"you must include 'ALL_TRAFFIC' in deny out to block all other traffic.")

// checkPolicy is of a policy that a caller asks for. Where the internet is open, a name
// that is allowed changes nothing: earlier agents took that, and their records have it.
func (h *host) checkPolicy(p Policy) error {
	policy, err := h.policy(p)
	if err == nil && len(policy.AllowNames) > 0 && policy.Mode != network.None {
		return errNames
	}
	return err
}

// openNetwork opens a record's slot, so that the guest finds what it may reach
// in force.
func (h *host) openNetwork(ctx context.Context, rec Record) error {
	if err := h.cfg.Network.Open(ctx, rec.Slot); err != nil {
		return fmt.Errorf("open network: %w", err)
	}
	if h.hasHostPolicy(rec) {
		return nil // as every new slot
	}
	return h.setNetwork(ctx, rec)
}

// hasHostPolicy says whether what a record says of the network changes nothing.
func (h *host) hasHostPolicy(rec Record) bool {
	return rec.Network.Limits == network.Limits{} && h.policyInForce(rec).IsZero()
}

// setNetwork gives an open slot what its record says. Called with the op lock
// held.
func (h *host) setNetwork(ctx context.Context, rec Record) error {
	// The policy comes last: what it opens is open only if all went well.
	err := h.cfg.Network.SetLimits(ctx, rec.Slot, rec.Network.Limits)
	if err == nil {
		err = h.cfg.Network.SetPolicy(ctx, rec.Slot, h.policyInForce(rec))
	}
	if err != nil {
		return fmt.Errorf("set what it may reach: %w", err)
	}
	return nil
}

// policyInForce is what a record's policy comes to. It was good once; if it is not
// now, the host has been given a stricter one.
func (h *host) policyInForce(rec Record) network.Policy {
	policy, err := h.policy(rec.Network)
	if err != nil {
		h.log.Warn("the host does not let the sandbox have its network policy any more, it reaches nothing", "sandbox", rec.ID, "err", err)
		return network.Policy{Mode: network.None}
	}
	return policy
}

// UpdateNetwork replaces all of what a sandbox may reach, and its limits unless they
// are nil. The network tightens before it loosens; where only part of the change
// could be made, the stricter rules stand, and the record says again what it said
// before.
func (m *Manager) UpdateNetwork(ctx context.Context, id ID, e Egress, limits *NetworkLimits) error {
	next := Policy{Egress: e.Clone()}
	if limits != nil {
		next.Limits = *limits
	}
	if err := m.checkPolicy(next); err != nil {
		return err
	}
	b, ctx, end, err := m.begin(ctx, id, OpNetwork, "given another network policy")
	if err != nil {
		return err
	}
	defer end()
	// The record comes first: if this agent dies in between, the next one does
	// what no caller was told has failed.
	was := b.record().Network
	if limits == nil {
		next.Limits = was.Limits
	}
	if err := m.save(b, func(r *Record) { r.Network = next }); err != nil {
		return err
	}
	if rec := b.record(); rec.Slot != 0 { // or else it hibernates, and gets it when it wakes
		if err := m.setNetwork(ctx, rec); err != nil {
			if cause := context.Cause(b.op.alive); cause != nil {
				err = cause
			}
			back, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
			defer cancel()
			if berr := errors.Join(
				m.save(b, func(r *Record) { r.Network = was }),
				m.cfg.Network.SetLimits(back, rec.Slot, was.Limits),
			); berr != nil {
				m.log.Error("network policy not taken back", "sandbox", id, "err", berr)
			}
			return fmt.Errorf("update network of sandbox %s: %w", id, err)
		}
	}
	// Twice: the record before the last must not allow more than this one does.
	if err := m.rewrite(b); err != nil {
		m.log.Warn("record not written twice", "sandbox", id, "err", err)
	}
	m.note(b, Updated, ActorOf(ctx))
	m.log.Info("network policy changed", "sandbox", id)
	return nil
}

// Traffic returns what has passed between each sandbox that has a network and
// the host.
func (m *Manager) Traffic(ctx context.Context) (map[ID]network.Counters, error) {
	counters, err := m.cfg.Network.CountersAll(ctx)
	if err != nil {
		return nil, fmt.Errorf("count traffic: %w", err)
	}
	traffic := map[ID]network.Counters{}
	for _, b := range m.all() {
		if rec := b.record(); rec.Slot != 0 {
			if c, ok := counters[rec.Slot]; ok {
				traffic[b.id] = c
			}
		}
	}
	return traffic, nil
}
