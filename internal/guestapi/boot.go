package guestapi

import (
	"fmt"
	"net/netip"
	"strings"
)

// ProbeSign is the line that a probe guest prints on its console when it has
// reached its user space.
const ProbeSign = "wrenn-probe-ok"

// Keys of the kernel command line.
const (
	keyPrefix   = "wrenn."
	keyAddr     = "ip"
	keyGateway  = "gw"
	keyHostname = "hostname"
	keyDNS      = "dns"
	keyBase     = "base"
	keyOverlay  = "overlay"
	keyProbe    = "probe"
)

// Boot holds the facts that a guest needs before the host can reach it.
type Boot struct {
	// Addr is the guest's address with its prefix; invalid for a guest without
	// network. Gateway is its way out.
	Addr     netip.Prefix
	Gateway  netip.Addr
	DNS      []netip.Addr
	Hostname string
	// Probe asks the guest to print ProbeSign and to power off.
	Probe bool
}

// MaxLayers bounds Disks.Layers.
const MaxLayers = 16

// Disks are the names of the block devices that make the root file system,
// without /dev.
type Disks struct {
	// Layers are read-only, lowest first. The lowest one is a whole root file system, the
	// others have their tree in UpperDir.
	Layers []string
	// Overlay takes what the guest writes, in UpperDir.
	Overlay string
}

// UpperDir is the directory of an overlay's disk that holds the tree.
const UpperDir = "/upper"

// Cmdline renders facts and disks as the guest's part of a kernel command line.
// Fields that are not set are left out.
func Cmdline(b Boot, d Disks) string {
	var words []string
	add := func(key, value string) {
		if value != "" {
			words = append(words, keyPrefix+key+"="+value)
		}
	}
	if b.Addr.IsValid() {
		add(keyAddr, b.Addr.String())
	}
	if b.Gateway.IsValid() {
		add(keyGateway, b.Gateway.String())
	}
	add(keyHostname, b.Hostname)
	servers := make([]string, len(b.DNS))
	for i, addr := range b.DNS {
		servers[i] = addr.String()
	}
	add(keyDNS, strings.Join(servers, ","))
	// A guest that knows one layer alone refuses several names, which is right.
	add(keyBase, strings.Join(d.Layers, ","))
	add(keyOverlay, d.Overlay)
	if b.Probe {
		add(keyProbe, "1")
	}
	// The kernel puts this into envd's environment. envd's goroutines need no
	// preemption, and the signals for it are dear in an emulated guest.
	words = append(words, "GODEBUG=asyncpreemptoff=1")
	return strings.Join(words, " ")
}

// IsFact says whether a word is one of Cmdline's. A Linux kernel passes no such word to
// its init as an argument.
func IsFact(word string) bool { return strings.HasPrefix(word, keyPrefix) }

// ParseCmdline reads the guest's keys of a kernel command line. It passes over
// other keys, and over keys of ours that it does not know: an older envd must
// boot under a newer host. A value that cannot be used is an error. A line
// without disks means vda and vdb, one without a host name "sandbox".
func ParseCmdline(cmdline string) (Boot, Disks, error) {
	b, d := Boot{Hostname: "sandbox"}, Disks{Layers: []string{"vda"}, Overlay: "vdb"}
	for word := range strings.FieldsSeq(cmdline) {
		key, value, _ := strings.Cut(word, "=")
		name, ours := strings.CutPrefix(key, keyPrefix)
		if !ours {
			continue
		}
		if err := set(&b, &d, name, value); err != nil {
			return Boot{}, Disks{}, fmt.Errorf("parse %s: %w", key, err)
		}
	}
	return b, d, nil
}

func set(b *Boot, d *Disks, name, value string) (err error) {
	switch name {
	case keyAddr:
		b.Addr, err = netip.ParsePrefix(value)
	case keyGateway:
		b.Gateway, err = netip.ParseAddr(value)
	case keyDNS:
		b.DNS = nil
		for s := range strings.SplitSeq(value, ",") {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return err
			}
			b.DNS = append(b.DNS, addr.WithZone(""))
		}
	case keyHostname:
		if !ValidHostname(value) {
			return fmt.Errorf("invalid host name %q", value)
		}
		b.Hostname = value
	case keyBase:
		d.Layers, err = deviceNames(value)
	case keyOverlay:
		d.Overlay, err = deviceName(value)
	case keyProbe:
		b.Probe = value == "1"
	}
	return err
}

// deviceNames reads names that commas separate.
func deviceNames(s string) ([]string, error) {
	names := strings.Split(s, ",")
	if len(names) > MaxLayers {
		return nil, fmt.Errorf("%d devices: want at most %d", len(names), MaxLayers)
	}
	for _, name := range names {
		if _, err := deviceName(name); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// deviceName refuses a name that could lead out of /dev.
func deviceName(s string) (string, error) {
	if s == "" || len(s) > 32 {
		return "", fmt.Errorf("invalid device name %q", s)
	}
	for _, c := range []byte(s) {
		if !isAlnum(c) {
			return "", fmt.Errorf("invalid device name %q", s)
		}
	}
	return s, nil
}

// ValidHostname accepts labels of letters, digits and hyphens, as a resolver
// does, within the kernel's 64 bytes.
func ValidHostname(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !isAlnum(c) && c != '-' {
				return false
			}
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}
