package network

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestShareOf(t *testing.T) {
	for table, want := range map[int]tableShare{
		262144: {2048, 4096, 4096},
		65536:  {512, 1024, 1024},
		100:    {64, 128, 64},
	} {
		if got := shareOf(table); got != want {
			t.Errorf("%d: %+v, want %+v", table, got, want)
		}
	}
	s := shareOf(262144)
	for n, want := range map[int]int{0: 2048, 1: 1, 2048: 2048, 1 << 30: 2048} {
		if got := s.clamp(n); got != want {
			t.Errorf("clamp(%d) = %d, want %d", n, got, want)
		}
	}
}

// tracked is how many connections the table of a namespace holds, the host's if
// ns is not open.
func tracked(t testing.TB, ns netns.NsHandle) (n int) {
	t.Helper()
	read := func() {
		b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		must(t, err)
		n, err = strconv.Atoi(strings.TrimSpace(string(b)))
		must(t, err)
	}
	if ns.IsOpen() {
		in(t, ns, read)
	} else {
		read()
	}
	return n
}

// tcpFrame is an Ethernet frame with a TCP segment that has no data.
func tcpFrame(dst netip.AddrPort, port uint16, flags, ttl byte, seq uint32) []byte {
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	be := binary.BigEndian
	f := udpFrame(gw, mac, GuestAddr.Addr(), dst.Addr(), 0, strings.Repeat("\x00", 12))
	ip, tcp := f[14:34], f[34:]
	ip[8], ip[9] = ttl, unix.IPPROTO_TCP
	be.PutUint16(ip[10:], 0)
	be.PutUint16(ip[10:], sumOf(0, ip))
	clear(tcp)
	be.PutUint16(tcp, port)
	be.PutUint16(tcp[2:], dst.Port())
	be.PutUint32(tcp[4:], seq)
	tcp[12], tcp[13] = 5<<4, flags
	be.PutUint16(tcp[14:], 65535)
	be.PutUint16(tcp[16:], sumOf(uint32(unix.IPPROTO_TCP+len(tcp)), append(ip[12:20:20], tcp...)))
	return f
}

