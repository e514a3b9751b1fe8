package envd

import (
	"fmt"
	"net/netip"
	"strings"
)

// BootParams is what the kernel's command line tells the guest about itself.
type BootParams struct {
	// Addr is eth0's address with its prefix; invalid for a guest without
	// network.
	Addr     netip.Prefix
	Gateway  netip.Addr
	DNS      []netip.Addr
	Hostname string

	// Base and Overlay are the names of the block devices that make the root
	// filesystem, without /dev.
	Base    string
	Overlay string

	// Probe asks the guest to say that it came up, and to power off.
	Probe bool
}

// ParseCmdline reads the wrenn.* keys of a kernel command line. Other keys,
// and keys of ours that it does not know, are passed over: an older envd must
// boot under a newer host. A value that cannot be used is an error.
func ParseCmdline(cmdline string) (BootParams, error) {
	p := BootParams{Base: "vda", Overlay: "vdb", Hostname: "sandbox"}
	for word := range strings.FieldsSeq(cmdline) {
		key, value, _ := strings.Cut(word, "=")
		name, ours := strings.CutPrefix(key, "wrenn.")
		if !ours {
			continue
		}
		if err := p.set(name, value); err != nil {
			return BootParams{}, fmt.Errorf("parse %s: %w", key, err)
		}
	}
	return p, nil
}

func (p *BootParams) set(name, value string) (err error) {
	switch name {
	case "ip":
		p.Addr, err = netip.ParsePrefix(value)
	case "gw":
		p.Gateway, err = netip.ParseAddr(value)
	case "dns":
		p.DNS = nil
		for s := range strings.SplitSeq(value, ",") {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return err
			}
			p.DNS = append(p.DNS, addr.WithZone(""))
		}
	case "hostname":
		if !validHostname(value) {
			return fmt.Errorf("invalid host name %q", value)
		}
		p.Hostname = value
	case "base":
		p.Base, err = deviceName(value)
	case "overlay":
		p.Overlay, err = deviceName(value)
	case "probe":
		p.Probe = value == "1"
	}
	return err
}

// deviceName refuses whatever could lead out of /dev.
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

// validHostname accepts labels of letters, digits and hyphens, as a resolver
// does, within the kernel's 64 bytes.
func validHostname(s string) bool {
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
