package network

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/nftgen"
)

// A rule set is data: what is sent to the kernel and the text that nft shows
// for it stand side by side in each term, so that the one is tested by the
// other.

// term is a part of a rule: a match or a statement.
type term struct {
	text  string
	exprs []expr.Any
	// in, if not empty, are the ranges that register 1 must be in then.
	in []addrRange
}

type rule []term

// chain is a base chain if it has a hook.
type chain struct {
	name     string
	typ      nftables.ChainType
	hook     string
	device   string
	priority string
	drop     bool // policy
	rules    []rule
}

// ruleset is one table.
type ruleset struct {
	family family
	name   string
	chains []chain
	// closings and meters are what rules name.
	closings []closing
	meters   []meter
}

// closing is a time-out for connections of TCP over IPv4, in seconds after
// their end. All others are the kernel's own.
type closing struct {
	name string
	secs uint32
}

// meter is a set that rules fill: an element for each address with connections,
// which the kernel removes when it has none. With a time-out, an element for each
// destination, which the kernel removes so long after it was last met.
type meter struct {
	name    string
	size    uint32
	timeout time.Duration
}

// destination is the key of a meter with a time-out.
var destination = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)

func (m meter) set(t *nftables.Table) *nftables.Set {
	s := &nftables.Set{Table: t, ID: setID.Add(1), Name: m.name, KeyType: nftables.TypeIPAddr, Dynamic: true, Size: m.size}
	if m.timeout > 0 {
		s.KeyType, s.Concatenation, s.HasTimeout, s.Timeout = destination, true, true, m.timeout
	}
	return s
}

// String renders it as nft does.
func (m meter) String() string {
	if m.timeout > 0 {
		return fmt.Sprintf("\tset %s {\n\t\ttype ipv4_addr . inet_proto . inet_service\n\t\tsize %d\n\t\tflags dynamic,timeout\n"+
			"\t\ttimeout %dm\n\t}\n\n", m.name, m.size, int(m.timeout.Minutes()))
	}
	return fmt.Sprintf("\tset %s {\n\t\ttype ipv4_addr\n\t\tsize %d\n\t\tflags dynamic\n\t}\n\n", m.name, m.size)
}

type family nftables.TableFamily

const (
	inet   = family(nftables.TableFamilyINet)
	ipv4   = family(nftables.TableFamilyIPv4)
	netdev = family(nftables.TableFamilyNetdev)
)

var (
	familyNames = map[family]string{inet: "inet", ipv4: "ip", netdev: "netdev"}
	hooks       = map[string]*nftables.ChainHook{
		"prerouting":  nftables.ChainHookPrerouting,
		"input":       nftables.ChainHookInput,
		"forward":     nftables.ChainHookForward,
		"output":      nftables.ChainHookOutput,
		"postrouting": nftables.ChainHookPostrouting,
		"ingress":     nftables.ChainHookIngress,
	}
	priorities = map[string]*nftables.ChainPriority{
		"raw":    nftables.ChainPriorityRaw,
		"dstnat": nftables.ChainPriorityNATDest,
		// After the destination is decided.
		"dstnat + 10": nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10),
		"filter":      nftables.ChainPriorityFilter,
		"srcnat":      nftables.ChainPriorityNATSource,
	}
)

func base(hook string, typ nftables.ChainType, priority string, drop bool, rules ...rule) chain {
	return chain{name: hook, typ: typ, hook: hook, priority: priority, drop: drop, rules: rules}
}

// String renders the table as "nft list table" does.
func (r ruleset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", familyNames[r.family], r.name)
	for _, c := range r.closings {
		fmt.Fprintf(&b, "\tct timeout %s {\n\t\tprotocol tcp\n\t\tl3proto ip\n", c.name)
		fmt.Fprintf(&b, "\t\tpolicy = { time_wait : %d, close : %d }\n\t}\n\n", c.secs, c.secs)
	}
	for _, m := range r.meters {
		b.WriteString(m.String())
	}
	for i, c := range r.chains {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.hook != "" {
			device := ""
			if c.device != "" {
				device = fmt.Sprintf("device %q ", c.device)
			}
			policy := "accept"
			if c.drop {
				policy = "drop"
			}
			fmt.Fprintf(&b, "\t\ttype %s hook %s %spriority %s; policy %s;\n", c.typ, c.hook, device, c.priority, policy)
		}
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t\t%s\n", r)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

func (r rule) String() string {
	texts := make([]string, len(r))
	for i, t := range r {
		texts[i] = t.text
	}
	return strings.Join(texts, " ")
}

func (r ruleset) nftTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamily(r.family), Name: r.name}
}