func sumOf(sum uint32, b []byte) uint16 {
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func icmpFrame(dst netip.Addr, id uint16) []byte {
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	be := binary.BigEndian
	f := udpFrame(gw, mac, GuestAddr.Addr(), dst, 0, "")
	ip, icmp := f[14:34], f[34:]
	ip[9] = unix.IPPROTO_ICMP
	be.PutUint16(ip[10:], 0)
	be.PutUint16(ip[10:], sumOf(0, ip))
	clear(icmp)
	icmp[0] = 8
	be.PutUint16(icmp[4:], id)
	be.PutUint16(icmp[2:], sumOf(0, icmp))
	return f
}

// small lets n's sandboxes take little of the host's table, which is empty then.
func small(t testing.TB, n *Network, s tableShare) {
	t.Helper()
	n.share = s
	n.opts.Limits.Connections = s.clamp(0)
	must(t, n.Setup(t.Context()))
	// What earlier tests left would end while this one counts.
	must(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
}

// A guest that begins connections as fast as it can, of whatever kind, takes of
// the host's table what is its own, and nothing that others need.
func TestFloodOfConnections(t *testing.T) {
	const sh, syn, rst = 64, 2, 4
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	nowhere := netip.MustParseAddr("198.51.100.9")
	for name, send := range map[string]func(g *guest, i int){
		"udp": func(g *guest, i int) {
			g.tap.Write(udpFrame(gw, mac, GuestAddr.Addr(), nowhere, uint16(i), "x"))
		},
		"icmp": func(g *guest, i int) { g.tap.Write(icmpFrame(nowhere, uint16(i))) },
		"syn": func(g *guest, i int) {
			g.tap.Write(tcpFrame(netip.AddrPortFrom(nowhere, 80), uint16(i), syn, 64, 7))
		},
		// Both tables see the end, and forget it at once.
		"syn, rst": func(g *guest, i int) {
			g.tap.Write(tcpFrame(netip.AddrPortFrom(nowhere, 80), uint16(i), syn, 64, 7))
			g.tap.Write(tcpFrame(netip.AddrPortFrom(nowhere, 80), uint16(i), rst, 64, 8))
		},
		// The host's table does not.
		"syn, rst that does not arrive": func(g *guest, i int) {
			g.tap.Write(tcpFrame(netip.AddrPortFrom(nowhere, 80), uint16(i), syn, 64, 7))
			g.tap.Write(tcpFrame(netip.AddrPortFrom(nowhere, 80), uint16(i), rst, 1, 8))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := world(t, Options{})
			small(t, n, tableShare{sandbox: sh, meter: 2 * sh, begun: 1 << 20})
			_, a, g := open(t, n)
			ns, err := netns.GetFromPath(a.NetNSPath)
			must(t, err)
			defer ns.Close()
			base := tracked(t, here)
			most, mostNS := 0, 0
			i := 0
			for begin := time.Now(); time.Since(begin) < 4*time.Second; {
				for range 100 {
					i++
					send(g, i)
				}
				most, mostNS = max(most, tracked(t, here)-base), max(mostNS, tracked(t, ns))
			}
			t.Logf("%d tries: at most %d of the host's table, %d of the namespace's", i, most, mostNS)
			// Those that are refused are there for the moment of it.
			bound, boundNS := sh+sh/4, sh+sh/4
			if strings.Contains(name, "rst") { // what ends is bounded by how fast it begins
				boundNS = 2*minBegin + 5*minBegin
			}
			if name == "syn, rst" {
				bound = boundNS
			} else if most < sh {
				t.Errorf("a sandbox took only %d of the host's table", most)
			}
			if most > bound || mostNS > boundNS {
				t.Errorf("a sandbox took %d of the host's table, %d of its own, want up to %d and %d", most, mostNS, bound, boundNS)
			}
			serve(t, internet, internetAddr, 7050)
			_, _, other := open(t, n)
			if ask(t, here, "tcp", internetAddr, 7050, timeout) == "" || ask(t, other.ns, "tcp", internetAddr, 7050, timeout) == "" {
				t.Error("a connection of the host's or of another sandbox does not work")
			}
		})
	}
}

// Connections that have ended are in no number of connections. How fast they
// may begin bounds them.
func TestFloodOfEnded(t *testing.T) {
	const sh = 64
	n := world(t, Options{})
	small(t, n, tableShare{sandbox: sh, meter: 2 * sh, begun: 1 << 20})
	_, a, g := open(t, n)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	far := serve(t, internet, internetAddr, 7052)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-far.got:
			}
		}
	})
	var ended atomic.Int64
	for range 8 {
		wg.Go(func() {
			in(t, g.ns, func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if c, err := net.DialTimeout("tcp4", far.addr.String(), 100*time.Millisecond); err == nil {
						io.Copy(io.Discard, c)
						c.Close()
						ended.Add(1)
					}
				}
			})
		})
	}
	base, most := tracked(t, here), 0
	for begin := time.Now(); time.Since(begin) < 7*time.Second; time.Sleep(5 * time.Millisecond) {
		most = max(most, tracked(t, here)-base, tracked(t, ns))
	}
	close(stop)
	wg.Wait()
	t.Logf("%d connections made and ended: at most %d in a table", ended.Load(), most)
	// The kernel may tidy up once a minute only.
	if bound := 2*minBegin + minBegin*8; most > bound || ended.Load() < 200 {
		t.Errorf("%d connections, which have ended, take %d of a table, want up to %d", ended.Load(), most, bound)
	}
}

// Sandboxes together take what is theirs, each its share at most.
func TestFloodOfManySandboxes(t *testing.T) {
	n := world(t, Options{})
	// All share one meter.
	small(t, n, tableShare{sandbox: 64, meter: 96, begun: 1 << 20})
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	nowhere := netip.MustParseAddr("198.51.100.9")
	var guests []*guest
	for i := 1; len(guests) < 3; i += shares {
		s := Slot(1000*shares + i)
		if s > MaxSlot {
			s -= 500 * shares
		}
		must(t, n.Claim(s))
		must(t, n.Close(t.Context(), s))
		must(t, n.Release(s))
		n.slots.mu.Lock()
		n.slots.last = s - 1
		n.slots.mu.Unlock()
		got, _, g := open(t, n)
		if got != s {
			t.Fatalf("slot %d, want %d", got, s)
		}
		guests = append(guests, g)
	}
	base := tracked(t, here)
	for i := range 300 {
		for _, g := range guests {
			g.tap.Write(udpFrame(gw, mac, GuestAddr.Addr(), nowhere, uint16(i), "x"))
		}
	}
	// The last frames may be on their way.
	got := 0
	for deadline := time.Now().Add(timeout); got < 64 && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		got = tracked(t, here) - base
	}
	if got < 64 || got > 96+8 {
		t.Errorf("three sandboxes took %d of the host's table, want up to 96", got)
	}
}

