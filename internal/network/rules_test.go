package network

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// The rule sets as text; that the kernel holds the same is shown elsewhere.
func TestRulesGolden(t *testing.T) {
	p := DefaultPlan()
	var slot strings.Builder
	for _, r := range slotRules(p, p.Addrs(7)) {
		slot.WriteString(r.String())
	}
	for file, got := range map[string]string{
		"testdata/host.nft":   hostRules(p).String(),
		"testdata/slot-7.nft": slot.String(),
	} {
		if *update {
			must(t, os.WriteFile(file, []byte(got), 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if d := cmp.Diff(string(want), got); d != "" {
			t.Errorf("%s (-want +got):\n%s", file, d)
		}
	}
}

// Two slots' rules differ in the slots' own addresses and nothing else.
func TestSlotRulesDifferInAddressesOnly(t *testing.T) {
	p := DefaultPlan()
	text := func(s Slot) string {
		a := p.Addrs(s)
		var b strings.Builder
		for _, r := range slotRules(p, a) {
			b.WriteString(r.String())
		}
		return strings.NewReplacer(a.HostIP.String(), "HOST", a.HostVeth.Addr().String(), "LINK").Replace(b.String())
	}
	if d := cmp.Diff(text(1), text(MaxSlot)); d != "" {
		t.Errorf("slots 1 and %d differ (-1 +max):\n%s", MaxSlot, d)
	}
}