// add queues the making of the table and all in it.
func (r ruleset) add(c *nftables.Conn) error {
	t := c.AddTable(r.nftTable())
	for _, cl := range r.closings {
		cl.add(c, t)
	}
	for _, m := range r.meters {
		if err := c.AddSet(m.set(t), nil); err != nil {
			return fmt.Errorf("add set %s: %w", m.name, err)
		}
	}
	chains := make([]*nftables.Chain, len(r.chains))
	// All chains come before the rules, which may jump to a later one.
	for i, ch := range r.chains {
		n := &nftables.Chain{Name: ch.name, Table: t}
		if ch.hook != "" {
			policy := nftables.ChainPolicyAccept
			if ch.drop {
				policy = nftables.ChainPolicyDrop
			}
			n.Type, n.Device, n.Policy = ch.typ, ch.device, &policy
			n.Hooknum, n.Priority = hooks[ch.hook], priorities[ch.priority]
			if n.Hooknum == nil || n.Priority == nil {
				return fmt.Errorf("chain %s: unknown hook %q or priority %q", ch.name, ch.hook, ch.priority)
			}
		}
		chains[i] = c.AddChain(n)
	}
	for i, ch := range r.chains {
		if err := addRules(c, t, chains[i], ch.rules); err != nil {
			return err
		}
	}
	return nil
}

// closingMu is held while a time-out is put into a message: the library does so
// in a map that all share.
var closingMu sync.Mutex

func (cl closing) add(c *nftables.Conn, t *nftables.Table) {
	closingMu.Lock()
	defer closingMu.Unlock()
	c.AddObj(&nftables.NamedObj{Table: t, Name: cl.name, Type: nftables.ObjTypeCtTimeout, Obj: &expr.CtTimeout{
		L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP,
		Policy: expr.CtStatePolicyTimeout{
			expr.CtStateTCPESTABLISHED: 432000, // the kernel's, which the library has otherwise
			expr.CtStateTCPTIMEWAIT:    cl.secs,
			expr.CtStateTCPCLOSE:       cl.secs,
		},
	}})
}

// setID numbers the sets within a transaction; the kernel names them.
var setID atomic.Uint32

// addRules queues rules at a chain's end, with the sets that they look in. A
// set has no name and goes with its rule.
func addRules(c *nftables.Conn, t *nftables.Table, ch *nftables.Chain, rules []rule) error {
	for _, r := range rules {
		var es []expr.Any
		for _, tm := range r {
			es = append(es, tm.exprs...)
			if len(tm.in) == 0 {
				continue
			}
			// The library's own numbering is not safe for concurrent use.
			set := &nftables.Set{
				Table: t, ID: setID.Add(1), Name: "__set%d",
				Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeIPAddr,
			}
			var elems []nftables.SetElement
			for _, rg := range tm.in {
				elems = append(elems, nftables.SetElement{Key: addr4(rg.first).AsSlice()})
				if rg.last != everything.last {
					elems = append(elems, nftables.SetElement{Key: addr4(rg.last + 1).AsSlice(), IntervalEnd: true})
				}
			}
			if err := c.AddSet(set, elems); err != nil {
				return fmt.Errorf("add set: %w", err)
			}
			es = append(es, &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID})
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: es})
	}
	return nil
}

// The terms. Register 1 is scratch in each.

const (
	eq = expr.CmpOpEq
	ne = expr.CmpOpNeq
)

func stmt(text string, exprs ...expr.Any) term { return term{text: text, exprs: exprs} }

func compare(op expr.CmpOp, data ...byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func cmpText(op expr.CmpOp) string {
	if op == ne {
		return "!= "
	}
	return ""
}

func iif(name string) term { return ifname("iifname", expr.MetaKeyIIFNAME, eq, name) }
func oif(name string) term { return ifname("oifname", expr.MetaKeyOIFNAME, eq, name) }

func oifNot(name string) term { return ifname("oifname", expr.MetaKeyOIFNAME, ne, name) }

// ifname matches a link by name; a trailing * by the prefix.
func ifname(text string, key expr.MetaKey, op expr.CmpOp, name string) term {
	data, wild := []byte(name), strings.HasSuffix(name, "*")
	if wild {
		data = data[:len(data)-1]
	} else {
		data = append(data, make([]byte, unix.IFNAMSIZ-len(data))...)
	}
	return stmt(fmt.Sprintf("%s %s%q", text, cmpText(op), name),
		&expr.Meta{Key: key, Register: 1}, compare(op, data...))
}

func notIPv4() term {
	return stmt("meta nfproto != ipv4",
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, compare(ne, unix.NFPROTO_IPV4))
}

// isIPv4 is what an IPv4 match needs before it in each family; nft does not
// show it.
func (f family) isIPv4() []expr.Any {
	switch f {
	case inet:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, compare(eq, unix.NFPROTO_IPV4)}
	case netdev:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1}, compare(eq, 0x08, 0x00)}
	}
	return nil
}

