package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// chooser is the network of an agent that no flag names ranges for.
func chooser(instance, file string, resolvers ...netip.Addr) *Network {
	return New(Plan{Instance: instance}, Options{RangesFile: file, Resolvers: resolvers})
}

func rangesOfPlan(n *Network) string { return fmt.Sprint(n.Plan().Hosts, " ", n.Plan().Veths) }

// setUp sets n up until the test ends.
func setUp(t testing.TB, n *Network) {
	t.Helper()
	must(t, n.Setup(t.Context()))
	t.Cleanup(func() { must(t, n.Teardown(t.Context())) })
}

func addRoute(t testing.TB, dst string) *netlink.Route {
	t.Helper()
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), Type: unix.RTN_UNREACHABLE, Priority: 77}
	must(t, netlink.RouteAdd(r))
	t.Cleanup(func() { netlink.RouteDel(r) })
	return r
}

func TestRangesAreChosen(t *testing.T) {
	world(t, Options{}) // an agent with the default ranges
	dir := t.TempDir()
	file := filepath.Join(dir, "network.json")
	addRoute(t, "10.14.3.0/24")
	n := chooser("tneta", file, netip.MustParseAddr("10.15.0.53"))
	setUp(t, n)
	const want = "10.17.0.0/16 10.18.0.0/16"
	if got := rangesOfPlan(n); got != want {
		t.Fatalf("chosen %s, want %s", got, want)
	}
	b, err := os.ReadFile(file)
	must(t, err)
	if got := string(b); got != `{"host_range":"10.17.0.0/16","link_range":"10.18.0.0/16"}`+"\n" {
		t.Errorf("recorded %s", got)
	}
	must(t, n.Setup(t.Context()))
	// The next agent has the same, whatever has become free.
	must(t, n.Teardown(t.Context()))
	again := chooser("tneta", file)
	setUp(t, again)
	if got := rangesOfPlan(again); got != want {
		t.Errorf("the next agent has %s, want %s", got, want)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// Agents that start at once choose different ranges.
func TestRangesAreChosenAtOnce(t *testing.T) {
	world(t, Options{})
	var wg sync.WaitGroup
	nets := make([]*Network, 12)
	for i := range nets {
		nets[i] = chooser(fmt.Sprintf("tnetb%d", i), filepath.Join(t.TempDir(), "network.json"))
		wg.Go(func() {
			if err := nets[i].Setup(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	seen := map[netip.Prefix]bool{}
	for _, n := range nets {
		for _, p := range []netip.Prefix{n.Plan().Hosts, n.Plan().Veths} {
			if seen[p] {
				t.Errorf("%s is chosen twice", p)
			}
			seen[p] = true
		}
		must(t, n.Teardown(t.Context()))
	}
}

func TestRecordedRangesAreTaken(t *testing.T) {
	world(t, Options{})
	file := filepath.Join(t.TempDir(), "network.json")
	n := chooser("tnetc", file)
	must(t, n.Setup(t.Context()))
	first := rangesOfPlan(n)

	// With sandboxes there, nothing else will do.
	s, err := n.Acquire(t.Context(), kind)
	must(t, err)
	must(t, n.Open(t.Context(), s))
	taken := addRoute(t, n.Plan().Hosts.Addr().Next().String()+"/32")
	err = chooser("tnetc", file).Setup(t.Context())
	if !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), n.Plan().Hosts.String()) ||
		!strings.Contains(err.Error(), "1 sandboxes") {
		t.Errorf("ranges taken under a sandbox: %v", err)
	}
	must(t, netlink.RouteDel(taken))
	// Nor do flags that say otherwise.
	other := Plan{"tnetc", netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("10.202.0.0/16")}
	err = New(other, Options{RangesFile: file}).Setup(t.Context())
	if !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), "--host-range") {
		t.Errorf("other ranges under a sandbox: %v", err)
	}
	must(t, chooser("tnetc", file).Setup(t.Context()))
	must(t, n.Close(t.Context(), s))
	must(t, n.Release(s))

	// Without, others are chosen, and what was taken is given back.
	taken = addRoute(t, n.Plan().Hosts.Addr().Next().String()+"/32")
	next := chooser("tnetc", file)
	setUp(t, next)
	if got := rangesOfPlan(next); got == first {
		t.Errorf("%s is taken and chosen again", got)
	}
	must(t, netlink.RouteDel(taken))
	// Flags win, and are what is used from then on.
	flagged := New(other, Options{RangesFile: file})
	setUp(t, flagged)
	later := chooser("tnetc", file)
	setUp(t, later)
	if later.Plan() != other {
		t.Errorf("after flags: %s", rangesOfPlan(later))
	}
	if got := rangeRouteCount(t); got != 4 {
		t.Errorf("%d range routes, want those of two agents", got)
	}
}

func TestRangesFileIsTorn(t *testing.T) {
	world(t, Options{})
	file := filepath.Join(t.TempDir(), "network.json")
	must(t, os.WriteFile(file, []byte(`{"host_range":"10.1`), 0o600))
	if err := chooser("tnetd", file).Setup(t.Context()); !errors.Is(err, errdefs.Corrupt) {
		t.Errorf("torn file: %v", err)
	}
	n := New(Plan{"tnetd", netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("10.202.0.0/16")}, Options{RangesFile: file})
	setUp(t, n)
	if p, err := (Plan{Instance: "tnetd"}).ReadRanges(file); err != nil || p != n.Plan() {
		t.Errorf("named after it: %v, %v", p, err)
	}
}

func TestValidateGiven(t *testing.T) {
	for _, p := range []Plan{
		{Instance: "x"},
		{Instance: "x", Hosts: netip.MustParsePrefix("10.12.0.0/16")},
		{Instance: "x", Veths: netip.MustParsePrefix("10.11.0.0/16")},
	} {
		if err := p.ValidateGiven(); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
	if err := (Plan{Instance: "x", Hosts: netip.MustParsePrefix("10.1.0.0/24")}).ValidateGiven(); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a /24: %v", err)
	}
}
