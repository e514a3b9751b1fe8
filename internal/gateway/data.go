package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// wakeTries is how often a request looks again whether its sandbox runs, after the
// sandbox has changed while the request was on its way there.
const wakeTries = 3

// visit is a request to a place, and what it shows of the sandbox's secrets.
type visit struct {
	*place
	body *body        // nil without one
	info sandbox.Info // as it was when it was last looked at
	// private says that the sandbox's own servers are not public.
	private bool
	// owner, signer and guest say that the request shows the token of envd, a signature
	// that was made with it, or the token of private traffic.
	owner, signer, guest bool
}

// serveData answers a request that names a sandbox.
func (g *Gateway) serveData(w http.ResponseWriter, r *http.Request, place *place, b *body) {
	if place.isReserved(r) {
		writeJSON(w, http.StatusNotFound, refusal{
			Code: http.StatusNotFound, Message: "this endpoint is reserved for the host agent", Path: r.URL.Path,
		})
		return
	}
	v, no := g.admit(r, &visit{place: place, body: b})
	if no != nil {
		place.turnAway(w, r, *no)
		return
	}
	this := load{v.id, v.kind()}
	if !g.enter(this) {
		w.Header().Set("Retry-After", "1")
		place.turnAway(w, r, v.refusal(errdefs.Exhausted.Errorf(
			"sandbox %s has %d requests of this kind under way, which is the most", v.id, maxPerSandbox)))
		return
	}
	defer g.leave(this)
	lease, no := g.lease(sandbox.WithActor(r.Context(), actor(r)), v)
	if no != nil {
		place.turnAway(w, r, *no)
		return
	}
	defer lease.Release()
	g.serveGuest(w, r, passing{g, r, lease, v})
}

// actor is the caller as the event of a sandbox that it wakes has it.
func actor(r *http.Request) sandbox.Actor {
	if _, err := netip.ParseAddrPort(r.RemoteAddr); err != nil {
		return sandbox.Actor{KeyID: "socket", What: "traffic"}
	}
	return sandbox.Actor{Address: r.RemoteAddr, What: "traffic"}
}

// admit finds the sandbox that a request is for, and says whether the request may go
// there. It waits for nothing and does not count as activity.
func (g *Gateway) admit(r *http.Request, v *visit) (_ *visit, no *refusal) {
	refused := func(no refusal) (*visit, *refusal) { return nil, &no }
	if !v.byName {
		if err := g.door.checkHost(r); err != nil {
			return refused(v.refusal(err))
		}
	}
	if v.signed != nil {
		v.id, _ = g.search(r.Context(), v.signed)
		v.written = v.id.Short()
	}
	info, tokens, err := g.look(v.id)
	v.info = info
	v.show(r, tokens)
	// A page that knows a secret of the sandbox, or has a signature, was given it.
	if !v.byName && !v.signer && !v.owner && !v.guest && v.signed == nil {
		if err := g.door.checkOrigin(r); err != nil {
			return refused(v.refusal(err))
		}
	}
	switch {
	case err != nil:
		return refused(g.unasked(v.place, err))
	case !runs(info) && !wakes(info):
		return refused(v.notFound())
	case !v.private || v.port == guestapi.Port || v.guest:
		return v, nil
	case r.Header.Get(guestapi.HeaderTraffic) == "":
		return refused(v.refuse(http.StatusForbidden, textNoTraffic))
	default:
		return refused(v.refuse(http.StatusForbidden, textWrongTraffic))
	}
}

// look returns what is known of a sandbox; an empty id is none's.
func (g *Gateway) look(id sandbox.ID) (info sandbox.Info, tokens sandbox.Tokens, err error) {
	if id == "" {
		return info, tokens, errdefs.NotFound.Errorf("there is no such sandbox")
	}
	if tokens, err = g.sandboxes.Tokens(id); err == nil {
		info, err = g.sandboxes.Get(id)
	}
	return info, tokens, err
}

// runs reports whether a sandbox can be called: one that is being paused cannot.
func runs(info sandbox.Info) bool { return info.State == sandbox.Running && !info.Pausing }

// wakes reports whether a sandbox that does not run may be resumed for a request.
func wakes(info sandbox.Info) bool {
	return info.AutoResume && !info.FilesOnly &&
		(info.Pausing || info.State == sandbox.Running || info.State == sandbox.Paused || info.State == sandbox.Hibernated)
}

// show notes which of the sandbox's secrets a request shows.
func (v *visit) show(r *http.Request, tokens sandbox.Tokens) {
	v.private = tokens.Traffic != ""
	v.owner = tokens.Envd != "" && equal(tokens.Envd, r.Header.Get(guestapi.HeaderToken))
	v.guest = v.private && equal(tokens.Traffic, r.Header.Get(guestapi.HeaderTraffic))
	if s := signedOf(r); s != nil && v.port == guestapi.Port {
		v.signer = s.by(tokens)
	}
}

// kind returns the kind of the request.
func (v *visit) kind() kind {
	switch {
	case v.port != guestapi.Port:
		return toPort
	case v.owner || v.signer:
		return ofOwner
	default:
		return ofOthers
	}
}

// mayWake reports whether the request shows what it needs to resume a sandbox: for
// envd's port its token, for the ports of users' servers what these demand anyway.
func (v *visit) mayWake() bool { return v.owner || v.port != guestapi.Port }

