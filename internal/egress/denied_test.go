package egress

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const sinkText = "192.0.0.8"

// What a policy refuses is told to the client, and kept.
func TestDeniedIsTold(t *testing.T) {
	w := newWorld(t)
	w.sink = netip.MustParseAddr(sinkText)
	w.dns.set("good.example", goodAddr)
	w.dns.set("inside.example", "10.1.2.3")
	w.serveTLS(goodAddr+":443", "good")
	w.start(Policy{Allow: []string{"good.example", "inside.example"}})

	for name, rule := range map[string]string{"evil.example": ruleAllow, "": ruleNoName, "inside.example": ruleAddress} {
		_, err := askTLS(w.dial(sinkText+":443"), name)
		if err == nil || !strings.Contains(err.Error(), "access denied") {
			t.Errorf("TLS to %q: %v, want an alert", name, err)
		}
		w.wantDenial(t, Denial{Kind: KindTLS, Name: name, Addr: netip.MustParseAddrPort(sinkText + ":443"), Rule: rule})
	}
	for host, rule := range map[string]string{"evil.example": ruleAllow, "198.51.100.7": ruleNoName, "inside.example:80": ruleAddress} {
		c := w.dial(sinkText + ":80")
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("HTTP to %s: %v", host, err)
			continue
		}
		name := strings.TrimSuffix(host, ":80")
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusForbidden || !strings.Contains(string(b), "The network policy of this sandbox") ||
			!strings.Contains(string(b), name) {
			t.Errorf("HTTP to %s: %s, %q, %v", host, resp.Status, b, err)
		}
		w.wantDenial(t, Denial{Kind: KindHTTP, Name: name, Addr: netip.MustParseAddrPort(sinkText + ":80"), Rule: rule})
	}
	// What speaks neither is reset, and a client that is silent does not wait long.
	for _, said := range []string{"\x00\x01", ""} {
		c := w.dial(sinkText + ":5432")
		c.SetDeadline(time.Now().Add(timeout))
		io.WriteString(c, said)
		if n, err := c.Read(make([]byte, 10)); n > 0 || err == nil || errTimeout(err) != nil {
			t.Errorf("after %q: %d bytes, %v", said, n, err)
		}
	}
	if got := w.proxy.cfg.Shared.Counts().Denied; got[KindTLS] != 3 || got[KindHTTP] != 3 || got[KindTCP] == 0 {
		t.Errorf("counts %v", got)
	}
	if len(w.dialed) > 0 {
		t.Errorf("dialed %v", w.dialed)
	}
}

func (w *world) wantDenial(t *testing.T, want Denial) {
	t.Helper()
	for _, d := range w.denials.List() {
		if d.same(want) && d.Count == 1 && time.Since(d.Time) < time.Hour {
			return
		}
	}
	t.Errorf("%+v is not among %+v", want, w.denials.List())
}

// Names that are not let through lead to the sink, and no resolver is asked for them.
func TestDeniedNamesLeadToTheSink(t *testing.T) {
	w := newWorld(t)
	w.sink = netip.MustParseAddr(sinkText)
	w.start(Policy{Allow: []string{"good.example"}})
	for _, c := range []struct {
		name    string
		typ     dnsmessage.Type
		rcode   dnsmessage.RCode
		answers int
	}{
		{"evil.example.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, 1},
		{"Evil.example.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, 0},
		{"secret.good.example.", dnsmessage.TypeTXT, dnsmessage.RCodeSuccess, 0},
		{"evil.", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
		{"1.2.0.192.in-addr.arpa.", dnsmessage.TypePTR, dnsmessage.RCodeNameError, 0},
	} {
		m, err := w.askDNS("udp", question(c.name, c.typ, 9))
		if err != nil || m.RCode != c.rcode || len(m.Answers) != c.answers || len(m.Questions) != 1 {
			t.Errorf("%s %s = %+v, %v", c.name, c.typ, m, err)
		} else if c.answers > 0 && *m.Answers[0].Body.(*dnsmessage.AResource) != (dnsmessage.AResource{A: w.sink.As4()}) {
			t.Errorf("%s leads to %v", c.name, m.Answers[0].Body)
		}
	}
	if asked := w.dns.questions(); len(asked) > 0 {
		t.Errorf("asked of the resolver: %v", asked)
	}
	w.wantDenial(t, Denial{Kind: KindDNS, Name: "secret.good.example", Rule: ruleAllow})
}

// A guest fills no memory and no terminal.
func TestDenialsAreBounded(t *testing.T) {
	var ds Denials
	long := strings.Repeat("\x1b", 3*maxLogged)
	for i := range 10 * maxDenied {
		ds.Add(Denial{Kind: KindDNS, Name: fmt.Sprint(i, long), Time: time.Unix(int64(i), 0), Count: 1})
	}
	list := ds.List()
	if len(list) != maxDenied || !strings.HasPrefix(list[0].Name, fmt.Sprint(10*maxDenied-1)) {
		t.Errorf("%d denials, the first %+v", len(list), list[0])
	}
	for _, d := range list {
		if len(d.Name) > maxLogged || strings.ContainsRune(d.Name, '\x1b') {
			t.Errorf("kept %q", d.Name)
		}
	}
	again := list[5]
	again.Time, again.Count = time.Unix(1<<30, 0), 2
	ds.Add(again)
	if got := ds.List(); len(got) != maxDenied || got[0] != (Denial{Time: again.Time, Kind: KindDNS, Name: again.Name, Count: 3}) {
		t.Errorf("after one came again: %+v", got[0])
	}
}
