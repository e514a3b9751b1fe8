package egress

import (
	"net/netip"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// ParseName reads one entry of a list of names and returns it as it is
// compared: "example.com" means itself, "*.example.com" everything below it,
// "*" every name. InvalidArgument if it is none of them.
func ParseName(s string) (string, error) {
	if s == "*" {
		return s, nil
	}
	below, wild := strings.CutPrefix(s, "*.")
	name, ok := canonical(below)
	if len(s) > 300 { // more than a name has, and enough to find it by
		s = s[:300] + "..."
	}
	switch {
	case ok && wild:
		return "*." + name, nil
	case ok:
		return name, nil
	case strings.ContainsFunc(s, func(r rune) bool { return r > 127 }):
		return "", errdefs.InvalidArgument.Errorf("name %q: only ASCII is possible, write it in its xn-- form", s)
	case strings.Contains(below, "*"):
		return "", errdefs.InvalidArgument.Errorf("name %q: a * can stand for all labels below a name only, as in *.example.com", s)
	}
	return "", errdefs.InvalidArgument.Errorf("%q is neither an IPv4 address or range nor a domain name", s)
}

// canonical returns a host name as names are compared: lower case, without the
// trailing dot. It is false for a text that is no name. IP addresses in any
// notation are no names.
func canonical(host string) (string, bool) {
	host = strings.TrimSuffix(host, ".")
	if host == "" || len(host) > 253 {
		return "", false
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return "", false
	}
	host = strings.ToLower(host)
	last := host
	for rest, more := host, true; more; {
		last, rest, more = strings.Cut(rest, ".")
		if last == "" || len(last) > 63 || last[0] == '-' || last[len(last)-1] == '-' {
			return "", false
		}
		for i := range len(last) {
			if c := last[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return "", false
			}
		}
	}
	// No top-level domain is a number. What ends in one is an address to many
	// programs, such as 127.1 and 0x7f000001.
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return "", false
	}
	return host, true
}

// names is a list of names made to be looked into.
type names struct {
	all          bool
	exact, below map[string]bool
}

func namesOf(patterns []string) names {
	n := names{exact: map[string]bool{}, below: map[string]bool{}}
	for _, p := range patterns {
		if p == "*" {
			n.all = true
		} else if base, ok := strings.CutPrefix(p, "*."); ok {
			n.below[base] = true
		} else {
			n.exact[p] = true
		}
	}
	return n
}

// match says whether a canonical name is in the list.
func (n names) match(name string) bool { return n.pattern(name) != "" }

// pattern is the entry that a canonical name matches, "" if there is none.
func (n names) pattern(name string) string {
	if n.exact[name] {
		return name
	}
	for rest, more := name, true; more; {
		if _, rest, more = strings.Cut(rest, "."); more && n.below[rest] {
			return "*." + rest
		}
	}
	if n.all {
		return "*"
	}
	return ""
}
