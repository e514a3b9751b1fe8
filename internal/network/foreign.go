package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Obstacle is a chain of another program (Docker, a firewall) that drops packets
// from or to sandboxes. In netfilter a packet passes only if every table lets it
// through. This package never changes the tables of other programs; the host's
// administrator may.
type Obstacle struct {
	// Chain is its family, table and name, as in "ip filter FORWARD".
	Chain string
	// Mend are commands, as argument vectors, that let the sandboxes' packets
	// through this chain. What they may reach, our own table still decides.
	Mend [][]string
}

// String is the commands as a shell takes them.
func (o Obstacle) String() string {
	var lines []string
	for _, argv := range o.Mend {
		line := "sudo"
		for _, a := range argv {
			if strings.Contains(a, "*") {
				a = "'" + a + "'"
			}
			line += " " + a
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, " && ")
}

// Obstacles finds those of this host: chains of the forward hook, and of the
// input hook if one of the resolvers is the host itself, that end in a drop
// before a rule for our links. nftables' are seen, those of iptables-nft among
// them, and iptables-legacy's. It needs root and changes nothing.
func (p Plan) Obstacles(resolvers []netip.Addr) ([]Obstacle, error) {
	f := foreign{plan: p, hooks: []nftables.ChainHook{*nftables.ChainHookForward}}
	addrs, err := listed(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && slices.Contains(resolvers, p.Addr()) {
			f.hooks = append(f.hooks, *nftables.ChainHookInput)
			break
		}
	}
	if err := look(f.nftables); err != nil {
		return nil, fmt.Errorf("look at other firewalls: %w", err)
	}
	if err := f.legacy(); err != nil {
		return nil, fmt.Errorf("look at iptables-legacy: %w", err)
	}
	return f.found, nil
}

type foreign struct {
	plan   Plan
	hooks  []nftables.ChainHook
	chains []*nftables.Chain
	found  []Obstacle
}

func (f *foreign) nftables(c *nftables.Conn) (err error) {
	f.found = nil
	if f.chains, err = c.ListChains(); err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	for _, ch := range f.chains {
		t := ch.Table
		ours := t.Family == nftables.TableFamilyINet && t.Name == f.plan.Instance
		sees := t.Family == nftables.TableFamilyINet || t.Family == nftables.TableFamilyIPv4
		if ours || !sees || ch.Hooknum == nil || !slices.Contains(f.hooks, *ch.Hooknum) {
			continue
		}
		input := *ch.Hooknum == *nftables.ChainHookInput
		p, err := f.follow(c, ch, input, 0)
		if err != nil {
			return err
		}
		drops := p.end == expr.VerdictDrop || p.end == passOn && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		if !drops || p.in && (p.out || input) {
			continue
		}
		fam := familyNames[family(t.Family)]
		o := Obstacle{Chain: fam + " " + t.Name + " " + ch.Name}
		at := ch.Name
		if f.chain(t, dockerChain) != nil && !input {
			at = dockerChain // what Docker leaves to its users, and never rewrites
		}
		// A chain that iptables made is best changed by it.
		if t.Family == nftables.TableFamilyIPv4 && t.Name == "filter" && ch.Name == strings.ToUpper(ch.Name) {
			o.Mend = f.iptables("iptables", at, input)
		} else {
			o.Mend = f.nft(fam, t.Name, at, input)
		}
		f.found = append(f.found, o)
	}
	return nil
}

const dockerChain = "DOCKER-USER"

func (f *foreign) iptables(program, chain string, input bool) [][]string {
	links := f.plan.Instance + "-+"
	if input {
		return [][]string{
			{program, "-I", chain, "-i", links, "-p", "udp", "--dport", "53", "-j", "ACCEPT"},
			{program, "-I", chain, "-i", links, "-p", "tcp", "--dport", "53", "-j", "ACCEPT"},
		}
	}
	return [][]string{
		{program, "-I", chain, "-i", links, "-j", "ACCEPT"},
		{program, "-I", chain, "-o", links, "-j", "ACCEPT"},
	}
}

func (f *foreign) nft(family, table, chain string, input bool) [][]string {
	links := f.plan.Instance + "-*"
	insert := []string{"nft", "insert", "rule", family, table, chain}
	if input {
		return [][]string{
			append(slices.Clone(insert), "iifname", links, "udp", "dport", "53", "accept"),
			append(slices.Clone(insert), "iifname", links, "tcp", "dport", "53", "accept"),
		}
	}
	return [][]string{
		append(slices.Clone(insert), "iifname", links, "accept"),
		append(slices.Clone(insert), "oifname", links, "accept"),
	}
}

func (f *foreign) chain(t *nftables.Table, name string) *nftables.Chain {
	for _, ch := range f.chains {
		if ch.Name == name && ch.Table.Name == t.Name && ch.Table.Family == t.Family {
			return ch
		}
	}
	return nil
}

// path is what becomes of a sandbox's packets in a chain: accepted by the link
// that they come in by or go out by, and at the end.
type path struct {
	in, out bool
	end     expr.VerdictKind
}

// passOn: the chain ends without a verdict for all.
const passOn = expr.VerdictContinue

func (f *foreign) follow(c *nftables.Conn, ch *nftables.Chain, input bool, depth int) (p path, err error) {
	p.end = passOn
	if depth > 16 { // as deep as the kernel goes
		return p, nil
	}
	rules, err := c.GetRules(ch.Table, ch)
	if err != nil {
		return p, fmt.Errorf("list rules of %s: %w", ch.Name, err)
	}
	for _, r := range rules {
		m := f.read(r)
		switch {
		case m.narrow && !(input && m.dns):
		case m.verdict == expr.VerdictAccept && m.in:
			p.in = true
		case m.verdict == expr.VerdictAccept && m.out:
			p.out = true
		case m.narrow || m.in || m.out:
		case m.verdict == expr.VerdictAccept || m.verdict == expr.VerdictDrop:
			p.end = m.verdict
			return p, nil
		case m.verdict == expr.VerdictReturn:
			return p, nil
		case m.verdict == expr.VerdictJump || m.verdict == expr.VerdictGoto:
			to := f.chain(ch.Table, m.chain)
			if to == nil {
				continue
			}
			sub, err := f.follow(c, to, input, depth+1)
			if err != nil {
				return p, err
			}
			p.in, p.out = p.in || sub.in, p.out || sub.out
			if sub.end != passOn || m.verdict == expr.VerdictGoto {
				p.end = sub.end
				return p, nil
			}
		}
	}
	return p, nil
}

// match is what a rule means to a sandbox's packet.
type match struct {
	in, out bool // for our links only
	narrow  bool // for some packets only, for other reasons
	dns     bool // and those are a port 53's
	verdict expr.VerdictKind
	chain   string
}

func (f *foreign) read(r *nftables.Rule) (m match) {
	m.verdict = passOn
	links := []byte(f.plan.Instance + "-")
	var key expr.MetaKey
	port := false
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log, *expr.Notrack:
		case *expr.Meta:
			key, port = e.Key, false
		case *expr.Payload:
			key, port = 0, e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2
		case *expr.Cmp:
			// A name that ends in a wildcard is compared without its end.
			prefix := e.Op == expr.CmpOpEq && bytes.HasPrefix(links, e.Data)
			switch {
			case key == expr.MetaKeyIIFNAME && prefix:
				m.in = true
			case key == expr.MetaKeyOIFNAME && prefix:
				m.out = true
			case port && e.Op == expr.CmpOpEq && bytes.Equal(e.Data, []byte{0, 53}):
				m.dns = true
			default:
				m.narrow = true
			}
		case *expr.Match:
			m.narrow = true
			// The match of iptables-nft for -p udp --dport 53.
			if e.Name == "udp" || e.Name == "tcp" {
				m.dns = true
			}
		case *expr.Reject:
			m.verdict = expr.VerdictDrop
		case *expr.Verdict:
			m.verdict, m.chain = e.Kind, e.Chain
		default:
			m.narrow = true
		}
	}
	return m
}

