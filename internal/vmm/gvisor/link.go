package gvisor

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// packetBuffer holds the frames that wait for the guest, in bytes. The default of
	// the kernel is too small for a fast sender.
	packetBuffer = 4 << 20
	// maxSegment is the largest packet that the guest gives to the host, which cuts it.
	maxSegment = 65536
	eth0       = "eth0"
)

// openPacket opens a packet socket on a link in a network namespace, or in the agent's
// if netNS is empty. The frames have a header that says how to cut them.
func openPacket(netNS, link string) (socket *os.File, mtu int, err error) {
	if netNS == "" {
		return packetOn(link)
	}
	err = osthread.Do(func() error {
		ns, err := os.Open(netNS)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		socket, mtu, err = packetOn(link)
		return err
	})
	return socket, mtu, err
}

// packetOn opens a packet socket on a link of the thread's network namespace. Until it
// is bound, which comes last, it receives nothing.
func packetOn(link string) (_ *os.File, mtu int, err error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, err
	}
	socket := os.NewFile(uintptr(fd), link)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open link %s: %w", link, err), socket.Close())
		}
	}()
	ask, err := unix.NewIfreq(link)
	if err != nil {
		return nil, 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFMTU, ask); err != nil {
		return nil, 0, err
	}
	mtu = int(ask.Uint32())
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ask); err != nil {
		return nil, 0, err
	}
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, packetBuffer},
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, packetBuffer},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return nil, 0, err
		}
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in the order of the network
	return socket, mtu, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(ask.Uint32())})
}

// network describes the guest's network, whose eth0 has that MTU; 0 for none.
func network(s vmm.Spec, mtu int) (networkArgs, error) {
	n := networkArgs{AllowConnectedOnSave: true, LoopbackLinks: []loopbackLink{loopback()}}
	if s.Link == nil {
		return n, nil
	}
	mac, err := net.ParseMAC(s.Link.MAC)
	if err != nil {
		return n, err
	}
	link := packetLink{
		Name: eth0, InterfaceIndex: 2, MTU: mtu, LinkAddress: mac,
		GSOMaxSize: maxSegment, RXChecksumOffload: true, NumChannels: 1,
	}
	if addr := s.Boot.Addr; addr.IsValid() {
		link.Addresses = []prefix{prefixOf(addr)}
		link.Routes = []route{{Destination: ipNet(addr.Masked())}}
	}
	if gw := s.Boot.Gateway; gw.IsValid() {
		n.Defaultv4Gateway = defaultRoute{
			Name:  eth0,
			Route: route{Destination: ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), Gateway: gw.AsSlice()},
		}
	}
	n.FDBasedLinks = []packetLink{link}
	return n, nil
}

func loopback() loopbackLink {
	four, six := netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")
	return loopbackLink{
		Name:      "lo",
		Addresses: []prefix{prefixOf(four), prefixOf(six)},
		Routes:    []route{{Destination: ipNet(four.Masked())}, {Destination: ipNet(six)}},
	}
}

func prefixOf(p netip.Prefix) prefix {
	return prefix{Address: p.Addr().AsSlice(), PrefixLen: p.Bits()}
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
