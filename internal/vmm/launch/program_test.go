package launch

import "testing"

func TestAtLeast(t *testing.T) {
	for _, c := range []struct {
		version string
		want    bool // since 8.1
	}{{"7.2.22", false}, {"8.0.9", false}, {"8.1.0", true}, {"8.10.0", true}, {"9.0.0", true}, {"10.0.0", true}, {"", false}} {
		if got := AtLeast(c.version, 8, 1); got != c.want {
			t.Errorf("%q: %v", c.version, got)
		}
	}
}
