package gateway

import (
	"context"
	"crypto/subtle"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// maxSearches bounds the searches for a signature's sandbox that run at once: each
// makes a signature with the token of every sandbox.
const maxSearches = 2

// signed is a request for a file that shows a signature.
type signed struct {
	file      guestapi.SignedFile
	signature string
}

// signedOf returns the signature of a request for a file; nil if it shows none.
func signedOf(r *http.Request) *signed {
	if r.URL.Path != guestapi.PathFiles || r.URL.RawQuery == "" {
		return nil
	}
	q := r.URL.Query()
	s := &signed{signature: q.Get(guestapi.QuerySignature)}
	if s.signature == "" {
		return nil
	}
	s.file = guestapi.SignedFileOf(q, operation(r))
	return s
}

// operation is what a request does with its file. A browser's question is about the
// request that is to follow.
func operation(r *http.Request) string {
	method := r.Method
	if method == http.MethodOptions {
		method = r.Header.Get("Access-Control-Request-Method")
	}
	if method == http.MethodGet || method == http.MethodHead {
		return guestapi.SignRead
	}
	return guestapi.SignWrite
}

// search returns the sandbox with whose token a request was signed.
func (g *Gateway) search(ctx context.Context, s *signed) (sandbox.ID, bool) {
	select {
	case g.searching <- struct{}{}:
		defer func() { <-g.searching }()
	case <-ctx.Done():
		return "", false
	}
	sign := s.file.Signer()
	return g.sandboxes.WithTokens(func(t sandbox.Tokens) bool { return s.with(sign, t) })
}

// by reports whether the signature was made with a sandbox's token.
func (s *signed) by(t sandbox.Tokens) bool { return s.with(s.file.Signer(), t) }

func (s *signed) with(sign func(token string) string, t sandbox.Tokens) bool {
	return t.Envd != "" && equal(sign(t.Envd), s.signature)
}

// equal compares a secret with what a caller shows, in a time that does not depend on
// the secret.
func equal(secret, shown string) bool {
	return subtle.ConstantTimeCompare([]byte(secret), []byte(shown)) == 1
}
