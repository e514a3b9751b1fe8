package egress

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const httpIdle = 2 * time.Minute

// httpSide serves HTTP/1 connections request by request: each is judged by its
// own Host and goes to that host, however many come on one connection. What
// goes on is written anew, so that no server can read it differently.
type httpSide struct {
	proxy  *Proxy
	server http.Server
	turns  chan struct{}
	conns  chan net.Conn
	done   chan struct{}
	once   sync.Once
}

func newHTTPSide(p *Proxy) *httpSide {
	h := &httpSide{proxy: p, turns: make(chan struct{}, maxHTTP), conns: make(chan net.Conn), done: make(chan struct{})}
	h.server = http.Server{
		Handler: &httputil.ReverseProxy{
			Rewrite:       func(r *httputil.ProxyRequest) { h.rewrite(r) },
			Transport:     roundTripper{},
			FlushInterval: -1,
			ModifyResponse: func(r *http.Response) error {
				if tooManyLines(r.Header) {
					return errLines
				}
				return nil
			},
			ErrorLog: log.New(io.Discard, "", 0),
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
				if r := (*refusal)(nil); errors.As(err, &r) && r.rule != "" {
					forbid(w, r)
					return
				}
				// A client without a server sees what it would see without a proxy.
				panic(http.ErrAbortHandler)
			},
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, linkKey{}, c.(*httpConn).link)
		},
		ConnState: func(c net.Conn, st http.ConnState) {
			switch st {
			case http.StateClosed:
				c.(*httpConn).end()
			case http.StateHijacked:
				c.(*httpConn).hijacked.Store(true)
			}
		},
		ReadHeaderTimeout: firstBytes,
		IdleTimeout:       httpIdle,
		MaxHeaderBytes:    maxRequestHead,
		ErrorLog:          log.New(io.Discard, "", 0),
		Protocols:         new(http.Protocols),
	}
	h.server.Protocols.SetHTTP1(true)
	proxy := h.server.Handler
	h.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l := linkOf(r.Context())
		l.requests.Add(1)
		if ref := h.judge(l, r); ref != nil {
			p.refuse("request", ref.name, l.dst, ref.why)
			if ref.rule == "" {
				panic(http.ErrAbortHandler)
			}
			p.deny(KindHTTP, l.dst, ref)
			forbid(w, ref)
			return
		}
		// The server may answer before it has read all.
		http.NewResponseController(w).EnableFullDuplex()
		proxy.ServeHTTP(w, r)
	})
	return h
}

func (h *httpSide) serve() { h.server.Serve(h) }

// Accept, Close and Addr make it the listener of its own server.
func (h *httpSide) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *httpSide) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

func (h *httpSide) Addr() net.Addr { return h.proxy.cfg.Conns.Addr() }

func (h *httpSide) close() {
	h.Close()
	h.server.Close()
}

// carry serves a connection until it is closed.
func (h *httpSide) carry(l *link) {
	turns := []chan struct{}{h.turns, h.proxy.cfg.Shared.http}
	if !waitTurn(l.ctx.Done(), firstBytes, turns...) {
		h.proxy.refuse("connection", "", l.dst, "too many connections speak HTTP")
		return
	}
	defer func() { <-turns[0]; <-turns[1] }()
	l.client.SetReadDeadline(time.Time{})
	c := &httpConn{TCPConn: l.client, link: l, ended: make(chan struct{})}
	l.http = h.transport(l)
	defer l.http.CloseIdleConnections()
	select {
	case h.conns <- c:
		<-c.ended
	case <-h.done:
	}
	if l.requests.Load() == 0 {
		h.proxy.refuse("connection", "", l.dst, "no request came that is one")
	}
}

// httpConn is a client's connection with what was heard of it put back.
type httpConn struct {
	*net.TCPConn
	link     *link
	hijacked atomic.Bool
	ended    chan struct{}
	once     sync.Once
}

// end is called when no handler of the connection's runs any more.
func (c *httpConn) end() { c.once.Do(func() { close(c.ended) }) }

func (c *httpConn) Read(b []byte) (int, error) {
	if len(c.link.heard) > 0 {
		n := copy(b, c.link.heard)
		c.link.heard = c.link.heard[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

// WriteTo is what a connection that became a WebSocket is copied by.
func (c *httpConn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(c.link.heard)
	if err != nil {
		return int64(n), err
	}
	c.link.heard = nil
	m, err := c.TCPConn.WriteTo(w)
	return int64(n) + m, err
}

func (c *httpConn) Close() error {
	if c.hijacked.Load() {
		defer c.end() // by the handler, as the last it does
	}
	return c.TCPConn.Close()
}

// shown returns the name that a request is for; addresses are none.
func shown(r *http.Request) (name string, ok bool) {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return canonical(host)
}

// forbid answers a request that the policy refuses. The connection ends with it, for
// the rest of the request is not read.
func forbid(w http.ResponseWriter, r *refusal) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusForbidden)
	io.WriteString(w, r.sentence())
}

// judge returns a refusal for a request that must not go on.
func (h *httpSide) judge(l *link, r *http.Request) *refusal {
	name, ok := shown(r)
	switch {
	case r.Method == http.MethodConnect:
		return &refusal{name, "CONNECT is for proxies that are asked", ruleProtocol}
	case r.ProtoMajor != 1 || r.Method == "PRI":
		return &refusal{name, "HTTP/2 without TLS carries many hosts at once", ruleProtocol}
	case tooManyLines(r.Header):
		return &refusal{name: name, why: "the request has too many header lines"}
	case !ok:
		return &refusal{r.Host, "the request has no host that is a name", ruleNoName}
	}
	if rule := h.proxy.denies(name); rule != "" {
		return &refusal{name, rule, rule}
	}
	return nil
}

func (h *httpSide) rewrite(r *httputil.ProxyRequest) {
	l := linkOf(r.In.Context())
	name, _ := shown(r.In)
	r.Out.URL.Scheme, r.Out.URL.Host = "http", net.JoinHostPort(name, portOf(l.dst))
	r.Out.Host = r.In.Host
	// ReverseProxy would change these; the server gets them as the client sent them.
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	for _, f := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := r.In.Header[f]; ok {
			r.Out.Header[f] = v
		}
	}
	// HTTP/2 begun by an upgrade carries many hosts, too.
	if up := r.Out.Header.Get("Upgrade"); up != "" && !strings.EqualFold(up, "websocket") {
		r.Out.Header.Del("Upgrade")
		r.Out.Header.Del("Connection")
	}
	r.Out.Header.Del("Http2-Settings")
}

func portOf(a netip.AddrPort) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
}

// roundTripper uses the transport of the request's own connection: nothing is
// shared with others.
type roundTripper struct{}

func (roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	l := linkOf(r.Context())
	if l == nil {
		return nil, errors.New("request without a connection")
	}
	return l.http.RoundTrip(r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { i.Conn.(*headConn).expect() },
	})))
}

func (h *httpSide) transport(l *link) *http.Transport {
	t := &http.Transport{
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			up, err := h.proxy.connect(l, host)
			if err != nil {
				h.proxy.refuse("request", host, l.dst, err.Error())
				if r := (*refusal)(nil); errors.As(err, &r) && r.rule != "" {
					h.proxy.deny(KindHTTP, l.dst, r)
				}
				return nil, err
			}
			return &headConn{Conn: up}, nil
		},
		DisableCompression:     true,
		MaxIdleConns:           1,
		MaxResponseHeaderBytes: maxResponseHead,
		IdleConnTimeout:        httpIdle / 4,
		ExpectContinueTimeout:  time.Second,
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	return t
}
