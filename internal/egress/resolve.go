package egress

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// upstreamTimeout is how long one resolver may think about one question.
	upstreamTimeout = 2 * time.Second
	// upstreamTries bounds how often a question is asked in all.
	upstreamTries = 3
	// ednsSize is the largest datagram that passes everywhere unfragmented.
	ednsSize = 1232

	// Answers are remembered for as long as they say, within bounds: a guest
	// that connects often asks once, and a change is seen soon.
	minTTL, maxTTL = 5 * time.Second, time.Minute
	maxCached      = 1024
	// maxAddrs bounds the addresses taken from one answer.
	maxAddrs = 32
	maxChain = 16
)

// resolver asks the configured name servers, from the host, with no regard to
// the host's own hosts file or search list.
type resolver struct {
	servers []netip.AddrPort
	shared  *Shared

	mu    sync.Mutex
	cache map[string]answer
}

type answer struct {
	addrs   []netip.Addr
	expires time.Time
}

// lookup returns the IPv4 addresses of a canonical name; none if there are
// none.
func (r *resolver) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	now := time.Now()
	r.mu.Lock()
	a, ok := r.cache[name]
	r.mu.Unlock()
	if ok && now.Before(a.expires) {
		return a.addrs, nil
	}
	qname, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, err)
	}
	msg, err := r.exchange(ctx, dnsmessage.Question{Name: qname, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}, nil)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, err)
	}
	addrs, ttl, err := addrsOf(msg, name)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cache == nil || len(r.cache) >= maxCached {
		r.cache = map[string]answer{}
	}
	r.cache[name] = answer{addrs, now.Add(min(max(ttl, minTTL), maxTTL))}
	return addrs, nil
}

// addrsOf returns the addresses that an answer gives to a name, through the
// aliases in it.
func addrsOf(msg []byte, name string) ([]netip.Addr, time.Duration, error) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil {
		return nil, 0, err
	}
	if h.RCode == dnsmessage.RCodeNameError {
		return nil, minTTL, nil
	}
	if h.RCode != dnsmessage.RCodeSuccess {
		return nil, 0, fmt.Errorf("the resolver says %s", strings.TrimPrefix(h.RCode.String(), "RCode"))
	}
	if err := p.SkipAllQuestions(); err != nil {
		return nil, 0, err
	}
	alias, found := map[string]string{}, map[string][]netip.Addr{}
	ttl := maxTTL
	for {
		rh, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			return nil, 0, err
		}
		owner := textOf(rh.Name)
		switch {
		case rh.Class == dnsmessage.ClassINET && rh.Type == dnsmessage.TypeA:
			a, err := p.AResource()
			if err != nil {
				return nil, 0, err
			}
			found[owner] = append(found[owner], netip.AddrFrom4(a.A))
		case rh.Class == dnsmessage.ClassINET && rh.Type == dnsmessage.TypeCNAME:
			c, err := p.CNAMEResource()
			if err != nil {
				return nil, 0, err
			}
			alias[owner] = textOf(c.CNAME)
		default:
			if err := p.SkipAnswer(); err != nil {
				return nil, 0, err
			}
			continue
		}
		ttl = min(ttl, time.Duration(rh.TTL)*time.Second)
	}
	for range maxChain {
		if addrs := found[name]; len(addrs) > 0 {
			return addrs[:min(len(addrs), maxAddrs)], ttl, nil
		}
		next, ok := alias[name]
		if !ok {
			break
		}
		name = next
	}
	return nil, minTTL, nil
}

func textOf(n dnsmessage.Name) string {
	return strings.ToLower(strings.TrimSuffix(n.String(), "."))
}

// exchange asks until a resolver answers and returns the answer as it came.
// With edns, which is nil or the asker's own, the answer may be as large as
// TCP carries.
func (r *resolver) exchange(ctx context.Context, q dnsmessage.Question, edns *dnsmessage.ResourceHeader) ([]byte, error) {
	if len(r.servers) == 0 {
		return nil, errors.New("no resolver is configured")
	}
	// Guests of others wait no longer than for an answer.
	if !waitTurn(ctx.Done(), dnsTimeout, r.shared.questions) {
		return nil, errors.New("too many questions are under way")
	}
	defer func() { <-r.shared.questions }()
	var errs []error
	for i := range max(upstreamTries, len(r.servers)) {
		if !r.shared.asked.allow() {
			errs = append(errs, errors.New("too many questions are asked"))
			break
		}
		server := r.servers[i%len(r.servers)]
		msg, err := askServer(ctx, server, q, edns)
		if err == nil {
			return msg, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func askServer(ctx context.Context, server netip.AddrPort, q dnsmessage.Question, edns *dnsmessage.ResourceHeader) ([]byte, error) {
	msg, err := askOver(ctx, "udp4", server, q, edns)
	if err != nil {
		return nil, err
	}
	var p dnsmessage.Parser
	if h, err := p.Start(msg); err != nil || !h.Truncated {
		return msg, err
	}
	return askOver(ctx, "tcp4", server, q, edns)
}

func askOver(ctx context.Context, network string, server netip.AddrPort, q dnsmessage.Question,
	edns *dnsmessage.ResourceHeader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	// The number and the port are all that tells the answer from a forged one:
	// both are new and random for each question.
	var id [2]byte
	rand.Read(id[:])
	query, err := questionFor(binary.BigEndian.Uint16(id[:]), q, edns)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp4" {
		if err := writeMessage(c, query); err != nil {
			return nil, err
		}
		msg, err := readMessage(c)
		if err == nil && !answers(msg, id, q) {
			err = fmt.Errorf("%s answered another question", server)
		}
		return msg, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096) // some times what was asked for
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if answers(buf[:n], id, q) {
			return slices.Clone(buf[:n]), nil
		}
	}
}

func questionFor(id uint16, q dnsmessage.Question, edns *dnsmessage.ResourceHeader) ([]byte, error) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	if err := errors.Join(b.StartQuestions(), b.Question(q)); err != nil {
		return nil, err
	}
	if edns != nil {
		// Of the asker's options none goes on.
		var h dnsmessage.ResourceHeader
		if err := errors.Join(
			h.SetEDNS0(ednsSize, dnsmessage.RCodeSuccess, edns.DNSSECAllowed()),
			b.StartAdditionals(),
			b.OPTResource(h, dnsmessage.OPTResource{}),
		); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// answers says whether msg is the answer to the question with this number.
func answers(msg []byte, id [2]byte, q dnsmessage.Question) bool {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || !h.Response || h.ID != binary.BigEndian.Uint16(id[:]) {
		return false
	}
	qs, err := p.AllQuestions()
	return err == nil && len(qs) == 1 && qs[0].Type == q.Type && qs[0].Class == q.Class && textOf(qs[0].Name) == textOf(q.Name)
}

// writeMessage and readMessage carry a DNS message over TCP.
func writeMessage(w io.Writer, msg []byte) error {
	if len(msg) > 65535 {
		return errors.New("message is too long")
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	return err
}

func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}
