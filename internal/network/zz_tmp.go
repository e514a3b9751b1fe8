package network

import "context"

type Limits struct {
	InBytes, OutBytes, InPackets, OutPackets int64
	Connections                              int
}

func (l Limits) Validate() error                                         { return nil }
func (n *Network) SetLimits(ctx context.Context, s Slot, l Limits) error { return nil }
func (n *Network) CheckAll(ctx context.Context, slots []Slot) (map[Slot]error, error) {
	return nil, nil
}
func (n *Network) Repair(ctx context.Context, s Slot) error                   { return nil }
func (n *Network) CountersAll(ctx context.Context) (map[Slot]Counters, error) { return nil, nil }
func (n *Network) ParsePolicy(allowInternet *bool, allow, deny []string) (Policy, error) {
	return Policy{}, nil
}
