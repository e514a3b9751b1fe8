package guest

import (
	"net/netip"
	"strings"
)

// Boot is what a guest must know before anybody can talk to it.
type Boot struct {
	// Addr is its own address and prefix, Gateway its way out.
	Addr     netip.Prefix
	Gateway  netip.Addr
	DNS      []netip.Addr
	Hostname string
}

// Cmdline renders the guest's part of the kernel command line: envd's keys.
// Fields that are not set are left out.
func Cmdline(b Boot) string {
	var words []string
	add := func(key, value string) { words = append(words, "wrenn."+key+"="+value) }
	if b.Addr.IsValid() {
		add("ip", b.Addr.String())
	}
	if b.Gateway.IsValid() {
		add("gw", b.Gateway.String())
	}
	if b.Hostname != "" {
		add("hostname", b.Hostname)
	}
	if len(b.DNS) > 0 {
		var servers []string
		for _, addr := range b.DNS {
			servers = append(servers, addr.String())
		}
		add("dns", strings.Join(servers, ","))
	}
	add("base", "vda")
	add("overlay", "vdb")
	// The kernel puts this into envd's environment. Its goroutines need no
	// interruption; in an emulated guest, slow as that is, they are sent many.
	words = append(words, "GODEBUG=asyncpreemptoff=1")
	return strings.Join(words, " ")
}
