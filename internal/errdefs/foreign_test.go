package errdefs_test

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestForeign(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", ""},
		{" no room\n", "no room"},
		{`say "x" \ y`, `say "x" \ y`},
		{"größer 水", "größer 水"},
		{"\x1b]52;c;QQ==\a", `\x1b]52;c;QQ==\a`},
		{"a\nb\tc\r", `a\nb\tc`},
		{"\xff\x00", `\xff\x00`},
		{"\u202eabc", `\u202eabc`},
		{"\u009b31m", `\u009b31m`},
		{strings.Repeat("a", errdefs.MaxForeign), strings.Repeat("a", errdefs.MaxForeign)},
		{strings.Repeat("a", errdefs.MaxForeign+1), strings.Repeat("a", errdefs.MaxForeign-3) + "…"},
	} {
		if got := errdefs.Foreign(tt.text); got != tt.want {
			t.Errorf("%.40q: got %q, want %q", tt.text, got, tt.want)
		}
	}
}

func FuzzForeign(f *testing.F) {
	f.Add("a\x1b[2J\xff")
	f.Add(strings.Repeat("\x00", 300))
	f.Fuzz(func(t *testing.T, text string) {
		got := errdefs.Foreign(text)
		if len(got) > errdefs.MaxForeign || !utf8.ValidString(got) {
			t.Fatalf("%d bytes, %q", len(got), got)
		}
		for _, r := range got {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q in %q", r, got)
			}
		}
	})
}
