package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// serveConfig returns what the flags of `wrenn serve` make of arguments.
func serveConfig(t *testing.T, args ...string) (agent.Config, error) {
	t.Helper()
	var c serveFlags
	cmd := &cobra.Command{Use: "serve"}
	c.hostFlags = newHostFlags(cmd)
	c.apiFlags(cmd)
	c.networkFlags(cmd)
	c.sandboxFlags(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		return agent.Config{}, err
	}
	return c.config()
}

// withoutRoot drops the complaint of a test that is not root.
func withoutRoot(err error) string {
	if err == nil {
		return ""
	}
	lines := strings.Split(err.Error(), "\n")
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "the host agent needs root") }), "\n")
}

func TestServeFlags(t *testing.T) {
	got, err := serveConfig(t)
	if text := withoutRoot(err); text != "" {
		t.Fatalf("the defaults: %s", text)
	}
	want := agent.Defaults()
	if got.StateDir != want.StateDir || got.Listen != want.Listen || got.DiskBytes != 256<<20 || got.Capacity != want.Capacity ||
		got.Egress != network.Public || got.DestroyAtEnd || got.Warm != want.Warm || len(got.DNS) > 0 || len(got.AllowHosts) > 0 {
		t.Errorf("the defaults: %+v", got)
	}

	got, err = serveConfig(t, "--state-dir", "state", "--listen", "[::1]:1", "--allow-host", " a.example ,b.example,",
		"--dns", "192.0.2.1, 192.0.2.2", "--egress", "none", "--net-in", "10M", "--net-out", "64KiB", "--disk-rate", "0",
		"--host-range", "10.20.0.0/16", "--link-range", "10.21.0.0/16", "--on-shutdown", "destroy", "--max-sandboxes", "7",
		"--boot-timeout", "3s", "--warm", "2", "--disk", "64")
	if text := withoutRoot(err); text != "" {
		t.Fatal(text)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if got.StateDir != filepath.Join(here, "state") || got.Listen != "[::1]:1" || got.Egress != network.None ||
		!slices.Equal(got.AllowHosts, []string{"a.example", "b.example"}) ||
		!slices.Equal(got.DNS, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}) ||
		got.Limits.InBytes != 10_000_000 || got.Limits.OutBytes != 64<<10 || got.DiskBytes != 0 ||
		got.HostRange.String() != "10.20.0.0/16" || got.LinkRange.String() != "10.21.0.0/16" ||
		!got.DestroyAtEnd || got.Capacity.Sandboxes != 7 || got.BootTimeout != 3*time.Second || got.Warm != 2 || got.OverlayMiB != 64 {
		t.Errorf("%+v", got)
	}
}

// Every wrong flag is named, all at once.
func TestServeFlagsThatAreWrong(t *testing.T) {
	for flag, value := range map[string]string{
		"listen": "50051", "allow-host": "http://a.example", "dns": "nonsense", "egress": "some", "net-in": "fast",
		"net-out": "-1", "net-connections": "-1", "pool": "-1", "warm": "-1", "disk": "63", "disk-rate": "x", "disk-iops": "-1",
		"cpu": "qemu64", "max-sandboxes": "0", "max-vcpus": "0", "max-memory": "0", "max-disk": "-1", "keep-free": "-1", "max-starts": "0",
		"max-template-disk": "-1",
		"start-queue":       "0s", "boot-timeout": "0s", "keep-paused": "-1s", "keep-stopped": "-1s", "log-format": "xml",
		"on-shutdown": "maybe", "vmm": "xen", "host-range": "10.0.0.0", "link-range": "x",
		"domain": "*.example", "rate": "-1", "create-rate": "NaN", "max-timeout": "0s",
		"max-connections": "-1", "max-client-connections": "-1",
	} {
		if _, err := serveConfig(t, "--"+flag+"="+value); !strings.Contains(withoutRoot(err), "--"+flag) {
			t.Errorf("--%s=%s: %v", flag, value, err)
		}
	}
	_, err := serveConfig(t, "--egress=some", "--disk=1", "--log-format=xml")
	for _, flag := range []string{"--egress", "--disk", "--log-format"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s is not named: %v", flag, err)
		}
	}
	t.Setenv("WRENN_WARM", "many")
	if _, err := serveConfig(t); !strings.Contains(withoutRoot(err), "WRENN_WARM") {
		t.Errorf("WRENN_WARM=many: %v", err)
	}
}
