package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func nft(t testing.TB, script string) string {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	if strings.HasPrefix(script, "list ") {
		cmd = exec.Command("nft", strings.Fields(script)...)
	}
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(script, " }", "\n}"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", script, err, out)
	}
	return string(out)
}

// Other programs make and remove their tables while the rules are looked at. A chain whose
// rules are gone when they are asked for is not taken for one that lets nothing through.
func TestLookWhileOthersChange(t *testing.T) {
	testenv.Root(t)
	runtime.LockOSThread() // and the thread ends with the test
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	c, err := nftables.New(nftables.AsLasting()) // of this namespace, on whatever thread
	must(t, err)
	defer c.CloseLasting()
	lets := func(key expr.MetaKey) rule {
		return rule{stmt("", &expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("tnet-")}), accept()}
	}
	theirs := ruleset{family: ipv4, name: "theirs", chains: []chain{
		base("forward", nftables.ChainTypeFilter, "filter", true, lets(expr.MetaKeyIIFNAME), lets(expr.MetaKeyOIFNAME)),
	}}
	ours := ruleset{family: inet, name: "tnet", chains: []chain{base("forward", nftables.ChainTypeFilter, "filter", false, rule{accept()})}}
	must(t, addTables(ours))
	for range 100 {
		changed := make(chan error)
		go func() {
			var errs []error
			for range 9 { // two changes each may be in the way of 18 of 20 attempts
				errs = append(errs, theirs.add(c), c.Flush())
				c.DelTable(theirs.nftTable())
				errs = append(errs, c.Flush())
			}
			changed <- errors.Join(errs...)
		}()
		found, err := Plan{Instance: "tnet"}.Obstacles(nil)
		must(t, errors.Join(err, checkTables(ours), <-changed))
		if len(found) > 0 {
			t.Fatalf("obstacles: %v", found)
		}
	}
}

// mend runs what an Obstacle says, as a shell would. Where iptables is not
// installed, nft adds the rule that iptables-nft would.
func mend(t testing.TB, o Obstacle) {
	t.Helper()
	line := strings.ReplaceAll(o.String(), "sudo ", "")
	if _, err := exec.LookPath("iptables"); err != nil && strings.HasPrefix(line, "iptables -I") {
		for _, argv := range o.Mend {
			words := []string{"insert", "rule", "ip", "filter", argv[2]}
			for i := 3; i < len(argv); i += 2 {
				value := strings.ReplaceAll(argv[i+1], "+", "*")
				switch argv[i] {
				case "-i":
					words = append(words, "iifname", value)
				case "-o":
					words = append(words, "oifname", value)
				case "-p":
					words = append(words, value)
				case "--dport":
					words = append(words, "dport", value)
				case "-j":
					words = append(words, "counter", strings.ToLower(value))
				}
			}
			nft(t, strings.Join(words, " "))
		}
		return
	}
	if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
}

// otherFirewalls drop what they do not know, in the chain of that name. at is the
// chain in which a rule lets it through.
var otherFirewalls = []struct {
	name, rules, chain, table, at string
	input                         bool
}{
	{name: "Docker", table: "ip filter", chain: "ip filter FORWARD", at: "DOCKER-USER", rules: `table ip filter {
			chain DOCKER { drop
			}
			chain DOCKER-USER { counter return
			}
			chain FORWARD { type filter hook forward priority filter; policy drop;
				counter jump DOCKER-USER
				oifname "docker0" ct state established,related counter accept
				oifname "docker0" counter jump DOCKER
				iifname "docker0" counter accept } }`},
	{name: "ufw", table: "ip filter", chain: "ip filter FORWARD", at: "FORWARD", rules: `table ip filter {
			chain ufw-reject { counter
			}
			chain FORWARD { type filter hook forward priority filter; policy drop; counter jump ufw-reject } }`},
	{name: "firewalld", table: "inet firewalld", chain: "inet firewalld filter_FORWARD", at: "filter_FORWARD", rules: `table inet firewalld {
			chain zones { iifname "eth0" accept
			}
			chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
				ct state established,related accept
				ct status dnat accept
				iifname "lo" accept
				jump zones
				ct state invalid drop
				reject with icmpx admin-prohibited } }`},
	{name: "one direction only", table: "inet half", chain: "inet half through", at: "through", rules: `table inet half {
			chain through { type filter hook forward priority -5; policy drop; iifname "tnet-*" accept } }`},
	{name: "input", input: true, table: "ip filter", chain: "ip filter INPUT", at: "INPUT", rules: `table ip filter {
			chain INPUT { type filter hook input priority filter; policy drop;
				iifname "lo" accept
				ct state established,related accept
				tcp dport 22 accept } }`},
}