func (f family) saddr(op expr.CmpOp, p netip.Prefix) term { return f.addr("saddr", 12, op, p) }
func (f family) daddr(op expr.CmpOp, p netip.Prefix) term { return f.addr("daddr", 16, op, p) }

func (f family) addr(text string, at uint32, op expr.CmpOp, p netip.Prefix) term {
	shown := p.String()
	if p.IsSingleIP() {
		shown = p.Addr().String()
	}
	return stmt(fmt.Sprintf("ip %s %s%s", text, cmpText(op), shown),
		append(f.isIPv4(), matchPrefix(expr.PayloadBaseNetworkHeader, at, op, p)...)...)
}

func matchPrefix(base expr.PayloadBase, at uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
	addr := p.Addr().As4()
	if p.Bits()%8 == 0 && p.Bits() > 0 {
		n := p.Bits() / 8
		return []expr.Any{
			&expr.Payload{DestRegister: 1, Base: base, Offset: at, Len: uint32(n)}, compare(op, addr[:n]...),
		}
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: at, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		compare(op, addr[:]...),
	}
}

func (f family) addrIn(text string, at uint32, rs []addrRange) term {
	t := stmt(fmt.Sprintf("ip %s { %s }", text, joinRanges(rs)),
		append(f.isIPv4(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: at, Len: 4})...)
	t.in = rs
	return t
}

// daddrIn matches a destination in one of the ranges.
func (f family) daddrIn(rs []addrRange) term { return f.addrIn("daddr", 16, rs) }

func etherSaddrNot(mac net.HardwareAddr) term {
	return stmt("ether saddr != "+mac.String(),
		&expr.Meta{Key: expr.MetaKeyIIFTYPE, Register: 1}, compare(eq, binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)...),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6}, compare(ne, mac...))
}

func arpSaddr(a netip.Addr) term {
	return stmt("arp saddr ip "+a.String(),
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1}, compare(eq, 0x08, 0x06),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 14, Len: 4}, compare(eq, a.AsSlice()...))
}

// noReturnPath: packets to the source would not leave by the link that this
// one came in by.
func noReturnPath() term {
	return stmt("fib saddr . iif oif 0",
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true}, compare(eq, 0, 0, 0, 0))
}

func icmpType(name string, n byte) term {
	return stmt("icmp type "+name,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(eq, unix.IPPROTO_ICMP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, compare(eq, n))
}

// hasBits matches if register 1, a native-endian word, has one of the bits.
func hasBits(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(ne, 0, 0, 0, 0),
	}
}

func ctState(text string, bits uint32) term {
	return stmt("ct state "+text, append([]expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}, hasBits(bits)...)...)
}

func established() term {
	return ctState("established,related", expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

func invalid() term { return ctState("invalid", expr.CtStateBitINVALID) }

// dnatted: the connection's destination was translated (IPS_DST_NAT).
func dnatted() term {
	return stmt("ct status dnat", append([]expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}}, hasBits(1<<5)...)...)
}

// unconfirmed: the packet is the first of a connection that the kernel does not
// know yet. If it is dropped here, nothing of it is kept.
func unconfirmed() term {
	return stmt("ct status ! confirmed",
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(1 << 3), Xor: make([]byte, 4)},
		compare(eq, 0, 0, 0, 0))
}

// closes gives a connection that is not known yet the time-out of that name.
func closes(name string) term {
	return stmt(fmt.Sprintf("ct timeout set %q", name), &expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: name})
}

// sourceOver matches if the connections of the packet's source address, of which
// only the bits in mask count, are more than n.
func sourceOver(set string, mask uint32, n int) term {
	key, masked := append(inet.isIPv4(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}), ""
	if mask != math.MaxUint32 {
		m := binaryutil.BigEndian.PutUint32(mask)
		key = append(key, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: m, Xor: make([]byte, 4)})
		masked = " & " + netip.AddrFrom4([4]byte(m)).String()
	}
	over := connectionsOver(n)
	return stmt(fmt.Sprintf("add @%s { ip saddr%s %s }", set, masked, over.text),
		append(key, &expr.Dynset{SrcRegKey: 1, SetName: set, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: over.exprs})...)
}

// marked: the packet is of a socket with this mark, which takes privilege to
// set. The mark ends with the namespace.
func marked(mark uint32) term {
	return stmt(fmt.Sprintf("meta mark 0x%08x", mark),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, compare(eq, binaryutil.NativeEndian.PutUint32(mark)...))
}

func isTCP() term {
	return stmt("meta l4proto tcp",
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(eq, unix.IPPROTO_TCP))
}

func replyDirection() term {
	return stmt("ct direction reply", &expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, compare(eq, 1))
}

