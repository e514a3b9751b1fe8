package agent

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
)

func TestNamesOfTheAgent(t *testing.T) {
	for _, c := range []struct {
		listen string
		allow  []string
		names  []string
		wrong  bool
	}{
		{"127.0.0.1:1", nil, []string{"127.0.0.1"}, false},
		{"0.0.0.0:1", nil, nil, false}, {"[::]:1", nil, nil, false}, {":1", nil, nil, false},
		{"host.example:1", []string{"a.example", "b.example"}, []string{"host.example", "a.example", "b.example"}, false},
		{":1", []string{"192.0.2.1", "2001:db8::1"}, []string{"192.0.2.1", "2001:db8::1"}, false},
		{":1", []string{"http://a.example"}, []string{"http://a.example"}, true},
		{":1", []string{"a.example:80"}, []string{"a.example:80"}, true},
		{":1", []string{"*.example"}, []string{"*.example"}, true},
	} {
		cfg := Defaults()
		cfg.Listen, cfg.AllowHosts, cfg.Domain = c.listen, c.allow, "x.example"
		got, err := cfg.names(), cfg.Check()
		for _, name := range []string{"x.example", "api.x.example", "sandbox.x.example"} {
			if !slices.Contains(got, name) {
				t.Errorf("%q lacks %s", got, name)
			}
		}
		got = slices.DeleteFunc(got, func(name string) bool { return strings.HasSuffix(name, "x.example") })
		if !slices.Equal(got, c.names) || (err != nil) != c.wrong {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
		if most, each := cfg.conns(); most < 16 || each != most/4 {
			t.Errorf("%d connections, %d of one client", most, each)
		}
	}
	cfg := Config{MaxConns: 7, MaxConnsEach: 3}
	if most, each := cfg.conns(); most != 7 || each != 3 {
		t.Errorf("%d connections, %d of one client", most, each)
	}
	cfg = Config{MaxConns: 2}
	if most, each := cfg.conns(); most != 2 || each != 1 {
		t.Errorf("%d connections, %d of one client", most, each)
	}
}

// An address that other machines reach is listened on only if there is a key.
func TestListenAddress(t *testing.T) {
	dir := t.TempDir()
	keys, err := auth.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	listens := map[string]bool{
		"127.0.0.1:1": true, "[::1]:1": true, "localhost:1": true, "127.9.9.9:0": true,
		"0.0.0.0:1": false, ":1": false, "192.0.2.1:1": false, "host.example:1": false, "[::]:1": false,
	}
	check := func(what string, want func(loopback bool) bool) {
		t.Helper()
		for listen, loopback := range listens {
			cfg := Defaults()
			cfg.Listen = listen
			err := errors.Join(cfg.Check(), cfg.checkKeys(keys))
			if (err == nil) != want(loopback) || err != nil && !strings.Contains(err.Error(), "keys.json") &&
				!strings.Contains(err.Error(), "wrenn key create --state-dir "+cfg.StateDir) {
				t.Errorf("%q, %s: %v", listen, what, err)
			}
		}
	}
	check("no key", func(loopback bool) bool { return loopback })
	if _, _, err := keys.CreateKey("", ""); err != nil {
		t.Fatal(err)
	}
	check("a key", func(bool) bool { return true })
	if err := os.WriteFile(filepath.Join(dir, "keys.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("keys that cannot be read", func(loopback bool) bool { return loopback })
	for _, listen := range []string{"127.0.0.1", ""} {
		cfg := Defaults()
		if cfg.Listen = listen; cfg.Check() == nil {
			t.Errorf("%q is taken", listen)
		}
	}
}

func TestDomain(t *testing.T) {
	for domain, ok := range map[string]bool{
		"localhost": true, "a-1.example.com": true, "": false, "A.example": false, "*.example": false, "a..b": false, "-a.b": false,
		"http://a.b": false, "a.b:80": false, strings.Repeat("a.", 101) + "b": false,
	} {
		cfg := Defaults()
		cfg.Domain = domain
		if err := cfg.Check(); (err == nil) != ok {
			t.Errorf("%q: %v", domain, err)
		}
	}
}

func TestResolversThatNoGuestReaches(t *testing.T) {
	for _, text := range []string{"127.0.0.53", "169.254.1.1", "2001:db8::1"} {
		cfg := Defaults()
		cfg.DNS = []netip.Addr{netip.MustParseAddr(text)}
		if err := cfg.Check(); err == nil || !strings.Contains(err.Error(), "--dns "+text) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestInstance(t *testing.T) {
	if got := instance(DefaultStateDir); got != "wrenn" {
		t.Errorf("the default directory's is %q", got)
	}
	a, b := instance("/a"), instance("/b")
	if a == b || len(a) != len("wrenn")+4 || a != instance("/a") {
		t.Errorf("%q, %q", a, b)
	}
	cfg := Defaults()
	cfg.StateDir = "relative"
	if err := cfg.CheckHost(); err == nil || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("a relative directory: %v", err)
	}
}
