package nftgen

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

func TestSteady(t *testing.T) {
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		generations []uint32 // before and after each read
		errs        []error  // of the reads
		reads       int
		want        error
	}{
		"nothing changes":    {[]uint32{1, 1}, []error{nil}, 1, nil},
		"an error by itself": {[]uint32{1, 1}, []error{gone}, 1, gone},
		"a list cut short":   {[]uint32{1, 2, 2, 2}, []error{nil, nil}, 2, nil},
		"something goes":     {[]uint32{1, 2, 3, 4, 4, 4}, []error{gone, gone, nil}, 3, nil},
	} {
		t.Run(name, func(t *testing.T) {
			asked, reads := 0, 0
			err := steady(func() (uint32, error) { asked++; return c.generations[asked-1], nil },
				func() error { reads++; return c.errs[reads-1] })
			if !errors.Is(err, c.want) || reads != c.reads {
				t.Errorf("%v after %d reads", err, reads)
			}
		})
	}
	var n uint32
	reads := 0
	err := steady(func() (uint32, error) { n++; return n, nil }, func() error { reads++; return gone })
	if !errors.Is(err, gone) || reads != tries {
		t.Errorf("while all changes: %v after %d reads", err, reads)
	}
}

// The kernel's number changes with each table, and with nothing else.
func TestGeneration(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("it makes a network namespace: run it as root")
	}
	runtime.LockOSThread() // and the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	last := uint32(0)
	for range 3 {
		first, err := generation()
		second, err2 := generation()
		if err := errors.Join(err, err2); err != nil || first != second || first == last {
			t.Fatalf("%d, then %d; before the change %d; %v", first, second, last, err)
		}
		last = first
		c, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "t"})
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "t"})
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
}
