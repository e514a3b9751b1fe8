package e2e_test

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// BenchmarkNetwork times a sandbox's network: making and removing a slot
// beside the same thing done by the usual programs, and taking one out of the
// pool beside making it.
func BenchmarkNetwork(b *testing.B) {
	testenv.Root(b)
	testenv.Program(b, "ip", "nft", "sysctl")
	plan := network.Plan{Instance: "wbench", Hosts: netip.MustParsePrefix("10.177.0.0/16"), Veths: netip.MustParsePrefix("10.178.0.0/16")}
	testenv.NoLeaks(b, plan.Instance)
	ctx := b.Context()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	pool := 4
	n := network.New(plan, network.Options{Pool: pool})
	must(n.Setup(ctx))
	defer func() { must(n.Teardown(context.WithoutCancel(ctx))) }()
	slot, err := n.Acquire(ctx, vmm.Tap)
	must(err)
	made := row("network slot, made", "ip, sysctl and nft commands")
	made.goal = 0.1

	b.Run("Slot", func(b *testing.B) {
		removed := row("network slot, removed", "ip commands")
		must(n.Open(ctx, slot))
		open, closing := slotCommands(b, plan.Addrs(slot))
		must(n.Close(ctx, slot))
		for b.Loop() {
			timed(b, &made.agent, func() error { return n.Open(ctx, slot) })
			timed(b, &removed.agent, func() error { return n.Close(ctx, slot) })
			timed(b, &made.floor, func() error { return runCommands(open) })
			timed(b, &removed.floor, func() error { return runCommands(closing) })
		}
		made.report(b)
	})
	must(n.Release(slot))

	b.Run("Pool", func(b *testing.B) {
		life, end := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() { n.Run(life) })
		defer wg.Wait()
		defer end()
		warm := row("network slot, from the pool", "made by the agent")
		warm.floor = made.agent
		for b.Loop() {
			waitFor(b, "the pool to fill", func() bool { return n.Stats().Pool >= pool })
			var s network.Slot
			timed(b, &warm.agent, func() (err error) {
				if s, err = n.Acquire(ctx, vmm.Tap); err != nil {
					return err
				}
				return n.Open(ctx, s)
			})
			must(n.Close(ctx, s))
			must(n.Release(s))
		}
		warm.report(b)
	})
}

// slotCommands is what a script would run to make and remove an open slot once
// more, its rules taken from the kernel.
func slotCommands(b *testing.B, a network.Addrs) (open, closing []string) {
	b.Helper()
	rules, err := exec.Command("ip", "netns", "exec", a.NetNS, "nft", "-s", "list", "ruleset").Output()
	if err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(b.TempDir(), "slot.nft")
	if err := os.WriteFile(file, rules, 0o600); err != nil {
		b.Fatal(err)
	}
	inside := "ip netns exec " + a.NetNS + " "
	link := "ip -n " + a.NetNS + " "
	return []string{
			"ip netns add " + a.NetNS,
			inside + "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=1 net.ipv4.icmp_ratemask=6160" +
				" net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
			link + "tuntap add " + network.Tap + " mode tap vnet_hdr user 0",
			"ip link add " + a.Veth + " type veth peer name veth0 netns " + a.NetNS,
			inside + "nft -f " + file,
			link + "link set lo up",
			link + "addr add " + network.GuestGateway.String() + "/" + strconv.Itoa(network.GuestAddr.Bits()) + " dev " + network.Tap,
			link + "link set " + network.Tap + " address " + network.TapMAC + " up",
			link + "addr add " + a.NSVeth.String() + " dev veth0",
			link + "link set veth0 up",
			link + "neigh replace " + network.GuestAddr.Addr().String() + " lladdr " + network.GuestMAC + " dev " + network.Tap + " nud permanent",
			link + "route add default via " + a.HostVeth.Addr().String(),
			"sysctl -qw net.ipv6.conf." + a.Veth + ".disable_ipv6=1",
			"ip addr add " + a.HostVeth.String() + " dev " + a.Veth,
			"ip link set " + a.Veth + " up",
			"ip route add " + a.HostIP.String() + "/32 via " + a.NSVeth.Addr().String() + " dev " + a.Veth,
		}, []string{
			"ip link del " + a.Veth,
			"ip netns del " + a.NetNS,
		}
}

func runCommands(commands []string) error {
	for _, c := range commands {
		argv := strings.Fields(c)
		if err := exec.Command(argv[0], argv[1:]...).Run(); err != nil {
			return err
		}
	}
	return nil
}
