package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
)

const (
	authorityLife   = 10 * 365 * 24 * time.Hour
	certificateLife = 90 * 24 * time.Hour
	// clockSlack is how far the clocks of clients may be behind ours.
	clockSlack = time.Hour
)

// The files of an authority in its directory.
const (
	caFile, caKeyFile = "ca.pem", "ca-key.pem"
	certFile, keyFile = "cert.pem", "key.pem"
	bundleFile        = "ca-bundle.pem"
)

// systemBundles are where hosts have the authorities that they trust.
var systemBundles = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
}

// Authority says for what an authority of one's own makes a certificate. It can make
// them for no other names, so that a client that trusts it trusts it no further.
type Authority struct {
	// Domain and one level below it are named, and localhost.
	Domain string
	// IP is an address to name besides those of loopback; nil for none.
	IP net.IP
}

// CAFile is the file of a directory that has the authority's own certificate.
func CAFile(dir string) string { return filepath.Join(dir, caFile) }

// BundleFile is the file of a directory that has the authority's certificate together
// with those that the host trusts.
func BundleFile(dir string) string { return filepath.Join(dir, bundleFile) }

// Source returns a certificate in dir, which it makes with the authority unless they are
// there. Only their owner can read the keys.
func (a Authority) Source(dir string, log *slog.Logger) (*Source, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of certificates: %w", err)
	}
	s := &Source{
		certFile: filepath.Join(dir, certFile), keyFile: filepath.Join(dir, keyFile),
		now: time.Now, log: log,
	}
	s.renew = func(now time.Time) error { return a.make(dir, now, log) }
	if err := s.renew(s.now()); err != nil {
		return nil, err
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

func (a Authority) names() []string {
	names := []string{"localhost", "*.localhost"}
	if a.Domain != "localhost" {
		names = append(names, a.Domain, "*."+a.Domain)
	}
	return names
}

func (a Authority) ips() []net.IP {
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	if a.IP != nil && !a.IP.IsLoopback() {
		ips = append(ips, a.IP)
	}
	return ips
}

// pair is a certificate and its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// make brings the files of dir up to date: the authority, the certificate, and the
// bundle.
func (a Authority) make(dir string, now time.Time, log *slog.Logger) error {
	ca, err := read(filepath.Join(dir, caFile), filepath.Join(dir, caKeyFile))
	if err != nil || !a.constrains(ca.cert) || ending(ca.cert, now) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if ca, err = a.newAuthority(dir, now); err != nil {
			return fmt.Errorf("make authority: %w", err)
		}
		log.Warn("an authority was made; clients must be given its certificate", "file", CAFile(dir), "ends", ca.cert.NotAfter)
	}
	if err := writeBundle(dir, ca.cert); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	leaf, err := read(filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	if err == nil && a.covers(leaf.cert) && !ending(leaf.cert, now) && leaf.cert.CheckSignatureFrom(ca.cert) == nil {
		return nil
	}
	if err := a.newCertificate(dir, ca, now); err != nil {
		return fmt.Errorf("make certificate: %w", err)
	}
	return nil
}

// constrains says that an authority may make certificates for exactly a's names.
func (a Authority) constrains(c *x509.Certificate) bool {
	want := a.template(time.Time{})
	return c.IsCA && c.PermittedDNSDomainsCritical && slices.Equal(c.PermittedDNSDomains, want.PermittedDNSDomains) &&
		slices.EqualFunc(c.PermittedIPRanges, want.PermittedIPRanges, func(x, y *net.IPNet) bool { return x.String() == y.String() })
}

// covers says that a certificate names exactly what a names.
func (a Authority) covers(c *x509.Certificate) bool {
	return slices.Equal(c.DNSNames, a.names()) && slices.EqualFunc(c.IPAddresses, a.ips(), net.IP.Equal)
}

// template is the certificate of the authority.
func (a Authority) template(now time.Time) *x509.Certificate {
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Wrenn, authority of " + a.Domain},
		NotBefore: now.Add(-clockSlack), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"localhost"},
	}
	if a.Domain != "localhost" {
		t.PermittedDNSDomains = append(t.PermittedDNSDomains, a.Domain)
	}
	for _, ip := range a.ips() {
		if v4 := ip.To4(); v4 != nil {
			ip = v4
		}
		bits := 8 * len(ip)
		t.PermittedIPRanges = append(t.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)})
	}
	return t
}

func (a Authority) newAuthority(dir string, now time.Time) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	return write(filepath.Join(dir, caFile), filepath.Join(dir, caKeyFile), a.template(now), nil, key, key)
}

func (a Authority) newCertificate(dir string, ca pair, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	_, err = write(filepath.Join(dir, certFile), filepath.Join(dir, keyFile), &x509.Certificate{
		Subject:   pkix.Name{CommonName: a.Domain},
		NotBefore: now.Add(-clockSlack), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, DNSNames: a.names(), IPAddresses: a.ips(),
	}, ca.cert, key, ca.key)
	return err
}

// write makes a certificate, signed with signer by its parent, or by itself without one,
// and writes it with its key.
func write(certPath, keyPath string, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) (pair, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return pair{}, err
	}
	template.SerialNumber = serial
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return pair{}, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return pair{}, err
	}
	// Between the two the pair does not fit, and is made again.
	err = errors.Join(
		atomicfile.Write(keyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600),
		atomicfile.Write(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
	return pair{cert, key}, err
}

// errPair: certificate and key do not belong together, as after a crash between the two.
var errPair = fmt.Errorf("certificate and key are no pair: %w", fs.ErrNotExist)

func read(certPath, keyPath string) (pair, error) {
	if _, err := os.Stat(certPath); err != nil {
		return pair{}, err
	}
	both, err := tls.LoadX509KeyPair(certPath, keyPath)
	if errors.Is(err, fs.ErrPermission) {
		return pair{}, err
	}
	if err != nil {
		return pair{}, errPair
	}
	key, ok := both.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return pair{}, errPair
	}
	return pair{both.Leaf, key}, nil
}

// writeBundle writes the certificates that the host trusts, and ours.
func writeBundle(dir string, ca *x509.Certificate) error {
	bundle := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	for _, path := range systemBundles {
		if system, err := os.ReadFile(path); err == nil {
			bundle = append(bundle, system...)
			break
		}
	}
	if old, err := os.ReadFile(BundleFile(dir)); err == nil && slices.Equal(old, bundle) {
		return nil
	}
	return atomicfile.Write(BundleFile(dir), bundle, 0o644)
}
