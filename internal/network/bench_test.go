package network

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// BenchmarkOpenClose times a slot's making and removal, and beside it the same
// done by the usual programs, with their rules in one file each.
func BenchmarkOpenClose(b *testing.B) {
	n := world(b, Options{})
	s, err := n.Acquire(b.Context(), kind)
	must(b, err)
	a := n.Plan().Addrs(s)
	var ours, theirs struct{ open, all time.Duration }
	b.Run("netlink", func(b *testing.B) {
		var opened time.Duration
		for b.Loop() {
			at := time.Now()
			must(b, n.Open(b.Context(), s))
			opened += time.Since(at)
			must(b, n.Close(b.Context(), s))
		}
		ours.open, ours.all = opened/time.Duration(b.N), b.Elapsed()/time.Duration(b.N)
	})
	b.Run("commands", func(b *testing.B) {
		testenv.Program(b, "ip", "nft", "sysctl")
		open, closing := commands(b, n.Plan(), a)
		var opened time.Duration
		for b.Loop() {
			at := time.Now()
			runAll(b, open)
			opened += time.Since(at)
			runAll(b, closing)
		}
		theirs.open, theirs.all = opened/time.Duration(b.N), b.Elapsed()/time.Duration(b.N)
	})
	if ours.all > 0 && theirs.all > 0 {
		fmt.Fprintf(os.Stderr, "open:       netlink %v, commands %v: %.1f times\nopen+close: netlink %v, commands %v: %.1f times\n",
			ours.open, theirs.open, theirs.open.Seconds()/ours.open.Seconds(),
			ours.all, theirs.all, theirs.all.Seconds()/ours.all.Seconds())
	}
	must(b, n.Release(s))
}

// commands is what a script would run to make and remove the same slot.
func commands(b *testing.B, p Plan, a Addrs) (open, closing []string) {
	var rules strings.Builder
	for _, r := range slotRules(a, egressRules(p, Options{}, Policy{})) {
		rules.WriteString(r.String())
	}
	file := filepath.Join(b.TempDir(), "slot.nft")
	must(b, os.WriteFile(file, []byte(rules.String()), 0o600))
	in := "ip netns exec " + a.NetNS + " "
	tap := "ip -n " + a.NetNS + " "
	return []string{
			"ip netns add " + a.NetNS,
			in + "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=1 net.ipv4.icmp_ratemask=6160" +
				" net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
			tap + "tuntap add " + Tap + " mode tap vnet_hdr user 0",
			"ip link add " + a.Veth + " type veth peer name " + peerName + " netns " + a.NetNS,
			in + "nft -f " + file,
			tap + "link set lo up",
			tap + "addr add " + GuestGateway.String() + "/" + strconv.Itoa(GuestAddr.Bits()) + " dev " + Tap,
			tap + "link set " + Tap + " up",
			tap + "addr add " + a.NSVeth.String() + " dev " + peerName,
			tap + "link set " + peerName + " up",
			tap + "neigh replace " + GuestAddr.Addr().String() + " lladdr " + GuestMAC + " dev " + Tap + " nud permanent",
			tap + "route add default via " + a.HostVeth.Addr().String(),
			"sysctl -qw net.ipv6.conf." + a.Veth + ".disable_ipv6=1",
			"ip addr add " + a.HostVeth.String() + " dev " + a.Veth,
			"ip link set " + a.Veth + " up",
			"ip route add " + a.HostIP.String() + "/32 via " + a.NSVeth.Addr().String() + " dev " + a.Veth,
		}, []string{
			"ip link del " + a.Veth,
			"ip netns del " + a.NetNS,
		}
}

func runAll(b *testing.B, commands []string) {
	b.Helper()
	for _, c := range commands {
		argv := strings.Fields(c)
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%s: %v: %s", c, err, out)
		}
	}
}
