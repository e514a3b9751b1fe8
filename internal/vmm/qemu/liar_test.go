package qemu

import (
	"errors"
	"strings"
	"testing"
	"unicode"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// TestBounds: what a QEMU says is bounded, and so is what an error quotes of it.
func TestBounds(t *testing.T) {
	const desc = "\x1b]52;c;cm0gLXJmIH4=\a"
	for _, c := range []struct{ name, reply string }{
		{"long answer", `{"return": {"a": "` + strings.Repeat("a", 8*maxAnswer) + `"}}`},
		{"events without end", strings.Repeat(`{"event": "STOP", "timestamp": {}}`+"\n", maxAnswer/16) + `{"return": {}}`},
		{"long refusal", `{"error": {"class": "X", "desc": "\u001b` + strings.Repeat("a", maxAnswer/2) + `"}}`},
		{"nonsense", desc},
	} {
		path := monitorOf(t, greeting, func(command string) string {
			if command == "query-status" {
				return `{"return": {"status": "paused"}}`
			}
			return c.reply
		})
		err := vmAt(t, path).Resume(t.Context())
		if err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		if !strings.HasPrefix(c.name, "long refusal") && !errors.Is(err, errdefs.Unavailable) {
			t.Errorf("%s: %v is not unavailable", c.name, err)
		}
		if text := err.Error(); len(text) > errdefs.MaxForeign+200 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%s: the error has %d bytes, or is not printable: %.80q", c.name, len(text), text)
		}
	}
}
