package agent

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/network/networktest"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// onLoopback gives the sandboxes addresses of the loopback that are this process's own.
func (r *rig) onLoopback() {
	pid := os.Getpid()
	hosts := netip.PrefixFrom(netip.AddrFrom4([4]byte{127, byte(64 + pid>>8&0x3f), byte(pid), 0}), 24)
	r.cfg.parts.network = func(plan network.Plan, o network.Options) Network {
		plan.Hosts, plan.Veths = hosts, network.DefaultPlan().Veths
		r.net = networktest.New(plan, o)
		return r.net
	}
}

// envd serves on envd's port of a sandbox.
func (r *rig) envd(id sandbox.ID) {
	r.Helper()
	info, err := r.agent.base.manager.Get(id)
	if err != nil {
		r.Fatal(err)
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(info.HostIP, guestapi.Port).String())
	if err != nil {
		r.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") })}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	r.Cleanup(func() { s.Close(); <-served })
}

// traffic asks envd of a sandbox with a token, by host name.
func (r *rig) traffic(id sandbox.ID, token string) (status int, body string) {
	r.Helper()
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "http://"+r.agent.Addr().String()+"/health", nil)
	if err != nil {
		r.Fatal(err)
	}
	req.Host = fmt.Sprintf("%d-%s.localhost", guestapi.Port, id.Short())
	req.Header.Set(guestapi.HeaderToken, token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	text := make([]byte, 4096)
	n, _ := resp.Body.Read(text)
	return resp.StatusCode, string(text[:n])
}

// wantNotFound fails the test unless traffic finds no such sandbox.
func (r *rig) wantNotFound(id sandbox.ID, token string) {
	r.Helper()
	status, body := r.traffic(id, token)
	if status != http.StatusBadGateway || !strings.Contains(body, guestapi.SandboxNotFound) {
		r.Errorf("%s: HTTP %d %s", id, status, body)
	}
}

// resumes is how often a sandbox was resumed from disk.
func (r *rig) resumes(id sandbox.ID) (n int) {
	for _, e := range r.agent.base.manager.History("", id) {
		if e.From == sandbox.Hibernated && e.To == sandbox.Running {
			n++
			if e.Actor.What != "traffic" || !strings.HasPrefix(e.Actor.Address, "127.0.0.1") {
				r.Errorf("it was resumed by %+v", e.Actor)
			}
		}
	}
	return n
}

// Traffic with the token wakes a paused sandbox once, however much comes, and is served.
// A stranger's does not, and a sandbox that does not resume so is not found.
func TestTrafficWakesASandbox(t *testing.T) {
	r := newRig(t)
	r.onLoopback()
	r.start()
	m := r.agent.base.manager
	made, err := m.Create(t.Context(), sandbox.CreateRequest{Life: time.Minute, OnEnd: sandbox.HibernateOnTimeout, AutoResume: true})
	if err != nil {
		t.Fatal(err)
	}
	asleep, err := m.Create(t.Context(), sandbox.CreateRequest{Life: time.Hour, OnEnd: sandbox.HibernateOnTimeout})
	if err != nil {
		t.Fatal(err)
	}
	id := made.ID
	tokens, err := m.Tokens(id)
	if err != nil {
		t.Fatal(err)
	}
	r.envd(id)
	if status, body := r.traffic(id, tokens.Envd); status != http.StatusOK || body != "guest" {
		t.Errorf("running: HTTP %d %s", status, body)
	}
	for _, id := range []sandbox.ID{id, asleep.ID} {
		if err := m.Hibernate(t.Context(), id, sandbox.Hibernation{}); err != nil {
			t.Fatal(err)
		}
	}
	r.wantNotFound(asleep.ID, tokens.Envd)
	for _, token := range []string{"", "wrong", tokens.Envd + "x"} {
		if status, body := r.traffic(id, token); status != http.StatusForbidden || !strings.Contains(body, "can't be resumed") {
			t.Errorf("the token %q: HTTP %d %s", token, status, body)
		}
	}
	if info, err := m.Get(id); err != nil || info.State != sandbox.Hibernated {
		t.Fatalf("a stranger woke it: %s, %v", info.State, err)
	}
	before := r.resumes(id)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if status, body := r.traffic(id, tokens.Envd); status != http.StatusOK || body != "guest" {
				t.Errorf("HTTP %d %s", status, body)
			}
		})
	}
	all.Wait()
	if n := r.resumes(id) - before; n != 1 {
		t.Errorf("it was resumed %d times", n)
	}
	info, err := m.Get(id)
	if err != nil || info.State != sandbox.Running || info.EndAt.Sub(info.StartedAt).Round(time.Second) != 5*time.Minute {
		t.Errorf("%s, it lives for %s, %v", info.State, info.EndAt.Sub(info.StartedAt), err)
	}
	for _, id := range []sandbox.ID{id, asleep.ID} {
		if err := m.Destroy(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	r.wantNotFound(id, tokens.Envd)
}
