package envd

import (
	"crypto/subtle"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
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
	given := q.Get(guestapi.QuerySignature)
	if given == "" {
		return failf(http.StatusUnauthorized, "missing signature query parameter")
	}
	file := guestapi.SignedFileOf(q, operation)
	want := file.Signer()(state.tokenRaw)
	if subtle.ConstantTimeCompare([]byte(given), []byte(want)) != 1 {
		return failf(http.StatusUnauthorized, "invalid signature")
	}
	if file.Expiration != "" {
		seconds, err := strconv.ParseInt(file.Expiration, 10, 64)
		if err != nil || time.Now().Unix() > seconds {
			return failf(http.StatusUnauthorized, "signature is already expired")
		}
	}
	return nil
}
