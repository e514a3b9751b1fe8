package network

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestListedTriesAgain(t *testing.T) {
	calls := 0
	got, err := listed(func() ([]int, error) {
		if calls++; calls < 3 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(got) != 2 || calls != 3 {
		t.Errorf("%v, %v after %d calls", got, err, calls)
	}
	boom := errors.New("boom")
	calls = 0
	if _, err := listed(func() ([]int, error) { calls++; return nil, boom }); !errors.Is(err, boom) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
	if _, err := listed(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("%v", err)
	}
}
