package envd

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseCmdline(t *testing.T) {
	full := BootParams{
		Addr: netip.MustParsePrefix("169.254.0.21/30"), Gateway: netip.MustParseAddr("169.254.0.22"),
		DNS:      []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")},
		Hostname: "sb-1", Base: "vdc", Overlay: "vdd",
	}
	defaults := BootParams{Hostname: "sandbox", Base: "vda", Overlay: "vdb"}
	probe := defaults
	probe.Probe = true
	for _, tt := range []struct {
		name, cmdline string
		want          BootParams
		err           string
	}{
		{"nothing", "", defaults, ""},
		{"other keys", "console=ttyS0 ro quiet ip=1.2.3.4", defaults, ""},
		{"unknown key of ours", "wrenn.later=x", defaults, ""},
		{"everything", "quiet wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8 wrenn.base=vdc wrenn.overlay=vdd\n", full, ""},
		{"probe", "wrenn.probe=1", probe, ""},
		{"address without prefix", "wrenn.ip=1.2.3.4", BootParams{}, "parse wrenn.ip"},
		{"bad gateway", "wrenn.gw=x", BootParams{}, "parse wrenn.gw"},
		{"bad server", "wrenn.dns=1.1.1.1,", BootParams{}, "parse wrenn.dns"},
		{"empty name", "wrenn.hostname=", BootParams{}, "invalid host name"},
		{"name with a slash", "wrenn.hostname=a/b", BootParams{}, "invalid host name"},
		{"device elsewhere", "wrenn.base=../etc/passwd", BootParams{}, "invalid device name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseCmdline(tt.cmdline)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			same := err == nil && slices.Equal(got.DNS, tt.want.DNS)
			got.DNS, tt.want.DNS = nil, nil
			if !same || got.Addr != tt.want.Addr || got.Gateway != tt.want.Gateway || got.Hostname != tt.want.Hostname ||
				got.Base != tt.want.Base || got.Overlay != tt.want.Overlay || got.Probe != tt.want.Probe {
				t.Errorf("got %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8")
	f.Add("wrenn.base=vda wrenn.overlay=vdb wrenn.probe=1")
	f.Fuzz(func(t *testing.T, cmdline string) {
		p, err := ParseCmdline(cmdline)
		if err != nil {
			return
		}
		for _, name := range []string{p.Base, p.Overlay, p.Hostname} {
			if name == "" || len(name) > 64 || strings.ContainsAny(name, "/ \x00\n,=") {
				t.Errorf("%q leads to %q", cmdline, name)
			}
		}
	})
}