// A host whose other firewall drops what it does not know: it is named, the
// commands named mend it, and the other's table is never ours to change.
func TestObstacles(t *testing.T) {
	testenv.Program(t, "nft")
	var log bytes.Buffer
	n := world(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil)), Resolvers: []netip.Addr{uplinkAddr}})
	_, a, g := open(t, n)
	serve(t, internet, internetAddr, 7060)
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	serve(t, here, uplinkAddr, 53)
	find := func(resolvers ...netip.Addr) []Obstacle {
		t.Helper()
		found, err := n.plan.Obstacles(resolvers)
		must(t, err)
		return found
	}
	if found := find(uplinkAddr); len(found) > 0 {
		t.Fatalf("obstacles on a host without any: %v", found)
	}
	for _, c := range otherFirewalls {
		t.Run(c.name, func(t *testing.T) {
			nft(t, c.rules)
			defer nft(t, "delete table "+c.table)
			reaches := func() bool {
				if c.input {
					return ask(t, g.ns, "udp", uplinkAddr, 53, silence) != "" && ask(t, g.ns, "tcp", uplinkAddr, 53, silence) != ""
				}
				return ask(t, g.ns, "udp", internetAddr, 7060, silence) != "" && ask(t, g.ns, "tcp", internetAddr, 7060, silence) != ""
			}
			if reaches() {
				t.Error("the other firewall lets the sandbox's packets through: this shows nothing")
			}
			found := find(uplinkAddr)
			if len(found) != 1 || found[0].Chain != c.chain || !slices.Contains(found[0].Mend[0], c.at) {
				t.Fatalf("obstacles = %v, want %s, to be mended in %s", found, c.chain, c.at)
			}
			if c.input && len(find(internetAddr)) > 0 {
				t.Error("the input chain is an obstacle, though no resolver is on the host")
			}
			before := nft(t, "list table "+c.table)
			log.Reset()
			must(t, n.Setup(t.Context()))
			if !strings.Contains(log.String(), c.chain) || !strings.Contains(log.String(), c.at) {
				t.Errorf("setup does not warn: %s", log.String())
			}
			must(t, n.Teardown(t.Context()))
			must(t, n.Setup(t.Context()))
			if after := nft(t, "list table "+c.table); before != after {
				t.Errorf("setup and teardown changed another's table:\n%s\n%s", before, after)
			}
			mend(t, found[0])
			if found := find(uplinkAddr); len(found) > 0 {
				t.Errorf("obstacles after mending = %v", found)
			}
			if !reaches() {
				t.Error("what the obstacle said does not mend it")
			}
			if ask(t, here, "tcp", a.HostIP, 49983, timeout) == "" {
				t.Error("the host does not reach the guest")
			}
		})
	}
}

// Rules of another firewall that let sandboxes through are no obstacles.
func TestNoObstacles(t *testing.T) {
	testenv.Program(t, "nft")
	n := world(t, Options{Resolvers: []netip.Addr{uplinkAddr}})
	for _, rules := range []string{
		`table ip filter { chain FORWARD { type filter hook forward priority 0; policy accept; tcp dport 25 drop } }`,
		`table ip filter { chain every { accept
			}
			chain FORWARD { type filter hook forward priority 0; policy drop; goto every } }`,
		`table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; } }`,
		`table ip filter { chain mine { iifname "tnet*" counter accept
			oifname "tnet-*" accept
			}
			chain FORWARD { type filter hook forward priority 0; policy drop; jump mine } }`,
	} {
		nft(t, rules)
		if found, err := n.plan.Obstacles([]netip.Addr{uplinkAddr}); err != nil || len(found) > 0 {
			t.Errorf("%s\nobstacles = %v, %v", rules, found, err)
		}
		nft(t, "delete table "+strings.Join(strings.Fields(rules)[1:3], " "))
	}
}

