package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// dnsTimeout bounds the answer to one question.
	dnsTimeout = 5 * time.Second
	// dnsIdle is how long a TCP connection may ask nothing.
	dnsIdle     = 10 * time.Second
	maxQuestion = 1232
)

// askable are the kinds of records that a guest may ask for. Others exist, but
// nothing there is of use to it: HTTPS and SVCB records would have programs
// hide the name that they connect to, or use QUIC.
var askable = []dnsmessage.Type{
	dnsmessage.TypeA, dnsmessage.TypeNS, dnsmessage.TypeCNAME, dnsmessage.TypeSOA, dnsmessage.TypePTR,
	dnsmessage.TypeMX, dnsmessage.TypeTXT, dnsmessage.TypeAAAA, dnsmessage.TypeSRV, typeCAA,
}

const typeCAA dnsmessage.Type = 257

// serveDatagrams answers questions until the socket is closed.
func (p *Proxy) serveDatagrams() {
	turn := make(chan struct{}, maxQuestions)
	buf := make([]byte, maxQuestion+1)
	for {
		n, from, err := p.cfg.DNSPacket.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an answer before
		}
		if n > maxQuestion || !p.asked.allow() {
			continue
		}
		select {
		case turn <- struct{}{}:
		default:
			continue
		}
		query := slices.Clone(buf[:n])
		p.wg.Go(func() {
			defer func() { <-turn }()
			if msg := p.answer(p.ctx, query, true); msg != nil {
				p.cfg.DNSPacket.WriteToUDPAddrPort(msg, from)
			}
		})
	}
}

// serveDNSConn answers questions on a connection, one after the other.
func (p *Proxy) serveDNSConn(c *net.TCPConn) {
	for {
		c.SetDeadline(time.Now().Add(dnsIdle))
		query, err := readMessage(c)
		if err != nil || len(query) > maxQuestion || !p.asked.allow() {
			return
		}
		msg := p.answer(p.ctx, query, false)
		if msg == nil || writeMessage(c, msg) != nil {
			return
		}
	}
}

// answer answers one message, nil if it deserves none. Nothing of a question leaves the
// host where the policy does not let the name through, of others name and kind.
func (p *Proxy) answer(ctx context.Context, query []byte, datagram bool) []byte {
	var parser dnsmessage.Parser
	h, err := parser.Start(query)
	if err != nil || h.Response {
		return nil
	}
	reply := dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	if h.OpCode != 0 {
		reply.RCode = dnsmessage.RCodeNotImplemented
		return finish(reply, nil)
	}
	qs, err := parser.AllQuestions()
	if err != nil || len(qs) != 1 {
		reply.RCode = dnsmessage.RCodeFormatError
		return finish(reply, nil)
	}
	q := qs[0]
	edns, err := ednsOf(&parser)
	if err != nil {
		reply.RCode = dnsmessage.RCodeFormatError
		return finish(reply, &q)
	}
	name, ok := canonical(q.Name.String())
	switch {
	case q.Class != dnsmessage.ClassINET:
		reply.RCode = dnsmessage.RCodeRefused
		return finish(reply, &q)
	case !ok:
		p.refuse("dns", name, netip.AddrPort{}, "no name of a host")
		reply.RCode = dnsmessage.RCodeNameError
		return finish(reply, &q)
	}
	if rule := p.denies(name); rule != "" {
		p.refuse("dns", name, netip.AddrPort{}, rule)
		p.deny(KindDNS, netip.AddrPort{}, &refusal{name, rule, rule})
		return p.sink(reply, q, name)
	}
	switch {
	case !slices.Contains(askable, q.Type):
		return finish(reply, &q)
	}
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	msg, err := p.resolver.exchange(ctx, q, edns)
	if err != nil {
		p.cfg.Log.Debug("question of a sandbox not answered", "name", name, "err", err)
		reply.RCode = dnsmessage.RCodeServerFailure
		return finish(reply, &q)
	}
	limit := 65535
	if datagram {
		limit = 512
		if edns != nil {
			limit = min(max(int(edns.Class), limit), ednsSize)
		}
	}
	if len(msg) > limit {
		reply.Truncated = true
		return finish(reply, &q)
	}
	binary.BigEndian.PutUint16(msg, h.ID)
	return msg
}

// sinkTTL is how long a guest may remember, in seconds, that a name has the address of
// the sink: the policy may change.
const sinkTTL = 5

// sink answers a question for a name that is not let through: it has the sink's address
// and no other records. Names that cannot be of the internet do not exist.
func (p *Proxy) sink(h dnsmessage.Header, q dnsmessage.Question, name string) []byte {
	if !p.cfg.Sink.Is4() || !strings.Contains(name, ".") || strings.HasSuffix(name, ".arpa") {
		h.RCode = dnsmessage.RCodeNameError
		return finish(h, &q)
	}
	b := dnsmessage.NewBuilder(nil, h)
	err := errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers())
	if q.Type == dnsmessage.TypeA {
		err = errors.Join(err, b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: sinkTTL},
			dnsmessage.AResource{A: p.cfg.Sink.As4()}))
	}
	msg, ferr := b.Finish()
	if err != nil || ferr != nil {
		return nil
	}
	return msg
}

// ednsOf finds the asker's EDNS record, nil if there is none.
func ednsOf(p *dnsmessage.Parser) (*dnsmessage.ResourceHeader, error) {
	if err := errors.Join(p.SkipAllAnswers(), p.SkipAllAuthorities()); err != nil {
		return nil, err
	}
	for {
		h, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Type == dnsmessage.TypeOPT {
			return &h, nil
		}
		if err := p.SkipAdditional(); err != nil {
			return nil, err
		}
	}
}

func finish(h dnsmessage.Header, q *dnsmessage.Question) []byte {
	b := dnsmessage.NewBuilder(nil, h)
	if q != nil {
		if errors.Join(b.StartQuestions(), b.Question(*q)) != nil {
			return nil
		}
	}
	msg, err := b.Finish()
	if err != nil {
		return nil
	}
	return msg
}