// legacy looks at the table "filter" of the kernel's older iptables, if the
// host uses it: to ask for one that is not there would make it.
func (f *foreign) legacy() error {
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if err != nil || !slices.Contains(strings.Fields(string(names)), "filter") {
		return nil // no such kernel, or no such table
	}
	t, err := readLegacy("filter")
	if err != nil {
		return err
	}
	for _, hook := range f.hooks {
		chain, input := "FORWARD", hook == *nftables.ChainHookInput
		if input {
			chain = "INPUT"
		}
		at := chain
		if !input && t.hasChain(dockerChain) {
			at = dockerChain
		}
		if v, ok := t.verdict(t.info.Underflow[hook]); !ok || v != legacyDrop {
			continue
		}
		if in, out := t.accepts(f.plan.Instance + "-"); in && (out || input) {
			continue
		}
		f.found = append(f.found, Obstacle{Chain: "iptables-legacy filter " + chain, Mend: f.iptables("iptables-legacy", at, input)})
	}
	return nil
}

// The kernel's interface to tables of iptables-legacy: struct ipt_getinfo and
// struct ipt_get_entries, and in the entries struct ipt_entry with its target.
type legacyInfo struct {
	Name       [32]byte
	ValidHooks uint32
	HookEntry  [5]uint32
	Underflow  [5]uint32
	NumEntries uint32
	Size       uint32
}