// synMSSToMTU lowers the segment size that a TCP handshake offers to what the
// route's MTU carries, for networks that lose the ICMP message saying so.
func synMSSToMTU() term {
	return stmt("tcp flags syn tcp option maxseg size set rt mtu",
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(eq, unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{2}, Xor: []byte{0}},
		compare(ne, 0),
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})
}

func dport(proto byte, port uint16) term {
	return stmt(fmt.Sprintf("%s dport %d", protocols[proto], port),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(eq, proto),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(eq, byte(port>>8), byte(port)))
}

// destinationNoted notes where a packet was going in a meter with a time-out, and counts
// it there. A rule ends here if the meter is full. proto 0 is any, without a port.
func destinationNoted(m meter, proto byte) term {
	const key, protoReg, portReg = 8, 9, 10 // registers of 4 bytes
	port := "0"
	exprs := []expr.Any{
		&expr.Payload{DestRegister: key, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: protoReg},
		&expr.Immediate{Register: portReg, Data: []byte{0, 0}},
	}
	if name := protocols[proto]; name != "" {
		port = name + " dport"
		exprs = append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare(eq, proto),
		}, exprs[0], exprs[1], &expr.Payload{DestRegister: portReg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
	}
	return stmt(fmt.Sprintf("update @%s { ip daddr . meta l4proto . %s counter }", m.name, port),
		append(exprs, &expr.Dynset{SrcRegKey: key, SetName: m.name, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}})...)
}

var protocols = map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}

// reject refuses with an error that ends a connection attempt at once.
func reject() term {
	return stmt("reject with icmp admin-prohibited",
		&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 13})
}

func verdict(text string, v expr.VerdictKind, chain string) term {
	return stmt(text, &expr.Verdict{Kind: v, Chain: chain})
}

func accept() term           { return verdict("accept", expr.VerdictAccept, "") }
func drop() term             { return verdict("drop", expr.VerdictDrop, "") }
func jump(chain string) term { return verdict("jump "+chain, expr.VerdictJump, chain) }
func leap(chain string) term { return verdict("goto "+chain, expr.VerdictGoto, chain) }
func back() term             { return verdict("return", expr.VerdictReturn, "") }

func masquerade() term { return stmt("masquerade", &expr.Masq{}) }

func dnat(to netip.Addr) term { return nat("dnat", expr.NATTypeDestNAT, to) }
func snat(to netip.Addr) term { return nat("snat", expr.NATTypeSourceNAT, to) }

func nat(text string, typ expr.NATType, to netip.Addr) term {
	return stmt(text+" to "+to.String(),
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.NAT{Type: typ, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1})
}

// dnatTo translates address and port; the rule must say which protocol before.
func dnatTo(to netip.AddrPort) term {
	return stmt("dnat to "+to.String(),
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2})
}

// transact sends what fill queues as one nftables transaction, in the network
// namespace of the calling thread.
func transact(fill func(c *nftables.Conn) error) error {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	if err := fill(c); err != nil {
		return err
	}
	return c.Flush()
}

// look reads tables of the calling thread's network namespace, as they are at one moment.
// read begins anew when another program has changed its own while it ran.
func look(read func(c *nftables.Conn) error) error {
	return nftgen.Steady(func() error { return transact(read) })
}

// addTables adds tables that are known not to be there.
func addTables(rs ...ruleset) error {
	return transact(func(c *nftables.Conn) error {
		for _, r := range rs {
			if err := r.add(c); err != nil {
				return err
			}
		}
		return nil
	})
}

// refillTable makes a table hold r, whatever it held. Chains that are there
// stay, so that there is no moment in which a packet meets an empty one; only
// if theirs is another definition, an earlier version's, is the table made
// anew.
func refillTable(r ruleset) error {
	err := transact(func(c *nftables.Conn) error {
		t := c.AddTable(r.nftTable())
		sets, err := c.GetSets(t)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("list sets: %w", err)
		}
		c.FlushTable(t)
		for _, s := range sets {
			// A meter's elements keep the number that they began with, so one
			// with another number has another name.
			if s.Dynamic && !slices.ContainsFunc(r.meters, func(m meter) bool { return m.name == s.Name }) {
				c.DelSet(s)
			}
		}
		return r.add(c)
	})
	if err == nil {
		return nil
	}
	return transact(func(c *nftables.Conn) error {
		queueRemoval(c, r)
		return r.add(c)
	})
}

func removeTable(r ruleset) error {
	return transact(func(c *nftables.Conn) error {
		queueRemoval(c, r)
		return nil
	})
}

// queueRemoval adds the table before it deletes it, so that the deletion
// succeeds whether or not it was there.
func queueRemoval(c *nftables.Conn, r ruleset) {
	t := r.nftTable()
	c.AddTable(t)
	c.DelTable(t)
}
