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
	disks := Disks{Layers: []string{"vdc"}, Overlay: "vdd"}
	const want = "wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-0123456789abcdef " +
		"wrenn.dns=1.1.1.1,8.8.8.8 wrenn.base=vdc wrenn.overlay=vdd GODEBUG=asyncpreemptoff=1"
	line := Cmdline(boot, disks)
	if line != want {
		t.Errorf("got  %s\nwant %s", line, want)
	}
	// The guest reads what the host wrote.
	b, d, err := ParseCmdline("console=ttyS0 " + line + " panic=1")
	if err != nil || !reflect.DeepEqual(b, boot) || !reflect.DeepEqual(d, disks) {
		t.Errorf("read back %+v, %+v, %v", b, d, err)
	}
	stack := Disks{Layers: []string{"vda", "vdb", "vdc"}, Overlay: "vdd"}
	line = Cmdline(boot, stack)
	if !strings.Contains(line, " wrenn.base=vda,vdb,vdc wrenn.overlay=vdd ") {
		t.Errorf("a stack: %s", line)
	}
	if _, d, err := ParseCmdline(line); err != nil || !reflect.DeepEqual(d, stack) {
		t.Errorf("read back %+v, %v", d, err)
	}
	if got, want := Cmdline(Boot{Probe: true}, Disks{}), "wrenn.probe=1 GODEBUG=asyncpreemptoff=1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseCmdline(t *testing.T) {
	disks := Disks{Layers: []string{"vda"}, Overlay: "vdb"}
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
		{"everything", "quiet wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8 wrenn.base=vdc wrenn.overlay=vdd\n", full, Disks{[]string{"vdc"}, "vdd"}, ""},
		{"probe", "wrenn.probe=1", Boot{Hostname: "sandbox", Probe: true}, disks, ""},
		{"address without prefix", "wrenn.ip=1.2.3.4", Boot{}, Disks{}, "parse wrenn.ip"},
		{"bad gateway", "wrenn.gw=x", Boot{}, Disks{}, "parse wrenn.gw"},
		{"bad server", "wrenn.dns=1.1.1.1,", Boot{}, Disks{}, "parse wrenn.dns"},
		{"empty name", "wrenn.hostname=", Boot{}, Disks{}, "invalid host name"},
		{"name with a slash", "wrenn.hostname=a/b", Boot{}, Disks{}, "invalid host name"},
		{"device elsewhere", "wrenn.base=../etc/passwd", Boot{}, Disks{}, "invalid device name"},
		{"layer elsewhere", "wrenn.base=vda,../vdb", Boot{}, Disks{}, "invalid device name"},
		{"no layer", "wrenn.base=vda,,vdb", Boot{}, Disks{}, "invalid device name"},
		{"many layers", "wrenn.base=vda" + strings.Repeat(",vdb", MaxLayers), Boot{}, Disks{}, "17 devices: want at most 16"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, gotDisks, err := ParseCmdline(tt.cmdline)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, tt.want) || !reflect.DeepEqual(gotDisks, tt.disks) {
				t.Errorf("got %+v, %+v, %v; want %+v, %+v", got, gotDisks, err, tt.want, tt.disks)
			}
		})
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 wrenn.hostname=sb-1 wrenn.dns=1.1.1.1,8.8.8.8")
	f.Add("wrenn.base=vda wrenn.overlay=vdb wrenn.probe=1")
	f.Add("wrenn.base=vda,vdb,vdc wrenn.overlay=vdd")
	f.Fuzz(func(t *testing.T, cmdline string) {
		b, d, err := ParseCmdline(cmdline)
		if err != nil {
			return
		}
		if len(d.Layers) == 0 || len(d.Layers) > MaxLayers {
			t.Errorf("%q leads to %d layers", cmdline, len(d.Layers))
		}
		for _, name := range append(d.Layers, d.Overlay, b.Hostname) {
			if name == "" || len(name) > 64 || strings.ContainsAny(name, "/ \x00\n,=") {
				t.Errorf("%q leads to %q", cmdline, name)
			}
		}
	})
}
