package guestapi

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestCmdline(t *testing.T) {
	boot := Boot{
		Addr:     netip.MustParsePrefix("169.254.0.21/30"),
		Gateway:  netip.MustParseAddr("169.254.0.22"),
		DNS:      []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")},
		Hostname: "sb-0123456789abcdef",
	}
	disks := Disks{Base: "vdc", Overlay: "vdd"}
	const want = "wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-0123456789abcdef " +
		"wrenn.dns=1.1.1.1,8.8.8.8 wrenn.base=vdc wrenn.overlay=vdd GODEBUG=asyncpreemptoff=1"
	line := Cmdline(boot, disks)
	if line != want {
		t.Errorf("got  %s\nwant %s", line, want)
	}
	// The guest reads what the host wrote.
	b, d, err := ParseCmdline("console=ttyS0 " + line + " panic=1")
	if err != nil || !reflect.DeepEqual(b, boot) || d != disks {
		t.Errorf("read back %+v, %+v, %v", b, d, err)
	}
	if got, want := Cmdline(Boot{Probe: true}, Disks{}), "wrenn.probe=1 GODEBUG=asyncpreemptoff=1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseCmdline(t *testing.T) {
	disks := Disks{Base: "vda", Overlay: "vdb"}
	defaults := Boot{Hostname: "sandbox"}
	full := Boot{
		Addr: netip.MustParsePrefix("169.254.0.21/30"), Gateway: netip.MustParseAddr("169.254.0.22"),
		DNS:      []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")},
		Hostname: "sb-1",
	}
	for _, tt := range []struct {
		name, cmdline string
		want          Boot
		disks         Disks
		err           string
	}{
		{"nothing", "", defaults, disks, ""},
		{"other keys", "console=ttyS0 ro quiet ip=1.2.3.4", defaults, disks, ""},
		{"unknown key of ours", "wrenn.later=x", defaults, disks, ""},
		{"everything", "quiet wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8 wrenn.base=vdc wrenn.overlay=vdd\n", full, Disks{"vdc", "vdd"}, ""},
		{"probe", "wrenn.probe=1", Boot{Hostname: "sandbox", Probe: true}, disks, ""},
		{"address without prefix", "wrenn.ip=1.2.3.4", Boot{}, Disks{}, "parse wrenn.ip"},
		{"bad gateway", "wrenn.gw=x", Boot{}, Disks{}, "parse wrenn.gw"},
		{"bad server", "wrenn.dns=1.1.1.1,", Boot{}, Disks{}, "parse wrenn.dns"},
		{"empty name", "wrenn.hostname=", Boot{}, Disks{}, "invalid host name"},
		{"name with a slash", "wrenn.hostname=a/b", Boot{}, Disks{}, "invalid host name"},
		{"device elsewhere", "wrenn.base=../etc/passwd", Boot{}, Disks{}, "invalid device name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, gotDisks, err := ParseCmdline(tt.cmdline)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, tt.want) || gotDisks != tt.disks {
				t.Errorf("got %+v, %+v, %v; want %+v, %+v", got, gotDisks, err, tt.want, tt.disks)
			}
		})
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8")
	f.Add("wrenn.base=vda wrenn.overlay=vdb wrenn.probe=1")
	f.Fuzz(func(t *testing.T, cmdline string) {
		b, d, err := ParseCmdline(cmdline)
		if err != nil {
			return
		}
		for _, name := range []string{d.Base, d.Overlay, b.Hostname} {
			if name == "" || len(name) > 64 || strings.ContainsAny(name, "/ \x00\n,=") {
				t.Errorf("%q leads to %q", cmdline, name)
			}
		}
	})
}
