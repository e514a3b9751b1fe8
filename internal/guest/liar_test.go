package guest_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/testenv/liar"
)

const (
	// aWhile ends a call that waits for an answer which may still come, plenty
	// one that must end by itself.
	aWhile = 50 * time.Millisecond
	plenty = 30 * time.Second
)

// TestLiars has a guest lie in every way to every method: what comes of it is an
// error of the right class, or the right value, in bounded memory and in time,
// and no other server hears of it.
func TestLiars(t *testing.T) {
	// What is not unavailable, with what the guest may rightly decide.
	wantExec := map[string]*errdefs.Class{
		"megabytes of words, not found":        errdefs.NotFound,
		"megabytes of words, invalid argument": errdefs.InvalidArgument,
		"words with escapes":                   errdefs.Exhausted,
		"flood of output":                      nil,
		"exit status -1":                       errdefs.Unavailable,
		"signal that there is not":             nil,
	}
	wantInit := map[string]*errdefs.Class{
		"headers that turn writing around": errdefs.Unsupported,
		"clock at the end of time":         nil,
		"unauthorized with escapes":        errdefs.Unauthenticated,
		"endless blank JSON":               errdefs.InvalidArgument,
		"gzip bomb as an error":            errdefs.InvalidArgument,
		"deep JSON":                        errdefs.InvalidArgument,
		"plain megabytes":                  errdefs.InvalidArgument,
		"words with escapes":               errdefs.InvalidArgument,
		"a code that there is not":         errdefs.InvalidArgument,
		"time limit that there is not":     errdefs.InvalidArgument,
	}
	well := map[string]*errdefs.Class{"headers that turn writing around": nil, "clock at the end of time": nil}
	for _, lie := range liar.Lies() {
		t.Run(strings.ReplaceAll(lie.Name, " ", "_"), func(t *testing.T) {
			for _, method := range []struct {
				name string
				want map[string]*errdefs.Class
				call func(context.Context, *guest.Client) error
			}{
				{"exec", wantExec, func(ctx context.Context, c *guest.Client) error {
					got, err := c.Exec(ctx, guest.Command{Cmd: "true"})
					return checkResult(t, got, err)
				}},
				{"init", wantInit, initLiar},
				{"quiesce", well, func(ctx context.Context, c *guest.Client) error { return c.Quiesce(ctx, true) }},
				{"metrics", nil, func(ctx context.Context, c *guest.Client) error { _, err := c.Metrics(ctx); return err }},
				{"ready", well, func(ctx context.Context, c *guest.Client) error { return c.WaitReady(ctx) }},
			} {
				if lie.OfStreams && method.name != "exec" {
					continue
				}
				g := liar.Start(t, lie, "127.0.0.1:0")
				c := guest.New(g.Addr(), liar.Token)
				limit := plenty
				if lie.Endless || method.name == "ready" {
					limit = aWhile
				}
				ctx, cancel := g.Within(t.Context(), limit)
				var err error
				grew := liar.Growth(func() { err = method.call(ctx, c) })
				ended := ctx.Err() == nil
				cancel()
				c.Close()

				want, other := method.want[lie.Name]
				if !other {
					want = errdefs.Unavailable
					if strings.HasPrefix(lie.Name, "megabytes") && method.name == "init" {
						want = errdefs.InvalidArgument
					}
				}
				if lie.Endless && method.name == "exec" {
					want = errdefs.TimedOut
				}
				if got := errdefs.ClassOf(err); got != want || (err == nil) != (want == nil) {
					t.Errorf("%s: %v is %v, want %v", method.name, err, got, want)
				}
				if !g.Asked() {
					t.Errorf("%s: the guest was not asked", method.name)
				}
				if !ended && limit == plenty {
					t.Errorf("%s: only its time limit ended it", method.name)
				}
				if grew > liar.MaxGrowth {
					t.Errorf("%s: the memory grew by %d MiB", method.name, grew>>20)
				}
				if hits := g.Canary.Hits(); len(hits) != 0 {
					t.Errorf("%s: another server was called: %q", method.name, hits)
				}
				checkText(t, method.name, err)
			}
		})
	}
}

// checkResult: an exit status is one that a process can have, and none is made
// up for an error, which it returns.
func checkResult(t *testing.T, got guest.Result, err error) error {
	t.Helper()
	if err == nil && (got.ExitCode < 0 || got.ExitCode > 255) || err != nil && got.ExitCode != -1 {
		t.Errorf("exit status %d, %v", got.ExitCode, err)
	}
	if len(got.Stdout) > guest.DefaultMaxOutput+100 {
		t.Errorf("%d bytes of output were kept", len(got.Stdout))
	}
	checkText(t, "detail", errors.New(got.Detail))
	return err
}

// checkText: nothing in an error's text is for a terminal to obey, and a guest's
// part of it is bounded.
func checkText(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	text := err.Error()
	if len(text) > errdefs.MaxForeign+200 {
		t.Errorf("%s: the error has %d bytes", what, len(text))
	}
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("%s: the error is not printable: %q", what, text)
	}
	if strings.Contains(text, liar.Token) || strings.Contains(text, "127.0.0.1") {
		t.Errorf("%s: the error tells too much: %s", what, text)
	}
}

func initLiar(ctx context.Context, c *guest.Client) error {
	_, err := c.Init(ctx, guest.Init{AccessToken: liar.Token, Restored: true})
	return err
}
