package gateway

import (
	"net/http"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// reserved are envd's endpoints for the host agent alone.
var reserved = guestapi.HostOnly()

// hostPattern is <port>-<sandbox id>.<anything>. Letters are ASCII's: no other letter
// is taken for one of these.
var hostPattern = regexp.MustCompile(`^([0-9]{1,5})-([A-Za-z0-9][A-Za-z0-9_-]*)\.`)

// place is a port of a sandbox as a request names it.
type place struct {
	// written is the id as the request has it, id what it means; id is empty if no
	// sandbox can be called so.
	written string
	id      sandbox.ID
	port    uint16
	// byName says that the host name does so. Such a request goes to that sandbox,
	// from wherever it was sent.
	byName bool
	// signed is the signature of a request that names its sandbox by nothing else; nil
	// for other requests.
	signed *signed
}

// placeOf returns what a request names; nil if it names no sandbox. A request that
// names two, or a port of none, is an errdefs.InvalidArgument.
func (d door) placeOf(r *http.Request) (*place, error) {
	ids, ports := given(r.Header, guestapi.HeaderSandboxID), given(r.Header, guestapi.HeaderSandboxPort)
	p, port := &place{}, strconv.Itoa(guestapi.Port)
	if m := hostPattern.FindStringSubmatch(r.Host); m != nil && d.namesSandbox(r, m[2]) {
		p.written, p.byName, port = strings.ToLower(m[2]), true, m[1]
	} else {
		switch {
		case len(ids) > 0:
			p.written = ids[0]
		case len(ports) > 0:
			return p, errdefs.InvalidArgument.Errorf("the request names port %.10q and no sandbox", ports[0])
		default:
			if p.signed = signedOf(r); p.signed == nil {
				return nil, nil
			}
		}
		if len(ports) > 0 {
			port = ports[0]
		}
	}
	p.id, _ = sandbox.ParseLooseID(p.written)
	for _, id := range ids {
		if !sameID(id, p.written) {
			return p, errdefs.InvalidArgument.Errorf("the request names two sandboxes, %.40q and %.40q", p.written, id)
		}
	}
	var err error
	if p.port, err = parsePort(port); err != nil {
		return p, err
	}
	for _, text := range ports {
		if other, err := parsePort(text); err != nil || other != p.port {
			return p, errdefs.InvalidArgument.Errorf("the request names two ports, %.10q and %.10q", port, text)
		}
	}
	return p, nil
}

// given are the values of a header that are not empty.
func given(h http.Header, name string) []string {
	return slices.DeleteFunc(slices.Clone(h.Values(name)), func(v string) bool { return v == "" })
}

// namesSandbox reports whether the word after the port in a host name is meant as an
// id: every word is, except in a name of this agent.
func (d door) namesSandbox(r *http.Request, word string) bool {
	_, ok := sandbox.ParseLooseID(strings.ToLower(word))
	return ok || !d.ours(r)
}

// sameID reports whether two texts are spellings of one id.
func sameID(a, b string) bool {
	one, ok1 := sandbox.ParseLooseID(a)
	other, ok2 := sandbox.ParseLooseID(b)
	if ok1 || ok2 {
		return one == other
	}
	return a == b
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, errdefs.InvalidArgument.Errorf("port %.10q is not a number from 1 to 65535", text)
	}
	return uint16(port), nil
}

// isReserved reports whether a request asks envd for one of the host's endpoints.
func (p *place) isReserved(r *http.Request) bool {
	return p.port == guestapi.Port && (r.Method == http.MethodConnect || isReserved(r.URL.Path))
}

// isReserved reports whether envd might take the path, however it is spelled,
// for one of the host's endpoints.
func isReserved(p string) bool {
	return slices.Contains(reserved, path.Clean("/"+p))
}
