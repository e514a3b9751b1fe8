// Package nftgen reads nftables' objects as they are at one moment, while other programs
// change theirs.
package nftgen

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	tries = 20
	pause = 5 * time.Millisecond
)

// Steady calls read until nothing in the calling thread's network namespace has changed
// while it ran, 20 times at most; then the last answer counts. A list that a change cuts
// short looks whole, for the library does not say so, and what one list names may be gone
// when the next is asked for, which is an error. read begins anew each time.
func Steady(read func() error) error { return steady(generation, read) }

func steady(generation func() (uint32, error), read func() error) error {
	before, err := generation()
	if err != nil {
		return err
	}
	for n := 1; ; n++ {
		err := read()
		after, genErr := generation()
		if genErr != nil {
			return errors.Join(err, genErr)
		}
		if after == before || n == tries {
			return err
		}
		time.Sleep(min(time.Duration(n)*time.Millisecond, pause))
		if before, err = generation(); err != nil {
			return err
		}
	}
}

// generation is the number of the last change of any table. The kernel begins with 1.
func generation() (uint32, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	answers, err := req.Execute(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN)
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of the rules: %w", err)
	}
	for _, data := range answers {
		if len(data) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(data[nl.SizeofNfgenmsg:])
		if err != nil {
			return 0, fmt.Errorf("read the generation of the rules: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_GEN_ID && len(a.Value) == 4 {
				return binary.BigEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, errors.New("the kernel does not tell the generation of the rules")
}
