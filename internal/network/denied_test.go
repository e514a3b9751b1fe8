package network

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// What the rules refuse ends at once, and is told with the rule.
func TestDenied(t *testing.T) {
	w := worldWithNames(t, map[string]netip.Addr{"good.example": goodAddr})
	s, _, g := open(t, w.Network)
	denied := prefixes(evilAddr.String() + "/32")
	refuse := func(p Policy, network string, to netip.Addr, port uint16, rule string) {
		t.Helper()
		must(t, w.SetPolicy(t.Context(), s, p))
		for i := range 2 { // the second time after the first was taken from the kernel
			knock(t, g.ns, network, netip.AddrPortFrom(to, port))
			list, err := w.Denied(t.Context(), s, p)
			must(t, err)
			j := slices.IndexFunc(list, func(d Denial) bool { return d.Addr == netip.AddrPortFrom(to, port) && d.Kind == network })
			if j < 0 {
				t.Errorf("%s %s is not among %+v", network, to, list)
				continue
			}
			if d := list[j]; !strings.Contains(d.Rule, rule) || d.Count < uint64(i+1) || time.Since(d.Time) > time.Minute || d.Name != "" {
				t.Errorf("%s: %+v", to, d)
			}
		}
	}
	refuse(Policy{}, "tcp", privateAddr, 4444, "private")
	refuse(Policy{}, "udp", metadataAddr, 80, "never")
	refuse(Policy{}, "tcp", GuestGateway, 22, "never")
	refuse(Policy{Deny: denied}, "tcp", evilAddr, 443, "deny list: "+evilAddr.String())
	refuse(Policy{Mode: None}, "tcp", goodAddr, 443, "no internet")
	names := Policy{Mode: None, AllowNames: []string{"good.example"}}
	refuse(names, "udp", goodAddr, 443, "not in the allow list")
	if got := browse(t, g.ns, sinkAddr, 443, "evil.example"); got != "" {
		t.Errorf("heard %q", got)
	}
	list, err := w.Denied(t.Context(), s, names)
	must(t, err)
	if d := list[0]; d.Kind != egress.KindTLS || d.Name != "evil.example" {
		t.Errorf("the last is %+v", d)
	}
	if got := w.NameCounts().Denied; got[egress.KindTCP] < 8 || got[egress.KindUDP] < 2 || got[egress.KindTLS] != 1 {
		t.Errorf("counts %v", got)
	}
	// A policy that closes the way out of the names keeps what was refused.
	must(t, w.SetPolicy(t.Context(), s, Policy{}))
	if list, err := w.Denied(t.Context(), s, Policy{}); err != nil || len(list) < 7 {
		t.Errorf("after the policy went: %+v, %v", list, err)
	}
	if _, err := w.Denied(t.Context(), s+1, Policy{}); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("of a slot that is not open: %v", err)
	}
}

// knock asks where it is refused, which a TCP connection learns at once.
func knock(t *testing.T, ns netns.NsHandle, network string, to netip.AddrPort) {
	t.Helper()
	if network == "udp" {
		ask(t, ns, network, to.Addr(), to.Port(), silence)
		return
	}
	c, err := dialFrom(t, ns, to, timeout)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("%s: %v, want an error at once", to, err)
	}
}

// A guest that knocks everywhere takes no memory, and is refused everywhere.
func TestManyDenied(t *testing.T) {
	n := world(t, Options{})
	s, _, g := open(t, n)
	in(t, g.ns, func() {
		c, err := net.ListenUDP("udp4", nil)
		must(t, err)
		defer c.Close()
		for i := range 3 * int(refusedMeter.size) {
			c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(privateAddr, uint16(1000+i)))
		}
	})
	if _, err := dialFrom(t, g.ns, netip.AddrPortFrom(privateAddr, 9), timeout); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("with a full meter: %v", err)
	}
	list, err := n.Denied(t.Context(), s, Policy{})
	must(t, err)
	if len(list) != int(refusedMeter.size) {
		t.Errorf("%d are kept", len(list))
	}
	if list, err = n.Denied(t.Context(), s, Policy{}); err != nil || len(list) != int(refusedMeter.size) {
		t.Errorf("then %d, %v", len(list), err)
	}
}
