package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// rangesRecord is Options.RangesFile.
type rangesRecord struct {
	Hosts netip.Prefix `json:"host_range"`
	Links netip.Prefix `json:"link_range"`
}

// candidates are the pairs of ranges to choose from, the default one first:
// neighbours in 10.0.0.0/8, and then in 172.16.0.0/12, for hosts whose own
// network is the first.
func candidates() (pairs []rangesRecord) {
	slash16 := func(a, b byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{a, b}), 16) }
	for b := byte(11); b < 254; b += 2 {
		pairs = append(pairs, rangesRecord{slash16(10, b), slash16(10, b+1)})
	}
	for b := byte(16); b < 32; b += 2 {
		pairs = append(pairs, rangesRecord{slash16(172, b), slash16(172, b+1)})
	}
	return pairs
}

// ReadRanges fills in the ranges that an agent with this file used last, where
// the plan has none. No file is no error.
func (p Plan) ReadRanges(file string) (Plan, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, fmt.Errorf("read address ranges: %w", err)
	}
	var r rangesRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return p, errdefs.Corrupt.Errorf("the record of the address ranges (network.json in the state directory) cannot be read: %v; "+
			"name them with --host-range and --link-range, as \"ip route\" shows them", err)
	}
	fill(&p.Hosts, r.Hosts)
	fill(&p.Veths, r.Links)
	return p, nil
}

// reserve settles the plan and takes its ranges on this host: those that it
// names, or else those that RangesFile has, or else the first that are free.
// What is taken is recorded. Ranges are taken by a route in the kernel; a lock
// on the network namespace keeps agents that start at once from choosing alike.
func (n *Network) reserve(ctx context.Context, h *netlink.Handle) error {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open the host's network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Flock(int(ns.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock the host's network namespace: %w", err)
	}
	plan, err := n.settle(ctx, h)
	if err != nil {
		return err
	}
	if n.plan != plan {
		n.plan = plan
	}
	for _, r := range n.rangeRoutes() {
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("add unreachable route %s: %w", r.Dst, err)
		}
	}
	if err := n.dropOldRanges(h); err != nil {
		return err
	}
	return n.recordRanges()
}

// dropOldRanges gives back what an agent of this instance had taken before it
// was given other ranges, and did not come to give back itself.
func (n *Network) dropOldRanges(h *netlink.Handle) error {
	routes, err := listed(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		dst, ok := prefixOf(r.Dst)
		if !ok || r.Type != unix.RTN_UNREACHABLE || r.Priority != n.routeMetric() || dst == n.plan.Hosts || dst == n.plan.Veths {
			continue
		}
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove unreachable route %s: %w", dst, err)
		}
	}
	return nil
}

// settle returns the plan with both ranges.
func (n *Network) settle(ctx context.Context, h *netlink.Handle) (Plan, error) {
	recorded := Plan{Instance: n.plan.Instance}
	if n.opts.RangesFile != "" {
		var err error
		if recorded, err = recorded.ReadRanges(n.opts.RangesFile); err != nil && n.plan.Validate() != nil {
			return Plan{}, err // and there is no other way to know
		}
	}
	plan := n.plan
	fill(&plan.Hosts, recorded.Hosts)
	fill(&plan.Veths, recorded.Veths)
	inUse, err := n.Strays(ctx)
	if err != nil {
		return Plan{}, err
	}
	if len(inUse) > 0 && recorded.Validate() == nil && plan != recorded {
		return Plan{}, errdefs.InvalidArgument.Errorf("the networks of %d sandboxes are in the ranges %s and %s: "+
			"leave --host-range and --link-range out until they have ended", len(inUse), recorded.Hosts, recorded.Veths)
	}
	if plan.Validate() == nil {
		err := n.checkRoutes(h, plan)
		// Ranges that a flag names, or that sandboxes use, are not others.
		if err == nil || n.plan.Validate() == nil {
			return plan, err
		}
		if len(inUse) > 0 {
			return Plan{}, fmt.Errorf("%w, or end what has that route: %d sandboxes of this agent use the range and run on", err, len(inUse))
		}
	}
	var last error
	for _, c := range candidates() {
		plan := n.plan
		fill(&plan.Hosts, c.Hosts)
		fill(&plan.Veths, c.Links)
		if plan.Validate() != nil || plan.coversAny(n.opts.Resolvers) {
			continue
		}
		if last = n.checkRoutes(h, plan); last == nil {
			return plan, nil
		}
	}
	full := errdefs.Exhausted.Errorf("no address ranges are free on this host: name two with --host-range and --link-range")
	return Plan{}, errors.Join(n.plan.ValidateGiven(), full, last)
}

func (p Plan) coversAny(addrs []netip.Addr) bool {
	for _, a := range addrs {
		if p.Hosts.Contains(a) || p.Veths.Contains(a) {
			return true
		}
	}
	return false
}

// ValidateGiven is Validate for a plan of which Setup may still choose what is
// not there.
func (p Plan) ValidateGiven() error {
	for _, c := range candidates()[:3] {
		if !(c.Hosts.Overlaps(p.Veths) || c.Links.Overlaps(p.Hosts)) {
			fill(&p.Hosts, c.Hosts)
			fill(&p.Veths, c.Links)
			break
		}
	}
	return p.Validate()
}

// recordRanges writes what is used, unless it is written.
func (n *Network) recordRanges() error {
	file := n.opts.RangesFile
	if file == "" {
		return nil
	}
	if was, err := (Plan{Instance: n.plan.Instance}).ReadRanges(file); err == nil && was == n.plan {
		return nil
	}
	b, err := json.Marshal(rangesRecord{n.plan.Hosts, n.plan.Veths})
	if err != nil {
		return fmt.Errorf("record address ranges: %w", err)
	}
	if err := atomicfile.Write(file, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("record address ranges: %w", err)
	}
	return nil
}
