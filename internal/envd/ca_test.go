package envd

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"strings"
	"testing"
)

func certificate(t *testing.T) string {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestInstallCA(t *testing.T) {
	root := t.TempDir()
	write(t, root+caBundle, "distribution's")
	first, second := certificate(t), certificate(t)
	for _, ca := range []string{first, second, second} {
		if err := installCA(root, []byte(ca)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(root + caBundle)
	if want := "distribution's\n" + caBegin + second + caEnd; err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if got, err := os.ReadFile(root + caSource); err != nil || string(got) != second {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestInitRefusesWhatIsNoCA(t *testing.T) {
	s, _ := serve(t, Config{})
	for text, code := range map[string]int{
		certificate(t): 204, "x": 400,
		"-----BEGIN PRIVATE KEY-----\n" + strings.Repeat("A", 64) + "\n-----END PRIVATE KEY-----\n": 400,
	} {
		body, _ := json.Marshal(map[string]string{"caBundle": text})
		w := request(t, s, "POST", "/init", string(body))
		if w.Code != code {
			t.Errorf("%.30q: %d %s, want %d", text, w.Code, w.Body, code)
		}
		if w.Code == 204 && w.Header().Get("X-Envd-Version") == "" {
			t.Error("no version in the answer")
		}
	}
}
