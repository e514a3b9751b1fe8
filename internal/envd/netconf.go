package envd

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// upLoopback brings lo up; the kernel gives it its addresses.
func upLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// upEthernet gives eth0 its address and the default route. It uses no
// paths, because the root changes at the same time.
func upEthernet(p guestapi.Boot) error {
	eth, err := waitLink("eth0", deviceTimeout)
	if err != nil {
		return err
	}
	// The address comes before the link is up, so that the kernel announces it.
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   p.Addr.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Addr.Bits(), p.Addr.Addr().BitLen()),
	}}
	if err := netlink.AddrReplace(eth, addr); err != nil {
		return fmt.Errorf("set eth0's address: %w", err)
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return fmt.Errorf("set eth0 up: %w", err)
	}
	if !p.Gateway.IsValid() {
		return nil
	}
	route := &netlink.Route{LinkIndex: eth.Attrs().Index, Gw: p.Gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set the default route: %w", err)
	}
	return nil
}

// downEthernet takes eth0 down, if there is one.
func downEthernet() error {
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil
	}
	return netlink.LinkSetDown(eth)
}

func waitLink(name string, timeout time.Duration) (netlink.Link, error) {
	deadline := time.Now().Add(timeout)
	for {
		link, err := netlink.LinkByName(name)
		if err == nil {
			return link, nil
		}
		var missing netlink.LinkNotFoundError
		if !errors.As(err, &missing) && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("find %s: %w", name, err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no %s after %v", name, timeout)
		}
		time.Sleep(pollInterval)
	}
}