// All sandboxes together begin so many connections in a second.
func TestBeginningsOfAll(t *testing.T) {
	n := world(t, Options{})
	small(t, n, tableShare{sandbox: 1000, meter: 2000, begun: 100})
	_, _, g := open(t, n)
	gw, _ := net.ParseMAC(TapMAC)
	mac, _ := net.ParseMAC(GuestMAC)
	base, begin := tracked(t, here), time.Now()
	for i := range 900 {
		g.tap.Write(udpFrame(gw, mac, GuestAddr.Addr(), netip.MustParseAddr("198.51.100.9"), uint16(i+1), "x"))
	}
	// The last frames may be on their way.
	got := 0
	for deadline := begin.Add(timeout); got < 190 && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		got = tracked(t, here) - base
	}
	most := 200 + int(time.Since(begin).Seconds()*100) + 10
	if got < 190 || got > most {
		t.Errorf("%d connections at once, want up to %d", got, most)
	}
}

// What ends is forgotten soon, in both directions.
func TestClosedIsForgotten(t *testing.T) {
	n := world(t, Options{})
	_, a, g := open(t, n)
	serve(t, g.ns, netip.IPv4Unspecified(), 49983)
	serve(t, internet, internetAddr, 7051)
	ns, err := netns.GetFromPath(a.NetNSPath)
	must(t, err)
	defer ns.Close()
	if ask(t, g.ns, "tcp", internetAddr, 7051, timeout) == "" || ask(t, here, "tcp", a.HostIP, 49983, timeout) == "" {
		t.Fatal("a connection does not work")
	}
	// kept is for how many seconds each connection of the sandbox's is kept.
	kept := func() (secs []uint32) {
		flows, err := listed(func() ([]*netlink.ConntrackFlow, error) {
			return netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		})
		must(t, err)
		for _, f := range flows {
			ours := f.Forward.SrcIP.Equal(a.HostIP.AsSlice()) || f.Forward.DstIP.Equal(a.HostIP.AsSlice()) ||
				f.Forward.SrcIP.Equal(GuestAddr.Addr().AsSlice())
			if f.Forward.Protocol == unix.IPPROTO_TCP && ours {
				secs = append(secs, f.TimeOut)
			}
		}
		return secs
	}
	for where, look := range map[string]func() []uint32{
		"host":      kept,
		"namespace": func() (secs []uint32) { in(t, ns, func() { secs = kept() }); return secs },
	} {
		// The last packets may be on their way.
		for deadline := time.Now().Add(timeout); ; time.Sleep(5 * time.Millisecond) {
			secs := look()
			if len(secs) < 2 {
				t.Errorf("%s: %d connections, want those in both directions", where, len(secs))
			} else if slices.Max(secs) > closedSecs && time.Now().Before(deadline) {
				continue
			} else if slices.Max(secs) > closedSecs {
				t.Errorf("%s: connections that have ended are kept for %d s", where, secs)
			}
			break
		}
	}
}

// The meters' elements go when there is nothing to count, and a meter of another
// number takes the place of the old one.
func TestMeters(t *testing.T) {
	testenv.Program(t, "nft")
	n := world(t, Options{})
	names := func() (out []string) {
		c, err := nftables.New()
		must(t, err)
		sets, err := c.GetSets(&nftables.Table{Family: nftables.TableFamilyINet, Name: "tnet"})
		must(t, err)
		for _, s := range sets {
			if s.Dynamic {
				out = append(out, s.Name)
			}
		}
		return out
	}
	small(t, n, tableShare{sandbox: 7, meter: 9, begun: 100})
	must(t, n.Setup(t.Context()))
	if got := fmt.Sprint(names()); got != "[one-7 some-9]" {
		t.Errorf("meters: %s", got)
	}
	kernelHolds(t, n.hostRules())
}
