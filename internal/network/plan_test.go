package network

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestAddrsOfEverySlot(t *testing.T) {
	p := DefaultPlan()
	p.Instance = "wrenn1a2b"
	seen := map[any]Slot{}
	once := func(s Slot, v any) {
		t.Helper()
		if other, ok := seen[v]; ok {
			t.Fatalf("slots %d and %d share %v", other, s, v)
		}
		seen[v] = s
	}
	for s := Slot(1); s <= MaxSlot; s++ {
		a := p.Addrs(s)
		if len(a.Veth) > 15 {
			t.Fatalf("slot %d: link name %q is longer than 15 bytes", s, a.Veth)
		}
		if a.NetNSPath != "/run/netns/"+a.NetNS {
			t.Fatalf("slot %d: path %q does not name %q", s, a.NetNSPath, a.NetNS)
		}
		if !p.Hosts.Contains(a.HostIP) || !p.Veths.Contains(a.HostVeth.Addr()) || !p.Veths.Contains(a.NSVeth.Addr()) {
			t.Fatalf("slot %d: %+v is out of range", s, a)
		}
		if a.HostVeth.Bits() != 31 || a.HostVeth.Masked() != a.NSVeth.Masked() {
			t.Fatalf("slot %d: %v and %v are not one /31", s, a.HostVeth, a.NSVeth)
		}
		if got, ok := p.slotOf(a.Veth); !ok || got != s {
			t.Fatalf("slotOf(%q) = %d, %v; want %d", a.Veth, got, ok, s)
		}
		once(s, a.Veth)
		once(s, a.HostIP)
		once(s, a.HostVeth.Addr())
		once(s, a.NSVeth.Addr())
	}
}

func TestAddrsAtBoundaries(t *testing.T) {
	type want struct{ HostVeth, NSVeth, HostIP string }
	for s, w := range map[Slot]want{
		1:       {"10.12.0.2/31", "10.12.0.3/31", "10.11.0.1"},
		127:     {"10.12.0.254/31", "10.12.0.255/31", "10.11.0.127"},
		128:     {"10.12.1.0/31", "10.12.1.1/31", "10.11.0.128"},
		255:     {"10.12.1.254/31", "10.12.1.255/31", "10.11.0.255"},
		256:     {"10.12.2.0/31", "10.12.2.1/31", "10.11.1.0"},
		MaxSlot: {"10.12.255.254/31", "10.12.255.255/31", "10.11.127.255"},
	} {
		a := DefaultPlan().Addrs(s)
		got := want{a.HostVeth.String(), a.NSVeth.String(), a.HostIP.String()}
		if d := cmp.Diff(w, got); d != "" {
			t.Errorf("slot %d (-want +got):\n%s", s, d)
		}
	}
	for _, s := range []Slot{-1, 0, MaxSlot + 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Addrs(%d) did not panic", s)
				}
			}()
			DefaultPlan().Addrs(s)
		}()
	}
}

func TestSlotOfForeignNames(t *testing.T) {
	for _, name := range []string{
		"", "wrenn", "wrenn-", "wrenn-0", "wrenn-01", "wrenn-32768", "wrenn--1", "wrenn-+1", "wrenn-1x",
		"wrenn1a2b-1", "xwrenn-1", "wrenn-99999999999999999999",
	} {
		if s, ok := DefaultPlan().slotOf(name); ok {
			t.Errorf("slotOf(%q) = %d, want none", name, s)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, c := range []struct {
		instance, hosts, veths string
		ok                     bool
	}{
		{"wrenn", "10.11.0.0/16", "10.12.0.0/16", true},
		{"wrenn1a2b", "172.20.0.0/16", "192.168.0.0/16", true},
		{"", "10.11.0.0/16", "10.12.0.0/16", false},
		{"wrenn1a2bc", "10.11.0.0/16", "10.12.0.0/16", false},
		{"Wrenn", "10.11.0.0/16", "10.12.0.0/16", false},
		{"../x", "10.11.0.0/16", "10.12.0.0/16", false},
		{"wr-1", "10.11.0.0/16", "10.12.0.0/16", false},
		{"wrenn", "10.11.0.0/16", "10.11.0.0/16", false},
		{"wrenn", "10.11.0.0/24", "10.12.0.0/16", false},
		{"wrenn", "10.0.0.0/8", "10.12.0.0/16", false},
		{"wrenn", "10.11.0.1/16", "10.12.0.0/16", false},
		{"wrenn", "127.5.0.0/16", "10.12.0.0/16", false},
		{"wrenn", "169.254.0.0/16", "10.12.0.0/16", false},
		{"wrenn", "239.1.0.0/16", "10.12.0.0/16", false},
		{"wrenn", "fd00::/16", "10.12.0.0/16", false},
	} {
		p := Plan{c.instance, netip.MustParsePrefix(c.hosts), netip.MustParsePrefix(c.veths)}
		err := p.Validate()
		if (err == nil) != c.ok || (err != nil && !errors.Is(err, errdefs.InvalidArgument)) {
			t.Errorf("Validate(%+v) = %v, want ok %v", p, err, c.ok)
		}
	}
	if err := (Plan{}).Validate(); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("Validate of no plan = %v", err)
	}
}

func TestResolvers(t *testing.T) {
	files := map[string]string{
		"stub": "nameserver 127.0.0.53\noptions edns0\n",
		"up":   "# real\nnameserver 192.0.2.7\nnameserver 2001:db8::1\n nameserver ::ffff:192.0.2.8 \n",
		"mix":  "nameserver ::1\nnameserver 0.0.0.0\nnameserver\nnameserver x\n;nameserver 9.9.9.9\nnameserver 10.0.0.2\nnameserver 127.0.0.1\n",
		// A host with systemd-resolved.
		"/etc/resolv.conf":                 "nameserver 127.0.0.53\nsearch example.com\n",
		"/run/systemd/resolve/resolv.conf": "nameserver 192.0.2.7\nnameserver 192.0.2.8\n",
		"v6":                               "nameserver 2001:db8::1\nnameserver fe80::1%eth0\n",
	}
	read := func(p string) ([]byte, error) {
		if s, ok := files[p]; ok {
			return []byte(s), nil
		}
		return nil, errors.New("not there")
	}
	for _, c := range []struct {
		paths []string
		want  []string
	}{
		{[]string{"stub", "up"}, []string{"192.0.2.7", "192.0.2.8"}},
		{[]string{"mix", "up"}, []string{"10.0.0.2"}},
		{[]string{"none", "up"}, []string{"192.0.2.7", "192.0.2.8"}},
		{[]string{"stub", "v6"}, nil},
		{resolvPaths, []string{"192.0.2.7", "192.0.2.8"}},
	} {
		var got []string
		for _, a := range resolvers(read, c.paths...) {
			got = append(got, a.String())
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("resolvers(%v) (-want +got):\n%s", c.paths, d)
		}
	}
	for _, a := range FallbackResolvers() {
		if !ReachableResolver(a) {
			t.Errorf("guests cannot reach the fallback %s", a)
		}
	}
}