// lease takes a lease on the sandbox, and resumes it first if it is paused and the
// request may do that.
func (g *Gateway) lease(ctx context.Context, v *visit) (*sandbox.Lease, *refusal) {
	take := g.sandboxes.Lease
	if v.kind() == ofOthers {
		take = g.sandboxes.Glance
	}
	var err error
	for range wakeTries {
		if !runs(v.info) {
			if no := g.wake(ctx, v); no != nil {
				return nil, no
			}
		}
		var lease *sandbox.Lease
		if lease, err = take(ctx, v.id); err == nil {
			return lease, nil
		}
		info, gone := g.sandboxes.Get(v.id)
		if errdefs.ClassOf(err) != errdefs.WrongState || gone != nil {
			break
		}
		v.info = info // it may have been paused since
	}
	refused := g.unasked(v.place, err)
	return nil, &refused
}

// wake resumes a sandbox that does not run; it returns the answer for a request that
// does not get that.
func (g *Gateway) wake(ctx context.Context, v *visit) *refusal {
	var no refusal
	switch {
	case !wakes(v.info):
		no = v.notFound()
	case !v.mayWake():
		no = v.refuse(http.StatusForbidden, textNotToBeWoken)
	default:
		err := g.sandboxes.Wake(ctx, v.id)
		if err == nil {
			return nil
		}
		no = g.unasked(v.place, err)
	}
	return &no
}

// passing is a request on its way to a guest.
type passing struct {
	*Gateway
	caller *http.Request
	lease  *sandbox.Lease
	*visit
}

// serveGuest lets the guest that a request is for answer it.
func (g *Gateway) serveGuest(w http.ResponseWriter, r *http.Request, p passing) {
	ctx, cancel := p.lease.Context(r.Context())
	defer cancel()
	r = r.WithContext(ctx)
	if p.body != nil {
		r = r.WithContext(context.WithValue(ctx, bodyKey{}, p.body))
		// It is not clear which bytes after an upgrade are the body's. A server may
		// always go on without the upgrade that it was asked for.
		r.Header = r.Header.Clone()
		r.Header.Del("Upgrade")
	}
	link, addr := g.links.of(p.lease), netip.AddrPortFrom(p.lease.Addr, p.port).String()
	if r.Method == http.MethodConnect {
		g.tunnel(w, r, link, addr, p.fail)
		return
	}
	p.forward(w, r, link.transport(r, p.port == guestapi.Port), addr)
}

// ended says why the sandbox ended; it is empty if the sandbox did not.
func (p passing) ended() string {
	if err := p.lease.Ended(p.caller.Context()); err != nil {
		return err.Error()
	}
	return ""
}

// fail answers a request that the guest did not answer.
func (p passing) fail(w http.ResponseWriter, err error) {
	p.log.Debug("data plane request failed", "sandbox", p.id, "port", p.port, "err", err)
	gone := p.lease.Alive.Err() != nil || p.port == guestapi.Port && p.ended() != ""
	var no refusal
	switch {
	case p.body.hasStalled():
		no = p.refuse(http.StatusRequestTimeout, fmt.Sprintf("nothing more of the request came for %s", dataIdle))
	case gone:
		no = p.notFound()
	case errors.Is(err, errNotOpen):
		no = p.refuse(http.StatusBadGateway, textNotOpen)
	default:
		no = p.refuse(http.StatusBadGateway, fmt.Sprintf("port %d of sandbox %s gave no answer that can be passed on", p.port, p.written))
	}
	p.turnAway(w, p.caller, no)
}

// forward passes a request on to an address in the guest. The client sends the token
// that envd demands. The gateway adds none, because it does not know who sent the
// request.
func (p passing) forward(w http.ResponseWriter, r *http.Request, transport http.RoundTripper, addr string) {
	proxy := httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host = "http", addr
			pr.Out.Host = p.hostFor(pr.In.Host)
			pr.Out.Header.Del(guestapi.HeaderSandboxID)
			pr.Out.Header.Del(guestapi.HeaderSandboxPort)
			pr.Out.Header.Del(guestapi.HeaderTraffic)
			pr.SetXForwarded()
		},
		Transport: transport,
		ModifyResponse: func(resp *http.Response) error {
			p.confine(resp.Header)
			endWell(resp, p.ended, p.lease.Alive)
			return nil
		},
		BufferPool:   buffers,
		ErrorLog:     slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { p.fail(w, err) },
	}
	proxy.ServeHTTP(w, r)
}

// confine keeps what a guest answers from acting as the agent in a browser. A link to a
// signed file is under the agent's own name, and a page there could command the host: it
// gets no name instead. Other requests by the agent's name have headers that no link
// has.
func (p passing) confine(h http.Header) {
	if p.signed == nil {
		return
	}
	h.Add("Content-Security-Policy", "sandbox")
	h.Set("X-Content-Type-Options", "nosniff")
	for _, name := range []string{"Set-Cookie", "Alt-Svc", "Strict-Transport-Security", "Clear-Site-Data", "Service-Worker-Allowed"} {
		h.Del(name)
	}
}

// hostFor returns the Host that the guest's server sees of one that a client sent.
func (p passing) hostFor(sent string) string {
	mask := p.info.Ingress.MaskHost
	if mask == "" || p.port == guestapi.Port {
		return sent
	}
	return strings.ReplaceAll(mask, "${PORT}", strconv.Itoa(int(p.port)))
}
