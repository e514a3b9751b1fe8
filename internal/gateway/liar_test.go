package gateway

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/testenv/liar"
)

// passer passes requests on over a link to a guest at an address, as the
// gateway does.
func passer(t *testing.T, addr netip.AddrPort) (*link, *httptest.Server) {
	t.Helper()
	alive, end := context.WithCancel(t.Context())
	links := &links{}
	l := links.of(&sandbox.Lease{Addr: addr.Addr(), Token: liar.Token, Alive: alive})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxy := httputil.ReverseProxy{
			Rewrite: func(p *httputil.ProxyRequest) {
				p.Out.URL.Scheme, p.Out.URL.Host = "http", addr.String()
				p.Out.Header.Set(guestapi.HeaderToken, liar.Token)
			},
			Transport: l.transport(r, true), BufferPool: buffers,
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, _ error) {
				refuse(w, r, refusal{Code: http.StatusBadGateway, Message: "no answer"})
			},
		}
		defer func() { _ = recover() }() // how it ends an answer that breaks off
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(func() { front.Close(); end() })
	return l, front
}

// TestLiars has a guest lie to the gateway in every way: what it passes on it
// does not keep, and it follows nothing.
func TestLiars(t *testing.T) {
	for _, lie := range liar.Lies() {
		t.Run(strings.ReplaceAll(lie.Name, " ", "_"), func(t *testing.T) {
			g := liar.Start(t, lie, "127.0.0.1:0")
			_, front := passer(t, g.Addr())
			client := &http.Client{
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
				Transport:     &http.Transport{DisableCompression: true, DisableKeepAlives: true},
			}
			// What is in a stream is not the gateway's to know.
			endless := lie.Endless || lie.OfStreams
			grew := liar.Growth(func() {
				limit := 30 * time.Second
				if endless {
					limit = 50 * time.Millisecond
				}
				ctx, cancel := g.Within(t.Context(), limit)
				defer cancel()
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, front.URL+"/process.Process/Start", http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Connect-Protocol-Version", "1")
				req.Header.Set("Content-Type", "application/connect+proto")
				resp, err := client.Do(req)
				if err != nil {
					if !endless {
						t.Errorf("no answer: %v", err)
					}
					return
				}
				defer resp.Body.Close()
				// The answer of a lie may be without end, its reader is not.
				_, _ = io.CopyN(io.Discard, resp.Body, 1<<20)
				checkPassed(t, lie, resp)
			})
			if !g.Asked() {
				t.Error("the guest was not asked")
			}
			if grew > liar.MaxGrowth {
				t.Errorf("the memory grew by %d MiB", grew>>20)
			}
			if hits := g.Canary.Hits(); len(hits) != 0 {
				t.Errorf("another server was called: %q", hits)
			}
		})
	}
}

// checkPassed: a redirect is the client's to see, and what is too much is refused.
func checkPassed(t *testing.T, lie liar.Lie, resp *http.Response) {
	t.Helper()
	var status int
	switch {
	case strings.HasPrefix(lie.Name, "redirect "):
		if resp.StatusCode/100 != 3 || resp.StatusCode != http.StatusNotModified && resp.Header.Get("Location") == "" {
			t.Errorf("the redirect did not come: %s", resp.Status)
		}
		return
	case strings.HasPrefix(lie.Name, "endless 10"), lie.Name == "endless headers",
		strings.HasSuffix(lie.Name, "of a gigabyte") && !lie.OfStreams:
		status = http.StatusBadGateway
	default:
		return
	}
	if resp.StatusCode != status {
		t.Errorf("the answer is %s, want %d", resp.Status, status)
	}
}

// TestLiarsInside has a guest lie when it is asked to connect to its loopback.
func TestLiarsInside(t *testing.T) {
	// An address of this process's own, for the port is always the same.
	pid := os.Getpid()
	addr := fmt.Sprintf("127.%d.%d.%d", 16+pid>>16&0x7f, pid>>8&0xff, pid&0xff)
	for _, lie := range liar.Lies() {
		if lie.OfStreams {
			continue
		}
		t.Run(strings.ReplaceAll(lie.Name, " ", "_"), func(t *testing.T) {
			g := liar.Start(t, lie, net.JoinHostPort(addr, fmt.Sprint(guestapi.Port)))
			l, _ := passer(t, g.Addr())
			var err error
			grew := liar.Growth(func() {
				limit := 30 * time.Second
				if lie.Endless {
					limit = 50 * time.Millisecond
				}
				ctx, cancel := g.Within(t.Context(), limit)
				defer cancel()
				var conn net.Conn
				if conn, err = l.dialInside(ctx, 1); err == nil {
					conn.Close()
				}
			})
			if grew > liar.MaxGrowth {
				t.Errorf("the memory grew by %d MiB", grew>>20)
			}
			if hits := g.Canary.Hits(); len(hits) != 0 {
				t.Errorf("another server was called: %q", hits)
			}
			if err != nil && len(err.Error()) > errdefs.MaxForeign+200 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if strings.HasPrefix(lie.Name, "redirect ") && err == nil {
				t.Error("a redirect is taken for a connection")
			}
		})
	}
}
