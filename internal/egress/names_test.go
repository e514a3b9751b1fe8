package egress

import (
	"errors"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestParseName(t *testing.T) {
	long := strings.Repeat("a.", 126) + "a"
	for in, want := range map[string]string{
		"*":                              "*",
		"example.com":                    "example.com",
		"Example.COM.":                   "example.com",
		"*.Example.com":                  "*.example.com",
		"*.com":                          "*.com",
		"intranet":                       "intranet",
		"_srv.a-b.example":               "_srv.a-b.example",
		"xn--bcher-kva.example":          "xn--bcher-kva.example",
		"1.2.3.4.in-addr.arpa":           "1.2.3.4.in-addr.arpa",
		long:                             long,
		"":                               "",
		".":                              "",
		"bücher.example":                 "",
		"a..b":                           "",
		".example.com":                   "",
		"-a.example":                     "",
		"a-.example":                     "",
		"a.*.example":                    "",
		"a*.example":                     "",
		"**.example":                     "",
		"*.":                             "",
		"*.*":                            "",
		"example.com:80":                 "",
		"http://example.com":             "",
		"a b.example":                    "",
		"a\x00.example":                  "",
		"[::1]":                          "",
		"::1":                            "",
		"1.2.3.4":                        "",
		"127.1":                          "",
		"0x7f000001":                     "",
		"2130706433":                     "",
		long + ".aa":                     "",
		strings.Repeat("a", 64) + ".com": "",
	} {
		got, err := ParseName(in)
		if got != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("ParseName(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestNamesMatch(t *testing.T) {
	list := namesOf([]string{"example.com", "*.wild.example", "*.com.evil.example"})
	for name, want := range map[string]bool{
		"example.com":          true,
		"www.example.com":      false,
		"notexample.com":       false,
		"com":                  false,
		"wild.example":         false,
		"a.wild.example":       true,
		"a.b.wild.example":     true,
		"awild.example":        false,
		"example.com.evil":     false,
		"a.com.evil.example":   true,
		"example.com.evil.net": false,
	} {
		if got := list.match(name); got != want {
			t.Errorf("match(%q) = %v", name, got)
		}
	}
	if !namesOf([]string{"*"}).match("anything") || namesOf(nil).match("anything") {
		t.Error("* must match all, and nothing nothing")
	}
}
