package host

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/osthread"
)

// probeNetwork makes a network namespace and a table with a masquerading chain
// in it. Both end with the thread that made them.
func probeNetwork() (p networkProbe) {
	p.netns = osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		p.nft = probeNFT()
		return nil
	})
	return p
}

func probeNFT() error {
	// A socket belongs to the namespace of the thread that opens it. A lasting
	// connection opens its socket here, and not at the first use.
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
