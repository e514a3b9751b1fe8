package errdefs

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxForeign bounds what Foreign returns, in bytes.
const MaxForeign = 512

// Foreign makes text of a guest or of a VMM fit for the text of an error. The guest
// may be hostile: what is not printable is escaped, and what is beyond MaxForeign
// is left out.
func Foreign(text string) string {
	const more = "…"
	var out []byte
	fits := 0 // how much of out leaves room for more
	for text = strings.TrimSpace(text); text != ""; {
		r, size := utf8.DecodeRuneInString(text)
		if unicode.IsPrint(r) && r != utf8.RuneError {
			out = append(out, text[:size]...)
		} else {
			quoted := strconv.Quote(text[:size])
			out = append(out, quoted[1:len(quoted)-1]...)
		}
		text = text[size:]
		switch {
		case len(out) <= MaxForeign-len(more):
			fits = len(out)
		case len(out) > MaxForeign:
			return string(out[:fits]) + more
		}
	}
	return string(out)
}
