package agent

import (
	"net"
	"net/netip"
	"path/filepath"
	"strconv"

	"git.omukk.dev/wrenn/sandbox/internal/certs"
)

// tlsDir is where the agent's own authority has its files.
func (c Config) tlsDir() string { return filepath.Join(c.StateDir, "tls") }

// certificate returns what Listen shows; nil for no TLS.
func (c Config) certificate() (*certs.Source, error) {
	switch {
	case c.TLSCert != "":
		return certs.Files(c.TLSCert, c.TLSKey, c.Log)
	case c.TLSSelfSigned:
		host, _, _ := net.SplitHostPort(c.Listen) // it is checked
		ip := net.ParseIP(host)
		if ip != nil && ip.IsUnspecified() {
			ip = nil
		}
		return certs.Authority{Domain: c.Domain, IP: ip}.Source(c.tlsDir(), c.Log)
	default:
		return nil, nil
	}
}

// address returns the URL by which clients reach the API, and the domain of the names
// of ports, where the agent listens at an address.
func (c Config) address(at netip.AddrPort, secure bool) (url, domain string) {
	scheme, usual, port := "http", "80", strconv.Itoa(int(at.Port()))
	if secure {
		scheme, usual = "https", "443"
	}
	ip := at.Addr().Unmap()
	host := ip.String()
	switch named := c.Domain != "localhost"; {
	case secure && named:
		host = "api." + c.Domain // a certificate has names
	case secure && (ip.IsLoopback() || ip.IsUnspecified()):
		host = "localhost"
	case ip.IsUnspecified():
		host = "127.0.0.1"
	}
	if port == usual {
		if ip, err := netip.ParseAddr(host); err == nil && ip.Is6() {
			host = "[" + host + "]"
		}
		return scheme + "://" + host, c.Domain
	}
	return scheme + "://" + net.JoinHostPort(host, port), c.Domain + ":" + port
}
