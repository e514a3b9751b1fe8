package testenv

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Other tests make and remove tables while an inventory is taken. It is taken all the
// same, and has all that was there from the beginning to the end.
func TestInventoryWhileOthersChange(t *testing.T) {
	Root(t)
	runtime.LockOSThread() // and the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseLasting()
	if err := fill(c, "stays", 50); err != nil {
		t.Fatal(err)
	}
	list := func() (Inventory, error) {
		p := Inventory{}
		err := nft(func(format string, args ...any) {
			if line := fmt.Sprintf(format, args...); strings.Contains(line, "stays") {
				p[line] = true
			}
		})
		return p, err
	}
	want, err := list()
	if err != nil || len(want) < 50 {
		t.Fatalf("%d lines, %v", len(want), err)
	}
	for range 50 {
		// Its socket is of this namespace, on whatever thread.
		changed := make(chan error)
		go func() { changed <- change(c) }()
		got, err := list()
		if err := errors.Join(err, <-changed); err != nil {
			t.Fatal(err)
		}
		for _, line := range want.Diff(got) {
			t.Error(line)
		}
	}
}

// fill makes a table with a set and many chains.
func fill(c *nftables.Conn, name string, chains int) error {
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	for n := range chains {
		c.AddChain(&nftables.Chain{Table: t, Name: fmt.Sprintf("chain%d", n)})
		if n%10 == 0 { // more answers than these do not fit into the socket
			if err := c.Flush(); err != nil {
				return err
			}
		}
	}
	set := &nftables.Set{Table: t, Name: "set", KeyType: nftables.TypeIPAddr}
	if err := c.AddSet(set, []nftables.SetElement{{Key: []byte{192, 0, 2, 1}}}); err != nil {
		return err
	}
	return c.Flush()
}

// change makes and removes a table, less often than the other side tries: each of the
// three changes may be in the way of one attempt of 20.
func change(c *nftables.Conn) (err error) {
	for range 6 {
		err = errors.Join(err, fill(c, "goes", 1))
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "goes"})
		err = errors.Join(err, c.Flush())
	}
	return err
}
