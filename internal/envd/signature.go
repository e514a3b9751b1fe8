package envd

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The operations that a URL can be signed for.
const (
	signRead  = "read"
	signWrite = "write"
)

// checkSignature lets a /files request through that shows the access token
// or, without it, carries a valid signature. The token, if shown, decides.
func checkSignature(state initState, token string, q url.Values, operation string) error {
	if state.token == nil {
		return nil
	}
	if token != "" {
		if !tokenMatches(state.token, token) {
			return failf(http.StatusUnauthorized, "access token present in header but does not match")
		}
		return nil
	}
	given := q.Get("signature")
	if given == "" {
		return failf(http.StatusUnauthorized, "missing signature query parameter")
	}
	expiration := q.Get("signature_expiration")
	want := signature(q.Get("path"), operation, q.Get("username"), state.tokenRaw, expiration)
	if subtle.ConstantTimeCompare([]byte(given), []byte(want)) != 1 {
		return failf(http.StatusUnauthorized, "invalid signature")
	}
	if expiration != "" {
		seconds, err := strconv.ParseInt(expiration, 10, 64)
		if err != nil || time.Now().Unix() > seconds {
			return failf(http.StatusUnauthorized, "signature is already expired")
		}
	}
	return nil
}

// signature signs a request for a file: path and user as they stand in the
// query, expiration as Unix seconds or empty.
func signature(path, operation, user, token, expiration string) string {
	text := strings.Join([]string{path, operation, user, token}, ":")
	if expiration != "" {
		text += ":" + expiration
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}
