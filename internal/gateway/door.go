package gateway

import (
	"mime"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// door tells requests of clients that may command the agent from requests that a
// web page made a browser send.
type door struct {
	// names are the host names of this agent beside localhost, in lower case.
	names []string
}

// checkControl returns an errdefs.Denied that says what is wrong with a request to
// the agent's own API.
func (d door) checkControl(r *http.Request) error {
	if err := d.checkHost(r); err != nil {
		return err
	}
	if err := d.checkOrigin(r); err != nil {
		return err
	}
	return d.checkType(r)
}

// checkREST is checkControl for the REST API. A page that shows a key was given it: no
// browser adds one by itself. Nor does a browser add one when it asks what it may send,
// and the answer to that changes nothing.
func (d door) checkREST(r *http.Request) error {
	if err := d.checkHost(r); err != nil || r.Method == http.MethodOptions || auth.KeyOf(r.Header) != "" {
		return err
	}
	return d.checkOrigin(r)
}

// checkHost refuses requests that were sent to another name than the agent's: a page
// whose own name leads to this host sends them.
func (d door) checkHost(r *http.Request) error {
	if !d.ours(r) {
		return errdefs.Denied.Errorf("%.100q is no name of this host agent: use its address or localhost, "+
			"or give it that name with --allow-host", hostOf(r.Host))
	}
	return nil
}

// checkOrigin refuses requests of web pages. The agent has none. One that a browser
// takes for the agent's own may ask.
func (d door) checkOrigin(r *http.Request) error {
	own := "http://" + r.Host
	if r.TLS != nil {
		own = "https://" + r.Host
	}
	for _, origin := range r.Header.Values("Origin") {
		if !strings.EqualFold(origin, own) {
			return errdefs.Denied.Errorf("a web page of %.100q may not use this host agent", origin)
		}
	}
	for _, site := range r.Header.Values("Sec-Fetch-Site") {
		if site != "same-origin" && site != "none" {
			return errdefs.Denied.Errorf("a web page of another site (%.20q) may not use this host agent", site)
		}
	}
	return nil
}

// checkType refuses bodies of the types that browsers send to any site without
// asking it first. For a request with a header that names a sandbox they ask.
func (d door) checkType(r *http.Request) error {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return nil
	}
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err == nil && strings.HasPrefix(kind, "application/") && kind != "application/x-www-form-urlencoded" {
		return nil
	}
	return errdefs.Denied.Errorf("the content type %.50q is not taken: send JSON as application/json", r.Header.Get("Content-Type"))
}

// ours reports whether a request was sent to a name of this agent. The address that
// the connection came to is one.
func (d door) ours(r *http.Request) bool {
	name := strings.ToLower(strings.TrimSuffix(hostOf(r.Host), "."))
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return name == "localhost" || slices.Contains(d.names, name)
	}
	ip = ip.Unmap().WithZone("")
	if ip.IsLoopback() || slices.Contains(d.names, ip.String()) {
		return true
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && ip == local.AddrPort().Addr().Unmap().WithZone("")
}

// hostOf is a Host header without its port.
func hostOf(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
}
