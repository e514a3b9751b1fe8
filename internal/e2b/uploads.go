package e2b

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	// uploadPath begins the addresses at which archives are put.
	uploadPath = "/uploads/"
	// uploadTime is how long an address is valid.
	uploadTime = 30 * time.Minute
	// maxArchive bounds an archive.
	maxArchive = 4 << 30
	// maxUploads bounds the archives that come at the same time; others wait.
	maxUploads = 16
)

// uploads gives out addresses at which an archive of one project and hash can be put
// without a key, and takes what is put there. An address is signed with a secret of this
// process and says all that is needed.
type uploads struct {
	// revoked says whether a key is no more: its addresses end with it.
	revoked func(keyID string) bool

	put  func(ctx context.Context, project, hash string, r io.Reader) error
	fail func(http.ResponseWriter, *http.Request, error)
	// secret signs addresses, slots has an entry for each upload.
	secret []byte
	slots  chan struct{}
}

func newUploads(
	revoked func(keyID string) bool, put func(context.Context, string, string, io.Reader) error,
	fail func(http.ResponseWriter, *http.Request, error),
) *uploads {
	u := &uploads{revoked: revoked, put: put, fail: fail, secret: make([]byte, 32), slots: make(chan struct{}, maxUploads)}
	rand.Read(u.secret) // never fails
	return u
}

func (u *uploads) sign(payload []byte) []byte {
	mac := hmac.New(sha256.New, u.secret)
	mac.Write(payload)
	return mac.Sum(nil)
}

// path returns the address for an archive, which is valid from now for uploadTime, and no
// longer than the key. hash is 64 hexadecimal digits.
func (u *uploads) path(keyID, project, hash string, now time.Time) string {
	payload := binary.BigEndian.AppendUint64(nil, uint64(now.Add(uploadTime).Unix()))
	digest, _ := hex.DecodeString(hash)
	payload = append(append(payload, digest...), keyID+"\x00"+project...)
	return uploadPath + base64.RawURLEncoding.EncodeToString(append(u.sign(payload), payload...))
}

// read returns what an address is for.
func (u *uploads) read(path string, now time.Time) (project, hash string, err error) {
	token, err := base64.RawURLEncoding.Strict().DecodeString(strings.TrimPrefix(path, uploadPath))
	const head = sha256.Size + 8 + sha256.Size
	if err != nil || len(token) < head || !hmac.Equal(token[:sha256.Size], u.sign(token[sha256.Size:])) {
		return "", "", refuse(http.StatusForbidden, "this is no address for an upload: ask for one with GET /templates/{templateID}/files/{hash}")
	}
	payload := token[sha256.Size:]
	if now.Unix() >= int64(binary.BigEndian.Uint64(payload)) {
		return "", "", refuse(http.StatusForbidden, "the address for this upload has expired: ask for another one")
	}
	keyID, project, _ := strings.Cut(string(token[head:]), "\x00")
	if u.revoked(keyID) {
		return "", "", refuse(http.StatusForbidden, "the API key that asked for this address was revoked")
	}
	return project, hex.EncodeToString(payload[8 : 8+sha256.Size]), nil
}

// before takes uploads, and leaves all other requests to next.
func (u *uploads) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, uploadPath) {
			next.ServeHTTP(w, r)
			return
		}
		if err := u.take(w, r); err != nil {
			u.fail(w, r, err)
			return
		}
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
	})
}

// take stores what a request puts at an address.
func (u *uploads) take(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodPut {
		w.Header().Set("Allow", http.MethodPut)
		return refuse(http.StatusMethodNotAllowed, "an archive is uploaded with PUT, not with %s", r.Method)
	}
	project, hash, err := u.read(r.URL.Path, time.Now())
	if err != nil {
		return err
	}
	tooLarge := refuse(http.StatusRequestEntityTooLarge, "the archive has more than %d bytes", int64(maxArchive))
	if r.ContentLength > maxArchive {
		return tooLarge
	}
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	case <-r.Context().Done():
		return r.Context().Err()
	}
	body := &noted{from: http.MaxBytesReader(w, r.Body, maxArchive)}
	err = u.put(r.Context(), project, hash, body)
	var limit *http.MaxBytesError
	switch {
	case err == nil || body.err == nil:
		return err
	case errors.As(body.err, &limit):
		return tooLarge
	}
	return refuse(http.StatusBadRequest, "the archive did not come in full: %s", body.err)
}

// noted keeps the error of a reader that has ended before its end.
type noted struct {
	from io.Reader
	err  error
}

func (n *noted) Read(p []byte) (int, error) {
	k, err := n.from.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		n.err = err
	}
	return k, err
}

// baseKey is the key of what baseOf returns.
type baseKey struct{}

// withBase says in a context by which address a client calls.
func withBase(ctx context.Context, r *http.Request) context.Context {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" { // a proxy in front of the agent adds the latter
		scheme = "https"
	}
	return context.WithValue(ctx, baseKey{}, scheme+"://"+r.Host)
}

func baseOf(ctx context.Context) string {
	base, _ := ctx.Value(baseKey{}).(string)
	return base
}
