package network

import (
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Slot is an index into the address plan, 1 to MaxSlot. The zero value is no
// slot.
type Slot int

// MaxSlot is the highest slot: a /16 holds one /31 for each.
const MaxSlot Slot = 32767

// Valid says whether s is in the plan.
func (s Slot) Valid() bool { return s >= 1 && s <= MaxSlot }

// The guest's side, the same in every slot, so that one snapshot fits all.
const (
	// GuestMAC is the hardware address of the guest's eth0; frames with any
	// other source do not pass the tap.
	GuestMAC = "02:FC:00:00:00:05"
	// TapMAC is the hardware address of the tap, which a guest that goes on in
	// another slot still knows as its gateway's.
	TapMAC = "02:FC:00:00:00:06"
	// Tap is the name of the tap in each namespace.
	Tap = "tap0"
	// PacketEnd is the name of the other end of the tap in namespaces whose tap is one end
	// of a veth pair: for a VMM that exchanges frames through a packet socket.
	PacketEnd = "gv0"
	// peerName is the name of the veth pair's end in each namespace.
	peerName = "veth0"
)

var (
	// GuestAddr is the address of the guest's eth0, with its prefix length.
	GuestAddr = netip.MustParsePrefix("169.254.0.21/30")
	// GuestGateway is the tap's address, the guest's default gateway.
	GuestGateway = netip.MustParseAddr("169.254.0.22")
)

const netnsDir = "/run/netns"

// Plan says which names and addresses are ours on this host. Agents that share
// a host differ in all three.
type Plan struct {
	// Instance is the prefix of every name of ours: "wrenn", or "wrenn" and
	// four hex digits. At most 9 bytes, because a link's name has only 15.
	Instance string
	// Hosts is the IPv4 /16 of the addresses by which the host sees the
	// sandboxes: slot i has base + i.
	Hosts netip.Prefix
	// Veths is the IPv4 /16 of the links between host and namespaces: slot i
	// has a /31, the host's end base + 2i, the namespace's base + 2i + 1.
	Veths netip.Prefix
}

// DefaultPlan is the plan of a host with one agent.
func DefaultPlan() Plan {
	return Plan{
		Instance: "wrenn",
		Hosts:    netip.MustParsePrefix("10.11.0.0/16"),
		Veths:    netip.MustParsePrefix("10.12.0.0/16"),
	}
}

// Addrs are the names and addresses of one slot.
type Addrs struct {
	// NetNS is the namespace's name, as in "ip netns exec NAME".
	NetNS string
	// NetNSPath is the file that enters the namespace.
	NetNSPath string
	// Veth is the name of the veth pair's end on the host.
	Veth string
	// HostVeth and NSVeth are the addresses of the pair's ends, a /31.
	HostVeth, NSVeth netip.Prefix
	// HostIP is the sandbox's address as the host sees it.
	HostIP netip.Addr
}

var instanceRE = regexp.MustCompile(`^[a-z][a-z0-9]{0,8}$`)

// reserved are ranges that mean something else on every host or guest.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
}

// Validate reports every problem of the plan at once, as InvalidArgument.
func (p Plan) Validate() error {
	var errs []error
	if !instanceRE.MatchString(p.Instance) {
		errs = append(errs, errdefs.InvalidArgument.Errorf("instance name %q: want 1 to 9 of a-z and 0-9, a letter first", p.Instance))
	}
	check := func(what string, r netip.Prefix) bool {
		switch {
		case !r.IsValid() || !r.Addr().Is4() || r.Bits() != 16:
			errs = append(errs, errdefs.InvalidArgument.Errorf("%s range %s: want an IPv4 /16", what, r))
			return false
		case r != r.Masked():
			errs = append(errs, errdefs.InvalidArgument.Errorf("%s range %s: host bits are set, %s is meant", what, r, r.Masked()))
			return false
		}
		for _, bad := range reserved {
			if bad.Overlaps(r) {
				errs = append(errs, errdefs.InvalidArgument.Errorf("%s range %s: overlaps %s, which is reserved", what, r, bad))
				return false
			}
		}
		return true
	}
	hosts, veths := check("host address", p.Hosts), check("link address", p.Veths)
	if hosts && veths && p.Hosts.Overlaps(p.Veths) {
		errs = append(errs, errdefs.InvalidArgument.Errorf("host address range %s and link address range %s overlap", p.Hosts, p.Veths))
	}
	return errors.Join(errs...)
}

// Addrs returns the names and addresses of s. It is pure arithmetic and
// panics on a slot or a plan that is not valid.
func (p Plan) Addrs(s Slot) Addrs {
	if !s.Valid() {
		panic("network: slot " + strconv.Itoa(int(s)) + " is not in the plan")
	}
	name := p.slotName(s)
	return Addrs{
		NetNS:     name,
		NetNSPath: filepath.Join(netnsDir, name),
		Veth:      name,
		HostVeth:  netip.PrefixFrom(offset(p.Veths, 2*uint32(s)), 31),
		NSVeth:    netip.PrefixFrom(offset(p.Veths, 2*uint32(s)+1), 31),
		HostIP:    offset(p.Hosts, uint32(s)),
	}
}

func (p Plan) slotName(s Slot) string { return p.Instance + "-" + strconv.Itoa(int(s)) }

// slotOf is the inverse of slotName: names that only look alike are not ours.
func (p Plan) slotOf(name string) (Slot, bool) {
	digits, ok := strings.CutPrefix(name, p.Instance+"-")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(digits)
	s := Slot(i)
	return s, err == nil && s.Valid() && p.slotName(s) == name
}

func offset(p netip.Prefix, n uint32) netip.Addr {
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(b)
}

func sortedSlots(m map[Slot]bool) []Slot { return slices.Sorted(maps.Keys(m)) }
