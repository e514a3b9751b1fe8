package network

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetGuest deletes what the guest began from the calling thread's namespace.
func forgetGuest() error {
	_, err := forget(func(f *netlink.ConntrackFilter) error {
		return f.AddIP(netlink.ConntrackOrigSrcIP, GuestAddr.Addr().AsSlice())
	})
	return err
}

// forgetAll forgets until a look at the whole table finds nothing.
func forgetAll(describe ...func(*netlink.ConntrackFilter) error) error {
	for range 5 {
		if found, err := forget(describe...); found == 0 || err != nil {
			return err
		}
	}
	return errors.New("forget connections: new ones keep coming")
}

// noneTracked says that the calling thread's namespace has no connections. A look
// for certain ones walks the kernel's whole table, that of all namespaces.
func noneTracked() bool {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// forget deletes the connections that any of the filters describes from the
// calling thread's namespace, and says how many there were.
func forget(describe ...func(*netlink.ConntrackFilter) error) (found uint, err error) {
	if noneTracked() {
		return 0, nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("open conntrack: %w", err)
	}
	defer h.Close()
	var filters []netlink.CustomConntrackFilter
	for _, d := range describe {
		f := new(netlink.ConntrackFilter)
		if err := d(f); err != nil {
			return 0, fmt.Errorf("describe connections: %w", err)
		}
		filters = append(filters, f)
	}
	found, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filters...)
	if err != nil {
		return found, fmt.Errorf("forget connections: %w", err)
	}
	return found, nil
}
