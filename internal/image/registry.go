package image

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// tries bounds how often a request is made whose answer does not come, or a
	// download goes on that breaks off without having brought anything.
	tries = 4
	// stalled is how long a registry may send nothing.
	stalled = time.Minute
)

// registry is one repository of a registry, as one caller may use it.
type registry struct {
	repo      name.Repository
	anonymous bool
	client    *http.Client
	base      *http.Transport
}

// connect finds out how the repository's registry wants to be asked. Close must be called.
func connect(ctx context.Context, repo name.Repository, c Credentials) (*registry, error) {
	local := isLoopback(repo.RegistryStr())
	base := newTransport(local)
	auth := authn.Anonymous
	if c != (Credentials{}) {
		auth = authn.FromConfig(authn.AuthConfig{Username: c.Username, Password: c.Password})
	}
	r := &registry{repo: repo, anonymous: c == (Credentials{}), base: base}
	var rt http.RoundTripper
	err := r.retry(ctx, func() (err error) {
		rt, err = transport.NewWithContext(ctx, repo.Registry, auth, &guard{base, local}, []string{repo.Scope(transport.PullScope)})
		return err
	})
	if err != nil {
		base.CloseIdleConnections()
		return nil, err
	}
	r.client = &http.Client{Transport: rt}
	return r, nil
}

func (r *registry) Close() { r.base.CloseIdleConnections() }

// isLoopback reports whether a host, with a port or without, is this machine by its name.
func isLoopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// guard lets plain http through to a registry on this machine only.
type guard struct {
	to    http.RoundTripper
	local bool
}

var errPlain = errors.New("it is asked without TLS, which only a registry on this machine may be")

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !(g.local && isLoopback(req.URL.Host)) {
		return nil, errPlain
	}
	return g.to.RoundTrip(req)
}

var errInside = errors.New("it leads to an address of this machine")

// newTransport connects to registries. One that is not on this machine can lead neither to
// this machine nor to services of its link, such as those that hand out keys in clouds.
func newTransport(local bool) *http.Transport {
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	if !local {
		dialer.Control = func(_, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if ip := to.Addr().Unmap(); err != nil || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() {
				return errInside
			}
			return nil
		}
	}
	return &http.Transport{
		DialContext:            dialer.DialContext,
		TLSHandshakeTimeout:    15 * time.Second,
		ResponseHeaderTimeout:  stalled,
		MaxResponseHeaderBytes: 64 << 10,
		IdleConnTimeout:        time.Minute,
		MaxIdleConnsPerHost:    parallel,
		DisableCompression:     true, // a part of a blob is a part of what is stored
	}
}

// statusError is an answer other than the one that was asked for.
type statusError struct{ code int }

func (e *statusError) Error() string {
	return fmt.Sprintf("the registry answers %d %s", e.code, http.StatusText(e.code))
}

// get asks for a path of the repository. The caller closes the body.
func (r *registry) get(ctx context.Context, method, path string, header http.Header, want ...int) (*http.Response, error) {
	u := url.URL{Scheme: r.repo.Registry.Scheme(), Host: r.repo.RegistryStr(), Path: "/v2/" + r.repo.RepositoryStr() + "/" + path}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	for _, code := range want {
		if resp.StatusCode == code {
			return resp, nil
		}
	}
	resp.Body.Close()
	return nil, &statusError{resp.StatusCode}
}

// small returns the whole answer, which has at most limit bytes.
func (r *registry) small(ctx context.Context, path, accept string, limit int64) (body []byte, header http.Header, err error) {
	err = r.retry(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*stalled)
		defer cancel()
		resp, err := r.get(ctx, http.MethodGet, path, http.Header{"Accept": {accept}}, http.StatusOK)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
		if int64(len(body)) > limit {
			return errdefs.InvalidArgument.Errorf("the image's manifest or configuration has more than %d bytes", limit)
		}
		header = resp.Header
		return err
	})
	return body, header, err
}

// retry makes an attempt again after failures that pass, a moment later each time, and
// gives the last error a class and a text without secrets.
func (r *registry) retry(ctx context.Context, attempt func() error) error {
	for n := 1; ; n++ {
		err := attempt()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if n >= tries || !passing(err) {
			return r.explain(err)
		}
		if err := pause(ctx, n); err != nil {
			return err
		}
	}
}

// pause waits before attempt n+1.
func pause(ctx context.Context, n int) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(time.Duration(n*n) * 100 * time.Millisecond):
		return nil
	}
}

