package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var silent = slog.New(slog.DiscardHandler)

// shown returns the certificate that a server shows for a name, as a client that trusts
// only the file of an authority sees it.
func shown(t *testing.T, s *Source, caFile, name string) (*x509.Certificate, error) {
	t.Helper()
	ca, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("no certificate in the file of the authority")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			_ = tls.Server(c, s.TLS()).Handshake()
		}
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	client := tls.Client(raw, &tls.Config{RootCAs: roots, ServerName: name, Time: s.now})
	if err := client.Handshake(); err != nil {
		return nil, err
	}
	return client.ConnectionState().PeerCertificates[0], nil
}

func TestAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	a := Authority{Domain: "boxes.example", IP: net.IPv4(192, 0, 2, 1)}
	s, err := a.Source(dir, silent)
	if err != nil {
		t.Fatal(err)
	}
	for name, ok := range map[string]bool{
		"boxes.example": true, "api.boxes.example": true, "8000-sb0a.boxes.example": true, "localhost": true, "a.localhost": true,
		"127.0.0.1": true, "192.0.2.1": true, "::1": true, "192.0.2.2": false, "example": false, "a.b.boxes.example": false,
	} {
		if _, err := shown(t, s, CAFile(dir), name); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	for file, want := range map[string]fs.FileMode{caFile: 0o644, caKeyFile: 0o600, certFile: 0o644, keyFile: 0o600, bundleFile: 0o644} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
	bundle, err := os.ReadFile(BundleFile(dir))
	ca, cerr := os.ReadFile(CAFile(dir))
	if err != nil || cerr != nil || !bytes.Contains(bundle, ca) {
		t.Errorf("the bundle lacks the authority: %v, %v", err, cerr)
	}
}

