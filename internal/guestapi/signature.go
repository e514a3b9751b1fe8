package guestapi

import (
	"crypto/sha256"
	"encoding"
	"encoding/base64"
	"hash"
	"io"
	"net/url"
)

// QuerySignature is the parameter of a request for PathFiles that shows, in the
// token's place, that its sender knows the token.
const QuerySignature = "signature"

// The operations that a URL can be signed for.
const (
	SignRead  = "read"
	SignWrite = "write"
)

// SignedFile is what a signature is for.
type SignedFile struct {
	// Path and User are as they stand in the query, Expiration is in Unix seconds or
	// empty.
	Path, Operation, User, Expiration string
}

// SignedFileOf reads the query of a request for PathFiles.
func SignedFileOf(q url.Values, operation string) SignedFile {
	return SignedFile{Path: q.Get("path"), Operation: operation, User: q.Get("username"), Expiration: q.Get("signature_expiration")}
}

// Signer returns a function that signs with a token. The function is for one goroutine
// and takes a time that does not depend on the length of the path.
func (f SignedFile) Signer() func(token string) string {
	h := sha256.New()
	io.WriteString(h, f.Path+":"+f.Operation+":"+f.User+":")
	before, err := h.(encoding.BinaryAppender).AppendBinary(nil)
	if err != nil {
		panic(err) // a SHA-256 has no state that cannot be kept
	}
	after := ""
	if f.Expiration != "" {
		after = ":" + f.Expiration
	}
	again := h.(interface {
		hash.Hash
		encoding.BinaryUnmarshaler
	})
	return func(token string) string {
		if err := again.UnmarshalBinary(before); err != nil {
			panic(err) // it was appended by the same type
		}
		io.WriteString(again, token+after)
		return "v1_" + base64.RawStdEncoding.EncodeToString(again.Sum(nil))
	}
}
