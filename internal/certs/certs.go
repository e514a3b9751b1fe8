// Package certs has the certificate that the agent's listener shows: one of the
// user's, read again when its files change, or one of an authority of the agent's own,
// made anew before it ends.
package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// warnBefore is how long before a certificate of the user's ends the log tells of it.
const warnBefore = 14 * 24 * time.Hour

// Source is a certificate and its key in files. It is safe for concurrent use.
type Source struct {
	certFile, keyFile string
	// renew makes the files anew if the certificate ends soon; nil for a user's.
	renew func(now time.Time) error
	now   func() time.Time
	log   *slog.Logger

	mu    sync.Mutex // over the fields below
	stamp [2]stamp
	cert  *tls.Certificate
	// triedAt is when a renewal was tried last.
	triedAt time.Time
}

// stamp tells one content of a file from another without reading it.
type stamp struct {
	inode      uint64
	size       int64
	mtim, ctim syscall.Timespec
}

// Files returns the source of a certificate, with those that lead to its authority
// after it, and of its key, both in PEM.
func Files(certFile, keyFile string, log *slog.Logger) (*Source, error) {
	s := &Source{certFile: certFile, keyFile: keyFile, now: time.Now, log: log}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// TLS returns the settings of a server that shows the certificate as it is at each
// handshake.
func (s *Source) TLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return s.current(), nil
	}}
}

// current returns the certificate in the files, or the last one that could be used.
func (s *Source) current() *tls.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.now(); s.renew != nil && ending(s.cert.Leaf, now) && now.Sub(s.triedAt) > time.Minute {
		s.triedAt = now
		if err := s.renew(now); err != nil {
			s.log.Error("certificate not renewed", "ends", s.cert.Leaf.NotAfter, "err", err)
		}
	}
	if now, err := s.stamps(); err == nil && now == s.stamp {
		return s.cert
	} else if err == nil {
		err = s.loadLocked()
		if err == nil {
			s.log.Info("certificate read again", "file", s.certFile, "ends", s.cert.Leaf.NotAfter)
			return s.cert
		}
		// Certificate and key may be replaced one after the other.
		s.stamp = now
		s.log.Warn("certificate not read again, the one before is shown", "err", err)
	}
	return s.cert
}

func (s *Source) load() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loadLocked()
}

func (s *Source) loadLocked() error {
	now, err := s.stamps()
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(s.certFile, s.keyFile)
	if err != nil {
		return fmt.Errorf("read certificate %s with key %s: %w", s.certFile, s.keyFile, err)
	}
	switch left := cert.Leaf.NotAfter.Sub(s.now()); {
	case left <= 0:
		s.log.Error("the certificate has expired, clients will refuse it", "file", s.certFile, "ended", cert.Leaf.NotAfter)
	case left < warnBefore && s.renew == nil:
		s.log.Warn("the certificate ends soon", "file", s.certFile, "ends", cert.Leaf.NotAfter)
	}
	// If a file was replaced after its stamp was taken, the next handshake reads it.
	s.stamp, s.cert = now, &cert
	return nil
}

func (s *Source) stamps() (both [2]stamp, err error) {
	for i, path := range []string{s.certFile, s.keyFile} {
		info, err := os.Stat(path)
		if err != nil {
			return both, err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return both, errors.New("the file system tells nothing of its files")
		}
		both[i] = stamp{st.Ino, st.Size, st.Mtim, st.Ctim}
	}
	return both, nil
}

// ending says that less than a third of a certificate's time is left.
func ending(c *x509.Certificate, now time.Time) bool {
	return c.NotAfter.Sub(now) < c.NotAfter.Sub(c.NotBefore)/3
}