// The kernel's older iptables, in a namespace of its own, since its table
// stays once it is there.
func TestObstaclesOfLegacy(t *testing.T) {
	testenv.Root(t)
	in(t, newNS(t), func() {
		if names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names"); err != nil || len(names) > 0 {
			t.Skipf("the kernel has no iptables-legacy, or does not say so: %q, %v", names, err)
		}
		p := testPlan()
		if found, err := p.Obstacles(nil); err != nil || len(found) > 0 {
			t.Errorf("obstacles = %v, %v", found, err)
		}
		if names, _ := os.ReadFile("/proc/thread-self/net/ip_tables_names"); len(names) > 0 {
			t.Error("looking made the table")
		}
		table, err := readLegacy("filter") // makes it
		if err != nil {
			t.Skipf("the kernel has no table filter of iptables-legacy: %v", err)
		}
		forward := *hooks["forward"]
		if v, ok := table.verdict(table.info.Underflow[forward]); !ok || v != legacyAccept {
			t.Errorf("policy of a fresh FORWARD = %d, %v", v, ok)
		}
		if found, err := p.Obstacles(nil); err != nil || len(found) > 0 {
			t.Errorf("obstacles of a table that accepts = %v, %v", found, err)
		}
		_, target, _ := table.entry(table.info.Underflow[forward])
		drop := int32(legacyDrop)
		binary.NativeEndian.PutUint32(target[legacyVerdict:], uint32(drop))
		replaceLegacy(t, table)
		found, err := p.Obstacles(nil)
		if err != nil || len(found) != 1 || found[0].Chain != "iptables-legacy filter FORWARD" ||
			!strings.Contains(found[0].String(), "sudo iptables-legacy -I FORWARD -i tnet-+ -j ACCEPT") {
			t.Errorf("obstacles = %v, %v", found, err)
		}

		// With a rule for each direction before the policy, it is none.
		at := table.info.Underflow[forward]
		_, _, next := table.entry(at)
		policy := table.entries[at:next]
		var rules []byte
		for _, off := range []int{legacyIn, legacyOut} {
			r := bytes.Clone(policy)
			copy(r[off:], "tnet-")
			copy(r[off+32:], "\xff\xff\xff\xff\xff")
			accept := int32(legacyAccept)
			binary.NativeEndian.PutUint32(r[legacyEntrySize+legacyVerdict:], uint32(accept))
			rules = append(rules, r...)
		}
		grown := table
		grown.entries = slices.Concat(table.entries[:at], rules, table.entries[at:])
		grown.info.Size += uint32(len(rules))
		grown.info.NumEntries += 2
		for i := range grown.info.HookEntry {
			if grown.info.HookEntry[i] > at {
				grown.info.HookEntry[i] += uint32(len(rules))
			}
			if grown.info.Underflow[i] >= at && grown.info.ValidHooks&(1<<i) != 0 {
				grown.info.Underflow[i] += uint32(len(rules))
			}
		}
		replaceLegacy(t, grown)
		if found, err := p.Obstacles(nil); err != nil || len(found) > 0 {
			t.Errorf("obstacles with rules for our links = %v, %v", found, err)
		}
	})
}

// replaceLegacy puts a table in place of the kernel's (struct ipt_replace).
func replaceLegacy(t testing.TB, table legacyTable) {
	t.Helper()
	counters := make([]byte, 16*(table.info.NumEntries+8))
	ne := binary.NativeEndian
	b := append([]byte{}, table.info.Name[:]...)
	b = ne.AppendUint32(b, table.info.ValidHooks)
	b = ne.AppendUint32(b, table.info.NumEntries)
	b = ne.AppendUint32(b, table.info.Size)
	for _, list := range [][5]uint32{table.info.HookEntry, table.info.Underflow} {
		for _, v := range list {
			b = ne.AppendUint32(b, v)
		}
	}
	old, err := readLegacy("filter")
	must(t, err)
	b = ne.AppendUint32(b, old.info.NumEntries)
	b = ne.AppendUint64(b, uint64(uintptr(unsafe.Pointer(&counters[0]))))
	b = append(b, table.entries[:table.info.Size]...)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	must(t, err)
	defer unix.Close(fd)
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_IP, 64, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		0); errno != 0 {
		t.Fatalf("replace table: %v", errno)
	}
}
