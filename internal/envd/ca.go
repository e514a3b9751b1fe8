package envd

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
)

const (
	// caBundle is where OpenSSL, Go, curl and Python's ssl look on Debian;
	// caSource is where Debian's update-ca-certificates looks for added ones.
	caBundle = "/etc/ssl/certs/ca-certificates.crt"
	caSource = "/usr/local/share/ca-certificates/wrenn.crt"

	caBegin = "# wrenn: begin\n"
	caEnd   = "# wrenn: end\n"
)

// checkCA makes sure that text is nothing but certificates.
func checkCA(text []byte) error {
	found := false
	for rest := text; ; found = true {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("the CA bundle contains a %s", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("the CA bundle: %w", err)
		}
	}
	if !found {
		return errors.New("the CA bundle contains no certificate")
	}
	return nil
}

// installCA makes programs trust the certificates in text, instead of those
// that an earlier call installed. root is "" but in tests.
func installCA(root string, text []byte) error {
	old, err := os.ReadFile(root + caBundle)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("install CA bundle: %w", err)
	}
	for path, content := range map[string][]byte{
		root + caSource: text,
		root + caBundle: withCA(old, text),
	} {
		if err := replaceWhole(path, content); err != nil {
			return fmt.Errorf("install CA bundle: %w", err)
		}
	}
	return nil
}

// withCA returns the bundle with text in the section between caBegin and caEnd.
func withCA(bundle, text []byte) []byte {
	if before, rest, ok := bytes.Cut(bundle, []byte(caBegin)); ok {
		_, after, _ := bytes.Cut(rest, []byte(caEnd))
		bundle = append(bytes.Clone(before), after...)
	}
	var b bytes.Buffer
	b.Write(bundle)
	if len(bundle) > 0 && !bytes.HasSuffix(bundle, []byte("\n")) {
		b.WriteByte('\n')
	}
	b.WriteString(caBegin)
	b.Write(bytes.TrimRight(text, "\n"))
	b.WriteString("\n" + caEnd)
	return b.Bytes()
}

// replaceWhole replaces a file in one step: a program that reads it sees the
// old or the new one.
func replaceWhole(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(path, content, 0o644)
}