// The authority's key makes no certificate that its clients take for another host's.
func TestAuthorityIsConstrained(t *testing.T) {
	dir := t.TempDir()
	a := Authority{Domain: "boxes.example"}
	if _, err := a.Source(dir, silent); err != nil {
		t.Fatal(err)
	}
	ca, err := read(filepath.Join(dir, caFile), filepath.Join(dir, caKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, evil := range []Authority{{Domain: "bank.example"}, {Domain: "boxes.example", IP: net.IPv4(192, 0, 2, 9)}} {
		if err := evil.newCertificate(dir, ca, time.Now()); err != nil {
			t.Fatal(err)
		}
		s, err := Files(filepath.Join(dir, certFile), filepath.Join(dir, keyFile), silent)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"bank.example", "192.0.2.9", "boxes.example"} {
			if _, err := shown(t, s, CAFile(dir), name); err == nil {
				t.Errorf("%+v: %s is taken", evil, name)
			}
		}
	}
}

// Authority and certificate stay until they end or the settings are others.
func TestAuthorityIsKept(t *testing.T) {
	dir := t.TempDir()
	files := func() map[string]string {
		t.Helper()
		all := map[string]string{}
		for _, name := range []string{caFile, certFile} {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			all[name] = string(data)
		}
		return all
	}
	a := Authority{Domain: "boxes.example"}
	start := time.Now()
	step := func(what string, a Authority, after time.Duration, sameCA, sameCert bool) {
		t.Helper()
		before := files()
		if err := a.make(dir, start.Add(after), silent); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		now := files()
		if (before[caFile] == now[caFile]) != sameCA || (before[certFile] == now[certFile]) != sameCert {
			t.Errorf("%s: the same authority %v, the same certificate %v", what, before[caFile] == now[caFile], before[certFile] == now[certFile])
		}
	}
	if err := a.make(dir, start, silent); err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	step("once more", a, 0, true, true)
	step("59 days later", a, 59*day, true, true)
	step("61 days later", a, 61*day, true, false)
	step("another domain", Authority{Domain: "other.example"}, 61*day, false, false)
	step("7 years later", Authority{Domain: "other.example"}, 7*365*day, false, false)
	if err := os.WriteFile(filepath.Join(dir, keyFile), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	step("a torn key", Authority{Domain: "other.example"}, 7*365*day, true, false)
	if err := os.Remove(filepath.Join(dir, caKeyFile)); err != nil {
		t.Fatal(err)
	}
	step("no key of the authority", Authority{Domain: "other.example"}, 7*365*day, false, false)
}

// A certificate that ends while the agent runs is made anew at a handshake.
func TestRenewal(t *testing.T) {
	dir := t.TempDir()
	s, err := Authority{Domain: "localhost"}.Source(dir, silent)
	if err != nil {
		t.Fatal(err)
	}
	first, err := shown(t, s, CAFile(dir), "localhost")
	if err != nil {
		t.Fatal(err)
	}
	s.now = func() time.Time { return time.Now().Add(80 * 24 * time.Hour) }
	second, err := shown(t, s, CAFile(dir), "localhost")
	if err != nil || second.Equal(first) || second.NotAfter.Before(s.now().Add(80*24*time.Hour)) {
		t.Errorf("the second: %v, %v", second, err)
	}
	// Where it cannot be made anew, the one that is there is shown.
	s.renew = func(time.Time) error { return errors.New("the disk is full") }
	s.now = func() time.Time { return time.Now().Add(165 * 24 * time.Hour) }
	third, err := shown(t, s, CAFile(dir), "localhost")
	if err != nil || !third.Equal(second) {
		t.Errorf("the third: %v, %v", third, err)
	}
}

// own writes a certificate that is its own authority.
func own(t *testing.T, certPath, keyPath, name string, ends time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, err = write(certPath, keyPath, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: ends,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}, nil, key, key)
	if err != nil {
		t.Fatal(err)
	}
}

// Files that change are shown at the next handshake; files that are no pair are not.
func TestFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	later := time.Now().Add(time.Hour)
	if _, err := Files(cert, key, silent); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
	own(t, cert, key, "a.example", later)
	s, err := Files(cert, key, silent)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what, name string) {
		t.Helper()
		if got := s.current().Leaf.Subject.CommonName; got != name {
			t.Errorf("%s: %s is shown, want %s", what, got, name)
		}
	}
	check("at first", "a.example")
	own(t, cert, key, "b.example", later)
	check("replaced", "b.example")
	own(t, filepath.Join(dir, "c2"), filepath.Join(dir, "k2"), "c.example", later)
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), to); err != nil {
			t.Fatal(err)
		}
	}
	move("c2", cert)
	check("half replaced", "b.example")
	move("k2", key)
	check("replaced one after the other", "c.example")
	if err := os.WriteFile(cert, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("cut", "c.example")
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	check("gone", "c.example")
	own(t, cert, key, "d.example", later)
	check("there again", "d.example")
}

// A user's certificate that has expired or soon will is used, and the log says so.
func TestExpiryIsTold(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	for after, want := range map[time.Duration]string{-time.Hour: "has expired", time.Hour: "ends soon", 30 * 24 * time.Hour: ""} {
		own(t, cert, key, "a.example", time.Now().Add(after))
		var log bytes.Buffer
		if _, err := Files(cert, key, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Error(err)
		}
		if got := log.String(); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%v: %q, want %q", after, got, want)
		}
	}
}

// TestReadBundle: a bundle has certificates alone, and some.
func TestReadBundle(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	own(t, cert, key, "a.example", time.Now().Add(time.Hour))
	read := func(path string) []byte {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	file := func(name string, parts ...[]byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, bytes.Join(parts, nil), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	two := file("two", []byte("# a comment\n"), read(cert), []byte("another\n"), read(cert))
	if got, err := ReadBundle(two); err != nil || got != strings.Repeat(string(read(cert)), 2) {
		t.Errorf("ReadBundle of two: %q, %v", got, err)
	}
	for name, path := range map[string]string{
		"a key":       file("key", read(cert), read(key)),
		"none":        file("none", []byte("certificates\n")),
		"damaged":     file("damaged", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
		"too much":    file("much", bytes.Repeat(read(cert), maxBundle/len(read(cert))+1)),
		"not a file":  dir,
		"not a thing": filepath.Join(dir, "nothing"),
	} {
		if got, err := ReadBundle(path); err == nil {
			t.Errorf("%s: read %q", name, got)
		}
	}
}
