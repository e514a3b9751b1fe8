package certs

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
)

// maxBundle bounds a bundle: guests are sent it at each start.
const maxBundle = 384 << 10

// ReadBundle returns the certificates of a file in PEM, without what is between them.
// Anything else in PEM, as a key, is an error.
func ReadBundle(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read certificates: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err != nil {
		return "", fmt.Errorf("read certificates: %w", err)
	}
	if len(text) > maxBundle {
		return "", fmt.Errorf("read certificates: %s has more than %d bytes; guests need those alone that they lack", path, maxBundle)
	}
	var bundle []byte
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return "", fmt.Errorf("read certificates: %s contains a %s", path, block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return "", fmt.Errorf("read certificates: %s: %w", path, err)
		}
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	if bundle == nil {
		return "", errors.New("read certificates: " + path + " has none")
	}
	return string(bundle), nil
}
