// Package auth knows who calls: API keys, the projects that they belong to, and
// how often each key may call.
package auth

import (
	"context"
	"net/http"
	"regexp"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// DefaultProject owns the keys that are made without a project.
const DefaultProject = "default"

// Project owns sandboxes, snapshots, templates and keys. Its name is for ever: it
// is what records say, and the namespace of the project's templates.
type Project struct {
	Name string `json:"name"`
	// ID is a UUID, for clients that want one.
	ID        string    `json:"id"`
	Quota     Quota     `json:"quota,omitzero"`
	CreatedAt time.Time `json:"createdAt"`
}

// Quota bounds what a project's sandboxes take together; 0 is no bound.
type Quota struct {
	Sandboxes int `json:"sandboxes,omitempty"`
	VCPUs     int `json:"vcpus,omitempty"`
	MemMiB    int `json:"memMiB,omitempty"`
	DiskMiB   int `json:"diskMiB,omitempty"`
}

// Key is what the store tells of an API key; the key itself it does not know.
type Key struct {
	// ID names the key in lists and logs. It opens nothing.
	ID string `json:"id"`
	// Name is its user's own word for it, and may be empty.
	Name    string `json:"name,omitempty"`
	Project string `json:"project"`
	// Digest is the SHA-256 of the key in hexadecimal.
	Digest    string    `json:"digest"`
	CreatedAt time.Time `json:"createdAt"`
	// LastUsedAt is zero for a key that was never used. It may be a minute old.
	LastUsedAt time.Time `json:"-"`
}

// Caller is who calls: the holder of a valid key, or who commands the host.
type Caller struct {
	// KeyID names the key. Of a caller without one it says how the caller came.
	KeyID   string
	Project Project
	// Host means that the caller has no key and every project.
	Host bool
	// Key is the key itself, as the caller showed it. Secret.
	Key string
}

// String leaves the key out.
func (c Caller) String() string { return c.KeyID + " of project " + c.Project.Name }

var (
	namePattern    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._ -]{0,62}$`)
	projectPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)
	keyPattern     = regexp.MustCompile(`^e2b_[0-9a-f]{40}$`)
)

func checkProjectName(name string) error {
	if !projectPattern.MatchString(name) {
		return errdefs.InvalidArgument.Errorf("project %.70q: want up to 63 of a-z, 0-9, - and _, the first a letter or digit", name)
	}
	return nil
}

func (q Quota) check() error {
	for what, n := range map[string]int{"sandboxes": q.Sandboxes, "vcpus": q.VCPUs, "memory": q.MemMiB, "disk": q.DiskMiB} {
		if n < 0 || n > 1<<30 {
			return errdefs.InvalidArgument.Errorf("quota of %s: %d is not between 0 and %d", what, n, 1<<30)
		}
	}
	return nil
}

// KeyOf returns the key that a request shows, in X-API-KEY or as a bearer token;
// empty if it shows none.
func KeyOf(h http.Header) string {
	if key := h.Get("X-API-KEY"); key != "" {
		return key
	}
	return Bearer(h)
}

// Bearer returns the bearer token of a request, or nothing.
func Bearer(h http.Header) string {
	scheme, token, ok := strings.Cut(h.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

type callerKey struct{}

// WithCaller returns a context that knows its caller.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerOf returns the caller of a context; ok is false for one without.
func CallerOf(ctx context.Context) (c Caller, ok bool) {
	c, ok = ctx.Value(callerKey{}).(Caller)
	return c, ok
}
