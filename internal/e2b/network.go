package e2b

import (
	"context"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
)

// label is one part of a domain name.
const label = `[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?`

// everything is all of the internet, as clients write it.
const everything = "0.0.0.0/0"

var (
	domainPattern = regexp.MustCompile(`^\*$|^(\*\.)?(` + label + `\.)*` + label + `\.?$`)
	hostPattern   = regexp.MustCompile(`^[A-Za-z0-9._\[\]:-]{1,253}$`)
)

// networkOf reads the network of a create.
func networkOf(n api.Network, internet *bool) (Egress, Ingress, error) {
	if n.HttpsPorts != nil && len(*n.HttpsPorts) > 0 {
		return Egress{}, Ingress{}, refuse(http.StatusBadRequest, "network.httpsPorts is not possible on this host")
	}
	egress, err := egressOf(api.NetworkUpdate{
		AllowOut: n.AllowOut, DenyOut: n.DenyOut, DnsServers: n.DnsServers, EgressProxy: n.EgressProxy, Rules: n.Rules,
		AllowInternetAccess: internet,
	})
	if err != nil {
		return Egress{}, Ingress{}, err
	}
	mask := value(n.MaskRequestHost, "")
	if mask != "" && !hostPattern.MatchString(strings.ReplaceAll(mask, "${PORT}", "0")) {
		return Egress{}, Ingress{}, refuse(http.StatusBadRequest, "network.maskRequestHost %.70q is no host name", mask)
	}
	return egress, Ingress{Public: n.AllowPublicTraffic, MaskHost: mask}, nil
}

// egressOf reads what a sandbox may reach.
func egressOf(n api.NetworkUpdate) (Egress, error) {
	switch {
	case n.EgressProxy != nil && len(*n.EgressProxy) > 0:
		return Egress{}, refuse(http.StatusBadRequest, "network.egressProxy is not possible on this host")
	case n.Rules != nil && len(*n.Rules) > 0:
		return Egress{}, refuse(http.StatusBadRequest, "network.rules are not possible on this host")
	}
	e := Egress{
		AllowInternet: n.AllowInternetAccess, Allow: value(n.AllowOut, nil), Deny: value(n.DenyOut, nil), DNS: value(n.DnsServers, nil),
	}
	for _, text := range e.Deny {
		if !isRange(text) {
			return Egress{}, refuse(http.StatusBadRequest, "invalid denied CIDR %.70s", text)
		}
	}
	for _, text := range e.DNS {
		if a, err := netip.ParseAddr(text); err != nil || !a.Is4() {
			return Egress{}, refuse(http.StatusBadRequest, "invalid DNS server %.70s", text)
		}
	}
	closed := slices.Contains(e.Deny, everything) || !value(n.AllowInternetAccess, true)
	for _, text := range e.Allow {
		switch {
		case isRange(text):
		case !domainPattern.MatchString(text) || looksNumeric(text):
			return Egress{}, refuse(http.StatusBadRequest, "invalid allowed CIDR or domain %.70s", text)
		case !closed:
			return Egress{}, refuse(http.StatusBadRequest, "When specifying allowed domains in allow out, "+
				"you must include 'ALL_TRAFFIC' in deny out to block all other traffic.")
		}
	}
	return e, nil
}

// isRange says whether text is an address or a range of them. Of 0.0.0.0 it is only
// everything.
func isRange(text string) bool {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.Zone() == "" && !a.IsUnspecified()
	}
	r, err := netip.ParsePrefix(text)
	return err == nil && (text == everything || !r.Addr().IsUnspecified())
}

// looksNumeric says whether a name is rather a mistyped address: no domain ends in
// digits.
func looksNumeric(text string) bool {
	last := text[strings.LastIndex(strings.TrimSuffix(text, "."), ".")+1:]
	return strings.Trim(last, "0123456789.") == ""
}

// network is how a sandbox's network is shown: as it was given.
func network(e Egress, i Ingress) *api.Network {
	n := api.Network{AllowPublicTraffic: i.Public, MaskRequestHost: some(i.MaskHost)}
	for _, l := range []struct {
		from []string
		to   **[]string
	}{{e.Allow, &n.AllowOut}, {e.Deny, &n.DenyOut}, {e.DNS, &n.DnsServers}} {
		if l.from != nil {
			*l.to = &l.from
		}
	}
	if n == (api.Network{}) {
		return nil
	}
	return &n
}

func (s *server) UpdateSandboxNetwork(ctx context.Context, r api.UpdateSandboxNetworkRequestObject,
) (api.UpdateSandboxNetworkResponseObject, error) {
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	egress, err := egressOf(*r.Body)
	if err == nil {
		err = s.Manager.UpdateNetwork(ctx, sb.ID, egress)
	}
	return api.UpdateSandboxNetwork204Response{}, err
}
