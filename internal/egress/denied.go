package egress

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxDenied bounds the denials that are kept of one sandbox. One that tries more
// different things loses the oldest.
const maxDenied = 64

// The kinds of what a policy refuses, beside the names of the IP protocols.
const (
	KindDNS  = "dns"  // a question
	KindHTTP = "http" // a request
	KindTLS  = "tls"  // a connection that shows a name
	KindTCP  = "tcp"  // another connection
	KindUDP  = "udp"  // datagrams
	KindIP   = "ip"   // packets of other protocols
)

// Denial is what a policy refused a sandbox, once or several times. All texts are
// printable and bounded.
type Denial struct {
	Time time.Time // the last time
	Kind string
	// Name is what the guest asked for; empty if it showed none.
	Name string
	// Addr is where the guest was going; zero for a question.
	Addr netip.AddrPort
	// Rule is the part of the policy that refused it.
	Rule  string
	Count uint64
}

func (d Denial) same(o Denial) bool {
	return d.Kind == o.Kind && d.Name == o.Name && d.Addr == o.Addr && d.Rule == o.Rule
}

// Denials keeps the last denials of one sandbox. The zero value is ready; nil keeps
// nothing. Safe for concurrent use.
type Denials struct {
	mu   sync.Mutex
	list []Denial // the newest last
}

// Add notes a denial. Its count is added to that of an equal one.
func (ds *Denials) Add(d Denial) {
	if ds == nil {
		return
	}
	d.Name, d.Rule = printable(d.Name), printable(d.Rule)
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if i := slices.IndexFunc(ds.list, d.same); i >= 0 {
		d.Count += ds.list[i].Count
		if ds.list[i].Time.After(d.Time) {
			d.Time = ds.list[i].Time
		}
		ds.list = slices.Delete(ds.list, i, i+1)
	} else if len(ds.list) >= maxDenied {
		ds.list = slices.Delete(ds.list, 0, 1)
	}
	ds.list = append(ds.list, d)
}

// List returns a copy, the newest first.
func (ds *Denials) List() []Denial {
	if ds == nil {
		return nil
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	list := slices.Clone(ds.list)
	slices.Reverse(list)
	slices.SortStableFunc(list, func(a, b Denial) int { return b.Time.Compare(a.Time) })
	return list
}

// printable is a guest's text for people to read: ASCII, and not longer than a name is.
func printable(s string) string {
	if len(s) > maxLogged {
		s = s[:maxLogged]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// refusal says why something that showed the name is refused. The rule is the part of
// the policy that refused it; it is empty where something else went wrong.
type refusal struct{ name, why, rule string }

func (r *refusal) Error() string { return r.why }

// sentence tells a person in the sandbox.
func (r *refusal) sentence() string {
	what := "this"
	if r.name != "" {
		what = printable(r.name)
	}
	return "The network policy of this sandbox does not let " + what + " through: " + printable(r.why) + ".\n"
}

// The rules in words.
const (
	ruleAllow    = "not in the allow list"
	ruleAddress  = "its addresses are not permitted"
	ruleNoName   = "no name is shown"
	ruleProtocol = "protocol"
)

// denies returns the rule that refuses a name, "" if none does.
func (r parsedPolicy) denies(name string) string {
	switch {
	case r.name(name):
		return ""
	case r.Open:
		return "deny list: " + r.deny.pattern(name)
	}
	return ruleAllow
}

// deny notes what the policy refused.
func (p *Proxy) deny(kind string, dst netip.AddrPort, r *refusal) {
	p.cfg.Shared.CountDenied(kind, 1)
	p.cfg.Denials.Add(Denial{Time: time.Now(), Kind: kind, Name: r.name, Addr: dst, Rule: r.rule, Count: 1})
}
