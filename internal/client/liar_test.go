package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv/liar"
)

// lied is a call to a guest that lies.
type lied struct {
	name   string
	stream bool // reads a stream of events
	call   func(context.Context, *Sandbox) error
}

var liedTo = []lied{
	{"exec", true, func(ctx context.Context, s *Sandbox) error {
		status, err := s.Exec(ctx, Command{Cmd: "true"})
		if err == nil && (status < 0 || status > 255) {
			panic(fmt.Sprintf("exit status %d", status))
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

// fine are the calls that may succeed: the content is the guest's to choose.
var fine = map[string]bool{
	"exec flood of output": true, "exec signal that there is not": true,
	"stat no body": true, "list no body": true, "cp no body": true, "stat megabytes of words, not found": true,
	"cp length of an exabyte": true, "cp endless success": true, "cp chunk of an exabyte": true,
}

// TestLiars has a guest lie in every way to exec, top and cp: what comes of it is
// an error, in bounded memory and in time, and no other server hears of it.
func TestLiars(t *testing.T) {
	for _, lie := range liar.Lies() {
		t.Run(strings.ReplaceAll(lie.Name, " ", "_"), func(t *testing.T) {
			for _, x := range liedTo {
				if x.stream || !lie.OfStreams {
					x.check(t, lie)
				}
			}
		})
	}
}

func (x lied) check(t *testing.T, lie liar.Lie) {
	g := liar.Start(t, lie, "127.0.0.1:0")
	_, g.Honest = hostagentv1connect.NewHostAgentServiceHandler(&clienttest.Agent{})
	s := sandboxOf(t, g.URL())
	s.host.grace = 20 * time.Millisecond
	limit := 30 * time.Second
	if lie.Endless {
		limit = 50 * time.Millisecond
	}
	ctx, cancel := g.Within(t.Context(), limit)
	defer cancel()
	var err error
	grew := liar.Growth(func() { err = x.call(ctx, s) })
	if ctx.Err() != nil && !lie.Endless {
		t.Errorf("%s: only its time limit ended it", x.name)
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
	redirect := strings.HasPrefix(lie.Name, "redirect")
	switch {
	case err == nil && redirect:
		t.Errorf("%s: a redirect is taken for an answer", x.name)
	case err == nil && !fine[x.name+" "+lie.Name]:
		t.Errorf("%s: taken for the truth", x.name)
	case err != nil && (len(err.Error()) > errdefs.MaxForeign+200 || strings.ContainsFunc(err.Error(), unprintable)):
		t.Errorf("%s: the error is not fit to be shown: %.100q, %d bytes", x.name, err, len(err.Error()))
	}
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
