package client

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv/liar"
)

// honest is the agent in front of a guest that lies.
type honest struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
}

func (honest) GetSandbox(_ context.Context, r *connect.Request[hostagentv1.GetSandboxRequest]) (*connect.Response[hostagentv1.GetSandboxResponse], error) {
	return connect.NewResponse(&hostagentv1.GetSandboxResponse{
		Sandbox: &hostagentv1.SandboxInfo{SandboxId: r.Msg.SandboxId, Status: "running"},
	}), nil
}

// TestLiars has a guest lie in every way to exec, top and cp: what comes of it is
// an error, in bounded memory and in time, and no other server hears of it.
func TestLiars(t *testing.T) {
	grace := termGrace
	termGrace = 20 * time.Millisecond
	defer func() { termGrace = grace }()
	_, agent := hostagentv1connect.NewHostAgentServiceHandler(honest{})
	calls := []struct {
		name   string
		stream bool // reads a stream of events
		call   func(context.Context, *Sandbox) error
	}{
		{"exec", true, func(ctx context.Context, s *Sandbox) error {
			status, err := s.Exec(ctx, Command{Cmd: "true"})
			if err == nil && (status < 0 || status > 255) {
				t.Errorf("exit status %d", status)
			}
			return err
		}},
		{"top", false, func(ctx context.Context, s *Sandbox) error { _, err := s.Usage(ctx); return err }},
		{"stat", false, func(ctx context.Context, s *Sandbox) error { _, err := s.stat(ctx, "", "/x"); return err }},
		{"list", false, func(ctx context.Context, s *Sandbox) error {
			_, err := s.processes("").List(ctx, connect.NewRequest(&process.ListRequest{}))
			return err
		}},
		{"cp", false, func(ctx context.Context, s *Sandbox) error {
			resp, err := s.files(ctx, "", http.MethodGet, "x", nil)
			if err == nil {
				defer resp.Body.Close()
				_, err = io.CopyN(io.Discard, resp.Body, 16<<20) // a file may have any length
			}
			return err
		}},
	}
	// A success is no lie where the content is the guest's to choose.
	fine := map[string]bool{
		"exec flood of output": true, "exec signal that there is not": true,
		"stat no body": true, "list no body": true, "cp no body": true, "stat megabytes of words, not found": true,
		"cp length of an exabyte": true, "cp endless success": true, "cp chunk of an exabyte": true,
	}
	for _, lie := range liar.Lies() {
		t.Run(strings.ReplaceAll(lie.Name, " ", "_"), func(t *testing.T) {
			for _, x := range calls {
				if lie.OfStreams && !x.stream {
					continue
				}
				g := liar.Start(t, lie, "127.0.0.1:0")
				g.Honest = agent
				s := sandboxOf(t, g.URL())
				limit := 30 * time.Second
				if lie.Endless {
					limit = 50 * time.Millisecond
				}
				ctx, cancel := g.Within(t.Context(), limit)
				var err error
				grew := liar.Growth(func() { err = x.call(ctx, s) })
				if ctx.Err() != nil && !lie.Endless {
					t.Errorf("%s: only its time limit ended it", x.name)
				}
				cancel()
				if err == nil && !fine[x.name+" "+lie.Name] && !strings.HasPrefix(lie.Name, "redirect 3") {
					t.Errorf("%s: taken for the truth", x.name)
				}
				if err == nil && strings.HasPrefix(lie.Name, "redirect") {
					t.Errorf("%s: a redirect is taken for an answer", x.name)
				}
				if !g.Asked() {
					t.Errorf("%s: the guest was not asked", x.name)
				}
				if grew > liar.MaxGrowth {
					t.Errorf("%s: the memory grew by %d MiB", x.name, grew>>20)
				}
				if hits := g.Canary.Hits(); len(hits) != 0 {
					t.Errorf("%s: another server was called: %q", x.name, hits)
				}
				if err != nil && (len(err.Error()) > errdefs.MaxForeign+200 || strings.ContainsFunc(err.Error(), unprintable)) {
					t.Errorf("%s: the error is not fit to be shown: %.100q, %d bytes", x.name, err, len(err.Error()))
				}
			}
		})
	}
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
