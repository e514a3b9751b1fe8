package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/certs"
)

func TestAddress(t *testing.T) {
	for _, c := range []struct {
		at         string
		secure     bool
		domain     string
		url, names string
	}{
		{"127.0.0.1:50051", false, "localhost", "http://127.0.0.1:50051", "localhost:50051"},
		{"0.0.0.0:50051", false, "localhost", "http://127.0.0.1:50051", "localhost:50051"},
		{"[::]:50051", false, "a.example", "http://127.0.0.1:50051", "a.example:50051"},
		{"192.0.2.1:80", false, "a.example", "http://192.0.2.1", "a.example"},
		{"[2001:db8::1]:80", false, "a.example", "http://[2001:db8::1]", "a.example"},
		{"127.0.0.1:50051", true, "localhost", "https://localhost:50051", "localhost:50051"},
		{"192.0.2.1:50051", true, "localhost", "https://192.0.2.1:50051", "localhost:50051"},
		{"0.0.0.0:443", true, "a.example", "https://api.a.example", "a.example"},
		{"127.0.0.1:8443", true, "a.example", "https://api.a.example:8443", "a.example:8443"},
	} {
		url, domain := Config{Domain: c.domain}.address(netip.MustParseAddrPort(c.at), c.secure)
		if url != c.url || domain != c.names {
			t.Errorf("%+v: %s, %s", c, url, domain)
		}
	}
}

// An agent with an authority of its own serves all its parts over TLS, to clients that
// trust that authority, under the names of its domain.
func TestSelfSigned(t *testing.T) {
	r := newRig(t)
	r.cfg.TLSSelfSigned, r.cfg.Domain = true, "boxes.example"
	r.start()
	ca, err := os.ReadFile(certs.CAFile(filepath.Join(r.cfg.StateDir, "tls")))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	secret, _, err := r.agent.keys.CreateKey("", "")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(r.agent.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, r.agent.Addr().String())
		},
	}}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		method, host, path string
		want               int
	}{
		{"GET", "localhost", "/healthz", 200}, {"GET", "api.boxes.example", "/health", 204}, {"GET", "api.boxes.example", "/v2/sandboxes", 200},
		{"POST", "api.boxes.example", "/hostagent.v1.HostAgentService/GetVersion", 200},
		{"GET", "49983-sb0123456789abcdef0000.boxes.example", "/health", 502},
		{"GET", "sandbox.boxes.example", "/healthz", 200}, {"GET", "x.boxes.example", "/healthz", 403},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, "https://"+c.host+":"+port+c.path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-API-KEY", secret)
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		var version struct{ URL, Domain, CAFile string }
		if strings.HasSuffix(c.path, "GetVersion") {
			_ = json.NewDecoder(resp.Body).Decode(&version)
			if version.URL != "https://api.boxes.example:"+port || version.Domain != "boxes.example:"+port || version.CAFile == "" {
				t.Errorf("version: %+v", version)
			}
		}
		resp.Body.Close()
		if resp.StatusCode != c.want || resp.ProtoMajor != 2 {
			t.Errorf("%+v: %s %s", c, resp.Proto, resp.Status)
		}
	}
	if err := r.ended(); err != nil {
		t.Error(err)
	}
	r.start() // with the authority of before
	if again, err := os.ReadFile(certs.CAFile(filepath.Join(r.cfg.StateDir, "tls"))); err != nil || string(again) != string(ca) {
		t.Errorf("another authority: %v", err)
	}
}

// Settings of TLS that do not fit together, or name no certificate, are refused before
// anything is touched.
func TestWrongTLS(t *testing.T) {
	r := newRig(t)
	for want, change := range map[string]func(*Config){
		"--tls-key":         func(c *Config) { c.TLSCert = "a" },
		"--tls-cert":        func(c *Config) { c.TLSKey = "a" },
		"--tls-self-signed": func(c *Config) { c.TLSCert, c.TLSKey, c.TLSSelfSigned = "a", "b", true },
		"no such file":      func(c *Config) { c.TLSCert, c.TLSKey = "/none/cert.pem", "/none/key.pem" },
	} {
		cfg := r.cfg
		change(&cfg)
		if _, err := New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) || r.net != nil {
			t.Errorf("%s: %v", want, err)
		}
	}
}