type legacyTable struct {
	info    legacyInfo
	entries []byte
}

const (
	soGetInfo, soGetEntries = 64, 65

	legacyEntrySize  = 112
	legacyTargetName = 2                    // in the target, after its size
	legacyVerdict    = 32                   // in the target, after its header
	legacyDrop       = -1                   // as verdict of a standard target
	legacyAccept     = -2                   //
	legacyIn         = 16                   // the entry's iniface
	legacyOut        = legacyIn + 16        // its outiface
	legacyInMask     = legacyOut + 16       // and their masks
	legacyOutMask    = legacyInMask + 16    //
	legacyHeader     = 32 + 4 + 4           // of struct ipt_get_entries, padded
	legacyOffsets    = 84 + 4               // target_offset, next_offset
	legacyMin        = legacyEntrySize + 32 // an entry with the header of a target
)

func readLegacy(name string) (t legacyTable, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return t, fmt.Errorf("open raw socket: %w", err)
	}
	defer unix.Close(fd)
	for range 5 { // it may grow between the two questions
		copy(t.info.Name[:], name)
		size := uint32(unsafe.Sizeof(t.info))
		if err := getsockopt(fd, soGetInfo, unsafe.Pointer(&t.info), &size); err != nil {
			return t, fmt.Errorf("ask for the table's size: %w", err)
		}
		buf := make([]byte, legacyHeader+t.info.Size)
		copy(buf, name)
		binary.NativeEndian.PutUint32(buf[32:], t.info.Size)
		size = uint32(len(buf))
		err = getsockopt(fd, soGetEntries, unsafe.Pointer(&buf[0]), &size)
		t.entries = buf[legacyHeader:]
		if !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	if err != nil {
		return t, fmt.Errorf("read the table: %w", err)
	}
	return t, nil
}

func getsockopt(fd, opt int, p unsafe.Pointer, size *uint32) error {
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// entry returns an entry and its target.
func (t legacyTable) entry(at uint32) (e, target []byte, next uint32) {
	if uint64(at)+legacyMin > uint64(len(t.entries)) {
		return nil, nil, 0
	}
	e = t.entries[at:]
	to, step := binary.NativeEndian.Uint16(e[legacyOffsets:]), binary.NativeEndian.Uint16(e[legacyOffsets+2:])
	if step < legacyMin || to < legacyEntrySize || uint64(to)+32 > uint64(len(e)) {
		return nil, nil, 0
	}
	return e, e[to:], at + uint32(step)
}

// verdict of an entry with a standard target.
func (t legacyTable) verdict(at uint32) (int32, bool) {
	_, target, _ := t.entry(at)
	if len(target) < legacyVerdict+4 || target[legacyTargetName] != 0 {
		return 0, false
	}
	return int32(binary.NativeEndian.Uint32(target[legacyVerdict:])), true
}

// accepts says whether rules somewhere in the table accept what comes in, and
// what goes out, by links that begin with prefix.
func (t legacyTable) accepts(prefix string) (in, out bool) {
	for at := uint32(0); ; {
		e, _, next := t.entry(at)
		if e == nil {
			return in, out
		}
		if v, ok := t.verdict(at); ok && v == legacyAccept {
			in = in || legacyLink(e[legacyIn:], e[legacyInMask:], prefix)
			out = out || legacyLink(e[legacyOut:], e[legacyOutMask:], prefix)
		}
		at = next
	}
}

// legacyLink says whether a name and its mask match all links of a prefix, and
// not simply all.
func legacyLink(name, mask []byte, prefix string) bool {
	n := 0
	for n < 16 && mask[n] == 0xff {
		n++
	}
	return n > 0 && n <= len(prefix) && string(name[:n]) == prefix[:n]
}

// hasChain says whether the table has a chain of that name: such begin with
// an entry whose target is ERROR and names them.
func (t legacyTable) hasChain(name string) bool {
	for at := uint32(0); ; {
		e, target, next := t.entry(at)
		if e == nil {
			return false
		}
		if len(target) >= 64 && cString(target[legacyTargetName:legacyVerdict-1]) == "ERROR" &&
			cString(target[legacyVerdict:legacyVerdict+32]) == name {
			return true
		}
		at = next
	}
}

func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}
