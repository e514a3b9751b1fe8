package host

import (
	"fmt"
	"runtime"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// probeNetwork makes a network namespace and a table with a masquerading
// chain in it. Both end with the thread that they were made on: it is locked
// and never given back.
func probeNetwork() networkProbe {
	result := make(chan networkProbe)
	go func() {
		runtime.LockOSThread()
		var p networkProbe
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			p.netns = fmt.Errorf("make network namespace: %w", err)
		} else {
			p.nft = probeNFT()
		}
		result <- p
	}()
	return <-result
}

func probeNFT() error {
	// The socket belongs to the namespace of the thread that opens it, so it
	// is opened here and not at the first use.
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("talk to nftables: %w", err)
	}
	defer c.CloseLasting()
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "wrenn-doctor"})
	chain := c.AddChain(&nftables.Chain{
		Name: "post", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Masq{}}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add a table with NAT: %w", err)
	}
	return nil
}