// code is the status with which the registry, or its token server, refused; 0 for another error.
func code(err error) int {
	var status *statusError
	var refused *transport.Error
	switch {
	case errors.As(err, &status):
		return status.code
	case errors.As(err, &refused):
		return refused.StatusCode
	}
	return 0
}

// passing reports whether it may go better soon.
func passing(err error) bool {
	if c := code(err); c != 0 {
		return c == http.StatusTooManyRequests || c == http.StatusRequestTimeout || c >= 500
	}
	var dns *net.DNSError
	switch {
	case errdefs.ClassOf(err) != nil, errors.Is(err, errPlain), errors.Is(err, errInside), errors.Is(err, syscall.ECONNREFUSED):
		return false
	case errors.As(err, &dns):
		return dns.IsTemporary && !dns.IsNotFound
	case isCertificate(err):
		return false
	}
	return true
}

func isCertificate(err error) bool {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var other x509.HostnameError
	return errors.As(err, &unknown) || errors.As(err, &invalid) || errors.As(err, &other)
}

// explain makes of an error a sentence without the URL that was asked, in which there may
// be a secret, and without what the registry has to say of it.
func (r *registry) explain(err error) error {
	if errdefs.ClassOf(err) != nil {
		return err
	}
	host := errdefs.Foreign(r.repo.RegistryStr())
	switch c := code(err); {
	case c == http.StatusUnauthorized && r.anonymous, c == http.StatusForbidden && r.anonymous:
		return errdefs.Denied.Errorf("access denied by %s: it does not exist, or needs credentials", host)
	case c == http.StatusUnauthorized, c == http.StatusForbidden:
		return errdefs.Denied.Errorf("access denied by %s with these credentials", host)
	case c == http.StatusNotFound:
		return errdefs.NotFound.Errorf("not found at %s", host)
	case c == http.StatusTooManyRequests:
		return errdefs.Unavailable.Errorf("%s answers no more requests for now", host)
	case c != 0:
		return errdefs.Unavailable.Errorf("%s answers %d %s", host, c, http.StatusText(c))
	}
	var dns *net.DNSError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, errPlain):
		return errdefs.InvalidArgument.Errorf("%s: %w", host, errPlain)
	case errors.Is(err, errInside):
		return errdefs.Denied.Errorf("%s: %w", host, errInside)
	case errors.As(err, &dns):
		return errdefs.Unavailable.Errorf("the address of %s is not found", host)
	case isCertificate(err):
		return errdefs.Unavailable.Errorf("%s has no certificate that this host trusts", host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return errdefs.Unavailable.Errorf("%s takes no connections", host)
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.Canceled):
		return errdefs.Unavailable.Errorf("%s does not answer in time", host)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return errdefs.Unavailable.Errorf("%s breaks connections off", host)
	}
	return errdefs.Unavailable.Errorf("%s does not speak as a registry does", host)
}

// has reports, by no error, whether the caller may have the blob.
func (r *registry) has(ctx context.Context, digest string) error {
	client := *r.client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	asking := &registry{repo: r.repo, anonymous: r.anonymous, client: &client}
	return r.retry(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, stalled)
		defer cancel()
		resp, err := asking.get(ctx, http.MethodHead, "blobs/"+digest, nil,
			http.StatusOK, http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}

// blob copies the blob from the byte off on to w, as far as it comes. off becomes 0 where
// the registry begins at the start again, of which restart is told before.
func (r *registry) blob(ctx context.Context, digest string, off, size int64, restart func() error, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	header := http.Header{}
	if off > 0 {
		header.Set("Range", "bytes="+strconv.FormatInt(off, 10)+"-")
	}
	resp, err := r.get(ctx, http.MethodGet, "blobs/"+digest, header, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusPartialContent && off > 0 {
		if !strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", off)) {
			return errdefs.Unavailable.Errorf("the registry sends another part of the blob than it was asked for")
		}
	} else if off > 0 {
		if err := restart(); err != nil {
			return err
		}
		off = 0
	}
	if n := resp.ContentLength; n >= 0 && n != size-off {
		return errdefs.Corrupt.Errorf("the registry has %d bytes as %s, and the image says %d", n+off, digest, size)
	}
	late := time.AfterFunc(stalled, cancel)
	defer late.Stop()
	body := &counter{r: resp.Body, ctx: ctx, onRead: func(int64) { late.Reset(stalled) }}
	// One byte more than there should be shows that there are more.
	_, err = io.Copy(w, io.LimitReader(body, size-off+1))
	return err
}
