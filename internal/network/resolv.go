package network

import (
	"net/netip"
	"os"
	"strings"
)

// Resolvers returns the name servers for guests: the host's, or others if it
// has none that a guest can use.
func Resolvers() []netip.Addr {
	if found := HostResolvers(); len(found) > 0 {
		return found
	}
	return FallbackResolvers()
}

// FallbackResolvers are public ones, of two providers.
func FallbackResolvers() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")}
}

// HostResolvers returns the name servers of the host that a guest can use, in
// the order of preference: those of the host's resolv.conf that are not the
// host's loopback, or else those that the stub resolvers there
// (systemd-resolved's, NetworkManager's) forward to. Guests speak IPv4 only, so
// the others are left out. Empty if there are none.
func HostResolvers() []netip.Addr { return resolvers(os.ReadFile, resolvPaths...) }

var resolvPaths = []string{
	"/etc/resolv.conf",
	"/run/systemd/resolve/resolv.conf",
	"/run/NetworkManager/no-stub-resolv.conf",
}

// resolvers returns the usable servers of the first file that names any.
func resolvers(read func(string) ([]byte, error), paths ...string) []netip.Addr {
	for _, path := range paths {
		b, err := read(path)
		if err != nil {
			continue
		}
		var found []netip.Addr
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "nameserver" {
				continue
			}
			a, err := netip.ParseAddr(f[1])
			if err != nil {
				continue
			}
			a = a.Unmap()
			if !ReachableResolver(a) {
				continue
			}
			found = append(found, a)
		}
		if len(found) > 0 {
			return found
		}
	}
	return nil
}

// ReachableResolver says whether a guest can reach a name server of this
// address, if the policy lets it.
func ReachableResolver(a netip.Addr) bool {
	return a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsLinkLocalUnicast() && !a.IsMulticast()
}
